//! What qvirt takes QEMU to be able to: commands with the members it sends and reads, events with the members it acts on, run states. Held
//! against the QEMUs that are installed, and against the recordings that other tests use. A command that the code sends and this list does
//! not have fails too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use tests::qemu::QemuVersion;

use crate::scene::{bare_on, start_paused};

/// A command, the members of its arguments that are sent, and those of its result (of each item, if it is a list) that are read. Dots lead
/// into objects.
const COMMANDS: &[(&str, &[&str], &[&str])] = &[
    ("add-fd", &["fdset-id", "opaque"], &[]),
    (
        "blockdev-add",
        &["driver", "node-name", "read-only", "auto-read-only", "cache.direct", "cache.no-flush", "discard"],
        &[],
    ),
    (
        "block-commit",
        &[
            "job-id",
            "device",
            "top-node",
            "base-node",
            "backing-file",
            "speed",
            "filter-node-name",
            "auto-finalize",
            "auto-dismiss",
        ],
        &[],
    ),
    (
        "block-stream",
        &["job-id", "device", "base-node", "backing-file", "speed", "auto-finalize", "auto-dismiss"],
        &[],
    ),
    ("blockdev-reopen", &["options"], &[]),
    ("block_resize", &["node-name", "size"], &[]),
    ("blockdev-close-tray", &["id"], &[]),
    ("blockdev-del", &["node-name"], &[]),
    ("blockdev-insert-medium", &["id", "node-name"], &[]),
    ("blockdev-open-tray", &["id", "force"], &[]),
    ("blockdev-remove-medium", &["id"], &[]),
    ("chardev-add", &["id", "backend"], &["pty"]),
    ("chardev-remove", &["id"], &[]),
    ("closefd", &["fdname"], &[]),
    ("cont", &[], &[]),
    ("device-list-properties", &["typename"], &["name", "type"]),
    // What else it takes are the driver's properties: the golden cases check those.
    ("device_add", &["driver", "bus", "id"], &[]),
    ("device_del", &["id"], &[]),
    ("getfd", &["fdname"], &[]),
    ("job-cancel", &["id"], &[]),
    ("job-complete", &["id"], &[]),
    ("job-dismiss", &["id"], &[]),
    ("job-finalize", &["id"], &[]),
    ("job-pause", &["id"], &[]),
    ("job-resume", &["id"], &[]),
    ("netdev_add", &["id", "type"], &[]),
    ("netdev_del", &["id"], &[]),
    ("object-add", &["qom-type", "id"], &[]),
    ("object-del", &["id"], &[]),
    ("remove-fd", &["fdset-id"], &[]),
    ("qmp_capabilities", &["enable"], &[]),
    ("qom-get", &["path", "property"], &[]),
    ("qom-list", &["path"], &["name", "type"]),
    ("qom-set", &["path", "property", "value"], &[]),
    ("qom-list-types", &["implements"], &["name"]),
    (
        "query-block",
        &[],
        &["qdev", "io-status", "tray_open", "inserted.node-name", "inserted.image.virtual-size"],
    ),
    (
        "query-blockstats",
        &[],
        &["qdev", "stats.rd_operations", "stats.wr_operations", "stats.flush_operations"],
    ),
    ("query-chardev", &[], &["label", "filename"]),
    ("query-commands", &[], &["name"]),
    ("query-jobs", &[], &["id", "type", "status", "current-progress", "total-progress", "error"]),
    ("query-machines", &[], &["name", "alias"]),
    ("query-named-block-nodes", &[], &["node-name", "backing_file", "backing_file_depth"]),
    ("query-qmp-schema", &[], &["name", "meta-type"]),
    ("query-status", &[], &["status"]),
    ("query-uuid", &[], &["UUID"]),
    ("query-version", &[], &["package", "qemu.major", "qemu.minor", "qemu.micro"]),
    ("quit", &[], &[]),
    ("set-action", &["shutdown"], &[]),
    ("stop", &[], &[]),
    ("system_powerdown", &[], &[]),
    ("system_reset", &[], &[]),
    ("transaction", &["actions"], &[]),
    ("x-blockdev-set-iothread", &["node-name", "iothread"], &[]),
    ("x-query-virtio-queue-status", &["path", "queue"], &["inuse"]),
    ("x-query-virtio-status", &["path"], &["num-vqs"]),
];

