//! Typed views of the events that qvirt acts on, written by hand so that they stay open: an unknown word is
//! kept as text, an unknown member is ignored, and members that some QEMU omits are optional.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::event::Event;

/// An enumeration of QEMU's words that keeps a word it does not know.
macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$item_doc])* $item,)+
            /// A word that was not known when this was written.
            Other(String),
        }

        impl $name {
            /// QEMU's word for it.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$item => $word,)+
                    Self::Other(word) => word,
                }
            }
        }

        impl From<String> for $name {
            fn from(word: String) -> Self {
                match word.as_str() {
                    $($word => Self::$item,)+
                    _ => Self::Other(word),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer).map(Self::from)
            }
        }
    };
}

open_enum! {
    /// What the guest wanted of its disk.
    IoOperation {
        /// The guest read.
        Read = "read",
        /// The guest wrote, flushed or discarded.
        Write = "write",
    }
}

open_enum! {
    /// What QEMU does after a disk error (`werror`, `rerror`).
    IoAction {
        /// The guest does not learn of it.
        Ignore = "ignore",
        /// The guest got the error.
        Report = "report",
        /// The VM stops, with run state `io-error`; its STOP may come before or after.
        Stop = "stop",
    }
}

open_enum! {
    /// Why the VM shut down or was reset.
    ShutdownCause {
        /// The `quit` command.
        HostQmpQuit = "host-qmp-quit",
        /// The `system_reset` command.
        HostQmpSystemReset = "host-qmp-system-reset",
        /// A signal to QEMU.
        HostSignal = "host-signal",
        /// The window of the display was closed.
        HostUi = "host-ui",
        /// An error in QEMU or the host.
        HostError = "host-error",
        /// The guest powered itself off.
        GuestShutdown = "guest-shutdown",
        /// The guest reset itself.
        GuestReset = "guest-reset",
        /// The guest crashed and said so.
        GuestPanic = "guest-panic",
        /// A reset within the machine, invisible to the guest.
        SubsystemReset = "subsystem-reset",
        /// A snapshot is being loaded.
        SnapshotLoad = "snapshot-load",
        /// None.
        None = "none",
    }
}

open_enum! {
    /// Where a job stands.
    JobStatus {
        /// Made, not yet started.
        Created = "created",
        /// At work.
        Running = "running",
        /// At work, held by someone.
        Paused = "paused",
        /// Caught up; `job-complete` ends it.
        Ready = "ready",
        /// Caught up, held by someone.
        Standby = "standby",
        /// Done but for its fellow jobs.
        Waiting = "waiting",
        /// `job-finalize` ends it.
        Pending = "pending",
        /// Being cancelled.
        Aborting = "aborting",
        /// Over; `job-dismiss` removes it and `query-jobs` says how it ended.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
    }
}

open_enum! {
    /// What QEMU does after a guest's panic.
    PanicAction {
        /// The VM stops.
        Pause = "pause",
        /// QEMU exits.
        Poweroff = "poweroff",
        /// Nothing more.
        Run = "run",
    }
}

/// BLOCK_IO_ERROR: a hint that a disk fails. At most one a second per device, and not in step with STOP.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockIoError {
    /// The name of the backend, empty when it has none, as with `-blockdev`.
    #[serde(default)]
    pub device: String,
    /// The node that failed.
    #[serde(default, rename = "node-name")]
    pub node_name: Option<String>,
    /// The frontend in QEMU's object tree; newer QEMU only.
    #[serde(default, rename = "qom-path")]
    pub qom_path: Option<String>,
    /// What the guest wanted.
    pub operation: IoOperation,
    /// What QEMU does about it.
    pub action: IoAction,
    /// True when the storage is full.
    #[serde(default)]
    pub nospace: bool,
    /// The error in words, for people only.
    #[serde(default)]
    pub reason: String,
}

/// SHUTDOWN and RESET.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Shutdown {
    /// True when the guest asked for it.
    #[serde(default)]
    pub guest: bool,
    /// Why.
    #[serde(default = "no_cause")]
    pub reason: ShutdownCause,
}

fn no_cause() -> ShutdownCause {
    ShutdownCause::None
}

/// DEVICE_DELETED and DEVICE_UNPLUG_GUEST_ERROR.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DeviceGone {
    /// The device's id. Absent for a device without one, such as the `virtio-backend` within a virtio device,
    /// whose event comes before that of the device itself.
    #[serde(default)]
    pub device: Option<String>,
    /// Its place in QEMU's object tree.
    #[serde(default)]
    pub path: String,
}

