//! Disks that retry, on storage that really fails: the guest's pattern never sees an error.

use std::time::Duration;

use tests::lab::host::faulty::{Behaviour, FaultyDisk};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::AGENT_CHANNEL;

use crate::full::{Small, thin};

#[test]
fn device_mapper_fails_below_virtio_blk() {
    inside(|| device_mapper(QemuVersion::V7_2, "virtio-blk"));
}

fn device_mapper(version: QemuVersion, bus: &str) {
    let storage = FaultyDisk::new("cloud", 4).expect("a disk of this test");
    let mut scene = step("boot", || Scene::boot(version, QUIET, AGENT_CHANNEL));
    let wish = format!("path={},bus={bus},cache=none,on_error.engine=hold", storage.path().display());
    let storm = step("attach", || Storm::on(&mut scene, "cloud", &wish));
    for behaviour in [Behaviour::Fails, Behaviour::ReadsFail, Behaviour::WritesFail] {
        step(&format!("an outage: {behaviour:?}"), || {
            storage.behave(behaviour).expect("device-mapper obeys");
            storm.waits_for(&scene, "suspended");
            // The guest's other work goes on.
            assert_eq!(scene.guest.check("sleep 1; echo alive").expect("the guest runs").trim(), "alive");
            let status = scene.vm.ok(&["status", "guest"]);
            assert!(
                status.lines().any(|line| line.starts_with("i/o:") && line.contains("cloud")),
                "{status}"
            );
            storage.behave(Behaviour::Works).expect("device-mapper obeys");
            storm.waits_for(&scene, "ok");
            storm.is_unharmed(&mut scene, "after the repair");
        });
    }
    println!("{}", storm.io(&scene));
    step("detach", || storm.detach(&mut scene));
    if version == QemuVersion::V10_0 {
        step("a proxy dies in an outage", || a_proxy_dies(&mut scene, &storage, bus));
    }
    scene.end();
}

/// Its successor goes on with the outage and its clock.
fn a_proxy_dies(scene: &mut Scene, storage: &FaultyDisk, bus: &str) {
    let wish = format!("path={},bus={bus},cache=none,on_error.engine=proxy", storage.path().display());
    let storm = Storm::on(scene, "far", &wish);
    storage.behave(Behaviour::Fails).expect("device-mapper obeys");
    storm.waits_for(scene, "suspended");
    let (since, proxy) =
        (storm.io(scene)["outage"]["since_unix_ms"].clone(), storm.proxy(scene).expect("a proxy"));
    scene.vm.kill_process(proxy);
    scene.vm.wait_for("another proxy", || storm.proxy(scene).is_some_and(|other| other != proxy));
    let attempts = || storm.io(scene)["outage"]["attempts"].as_u64().unwrap_or_default();
    let before = attempts();
    scene.vm.wait_for("more attempts", || attempts() > before + 1);
    assert_eq!(storm.io(scene)["outage"]["since_unix_ms"], since, "{}", scene.vm.owner_log());
    storage.behave(Behaviour::Works).expect("device-mapper obeys");
    storm.waits_for(scene, "ok");
    storm.is_unharmed(scene, "after the repair");
    assert_eq!(storm.count(scene, "suspensions"), 1, "one outage, two proxies: {}", storm.io(scene));
    storm.leaves(scene);
}

#[test]
fn a_full_file_system_is_an_outage_until_there_is_room() {
    inside(|| {
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let small = Small::beside(&scene.vm);
        let image = small.path("thin.img");
        thin(&image);
        small.fill(8);
        let wish = format!(
            "path={image},id=thin,serial=thin,on_error.write=retry,on_error.interval=200ms,on_error.engine=hold"
        );
        step("attach", || scene.attach(["--disk", &wish], "disk", "serial=thin"));
        let script =
            format!("dd if=/dev/urandom of=/dev/{} bs=64k count=128 oflag=direct", scene.disk("thin"));
        let writer = scene.guest.begin(&script).expect("a writer");
        let outage = || scene.vm.device("thin")["io"]["outage"].clone();
        step("the file system is full", || {
            scene.vm.wait_for("the disk to be suspended", || outage()["nospace"] == true);
            println!("{}", outage());
        });
        small.relieve();
        let output = scene.guest.finish(writer, Duration::from_secs(60)).expect("the writer ends");
        assert_eq!(output.status, 0, "the guest has seen no error: {output:?}");
        scene.vm.wait_for("the end of the outage", || outage().is_null());
        scene.end();
    });
}

mod soak {
    use super::*;

    #[test]
    fn device_mapper_fails_below_virtio_scsi() {
        inside(|| device_mapper(QemuVersion::V10_0, "virtio-scsi"));
    }

    /// Its errors are held, and told at the timeout although the image above it works all the time.
    #[test]
    fn a_backing_file_fails_below_a_proxy() {
        inside(|| {
            let storage = FaultyDisk::new("golden", 4).expect("a disk of this test");
            let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
            let top = scene.vm.qcow2("top.qcow2", Err((&storage.path().display().to_string(), "raw")));
            let wish =
                format!("path={top},format=qcow2,cache=none,on_error.engine=proxy,on_error.timeout=5s");
            let storm = step("attach", || Storm::calm_on(&mut scene, "thin", &wish));
            let read = format!("dd if={} of=/dev/null bs=4096 count=1 iflag=direct", storm.name);
            scene.guest.check(&read).expect("a read");
            storage.behave(Behaviour::Fails).expect("device-mapper obeys");
            let reader = scene.guest.begin(&read).expect("a reader");
            storm.waits_for(&scene, "suspended");
            // Whole clusters, which need nothing of what is below.
            let write = format!("dd if=/dev/zero of={} bs=64k seek=20 count=20 oflag=direct", storm.name);
            while storm.io(&scene)["state"] == "suspended" {
                scene.guest.check(&write).expect("the top works");
            }
            // Since then the top may have been written again, which ends what is known of an outage of which nothing is kept.
            assert_eq!(storm.count(&scene, "timeouts"), 1, "{}", storm.io(&scene));
            let output = scene.guest.finish(reader, Duration::from_secs(60)).expect("the reader ends");
            assert_ne!(output.status, 0, "the guest is told: {output:?}");
            storage.behave(Behaviour::Works).expect("device-mapper obeys");
            scene.guest.check(&read).expect("a read after the repair");
            storm.waits_for(&scene, "ok");
            scene.end();
        });
    }
}
