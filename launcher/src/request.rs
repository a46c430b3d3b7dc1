//! qvirt's own commands on the control socket, as values: parsed by the owner, sent by the CLI.

use devices::DeviceConfig;
use devices::host::Format;
use devices::retry::AtTimeout;
use devices::units::{Millis, Size};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::snapshot::SnapshotName;

/// Arguments of `qvirt-attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Attach {
    /// The device, as in a config: the table's name, then its keys.
    pub device: DeviceConfig,
    /// Only say what would be sent.
    #[serde(default)]
    pub dry_run: bool,
}

/// Reply of `qvirt-attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Attached {
    /// The device's id.
    pub id: String,
    /// A disk's target label.
    pub label: Option<String>,
    /// Its seat.
    pub address: Option<String>,
    /// Controllers that were made for it.
    pub controllers: Vec<String>,
    /// The device as it was planned, with what was assigned filled in.
    pub device: DeviceConfig,
    /// With `dry-run`: the commands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<Value>,
}

/// Arguments of `qvirt-media`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Media {
    /// Id or target label of a CD-ROM drive.
    pub id: String,
    /// Absolute path of the image to insert; without one the drive is emptied.
    #[serde(default)]
    pub path: Option<String>,
    /// Its format; default: raw.
    #[serde(default)]
    pub format: Option<Format>,
    /// Whether a guest that has locked the drive is not asked.
    #[serde(default)]
    pub force: bool,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotFile {
    /// Id or target label.
    pub id: String,
    /// Absolute path of its overlay; default: beside the base image, named after it and the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// Arguments of `qvirt-snapshot-create`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Default: the time, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
    /// The disks; default: all that are written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<SnapshotFile>,
    /// Ids or target labels of disks that take no part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Whether the guest's file systems are frozen meanwhile.
    #[serde(default)]
    pub quiesce: bool,
    /// Whether the overlays may be made where there is no room for all that the guest could write.
    #[serde(default)]
    pub sparse: bool,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// Arguments of `qvirt-snapshot-delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotDelete {
    /// The snapshot.
    pub name: SnapshotName,
    /// And all that came from it.
    #[serde(default)]
    pub children: bool,
    /// How much is merged in a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Size>,
}

/// Arguments of `qvirt-block-commit`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockCommit {
    /// Id or target label.
    pub id: String,
    /// The uppermost layer that goes; the one that is written if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<String>,
    /// The image that has it all then; the one that the config names if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Whether snapshots that it destroys are deleted.
    #[serde(default)]
    pub delete_snapshots: bool,
    /// How much is merged in a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Size>,
}

/// Arguments of `qvirt-block-pull`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockPull {
    /// Id or target label.
    pub id: String,
    /// The image on which the uppermost layer stands then; if it is not given, the one that the config names, or nothing if that is the uppermost layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Whether to go on where there is no room for all that is pulled.
    #[serde(default)]
    pub sparse: bool,
    /// How much is pulled in a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Size>,
}

/// Arguments of `qvirt-block-resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockResize {
    /// Id or target label.
    pub id: String,
    /// The size that the guest is to see.
    pub size: Size,
}

/// Arguments of `qvirt-detach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Detach {
    /// Id or target label.
    pub id: String,
    /// How long to wait for the guest, and to ask it again.
    #[serde(default)]
    pub wait_ms: u64,
    /// Whether a USB disk of the host is taken away without a look whether the guest uses it.
    #[serde(default)]
    pub force: bool,
}

/// What became of a detach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Detached {
    /// Gone, with everything it stood on.
    Removed {
        /// The device.
        id: String,
        /// What may have been lost with it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        warning: Option<String>,
    },
    /// The guest said no, or QEMU did; the device is as it was.
    Refused {
        /// The device.
        id: String,
        /// Who, and why.
        reason: String,
    },
    /// The guest has not answered; the owner finishes it whenever it does.
    Pending {
        /// The device.
        id: String,
        /// What is known.
        reason: String,
    },
}

/// Arguments of `qvirt-shutdown`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Shutdown {
    /// How long to wait for the guest.
    pub timeout_ms: u64,
    /// Whether to kill it then.
    #[serde(default)]
    pub then_kill: bool,
}

/// Arguments of `qvirt-io-retry` and `qvirt-io-fail`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskName {
    /// Id or target label.
    pub id: String,
}

/// Arguments of `qvirt-io-set`: what is left out stays.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IoSet {
    /// Id or target label.
    pub id: String,
    /// Time between two retries.
    #[serde(default)]
    pub interval: Option<Millis>,
    /// How long to retry; `0ms`: for ever.
    #[serde(default)]
    pub timeout: Option<Millis>,
    /// What happens then.
    #[serde(default)]
    pub at_timeout: Option<AtTimeout>,
}

/// Arguments of `qvirt-drill`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Drill {
    /// Id or target label.
    pub id: String,
    /// How long its storage is to fail.
    pub fail_for_ms: u64,
    /// Whether reads fail.
    pub reads: bool,
    /// Whether writes fail.
    pub writes: bool,
    /// Whether flushes fail.
    pub flushes: bool,
}

