use devices::DeviceConfig;
use serde_json::json;

use super::*;
use crate::request::{Attach, Detach, Media, Shutdown};

const MOUNTS: &str = "\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /srv/nfs rw - nfs4 host:/export rw
";

/// A VM with a disk that boots it, a disk on a file system of its own that is in a state, and a drive on either.
fn vm(state: IoState) -> Status {
    let device = |id: &str, kind: &str, image: &str, state: IoState| {
        let outage = json!({
            "since_unix_ms": unix_ms() - 12_500, "attempts": 3, "operation": "write", "cause": "Input/output error",
            "nospace": false, "at_timeout": null,
        });
        json!({
            "id": id, "kind": kind, "label": null, "address": null, "driver": null, "backing": image, "images": [image],
            "stage": "present", "pty": null, "on_demand": false, "fault": null,
            "io": {"state": state, "held": 1, "outage": if state == IoState::Ok { Value::Null } else { outage },
                "counters": crate::suspend::Counters::default()},
        })
    };
    let ok = IoState::Ok;
    serde_json::from_value(json!({
        "generation": 1, "vm": "web", "uuid": "", "state": "running", "pid": 1, "owner_pid": 2, "qemu": "", "accel": "",
        "since_unix_secs": 0, "boot_disk": "sys", "foreign": [], "seats": [], "warnings": [],
        "devices": [
            device("sys", "disk", "/srv/sys.img", ok), device("data", "disk", "/srv/nfs/data.img", state),
            device("near", "disk", "/srv/nfs/a.iso", ok), device("far", "disk", "/srv/b.iso", ok),
            device("io0", "iothread", "", ok),
        ],
    }))
    .expect("a status")
}

/// The whole refusal, or nothing.
fn refused(status: &Status, asked: Asked<'_>) -> Option<String> {
    let failure = status.refuse_on(asked, &Mounts::parse(MOUNTS))?;
    assert_eq!(failure.class, Class::Refused);
    Some(failure.desc)
}

const WAIT: &str = "wait until it recovers, `qvirt io retry web data`, or `qvirt kill web`";
const GUEST: &str =
    "the guest would wait for its disk: `qvirt kill web` ends it; or repair the storage first";
const BOOT: &str = "`qvirt kill web`, repair the storage, then `qvirt start web`";
const FREEZE: &str =
    "it would freeze the VM and its monitor until the storage answers: repair it, or `qvirt kill web`";

