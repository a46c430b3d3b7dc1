//! Taking over a VM whose owner died, and undoing what a dead VM left: nothing is taken from memory that QEMU or the host can be asked.
//!
//! The journal says what was begun. A device whose attach was interrupted is kept if QEMU has it, and undone if not; one that was asked to
//! leave is still leaving, or gone; one that QEMU does not have any more is cleared up behind.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use devices::host::{HostNeed, IoProxy};
use devices::{DeviceId, Layout, Placed};
use serde_json::json;
use thiserror::Error;
use tracing::{info, warn};

use crate::folders::{Folders, FoldersError, VmFiles, VmName};
use crate::host::io_proxy;
use crate::host::need::Host;
use crate::journal::{self, Journal, JournalError};
use crate::launch::{Cause, Unfinished, clear_up, connect, end, held_words, images, log_file, same_uuid};
use crate::lease::{LeaseError, Leases};
use crate::locks::{LockError, OfdLock, probe};
use crate::owner::Born;
use crate::process::{Identity, Process, ProcessError};
use crate::record::{Entry, Launch, Memory, RecordError, Stage};
use crate::users;
use crate::work::snapshot::Overlaying;
use crate::work::{Workshop, peripherals};

/// What a VM's runtime folder says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// There is nothing of it.
    None,
    /// QEMU and an owner live.
    Owned,
    /// QEMU lives, its owner does not.
    Orphan,
    /// An owner lives and QEMU does not: it is starting or ending.
    Between,
    /// Both are dead and left something.
    Remains,
}

/// A VM that could not be adopted or cleared up.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum AdoptError {
    #[error(transparent)]
    Folders(#[from] FoldersError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("VM {vm} has an owner: `qvirt status {vm}` shows it")]
    Owned { vm: VmName },
    #[error("VM {vm} is running without an owner: `qvirt run {vm}` adopts it, `qvirt kill {vm}` ends it")]
    Orphan { vm: VmName },
    #[error("VM {vm} has a live QEMU that cannot be found: look for it with `fuser {}`, end it, then `qvirt recover {vm}`", life.display())]
    Lost { vm: VmName, life: std::path::PathBuf },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("VM {vm} could not be adopted, and runs on: {}", crate::request::chain(.cause))]
    Qemu {
        vm: VmName,
        #[source]
        cause: Cause,
    },
    #[error("{words}")]
    Held { words: String },
    #[error("VM {vm} ended while it was adopted: `qvirt recover {vm}` clears up")]
    Ended { vm: VmName },
    #[error(transparent)]
    Unfinished(#[from] Unfinished),
    #[error("the journal of VM {vm} does not fit its launch: {reason}")]
    Layout { vm: VmName, reason: devices::Refusal },
}

/// Looks at a VM's locks, without taking them.
pub fn life(files: &VmFiles) -> Result<Life, LockError> {
    if !files.dir().exists() {
        return Ok(Life::None);
    }
    let held = |path: std::path::PathBuf| if path.exists() { probe(&path) } else { Ok(false) };
    Ok(match (held(files.life())?, held(files.owner())?) {
        (true, true) => Life::Owned,
        (true, false) => Life::Orphan,
        (false, true) => Life::Between,
        (false, false) => Life::Remains,
    })
}

/// Adopts a running VM. Returns whether its launch still has to be finished as well.
pub async fn adopt(folders: &Folders, vm: &VmName) -> Result<(Born, bool), AdoptError> {
    let files = folders.vm(vm)?;
    let owner_lock =
        OfdLock::try_acquire(&files.owner())?.ok_or_else(|| AdoptError::Owned { vm: vm.clone() })?;
    let launch = Launch::load(&files.launch())?;
    let (mut journal, entries) = Journal::<Entry>::open(&files.journal(), vm)?;
    let memory = Memory::of(entries);
    if let Err(error) = journal.rewrite(&memory.entries()) {
        warn!(%vm, %error, "the journal could not be made shorter; it goes on as it is");
    }
    let process = process_of(vm, &files, memory.identity.as_ref())?;
    let failed = |cause| AdoptError::Qemu { vm: vm.clone(), cause };
    let host = Arc::new(Host {
        vm: vm.clone(),
        run_dir: files.dir().to_owned(),
        state_dir: folders.state_dir(vm),
        leases: Leases::open(&folders.leases)?,
    });
    park_proxies(&host, &memory).await;
    let (qmp, events) = connect(&files.qmp(), &process).await.map_err(failed)?;
    same_uuid(&qmp, &launch.machine.uuid).await.map_err(failed)?;
    let mut shop = Workshop { journal, host, qmp };
    if memory.identity.is_none() {
        shop.note(&Entry::Started(process.identity().clone()));
    }
    // A reboot that its owner did not live to finish: from now on a guest that shuts down ends QEMU again.
    if launch.qemu.commands.contains("set-action") {
        let _ = shop.qmp.call("set-action", json!({"shutdown": "poweroff"})).await;
    }
    let there = peripherals(&shop.qmp).await.map_err(|error| failed(error.into()))?;
    let bare = launch.layout.bare();
    let (layout, stages) = settle(&mut shop, bare, &memory, &there)
        .await
        .map_err(|reason| AdoptError::Layout { vm: vm.clone(), reason })?;
    let log = log_file(folders, vm);
    info!(%vm, pid = process.pid(), devices = layout.devices().len(), "adopted");
    let unfinished = !memory.live;
    Ok((
        Born {
            launch,
            log,
            process,
            events,
            shop,
            layout,
            stages,
            shortening: memory.shortening,
            faults: memory.faults,
            owner_lock,
            life: None,
        },
        unfinished,
    ))
}

