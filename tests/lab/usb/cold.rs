//! A stick that the guest has from its start: who else wants it, and what becomes of it when it is pulled from the host.

use serde_json::{Value, json};
use tests::events::Events;
use tests::lab::host::usb::{STICKS, Stick};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::vm::Vm;

use super::{
    CONTROLLERS, boot, change, driver, has, holder, ids, is_the_hosts, let_go, port, refused, write,
};

#[test]
fn a_vm_starts_with_a_stick_which_no_other_gets_and_which_is_pulled_and_plugged_in_again() {
    inside(|| {
        let [red, ..] = STICKS;
        let usb = format!(
            "{CONTROLLERS}[[usb]]\nid = \"stick\"\nhost = \"{}\"\n[[usb]]\nid = \"pointer\"\ntablet = true\n\
             [[usb]]\nid = \"none\"\nhost = \"12d1:0003\"\noptional = true\n",
            ids(&red)
        );
        let mut scene = boot(QemuVersion::V7_2, &usb);
        // What udev has the kernel of any ordinary guest do: ask now and then whether the medium is there. QEMU hears of a pull by a request that fails.
        scene.guest.check("echo 1000 >/sys/module/block/parameters/events_dfl_poll_msecs").expect("it polls");
        scene.sees("stick and disk", |seen| has(seen, &red));
        let addresses = ["stick", "pointer"].map(|id| scene.vm.device(id)["address"].clone());
        assert_eq!(addresses, ["usb:1:1", "usb:0:1"].map(Value::from));
        let status = scene.vm.ok(&["status", "guest"]);
        println!("{status}");
        let left_out = "none is left out: no USB device 12d1:0003 is plugged into this host";
        assert!(status.contains(left_out), "{status}");
        write(&mut scene, &red, "from the start");
        step("another VM", || another_vm(&scene.vm));
        step("raw migrate", || {
            let migrate = json!({"uri": "tcp:127.0.0.1:1"}).to_string();
            let output = scene.vm.qvirt(&["qmp", "guest", "migrate", &migrate]);
            let words = "migrate is refused: device stick is the USB device 0781:5567 of this host";
            refused(&output, 3, &[words]);
        });
        let events = Events::follow(&scene.vm, &[]);
        step("pulled and plugged in again", || pulled(&mut scene));
        step("a stick of another make on its port", || another_make(&mut scene));
        told(&events, &["gone", "attached", "other", "attached"]);
        drop(events);
        step("a twin on its port", || twin(&mut scene));
        step("by its port, pulled, and detached while it is gone", || detached_while_gone(&mut scene));
        scene.end();
        assert_eq!(driver(&red).as_deref(), Some("usb-storage"), "the host has it again");
    });
}

/// The file of another VM of the same user, which never runs a guest.
fn other_file(vm: &Vm, tables: &str) -> String {
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    let head = text.replace("name = \"guest\"", "name = \"other\"");
    let head = head.split_once("[[serial]]").expect("a console").0;
    let file = vm.path("other.toml");
    std::fs::write(&file, format!("{head}{CONTROLLERS}{tables}")).expect("written");
    file.display().to_string()
}

fn another_vm(vm: &Vm) {
    let [red, blue, ..] = STICKS;
    let file = other_file(vm, "[[usb]]\nhost = \"12d1:0003\"\n");
    refused(&vm.qvirt(&["start", &file]), 2, &["no USB device 12d1:0003 is plugged into this host"]);
    let who = "device stick of VM guest (user root) has it as 0781:5567 on ";
    let file = other_file(vm, &format!("[[usb]]\nhost = \"{}\"\n", port(&red)));
    refused(&vm.qvirt(&["start", "--paused", &file]), 3, &[who]);
    let file = other_file(vm, "");
    vm.ok(&["start", "--paused", &file]);
    let attach = |host: &str| vm.qvirt(&["attach", "other", "--usb", &format!("host={host},id=mine")]);
    refused(&attach(&ids(&red)), 3, &[who]);
    assert_eq!(holder(vm, &red), "VM guest", "who was refused gives nothing back");
    assert_eq!(attach(&ids(&blue)).code, 0);
    let output = vm.qvirt(&["attach", "guest", "--usb", &format!("host={}", ids(&blue))]);
    refused(&output, 3, &["device mine of VM other (user root) has it"]);
    vm.ok(&["kill", "other"]);
    assert_eq!(driver(&blue).as_deref(), Some("usb-storage"));
}

/// A stick that is back at the end, whatever happens in between.
struct Pulled<'a>(&'a Stick);

