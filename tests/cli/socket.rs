//! The control sockets, byte by byte: what clients of QEMU do, do wrong, and do at the same time.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::{Value, json};
use tests::fake::{Control, Fake};
use tests::qemu::images;
use tests::vm::Vm;

use crate::raw::Raw;
use crate::scene::{QEMU, bare, edit, file, start_paused};

fn vm() -> Vm {
    let vm = bare("[[scsi_controller]]\nid = \"s0\"\n");
    start_paused(&vm);
    vm
}

fn class(reply: &Value) -> &str {
    reply["error"]["class"].as_str().unwrap_or("no error")
}

#[test]
fn the_session_begins_as_qemus_does() {
    let vm = vm();
    let mut raw = Raw::connect(&vm, "control.sock");
    let greeting: Value = serde_json::from_str(&raw.line()).expect("JSON");
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
    assert_eq!(greeting["QMP"]["capabilities"], json!([]), "out-of-band work has the rescue socket");
    assert_eq!(
        raw.ask(&json!({"execute": "query-status", "id": 1})),
        json!({"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}, "id": 1})
    );
    let oob = raw.ask(&json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}));
    assert_eq!(oob["error"]["desc"], "capability \"oob\" is not offered here: leave it out of `enable`");
    assert_eq!(
        raw.ask(&json!({"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": "c"})),
        json!({"return": {}, "id": "c"})
    );
    assert_eq!(
        raw.ask(&json!({"execute": "qmp_capabilities"})),
        json!({"error": {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}})
    );
    assert_eq!(class(&raw.ask(&json!({"exec-oob": "query-status"}))), "GenericError");
    assert_eq!(raw.ask(&json!({"execute": "query-status"}))["return"]["status"], "prelaunch");
    assert_eq!(class(&raw.ask(&json!({"execute": "no-such-command"}))), "CommandNotFound");
    vm.end();
}

#[test]
fn ids_come_back_as_they_were() {
    let vm = vm();
    let mut raw = Raw::open(&vm);
    for id in [
        "\"text\"",
        "17",
        "-1.50e3",
        "null",
        "true",
        "{\"b\": [1, {\"a\":2}],  \"b\":3}",
        "\"\\u00e9\\n\"",
        "18446744073709551616",
    ] {
        for command in ["query-name", "qvirt-status", "no-such-command", "qvirt-detach"] {
            raw.send(format!("{{\"id\": {id}, \"execute\": \"{command}\"}}\n").as_bytes());
            let line = raw.line();
            assert!(line.ends_with(&format!(", \"id\": {id}}}")), "{command}: {id} came back as {line}");
        }
    }
    // Several at once are answered in their order.
    let batch: String = (0..50).map(|n| format!("{{\"execute\":\"query-name\",\"id\":{n}}}")).collect();
    raw.send(batch.as_bytes());
    for n in 0..50 {
        assert_eq!(raw.reply(), json!({"return": {"name": "guest"}, "id": n}));
    }
    vm.end();
}

/// A raw command reaches QEMU as it was sent: `"backing": null` means "no backing file", and leaving it out means the header's.
#[test]
fn arguments_pass_untouched() {
    let vm = vm();
    let base = vm.qcow2("base.qcow2", Ok(4));
    let overlay = vm.qcow2("overlay.qcow2", Err((&base, "qcow2")));
    let mut raw = Raw::open(&vm);
    for (name, backing) in [("with", ""), ("without", ", \"backing\" : null")] {
        let node = format!(
            "{{\"driver\": \"qcow2\", \"node-name\": \"{name}\", \"read-only\": true, \"file\": \
                            {{\"driver\": \"file\", \"filename\": {overlay:?}}}{backing}}}"
        );
        raw.send(format!("{{\"execute\": \"blockdev-add\", \"arguments\": {node}}}\n").as_bytes());
        assert_eq!(raw.reply(), json!({"return": {}}));
    }
    let nodes = raw.ask(&json!({"execute": "query-named-block-nodes"}));
    let depth = |name: &str| {
        let node = nodes["return"].as_array().into_iter().flatten().find(|node| node["node-name"] == name);
        node.map(|node| node["backing_file_depth"].clone()).expect("the node is there")
    };
    assert_eq!((depth("with"), depth("without")), (json!(1), json!(0)));
    vm.end();
}