/// Starts the proxies that died meanwhile, and makes all of them give back what they hold: QEMU would not answer if it drains. They hold again
/// when the owner has looked at the disks.
async fn park_proxies(host: &Arc<Host>, memory: &Memory) {
    let stands = |(device, stage): &&(Placed, Stage)| *stage != Stage::Arriving && device.retry.is_some();
    for (device, _) in memory.devices.iter().filter(stands) {
        for need in &device.needs {
            let HostNeed::IoProxy(plan) = need else { continue };
            let (host, id, need, plan) = (Arc::clone(host), device.id.clone(), need.clone(), plan.clone());
            let parking = tokio::task::spawn_blocking(move || {
                host.meet(&id, &need).map_err(|error| crate::request::chain(&error))?;
                io_proxy::park(&plan).map_err(|error| error.to_string())
            });
            let outcome = parking.await.map_err(|error| error.to_string());
            if let Err(error) = outcome.and_then(|parked| parked) {
                warn!(device = %device.id, error, "its io-proxy cannot be told to let go");
            }
        }
    }
}

/// Compares the journal with QEMU, finishes or undoes what was interrupted.
async fn settle(
    shop: &mut Workshop,
    mut layout: Layout,
    memory: &Memory,
    there: &[String],
) -> Result<(Layout, BTreeMap<DeviceId, Stage>), devices::Refusal> {
    let mut stages = BTreeMap::new();
    for device in memory.gone.values() {
        layout.remember(device);
    }
    let mut devices = memory.devices.clone();
    if let Some(overlaying) = &memory.overlaying {
        settle_snapshot(shop, &mut layout, &mut devices, overlaying).await;
    }
    for (device, _) in &mut devices {
        if let Some(wanted) = memory.media.get(&device.id) {
            info!(device = %device.id, "a change of its medium was interrupted");
            layout.note_nodes(wanted);
            *device = shop.settle_medium(device, wanted).await.unwrap_or_else(|| device.clone());
        }
    }
    for (device, stage) in &devices {
        layout.restore(device.clone())?;
        stages.insert(device.id.clone(), *stage);
    }
    // Backwards: what stands on a controller goes before the controller.
    for (device, stage) in devices.iter().rev() {
        let exists = device.spec.frontend.is_none() || there.iter().any(|id| id == device.id.as_str());
        // Before the launch was finished, all devices stand on the command line.
        let stage = if memory.live { *stage } else { Stage::Present };
        let now = interrupted(shop, device, stage, exists).await;
        match now {
            Some(stage) => drop(stages.insert(device.id.clone(), stage)),
            None => {
                stages.remove(&device.id);
                layout.remove(&device.id);
            }
        }
        if now == Some(Stage::Leaving) {
            layout.topology_mut().leaving(&device.id);
        }
    }
    Ok((layout, stages))
}

/// A snapshot was being taken when the owner died: it was taken, or nothing of it is left.
async fn settle_snapshot(
    shop: &mut Workshop,
    layout: &mut Layout,
    devices: &mut [(Placed, Stage)],
    overlaying: &Overlaying,
) {
    let name = &overlaying.snapshot.name;
    info!(snapshot = %name, "it was interrupted");
    overlaying.disks.iter().for_each(|(_, new)| layout.note_nodes(new));
    let is_kept = match shop.settle_overlays(overlaying, true).await {
        Some(is_kept) => is_kept,
        // It is what a start would believe.
        None => shop.host.store().read().is_ok_and(|book| book.snapshot(&shop.host.vm, name).is_some()),
    };
    for (_, new) in overlaying.disks.iter().filter(|_| is_kept) {
        let known = devices.iter_mut().find(|(device, _)| device.id == new.id);
        known.into_iter().for_each(|(device, _)| *device = new.clone());
    }
}