/// Raw commands, and what is said of them: while the storage fails, and while it hangs.
fn raw() -> Vec<(&'static str, Value, Option<&'static str>, Option<&'static str>)> {
    let both = |name, arguments, next| (name, arguments, Some(next), Some(next));
    let never = |name, arguments| (name, arguments, None, None);
    let file =
        |path: &str| json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": path}});
    let drive = |path: &str, drive: &str| json!({"path": path, "property": "drive", "value": drive});
    let mut cases = vec![
        both("device_del", json!({"id": "data"}), WAIT),
        both("device_del", json!({"id": "/machine/peripheral/data"}), WAIT),
        never("device_del", json!({"id": "far"})),
        both("blockdev-add", file("/srv/nfs/new.img"), WAIT),
        never("blockdev-add", file("/srv/new.img")),
        never("blockdev-add", json!({"driver": "null-co", "node-name": "n"})),
        both(
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "file", "filename": "/srv/nfs/x", "size": 1}}),
            WAIT,
        ),
        never(
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "file", "filename": "/srv/x", "size": 1}}),
        ),
        both("qom-set", drive("/machine/peripheral/data", "n"), WAIT),
        both("qom-set", drive("data", "n"), WAIT),
        never("qom-set", drive("/machine/peripheral/far", "n")),
        never("qom-set", json!({"path": "/machine/peripheral/data", "property": "bootindex", "value": 1})),
        both("object-del", json!({"id": "io0"}), WAIT),
        never("object-del", json!({"id": "stranger"})),
        both("system_powerdown", Value::Null, GUEST),
        ("stop", Value::Null, None, Some(FREEZE)),
        ("system_reset", Value::Null, None, Some(FREEZE)),
        never("cont", Value::Null),
        never("netdev_add", json!({"id": "n", "type": "user"})),
        never("migrate-set-capabilities", json!({})),
        never("migrate-set-parameters", json!({})),
    ];
    for name in [
        "blockdev-snapshot",
        "blockdev-snapshot-sync",
        "blockdev-snapshot-internal-sync",
        "transaction",
        "block-commit",
        "block-stream",
        "blockdev-mirror",
        "drive-mirror",
        "blockdev-backup",
        "drive-backup",
        "block_resize",
        "block-job-cancel",
        "block-job-complete",
        "block-job-finalize",
        "job-cancel",
        "job-complete",
        "job-finalize",
        "snapshot-save",
        "snapshot-load",
        "snapshot-delete",
        "system_wakeup",
        "migrate",
        "migrate-incoming",
        "migrate_cancel",
        "migrate-continue",
    ] {
        cases.push(both(name, json!({"device": "far"}), WAIT));
    }
    for name in [
        "eject",
        "blockdev-change-medium",
        "blockdev-open-tray",
        "blockdev-close-tray",
        "blockdev-insert-medium",
        "blockdev-remove-medium",
    ] {
        cases.push(both(name, json!({"id": "near"}), WAIT));
        cases.push(never(name, json!({"id": "far"})));
    }
    cases.push(both("blockdev-change-medium", json!({"id": "far", "filename": "/srv/nfs/new.iso"}), WAIT));
    cases
}

#[test]
fn raw_commands_in_each_state() {
    for (name, arguments, failing, hanging) in raw() {
        let asked = Asked::Raw(name, &arguments);
        let said = |why: &str, next: &str| format!("{name} is refused: {why}: {next}");
        assert_eq!(refused(&vm(IoState::Ok), asked), None, "{name} {arguments}");
        let why = "I/O of disk data is suspended since 12 s: writes fail: Input/output error";
        for state in [IoState::Suspended, IoState::TimedOut] {
            assert_eq!(
                refused(&vm(state), asked),
                failing.map(|next| said(why, next)),
                "{name} {arguments} {state:?}"
            );
        }
        let why = "I/O of disk data hangs since 12 s: its storage neither fails nor answers";
        assert_eq!(
            refused(&vm(IoState::Hung), asked),
            hanging.map(|next| said(why, next)),
            "{name} {arguments}"
        );
    }
}

#[test]
fn requests_of_ours_in_each_state() {
    let attach = |device: Value| {
        let device: DeviceConfig = serde_json::from_value(device).expect("a device");
        Request::Attach(Box::new(Attach { device, dry_run: false }))
    };
    let shutdown = || Shutdown { timeout_ms: 1, then_kill: true };
    let detach = |id: &str| Request::Detach(Detach { id: id.to_owned(), wait_ms: 0, force: false });
    let media = |id: &str, path: Option<&str>| {
        let (id, path) = (id.to_owned(), path.map(str::to_owned));
        Request::Media(Media { id, path, format: None, force: false })
    };
    let cases = [
        ("attach", attach(json!({"disk": {"path": "/srv/nfs/new.img"}})), Some(WAIT), Some(WAIT)),
        ("attach", attach(json!({"disk": {"path": "/srv/new.img"}})), None, None),
        ("attach", attach(json!({"iothread": {}})), None, None),
        ("media", media("near", None), Some(WAIT), Some(WAIT)),
        ("media", media("far", Some("/srv/nfs/b.iso")), Some(WAIT), Some(WAIT)),
        ("media", media("far", Some("/srv/c.iso")), None, None),
        ("detach", detach("data"), Some(WAIT), Some(WAIT)),
        ("detach", detach("far"), None, None),
        ("shutdown", Request::Shutdown(shutdown()), Some(GUEST), Some(GUEST)),
        ("reboot", Request::Reboot(shutdown()), Some(GUEST), Some(GUEST)),
        ("reset", Request::Reset, None, Some(FREEZE)),
        ("kill", Request::Kill, None, None),
        ("leave", Request::Leave, None, None),
        ("devices", Request::Devices, None, None),
    ];
    let next = |state, request: &Request| {
        let said = refused(&vm(state), Asked::Ours(request))?;
        let (_, next) = said.split_once("Input/output error: ").or_else(|| said.split_once("answers: "))?;
        Some(next.to_owned())
    };
    for (name, request, failing, hanging) in &cases {
        assert_eq!(next(IoState::Ok, request), None, "{name}");
        assert_eq!(next(IoState::Suspended, request).as_deref(), *failing, "{name}");
        assert_eq!(next(IoState::TimedOut, request).as_deref(), *failing, "{name}");
        assert_eq!(next(IoState::Hung, request).as_deref(), *hanging, "{name}");
    }
}

