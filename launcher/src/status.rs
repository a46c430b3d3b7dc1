//! What a VM is doing, as a value that anyone may read at any time: published by the owner, printed by the CLI, policy of requests.

use devices::host::Layer;
use devices::retry::{AtTimeout, Policies, Retry};
use devices::topology::SeatCount;
use serde::{Deserialize, Serialize};

use crate::record::Stage;
use crate::suspend::Counters;

/// The run state of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum VmState {
    /// QEMU is there, the guest has not run yet.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is stopped and can go on.
    Paused(PauseReason),
    /// QEMU has ended.
    Stopped(String),
}

/// Why a guest is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PauseReason {
    /// Somebody asked for it.
    Requested,
    /// A disk failed, and its policy is to stop.
    IoError,
    /// The guest's kernel panicked.
    GuestPanic,
    /// QEMU or KVM could not go on.
    InternalError,
    /// The guest has shut down, and QEMU was told to stay.
    Shutdown,
    /// Whatever else QEMU says.
    #[serde(untagged)]
    Other(String),
}

impl VmState {
    /// From the `status` of `query-status`; unknown words pass through.
    pub fn of_query(status: &str) -> VmState {
        VmState::Paused(match status {
            "running" => return VmState::Running,
            "prelaunch" | "inmigrate" => return VmState::Starting,
            "paused" => PauseReason::Requested,
            "io-error" => PauseReason::IoError,
            "guest-panicked" => PauseReason::GuestPanic,
            "internal-error" => PauseReason::InternalError,
            "shutdown" => PauseReason::Shutdown,
            other => PauseReason::Other(other.to_owned()),
        })
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            VmState::Starting => f.write_str("starting"),
            VmState::Running => f.write_str("running"),
            VmState::Paused(PauseReason::Requested) => f.write_str("paused (requested)"),
            VmState::Paused(PauseReason::IoError) => f.write_str("paused (I/O error)"),
            VmState::Paused(PauseReason::GuestPanic) => f.write_str("paused (guest panic)"),
            VmState::Paused(PauseReason::InternalError) => f.write_str("paused (internal error)"),
            VmState::Paused(PauseReason::Shutdown) => f.write_str("paused (guest has shut down)"),
            VmState::Paused(PauseReason::Other(reason)) => write!(f, "paused ({reason})"),
            VmState::Stopped(reason) => write!(f, "stopped ({reason})"),
        }
    }
}

/// An I/O error of a disk: the last one, and how many there were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoFault {
    /// The node that failed.
    pub node: String,
    /// `read` or `write`.
    pub operation: String,
    /// What QEMU did: `report`, `stop`, `ignore`, `retry`, ...
    pub action: String,
    /// The system's words.
    pub cause: String,
    /// Whether the host had no space left.
    pub nospace: bool,
    /// Seconds since 1970, of the first and of the last one.
    pub since_unix_secs: i64,
    /// Seconds since 1970, of the last one.
    pub last_unix_secs: i64,
    /// BLOCK_IO_ERROR events that arrived. QEMU may hold some back, so there may have been more errors.
    pub events: u64,
    /// `io-status` of the device by `query-block` after the last one: `ok`, `failed`, `nospace`.
    pub io_status: Option<String>,
}

/// Where a disk that retries stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoState {
    /// Its storage works.
    Ok,
    /// Its storage fails; the guest does not know.
    Suspended,
    /// Its storage failed for longer than the timeout.
    TimedOut,
    /// Its storage neither fails nor answers.
    Hung,
}

impl std::fmt::Display for IoState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            IoState::Ok => "ok",
            IoState::Suspended => "suspended",
            IoState::TimedOut => "timed out",
            IoState::Hung => "hangs",
        })
    }
}

/// An outage of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoOutage {
    /// Milliseconds since 1970, of the first failure.
    pub since_unix_ms: u64,
    /// How often it was tried again, in vain.
    pub attempts: u64,
    /// `read` or `write`, of the last failure that QEMU explained.
    pub operation: String,
    /// The system's words for it.
    pub cause: String,
    /// Whether the host had no space left.
    pub nospace: bool,
    /// What was done at the timeout, once it was reached.
    pub at_timeout: Option<AtTimeout>,
}

/// A disk that retries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoStatus {
    /// Where it stands.
    pub state: IoState,
    /// How many of its requests wait in the owner, the guest running.
    pub held: usize,
    /// The outage, while there is one.
    pub outage: Option<IoOutage>,
    /// Whether a drill of it is under way, or not yet cleared up behind.
    #[serde(default)]
    pub drilled: bool,
    /// What happened since the launch.
    pub counters: Counters,
}