#[test]
fn qvirts_own_commands_are_listed_and_answer() {
    let vm = vm();
    let mut raw = Raw::open(&vm);
    let reply = raw.ask(&json!({"execute": "query-commands"}));
    let names: Vec<&str> =
        reply["return"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    for name in launcher::request::COMMANDS.iter().chain(&["query-status", "blockdev-add"]) {
        assert!(names.contains(name), "{name} is not listed");
    }
    let status = raw.ask(&json!({"execute": "qvirt-status"}));
    assert_eq!((&status["return"]["vm"], &status["return"]["state"]), (&json!("guest"), &json!("starting")));
    let wrong = raw.ask(
        &json!({"execute": "qvirt-attach", "arguments": {"device": {"disk": {"path": "/x", "buss": 1}}}}),
    );
    assert!(
        wrong["error"]["desc"]
            .as_str()
            .is_some_and(|desc| desc.starts_with("qvirt-attach: unknown field `buss`")),
        "{wrong}"
    );
    assert_eq!(
        class(&raw.ask(&json!({"execute": "qvirt-detach", "arguments": {"id": "nothing"}}))),
        "DeviceNotFound"
    );
    let refused = raw.ask(&json!({"execute": "device_del", "arguments": {"id": "s0"}}));
    assert_eq!(
        refused["error"],
        json!({"class": "QvirtRefused", "desc": "device s0 was made by qvirt: use `qvirt detach guest s0`"})
    );

    // A client sees what another one does.
    let mut other = Raw::open(&vm);
    let image = vm.raw("a.img", 4, "a");
    let attach = json!({"execute": "qvirt-attach", "arguments": {"device": {"disk": {"path": image, "id": "a", "bus": "virtio-scsi"}}}});
    let attached = raw.ask(&attach);
    assert_eq!(
        (&attached["return"]["label"], &attached["return"]["address"]),
        (&json!("sda"), &json!("scsi:0:0:0:0"))
    );
    assert_eq!(other.event("QVIRT_DEVICE_ATTACHED")["data"], json!({"device": "a", "kind": "disk"}));
    assert_eq!(
        raw.ask(&json!({"execute": "qvirt-detach", "arguments": {"id": "sda", "wait_ms": 5000}}))["error"]["class"],
        "GenericError"
    );
    let detach = json!({"execute": "qvirt-detach", "arguments": {"id": "sda", "wait-ms": 5000}});
    assert_eq!(raw.ask(&detach), json!({"return": {"outcome": "removed", "id": "a"}}));
    assert_eq!(other.event("QVIRT_DEVICE_DETACHED")["data"], json!({"device": "a"}));
    vm.end();
}

#[test]
fn the_second_socket_only_looks() {
    let vm = vm();
    let mode = |name: &str| {
        let found = std::fs::metadata(vm.root().join("run/guest").join(name)).expect("the socket is there");
        found.permissions().mode() & 0o777
    };
    assert_eq!((mode("control.sock"), mode("control-ro.sock")), (0o600, 0o660));
    let folder = std::fs::metadata(vm.root().join("run/guest")).expect("the folder is there");
    assert_eq!(folder.mode() & 0o777, 0o700);

    let mut raw = Raw::open_at(&vm, "control-ro.sock");
    assert_eq!(raw.ask(&json!({"execute": "query-status"}))["return"]["status"], "prelaunch");
    assert_eq!(raw.ask(&json!({"execute": "qvirt-status"}))["return"]["vm"], "guest");
    for command in [
        "cont",
        "stop",
        "quit",
        "getfd",
        "object-add",
        "qom-set",
        "human-monitor-command",
        "qvirt-detach",
        "qvirt-kill",
        "qvirt-leave",
    ] {
        let reply = raw.ask(&json!({"execute": command, "id": command}));
        let error =
            json!({"class": "QvirtRefused", "desc": "this is the read-only socket: queries and events only"});
        assert_eq!(reply, json!({"error": error, "id": command}));
    }
    let mut full = Raw::open(&vm);
    full.ask(&json!({"execute": "cont"}));
    raw.event("RESUME");
    vm.end();
}

/// Whoever does not read is cut off, with the reason in the log; others do not notice.
#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let vm = bare("");
    edit(&vm, &format!("{:?}", images().qemu(QEMU)), &format!("{:?}", Fake::binary()));
    let fake = Fake::new().control(&vm.path("fake"));
    let variables: Vec<(&str, String)> = fake.env();
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let output = vm.qvirt_with(&variables, &["start", &file(&vm)]);
    assert_eq!(output.code, 0, "{output}");
    let (mut lazy, mut other) = (Raw::open(&vm), Raw::open(&vm));
    // It asks for more than it takes, and then events come: more than its socket's buffer and the owner's patience hold.
    for _ in 0..10 {
        lazy.send(b"{\"execute\": \"query-qmp-schema\"}");
    }
    let mut control = Control::connect(&vm.path("fake"));
    let long = "x".repeat(100_000);
    for number in 0..30 {
        control.emit("LONG", json!({"number": number, "text": long}));
        assert_eq!(other.event("LONG")["data"]["number"], number);
        assert_eq!(other.ask(&json!({"execute": "query-name"})), json!({"return": {"name": "guest"}}));
    }
    let log = vm.root().join("lib/guest/owner.log");
    vm.wait_for("the reason in the owner's log", || {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        log.contains("control client was cut off: it does not read: more than 1 MiB is waiting")
    });
    // What it gets in the end is less than what came for it, and then nothing.
    let lines = std::iter::from_fn(|| Some(lazy.line()).filter(|line| !line.is_empty())).count();
    assert!(lines < 30, "{lines} lines came");
    vm.end();
}

