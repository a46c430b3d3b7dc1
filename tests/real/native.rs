//! Engine `native` with a real guest: on a QEMU that retries by itself, which no package has. `QVIRT_TEST_QEMU_RETRY` names one, and the cases run on it
//! as well; on the others it is refused, and that is what is shown of them.

use std::path::Path;

use tests::qemu::{QemuVersion, images, retrying_qemu};
use tests::scene::{QUIET, Scene, judge};
use tests::vm::Vm;

use crate::matrix;
use crate::suspension::{in_time, tables};
use crate::timeouts::{Case, times_out};

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

/// What the other engines go through as well.
fn native(qemu: &Path) {
    let mut scene = Scene::of(vm(qemu, &tables()));
    let storm = in_time(&mut scene, "native");
    assert_eq!(scene.vm.device("blk")["on_error"]["engine"], "native");
    storm.detach(&mut scene);
    matrix::all_of(&mut scene, "native");
    for bus in ["virtio-blk", "virtio-scsi"] {
        times_out(&mut scene, &Case { engine: "native", bus, act: "report" });
    }
    scene.end();
}
