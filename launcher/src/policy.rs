//! Which raw QMP commands pass. Queries pass. Others pass too, and the owner then asks QEMU what it has; but what qvirt made is changed
//! by qvirt's commands alone, since behind it are seats, leases and a journal that QEMU does not know of. What else is refused while the storage of
//! a disk fails is said by [`crate::refuse`].

use devices::DeviceId;
use serde_json::Value;

use crate::refuse::Asked;
use crate::request::{Class, Failure};
use crate::status::Status;

/// How a raw command is dealt with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It changes nothing.
    Query,
    /// It may change something: QEMU is asked afterwards.
    Change,
}

/// Judges a raw command. Errors name the qvirt command to use instead.
pub fn judge(name: &str, arguments: &Value, status: &Status) -> Result<Verdict, Failure> {
    if is_query(name) {
        return Ok(Verdict::Query);
    }
    if let Some(failure) = status.refuse(Asked::Raw(name, arguments)) {
        return Err(failure);
    }
    let refuse = |desc: String| Err(Failure::new(Class::Refused, desc));
    // `device_del` takes a path as well as an id.
    let text = |key: &str| arguments[key].as_str().unwrap_or("").rsplit('/').next().unwrap_or("");
    let ours = |key: &str| owner_of(text(key), status);
    match name {
        "quit" => refuse(format!("quit is refused: use `qvirt shutdown {vm}` or `qvirt kill {vm}`", vm = status.vm)),
        "migrate" | "migrate-incoming" => match tied_to_this_host(status) {
            Some(device) => refuse(format!("{name} is refused: {device} of this host, whose state would not go along: detach it first")),
            None => refuse(format!("{name} is refused: the leases and the journal of this VM would not go along")),
        },
        "device_del" => match ours("id") {
            Some(id) => refuse(format!("device {id} was made by qvirt: use `qvirt detach {} {id}`", status.vm)),
            None => Ok(Verdict::Change),
        },
        "human-monitor-command" if !arguments["command-line"].as_str().is_some_and(|line| line.trim_start().starts_with("info ")) => {
            refuse("human-monitor-command passes `info ...` only: what HMP changes cannot be checked; use the QMP command".to_owned())
        }
        _ if MOVES_NODES.contains(&name) => match named(arguments, status) {
            Some(id) => refuse(format!("{name} is refused: it would move the nodes of disk {id} behind the back of its lease and config")),
            None => Ok(Verdict::Change),
        },
        "blockdev-del" | "netdev_del" | "chardev-remove" | "chardev-change" | "object-del" => {
            match ours("id").or_else(|| ours("node-name")) {
                Some(id) => refuse(format!("{name} is refused: the object belongs to device {id} of qvirt; use `qvirt detach {} {id}`", status.vm)),
                None => Ok(Verdict::Change),
            }
        }
        _ => Ok(Verdict::Change),
    }
}

/// The first device that is one of the host itself, with what it is.
fn tied_to_this_host(status: &Status) -> Option<String> {
    let kinds = [("vdpa", "a vDPA device"), ("vhost_scsi", "a vhost-scsi target")];
    status.devices.iter().find_map(|device| {
        if let Some(usb) = &device.usb {
            return Some(format!("device {} is the USB device {}:{}", device.id, usb.vendor, usb.product));
        }
        let (_, what) = kinds.iter().find(|(kind, _)| *kind == device.kind)?;
        Some(format!("device {} is {what}", device.id))
    })
}

/// Commands that change which nodes a disk stands on. `qom-set` of a `drive` is not among them: it is how a node is swapped for another while
/// the disk's own stay as they are.
const MOVES_NODES: &[&str] = &[
    "blockdev-reopen",
    "blockdev-snapshot",
    "blockdev-snapshot-sync",
    "blockdev-mirror",
    "drive-mirror",
    "block-commit",
    "block-stream",
    "blockdev-change-medium",
    "change-backing-file",
    "transaction",
    "x-blockdev-change",
];

/// The first device of ours that any text in the arguments names.
fn named<'a>(value: &Value, status: &'a Status) -> Option<&'a str> {
    match value {
        Value::String(text) => owner_of(text, status),
        Value::Array(items) => items.iter().find_map(|item| named(item, status)),
        Value::Object(members) => members.values().find_map(|member| named(member, status)),
        _ => None,
    }
}

/// Whether a command only looks.
pub fn is_query(name: &str) -> bool {
    let looks = ["qom-list", "qom-get", "qom-list-types", "qom-list-properties", "device-list-properties"];
    name.starts_with("query-") || looks.contains(&name)
}

/// The device of ours that an id or node-name of QEMU belongs to.
fn owner_of<'a>(name: &str, status: &'a Status) -> Option<&'a str> {
    let device = DeviceId::of_node(name).map(|(id, _)| id.to_string());
    let stem = name.strip_suffix("-net").or_else(|| name.strip_suffix("-char"));
    let candidates = [Some(name), device.as_deref(), stem];
    let known = status.devices.iter().find(|d| candidates.contains(&Some(d.id.as_str())));
    known.map(|d| d.id.as_str())
}
