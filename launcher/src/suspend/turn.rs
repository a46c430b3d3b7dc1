//! What is asked of QEMU before a decision, and what is done to it after one: disks are moved to other nodes while the VM stands still.
//!
//! A turn drains: whatever is parked must have been given back before it begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::DeviceId;
use qmp_client::{Qmp, QmpError, Timestamp};
use serde_json::{Value, json};

use super::line::Teller;
use crate::nbd::Park;

/// A disk, as QEMU has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskLook {
    /// The node it stands on.
    pub node: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How many requests were done since QEMU started.
    pub done: u64,
}

/// How things are.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// `status` of `query-status`.
    pub run: String,
    /// Disks by their device's id.
    pub disks: BTreeMap<DeviceId, DiskLook>,
}

/// Asks how things are. Drains nothing.
pub async fn look(qmp: &Qmp) -> Result<Look, QmpError> {
    let status = qmp.call("query-status", Value::Null).await?;
    let mut look = Look { run: status["status"].as_str().unwrap_or_default().to_owned(), ..Look::default() };
    for device in qmp.call("query-block", Value::Null).await?.as_array().into_iter().flatten() {
        let Some(id) = device["qdev"].as_str().and_then(id_in) else { continue };
        let inserted = &device["inserted"];
        let disk = DiskLook {
            node: inserted["node-name"].as_str().unwrap_or_default().to_owned(),
            size_bytes: inserted["image"]["virtual-size"].as_u64().unwrap_or_default(),
            done: 0,
        };
        look.disks.insert(id, disk);
    }
    for device in qmp.call("query-blockstats", Value::Null).await?.as_array().into_iter().flatten() {
        let Some(disk) = device["qdev"].as_str().and_then(id_in).and_then(|id| look.disks.get_mut(&id))
        else {
            continue;
        };
        disk.done = done(&device["stats"]);
    }
    Ok(look)
}

/// How many requests were done, of the statistics of a disk.
pub fn done(stats: &Value) -> u64 {
    let kinds = ["rd_operations", "wr_operations", "flush_operations", "unmap_operations"];
    kinds.into_iter().filter_map(|kind| stats[kind].as_u64()).sum()
}

/// The device that QEMU means by an id, or by a QOM path such as `/machine/peripheral/disk0/virtio-backend`: `qdev` of `query-block` is the one
/// for a SCSI disk, the other for virtio-blk.
pub fn id_in(name: &str) -> Option<DeviceId> {
    let name = if name.starts_with('/') { name.strip_prefix("/machine/peripheral/")? } else { name };
    name.split('/').next()?.parse().ok()
}

/// A time in microseconds since 1970.
pub fn micros(time: Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000).saturating_add(time.microseconds)
}

/// A disk that is to stand on another node.
#[derive(Debug)]
pub struct Move {
    /// The disk.
    pub id: DeviceId,
    /// The node.
    pub node: String,
    /// Arguments of `blockdev-add`, if there is no such node yet.
    pub add: Option<Value>,
    /// The iothread that the node must do its I/O in before the disk can stand on it.
    pub iothread: Option<DeviceId>,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Turn {
    /// Whether the VM runs and must stand still for it.
    pub stop: bool,
    /// The disks to move.
    pub moves: Vec<Move>,
    /// What is silent from then on.
    pub silent: Vec<Arc<Park>>,
    /// Proxies that are parked, to hold again from then on.
    pub parked: Vec<Teller>,
    /// Whether the VM goes on.
    pub go: bool,
    /// Nodes that nobody stands on any more.
    pub idle: Vec<String>,
}

/// Does it; returns when the VM went on, in microseconds since 1970: failures before that are settled.
///
/// # Errors
/// QEMU's, at the first command that it refused; the VM then stands still.
pub async fn take(qmp: &Qmp, turn: Turn) -> Result<Option<i64>, QmpError> {
    if turn.stop {
        qmp.call("stop", Value::Null).await?;
    }
    for step in turn.moves {
        if let Some(node) = step.add {
            qmp.call("blockdev-add", node).await?;
        }
        if let Some(iothread) = step.iothread {
            // QEMU 10.0 aborts, and 7.2 refuses, when a SCSI disk in an iothread gets a node that is elsewhere. One that the disk has left may be.
            let arguments = json!({"node-name": step.node, "iothread": iothread.as_str()});
            qmp.call("x-blockdev-set-iothread", arguments).await?;
        }
        let path = format!("/machine/peripheral/{}", step.id);
        qmp.call("qom-set", json!({"path": path, "property": "drive", "value": step.node})).await?;
    }
    for node in turn.idle {
        // One that somebody uses, or that QEMU never had, is none of ours.
        let _ = qmp.call("blockdev-del", json!({"node-name": node})).await;
    }
    // The VM stands still, and what drains is done.
    for proxy in &turn.parked {
        proxy.ask(json!({"command": "unpark"})).await;
    }
    if !turn.go {
        return Ok(None);
    }
    for park in &turn.silent {
        park.hold();
    }
    let now = micros(Timestamp::now());
    qmp.call("cont", Value::Null).await?;
    Ok(Some(now))
}
