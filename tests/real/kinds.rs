//! Attach and detach of each kind of device, in one guest for many steps.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tests::guest::SCRIPT;
use tests::qemu::QemuVersion;
use tests::vhost_user::{Backend, guest_words};
use tests::vm::Vm;

use tests::on_both;
use tests::scene::{QUIET, Scene};

on_both! {
    virtio_blk => virtio_blk_disks,
    virtio_scsi => virtio_scsi_disks,
    nic => nics,
    port => consoles_and_channels,
}

fn virtio_blk_disks(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let before = scene.seen.clone();

    // Raw, qcow2, read-only; the guest's view of each is a line.
    let raw = scene.vm.raw("plain.img", 16, "PLAIN");
    let line = scene.attach(["--disk", &format!("path={raw},id=d1,serial=plain")], "disk", "serial=plain");
    assert!(
        line.contains(" 16777216 ") && line.contains(" ro=0 ") && line.contains(" cache=back "),
        "{line}"
    );
    assert_eq!(scene.read_disk("plain", 5), "PLAIN");
    scene
        .guest
        .check("printf WRITTEN | dd of=/dev/vda bs=512 seek=9 conv=fsync 2>/dev/null")
        .expect("the guest writes");
    scene.detach("d1", &before);
    let image = std::fs::read(&raw).expect("the image is read");
    assert!(image[9 * 512..].starts_with(b"WRITTEN"), "what the guest wrote is in the image");

    let qcow2 = scene.vm.qcow2("fresh.qcow2", Ok(8));
    let line = scene.attach(
        ["--disk", &format!("path={qcow2},format=qcow2,id=d2,serial=fresh")],
        "disk",
        "serial=fresh",
    );
    assert!(line.contains(" 8388608 "), "{line}");
    assert_eq!(scene.vm.device("d2")["address"], "rp2", "a port that was just left gets a rest");
    let line = scene.attach(
        ["--disk", &format!("path={raw},id=d3,serial=readonly,read_only=true")],
        "disk",
        "serial=readonly",
    );
    assert!(line.contains(" ro=1 "), "{line}");
    scene.vm.ok(&["detach", "guest", "d3", "--wait", "30s"]);
    scene.detach("d2", &before);

    chain(&mut scene);
    cache_modes(&mut scene);
    discard(&mut scene);

    // Queues: the guest uses as many as it has processors. An iothread, which cannot leave before its disk.
    scene.vm.ok(&["attach", "guest", "--iothread", "id=io1"]);
    let wish = format!("path={raw},id=d6,serial=queued,queues=2,iothread=io1,cache=none,aio=native");
    let line = scene.attach(["--disk", &wish], "disk", "serial=queued");
    assert!(line.contains(" queues=2 "), "{line}");
    assert_eq!(scene.vm.qmp("query-iothreads", &json!({}))[0]["id"], "io1");
    let refused = scene.vm.expect(3, &["detach", "guest", "io1"]);
    assert!(refused.stderr.contains("d6"), "{refused}");
    assert_eq!(scene.read_disk("queued", 5), "PLAIN");
    scene.detach("d6", &before);
    scene.vm.ok(&["detach", "guest", "io1"]);
    assert_eq!(scene.vm.qmp("query-iothreads", &json!({})), json!([]));

    scene.wait_devices(&[]);
    scene.end();
}

