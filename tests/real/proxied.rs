//! Disks behind a proxy, while a guest writes, reads and verifies a pattern on them all the time: outages, timeouts, and deaths of owner and proxy. The
//! storage fails by a drill, in the proxy.

use std::time::{Duration, Instant};

use tests::on_one;
use tests::qemu::{QemuVersion, images};
use tests::storm::Storm;
use tests::vm::finished;

use crate::faults::Follower;
use crate::suspension::{boot, in_time};

on_one! { 10.0:
    deaths => owners_and_proxies_that_die,
    qcow2 => images_that_grow,
    chain => images_below,
    renamed => a_name_that_is_used_again,
}

on_one! { 7.2:
    held => an_outage_that_ends_in_time,
    drained => drains_while_requests_are_held,
}

const PROXY: &str = "on_error.engine=proxy";

fn an_outage_that_ends_in_time(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = in_time(&mut scene, "proxy");
    storm.leaves(&mut scene);
    scene.end();
}

fn owners_and_proxies_that_die(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", &format!("{PROXY},on_error.timeout=10m"));
    // The owner, in an outage: the same proxy goes on.
    storm.fail_for(&scene, 4000);
    storm.waits_for(&scene, "suspended");
    let (since, proxy) = (storm.io(&scene)["outage"]["since_unix_ms"].clone(), storm.proxy(&scene));
    scene.vm.kill_owner();
    scene.vm.start();
    assert_eq!((storm.io(&scene)["outage"]["since_unix_ms"].clone(), storm.proxy(&scene)), (since, proxy));
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after the owner died");
    scene.vm.kill_owner();
    storm.is_unharmed(&mut scene, "while there is no owner");
    scene.vm.start();
    // The proxy, with requests in flight.
    for round in 0..3 {
        let proxy = storm.proxy(&scene).expect("a proxy");
        scene.vm.kill_process(proxy);
        scene.vm.wait_for("another proxy", || storm.proxy(&scene).is_some_and(|other| other != proxy));
        storm.is_unharmed(&mut scene, &format!("after proxy {round} died"));
    }
    // Both, the proxy first while nobody can start another one.
    let (owner, proxy) = (scene.vm.owner_pid(), storm.proxy(&scene).expect("a proxy"));
    scene.vm.kill_process(owner);
    scene.vm.kill_process(proxy);
    scene.vm.start();
    storm.is_unharmed(&mut scene, "after both died");
    scene.end();
}

fn drains_while_requests_are_held(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", PROXY);
    let other = Storm::begin(&mut scene, "other", "bus=scsi,on_error.engine=hold");
    // Turns of another disk.
    storm.fail_for(&scene, 6000);
    storm.waits_for(&scene, "suspended");
    other.fail_for(&scene, 2000);
    other.waits_for(&scene, "suspended");
    other.waits_for(&scene, "ok");
    other.is_unharmed(&mut scene, "beside a disk that fails");
    assert_eq!(storm.io(&scene)["state"], "suspended");
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after turns of another disk");
    // A pause.
    storm.fail_for(&scene, 3000);
    storm.waits_for(&scene, "suspended");
    scene.vm.ok(&["pause", "guest"]);
    scene.vm.ok(&["resume", "guest"]);
    assert_eq!(scene.guest.check("echo alive").expect("the guest lives").trim(), "alive");
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after a pause");
    // The end.
    storm.fail_for(&scene, 60_000);
    storm.waits_for(&scene, "suspended");
    scene.end();
}

/// What was kept of a disk for the next owner is not what another disk of its name is.
fn a_name_that_is_used_again(version: QemuVersion) {
    let mut scene = boot(version);
    for engine in ["hold", "proxy", "hold"] {
        let storm = Storm::begin(&mut scene, "blk", &format!("on_error.engine={engine}"));
        scene.vm.kill_owner();
        scene.vm.start();
        assert_eq!(storm.io(&scene)["state"], "ok", "{engine}");
        storm.drill(&scene, "700ms", &[]);
        storm.is_unharmed(&mut scene, engine);
        storm.detach(&mut scene);
    }
    scene.end();
}

/// What the guest reads of a backing file is held as well, however far below it is.
fn images_below(version: QemuVersion) {
    let mut scene = boot(version);
    let people = Follower::start(&scene.vm, "events.txt", &[]);
    for (id, cache) in [("direct", "none"), ("cached", "writeback")] {
        let base = scene.vm.raw(&format!("{id}.base"), 4, "bottom");
        // A file that ends in the middle of a block.
        std::fs::OpenOptions::new()
            .append(true)
            .open(&base)
            .expect("it is ours")
            .set_len((4 << 20) + 7)
            .expect("longer");
        let middle = scene.vm.qcow2(&format!("{id}.middle"), Err((&base, "raw")));
        let top = scene.vm.qcow2(&format!("{id}.top"), Err((&middle, "qcow2")));
        let wish = format!("path={top},format=qcow2,cache={cache},{PROXY},on_error.timeout=1m");
        let storm = Storm::calm_on(&mut scene, id, &wish);
        let read = format!("dd if={} bs=4096 count=1 iflag=direct 2>/dev/null | head -c 6", storm.name);
        assert_eq!(scene.guest.check(&read).expect("a read"), "bottom");
        let (fails_for, begin) = (Duration::from_secs(4), Instant::now());
        storm.fail_for(&scene, 4000);
        assert_eq!(scene.guest.check(&read).expect("no error"), "bottom");
        assert!(begin.elapsed() >= fails_for, "read after {:?}, past the proxy", begin.elapsed());
        storm.waits_for(&scene, "ok");
        assert_eq!(storm.count(&scene, "suspensions"), 1, "{}", storm.io(&scene));
        // What is read is in the lowest one.
        let words = ["QVIRT_IO_SUSPENDED", &format!("device={id} "), &format!("path={base} ")];
        people.sees(&scene.vm, &words);
        // Its death is an outage that ends with it, for all layers.
        scene.vm.kill_process(storm.proxy(&scene).expect("a proxy"));
        assert_eq!(scene.guest.check(&read).expect("no error"), "bottom");
    }
    drop(people);
    scene.end();
}

fn images_that_grow(version: QemuVersion) {
    let mut scene = boot(version);
    for (id, more) in [("blk", "cache=none,iothread=io1"), ("lun", "bus=scsi,scsi.controller=1")] {
        let image = scene.vm.qcow2(&format!("{id}.qcow2"), Ok(16));
        let storm = Storm::on(&mut scene, id, &format!("path={image},format=qcow2,{more},{PROXY}"));
        storm.drill(&scene, "700ms", &[]);
        storm.is_unharmed(&mut scene, "after the outage");
        storm.leaves(&mut scene);
        let mut command = std::process::Command::new(images().qemu_img(version));
        command.args(["check", "-f", "qcow2", &image]).stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let checked = finished(command.spawn().expect("qemu-img starts"));
        assert!(checked.code == 0 && checked.stdout.contains("No errors"), "{checked}");
    }
    scene.end();
}
