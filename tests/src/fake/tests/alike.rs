//! The fake answers as QEMU 10.0 does: one script, both machines, the same outcome of every step.

use std::os::fd::OwnedFd;
use std::time::Duration;

use qmp_client::QmpError;
use serde_json::{Value, json};

use super::{Machine, drain};
use crate::fake::Fake;
use crate::qemu::{QemuVersion, images};

/// Every step of a device's life, and what goes wrong on the way. `FD` is a descriptor sent with the command.
fn script() -> Vec<(&'static str, Value)> {
    let blk = |id: &str, bus: &str, drive: &str| json!({"driver": "virtio-blk-pci", "id": id, "bus": bus, "addr": "0x0", "drive": drive});
    let with = |mut base: Value, key: &str, value: Value| {
        base[key] = value;
        base
    };
    let nic = |id: &str, bus: &str, netdev: &str| json!({"driver": "virtio-net-pci", "id": id, "bus": bus, "addr": "0x0", "netdev": netdev});
    let file = json!({"driver": "file", "node-name": "file", "filename": "disk.raw"});
    let raw = json!({"driver": "raw", "node-name": "raw", "file": "file"});
    let hd = |id: &str, lun: u32| json!({"driver": "scsi-cd", "id": id, "bus": "scsi0.0", "channel": 0, "scsi-id": 1, "lun": lun});
    let pty = |id: &str| json!({"id": id, "backend": {"type": "pty", "data": {}}});
    let port = |id: &str, chardev: &str, nr: u32| json!({"driver": "virtserialport", "id": id, "bus": "vs0.0", "chardev": chardev, "nr": nr});
    let at = |path: &str, property: &str| json!({"path": path, "property": property});
    vec![
        ("query-status", json!({})),
        ("query-name", json!({})),
        ("nonsense", json!({})),
        ("query-status", json!({"x": 1})),
        ("getfd", json!({"fdname": "x"})),
        ("getfd", json!({"fdname": "x", "FD": true})),
        ("getfd", json!({"fdname": "1x", "FD": true})),
        ("closefd", json!({"fdname": "x"})),
        ("closefd", json!({"fdname": "x"})),
        ("remove-fd", json!({"fdset-id": 7})),
        ("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        ("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        ("object-add", json!({"qom-type": "nope", "id": "io1"})),
        ("object-add", json!({"qom-type": "iothread", "id": "1o"})),
        ("object-del", json!({"id": "none"})),
        ("blockdev-add", file.clone()),
        ("blockdev-add", file.clone()),
        ("blockdev-add", with(with(file.clone(), "node-name", json!("none")), "filename", json!("/missing"))),
        ("blockdev-add", with(file.clone(), "node-name", json!("1f"))),
        ("blockdev-add", with(file, "node-name", json!("n".repeat(32)))),
        ("blockdev-add", with(raw.clone(), "file", json!("none"))),
        ("blockdev-add", with(raw.clone(), "zz", json!(1))),
        ("blockdev-add", raw),
        ("blockdev-del", json!({"node-name": "file"})),
        ("blockdev-del", json!({"node-name": "none"})),
        ("device_add", with(blk("d0", "rp1", "raw"), "driver", json!("nope"))),
        ("device_add", blk("d0", "rp9", "raw")),
        ("device_add", blk("d0", "pcie.0", "raw")),
        ("device_add", blk("d0", "rp1", "none")),
        ("device_add", with(blk("d0", "rp1", "raw"), "zz", json!(1))),
        ("device_add", with(blk("d0", "rp1", "raw"), "config-wce", json!("on"))),
        ("device_add", with(blk("d0", "rp1", "raw"), "num-queues", json!("two"))),
        ("device_add", with(blk("d0", "rp1", "raw"), "iothread", json!("none"))),
        ("device_add", with(blk("d0", "rp1", "raw"), "iothread", json!("io0"))),
        ("qom-get", at("/machine/peripheral/d0", "parent_bus")),
        ("qom-get", at("/machine/peripheral/d0", "addr")),
        ("qom-get", at("/machine/peripheral/d0", "drive")),
        ("qom-get", at("/machine/peripheral/d0", "nope")),
        ("qom-get", at("/machine/peripheral/none", "addr")),
        ("qom-get", at("/machine/peripheral/rp2", "addr")),
        ("device_add", blk("d0", "rp2", "raw")),
        ("device_add", blk("d1", "rp2", "raw")),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "null", "size": 1048576})),
        ("device_add", blk("d1", "rp1", "null")),
        ("blockdev-del", json!({"node-name": "raw"})),
        ("device_del", json!({"id": "none"})),
        ("device_del", json!({"id": "rp1"})),
        ("device_add", json!({"driver": "virtio-scsi-pci", "id": "scsi0", "bus": "rp2", "addr": "0x0"})),
        ("device_add", hd("cd0", 0)),
        ("device_add", hd("cd1", 0)),
        ("device_add", with(hd("cd1", 1), "bus", json!("rp3"))),
        ("qom-get", at("/machine/peripheral/cd0", "parent_bus")),
        ("device_del", json!({"id": "cd0"})),
        ("netdev_add", json!({"type": "user", "id": "n0"})),
        ("netdev_add", json!({"type": "user", "id": "n0"})),
        ("netdev_add", json!({"type": "nope", "id": "n1"})),
        ("netdev_add", json!({"type": "tap", "id": "n1", "fd": "x"})),
        ("netdev_add", json!({"type": "vhost-user", "id": "n1", "chardev": "none"})),
        ("netdev_del", json!({"id": "none"})),
        ("device_add", nic("net0", "rp3", "none")),
        ("device_add", with(nic("net0", "rp3", "n0"), "mac", json!("zz"))),
        ("device_add", with(nic("net0", "rp3", "n0"), "mac", json!("52:54:00:00:00:01"))),
        ("device_add", nic("net1", "rp1", "n0")),
        ("chardev-add", pty("c0")),
        ("chardev-add", pty("c0")),
        ("chardev-remove", json!({"id": "none"})),
        ("chardev-remove", json!({"id": "qmp.0"})),
        ("cont", json!({})),
        ("query-status", json!({})),
        ("stop", json!({})),
        ("query-status", json!({})),
        ("device_del", json!({"id": "net0"})),
        ("device_del", json!({"id": "d0"})),
        ("device_del", json!({"id": "scsi0"})),
        ("system_reset", json!({})),
        ("netdev_del", json!({"id": "n0"})),
        ("blockdev-del", json!({"node-name": "file"})),
        ("blockdev-del", json!({"node-name": "raw"})),
        ("blockdev-del", json!({"node-name": "file"})),
        ("blockdev-del", json!({"node-name": "null"})),
        ("object-del", json!({"id": "io0"})),
        ("device_add", json!({"driver": "virtio-serial-pci", "id": "vs0", "bus": "rp1", "addr": "0x0"})),
        ("device_add", port("p0", "none", 1)),
        ("device_add", port("p0", "c0", 1)),
        ("chardev-remove", json!({"id": "c0"})),
        ("device_add", port("p1", "c0", 2)),
        ("device_del", json!({"id": "p0"})),
        ("chardev-remove", json!({"id": "c0"})),
        ("system_powerdown", json!({})),
    ]
}

