//! What outlives an owner: the record of a launch, and the journal's entries with the state they fold into.
//!
//! Both live in the VM's runtime folder and die with the boot. The record holds what must not be asked again, because the QEMU package
//! may have been upgraded under a running VM: capabilities, versioned machine type, argv, the seats as they were planned.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use devices::capabilities::Capabilities;
use devices::machine::Machine;
use devices::{DeviceId, Layout, Placed};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::folders::{VmName, WriteError, write_volatile};
use crate::notify::Notify;
use crate::process::Identity;
use crate::status::IoFault;
use crate::work::merge::Shortening;
use crate::work::snapshot::Overlaying;

/// Format of the record and of the journal's entries. A newer one is refused, older ones are read.
pub const FORMAT: u32 = 1;

/// A launch, as it was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// [`FORMAT`] of whoever wrote it.
    pub format: u32,
    /// The VM.
    pub vm: VmName,
    /// Seconds since 1970.
    pub since_unix_secs: u64,
    /// QEMU's path.
    pub binary: PathBuf,
    /// What that QEMU can do.
    pub qemu: Capabilities,
    /// The machine around the devices.
    pub machine: Machine,
    /// Seats and devices at the start.
    pub layout: Layout,
    /// QEMU's arguments.
    pub argv: Vec<String>,
    /// Which accelerator, and why.
    pub accel_reason: String,
    /// Whether the guest waits for `resume`.
    pub paused: bool,
    /// What is run when the storage of a disk fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify: Option<Notify>,
    /// What was allowed and yet worth a word.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A record that cannot be used.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("launch record {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what this qvirt writes.
    #[error("launch record {} cannot be understood; adopt the VM with the qvirt that started it, or end it with `qvirt kill`", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A newer qvirt wrote it.
    #[error("launch record {} has format {found}, this qvirt knows up to {FORMAT}: use the qvirt that started the VM", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Launch {
    /// Writes the record; no fsync, it dies with the boot.
    pub fn save(&self, path: &Path) -> Result<(), RecordError> {
        let text = serde_json::to_vec(self)
            .map_err(|source| RecordError::Parse { path: path.to_owned(), source })?;
        Ok(write_volatile(path, &text)?)
    }

    /// Reads a record.
    pub fn load(path: &Path) -> Result<Launch, RecordError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let text =
            std::fs::read(path).map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
        let parse = |source| RecordError::Parse { path: path.to_owned(), source };
        let head: Head = serde_json::from_slice(&text).map_err(parse)?;
        if head.format > FORMAT {
            return Err(RecordError::Newer { path: path.to_owned(), found: head.format });
        }
        serde_json::from_slice(&text).map_err(parse)
    }
}

/// Where a device is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Being made: some of its objects may exist.
    Arriving,
    /// Whole.
    Present,
    /// Asked to leave: it exists until QEMU says otherwise, its seat is taken.
    Leaving,
}

/// One line of the journal, written before the change that it tells of.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// QEMU was started.
    Started(Identity),
    /// The launch was finished: the devices so far are whole, and the guest was let go.
    Live,
    /// A device is about to be made: all that is needed to unmake it.
    Device(Box<Placed>),
    /// A device has come to another stage.
    Stage {
        /// The device.
        id: DeviceId,
        /// The stage.
        stage: Stage,
    },
    /// A drive is about to get another medium: how it will be.
    Medium(Box<Placed>),
    /// A drive has the medium that it is to have: how it is.
    Drive(Box<Placed>),
    /// Disks are about to get overlays.
    Overlay(Box<Overlaying>),
    /// They have them, or nothing is left of these.
    Overlaid {
        /// Whether they have them.
        kept: bool,
    },
    /// The chain of a disk is about to become shorter.
    Shortening(Box<Shortening>),
    /// It is, or will not be.
    Shortened {
        /// Whether it is.
        done: bool,
    },
    /// A disk has failed: the last error, so that a later owner knows of it.
    Fault {
        /// The device.
        id: DeviceId,
        /// What happened.
        fault: Box<IoFault>,
    },
    /// Nothing of the device is left.
    Gone {
        /// The device.
        id: DeviceId,
    },
}

