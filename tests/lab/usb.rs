//! USB: the lab host's sticks given to a guest at its start and while it runs, by every name they have, and back again; whoever else wants them.
//!
//! A guest takes the lab longer to boot than most of what is done with it, so each test does much with one: `names` a stick that comes and goes,
//! `cold` one that is there from the start and is pulled meanwhile, `used` one that the guest uses, and whose VM dies.

mod cold;
mod names;
mod used;

use serde_json::Value;
use tests::guest::Inventory;
use tests::lab::host;
use tests::lab::host::usb::{MIB, Stick};
use tests::lab::step;
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::vm::{AGENT_CHANNEL, Output, Vm};

/// The three generations, in order.
const CONTROLLERS: &str = "[[usb_controller]]\nmodel = \"uhci\"\n[[usb_controller]]\nmodel = \"ehci\"\n[[usb_controller]]\nmodel = \"xhci\"\n";

/// A guest with drivers of USB, and these tables.
fn vm(version: QemuVersion, tables: &str) -> Vm {
    Vm::new(version, "quiet qvirt.hardware=1", 2, &format!("{AGENT_CHANNEL}{tables}"))
}

fn boot(version: QemuVersion, tables: &str) -> Scene {
    step("boot", || Scene::of(vm(version, tables)))
}

/// What sysfs calls it: `1-1`.
fn port(stick: &Stick) -> String {
    let place = stick.place().expect("it is plugged in");
    format!("{}-{}", place.bus, place.port)
}

fn ids(stick: &Stick) -> String {
    format!("{:04x}:{:04x}", stick.vendor, stick.product)
}

/// The driver of the host that has it.
fn driver(stick: &Stick) -> Option<String> {
    let link = format!("/sys/bus/usb/devices/{}:1.0/driver", port(stick));
    Some(std::fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// Who has it, as `qvirt host usb` tells.
fn holder(vm: &Vm, stick: &Stick) -> Value {
    let devices: Value = serde_json::from_str(&vm.ok(&["host", "usb", "--json"])).expect("JSON");
    let found = devices.as_array().into_iter().flatten().find(|device| device["serial"] == stick.serial);
    found.unwrap_or_else(|| panic!("no {} in {devices:#}", stick.serial))["held_by"].clone()
}

/// Leases of USB devices.
fn leases(vm: &Vm) -> Vec<String> {
    let mut leases = vm.leases();
    leases.retain(|name| name.starts_with("usb-"));
    leases
}

/// The host has it as before: by its driver, nobody else holds it, no lease is left.
fn is_the_hosts(vm: &Vm, stick: &Stick) {
    vm.wait_for("the host's driver to have it again", || driver(stick).as_deref() == Some("usb-storage"));
    vm.wait_for("the end of its lease", || leases(vm).is_empty());
    assert_eq!(holder(vm, stick), Value::Null);
}

/// Whether the guest sees it with its disk.
fn has(seen: &Inventory, stick: &Stick) -> bool {
    let size = format!(" {} ", MIB << 20);
    seen.find("usb", &format!("serial={}", stick.serial)).is_some()
        && seen.disks().iter().any(|line| line.contains(&size))
}

/// The guest's name of the one stick that it has.
fn disk(scene: &mut Scene) -> String {
    let size = format!(" {} ", MIB << 20);
    let seen = scene.sees("the stick's disk", |seen| seen.disks().iter().any(|line| line.contains(&size)));
    let line = seen.disks().into_iter().find(|line| line.contains(&size)).expect("it was just seen");
    format!("/dev/{}", line.split(' ').nth(1).expect("a disk has a name"))
}

/// The file of the lab behind a stick.
fn file(stick: &Stick) -> String {
    format!("/run/lab/usb-{}.img", stick.name)
}

/// Writes to a file of the red stick's gadget.
fn change(file: &str, text: &str) {
    host::write(format!("/sys/kernel/config/usb_gadget/red/{file}"), text).expect("the gadget obeys");
}

/// The guest writes to the one stick that it has; the file behind it then begins with that.
fn write(scene: &mut Scene, stick: &Stick, text: &str) {
    let disk = disk(scene);
    let script = format!(
        "printf '{text}' | dd of={disk} bs=512 conv=sync,fsync 2>/dev/null; dd if={disk} bs={} count=1 2>/dev/null",
        text.len()
    );
    assert_eq!(scene.guest.check(&script).expect("the guest writes to its stick"), text);
    let bytes = std::fs::read(file(stick)).expect("the file behind the stick");
    assert!(bytes.starts_with(text.as_bytes()), "{} does not begin with {text:?}", file(stick));
}

/// Detaches a stick, once the guest has done with looking at what it was just given; until then it is refused as one that is in use.
fn let_go(vm: &Vm, id: &str) {
    vm.wait_for(&format!("{id} to be idle and to leave"), || {
        let output = vm.qvirt(&["detach", "guest", id, "--wait", "30s"]);
        let in_use = output.code == 3 && output.stderr.contains("transfers in the last second");
        assert!(output.code == 0 || in_use, "{output}");
        !in_use
    });
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    println!("{}", output.stderr.trim());
    assert_eq!(output.code, code, "{output}");
    words.iter().for_each(|word| assert!(output.stderr.contains(word), "no {word:?} in {output}"));
}