/// What can be compared: the error whole; of replies the shape, and the value where it does not depend on the host.
fn outcome(command: &str, answer: Result<Value, QmpError>) -> Value {
    match answer {
        Ok(value) if matches!(command, "chardev-add") => {
            json!({"members": value.as_object().map(|m| m.len())})
        }
        Ok(value) => json!({"return": value}),
        Err(QmpError::Refused(error)) => json!({"class": error.class, "desc": error.desc}),
        Err(other) => panic!("{command}: {other}"),
    }
}

async fn play(machine: &Machine) -> Vec<(String, Value, Vec<String>)> {
    let (qmp, mut events) = machine.connect().await;
    let mut played = Vec::new();
    for (command, mut arguments) in script() {
        let fd = arguments.as_object_mut().and_then(|members| members.remove("FD"));
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").expect("always there"));
        let answer = match fd {
            Some(_) => qmp.call_with_fds(command, arguments.clone(), vec![file()]).await,
            None => qmp.call(command, arguments.clone()).await,
        };
        // Real QEMU lets a removed device go a moment after its reply.
        let quiet = if command.contains("del") || command.contains("system") { 300 } else { 1 };
        let mut seen = drain(&mut events, Duration::from_millis(quiet)).await;
        // The order in which a reset removes several devices is QEMU's own affair.
        seen.sort_by_key(|(name, data)| format!("{name}{data}"));
        let seen = seen.into_iter().map(|(name, data)| format!("{name} {data}")).collect();
        played.push((format!("{command} {arguments}"), outcome(command, answer), seen));
    }
    played
}