/// A disk whose errors reach the guest, which waits for nothing.
fn told(engine: &str, held: usize) -> Status {
    let mut status = vm(IoState::TimedOut);
    let retry = json!({"engine": engine, "read": true, "write": true, "interval": "1s", "timeout": "10s", "at_timeout": "report"});
    let disk = &mut status.devices[1];
    disk.on_error = Some(serde_json::from_value(retry).expect("how it retries"));
    let io = disk.io.as_mut().expect("a disk that retries");
    io.held = held;
    io.outage.as_mut().expect("an outage").at_timeout = Some(AtTimeout::Report);
    status
}

#[test]
fn a_guest_that_was_told_waits_for_nothing() {
    let shutdown = Request::Shutdown(Shutdown { timeout_ms: 1, then_kill: true });
    let detach = Request::Detach(Detach { id: "data".to_owned(), wait_ms: 0, force: false });
    for (engine, held, is_refused) in
        [("proxy", 0, false), ("native", 0, false), ("proxy", 1, true), ("hold", 0, true)]
    {
        for request in [&shutdown, &detach] {
            let said = refused(&told(engine, held), Asked::Ours(request));
            assert_eq!(said.is_some(), is_refused, "{engine} {held}: {said:?}");
        }
    }
    let mut status = told("proxy", 0);
    let said = refused(&status, Asked::Raw("block-commit", &Value::Null)).expect("refused");
    assert!(said.ends_with("let it, or `qvirt detach web data`"), "{said}");
    status.boot_disk = Some("data".to_owned());
    assert!(refused(&status, Asked::Ours(&shutdown)).is_some(), "it could not boot again");
}

#[test]
fn a_reset_is_refused_while_the_boot_disk_is_suspended() {
    let mut status = vm(IoState::Suspended);
    status.boot_disk = Some("data".to_owned());
    for asked in [Asked::Ours(&Request::Reset), Asked::Raw("system_reset", &Value::Null)] {
        let said = refused(&status, asked).expect("refused");
        assert!(said.contains("I/O of disk data is suspended") && said.ends_with(BOOT), "{said}");
    }
    status.boot_disk = None;
    assert_eq!(
        refused(&status, Asked::Ours(&Request::Reset)),
        None,
        "a kernel that is booted directly needs no disk"
    );
}

#[test]
fn what_qemu_did_not_say_is_left_out() {
    let mut status = vm(IoState::Suspended);
    let disk = &mut status.devices[1];
    disk.label = Some("vdb".to_owned());
    let outage = disk.io.as_mut().and_then(|io| io.outage.as_mut()).expect("an outage");
    (outage.operation, outage.cause) = (String::new(), String::new());
    assert_eq!(outage_words(disk), "I/O of disk data (vdb) is suspended since 12 s: its storage fails");
    let io = disk.io.as_mut().expect("a disk that retries");
    (io.state, io.outage) = (IoState::Hung, None);
    assert_eq!(outage_words(disk), "I/O of disk data (vdb) hangs: its storage neither fails nor answers");
}
