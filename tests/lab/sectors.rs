//! SCSI disks of the host with bad sectors: held like any failure, whoever retries.

use tests::lab::host::debug::DebugDisks;
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::AGENT_CHANNEL;

#[test]
fn bad_sectors_are_held_until_they_are_good() {
    inside(|| {
        // All but the beginning, so that the pattern comes by at once and whoever looks at the beginning finds nothing wrong.
        let disks = DebugDisks::new(2, 1, &(256..2048)).expect("disks of this test");
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let wishes = [("blk", "virtio-blk", "hold"), ("lun", "virtio-scsi", "proxy")];
        let storms = wishes.iter().enumerate().map(|(number, (id, bus, engine))| {
            let path = disks.path(number).display().to_string();
            let wish = format!("path={path},bus={bus},cache=none,on_error.engine={engine}");
            let storm = Storm::on(&mut scene, id, &wish);
            // Each attempt of the one disk is a pause for the other one, which must have failed as well in between.
            scene.vm.ok(&["io", "set", "guest", id, "--interval", "1s"]);
            storm
        });
        let storms: Vec<Storm> = storms.collect();
        step("bad sectors", || {
            disks.are_bad(true).expect("the kernel obeys");
            for storm in &storms {
                storm.waits_for(&scene, "suspended");
                println!("{}: {}", storm.id, storm.io(&scene)["outage"]);
            }
            assert_eq!(scene.guest.check("sleep 1; echo alive").expect("the guest runs").trim(), "alive");
        });
        step("good sectors", || {
            disks.are_bad(false).expect("the kernel obeys");
            for storm in &storms {
                storm.waits_for(&scene, "ok");
                storm.is_unharmed(&mut scene, "after the repair");
            }
        });
        for storm in storms {
            storm.detach(&mut scene);
        }
        scene.end();
    });
}