#[tokio::test]
async fn the_fake_answers_as_qemu_does() {
    let real = Machine::start(&images().qemu(QemuVersion::V10_0), &Fake::new(), &[]);
    let fake = Machine::start(&Fake::binary(), &Fake::new(), &[]);
    let (real, fake) = (play(&real).await, play(&fake).await);
    let differences: Vec<String> = real
        .iter()
        .zip(&fake)
        .filter(|(real, fake)| real != fake)
        .map(|((step, real, events), (_, fake, fake_events))| {
            format!("{step}\n  QEMU {real} {events:?}\n  fake {fake} {fake_events:?}")
        })
        .collect();
    assert!(
        differences.is_empty(),
        "{} of {} steps differ:\n{}",
        differences.len(),
        real.len(),
        differences.join("\n")
    );
}

/// Members that qvirt may look at are there, and those that QEMU does not have are not.
#[tokio::test]
async fn queries_have_qemus_members() {
    let disk = [
        "-blockdev",
        r#"{"driver":"file","node-name":"file","filename":"disk.raw"}"#,
        "-device",
        r#"{"driver":"virtio-blk-pci","id":"d0","bus":"rp1","drive":"file"}"#,
        "-chardev",
        "pty,id=c0",
        "-device",
        r#"{"driver":"isa-serial","id":"s0","chardev":"c0"}"#,
    ];
    let real = Machine::start(&images().qemu(QemuVersion::V10_0), &Fake::new(), &disk);
    let fake = Machine::start(&Fake::binary(), &Fake::new(), &disk);
    let ((real, _r), (fake, _f)) = (real.connect().await, fake.connect().await);
    let queries =
        ["query-block", "query-named-block-nodes", "query-chardev", "query-version", "query-machines"];
    for query in queries {
        let ask = async |qmp: &qmp_client::Qmp| qmp.call(query, Value::Null).await.expect(query);
        let (real, fake) = (ask(&real).await, ask(&fake).await);
        let keys = |reply: &Value| {
            let first = if query == "query-chardev" {
                let mut all = reply.as_array().into_iter().flatten();
                all.find(|chardev| chardev["label"] == "c0").cloned()
            } else {
                Some(reply.get(0).unwrap_or(reply).clone())
            };
            let mut keys: Vec<String> = first
                .as_ref()
                .and_then(Value::as_object)
                .into_iter()
                .flat_map(|m| m.keys().cloned())
                .collect();
            keys.sort();
            (
                keys,
                first.map(|first| {
                    [
                        first["qdev"].clone(),
                        first["frontend-open"].clone(),
                        first["inserted"]["node-name"].clone(),
                    ]
                }),
            )
        };
        assert_eq!(keys(&fake), keys(&real), "{query}");
    }
}