/// An event, and the members of its data that are read. `qom-path` of BLOCK_IO_ERROR is newer than 7.2 and so is not relied on.
const EVENTS: &[(&str, &[&str])] = &[
    ("BLOCK_IO_ERROR", &["device", "node-name", "operation", "action", "nospace", "reason"]),
    ("BLOCK_JOB_COMPLETED", &["device", "type", "error"]),
    ("BLOCK_JOB_ERROR", &["device"]),
    ("DEVICE_DELETED", &["device", "path"]),
    ("DEVICE_UNPLUG_GUEST_ERROR", &["device", "path"]),
    ("GUEST_PANICKED", &["action"]),
    ("JOB_STATUS_CHANGE", &["id", "status"]),
    ("MEMORY_FAILURE", &["recipient", "action"]),
    ("POWERDOWN", &[]),
    ("RESET", &["guest", "reason"]),
    ("RESUME", &[]),
    ("SHUTDOWN", &["guest", "reason"]),
    ("STOP", &[]),
];

/// Run states that have words of their own.
const RUN_STATES: &[&str] = &[
    "running",
    "prelaunch",
    "inmigrate",
    "paused",
    "io-error",
    "guest-panicked",
    "internal-error",
    "shutdown",
];

/// A schema by the names of its entries.
struct Schema<'a>(BTreeMap<&'a str, &'a Value>);

impl<'a> Schema<'a> {
    fn new(reply: &'a Value) -> Schema<'a> {
        let entries = reply.as_array().expect("a schema is a list").iter();
        Schema(entries.filter_map(|entry| Some((entry["name"].as_str()?, entry))).collect())
    }

    fn entry(&self, name: &Value) -> &'a Value {
        let entry = name.as_str().and_then(|name| self.0.get(name));
        entry.unwrap_or_else(|| panic!("the schema has no {name}"))
    }