/// Three layers: the guest reads from the bottom, writes to the top, and the layers below stay as they are.
fn chain(scene: &mut Scene) {
    let before = scene.seen.clone();
    let bottom = scene.vm.raw("bottom.img", 4, "BOTTOM");
    let middle = scene.vm.qcow2("middle.qcow2", Err((&bottom, "raw")));
    let top = scene.vm.qcow2("top.qcow2", Err((&middle, "qcow2")));
    let below = [&bottom, &middle].map(|path| std::fs::read(path).expect("a layer is read"));
    let wish = format!("path={top},format=qcow2,id=d4,serial=layered");
    scene.attach(["--disk", &wish], "disk", "serial=layered");
    assert_eq!(scene.read_disk("layered", 6), "BOTTOM");
    scene.guest.check("printf TOP | dd of=/dev/vda bs=1 conv=fsync 2>/dev/null").expect("the guest writes");
    assert_eq!(scene.read_disk("layered", 6), "TOPTOM");
    scene.detach("d4", &before);
    assert_eq!([&bottom, &middle].map(|path| std::fs::read(path).expect("a layer is read")), below);
    // Once more: the top has what was written.
    scene.attach(["--disk", &wish], "disk", "serial=layered");
    assert_eq!(scene.read_disk("layered", 6), "TOPTOM");
    scene.detach("d4", &before);
    let nodes = scene.vm.qmp("query-named-block-nodes", &json!({"flat": true}));
    assert_eq!(nodes, json!([]), "no layer's node is left");
}

/// The guest's write cache follows the mode; QEMU's nodes follow it to the bottom.
fn cache_modes(scene: &mut Scene) {
    let image = scene.vm.qcow2("cached.qcow2", Ok(4));
    let modes =
        [("writethrough", "through"), ("none", "back"), ("directsync", "through"), ("unsafe", "back")];
    for (mode, guest) in modes {
        let wish = format!("path={image},format=qcow2,id=d5,serial={mode},cache={mode}");
        let line = scene.attach(["--disk", &wish], "disk", &format!("serial={mode}"));
        assert!(line.contains(&format!(" cache={guest} ")), "{mode}: {line}");
        let nodes = scene.vm.qmp("query-named-block-nodes", &json!({"flat": true}));
        for node in nodes.as_array().expect("a list of nodes") {
            assert_eq!(node["cache"]["direct"], mode == "none" || mode == "directsync", "{mode}: {node}");
            assert_eq!(node["cache"]["no-flush"], mode == "unsafe", "{mode}: {node}");
        }
        scene.vm.ok(&["detach", "guest", "d5", "--wait", "30s"]);
    }
    scene.sees("the cached disks gone", |seen| seen.disks().is_empty());
}

/// The guest discards; with `unmap` the host gets the blocks back, without it does not.
fn discard(scene: &mut Scene) {
    for (word, freed) in [("ignore", false), ("unmap", true)] {
        let image = scene.vm.raw(&format!("{word}.img"), 1, &"x".repeat(1 << 20));
        let blocks = || Path::new(&image).metadata().expect("the image is there").blocks();
        let full = blocks();
        let wish = format!("path={image},id=d7,serial={word},discard={word}");
        let line = scene.attach(["--disk", &wish], "disk", &format!("serial={word}"));
        assert!(line.contains(" discard=1 "), "{line}");
        let name = scene.disk(word);
        scene.guest.check(&format!("blkdiscard /dev/{name}")).expect("the guest discards");
        scene.vm.ok(&["detach", "guest", "d7", "--wait", "30s"]);
        assert_eq!(blocks() < full / 2, freed, "discard={word}: {full} blocks became {}", blocks());
    }
    scene.sees("the discarding disks gone", |seen| seen.disks().is_empty());
}

