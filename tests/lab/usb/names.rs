//! Sticks that come and go while the guest runs, by all their names.

use serde_json::Value;
use tests::guest::Inventory;
use tests::lab::host::program;
use tests::lab::host::usb::{FAST, SLOW, STICKS};
use tests::lab::{inside, rounds, step};
use tests::qemu::QemuVersion;
use tests::scene::Scene;

use super::{CONTROLLERS, boot, has, holder, ids, is_the_hosts, let_go, port, refused, write};

#[test]
fn sticks_come_and_go_by_all_their_names() {
    inside(|| {
        let mut scene = boot(QemuVersion::V10_0, CONTROLLERS);
        let before = scene.seen.clone();
        step("by vendor and product, again and again", || by_ids(&mut scene, &before));
        step("by its port, on a port of the xHCI", || by_port(&mut scene, &before));
        step("of USB 1.1 and 3.0", || generations(&mut scene, &before));
        step("twins", || twins(&mut scene, &before));
        step("what cannot be", || refusals(&scene));
        scene.end();
    });
}

fn by_ids(scene: &mut Scene, before: &Inventory) {
    let [red, ..] = STICKS;
    for round in 0..rounds() {
        let wish = format!("host={},id=stick", ids(&red));
        let line = scene.attach(["--usb", &wish], "usb", "serial=LABRED");
        scene.sees("its disk", |seen| has(seen, &red));
        assert_eq!(holder(&scene.vm, &red), "VM guest", "{line}");
        assert_eq!(scene.vm.device("stick")["address"], "usb:1:1", "a USB 2.0 stick is on the EHCI");
        write(scene, &red, &format!("round {round}"));
        let_go(&scene.vm, "stick");
        scene.sees("no stick", |seen| seen == before);
        is_the_hosts(&scene.vm, &red);
    }
}

fn by_port(scene: &mut Scene, before: &Inventory) {
    let [_, blue, ..] = STICKS;
    let wish = format!("host={},id=stick,controller=2,port=8", port(&blue));
    scene.attach(["--usb", &wish], "usb", "serial=LABBLUE");
    scene.sees("its disk", |seen| has(seen, &blue));
    assert_eq!(scene.vm.device("stick")["address"], "usb:2:8");
    write(scene, &blue, "by port");
    let_go(&scene.vm, "stick");
    scene.sees("no stick", |seen| seen == before);
    is_the_hosts(&scene.vm, &blue);
}

/// Each is on the controller and among the ports of its generation, and is as fast in the guest as on the host.
fn generations(scene: &mut Scene, before: &Inventory) {
    for (stick, address, speed) in [(SLOW, "usb:0:1", "12"), (FAST, "usb:2:1", "5000")] {
        let devices: Value = serde_json::from_str(&scene.vm.ok(&["host", "usb", "--json"])).expect("JSON");
        let found = devices.as_array().into_iter().flatten().find(|device| device["serial"] == stick.serial);
        assert_eq!(found.expect("it is listed")["speed"], speed);
        let wish = format!("host={},id={}", ids(&stick), stick.name);
        let line = scene.attach(["--usb", &wish], "usb", &format!("serial={}", stick.serial));
        assert!(line.contains(&format!("speed={speed}")), "{line}");
        assert_eq!(scene.vm.device(stick.name)["address"], address);
        write(scene, &stick, stick.name);
        let_go(&scene.vm, stick.name);
        scene.sees("no stick", |seen| seen == before);
        is_the_hosts(&scene.vm, &stick);
    }
    let output = scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={},controller=1", ids(&FAST))]);
    refused(&output, 3, &["takes no USB 3.0 device"]);
    let output =
        scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={},controller=2,port=5", ids(&FAST))]);
    refused(&output, 3, &["does not take a USB 3.0 device", "USB 3.0 devices on ports 1 to 4"]);
}

fn twins(scene: &mut Scene, before: &Inventory) {
    let [_, _, twin, other_twin] = STICKS;
    let output = scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={}", ids(&twin))]);
    let (one, two) = (port(&twin), port(&other_twin));
    let list = format!("{one} (serial LABTWIN1), {two} (serial LABTWIN2)");
    refused(&output, 3, &["are several devices of this host", &list]);
    let place = other_twin.place().expect("it is plugged in");
    let wish = format!("host={}.{},id=stick", place.bus, place.address);
    scene.attach(["--usb", &wish], "usb", "serial=LABTWIN2");
    let wish = format!("host={}:LABTWIN1,id=stick2", ids(&twin));
    scene.attach(["--usb", &wish], "usb", "serial=LABTWIN1");
    let output = scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={one}")]);
    refused(&output, 3, &["is the host's device of stick2 already"]);
    assert_eq!(scene.vm.device("stick2")["address"], "usb:1:2");
    ["stick2", "stick"].iter().for_each(|id| let_go(&scene.vm, id));
    scene.sees("no twins", |seen| seen == before);
    is_the_hosts(&scene.vm, &twin);
    is_the_hosts(&scene.vm, &other_twin);
}

/// What the host uses itself stays with it.
fn mounted_on_the_host(scene: &Scene) {
    let [_, blue, ..] = STICKS;
    let (node, place) = (blue.disk().expect("its disk"), scene.vm.path("mounted"));
    let (node, place) = (node.display().to_string(), place.display().to_string());
    std::fs::create_dir(&place).expect("a folder");
    program("mke2fs", &["-q", "-F", &node]).expect("a file system");
    program("mount", &["-t", "ext4", &node, &place]).expect("it is mounted");
    let output = scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={}", ids(&blue))]);
    program("umount", &[&place]).expect("it is unmounted");
    refused(&output, 3, &["is in use by this host, which has mounted /dev/", " at ", &place]);
    is_the_hosts(&scene.vm, &blue);
}

fn refusals(scene: &Scene) {
    let [red, ..] = STICKS;
    let attach = |wish: &str| scene.vm.qvirt(&["attach", "guest", "--usb", wish]);
    refused(&attach("host=12d1:0003"), 3, &["no USB device 12d1:0003 is plugged into this host"]);
    refused(&attach(&format!("host={},controller=0", port(&red))), 3, &["takes no USB 2.0 device"]);
    let wish = format!("host={},controller=2,port=1", port(&red));
    refused(&attach(&wish), 3, &["USB 3.0 devices on ports 1 to 4"]);
    mounted_on_the_host(scene);
    let file = scene.vm.path("controller.toml");
    std::fs::write(&file, "[usb_controller]\nmodel = \"xhci\"\n").expect("written");
    let output = scene.vm.qvirt(&["attach", "guest", &file.display().to_string()]);
    refused(&output, 3, &["a USB controller cannot be plugged in or out"]);
    let output = scene.vm.qvirt(&["detach", "guest", "usb2"]);
    refused(&output, 3, &["a USB controller cannot be plugged in or out"]);
    assert!(scene.vm.device_ids().iter().all(|id| !id.starts_with("usbdev")));
    assert_eq!(holder(&scene.vm, &red), Value::Null, "what was refused took nothing");
}
