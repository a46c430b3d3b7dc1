//! QEMUs that are not there, not programs, no QEMUs, or that do not start.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use tests::vm::Vm;

use crate::scene::{bare, bare_on, file, is_refusal, refused, said, write};

/// A VM whose QEMU is `program` of its own folder.
fn vm(program: &str, text: &str, mode: u32) -> Vm {
    let vm = bare("");
    let path = vm.path(program);
    if !text.is_empty() {
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("its mode is set");
    }
    write(&vm, &format!("name = \"guest\"\nqemu = {path:?}\n"));
    vm
}

fn cannot_be_used(vm: &Vm, error: &str) {
    for command in ["check", "start", "run", "define"] {
        refused(vm, 1, &[command, &file(vm)], error);
        vm.nothing_left();
    }
}

#[test]
fn a_missing_qemu() {
    cannot_be_used(
        &vm("qemu", "", 0),
        "there is no program \"DIR/qemu\": install QEMU (on Debian: apt-get install qemu-system-x86), or name another binary in the VM's \
         config",
    );
}

#[test]
fn a_qemu_that_may_not_be_executed() {
    cannot_be_used(
        &vm("qemu", "#!/bin/sh\n", 0o644),
        "\"DIR/qemu\" is not a program this user may run: check its mode (chmod +x) and its folders', or name another binary: Permission \
         denied (os error 13)",
    );
}

#[test]
fn a_program_that_is_no_qemu() {
    cannot_be_used(
        &vm("qemu", "#!/bin/sh\necho what is \"$1\" >&2\nexit 7\n", 0o755),
        "\"DIR/qemu\" does not speak QMP (exited with status 7); it said:\nwhat is -M\n: check that it is a QEMU system emulator: the QMP \
         session ended before it was negotiated; QEMU's own output says why: QEMU closed the session",
    );
}

/// Nothing in the config or in QEMU's schema tells that the model does not exist: QEMU's own words do.
#[test]
fn a_qemu_that_dies_at_its_start() {
    for version in tests::qemu::QemuVersion::ALL {
        let vm = bare_on(version, "cpu = \"nonsense\"", "[[disk]]\npath = \"a.img\"\n");
        vm.raw("a.img", 4, "a");
        vm.ok(&["check", &file(&vm)]);
        for command in ["start", "run"] {
            let output = vm.qvirt(&[command, &file(&vm)]);
            let error = "VM guest did not start: QEMU exited with status 1 before it could be asked anything\nQEMU's last words:\n\
                         qemu-system-x86_64: unable to find CPU model 'nonsense'";
            is_refusal(&vm, &output, 1, error);
            vm.nothing_left();
        }
        // The words stay where a person looks for them afterwards.
        let log = std::fs::read_to_string(vm.root().join("lib/guest/qemu.log")).expect("QEMU's log is kept");
        assert!(said(&vm, &log).contains("unable to find CPU model"), "{log}");
    }
}