/// Where a USB device of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UsbState {
    /// The guest has it.
    Attached,
    /// It is not plugged into the host any more.
    Gone,
    /// Another device is plugged into its port.
    Other,
    /// It is plugged in, and QEMU has not taken it.
    Waiting,
}

impl std::fmt::Display for UsbState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            UsbState::Attached => "attached",
            UsbState::Gone => "gone from the host",
            UsbState::Other => "another device on its port",
            UsbState::Waiting => "not taken by QEMU",
        })
    }
}

/// A USB device of the host, given to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbStatus {
    /// Where it is.
    pub state: UsbState,
    /// Its bus on the host.
    pub bus: u8,
    /// The ports on the way to it.
    pub port: String,
    /// Its number on the bus, while it is plugged in.
    pub device: Option<u8>,
    /// Vendor, four hexadecimal digits.
    pub vendor: String,
    /// Product.
    pub product: String,
    /// The serial number that it had when it was given to the guest.
    pub serial: Option<String>,
    /// Whether it is a disk.
    pub storage: bool,
}

/// A device of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its id.
    pub id: String,
    /// Its table: `disk`, `nic`, ...
    pub kind: String,
    /// A disk's target label. It is a label: the guest may call the disk otherwise.
    pub label: Option<String>,
    /// Its seat.
    pub address: Option<String>,
    /// QEMU's driver.
    pub driver: Option<String>,
    /// What is behind it: an image, a bridge, a socket.
    pub backing: Option<String>,
    /// Of a disk: all images that it reads, the top first.
    #[serde(default)]
    pub images: Vec<String>,
    /// Of a disk: its capacity, as last seen.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// Whether nobody can look at the capacity now, its storage being out of order.
    #[serde(default)]
    pub size_stale: bool,
    /// Where it is in its life.
    pub stage: Stage,
    /// The pseudo terminal of a serial console.
    pub pty: Option<String>,
    /// Whether qvirt made it for other devices' sake.
    pub on_demand: bool,
    /// Of a disk: the layers of its image, the one that is written first.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// Its last I/O error.
    pub fault: Option<IoFault>,
    /// What a disk does at an error, QEMU's defaults filled in.
    #[serde(default)]
    pub policies: Option<Policies>,
    /// How a disk retries, if it does, changes at run time included.
    #[serde(default)]
    pub on_error: Option<Retry>,
    /// Of a disk that retries: where it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io: Option<IoStatus>,
    /// Of a USB device of the host: where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usb: Option<UsbStatus>,
}

impl DeviceStatus {
    /// Its id, with its label.
    pub fn name(&self) -> String {
        match &self.label {
            Some(label) => format!("{} ({label})", self.id),
            None => self.id.clone(),
        }
    }

    /// Whether its storage is out of order.
    pub fn is_suspended(&self) -> bool {
        self.io.as_ref().is_some_and(|io| io.state != IoState::Ok)
    }
}

/// Something on a seat that qvirt did not make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// QEMU's id of it.
    pub name: String,
    /// Its seat, if it has one that qvirt knows.
    pub address: Option<String>,
}

/// The VM, as its owner knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Rises with every change.
    pub generation: u64,
    /// Name.
    pub vm: String,
    /// UUID.
    pub uuid: String,
    /// Run state.
    #[serde(flatten)]
    pub run: VmState,
    /// QEMU's process.
    pub pid: u32,
    /// The owner's process.
    pub owner_pid: u32,
    /// QEMU's version.
    pub qemu: String,
    /// The accelerator, and why it was picked.
    pub accel: String,
    /// Seconds since 1970 at which it was started.
    pub since_unix_secs: u64,
    /// The disk that a reset boots from; none where a kernel is booted directly.
    #[serde(default)]
    pub boot_disk: Option<String>,
    /// Devices.
    pub devices: Vec<DeviceStatus>,
    /// What others plugged in.
    pub foreign: Vec<Foreign>,
    /// Free seats per kind.
    pub seats: Vec<Seats>,
    /// What needs a person's attention.
    pub warnings: Vec<String>,
}

/// Free and taken seats of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seats {
    /// `root-port`, `scsi-target CONTROLLER`, ...
    pub kind: String,
    /// Free seats.
    pub free: usize,
    /// All seats.
    pub total: usize,
}

impl From<SeatCount> for Seats {
    fn from(count: SeatCount) -> Seats {
        Seats { kind: count.kind, free: count.free, total: count.total }
    }
}

impl Status {
    /// The device of an id or target label.
    pub fn device(&self, name: &str) -> Option<&DeviceStatus> {
        let by_id = self.devices.iter().find(|d| d.id == name);
        by_id.or_else(|| self.devices.iter().find(|d| d.label.as_deref() == Some(name)))
    }
}

/// Fewer free root ports than this is worth a warning: the next hot-plug may be the last.
pub const LOW_WATER: usize = 1;