    /// The type of a member, looked for in an object's branches and a list's items as well.
    fn member(&self, kind: &'a Value, name: &str) -> Option<&'a Value> {
        let entry = self.entry(kind);
        if entry["meta-type"] == "array" {
            return self.member(&entry["element-type"], name);
        }
        let list = |key: &str| entry[key].as_array().into_iter().flatten();
        let own = list("members").find(|member| member["name"] == name && member.get("type").is_some());
        // An alternative is an object or something else, such as the name of a node.
        let inner = list("variants")
            .map(|variant| &variant["type"])
            .chain(list("members").filter(|_| entry["meta-type"] == "alternate").map(|m| &m["type"]));
        own.map(|member| &member["type"])
            .or_else(|| inner.into_iter().find_map(|kind| self.member(kind, name)))
    }

    /// What of `members` is missing in a type.
    fn missing(&self, kind: &'a Value, members: &[&str]) -> Vec<String> {
        let has = |path: &&str| {
            let mut kind = Some(kind);
            for name in path.split('.') {
                kind = kind.and_then(|kind| self.member(kind, name));
            }
            kind.is_some()
        };
        members.iter().filter(|path| !has(path)).map(ToString::to_string).collect()
    }

    /// All that qvirt relies on and this QEMU has not.
    fn complaints(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (name, sent, read) in COMMANDS {
            match self.0.get(name).filter(|entry| entry["meta-type"] == "command") {
                None => all.push(format!("there is no command {name}")),
                Some(entry) => {
                    all.extend(
                        self.missing(&entry["arg-type"], sent)
                            .iter()
                            .map(|member| format!("{name} takes no {member}")),
                    );
                    all.extend(
                        self.missing(&entry["ret-type"], read)
                            .iter()
                            .map(|member| format!("{name} gives no {member}")),
                    );
                }
            }
        }
        for (name, read) in EVENTS {
            match self.0.get(name).filter(|entry| entry["meta-type"] == "event") {
                None => all.push(format!("there is no event {name}")),
                Some(entry) => all.extend(
                    self.missing(&entry["arg-type"], read)
                        .iter()
                        .map(|member| format!("{name} has no {member}")),
                ),
            }
        }
        let status = self.0.get("query-status").map(|entry| &entry["ret-type"]);
        let states = status
            .and_then(|kind| self.member(kind, "status"))
            .map(|kind| self.entry(kind).to_string())
            .unwrap_or_default();
        all.extend(
            RUN_STATES
                .iter()
                .filter(|state| !states.contains(&format!("\"{state}\"")))
                .map(|state| format!("no run state {state}")),
        );
        all
    }
}

#[test]
fn installed_qemus_have_what_qvirt_relies_on() {
    for version in QemuVersion::ALL {
        let vm = bare_on(version, "", "");
        start_paused(&vm);
        let schema = vm.qmp("query-qmp-schema", &json!({}));
        vm.end();
        assert_eq!(Schema::new(&schema).complaints(), [""; 0], "{version}");
    }
}

#[test]
fn recorded_qemus_have_what_qvirt_relies_on() {
    for text in [include_str!("../recorded/qemu-7.2.json"), include_str!("../recorded/qemu-10.0.json")] {
        let record: Value = serde_json::from_str(text).expect("a recording is JSON");
        assert_eq!(Schema::new(&record["schema"]).complaints(), [""; 0], "{}", record["version"]);
    }
}

#[test]
fn a_schema_that_lacks_something_is_found_out() {
    let record: Value =
        serde_json::from_str(include_str!("../recorded/qemu-10.0.json")).expect("a recording is JSON");
    let mut entries = record["schema"].as_array().expect("a list").clone();
    let position = |entries: &[Value], name: &str| {
        entries.iter().position(|entry| entry["name"] == name).expect("it is there")
    };
    entries.remove(position(&entries, "blockdev-del"));
    let at = position(&entries, "STOP");
    entries[at]["name"] = "HALT".into();
    let at = position(&entries, "DEVICE_DELETED");
    entries[at]["arg-type"] = entries[position(&entries, "RESET")]["arg-type"].clone();
    let schema = Value::from(entries);
    let expected = [
        "there is no command blockdev-del",
        "DEVICE_DELETED has no device",
        "DEVICE_DELETED has no path",
        "there is no event STOP",
    ];
    assert_eq!(Schema::new(&schema).complaints(), expected);
}

/// Every text in the sources that stands where a command's name does is one of the list.
#[test]
fn the_list_has_every_command_that_the_code_sends() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut found = BTreeSet::new();
    for folder in ["launcher/src", "devices/src", "qmp-client/src"] {
        for file in sources(&root.join(folder)) {
            let text = std::fs::read_to_string(&file).expect("a source is text");
            // Tests of the crates themselves speak to peers of their own.
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for before in [
                ".call(\"",
                ".call_raw(\"",
                ".call_with_fds(\"",
                "ask(\"",
                "Call::new(\"",
                "execute: \"",
                "\"execute\": \"",
            ] {
                found.extend(
                    product
                        .split(before)
                        .skip(1)
                        .filter_map(|rest| rest.split('"').next())
                        .map(str::to_owned),
                );
            }
        }
    }
    assert!(found.len() > 20, "the sources are spelled in another way now: {found:?}");
    let listed = |name: &&String| {
        COMMANDS.iter().any(|(known, _, _)| known == name)
            || launcher::request::COMMANDS.contains(&name.as_str())
    };
    let unlisted: Vec<&String> = found.iter().filter(|name| !listed(name)).collect();
    assert_eq!(unlisted, [""; 0], "say in COMMANDS what is relied on");
}

fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && path.file_stem().is_some_and(|stem| stem != "tests")
        {
            all.push(path);
        }
    }
    all
}