impl Drop for Pulled<'_> {
    fn drop(&mut self) {
        self.0.plug().expect("it is plugged in again");
    }
}

/// Waits for a word of the status on the stick.
fn becomes(vm: &Vm, state: &str) {
    vm.wait_for(&format!("the stick to be {state}"), || vm.device("stick")["usb"]["state"] == state);
}

fn pulled(scene: &mut Scene) {
    let [red, ..] = STICKS;
    becomes(&scene.vm, "attached");
    let number = |vm: &Vm| vm.device("stick")["usb"]["device"].clone();
    let first = number(&scene.vm);
    red.unplug().expect("it is pulled");
    let pulled = Pulled(&red);
    becomes(&scene.vm, "gone");
    let (status, devices) = (scene.vm.ok(&["status", "guest"]), scene.vm.ok(&["devices", "guest"]));
    println!("{status}{devices}");
    assert!(status.contains("stick: USB device 0781:5567 on ") && status.contains("is gone from the host"));
    assert!(devices.contains("present, gone from the host"));
    let output = scene.vm.qvirt(&["attach", "guest", "--usb", &format!("host={}", ids(&red))]);
    refused(&output, 3, &["no USB device 0781:5567 is plugged into this host"]);
    drop(pulled);
    becomes(&scene.vm, "attached");
    assert_ne!(number(&scene.vm), first, "the host counts on");
    scene.sees("the stick again", |seen| has(seen, &red));
    write(scene, &red, "after the replug");
}

/// What the events told of the stick, in this order; of what lasted no longer than a look there may be word or not.
fn told(events: &Events, states: &[&str]) {
    let text = events.text();
    let mut lines = text.lines().filter(|line| line.contains("QVIRT_USB") && line.contains("stick"));
    for state in states {
        assert!(lines.any(|line| line.contains(&format!("state={state}"))), "no {state} in its turn: {text}");
    }
}

fn another_make(scene: &mut Scene) {
    let [red, ..] = STICKS;
    red.unplug().expect("it is pulled");
    change("idProduct", "0x5599");
    red.plug().expect("it is plugged in");
    becomes(&scene.vm, "other");
    println!("{}", scene.vm.ok(&["status", "guest"]));
    scene.vm.wait_for("the host's driver", || driver(&red).as_deref() == Some("usb-storage"));
    assert_eq!(holder(&scene.vm, &red), Value::Null, "it stays with the host");
    red.unplug().expect("it is pulled");
    change("idProduct", &format!("{:#06x}", red.product));
    red.plug().expect("it is plugged in again");
    becomes(&scene.vm, "attached");
    scene.sees("the stick again", |seen| has(seen, &red));
}

/// One that differs in nothing but its serial number is taken for the former one.
fn twin(scene: &mut Scene) {
    const SERIAL: &str = "strings/0x409/serialnumber";
    let [red, ..] = STICKS;
    red.unplug().expect("it is pulled");
    becomes(&scene.vm, "gone");
    change(SERIAL, "LABOTHER");
    let mut other = red;
    other.serial = "LABOTHER";
    other.plug().expect("it is plugged in");
    scene.sees("the twin", |seen| seen.find("usb", "serial=LABOTHER").is_some());
    becomes(&scene.vm, "attached");
    assert_eq!(scene.vm.device("stick")["usb"]["serial"], "LABRED", "what the status says is not true");
    other.unplug().expect("it is pulled");
    change(SERIAL, red.serial);
    red.plug().expect("it is plugged in again");
    scene.sees("the stick again", |seen| has(seen, &red));
}

fn detached_while_gone(scene: &mut Scene) {
    let [_, blue, ..] = STICKS;
    let before = scene.seen.clone();
    scene.attach(["--usb", &format!("host={},id=second", port(&blue))], "usb", "serial=LABBLUE");
    blue.unplug().expect("it is pulled");
    let pulled = Pulled(&blue);
    scene.sees("no second stick", |seen| !has(seen, &blue));
    scene.vm.wait_for("word that it is gone", || scene.vm.device("second")["usb"]["state"] == "gone");
    scene.detach("second", &before);
    drop(pulled);
    scene.vm.wait_for("the host's driver", || driver(&blue).as_deref() == Some("usb-storage"));
    assert_eq!(holder(&scene.vm, &blue), Value::Null);
    // The other one is the guest's, and so is its lease.
    let_go(&scene.vm, "stick");
    is_the_hosts(&scene.vm, &blue);
    is_the_hosts(&scene.vm, &STICKS[0]);
}
