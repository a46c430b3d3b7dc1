//! The program of `notify`, run by the owner of a VM on a fake QEMU that retries by itself.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tests::fake::Fake;

use crate::stage::Stage;

/// A VM with two disks that retry, and a program of this text.
fn stage(program: &str) -> Stage {
    let stage = Stage::fake("");
    let script = stage.vm.path("alarm");
    let told = stage.vm.path("told");
    std::fs::write(&script, format!("#!/bin/sh\n{program}\n")).expect("written");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("its mode is set");
    let mut text = std::fs::read_to_string(stage.vm.config()).expect("the VM file");
    text = text.replace("[pcie]", &format!("notify = [{script:?}, {told:?}]\n[pcie]"));
    for id in ["a", "b"] {
        stage.vm.raw(&format!("{id}.img"), 4, id);
        text += &format!(
            "[[disk]]\nid = \"{id}\"\npath = \"{id}.img\"\non_error = {{ read = \"retry\", write = \"retry\", timeout = \"1m\" }}\n"
        );
    }
    std::fs::write(stage.vm.config(), text).expect("written");
    let output = stage.start_with(&Fake::new().retries(), &[]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{output}");
    stage
}

fn told(stage: &Stage) -> Vec<Value> {
    let text = std::fs::read_to_string(stage.vm.path("told")).unwrap_or_default();
    text.split_inclusive('\n').filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn an_owner_and_the_one_that_adopts_the_vm_run_it() {
    let stage = stage("cat >> $1");
    stage.control().io_error("a", "read", "retry");
    stage.vm.wait_for("the first run", || told(&stage).len() == 1);
    stage.adopt(&[]);
    stage.control().io_error("b", "write", "retry");
    stage.control().io_error("b", "write", "report");
    stage.vm.wait_for("the other runs", || told(&stage).len() == 3);
    let words: Vec<String> = told(&stage)
        .iter()
        .map(|line| format!("{} {} {}", line["vm"], line["event"], line["data"]["device"]))
        .collect();
    let expected = ["SUSPENDED\" \"a\"", "SUSPENDED\" \"b\"", "TIMED_OUT\" \"b\""]
        .map(|rest| format!("\"guest\" \"QVIRT_IO_{rest}"));
    assert_eq!(words, expected);
    stage.end();
}

#[test]
fn one_that_hangs_holds_nobody_up_and_ends_with_the_owner() {
    let stage = stage("cat >> $1; sleep 600");
    stage.control().io_error("a", "read", "retry");
    stage.vm.wait_for("the first run", || told(&stage).len() == 1);
    stage.control().io_error("b", "read", "retry");
    stage.vm.wait_for("disk b in the status", || stage.vm.device("b")["io"]["state"] == "suspended");
    assert_eq!(told(&stage).len(), 1, "one at a time");
    // Its processes have this VM's folders in their environment: none may be left.
    stage.end();
}

#[test]
fn one_that_fails_or_is_missing_costs_a_warning() {
    let stage = stage("echo said; exit 3");
    stage.control().io_error("a", "read", "retry");
    let warned = |text: &str| stage.vm.wait_for(text, || stage.vm.owner_log().contains(text));
    warned("the program of notify failed");
    assert!(!stage.vm.owner_log().contains("said"), "its output is for those who ask for it");
    std::fs::remove_file(stage.vm.path("alarm")).expect("it was there");
    stage.control().io_error("b", "read", "retry");
    warned("the program of notify cannot be run");
    assert_eq!(stage.vm.device("b")["io"]["state"], "suspended");
    stage.end();
}
