//! From one owner to the next, and from one life to the next: recovery, adoption, two at once.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;
use tests::qemu::images;
use tests::vm::{Vm, finished};

use crate::scene::{QEMU, bare, edit, file, refused, start_paused};

const DISK: &str = "[[scsi_controller]]\nid = \"s0\"\n[[disk]]\npath = \"a.img\"\n";

fn vm() -> Vm {
    let vm = bare(DISK);
    for name in ["a.img", "b.img"] {
        vm.raw(name, 4, name);
    }
    vm
}

/// Kills owner and QEMU at once, as a crash does.
fn crash(vm: &Vm) {
    let (owner, qemu) = (vm.owner_pid(), vm.qemu_pid());
    vm.kill_process(owner);
    vm.kill_process(qemu);
}

#[test]
fn recover_clears_up_behind_the_dead_alone() {
    let vm = vm();
    start_paused(&vm);
    vm.ok(&["attach", "guest", "--disk", "path=b.img,id=b,bus=scsi"]);
    refused(&vm, 3, &["recover", "guest"], "VM guest has an owner: `qvirt status guest` shows it");
    assert_eq!(vm.ok(&["recover"]), "", "there is nothing to recover");
    let (owner, qemu) = (vm.owner_pid(), vm.qemu_pid());
    vm.kill_process(owner);
    refused(
        &vm,
        3,
        &["recover", "guest"],
        "VM guest is running without an owner: `qvirt run guest` adopts it, `qvirt kill guest` ends it",
    );
    assert_eq!(vm.ok(&["recover"]), "", "what runs is let alone");
    refused(
        &vm,
        1,
        &["status", "guest"],
        "VM guest is running without an owner: `qvirt start guest` adopts it",
    );
    assert!(vm.processes().contains(&qemu), "the VM runs on");
    vm.kill_process(qemu);

    refused(
        &vm,
        5,
        &["status", "guest"],
        "VM guest is dead and left something: `qvirt recover guest` clears up",
    );
    assert!(vm.ok(&["list"]).contains("dead, to be recovered"));
    assert!(vm.remains().len() > 1, "a crash leaves files and leases");
    // What the dead VM has is not given away before its remains are cleared up.
    edit(&vm, "\"guest\"", "\"other\"");
    let output = vm.expect(3, &["start", "--paused", &file(&vm)]);
    assert!(
        output.stderr.contains("that VM is dead and left changes to undo: `qvirt recover guest` first"),
        "{output}"
    );
    let report: serde_json::Value = serde_json::from_str(&vm.ok(&["recover", "--json"])).expect("JSON");
    assert_eq!(report, json!([{"vm": "guest", "devices": ["s0", "disk0", "b"]}]));
    vm.nothing_left();
    vm.ok(&["start", "--paused", &file(&vm)]);
    vm.ok(&["kill", "other"]);
    vm.nothing_left();
}

#[test]
fn a_start_clears_up_by_itself() {
    let vm = vm();
    start_paused(&vm);
    crash(&vm);
    start_paused(&vm);
    assert_eq!(vm.device_ids(), ["disk0", "s0"]);
    vm.end();
}

#[test]
fn kill_needs_no_owner() {
    let vm = vm();
    start_paused(&vm);
    let owner = vm.owner_pid();
    vm.kill_process(owner);
    assert_eq!(vm.ok(&["kill", "guest"]), "guest was killed\n");
    vm.nothing_left();
}

#[test]
fn a_running_vm_is_not_started_again() {
    let vm = vm();
    start_paused(&vm);
    let error = "VM guest is running already, with an owner: `qvirt status guest` shows it";
    for command in ["start", "run"] {
        refused(&vm, 3, &[command, &file(&vm)], error);
    }
    let owner = vm.owner_pid();
    vm.kill_process(owner);
    refused(
        &vm,
        3,
        &["start", "--paused", &file(&vm)],
        "VM guest is running without an owner, and --paused is for a start: leave it out to adopt the VM",
    );
    vm.start();
    refused(&vm, 3, &["start", &file(&vm)], error);
    vm.end();
}

#[test]
fn of_several_starts_at_once_one_wins() {
    for round in 0..3 {
        let vm = vm();
        let start = || vm.command(&["start", "--paused", &file(&vm)]).spawn().expect("qvirt starts");
        let outputs = [start(), start(), start()].map(finished);
        let won = outputs.iter().filter(|output| output.code == 0).count();
        assert_eq!(won, 1, "round {round}: {} {} {}", outputs[0], outputs[1], outputs[2]);
        for output in outputs.iter().filter(|output| output.code != 0) {
            assert_eq!(output.code, 3, "round {round}: {output}");
            assert!(output.stderr.contains("VM guest is running already"), "round {round}: {output}");
        }
        let qemus = vm.processes();
        assert_eq!(qemus.len(), 2, "one owner and one QEMU: {qemus:?}");
        vm.end();
    }
}

