//! What commands print for programs: JSON with keys that stay, and the command line one option a line.

use serde_json::{Value, json};
use tests::qemu::QemuVersion;
use tests::vm::{Vm, finished};

use crate::scene::{QEMU, bare, bare_on, file, start_paused};

/// The keys of an object, in its order.
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("{value} is no object")).keys().map(String::as_str).collect()
}

/// Runs qvirt with `--json`.
fn json_of(vm: &Vm, arguments: &[&str]) -> Value {
    let text = vm.ok(arguments);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?} printed {text}: {error}"))
}

const TABLES: &str = "[[serial]]\nid = \"con0\"\n[[scsi_controller]]\nid = \"s0\"\n[[disk]]\nid = \"d\"\npath = \"DIR/a.img\"\nbus = \"scsi\"\n";

fn vm(version: QemuVersion) -> Vm {
    let vm = bare_on(version, "# a comment", "");
    let image = vm.raw("a.img", 4, "a");
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    crate::scene::write(&vm, &format!("{text}{}", TABLES.replace("DIR/a.img", &image)));
    vm
}

#[test]
fn check_prints_one_option_a_line() {
    for version in QemuVersion::ALL {
        let vm = vm(version);
        let checked = json_of(&vm, &["check", &file(&vm), "--json"]);
        let wanted =
            ["name", "qemu", "machine", "accel", "accel-reason", "devices", "seats", "argv", "warnings"];
        assert_eq!(keys(&checked), wanted);
        assert_eq!(keys(&checked["devices"][0]), ["id", "address", "config", "on_error"]);
        assert_eq!(keys(&checked["seats"][0]), ["kind", "free", "total"]);
        let argv: Vec<&str> =
            checked["argv"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();

        let text = vm.ok(&["check", &file(&vm), "--argv"]);
        let mut lines = text.lines();
        assert_eq!(lines.next().map(Into::into), Some(tests::qemu::images().qemu(version)));
        assert!(lines.clone().all(|line| line.starts_with('-')), "{text}");
        assert_eq!(lines.collect::<Vec<_>>().join(" "), argv.join(" "));
        for words in [
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-no-user-config",
            "-nodefaults",
        ] {
            assert!(text.contains(words), "{words} is not in {text}");
        }
        assert!(vm.ok(&["check", &file(&vm)]).starts_with("guest is fine: pc-q35-"));
        vm.nothing_left();
        assert!(!vm.root().join("lib").exists() && !vm.root().join("etc").exists(), "check changes nothing");
    }
}

#[test]
fn stored_configs() {
    let vm = vm(QEMU);
    assert_eq!(vm.ok(&["list", "--all"]), "NAME  STATE  PID  UPTIME  STORED\n");
    assert_eq!(json_of(&vm, &["list", "--all", "--json"]), json!([]));
    assert!(vm.ok(&["define", &file(&vm)]).starts_with("guest is stored as "));
    assert!(vm.ok(&["define", &file(&vm)]).starts_with("guest is stored anew as "));
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    assert_eq!(vm.ok(&["show", "guest"]), text);
    assert_eq!(vm.ok(&["show", "guest", "--toml"]), text);
    let shown = json_of(&vm, &["show", "guest", "--json"]);
    assert_eq!((&shown["name"], &shown["disk"][0]["id"]), (&json!("guest"), &json!("d")));
    assert_eq!(vm.ok(&["show", "guest", "--argv"]), vm.ok(&["check", "guest", "--argv"]));
    assert_eq!(vm.ok(&["list"]), "NAME  STATE  PID  UPTIME  STORED\n");
    assert_eq!(
        vm.ok(&["list", "--all"]),
        "NAME   STATE        PID  UPTIME  STORED\nguest  not running  -    -       yes\n"
    );
    assert_eq!(
        json_of(&vm, &["list", "--all", "--json"]),
        json!([{"name": "guest", "state": "not running", "stored": true}])
    );

    // The stored file changes where it must, and keeps its comments.
    let image = vm.raw("b.img", 4, "b");
    vm.ok(&["attach", "guest", "--disk", &format!("path={image},id=new")]);
    let changed = vm.ok(&["show", "guest"]);
    assert!(changed.starts_with("name = \"guest\"\n") && changed.contains("# a comment\n"), "{changed}");
    assert_eq!(json_of(&vm, &["show", "guest", "--json"])["disk"][1]["path"], image.as_str());
    let detached = json_of(&vm, &["detach", "guest", "new", "--json"]);
    assert_eq!(detached, json!({"live": null, "config": true}));
    assert_eq!(vm.ok(&["show", "guest"]), text);

    assert_eq!(vm.ok(&["undefine", "guest"]), "guest is forgotten\n");
    vm.expect(5, &["show", "guest"]);
    vm.nothing_left();
}

#[test]
fn running_vms() {
    let vm = vm(QEMU);
    start_paused(&vm);
    crate::scene::refused(
        &vm,
        5,
        &["show", "guest"],
        "VM guest has no stored config: `qvirt define FILE` stores one",
    );
    crate::scene::refused(
        &vm,
        5,
        &["undefine", "guest"],
        "VM guest has no stored config: `qvirt define FILE` stores one",
    );
    let argv = vm.ok(&["show", "guest", "--argv"]);
    assert!(argv.lines().skip(1).all(|line| line.starts_with('-')), "{argv}");

    let status = vm.status();
    let wanted = [
        "generation",
        "vm",
        "uuid",
        "state",
        "pid",
        "owner_pid",
        "qemu",
        "accel",
        "since_unix_secs",
        "boot_disk",
        "devices",
        "foreign",
        "seats",
        "warnings",
    ];
    assert_eq!(keys(&status), wanted);
    let device = [
        "id",
        "kind",
        "label",
        "address",
        "driver",
        "backing",
        "images",
        "size_bytes",
        "size_stale",
        "stage",
        "pty",
        "on_demand",
        "layers",
        "fault",
        "policies",
        "on_error",
    ];
    assert!(status["devices"].as_array().is_some_and(|devices| devices.len() == 3));
    status["devices"].as_array().into_iter().flatten().for_each(|found| assert_eq!(keys(found), device));
    assert!(vm.device("con0")["pty"].as_str().is_some_and(|pty| pty.starts_with("/dev/pts/")));
    let devices = json_of(&vm, &["devices", "guest", "--json"]);
    assert_eq!(keys(&devices), ["devices", "foreign", "seats", "warnings"]);
    assert_eq!(devices["devices"], status["devices"]);
    let list = json_of(&vm, &["list", "--json"]);
    assert_eq!(keys(&list[0]), ["name", "state", "stored", "status"]);
    assert_eq!((&list[0]["state"], &list[0]["stored"]), (&json!("starting"), &json!(false)));

    let table = vm.ok(&["devices", "guest"]);
    let heads: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(heads, ["ID", "KIND", "TARGET", "SEAT", "DRIVER", "STATE", "SIZE", "BEHIND"]);
    assert!(table.contains("scsi-target s0: 255 of 256 free"), "{table}");

    let image = vm.raw("b.img", 4, "b");
    let disk = format!("path={image},id=new,bus=scsi");
    let dry = vm.ok(&["attach", "guest", "--disk", &disk, "--dry-run"]);
    let commands: Vec<Value> =
        dry.lines().map(|line| serde_json::from_str(line).expect("a command is JSON")).collect();
    let names: Vec<&str> = commands.iter().filter_map(|command| command["execute"].as_str()).collect();
    assert_eq!(names, ["blockdev-add", "blockdev-add", "device_add"]);
    assert_eq!(vm.device("new"), Value::Null, "nothing was sent");
    let attached = json_of(&vm, &["attach", "guest", "--disk", &disk, "--json"]);
    assert_eq!(
        (keys(&attached), keys(&attached["live"])),
        (vec!["live", "config"], vec!["id", "label", "address", "controllers", "device"])
    );
    let detached = json_of(&vm, &["detach", "guest", "new", "--json"]);
    assert_eq!(detached, json!({"live": {"outcome": "removed", "id": "new"}, "config": false}));
    assert_eq!(vm.qmp("query-name", &json!({})), json!({"name": "guest"}));
    crate::scene::refused(
        &vm,
        2,
        &["qmp", "guest", "query-name", "[]"],
        "the arguments are a JSON object: '{\"name\": value}'",
    );
    crate::scene::refused(&vm, 1, &["qmp", "guest", "foo"], "The command foo has not been found");
    crate::scene::refused(
        &vm,
        5,
        &["console", "guest", "foo"],
        "VM guest has no serial console foo: its consoles are con0",
    );
    vm.end();
}

/// One JSON object a line, with the VM's name; a line of its own each time the owner comes or goes.
#[test]
fn events_are_json_lines() {
    let vm = vm(QEMU);
    start_paused(&vm);
    let mut command = vm.command(&["events", "guest", "--json"]);
    let path = vm.path("events");
    let mut follower =
        command.stdout(std::fs::File::create(&path).expect("made")).spawn().expect("qvirt starts");
    let lines = || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
            .collect::<Vec<Value>>()
    };
    let has = |name: &str| lines().iter().any(|line| line["event"] == name);
    vm.wait_for("the first line", || has("QVIRT_FOLLOWING"));
    vm.ok(&["resume", "guest"]);
    vm.wait_for("RESUME", || has("RESUME"));
    vm.kill_owner();
    vm.wait_for("the owner's end", || has("QVIRT_OWNER_GONE"));
    vm.start();
    vm.wait_for("the owner's return", || has("QVIRT_OWNER_BACK"));
    vm.ok(&["kill", "guest"]);
    vm.wait_for("the VM's end", || has("QVIRT_STOPPED"));
    // It is ours and not reaped.
    follower.kill().expect("it runs for ever");
    let output = finished(follower);
    assert_eq!(output.code, 128 + 9, "{output}");
    for line in lines() {
        assert!(line["timestamp"]["seconds"].is_i64() && line["vm"] == "guest", "{line}");
    }
    vm.nothing_left();
}

/// Without VMs of any kind every list is empty and still JSON.
#[test]
fn nothing_is_json_too() {
    let vm = bare("");
    for words in [&["list", "--json"][..], &["list", "--all", "--json"], &["recover", "--json"]] {
        assert_eq!(json_of(&vm, words), json!([]), "{words:?}");
    }
    assert_eq!(vm.ok(&["recover"]), "");
    vm.nothing_left();
}