fn virtio_scsi_disks(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let before = scene.seen.clone();
    let paths: Vec<String> =
        (0..4).map(|n| scene.vm.raw(&format!("lun{n}.img"), 4, &format!("LUN{n}"))).collect();

    // The controller is made for the first LUN.
    let wish = format!("path={},bus=virtio-scsi,id=s0,serial=first", paths[0]);
    let line = scene.attach(["--disk", &wish], "disk", "serial=first");
    assert!(line.contains(" hctl=0:0:0:0 id=s0"), "{line}");
    assert_eq!(scene.read_disk("first", 4), "LUN0");
    // An address of one's own, a second unit of the same target, a name of one's own.
    let wish = format!(
        "path={},bus=virtio-scsi,id=s1,serial=second,scsi.target=5,scsi.unit=0,device_id=named",
        paths[1]
    );
    let line = scene.attach(["--disk", &wish], "disk", "serial=second");
    assert!(line.contains(" hctl=0:0:5:0 id=named"), "{line}");
    let wish = format!(
        "path={},bus=virtio-scsi,id=s2,serial=third,scsi.target=5,scsi.unit=3,read_only=true",
        paths[2]
    );
    let line = scene.attach(["--disk", &wish], "disk", "serial=third");
    assert!(line.contains(" hctl=0:0:5:3 id=s2") && line.contains(" ro=1 "), "{line}");
    let taken = format!("path={},bus=virtio-scsi,scsi.target=5,scsi.unit=3", paths[3]);
    let refused = scene.vm.expect(3, &["attach", "guest", "--disk", &taken]);
    assert!(refused.stderr.contains("s2"), "{refused}");
    let wish = format!("path={},bus=virtio-scsi,id=s3,serial=cached,cache=writethrough", paths[3]);
    let line = scene.attach(["--disk", &wish], "disk", "serial=cached");
    assert!(line.contains(" cache=through "), "{line}");

    // CD-ROM drives: one that is empty, and one with an image.
    let line = scene.attach(["--disk", "device=cdrom,id=cd0"], "cdrom", "media=none");
    assert!(line.contains(" sr0 "), "{line}");
    let disc = scene.vm.raw("disc.iso", 2, "DISC");
    scene.attach(["--disk", &format!("device=cdrom,id=cd1,path={disc}")], "cdrom", "media=2097152");
    let text = scene
        .guest
        .check("dd if=/dev/sr1 bs=2048 count=1 2>/dev/null | head -c 4")
        .expect("the guest reads the disc");
    assert_eq!(text, "DISC");

    // The controller cannot leave before its disks, and leaves with the last of them.
    let controller =
        scene.vm.device_ids().into_iter().find(|id| id.starts_with("scsi")).expect("a controller");
    let refused = scene.vm.expect(3, &["detach", "guest", &controller]);
    assert!(refused.stderr.contains("s0") && refused.stderr.contains("cd1"), "{refused}");
    for id in ["cd1", "s1", "cd0", "s3", "s2"] {
        scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
    }
    scene.sees("one disk of six left", |seen| seen.disks().len() == 1 && seen.of("cdrom").is_empty());
    scene.detach("s0", &before);
    scene.wait_devices(&[]);

    // A controller that was asked for stays, and has what was asked for.
    scene.vm.ok(&["attach", "guest", "--scsi-controller", "id=own,queues=2"]);
    let wish = format!("path={},bus=virtio-scsi,id=s4,serial=again", paths[0]);
    let line = scene.attach(["--disk", &wish], "disk", "serial=again");
    assert!(line.contains(" queues=2 "), "{line}");
    scene.vm.ok(&["detach", "guest", "s4", "--wait", "30s"]);
    scene.wait_devices(&["own"]);
    scene.detach("own", &before);
    scene.end();
}

