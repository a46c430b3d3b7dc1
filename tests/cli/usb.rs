//! USB without hardware: controllers of all generations and the tablet on real QEMUs, live and stored; what a host without USB is told.

use serde_json::json;
use tests::qemu::QemuVersion;

use crate::scene::{bare_on, file, refused, start_paused};

const CONTROLLERS: &str = "[[usb_controller]]\nmodel = \"uhci\"\n[[usb_controller]]\nmodel = \"ich9-ehci\"\n[[usb_controller]]\nmodel = \"nec-xhci\"\n";

fn controllers_and_tablets(version: QemuVersion) {
    let vm = bare_on(version, "", &format!("{CONTROLLERS}[[usb]]\ntablet = true\n"));
    start_paused(&vm);
    let status = vm.status();
    assert_eq!(status["foreign"], json!([]), "companions are ours");
    let seats = status["seats"].as_array().into_iter().flatten().filter(|seats| seats["kind"] != "root-port");
    assert_eq!(
        seats.cloned().collect::<Vec<_>>(),
        [
            json!({"kind": "usb-port usb0", "free": 1, "total": 2}),
            json!({"kind": "usb-port usb1", "free": 6, "total": 6}),
            json!({"kind": "usb-port usb2", "free": 8, "total": 8}),
        ]
    );
    vm.ok(&["attach", "guest", "--usb", "tablet=true,id=second"]);
    assert_eq!(vm.device("second")["address"], "usb:0:2");
    let error = "usbdev1: no port for another USB 1.1 device is free: controller 0: a UHCI takes two USB 1.1 devices; detach one";
    refused(&vm, 3, &["attach", "guest", "--usb", "tablet=true"], error);
    for id in ["usb0", "usb2"] {
        let output = vm.qvirt(&["detach", "guest", id]);
        assert_eq!(output.code, 3, "{output}");
    }
    // Known again to the next owner, and adoption takes no seat twice.
    vm.kill_owner();
    vm.start();
    assert_eq!(
        (vm.device("second")["address"].clone(), vm.status()["foreign"].clone()),
        (json!("usb:0:2"), json!([]))
    );
    vm.ok(&["detach", "guest", "second"]);
    vm.ok(&["attach", "guest", "--usb", "tablet=true,port=2,id=third"]);
    vm.end();
}

#[test]
fn controllers_and_tablets_on_qemu_7_2() {
    controllers_and_tablets(QemuVersion::V7_2);
}

#[test]
fn controllers_and_tablets_on_qemu_10_0() {
    controllers_and_tablets(QemuVersion::V10_0);
}

#[test]
fn a_controller_comes_into_the_stored_config_and_not_into_a_running_vm() {
    let vm = bare_on(QemuVersion::V10_0, "", "[[usb_controller]]\nmodel = \"uhci\"\n");
    vm.ok(&["define", &file(&vm)]);
    let device = vm.path("xhci.toml").display().to_string();
    std::fs::write(&device, "[usb_controller]\nmodel = \"xhci\"\n").expect("written");
    vm.ok(&["start", "--paused", "guest"]);
    let error = "usb1: a USB controller cannot be plugged in or out while the VM runs: use --config and start the VM anew";
    refused(&vm, 3, &["attach", "guest", "--live", &device], error);
    vm.ok(&["attach", "guest", "--config", &device]);
    vm.ok(&["attach", "guest", "--config", "--usb", "tablet=true"]);
    let shown = vm.ok(&["show", "guest"]);
    assert!(shown.contains("model = \"xhci\"") && shown.contains("tablet = true"), "{shown}");
    vm.ok(&["kill", "guest"]);
    vm.ok(&["start", "--paused", "guest"]);
    assert_eq!(vm.device("usb1")["driver"], "qemu-xhci");
    assert_eq!(vm.device("usbdev0")["address"], "usb:0:1");
    let refusal = vm.qvirt(&["qmp", "guest", "migrate", "{\"uri\": \"tcp:127.0.0.1:1\"}"]);
    assert_eq!(refusal.code, 3, "{refusal}");
    vm.end();
}

#[test]
fn warnings_name_what_is_missing() {
    let vm = bare_on(QemuVersion::V10_0, "", "[[usb_controller]]\nmodel = \"xhci\"\n");
    let output = vm.qvirt(&["check", &file(&vm)]);
    assert_eq!(output.code, 0, "{output}");
    for warning in [
        "warning: this VM has fewer than three USB controllers: it lacks USB 1.1 (model = \"uhci\") and USB 2.0 (model = \"ehci\")",
        "warning: usb0: a guest without a driver for USB 3.0 does not see the xhci controller",
    ] {
        assert!(output.stderr.contains(warning), "{output}");
    }
    let none = bare_on(QemuVersion::V10_0, "", "");
    assert!(
        !none.qvirt(&["check", &file(&none)]).stderr.contains("USB"),
        "a VM without USB is not warned of it"
    );
    vm.nothing_left();
}