/// A journal, folded.
#[derive(Debug, Default)]
pub struct Memory {
    /// QEMU, if it was started.
    pub identity: Option<Identity>,
    /// Whether the launch was finished.
    pub live: bool,
    /// Devices with their stages, in the order in which they came.
    pub devices: Vec<(Placed, Stage)>,
    /// Devices that came and went: their generations must not be used again.
    pub gone: BTreeMap<DeviceId, Placed>,
    /// Drives as they will be, of which it is not known whether they are.
    pub media: BTreeMap<DeviceId, Placed>,
    /// Disks that will have overlays, of which it is not known whether they do.
    pub overlaying: Option<Overlaying>,
    /// A chain of which it is not known whether it is shorter.
    pub shortening: Option<Shortening>,
    /// I/O errors of devices.
    pub faults: BTreeMap<DeviceId, IoFault>,
}

impl Memory {
    /// Folds the entries of a journal.
    pub fn of(entries: Vec<Entry>) -> Memory {
        let mut memory = Memory::default();
        for entry in entries {
            match entry {
                Entry::Started(identity) => memory.identity = Some(identity),
                Entry::Live => {
                    memory.live = true;
                    memory
                        .devices
                        .iter_mut()
                        .filter(|(_, s)| *s == Stage::Arriving)
                        .for_each(|(_, s)| *s = Stage::Present);
                }
                Entry::Device(placed) => memory.devices.push((*placed, Stage::Arriving)),
                Entry::Stage { id, stage } => {
                    memory.devices.iter_mut().filter(|(d, _)| d.id == id).for_each(|(_, s)| *s = stage);
                }
                Entry::Medium(drive) => drop(memory.media.insert(drive.id.clone(), *drive)),
                Entry::Drive(drive) => {
                    memory.media.remove(&drive.id);
                    let known = memory.devices.iter_mut().find(|(device, _)| device.id == drive.id);
                    known.into_iter().for_each(|(device, _)| *device = (*drive).clone());
                }
                Entry::Overlay(overlaying) => memory.overlaying = Some(*overlaying),
                Entry::Overlaid { kept } => {
                    let overlaying = memory.overlaying.take().filter(|_| kept);
                    for (_, new) in overlaying.into_iter().flat_map(|overlaying| overlaying.disks) {
                        let known = memory.devices.iter_mut().find(|(device, _)| device.id == new.id);
                        known.into_iter().for_each(|(device, _)| *device = new.clone());
                    }
                }
                Entry::Shortening(shortening) => memory.shortening = Some(*shortening),
                Entry::Shortened { done } => {
                    let shortening = memory.shortening.take().filter(|_| done);
                    for placed in shortening.iter().map(Shortening::placed) {
                        let known = memory.devices.iter_mut().find(|(device, _)| device.id == placed.id);
                        known.into_iter().for_each(|(device, _)| *device = placed.clone());
                    }
                }
                Entry::Fault { id, fault } => drop(memory.faults.insert(id, *fault)),
                Entry::Gone { id } => {
                    memory.faults.remove(&id);
                    memory.media.remove(&id);
                    let gone = memory.devices.extract_if(.., |(device, _)| device.id == id);
                    memory.gone.extend(gone.map(|(device, _)| (device.id.clone(), device)));
                }
            }
        }
        memory
    }

    /// The fewest entries that fold into the same.
    pub fn entries(&self) -> Vec<Entry> {
        let device = |device: &Placed| Entry::Device(Box::new(device.clone()));
        let gone = self.gone.values().flat_map(|d| [device(d), Entry::Gone { id: d.id.clone() }]);
        let here = self.devices.iter().map(|(d, _)| device(d));
        let stages = self.devices.iter().map(|(d, stage)| Entry::Stage { id: d.id.clone(), stage: *stage });
        let faults = self
            .faults
            .iter()
            .map(|(id, fault)| Entry::Fault { id: id.clone(), fault: Box::new(fault.clone()) });
        let started = self.identity.iter().cloned().map(Entry::Started);
        // After `live`, which makes every device before it whole.
        gone.chain(here)
            .chain(started)
            .chain(self.live.then_some(Entry::Live))
            .chain(stages)
            .chain(self.media.values().map(|drive| Entry::Medium(Box::new(drive.clone()))))
            .chain(self.overlaying.iter().map(|overlaying| Entry::Overlay(Box::new(overlaying.clone()))))
            .chain(self.shortening.iter().map(|shortening| Entry::Shortening(Box::new(shortening.clone()))))
            .chain(faults)
            .collect()
    }
}
