//! The work on a running VM: making a device step by step, with undo; asking one to leave; clearing up behind one that left.
//!
//! One piece of work at a time: whoever works holds the [`Workshop`], and with it the journal. The done list is the undo list: a failure
//! at step k undoes k-1 to 1 and returns the first error. A command that timed out may yet be done, so it is undone as well; QEMU takes
//! commands in order, so the undo comes after it. A frontend that the guest may have seen is not undone but asked to leave, like any
//! other device.

mod media;
pub mod merge;
mod present;
pub mod pull;
pub mod snapshot;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::host::HostNeed;
use devices::spec::{Backend, Call};
use devices::{DeviceId, Placed};
use qmp_client::{Qmp, QmpError};
use serde_json::{Value, json};
use thiserror::Error;
use tracing::{debug, warn};

use crate::host::need::{Host, NeedError};
use crate::injection::{Injected, Steps};
use crate::journal::{Journal, JournalError};
use crate::quirks::{self, UnplugError};
use crate::record::{Entry, Memory, Stage};

pub use present::{peripherals, usb_attached};

/// A step that failed.
#[derive(Debug, Error)]
pub enum StepError {
    /// The journal could not be written, so nothing was changed.
    #[error("the journal could not be written, so nothing was changed")]
    Journal(#[from] JournalError),
    /// Something of the host.
    #[error(transparent)]
    Host(#[from] NeedError),
    /// QEMU.
    #[error("{command}")]
    Qmp {
        /// The command that was sent.
        command: &'static str,
        /// What became of it.
        source: QmpError,
    },
    /// QEMU said yes, and the device is not there.
    #[error(
        "device_add succeeded, and the device is gone again: the guest may have thrown it out while it booted; try again"
    )]
    Vanished,
    /// The guest does not let go of a medium.
    #[error("the guest has locked the drive and keeps its medium: unmount it there, or use --force")]
    Locked,
    /// QEMU said yes, and its disks do not stand on their overlays.
    #[error(
        "the transaction succeeded, and the disks do not stand on their overlays: this is a bug of qvirt or QEMU"
    )]
    NotOnTop,
    /// A job of QEMU's ended with an error.
    #[error("QEMU's job failed: {words}")]
    Job {
        /// QEMU's words.
        words: String,
    },
    /// QEMU's job ended well, and nothing is different.
    #[error("the merge ended, and the chain is as it was: this is a bug of qvirt or QEMU")]
    NotMerged,
    /// The layer that is written cannot be left just now.
    #[error(
        "the I/O of disk {0} was held meanwhile, so QEMU did not see all that its guest wrote, and the layer stays: try again when its storage works"
    )]
    Held(DeviceId),
    /// A chain of images.
    #[error(transparent)]
    Tidy(#[from] crate::snapshot::tidy::TidyError),
    /// What a disk is.
    #[error(transparent)]
    Refusal(#[from] devices::Refusal),
    /// What is known of snapshots.
    #[error(transparent)]
    Store(#[from] crate::snapshot::StoreError),
    /// An overlay.
    #[error(transparent)]
    Overlay(#[from] crate::snapshot::files::OverlayError),
    /// The guest agent.
    #[error(transparent)]
    Freeze(#[from] crate::snapshot::freeze::FreezeError),
    /// Storage that does not answer.
    #[error("the storage of the images has no answer after {0:?}: repair it, then try again")]
    Storage(std::time::Duration),
    /// A descriptor that an earlier step should have opened.
    #[error("descriptor {0} was not opened")]
    NoDescriptor(String),
    /// The thread that did it ended without an answer.
    #[error("the thread that did it is lost")]
    Lost(#[source] tokio::task::JoinError),
    /// A test's wish.
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// A piece of work that failed: the device, and the first error.
#[derive(Debug, Error)]
#[error("{work} {id}: step {step} failed, and everything before it was undone{}", asked(.leaving))]
pub struct WorkError {
    /// `attach` or `detach`.
    pub work: &'static str,
    /// The device.
    pub id: DeviceId,
    /// The step's name.
    pub step: &'static str,
    /// What failed.
    pub source: StepError,
    /// Devices that the guest may have seen and was asked to let go of.
    pub leaving: Vec<DeviceId>,
}

fn asked(ids: &[DeviceId]) -> String {
    let ids: Vec<&str> = ids.iter().map(DeviceId::as_str).collect();
    if ids.is_empty() {
        String::new()
    } else {
        format!("; the guest was asked to let go of {}", ids.join(", "))
    }
}

/// One step of an attach.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The journal learns of the device.
    Record,
    /// Something of the host is taken.
    Need(HostNeed),
    /// A descriptor is sent to QEMU.
    Descriptor(String),
    /// An object that the guest does not see.
    Backend(Backend),
    /// The device itself.
    Frontend,
    /// QEMU is asked whether it has the device.
    Verify,
    /// The journal learns that the device is whole.
    Settle,
}

impl Step {
    /// Names of all kinds of step. A test fails each of them.
    pub const KINDS: &'static [&'static str] = &[
        "record",
        "lease",
        "tap",
        "vhost-net",
        "socket",
        "io-proxy",
        "vdpa",
        "vhost-scsi",
        "function",
        "driver",
        "vf-profile",
        "usb",
        "descriptor",
        "object",
        "blockdev",
        "netdev",
        "chardev",
        "fdset",
        "frontend",
        "verify",
        "settle",
    ];

    /// The name of this kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Step::Record => "record",
            Step::Need(HostNeed::Image { .. }) => "lease",
            Step::Need(HostNeed::Tap { .. }) => "tap",
            Step::Need(HostNeed::VhostNet { .. }) => "vhost-net",
            Step::Need(HostNeed::Socket { .. }) => "socket",
            Step::Need(HostNeed::IoProxy(_)) => "io-proxy",
            Step::Need(HostNeed::Vdpa { .. }) => "vdpa",
            Step::Need(HostNeed::VhostScsi { .. }) => "vhost-scsi",
            Step::Need(HostNeed::Function { .. }) => "function",
            Step::Need(HostNeed::Driver { .. }) => "driver",
            Step::Need(HostNeed::VfProfile { .. }) => "vf-profile",
            Step::Need(HostNeed::Usb(_)) => "usb",
            Step::Descriptor(_) => "descriptor",
            Step::Backend(Backend::Object(_)) => "object",
            Step::Backend(Backend::Blockdev(_)) => "blockdev",
            Step::Backend(Backend::Netdev(_)) => "netdev",
            Step::Backend(Backend::Chardev(_)) => "chardev",
            Step::Backend(Backend::Fdset(_)) => "fdset",
            Step::Frontend => "frontend",
            Step::Verify => "verify",
            Step::Settle => "settle",
        }
    }

    /// What is taken of the host for a device, in order.
    pub fn on_the_host(device: &Placed) -> Vec<Step> {
        let needs = device.needs.iter().cloned().map(Step::Need);
        std::iter::once(Step::Record).chain(needs).collect()
    }

    /// What is made of a device in QEMU then, in order.
    pub fn in_qemu(device: &Placed) -> Vec<Step> {
        let mut steps = Vec::new();
        for backend in &device.spec.backends {
            steps.extend(backend.descriptors().map(|name| Step::Descriptor(name.to_owned())));
            steps.push(Step::Backend(backend.clone()));
        }
        if let Some(frontend) = &device.spec.frontend {
            steps.extend(frontend.descriptor().map(|name| Step::Descriptor(name.to_owned())));
            steps.extend([Step::Frontend, Step::Verify]);
        }
        steps.push(Step::Settle);
        steps
    }
}

/// What came of asking a device to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The guest knows; DEVICE_DELETED will tell.
    Waiting,
    /// The guest could not be asked now; asking again may help.
    Busy(String),
    /// It is gone already.
    Gone,
    /// QEMU says it cannot leave.
    Refused(String),
}

/// All that is needed to work on a VM.
#[derive(Debug)]
pub struct Workshop {
    /// Written before each change.
    pub journal: Journal<Entry>,
    /// The host.
    pub host: Arc<Host>,
    /// The connection to QEMU.
    pub qmp: Qmp,
}

impl Workshop {
    /// Makes devices, controllers first. On failure nothing is left of them but those that the guest may have seen, which were asked to leave.
    ///
    /// All of them have what they need of the host before QEMU gets the first: a member of an IOMMU group can be used when the others are bound too.
    pub async fn attach(&mut self, parts: &[Placed]) -> Result<(), WorkError> {
        let mut steps = Steps::of("attach");
        let mut descriptors = Vec::new();
        for device in parts {
            descriptors.push(BTreeMap::new());
            let taken = descriptors.last_mut().expect("it was just put there");
            if let Err((step, source)) = self.make(device, Step::on_the_host(device), taken, &mut steps).await
            {
                return Err(self.give_up(&parts[..descriptors.len()], device, step, source).await);
            }
        }
        for (device, taken) in parts.iter().zip(&mut descriptors) {
            if let Err((step, source)) = self.make(device, Step::in_qemu(device), taken, &mut steps).await {
                return Err(self.give_up(parts, device, step, source).await);
            }
        }
        Ok(())
    }

    async fn give_up(
        &mut self,
        begun: &[Placed],
        device: &Placed,
        step: &'static str,
        source: StepError,
    ) -> WorkError {
        warn!(device = %device.id, step, error = %source, "attach failed, undoing");
        let mut leaving = Vec::new();
        for device in begun.iter().rev() {
            if self.unmake(device).await {
                leaving.push(device.id.clone());
            }
        }
        WorkError { work: "attach", id: device.id.clone(), step, source, leaving }
    }

    async fn make(
        &mut self,
        device: &Placed,
        todo: Vec<Step>,
        descriptors: &mut BTreeMap<String, OwnedFd>,
        steps: &mut Steps,
    ) -> Result<(), (&'static str, StepError)> {
        for step in todo {
            let kind = step.kind();
            debug!(device = %device.id, step = kind, "attach");
            steps.enter(kind).map_err(|injected| (kind, injected.into()))?;
            self.take(device, step, descriptors).await.map_err(|error| (kind, error))?;
        }
        Ok(())
    }

    async fn take(
        &mut self,
        device: &Placed,
        step: Step,
        descriptors: &mut BTreeMap<String, OwnedFd>,
    ) -> Result<(), StepError> {
        match step {
            Step::Record => self.journal.append(&Entry::Device(Box::new(device.clone())))?,
            Step::Need(need) => {
                // Switches and storage may take their time; the owner's task must not.
                let (host, id) = (Arc::clone(&self.host), device.id.clone());
                descriptors.extend(aside(move || host.meet(&id, &need)).await?);
            }
            Step::Descriptor(name) => {
                let descriptor = descriptors.remove(&name).ok_or(StepError::NoDescriptor(name.clone()))?;
                let sent = self.qmp.call_with_fds("getfd", json!({"fdname": name}), vec![descriptor]).await;
                sent.map_err(|source| StepError::Qmp { command: "getfd", source })?;
            }
            Step::Backend(backend) => {
                let taken = match &backend {
                    Backend::Fdset(set) => {
                        let name = &set.descriptor;
                        let taken = descriptors.remove(name).ok_or(StepError::NoDescriptor(name.clone()))?;
                        vec![taken]
                    }
                    _ => Vec::new(),
                };
                let Call { execute, arguments } = backend.add();
                let sent = self.qmp.call_with_fds(execute, arguments, taken).await;
                sent.map_err(|source| StepError::Qmp { command: execute, source })?;
            }
            Step::Frontend => {
                if let Some(frontend) = &device.spec.frontend {
                    self.call(frontend.add()).await?;
                }
            }
            Step::Verify => {
                if !peripherals(&self.qmp).await?.contains(&device.id.to_string()) {
                    return Err(StepError::Vanished);
                }
                self.verify_usb(device).await?;
            }
            Step::Settle => {
                self.journal.append(&Entry::Stage { id: device.id.clone(), stage: Stage::Present })?
            }
        }
        Ok(())
    }

    async fn call(&self, call: Call) -> Result<(), StepError> {
        let sent = self.qmp.call(call.execute, call.arguments).await;
        sent.map(drop).map_err(|source| StepError::Qmp { command: call.execute, source })
    }

    /// Undoes whatever there is of a device. Returns whether something of it remains: its frontend, which was asked to leave, or a
    /// backend that QEMU did not let go of.
    pub async fn unmake(&mut self, device: &Placed) -> bool {
        if device.spec.frontend.is_some() && self.frontend_exists(&device.id).await {
            self.note(&Entry::Stage { id: device.id.clone(), stage: Stage::Leaving });
            let asked = self.ask_to_leave(device).await;
            if asked != Asked::Gone {
                return true;
            }
        }
        for name in device.spec.named_descriptors() {
            let closed = self.undo(Call { execute: "closefd", arguments: json!({"fdname": name}) }).await;
            closed.unwrap_or_else(
                |error| warn!(device = %device.id, %error, "a descriptor stays open in QEMU"),
            );
        }
        match self.clear(device, Vec::new(), std::future::ready(())).await {
            Ok(()) => false,
            Err(error) => {
                warn!(device = %device.id, %error, "could not clear up; trying again later");
                self.note(&Entry::Stage { id: device.id.clone(), stage: Stage::Leaving });
                true
            }
        }
    }

    /// Whether QEMU has the frontend. If it cannot be asked, it may have.
    async fn frontend_exists(&self, id: &DeviceId) -> bool {
        match peripherals(&self.qmp).await {
            Ok(ids) => ids.contains(&id.to_string()),
            Err(error) => {
                warn!(device = %id, %error, "QEMU could not be asked for its devices");
                !self.qmp.is_closed()
            }
        }
    }

    /// Sends `device_del`.
    pub async fn ask_to_leave(&self, device: &Placed) -> Asked {
        let call = device.spec.device_del();
        match self.qmp.call(call.execute, call.arguments).await {
            Ok(_) => Asked::Waiting,
            Err(QmpError::Refused(error)) => match quirks::unplug_error(&error) {
                UnplugError::Absent => Asked::Gone,
                UnplugError::Asked => Asked::Waiting,
                UnplugError::Busy => Asked::Busy(error.desc),
                UnplugError::Refused => Asked::Refused(error.desc),
            },
            // Unknown, so it may have been asked.
            Err(error) => Asked::Busy(error.to_string()),
        }
    }

    /// Clears up behind a device whose frontend is gone: nodes that stood in for its own, backends in reverse, what it had of the host, the
    /// journal. `let_go` is done when QEMU has nothing of it any more. An error leaves the rest for another try.
    pub async fn clear(
        &mut self,
        device: &Placed,
        stand_ins: Vec<String>,
        let_go: impl Future<Output = ()>,
    ) -> Result<(), StepError> {
        let mut steps = Steps::of("clear");
        for node in stand_ins {
            self.undo(Call { execute: "blockdev-del", arguments: json!({"node-name": node}) }).await?;
        }
        for backend in device.spec.backends.iter().rev() {
            steps.enter("backend")?;
            self.undo(backend.del()).await?;
        }
        steps.enter("host")?;
        let_go.await;
        let (host, gone) = (Arc::clone(&self.host), device.clone());
        aside(move || host.give_all_back(&gone)).await?;
        steps.enter("record")?;
        self.note(&Entry::Gone { id: device.id.clone() });
        Ok(())
    }

    /// Sends an inverse; that there is nothing to undo is no error.
    async fn undo(&self, call: Call) -> Result<(), StepError> {
        match self.qmp.call(call.execute, call.arguments).await {
            Ok(_) => Ok(()),
            Err(QmpError::Refused(error)) if quirks::is_absent(&error) => Ok(()),
            Err(source) => Err(StepError::Qmp { command: call.execute, source }),
        }
    }

    /// Writes down that a device is asked to leave, and asks it. The caller has armed whoever waits for DEVICE_DELETED, which may come
    /// before the reply.
    pub async fn detach(&mut self, device: &Placed) -> Result<Asked, StepError> {
        let mut steps = Steps::of("detach");
        steps.enter("record")?;
        self.journal.append(&Entry::Stage { id: device.id.clone(), stage: Stage::Leaving })?;
        let asked = match steps.enter("device_del") {
            Ok(()) => self.ask_to_leave(device).await,
            Err(injected) => Asked::Refused(injected.to_string()),
        };
        if let Asked::Refused(_) = asked {
            self.note(&Entry::Stage { id: device.id.clone(), stage: Stage::Present });
        }
        Ok(asked)
    }

    /// Writes the journal anew, with the fewest entries that say the same.
    pub fn shorten_journal(&mut self) {
        let run_dir = self.host.run_dir.clone();
        let shortened =
            crate::journal::read_only::<Entry>(&run_dir.join("journal")).and_then(|read| match read {
                Some((_, entries)) => self.journal.rewrite(&Memory::of(entries).entries()),
                None => Ok(()),
            });
        if let Err(error) = shortened {
            warn!(%error, "the journal could not be made shorter; it goes on as it is");
        }
    }

    /// Journals what is true already: not being able to write it down changes nothing about it, and a later owner will ask QEMU.
    pub fn note(&mut self, entry: &Entry) {
        if let Err(error) = self.journal.append(entry) {
            warn!(%error, "the journal lags behind; the next owner will find out by asking QEMU");
        }
    }
}

/// Does what may block in a thread of its own.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NeedError> + Send + 'static,
) -> Result<T, StepError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => Ok(outcome?),
        Err(error) => Err(StepError::Lost(error)),
    }
}

/// The QMP commands of an attach, as text for `--dry-run`.
pub fn dry_run(parts: &[Placed]) -> Vec<Value> {
    let calls = parts.iter().flat_map(|part| part.spec.calls());
    calls.map(|call| json!({"execute": call.execute, "arguments": call.arguments})).collect()
}
