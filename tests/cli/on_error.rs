//! What qvirt says of disks that retry: who does it on this QEMU, and whether a VM to migrate into treats errors as its source does.

use serde_json::{Value, json};
use tests::fake::Fake;
use tests::vm::Vm;

use crate::scene::{bare, edit, file, refused, start_paused, write};

const DISKS: &str = r#"[[disk]]
id = "a"
path = "a.img"
on_error = { read = "retry", write = "retry", timeout = "10s", at_timeout = "report" }
[[disk]]
id = "b"
path = "b.img"
bus = "virtio-scsi"
on_error = { write = "retry", interval = "2s", timeout = "1m", at_timeout = "unplug" }
[[disk]]
id = "c"
path = "c.img"
on_error = { read = "stop" }
"#;

const LINES: [(&str, &str); 2] = [
    (
        "a",
        "engine hold retries reads and writes every 1s, for 10s, then the guest gets the error; its flushes wait for the repair",
    ),
    ("b", "engine hold retries writes every 2s, for 1m, then the disk is unplugged"),
];

fn vm(tables: &str) -> Vm {
    let vm = bare(tables);
    for name in ["a.img", "b.img", "c.img"] {
        vm.raw(name, 4, name);
    }
    vm
}

#[test]
fn check_names_the_engine_of_each_disk() {
    let vm = vm(&format!(
        "{DISKS}[[disk]]\nid = \"d\"\npath = \"c.img\"\nbus = \"scsi\"\nread_only = true\non_error = {{ read = \"retry\", timeout = \"5s\" }}\n"
    ));
    let text = vm.ok(&["check", &file(&vm)]);
    let proxy = ("d", "engine proxy retries reads every 1s, for 5s, then the guest gets the error");
    let expected: Vec<String> =
        LINES.into_iter().chain([proxy]).map(|(id, line)| format!("on_error of {id}: {line}")).collect();
    let found: Vec<&str> = text.lines().filter(|line| line.starts_with("on_error")).collect();
    assert_eq!(found, expected);
    let checked: Value = serde_json::from_str(&vm.ok(&["check", &file(&vm), "--json"])).expect("JSON");
    let of = |id: &str| {
        let devices = checked["devices"].as_array().into_iter().flatten();
        devices.filter(|d| d["id"] == id).map(|d| d["on_error"].clone()).collect::<Vec<_>>()
    };
    let hold = json!({"engine": "hold", "read": true, "write": true, "interval": "1s", "timeout": "10s", "at_timeout": "report"});
    assert_eq!((of("a"), of("c")), (vec![hold], vec![Value::Null]));
    assert_eq!(checked["warnings"], json!([]));
    vm.nothing_left();
}

#[test]
fn a_busy_loop_of_qemus_own_is_warned_of() {
    let vm = vm("");
    let binary = Fake::binary();
    write(
        &vm,
        &format!(
            "name = \"guest\"\nqemu = {binary:?}\n[[disk]]\nid = \"a\"\npath = \"a.img\"\non_error = {{ read = \"retry\", interval = \"0ms\" }}\n"
        ),
    );
    let environment = Fake::new().retries().env();
    let variables: Vec<(&str, &str)> =
        environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let said = "a: on_error.interval = 0ms: QEMU retries without a pause and takes a whole processor while the storage fails; write \
                interval = \"1s\"";
    let output = vm.qvirt_with(&variables, &["check", &file(&vm)]);
    assert_eq!((output.code, output.stderr.trim_end()), (0, format!("warning: {said}").as_str()), "{output}");
    assert!(
        output.stdout.contains("on_error of a: engine native retries reads every 0ms, for ever\n"),
        "{output}"
    );
    let output = vm.qvirt_with(&variables, &["check", &file(&vm), "--json"]);
    let checked: Value = serde_json::from_str(&output.stdout).expect("JSON");
    assert_eq!(checked["warnings"], json!([said]));
    vm.nothing_left();
}

