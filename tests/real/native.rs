//! Engine `native` with a real guest: on a QEMU that retries by itself, which no package has. `QVIRT_TEST_QEMU_RETRY` names one, and the cases run on it
//! as well; on the others it is refused, and that is what is shown of them.

use std::path::Path;

use serde_json::Value;
use tests::guest::{PatternReport, PatternWish};
use tests::qemu::{QemuVersion, images, retrying_qemu};
use tests::scene::{QUIET, Scene, judge};
use tests::vm::{AGENT_CHANNEL, Vm};

#[test]
fn on_every_qemu() {
    let stock = QemuVersion::ALL.map(|version| images().qemu(version));
    let retrying: Vec<_> = retrying_qemu().into_iter().collect();
    for qemu in &stock {
        is_refused(qemu);
    }
    println!("refused, as it has to be, by {stock:?}");
    for qemu in &retrying {
        judge(|| native(qemu));
    }
    println!("run on {retrying:?}");
}

/// A VM of that QEMU, whatever its version is.
fn vm(qemu: &Path, tables: &str) -> Vm {
    let vm = Vm::new(QemuVersion::V10_0, QUIET, 8, tables);
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    let text = text.replace(&format!("{:?}", images().qemu(QemuVersion::V10_0)), &format!("{qemu:?}"));
    std::fs::write(vm.config(), text).expect("the VM file is written");
    vm
}

fn is_refused(qemu: &Path) {
    let disk =
        "[[disk]]\nid = \"d\"\npath = \"d.img\"\non_error = { read = \"retry\", engine = \"native\" }\n";
    let vm = vm(qemu, disk);
    vm.raw("d.img", 4, "d");
    let output = vm.qvirt(&["check", &vm.config().display().to_string()]);
    assert!(output.code == 2 && output.stderr.contains("does not retry by itself"), "{output}");
}

/// A disk that fails by a drill, in time and for too long.
fn native(qemu: &Path) {
    let mut scene = Scene::of(vm(qemu, AGENT_CHANNEL));
    for (id, bus) in [("blk", "virtio-blk"), ("lun", "virtio-scsi")] {
        let image = scene.vm.raw(&format!("{id}.img"), 16, "x");
        let disk = format!(
            "path={image},id={id},serial={id},bus={bus},on_error.read=retry,on_error.write=retry,on_error.interval=200ms,\
             on_error.timeout=5s"
        );
        scene.attach(["--disk", &disk], "disk", &format!("serial={id}"));
        assert_eq!(scene.vm.device(id)["on_error"]["engine"], "native");
        outages(&mut scene, id);
    }
    scene.end();
}

fn outages(scene: &mut Scene, id: &str) {
    let name = format!("/dev/{}", scene.disk(id));
    scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
    let io = |scene: &Scene| scene.vm.device(id)["io"].clone();
    let is = |scene: &Scene, state: &str| {
        scene.vm.wait_for(&format!("disk {id} to be {state}"), || io(scene)["state"] == state);
    };
    println!("{}", scene.vm.ok(&["drill", "guest", id, "--fail-for", "2s"]));
    let report = goes_on(scene, &name, "after the outage");
    assert_eq!((report.error_count, report.mismatch_count), (0, 0), "{report:#?}");
    assert!(io(scene)["counters"]["retries"].as_u64() > Some(2), "{}", io(scene));

    let arguments =
        serde_json::json!({"id": id, "fail-for-ms": 9000, "reads": true, "writes": true, "flushes": true});
    assert_ne!(scene.vm.qmp("qvirt-drill", &arguments), Value::Null);
    let told = |report: &PatternReport| report.error_count > 0;
    scene.guest.wait_pattern(&name, "the error", told).expect("the guest is told");
    is(scene, "timed-out");
    is(scene, "ok");
    let report = goes_on(scene, &name, "after the timeout, without a restart");
    assert_eq!(report.mismatch_count, 0, "{report:#?}");
    assert_eq!(io(scene)["counters"]["timeouts"], 1);
    scene.guest.pattern_stop(&name).expect("the pattern ends");
}

fn goes_on(scene: &mut Scene, name: &str, when: &str) -> PatternReport {
    let before = scene.guest.pattern_report(name).expect("a report").verified;
    let more = |report: &PatternReport| report.working && report.verified > before + 20;
    scene.guest.wait_pattern(name, &format!("pattern that goes on {when}"), more).expect("it goes on")
}
