//! What is refused while the I/O of a disk is suspended, because it would fail, hang, or wait for that disk: the whole policy, in one match.
//!
//! It is answered from the status alone, at once: nothing is sent to QEMU, and no image is touched.

use devices::retry::{AtTimeout, Engine};
use serde_json::Value;

use crate::request::{Class, Failure, Request};
use crate::status::{DeviceStatus, IoState, IoStatus, Status};
use crate::storage::Mounts;
use crate::suspend::state::unix_ms;
use crate::suspend::turn::id_in;

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub enum Asked<'a> {
    /// A command of qvirt's.
    Ours(&'a Request),
    /// A command of QEMU's, with its arguments.
    Raw(&'a str, &'a Value),
}

/// Which suspended disk is in the way of what was asked for.
#[derive(Debug)]
enum Obstacle<'a> {
    /// Any.
    Any,
    /// Any, for the guest would wait for it.
    Guest,
    /// This one.
    Disk(&'a str),
    /// Any on the storage of one of these paths.
    Storage(Vec<&'a str>),
    /// The one that the VM boots from; any that hangs.
    Boot,
    /// Any that hangs.
    Hung,
}

impl Status {
    /// Why it is refused; `None` if no suspended disk is in its way.
    pub fn refuse(&self, asked: Asked<'_>) -> Option<Failure> {
        let is_any_suspended = self.devices.iter().any(DeviceStatus::is_suspended);
        if is_any_suspended { self.refuse_on(asked, &Mounts::read()) } else { None }
    }

    fn refuse_on(&self, asked: Asked<'_>, mounts: &Mounts) -> Option<Failure> {
        let (what, obstacle) = match asked {
            Asked::Ours(request) => self.in_the_way_of(request)?,
            Asked::Raw(name, arguments) => (name, self.in_the_way_of_raw(name, arguments)?),
        };
        let disk = self.find(&obstacle, mounts)?;
        let (vm, id) = (&self.vm, &disk.id);
        let next = match obstacle {
            _ if is_hung(disk) && matches!(obstacle, Obstacle::Boot | Obstacle::Hung) => {
                format!(
                    "it would freeze the VM and its monitor until the storage answers: repair it, or `qvirt kill {vm}`"
                )
            }
            Obstacle::Guest => {
                format!(
                    "the guest would wait for its disk: `qvirt kill {vm}` ends it; or repair the storage first"
                )
            }
            Obstacle::Boot => format!("`qvirt kill {vm}`, repair the storage, then `qvirt start {vm}`"),
            _ if is_told(disk) => {
                format!(
                    "its guest has the error; that it works is seen when the guest uses it again: let it, or `qvirt detach {vm} {id}`"
                )
            }
            _ => format!("wait until it recovers, `qvirt io retry {vm} {id}`, or `qvirt kill {vm}`"),
        };
        Some(Failure::new(Class::Refused, format!("{what} is refused: {}: {next}", outage_words(disk))))
    }

    fn in_the_way_of<'a>(&'a self, request: &'a Request) -> Option<(&'static str, Obstacle<'a>)> {
        Some(match request {
            Request::Attach(attach) => ("attach", Obstacle::Storage(vec![attach.device.image()?])),
            Request::Media(media) => {
                let drive = self.device(&media.id).into_iter().flat_map(|drive| &drive.images);
                ("media", Obstacle::Storage(drive.chain(&media.path).map(String::as_str).collect()))
            }
            Request::Detach(detach) => ("detach", Obstacle::Disk(&detach.id)),
            Request::SnapshotCreate(_) => ("snapshot", Obstacle::Any),
            Request::BlockCommit(_) => ("block commit", Obstacle::Any),
            Request::BlockPull(_) => ("block pull", Obstacle::Any),
            Request::BlockResize(_) => ("block resize", Obstacle::Any),
            Request::SnapshotDelete(_) => ("snapshot delete", Obstacle::Any),
            Request::Shutdown(_) => ("shutdown", Obstacle::Guest),
            Request::Reboot(_) => ("reboot", Obstacle::Guest),
            Request::Reset => ("reset", Obstacle::Boot),
            Request::Devices
            | Request::Standstill(_)
            | Request::IoRetry(_)
            | Request::IoFail(_)
            | Request::IoSet(_)
            | Request::Drill(_)
            | Request::Kill
            | Request::Leave
            | Request::Reconcile => return None,
        })
    }

    fn in_the_way_of_raw<'a>(&'a self, name: &str, arguments: &'a Value) -> Option<Obstacle<'a>> {
        let text = |key: &str| arguments[key].as_str();
        let last = |path: &'a str| path.rsplit('/').next().unwrap_or(path);
        Some(match name {
            "stop" => Obstacle::Hung,
            "system_reset" => Obstacle::Boot,
            "system_powerdown" => Obstacle::Guest,
            "device_del" => Obstacle::Disk(last(text("id")?)),
            "qom-set" if text("property") == Some("drive") => {
                let id = id_in(text("path")?)?;
                Obstacle::Disk(&self.device(id.as_str())?.id)
            }
            "object-del" if self.device(text("id")?)?.kind == "iothread" => Obstacle::Any,
            "blockdev-add" | "blockdev-create" => Obstacle::Storage(filenames(arguments)),
            "eject"
            | "blockdev-change-medium"
            | "blockdev-open-tray"
            | "blockdev-close-tray"
            | "blockdev-insert-medium"
            | "blockdev-remove-medium" => {
                let drive = text("id").or_else(|| text("device")).and_then(|drive| self.device(last(drive)));
                let images = drive.into_iter().flat_map(|drive| drive.images.iter().map(String::as_str));
                Obstacle::Storage(images.chain(filenames(arguments)).collect())
            }
            _ if waits_for_every_disk(name) => Obstacle::Any,
            _ => return None,
        })
    }

    /// The first suspended disk that is meant.
    fn find(&self, obstacle: &Obstacle<'_>, mounts: &Mounts) -> Option<&DeviceStatus> {
        let mut suspended = self.devices.iter().filter(|disk| disk.is_suspended());
        match obstacle {
            Obstacle::Any => suspended.next(),
            Obstacle::Guest => {
                suspended.find(|disk| !is_told(disk) || self.boot_disk.as_ref() == Some(&disk.id))
            }
            Obstacle::Hung => suspended.find(|disk| is_hung(disk)),
            Obstacle::Boot => {
                suspended.find(|disk| is_hung(disk) || self.boot_disk.as_ref() == Some(&disk.id))
            }
            Obstacle::Disk(name) => self.device(name).filter(|disk| disk.is_suspended() && !is_told(disk)),
            Obstacle::Storage(paths) => {
                let wanted: Vec<_> = paths.iter().map(|path| mounts.storage(path)).collect();
                suspended.find(|disk| {
                    let mut images = disk.images.iter().map(|image| mounts.storage(image));
                    images.any(|image| wanted.iter().any(|wanted| wanted.is_shared_with(&image)))
                })
            }
        }
    }
}