#[test]
fn nonsense_is_answered_and_harms_nobody() {
    let vm = vm();
    let mut other = Raw::open(&vm);
    let mut raw = Raw::open(&vm);
    for nonsense in [
        "nonsense\n",
        "}{\n",
        "[1, 2]\n",
        "\"text\"\n",
        "{\"execute\": 5}\n",
        "{}\n",
        "{\"execute\": \"query-name\" \"id\"}\n",
        "{\"torn\": \"line\n",
        "\u{fe}\u{ff}\n",
    ] {
        raw.send(nonsense.as_bytes());
        let reply = raw.reply();
        assert_eq!(class(&reply), "GenericError", "{nonsense:?}: {reply}");
        assert_eq!(
            raw.ask(&json!({"execute": "query-name"})),
            json!({"return": {"name": "guest"}}),
            "after {nonsense:?}"
        );
    }
    raw.send(b"{\"execute\": \"query-name\", \"arguments\": 5}\n");
    assert_eq!(class(&raw.reply()), "GenericError");
    // No end of line, an object of two lines, two objects in a line: QEMU's monitor takes them all.
    raw.send(b"{\"execute\": \"query-name\"}");
    assert_eq!(raw.reply(), json!({"return": {"name": "guest"}}));
    raw.send(b"{\"execute\":\r\n\"query-name\"}{\"execute\": \"query-name\", \"id\": \"}\"}\r\n");
    assert_eq!(raw.reply(), json!({"return": {"name": "guest"}}));
    assert_eq!(raw.reply(), json!({"return": {"name": "guest"}, "id": "}"}));
    // Half a message, then nothing more.
    raw.send(b"{\"execute\": \"qvirt-ki");
    raw.finish();
    assert_eq!(raw.line(), "", "the owner closes");
    drop(Raw::connect(&vm, "control.sock"));
    // Bytes that are no UTF-8.
    let mut raw = Raw::open(&vm);
    raw.send(b"{\"execute\": \"\xff\xfe\"}\n");
    assert_eq!(class(&raw.reply()), "GenericError");
    assert_eq!(other.ask(&json!({"execute": "query-name"})), json!({"return": {"name": "guest"}}));
    vm.end();
}

/// How many descriptors of a process lead to a file.
fn descriptors(pid: i32, file: &std::path::Path) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == file)).count()
}

/// Names of `getfd` are per monitor, and all clients share the owner's: each has names of its own all the same.
#[test]
fn descriptors_of_two_clients_do_not_meet() {
    let vm = vm();
    let qemu = vm.qemu_pid();
    let [a, b] = ["a.img", "b.img"].map(|name| std::path::PathBuf::from(vm.raw(name, 1, name)));
    let (file_a, file_b) = (File::open(&a).expect("opened"), File::open(&b).expect("opened"));
    let (mut one, mut two) = (Raw::open(&vm), Raw::open(&vm));
    let getfd = json!({"execute": "getfd", "arguments": {"fdname": "net"}, "id": 1});
    let closefd = json!({"execute": "closefd", "arguments": {"fdname": "net"}});
    assert_eq!(one.ask_with(&getfd, file_a.as_fd()), json!({"return": {}, "id": 1}));
    assert_eq!(two.ask_with(&getfd, file_b.as_fd()), json!({"return": {}, "id": 1}));
    assert_eq!((descriptors(qemu, &a), descriptors(qemu, &b)), (1, 1));
    assert_eq!(one.ask(&closefd), json!({"return": {}}));
    assert_eq!((descriptors(qemu, &a), descriptors(qemu, &b)), (0, 1));
    assert_eq!(class(&one.ask(&closefd)), "GenericError", "it was closed already");
    // Whoever leaves takes its descriptors along.
    drop(two);
    vm.wait_for("the descriptor of a client that left", || descriptors(qemu, &b) == 0);
    assert_eq!(class(&one.ask(&getfd)), "GenericError", "no descriptor came with it");

    let add = json!({"execute": "add-fd", "arguments": {"opaque": "a test's"}});
    let added = one.ask_with(&add, file_a.as_fd());
    let set = &added["return"]["fdset-id"];
    assert!(set.is_u64(), "{added}");
    let mut two = Raw::open(&vm);
    let sets = two.ask(&json!({"execute": "query-fdsets"}));
    assert_eq!(sets["return"][0]["fds"][0]["opaque"], "a test's");
    assert_eq!(descriptors(qemu, &a), 1);
    assert_eq!(
        two.ask(&json!({"execute": "remove-fd", "arguments": {"fdset-id": set}})),
        json!({"return": {}})
    );
    vm.wait_for("the end of the descriptor set", || descriptors(qemu, &a) == 0);
    vm.end();
}

/// The owner ends, and whoever listens hears why before the socket closes.
#[test]
fn the_last_words_are_heard() {
    let vm = vm();
    let mut raw = Raw::open_at(&vm, "control-ro.sock");
    vm.ok(&["kill", "guest"]);
    let stopped = raw.event("QVIRT_STOPPED");
    assert_eq!(stopped["data"]["in-order"], true, "{stopped}");
    assert!(stopped["timestamp"]["seconds"].is_i64(), "{stopped}");
    vm.nothing_left();
}
