//! A VM that does not run, held so that nobody starts it meanwhile, and a snapshot of it.

use std::path::{Path, PathBuf};

use devices::host::{Access, Layer};
use devices::{DeviceId, Refusal};
use thiserror::Error;
use tracing::warn;

use super::book::Snapshot;
use super::choose::{self, ChooseError};
use super::files::{self, NewOverlay, OverlayError, check_room, qemu_img};
use super::store::StoreError;
use crate::adopt::{AdoptError, Life, life, recover};
use crate::blueprint::{Blueprint, BlueprintError};
use crate::config::VmConfig;
use crate::folders::{Folders, FoldersError, VmName, make_private};
use crate::host::need::{Host, NeedError};
use crate::image::{self, ImageError};
use crate::injection::{Injected, Steps};
use crate::launch::remove_folder;
use crate::lease::{LeaseError, Leases};
use crate::locks::{LockError, OfdLock};
use crate::request::SnapshotCreate;

/// Something that cannot be done to a VM that does not run.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum StoppedError {
    #[error("VM {vm} has just been started, or is ending: try again")]
    Taken { vm: VmName },
    #[error(transparent)]
    Folders(#[from] FoldersError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Remains(#[from] Box<AdoptError>),
    #[error(transparent)]
    Blueprint(#[from] Box<BlueprintError>),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error("disk {id}: {}", crate::request::chain(.source))]
    Need { id: DeviceId, source: NeedError },
    #[error(transparent)]
    Refusal(#[from] Refusal),
    #[error(transparent)]
    Choose(#[from] ChooseError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(
        "--quiesce needs a guest that runs, and VM {vm} does not: leave it out, its disks are as quiet as they can be"
    )]
    NoGuest { vm: VmName },
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// A VM that does not run. As long as this lives nobody starts it.
#[derive(Debug)]
pub struct StoppedVm {
    /// The machine that a start would make.
    pub blueprint: Blueprint,
    host: Host,
    run_dir: PathBuf,
    _owner: OfdLock,
}

impl StoppedVm {
    /// Holds a VM, once what a dead owner left was cleared up.
    ///
    /// # Errors
    /// It runs, or could not be started as it is.
    pub async fn hold(folders: &Folders, config: VmConfig) -> Result<StoppedVm, StoppedError> {
        let vm = config.name.clone();
        let files = folders.vm(&vm)?;
        if life(&files)? == Life::Remains {
            recover(folders, &vm).map_err(Box::new)?;
        }
        folders.make()?;
        files.make()?;
        make_private(&folders.state_dir(&vm))?;
        let taken = || StoppedError::Taken { vm: vm.clone() };
        let owner = OfdLock::try_acquire(&files.owner())?.ok_or_else(taken)?;
        // By now nobody starts it; but somebody may have, or may have died.
        if life(&files)? != Life::Between || files.journal().exists() {
            return Err(taken());
        }
        let run_dir = files.dir().to_owned();
        let drawn = Blueprint::draw(config, folders).await;
        let leases = Leases::open(&folders.leases);
        let (blueprint, leases) = match (drawn, leases) {
            (Ok(blueprint), Ok(leases)) => (blueprint, leases),
            (drawn, leases) => {
                remove_folder(&run_dir);
                leases?;
                return Err(Box::new(drawn.expect_err("one of the two failed")).into());
            }
        };
        let host = Host {
            vm,
            run_dir: run_dir.clone(),
            state_dir: folders.state_dir(&blueprint.config.name),
            leases,
        };
        let held = StoppedVm { blueprint, host, run_dir, _owner: owner };
        held.host.store().sweep(&held.host.vm)?;
        Ok(held)
    }

    /// Takes a snapshot: makes overlays, from which the next start starts.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub fn take_snapshot(&self, wish: &SnapshotCreate) -> Result<Snapshot, StoppedError> {
        let (layout, store, vm) = (&self.blueprint.layout, self.host.store(), &self.host.vm);
        if wish.quiesce {
            return Err(StoppedError::NoGuest { vm: vm.clone() });
        }
        let snapshot = choose::snapshot(layout, wish, (vm, "stopped"), &store.read()?)?;
        let mut overlays = Vec::new();
        for disk in &snapshot.disks {
            let top = Layer { path: disk.image.clone(), format: disk.format, block_device: false };
            overlays.push(NewOverlay {
                path: disk.overlay.clone().into(),
                backing: disk.image.clone(),
                format: disk.format,
                size_bytes: image::virtual_size(&top)?,
            });
            // Another VM may write it.
            let leased = self.host.lease(&disk.id, &disk.image, Access::Write);
            leased.map_err(|source| StoppedError::Need { id: disk.id.clone(), source })?;
        }
        if !wish.sparse {
            check_room(&overlays)?;
        }
        let done = self.overlay(&snapshot, &overlays);
        if done.is_err()
            && let Err(error) = store.take_back(&snapshot)
        {
            let error = crate::request::chain(&error);
            warn!(%vm, error, "not everything of the snapshot that was not taken could be removed: `qvirt recover` tries again");
        }
        done.map(|()| snapshot)
    }

    fn overlay(&self, snapshot: &Snapshot, overlays: &[NewOverlay]) -> Result<(), StoppedError> {
        let mut steps = Steps::of("snapshot");
        let store = self.host.store();
        steps.enter("intent")?;
        store.intend(snapshot)?;
        let qemu_img = qemu_img(Path::new(&self.blueprint.binary));
        for overlay in overlays {
            steps.enter("overlay")?;
            files::make(overlay, &qemu_img)?;
        }
        steps.enter("book")?;
        store.add(snapshot)?;
        Ok(())
    }
}

impl Drop for StoppedVm {
    fn drop(&mut self) {
        if let Err(error) = self.host.leases.release_all(&self.host.vm, &self.run_dir) {
            warn!(error = crate::request::chain(&error), "could not release all leases");
        }
        remove_folder(&self.run_dir);
    }
}