/// Commands that wait until every disk is idle, or that would carry a suspended disk's state elsewhere.
fn waits_for_every_disk(name: &str) -> bool {
    let families = ["blockdev-snapshot", "block-job-", "job-", "snapshot-"];
    let others = [
        "transaction",
        "block-commit",
        "block-stream",
        "blockdev-mirror",
        "drive-mirror",
        "blockdev-backup",
        "drive-backup",
        "block_resize",
        "system_wakeup",
    ];
    let migrates = name.starts_with("migrate") && !name.starts_with("migrate-set-");
    migrates || others.contains(&name) || families.iter().any(|family| name.starts_with(family))
}

/// Every `filename` in the arguments of a command.
fn filenames(arguments: &Value) -> Vec<&str> {
    match arguments {
        Value::Object(members) => {
            let own = members.get("filename").and_then(Value::as_str);
            own.into_iter().chain(members.values().flat_map(filenames)).collect()
        }
        Value::Array(items) => items.iter().flat_map(filenames).collect(),
        _ => Vec::new(),
    }
}

fn is_hung(disk: &DeviceStatus) -> bool {
    disk.io.as_ref().is_some_and(|io| io.state == IoState::Hung)
}

/// Whether the guest was told of the error and is told of each that follows: it waits for nothing, and who repairs the storage of a disk that nobody
/// uses any more could wait for ever to hear of it. With engine `hold` flushes wait all the same.
fn is_told(disk: &DeviceStatus) -> bool {
    let engine = disk.on_error.as_ref().map(|retry| retry.engine);
    let tells = matches!(engine, Some(Engine::Native | Engine::Proxy));
    let has_timed_out = |io: &IoStatus| {
        let act = io.outage.as_ref().and_then(|outage| outage.at_timeout);
        io.state == IoState::TimedOut && act == Some(AtTimeout::Report) && io.held == 0
    };
    tells && disk.io.as_ref().is_some_and(has_timed_out)
}

/// Which disk, since when, and why.
fn outage_words(disk: &DeviceStatus) -> String {
    let outage = disk.io.as_ref().and_then(|io| io.outage.as_ref());
    let since =
        outage.map(|outage| format!(" since {} s", unix_ms().saturating_sub(outage.since_unix_ms) / 1000));
    let (name, since) = (disk.name(), since.unwrap_or_default());
    if is_hung(disk) {
        return format!("I/O of disk {name} hangs{since}: its storage neither fails nor answers");
    }
    let reason = match outage.map(|outage| (outage.operation.as_str(), outage.cause.as_str())) {
        None | Some((_, "")) => "its storage fails".to_owned(),
        Some(("", cause)) => format!("its storage fails: {cause}"),
        Some((operation, cause)) => format!("{operation}s fail: {cause}"),
    };
    format!("I/O of disk {name} is suspended{since}: {reason}")
}

#[cfg(test)]
mod tests;