/// A command of ours.
#[derive(Clone, Debug)]
pub enum Request {
    /// `qvirt-attach`
    Attach(Box<Attach>),
    /// `qvirt-devices`: each device with its config, all that was assigned filled in.
    Devices,
    /// `qvirt-media`
    Media(Media),
    /// `qvirt-snapshot-create`
    SnapshotCreate(SnapshotCreate),
    /// `qvirt-snapshot-delete`
    SnapshotDelete(SnapshotDelete),
    /// `qvirt-block-commit`
    BlockCommit(BlockCommit),
    /// `qvirt-block-pull`
    BlockPull(BlockPull),
    /// `qvirt-block-resize`
    BlockResize(BlockResize),
    /// `qvirt-detach`
    Detach(Detach),
    /// `qvirt-shutdown`
    Shutdown(Shutdown),
    /// `qvirt-reboot`, with the arguments of a shutdown
    Reboot(Shutdown),
    /// Raw `system_reset`
    Reset,
    /// Raw `stop` (true) or `cont` (false): whether somebody wants the VM to stand still; sent to itself before it is passed on.
    Standstill(bool),
    /// `qvirt-io-retry`
    IoRetry(DiskName),
    /// `qvirt-io-fail`
    IoFail(DiskName),
    /// `qvirt-io-set`
    IoSet(IoSet),
    /// `qvirt-drill`
    Drill(Drill),
    /// `qvirt-kill`
    Kill,
    /// `qvirt-leave`: the owner ends, the VM runs on.
    Leave,
    /// `qvirt-reconcile`: QEMU is asked what it has; sent to itself after a raw command.
    Reconcile,
}

/// Commands that the owner adds to QEMU's, with what they do; `qvirt-status` is answered without the owner.
pub const COMMANDS: &[&str] = &[
    "qvirt-status",
    "qvirt-devices",
    "qvirt-attach",
    "qvirt-media",
    "qvirt-snapshot-create",
    "qvirt-snapshot-delete",
    "qvirt-block-commit",
    "qvirt-block-pull",
    "qvirt-block-resize",
    "qvirt-detach",
    "qvirt-shutdown",
    "qvirt-reboot",
    "qvirt-io-retry",
    "qvirt-io-fail",
    "qvirt-io-set",
    "qvirt-drill",
    "qvirt-kill",
    "qvirt-leave",
    "qvirt-reconcile",
];

/// A refusal or failure, as it goes over the control socket: QMP's error with a class that says which of the CLI's exit codes it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{desc}")]
pub struct Failure {
    /// The class.
    pub class: Class,
    /// For people: the thing, the reason, the next step.
    pub desc: String,
}

/// Classes of errors on the control socket. QEMU's own are `GenericError`, `CommandNotFound`, `DeviceNotFound`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It was tried and failed.
    Generic,
    /// There is no such command.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// It was refused before anything was tried.
    Refused,
    /// The outcome is open: it took too long.
    Pending,
}

impl Class {
    /// The class's name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotFound => "DeviceNotFound",
            Class::Refused => "QvirtRefused",
            Class::Pending => "QvirtPending",
        }
    }

    /// The CLI's exit code for an error of a class, by the class's name.
    pub fn exit_code(name: &str) -> u8 {
        match name {
            "QvirtRefused" => 3,
            "QvirtPending" => 4,
            "DeviceNotFound" => 5,
            _ => 1,
        }
    }
}

impl Failure {
    /// A failure of a class.
    pub fn new(class: Class, desc: impl ToString) -> Failure {
        Failure { class, desc: desc.to_string() }
    }

    /// A failure with all its causes.
    pub fn of(class: Class, error: &dyn std::error::Error) -> Failure {
        Failure { class, desc: chain(error) }
    }
}

/// An error with its causes, on one line, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

impl Request {
    /// Parses a command of ours; `None` if it is none. Arguments that do not fit are an error that names them.
    pub fn parse(name: &str, arguments: Value) -> Option<Result<Request, Failure>> {
        fn arguments_of<T: serde::de::DeserializeOwned>(name: &str, value: Value) -> Result<T, Failure> {
            let value = if value.is_null() { serde_json::json!({}) } else { value };
            serde_json::from_value(value).map_err(|e| Failure::new(Class::Generic, format!("{name}: {e}")))
        }
        Some(match name {
            "qvirt-attach" => arguments_of(name, arguments).map(|a| Request::Attach(Box::new(a))),
            "qvirt-devices" => Ok(Request::Devices),
            "qvirt-media" => arguments_of(name, arguments).map(Request::Media),
            "qvirt-snapshot-create" => arguments_of(name, arguments).map(Request::SnapshotCreate),
            "qvirt-snapshot-delete" => arguments_of(name, arguments).map(Request::SnapshotDelete),
            "qvirt-block-commit" => arguments_of(name, arguments).map(Request::BlockCommit),
            "qvirt-block-pull" => arguments_of(name, arguments).map(Request::BlockPull),
            "qvirt-block-resize" => arguments_of(name, arguments).map(Request::BlockResize),
            "qvirt-detach" => arguments_of(name, arguments).map(Request::Detach),
            "qvirt-shutdown" => arguments_of(name, arguments).map(Request::Shutdown),
            "qvirt-reboot" => arguments_of(name, arguments).map(Request::Reboot),
            "qvirt-io-retry" => arguments_of(name, arguments).map(Request::IoRetry),
            "qvirt-io-fail" => arguments_of(name, arguments).map(Request::IoFail),
            "qvirt-io-set" => arguments_of(name, arguments).map(Request::IoSet),
            "qvirt-drill" => arguments_of(name, arguments).map(Request::Drill),
            "qvirt-kill" => Ok(Request::Kill),
            "qvirt-leave" => Ok(Request::Leave),
            "qvirt-reconcile" => Ok(Request::Reconcile),
            _ => return None,
        })
    }
}