#[test]
fn of_several_adoptions_at_once_one_wins() {
    let vm = vm();
    start_paused(&vm);
    let qemu = vm.qemu_pid();
    let owner = vm.owner_pid();
    vm.kill_process(owner);
    let adopt = || vm.command(&["start", &file(&vm)]).spawn().expect("qvirt starts");
    let mut codes = [adopt(), adopt(), adopt()].map(finished).map(|output| output.code);
    codes.sort_unstable();
    assert_eq!(codes, [0, 3, 3]);
    assert_eq!(vm.qemu_pid(), qemu);
    vm.end();
}

/// A package may be upgraded, or removed, under a running VM: what was saved at the launch is used, and nobody is asked.
#[test]
fn adoption_asks_no_new_qemu() {
    let vm = vm();
    let (program, marker) = (vm.path("my-qemu"), vm.path("was-asked"));
    let install = |text: &str| {
        std::fs::write(vm.path("new"), text).expect("written");
        std::fs::set_permissions(vm.path("new"), Permissions::from_mode(0o755)).expect("its mode is set");
        std::fs::rename(vm.path("new"), &program).expect("renamed");
    };
    let qemu = images().qemu(QEMU);
    install(&format!("#!/bin/sh\nexec {qemu:?} \"$@\"\n"));
    edit(&vm, &format!("{qemu:?}"), &format!("{program:?}"));
    start_paused(&vm);
    let pid = vm.qemu_pid();
    let owner = vm.owner_pid();
    vm.kill_process(owner);
    install(&format!("#!/bin/sh\n: > {marker:?}\nexit 1\n"));
    std::fs::remove_dir_all(vm.root().join("cache")).expect("the cache is removed");

    vm.start();
    assert_eq!(vm.qemu_pid(), pid);
    assert!(vm.status()["qemu"].as_str().is_some_and(|version| version.starts_with("10.0")));
    vm.ok(&["attach", "guest", "--disk", "path=b.img,id=b,bus=scsi"]);
    vm.ok(&["attach", "guest", "--nic", "user=true,id=net"]);
    vm.ok(&["detach", "guest", "b"]);
    assert!(!marker.exists(), "the new program was run");
    vm.end();
    // A new start does ask it.
    vm.expect(1, &["start", &file(&vm)]);
    assert!(marker.exists(), "the new program was not run");
}

/// Formats of a newer qvirt are refused, not guessed at; the VM runs on and can be ended.
#[test]
fn newer_formats_are_refused() {
    for (name, error) in [
        (
            "launch.json",
            "launch record DIR/root/run/guest/launch.json has format 2, this qvirt knows up to 1: use the qvirt that started the VM",
        ),
        (
            "journal",
            "the journal \"DIR/root/run/guest/journal\" has format 2 and this qvirt reads up to 1: use the qvirt that wrote it, or a newer one",
        ),
    ] {
        let vm = vm();
        start_paused(&vm);
        let (owner, qemu) = (vm.owner_pid(), vm.qemu_pid());
        vm.kill_process(owner);
        let path = vm.root().join("run/guest").join(name);
        let text = std::fs::read_to_string(&path).expect("it is text");
        assert!(text.starts_with("{\"format\":1,"), "{text}");
        std::fs::write(&path, text.replacen("\"format\":1,", "\"format\":2,", 1)).expect("written");
        refused(&vm, 1, &["start", &file(&vm)], error);
        assert!(vm.processes().contains(&qemu), "the VM runs on");
        std::fs::write(&path, text).expect("written");
        vm.start();
        vm.end();
    }
}

#[test]
fn a_stored_vm_is_forgotten_while_it_runs() {
    let vm = bare("");
    vm.ok(&["define", &file(&vm)]);
    vm.ok(&["start", "--paused", "guest"]);
    vm.ok(&["undefine", "guest"]);
    let owner = vm.owner_pid();
    vm.kill_process(owner);
    // What was launched is known from its launch, not from the file.
    vm.ok(&["start", "guest"]);
    assert_eq!(vm.ok(&["leave", "guest"]), "");
    vm.wait_for("the owner's end", || vm.ok(&["list"]).contains("running without an owner"));
    vm.ok(&["kill", "guest"]);
    vm.nothing_left();
    refused(
        &vm,
        5,
        &["start", "guest"],
        "there is no VM guest: known are none; `qvirt define FILE` stores one",
    );
}
