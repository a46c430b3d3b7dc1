//! A QMP client that others wrote, PyPI's `qemu.qmp`, drives the owner's control socket as if it were QEMU's.

use std::process::{Command, Stdio};

use tests::qemu::images;
use tests::vm::finished;

use crate::scene::{bare, start_paused};

#[test]
fn qemu_qmp_drives_the_control_socket() {
    let vm = bare("[[scsi_controller]]\nid = \"s0\"\n");
    let image = vm.raw("a.img", 4, "a");
    start_paused(&vm);
    let mut python = Command::new(images().python());
    python.arg("-c").arg(include_str!("client.py")).arg(vm.root().join("run/guest/control.sock")).arg(image);
    python.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finished(python.spawn().expect("python starts"));
    assert_eq!((output.code, output.stdout.as_str()), (0, "done\n"), "{output}");
    vm.end();
}
