//! What is refused while the storage of a disk fails: at once, naming the disk; and what ends such a VM.

use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::guest::{BOOT, PatternWish};
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::refusals::{each_is_refused, is_refused};
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::{AGENT_CHANNEL, Vm, finished};

on_one! { 7.2:
    resets => a_reset_in_an_outage,
    paused => a_reset_of_a_paused_vm,
}

on_one! { 10.0:
    refused => while_a_disk_is_suspended,
    boot_disk => while_the_boot_disk_is_suspended,
}

/// What a command that is answered at once may take on a loaded machine.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Lets the storage of disk `data` fail while the guest uses it; gives the program that does.
fn suspend(scene: &mut Scene) -> Child {
    let name = format!("/dev/{}", scene.disk("data"));
    scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
    scene.guest.wait_pattern(&name, "pattern", |report| report.verified > 0).expect("it goes on");
    let mut drill = scene.vm.command(&["drill", "guest", "data", "--fail-for", "25s"]);
    let drill = drill.spawn().expect("qvirt starts");
    scene.vm.wait_for("the suspension", || scene.vm.device("data")["io"]["state"] == "suspended");
    drill
}

fn while_a_disk_is_suspended(version: QemuVersion) {
    let drive = "[[disk]]\nid = \"cd0\"\ndevice = \"cdrom\"\n";
    let mut scene = Scene::boot(version, QUIET, &format!("{AGENT_CHANNEL}{drive}"));
    let image = scene.vm.raw("data.img", 16, "x");
    let wish = "on_error.read=retry,on_error.write=retry,on_error.interval=300ms,on_error.engine=hold";
    scene.attach(["--disk", &format!("path={image},id=data,serial=data,{wish}")], "disk", "serial=data");
    scene.vm.wait_for("the capacity", || scene.vm.device("data")["size_bytes"] == json!(16 << 20));
    let medium = scene.vm.raw("medium.img", 1, "x");
    scene.vm.ok(&["media", "guest", "cd0", "insert", &medium]);
    let drill = suspend(&mut scene);
    let near = scene.vm.raw("near.img", 1, "x");
    each_is_refused(&scene.vm, &near, AT_ONCE, &["is refused: I/O of disk data (vda) is suspended since "]);
    for eject in [&["media", "guest", "cd0", "eject"][..], &["qmp", "guest", "eject", r#"{"id":"cd0"}"#]] {
        is_refused(&scene.vm, eject, AT_ONCE, &["is refused: I/O of disk data (vda) is suspended since "]);
    }
    let devices = scene.vm.ok(&["devices", "guest"]);
    assert!(devices.contains(" 16MiB? "), "the last known capacity: {devices}");
    // What others have is not refused.
    scene.vm.ok(&["attach", "guest", "--nic", "user=true,id=net"]);

    // It ends what is held, and the guest boots anew.
    assert_eq!(scene.vm.device("data")["io"]["state"], "suspended");
    scene.vm.ok(&["reset", "guest"]);
    scene.guest = scene.vm.guest();
    scene.guest.wait_ready(BOOT).expect("the guest boots again");
    assert_eq!(scene.vm.status()["state"], "running");
    println!("qvirt drill: {}", finished(drill));
    scene.vm.wait_for("the end of the suspension", || scene.vm.device("data")["io"]["state"] == "ok");

    let drill = suspend(&mut scene);
    let begin = Instant::now();
    scene.vm.ok(&["kill", "guest"]);
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    println!("qvirt drill: {}", finished(drill));
    scene.vm.nothing_left();
}

/// It clears the requests of a disk that is not booted from, and the guest boots while the storage still fails: up to where it looks for partitions.
fn a_reset_in_an_outage(version: QemuVersion) {
    for (engine, bus) in [("hold", "virtio-scsi"), ("proxy", "virtio-blk")] {
        let mut scene = crate::suspension::boot(version);
        let storm = Storm::calm(&mut scene, "disk", &format!("bus={bus},on_error.engine={engine}"));
        storm.fail_for(&scene, 600_000);
        let write =
            format!("dd if=/dev/zero of={} bs=4096 count=1 oflag=direct >/dev/null 2>&1 &", storm.name);
        scene.guest.check(&write).expect("it begins");
        let fails_at = |operation: &str| {
            let is_it = || storm.io(&scene)["outage"]["operation"] == operation;
            scene.vm.wait_for(&format!("a {operation} to be held"), is_it);
        };
        fails_at("write");
        scene.vm.ok(&["reset", "guest"]);
        fails_at("read");
        assert_eq!(
            (scene.vm.status()["state"].clone(), storm.io(&scene)["drilled"].clone()),
            (json!("running"), json!(true))
        );
        scene.vm.ok(&["kill", "guest"]);
        scene.vm.nothing_left();
    }
}

/// With engine `pause` the VM stands still for the first request that its guest makes anew, until the storage works.
fn a_reset_of_a_paused_vm(version: QemuVersion) {
    let mut scene = crate::suspension::boot(version);
    for (id, bus) in [("blk", "virtio-blk"), ("lun", "virtio-scsi")] {
        let storm = Storm::begin(&mut scene, id, &format!("bus={bus},on_error.engine=pause"));
        storm.fail_for(&scene, 6000);
        storm.waits_for(&scene, "suspended");
        scene.vm.ok(&["reset", "guest"]);
        scene.guest = scene.vm.guest();
        scene.guest.wait_ready(BOOT).expect("the guest boots again");
        storm.waits_for(&scene, "ok");
        assert_eq!(scene.vm.status()["state"], "running");
        let storm = Storm::of_disk(&mut scene, id);
        storm.is_unharmed(&mut scene, "after a reset");
        storm.detach(&mut scene);
    }
    scene.end();
}

/// A boot sector that has the firmware read the next one for ever, by the disk that it was booted from (int 13h, function 42h).
const READER: &[u8] =
    b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0\xbc\x00\x7c\xb4\x42\xbe\x14\x7c\xcd\x13\xeb\xf7\x10\0\x01\0\0\x80\0\0\x01";

/// A reset would find nothing to boot from, whichever engine keeps the disk from the start.
fn while_the_boot_disk_is_suspended(version: QemuVersion) {
    for engine in ["hold", "proxy"] {
        let vm = Vm::new(version, QUIET, 8, "");
        let mut sector = READER.to_vec();
        sector.resize(510, 0);
        sector.extend(b"\x55\xaa");
        let image = vm.raw("sys.img", 1, "");
        std::fs::write(&image, [sector, vec![b'x'; 1 << 20]].concat()).expect("the image is written");
        let text = std::fs::read_to_string(vm.config()).expect("the VM file");
        let (head, rest) = text.split_once("[kernel]").expect("a kernel");
        let (_, rest) = rest.split_once("[pcie]").expect("ports");
        let on_error = format!("{{ read = \"retry\", interval = \"300ms\", engine = \"{engine}\" }}");
        let disk =
            format!("[[disk]]\nid = \"sys\"\npath = {image:?}\nbootindex = 1\non_error = {on_error}\n");
        std::fs::write(vm.config(), format!("{head}[pcie]{rest}\n{disk}")).expect("the VM file is written");
        vm.start();
        let is = |state: &str| vm.device("sys")["io"]["state"] == state;
        let mut drill = vm.command(&["drill", "guest", "sys", "--fail-for", "5s"]);
        let drill = drill.spawn().expect("qvirt starts");
        vm.wait_for("the suspension", || is("suspended"));
        let raw = ["qmp", "guest", "system_reset"];
        for words in [&["reset", "guest"][..], &["reboot", "guest"], &raw] {
            is_refused(&vm, words, AT_ONCE, &["is refused: I/O of disk sys (vda) is suspended"]);
        }
        println!("qvirt drill: {}", finished(drill));
        vm.wait_for("the end of the suspension", || is("ok"));
        vm.ok(&["reset", "guest"]);
        vm.end();
    }
}
