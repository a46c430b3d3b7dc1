//! What is refused while the I/O of a disk is suspended: all that the documentation of the control socket names, of qvirt's commands and of QEMU's.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::patience;
use crate::vm::Vm;

/// Each command, for a VM whose disk `data` is suspended and that has a CD-ROM drive `cd0`. `near` is an image on that disk's storage.
fn commands(near: &str) -> Vec<Vec<String>> {
    let raw = |command: &str, arguments: Value| {
        vec!["qmp".to_owned(), "guest".into(), command.into(), arguments.to_string()]
    };
    let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let drive = json!({"path": "/machine/peripheral/data", "property": "drive", "value": "x"});
    vec![
        own(&["attach", "guest", "--disk", &format!("path={near},id=near")]),
        own(&["media", "guest", "cd0", "insert", near]),
        own(&["detach", "guest", "data"]),
        own(&["snapshot", "create", "guest", "now"]),
        own(&["block", "commit", "guest", "data"]),
        own(&["block", "pull", "guest", "data"]),
        own(&["block", "resize", "guest", "data", "9MiB"]),
        own(&["shutdown", "guest"]),
        own(&["reboot", "guest"]),
        raw("system_powerdown", json!({})),
        raw("device_del", json!({"id": "data"})),
        raw("blockdev-add", json!({"driver": "file", "node-name": "n", "filename": near})),
        raw("blockdev-snapshot-sync", json!({"device": "x", "snapshot-file": near})),
        raw("transaction", json!({"actions": []})),
        raw("block_resize", json!({"node-name": "data-1-format", "size": 1 << 20})),
        raw("block-job-cancel", json!({"device": "x"})),
        raw("job-cancel", json!({"id": "x"})),
        raw("block-commit", json!({"device": "data-1-format"})),
        raw("block-stream", json!({"device": "data-1-format"})),
        raw(
            "blockdev-mirror",
            json!({"job-id": "j", "device": "data-1-format", "target": "n", "sync": "full"}),
        ),
        raw("drive-mirror", json!({"device": "data-1-format", "target": near, "sync": "full"})),
        raw(
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "file", "filename": near, "size": 1 << 20}}),
        ),
        raw("blockdev-change-medium", json!({"id": "cd0", "filename": near})),
        raw("snapshot-save", json!({"job-id": "j", "tag": "t", "vmstate": "n", "devices": []})),
        raw("migrate", json!({"uri": "exec:true"})),
        raw("migrate_cancel", json!({})),
        raw("system_wakeup", json!({})),
        raw("qom-set", drive),
    ]
}

/// Sends all of them. Each must be refused within that time, for one of these reasons, and name what ends the VM.
pub fn each_is_refused(vm: &Vm, near: &str, at_once: Duration, reasons: &[&str]) {
    for command in commands(near) {
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        is_refused(vm, &words, at_once, reasons);
    }
}

/// One command that is refused so.
pub fn is_refused(vm: &Vm, words: &[&str], at_once: Duration, reasons: &[&str]) {
    let begin = Instant::now();
    let output = vm.expect(3, words);
    assert!(begin.elapsed() < patience(at_once), "{words:?} took {:?}", begin.elapsed());
    assert!(reasons.iter().any(|reason| output.stderr.contains(reason)), "{words:?}: {output}");
    assert!(output.stderr.contains("`qvirt kill"), "{words:?}: {output}");
}