/// What becomes of one device: its stage, or `None` if nothing is left of it.
async fn interrupted(shop: &mut Workshop, device: &Placed, stage: Stage, exists: bool) -> Option<Stage> {
    match (stage, exists) {
        (Stage::Present, true) => Some(Stage::Present),
        (Stage::Leaving, true) => Some(Stage::Leaving),
        (Stage::Arriving, true) if device.spec.frontend.is_some() => {
            info!(device = %device.id, "its attach was interrupted after the guest got it: kept");
            shop.note(&Entry::Stage { id: device.id.clone(), stage: Stage::Present });
            Some(Stage::Present)
        }
        (Stage::Arriving | Stage::Leaving | Stage::Present, _) => {
            info!(device = %device.id, ?stage, "interrupted, or gone meanwhile: clearing up");
            shop.unmake(device).await.then_some(Stage::Leaving)
        }
    }
}

fn process_of(vm: &VmName, files: &VmFiles, identity: Option<&Identity>) -> Result<Process, AdoptError> {
    let lost = || AdoptError::Lost { vm: vm.clone(), life: files.life() };
    // The owner may have died between starting QEMU and writing down whom it started.
    let found = match identity {
        Some(identity) => identity.clone(),
        None => holder_of(&files.life()).ok_or_else(lost)?,
    };
    Process::adopt(&found)?.ok_or_else(|| AdoptError::Ended { vm: vm.clone() })
}

/// The process that has a file open. Not ourselves.
fn holder_of(path: &Path) -> Option<Identity> {
    users::of(path).into_iter().find_map(|pid| Identity::of(pid).ok())
}

/// Undoes what a dead VM left on the host. Returns the ids of devices whose needs were given back.
pub fn recover(folders: &Folders, vm: &VmName) -> Result<Vec<String>, AdoptError> {
    let files = folders.vm(vm)?;
    match life(&files)? {
        Life::None => return Ok(Vec::new()),
        Life::Owned | Life::Between => return Err(AdoptError::Owned { vm: vm.clone() }),
        Life::Orphan => return Err(AdoptError::Orphan { vm: vm.clone() }),
        Life::Remains => {}
    }
    let _lock = OfdLock::try_acquire(&files.owner())?.ok_or_else(|| AdoptError::Owned { vm: vm.clone() })?;
    // Nobody starts QEMU without the owner lock, so it stays dead from here on.
    if probe(&files.life())? {
        return Err(AdoptError::Orphan { vm: vm.clone() });
    }
    let entries =
        journal::read_only::<Entry>(&files.journal())?.map(|(_, entries)| entries).unwrap_or_default();
    let devices: Vec<Placed> = Memory::of(entries).devices.into_iter().map(|(device, _)| device).collect();
    let ids = devices.iter().map(|d| d.id.to_string()).collect();
    let host = Host {
        vm: vm.clone(),
        run_dir: files.dir().to_owned(),
        state_dir: folders.state_dir(vm),
        leases: Leases::open(&folders.leases)?,
    };
    clear_up(&host, devices.into_iter(), files.dir())?;
    info!(%vm, "recovered");
    Ok(ids)
}

/// Ends a VM that has no owner, and clears up.
pub async fn kill_orphan(folders: &Folders, vm: &VmName) -> Result<(), AdoptError> {
    end_qemu(folders, vm).await?;
    recover(folders, vm).map(drop)
}

/// Ends a VM's QEMU past its owner.
pub async fn end_qemu(folders: &Folders, vm: &VmName) -> Result<(), AdoptError> {
    let files = folders.vm(vm)?;
    let memory = journal::read_only::<Entry>(&files.journal())?
        .map(|(_, entries)| Memory::of(entries))
        .unwrap_or_default();
    let process = process_of(vm, &files, memory.identity.as_ref())?;
    info!(%vm, pid = process.pid(), "ending QEMU");
    let has_ended = end(&process).await;
    let devices: Vec<Placed> = memory.devices.into_iter().map(|(device, _)| device).collect();
    if !has_ended {
        return Err(AdoptError::Held { words: held_words(vm, images(&devices)) });
    }
    let proxies = devices.iter().filter_map(Placed::io_proxy).cloned().collect();
    let held = io_proxy::kill(proxies, Instant::now() + io_proxy::KILLED);
    match held.as_slice() {
        [] => Ok(()),
        held => Err(AdoptError::Held { words: held_words(vm, held.iter().flat_map(IoProxy::images)) }),
    }
}