fn nics(version: QemuVersion) {
    let append = format!("{QUIET} {}", guest_words(version));
    let vm = Vm::with_memory(version, &append, 4, "{ size = \"256MiB\", shared = true }", "");
    let backend = Backend::start(vm.config().parent().expect("the config is in a folder"));
    let mut scene = Scene::of(vm);
    let before = scene.seen.clone();
    let wish = "user=true,id=net0,mac=52:54:00:00:aa:01";
    scene.attach(["--nic", wish], "nic", "52:54:00:00:aa:01");
    scene
        .guest
        .check("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 20 10.0.2.2")
        .expect("the gateway answers");

    let wish = format!("vhost_user={},id=net1,mac=52:54:00:00:aa:02", backend.socket.display());
    let line = scene.attach(["--nic", &wish], "nic", "52:54:00:00:aa:02");
    let name = line.split(' ').nth(1).expect("a name");
    let script =
        format!("ip addr add 10.77.0.2/24 dev {name} && ip link set {name} up && ping -c 2 -W 20 10.77.0.1");
    println!("{}", scene.guest.check(&script).expect("the backend answers"));
    scene.vm.ok(&["detach", "guest", "net1", "--wait", "30s"]);
    scene.sees("one NIC left", |seen| seen.nics().len() == 1);
    // Its netdev is gone as well: the same id again.
    scene.attach(["--nic", &wish], "nic", "52:54:00:00:aa:02");
    scene.vm.ok(&["detach", "guest", "net1", "--wait", "30s"]);
    scene.detach("net0", &before);

    // Without a MAC of its own it gets the same one every time.
    let mac = |scene: &mut Scene| {
        scene.vm.ok(&["attach", "guest", "--nic", "user=true,id=stable"]);
        let line =
            scene.sees("a NIC", |seen| seen.nics().len() == 1).nics()[0].split(' ').nth(2).map(str::to_owned);
        scene.detach("stable", &before);
        line.expect("a MAC")
    };
    assert_eq!(mac(&mut scene), mac(&mut scene));
    scene.wait_devices(&[]);
    scene.end();
}

fn consoles_and_channels(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let before = scene.seen.clone();
    let socket = scene.vm.path("channel.sock");
    let wish = format!("id=ch0,name=org.test.0,path={}", socket.display());
    scene.attach(["--channel", &wish], "channel", "org.test.0");
    talk(&mut scene, &socket);

    scene.vm.ok(&["attach", "guest", "--serial", "id=hvc,type=virtio-console"]);
    scene.sees("a virtio console", |seen| seen.of("console").len() == 1);
    scene.vm.wait_for("the pty in the status", || scene.vm.device("hvc")["pty"].is_string());
    let device = scene.vm.device("hvc");
    let mut pty = std::fs::File::open(device["pty"].as_str().expect("just seen")).expect("the pty opens");
    let say = "for n in 0 1; do [ -c /dev/hvc$n ] && { (stty raw -echo; printf hello-from-hvc) <>/dev/hvc$n >&0; exit; }; done; exit 1";
    scene.guest.check(say).expect("the guest has the console");
    let mut heard = [0; 14];
    pty.read_exact(&mut heard).expect("the host reads");
    assert_eq!(&heard, b"hello-from-hvc");
    drop(pty);

    // An ISA port cannot come while the machine runs.
    let refused = scene.vm.expect(3, &["attach", "guest", "--serial", "id=com2"]);
    assert!(refused.stderr.contains("com2"), "{refused}");
    scene.vm.ok(&["detach", "guest", "hvc", "--wait", "30s"]);
    scene.sees("the console gone", |seen| seen.of("console").is_empty());
    scene.detach("ch0", &before);
    scene.wait_devices(&[]);
    assert!(!socket.exists(), "the channel's socket went with it");
    scene.end();
}

/// Bytes both ways between the host's socket and the guest's port.
fn talk(scene: &mut Scene, socket: &Path) {
    let mut host = UnixStream::connect(socket).expect("the channel's socket takes a client");
    host.set_read_timeout(Some(Duration::from_secs(30))).expect("a read timeout");
    let port = "port=$(grep -l org.test.0 /sys/class/virtio-ports/*/name); port=${port%/name}; port=/dev/${port##*/}";
    // Opened once: QEMU holds nothing for a port that the guest has closed.
    let script = format!("{port}; exec 3<>$port; head -c 9 <&3; printf to-host >&3");
    let running = scene.guest.begin(&script).expect("the guest listens");
    host.write_all(b"to-guest\n").expect("the host writes");
    let mut heard = [0; 7];
    host.read_exact(&mut heard).expect("the guest answers");
    assert_eq!(&heard, b"to-host");
    let heard = scene.guest.finish(running, SCRIPT).expect("the script ends");
    assert_eq!((heard.status, heard.stdout.as_str()), (0, "to-guest\n"));
}
