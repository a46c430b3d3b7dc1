//! Snapshots of a guest that writes all the time: what was kept is what there was, at one instant on all disks, and the guest never notices.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tests::on_both;
use tests::qemu::{QemuVersion, images};
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::{AGENT_CHANNEL, Vm, finished};

on_both! {
    instant => two_disks_at_one_instant,
    goes_on => the_guest_goes_on_and_the_next_start_knows,
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img(vm: &Vm, arguments: &[&str]) -> String {
    let mut command = Command::new(images().qemu_img(vm.version()));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finished(command.spawn().expect("qemu-img starts"));
    assert_eq!(output.code, 0, "qemu-img {}: {output}", arguments.join(" "));
    output.stdout
}

/// What a guest would see of an image, with all that is below it.
pub fn view(vm: &Vm, image: &str, format: &str) -> Vec<u8> {
    let raw = vm.path("view.raw").display().to_string();
    qemu_img(vm, &["convert", "-U", "-f", format, "-O", "raw", image, &raw]);
    let bytes = std::fs::read(&raw).expect("it was just written");
    std::fs::remove_file(raw).expect("it is ours");
    bytes
}

/// The disks of a snapshot: id, the image that was frozen, its format.
pub fn frozen(vm: &Vm, name: &str) -> Vec<(String, String, String)> {
    let text = vm.ok(&["snapshot", "show", "guest", name, "--json"]);
    let shown: Value = serde_json::from_str(&text).expect("it is JSON");
    let word = |disk: &Value, key: &str| disk[key].as_str().unwrap_or_default().to_owned();
    let disks = shown["disks"].as_array().into_iter().flatten();
    disks.map(|disk| (word(disk, "id"), word(disk, "image"), word(disk, "format"))).collect()
}

/// Every image of a VM's folder is whole, and every header names the path of an image.
pub fn images_are_sound(vm: &Vm) {
    for file in std::fs::read_dir(vm.path("")).expect("the folder").flatten() {
        let path = file.path().display().to_string();
        if path.ends_with(".qcow2") {
            qemu_img(vm, &["check", "-q", "-U", &path]);
            let backing = launcher::image::backing_of(Path::new(&path)).expect("a header");
            assert!(backing.is_none_or(|(below, _)| Path::new(&below).is_file()), "{path}");
        }
    }
}

/// The number at the beginning of a disk.
fn number(bytes: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(&bytes[..16]);
    text.trim_matches(['\0', ' ']).parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// The guest writes a number to one disk, then to the other, and so on: at any instant the second has the first one's or the one before. Of the two disks
/// one was plugged in, and one is qcow2 on virtio-scsi.
fn two_disks_at_one_instant(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let first = scene.vm.raw("first.img", 1, "0");
    let second = scene.vm.qcow2("second.qcow2", Ok(1));
    scene.attach(["--disk", &format!("path={first},id=first,serial=first")], "disk", "serial=first");
    let option = format!("path={second},format=qcow2,id=second,serial=second,bus=virtio-scsi");
    scene.attach(["--disk", &option], "disk", "serial=second");
    let (a, b) = (scene.disk("first"), scene.disk("second"));
    let writer = format!(
        "i=0; put() {{ printf '%-512s' $i | dd of=/dev/$1 bs=512 count=1 conv=notrunc,fsync 2>/dev/null; }}; put {a}; put {b}; echo begun; \
         while [ ! -e /tmp/enough ]; do i=$((i+1)); put {a}; put {b}; done"
    );
    let mut running = scene.guest.begin(&writer).expect("the writer begins");
    scene.guest.wait_output(&mut running, "begun", tests::guest::SCRIPT).expect("it begins");
    let mut last = 0;
    let mut seen = Vec::new();
    for round in 0..20 {
        let name = format!("r{round}");
        scene.vm.ok(&["snapshot", "create", "guest", &name]);
        let disks = frozen(&scene.vm, &name);
        assert_eq!(disks.len(), 2);
        let [first, second] =
            [&disks[0], &disks[1]].map(|(_, image, format)| number(&view(&scene.vm, image, format)));
        assert!(
            first == second || first == second + 1,
            "{name}: {first} on the first disk, {second} on the second"
        );
        assert!(first >= last, "{name}: {first} after {last}");
        last = first;
        seen.push((first, second));
    }
    println!("-- {version}: numbers on both disks, at 20 instants: {seen:?}");
    assert!(last > 5, "the guest wrote meanwhile: {seen:?}");
    scene.guest.check("touch /tmp/enough").expect("the guest answers");
    scene.guest.finish(running, tests::guest::SCRIPT).expect("the writer ends");
    images_are_sound(&scene.vm);
    scene.end();
}

/// A pattern is written and verified all the time: across snapshots, the death of an owner, and a new start from a VM file that knows nothing of
/// snapshots. What was kept stays as it was.
fn the_guest_goes_on_and_the_next_start_knows(version: QemuVersion) {
    let disk = "[[disk]]\nid = \"data\"\npath = \"data.img\"\nserial = \"data\"\non_error = { read = \"retry\", write = \"retry\", interval = \"200ms\", engine = \
                \"hold\" }\n";
    let vm = Vm::new(version, QUIET, 8, &format!("{AGENT_CHANNEL}{disk}"));
    let base = vm.raw("data.img", 4, "x");
    let mut scene = Scene::of(vm);
    let storm = Storm::of_disk(&mut scene, "data");
    scene.vm.ok(&["snapshot", "create", "guest", "one"]);
    storm.is_unharmed(&mut scene, "after a snapshot");
    let one = view(&scene.vm, &base, "raw");
    scene.vm.ok(&["snapshot", "create", "guest", "two"]);
    let overlay = frozen(&scene.vm, "two").remove(0).1;
    let two = view(&scene.vm, &overlay, "qcow2");
    assert!(one != two, "the guest wrote between the two");
    scene.vm.kill_owner();
    scene.vm.start();
    storm.is_unharmed(&mut scene, "with another owner");

    // Its storage fails for a while: the new top is held like the former one.
    let said = storm.drill(&scene, "1500ms", &[]);
    println!("{said}");
    storm.is_unharmed(&mut scene, "after an outage");
    assert!(
        scene.vm.device("data")["io"]["counters"]["recoveries"].as_u64() > Some(0),
        "{}",
        scene.vm.device("data")
    );
    let blocks = scene.vm.ok(&["blocks", "guest"]);
    println!("{blocks}");
    assert!(blocks.contains("data.two.qcow2 <- ") && blocks.contains("data.one.qcow2 <- "), "{blocks}");

    scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    scene.guest.check("sync").expect("it is written");
    let before = scene.guest.check(&format!("md5sum <{}", storm.name)).expect("a sum");
    scene.vm.ok(&["kill", "guest"]);
    scene.vm.nothing_left();
    let started = scene.vm.ok(&["start", &scene.vm.config().display().to_string()]);
    assert!(started.contains("data: starts from "), "{started}");
    scene = Scene::of_running(scene.vm);
    let name = format!("/dev/{}", scene.disk("data"));
    assert_eq!(scene.guest.check(&format!("md5sum <{name}")).expect("a sum"), before, "the guest's view");
    let verdict = scene.guest.pattern_verify(&name).expect("a verdict");
    assert!(verdict.is_consistent(), "{verdict:#?}");
    assert!(
        view(&scene.vm, &base, "raw") == one && view(&scene.vm, &overlay, "qcow2") == two,
        "what was kept"
    );
    images_are_sound(&scene.vm);
    scene.end();
}