/// JOB_STATUS_CHANGE.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobChange {
    /// The job.
    pub id: String,
    /// Where it stands now.
    pub status: JobStatus,
}

/// BLOCK_JOB_COMPLETED, _CANCELLED, _READY, _ERROR and _PENDING.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// The job's id, which QEMU calls `device` in all but BLOCK_JOB_PENDING.
    #[serde(alias = "id")]
    pub device: String,
    /// The kind of job, such as `commit` or `stream`.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Why it failed; a completed job that has this did fail.
    #[serde(default)]
    pub error: Option<String>,
}

/// MEMORY_FAILURE: the host's memory is broken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MemoryFailure {
    /// Whose memory: `hypervisor` or `guest`.
    #[serde(default)]
    pub recipient: String,
    /// What was done, such as `ignore`, `inject`, `fatal` or `reset`.
    #[serde(default)]
    pub action: String,
}

/// An event that qvirt acts on, typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KnownEvent {
    /// A disk fails.
    BlockIoError(BlockIoError),
    /// The guest no longer runs; `query-status` says why.
    Stop,
    /// The guest runs again.
    Resume,
    /// The VM shuts down.
    Shutdown(Shutdown),
    /// The VM was reset.
    Reset(Shutdown),
    /// The guest was asked to shut down.
    Powerdown,
    /// A device is gone.
    DeviceDeleted(DeviceGone),
    /// The guest refuses to let go of a device.
    DeviceUnplugGuestError(DeviceGone),
    /// A job moved on.
    JobStatusChange(JobChange),
    /// A block job ended well, or with `error`.
    BlockJobCompleted(BlockJob),
    /// A block job was cancelled.
    BlockJobCancelled(BlockJob),
    /// A block job waits for `job-complete`.
    BlockJobReady(BlockJob),
    /// A block job met an error.
    BlockJobError(BlockJob),
    /// A block job waits for `job-finalize`.
    BlockJobPending(BlockJob),
    /// The guest's kernel gave up.
    GuestPanicked(PanicAction),
    /// The host's memory is broken.
    MemoryFailure(MemoryFailure),
    /// Any other event, and a known one that lacks what its type needs: see [`Event::data`].
    Other,
}

impl Event {
    /// What the event says, as far as it is known here.
    pub fn view(&self) -> KnownEvent {
        self.known().unwrap_or(KnownEvent::Other)
    }

    fn known(&self) -> Option<KnownEvent> {
        #[derive(Deserialize)]
        struct Panic {
            action: PanicAction,
        }
        Some(match self.name.as_str() {
            "BLOCK_IO_ERROR" => KnownEvent::BlockIoError(self.members()?),
            "STOP" => KnownEvent::Stop,
            "RESUME" => KnownEvent::Resume,
            "SHUTDOWN" => KnownEvent::Shutdown(self.members()?),
            "RESET" => KnownEvent::Reset(self.members()?),
            "POWERDOWN" => KnownEvent::Powerdown,
            "DEVICE_DELETED" => KnownEvent::DeviceDeleted(self.members()?),
            "DEVICE_UNPLUG_GUEST_ERROR" => KnownEvent::DeviceUnplugGuestError(self.members()?),
            "JOB_STATUS_CHANGE" => KnownEvent::JobStatusChange(self.members()?),
            "BLOCK_JOB_COMPLETED" => KnownEvent::BlockJobCompleted(self.members()?),
            "BLOCK_JOB_CANCELLED" => KnownEvent::BlockJobCancelled(self.members()?),
            "BLOCK_JOB_READY" => KnownEvent::BlockJobReady(self.members()?),
            "BLOCK_JOB_ERROR" => KnownEvent::BlockJobError(self.members()?),
            "BLOCK_JOB_PENDING" => KnownEvent::BlockJobPending(self.members()?),
            "GUEST_PANICKED" => KnownEvent::GuestPanicked(self.members::<Panic>()?.action),
            "MEMORY_FAILURE" => KnownEvent::MemoryFailure(self.members()?),
            _ => return None,
        })
    }

    fn members<T: DeserializeOwned>(&self) -> Option<T> {
        match &self.data {
            Value::Null => T::deserialize(&Value::Object(Map::new())).ok(),
            members => T::deserialize(members).ok(),
        }
    }
}
