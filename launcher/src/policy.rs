//! Which raw QMP commands pass. Queries pass. Others pass too, and the owner then asks QEMU what it has; but what qvirt made is changed
//! by qvirt's commands alone, since behind it are seats, leases and a journal that QEMU does not know of.

use devices::DeviceId;
use serde_json::Value;

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
    let refuse = |desc: String| Err(Failure::new(Class::Refused, desc));
    let text = |key: &str| arguments[key].as_str().unwrap_or("");
    let ours = |key: &str| owner_of(text(key), status);
    match name {
        "quit" => refuse(format!("quit is refused: use `qvirt shutdown {vm}` or `qvirt kill {vm}`", vm = status.vm)),
        "migrate" | "migrate-incoming" => {
            refuse(format!("{name} is refused: the leases and the journal of this VM would not go along"))
        }
        "device_del" => match ours("id") {
            Some(id) => refuse(format!("device {id} was made by qvirt: use `qvirt detach {} {id}`", status.vm)),
            None => Ok(Verdict::Change),
        },
        "blockdev-del" | "blockdev-reopen" | "netdev_del" | "chardev-remove" | "chardev-change" | "object-del" => {
            match ours("id").or_else(|| ours("node-name")) {
                Some(id) => refuse(format!("{name} is refused: the object belongs to device {id} of qvirt; use `qvirt detach {} {id}`", status.vm)),
                None => Ok(Verdict::Change),
            }
        }
        _ => Ok(Verdict::Change),
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