#[test]
fn status_tells_it_and_a_vm_to_migrate_into_is_compared_with_it() {
    let vm = vm(DISKS);
    start_paused(&vm);
    let told = vm.ok(&["status", "guest"]);
    for ((id, line), label) in LINES.into_iter().zip(["vda", "sda"]) {
        assert!(told.contains(&format!("on_error: {id} ({label}): {line}\n")), "{told}");
    }
    let policies = |id: &str| vm.device(id)["policies"].clone();
    assert_eq!(policies("a"), json!({"read": "retry", "write": "retry"}));
    assert_eq!(policies("b"), json!({"read": "report", "write": "retry"}));
    assert_eq!(policies("c"), json!({"read": "stop", "write": "enospc"}));
    assert_eq!((policies("scsi0"), vm.device("c")["on_error"].clone()), (Value::Null, Value::Null));

    let status = vm.path("status.json").display().to_string();
    std::fs::write(&status, vm.ok(&["status", "guest", "--json"])).expect("written");
    let file = file(&vm);
    let check = ["check", "--incoming", &file, "--against", &status];
    assert!(vm.ok(&check).starts_with("guest is fine"));

    // Another engine is no difference, and neither is a default that is written out.
    edit(
        &vm,
        "timeout = \"10s\", at_timeout = \"report\"",
        "interval = \"1s\", timeout = \"10s\", engine = \"proxy\"",
    );
    edit(&vm, "{ read = \"stop\" }", "{ read = \"stop\", write = \"auto\" }");
    assert!(vm.ok(&check).starts_with("guest is fine"));

    edit(&vm, "interval = \"1s\", timeout = \"10s\", engine = \"proxy\"", "interval = \"500ms\"");
    edit(
        &vm,
        "write = \"retry\", interval = \"2s\", timeout = \"1m\", at_timeout = \"unplug\"",
        "write = \"stop\"",
    );
    edit(&vm, "id = \"c\"", "id = \"other\"\ntarget = \"vdc\"");
    let or = "or change the source";
    let expected = [
        format!("config DIR/guest.toml: disk a (vda): on_error.interval is \"500ms\" in this config and \"1s\" at the source: set interval = \"1s\" here, {or}"),
        format!("disk a (vda): on_error.timeout is \"0ms\" in this config and \"10s\" at the source: set timeout = \"10s\" here, {or}"),
        format!("disk a (vda): on_error.at_timeout is \"none\" in this config and \"report\" at the source: set at_timeout = \"report\" here, {or}"),
        format!("disk b (sda): on_error.write is \"stop\" in this config and \"retry\" at the source: set write = \"retry\" here, {or}"),
        format!("disk b (sda): on_error.interval is \"none\" in this config and \"2s\" at the source: set interval = \"2s\" here, {or}"),
        format!("disk b (sda): on_error.timeout is \"none\" in this config and \"1m\" at the source: set timeout = \"1m\" here, {or}"),
        format!("disk b (sda): on_error.at_timeout is \"none\" in this config and \"unplug\" at the source: set at_timeout = \"unplug\" here, {or}"),
        "disk other (vdc): the source has none of this target and none of this id: take it out of this config, or name it as the source does".to_owned(),
        "disk c (vdb): the source has it and this config does not: write it into this config, or detach it at the source".to_owned(),
    ];
    refused(&vm, 2, &check, &expected.join("\n"));

    std::fs::write(&status, "{}").expect("written");
    refused(
        &vm,
        2,
        &check,
        "status DIR/status.json: missing field `generation` at line 1 column 2; name a file that `qvirt status VM --json` printed at \
         the source",
    );
    vm.end();
}

/// What a proxy retries it knows by its own requests, not by the guest's.
#[test]
fn check_warns_of_writes_that_have_to_read() {
    let tables = |read: &str| {
        format!(
            "[[disk]]\nid = \"q\"\npath = \"q.qcow2\"\nformat = \"qcow2\"\non_error = {{ {read}write = \"retry\", engine = \"proxy\" }}\n"
        )
    };
    for (read, warns) in [("", true), ("read = \"retry\", ", false)] {
        let vm = bare(&tables(read));
        vm.qcow2("q.qcow2", Ok(4));
        let checked = vm.expect(0, &["check", &file(&vm)]);
        let why = "warning: q: on_error.write = \"retry\" by engine proxy does not hold a write for which the qcow2 image has to be read";
        assert_eq!(checked.stderr.contains(why), warns, "{checked}");
    }
}
