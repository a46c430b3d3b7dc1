//! A VM that does not run, held so that nobody starts it meanwhile, and a snapshot of it.

use std::path::{Path, PathBuf};

use devices::host::{Access, Layer};
use devices::{DeviceId, Refusal};
use thiserror::Error;
use tracing::warn;

use super::book::{Book, Snapshot, SnapshotDisk, SnapshotName};
use super::choose::{self, ChooseError};
use super::commit::CommitError;
use super::files::{self, NewOverlay, OverlayError, check_pull_room, check_room, qemu_img};
use super::store::StoreError;
use super::tidy::{self, TidyError};
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
use crate::request::{BlockCommit, BlockPull, SnapshotCreate};

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
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Tidy(#[from] TidyError),
    #[error(
        "--quiesce needs a guest that runs, and VM {vm} does not: leave it out, its disks are as quiet as they can be"
    )]
    NoGuest { vm: VmName },
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// A VM that does not run, and that nobody starts as long as this lives.
#[derive(Debug)]
pub struct Held {
    host: Host,
    run_dir: PathBuf,
    _owner: OfdLock,
}

impl Held {
    /// Holds a VM, once what a dead owner left was cleared up.
    ///
    /// # Errors
    /// It runs.
    pub fn take(folders: &Folders, vm: &VmName) -> Result<Held, StoppedError> {
        let files = folders.vm(vm)?;
        if life(&files)? == Life::Remains {
            recover(folders, vm).map_err(Box::new)?;
        }
        folders.make()?;
        files.make()?;
        make_private(&folders.state_dir(vm))?;
        let taken = || StoppedError::Taken { vm: vm.clone() };
        let owner = OfdLock::try_acquire(&files.owner())?.ok_or_else(taken)?;
        // By now nobody starts it; but somebody may have, or may have died.
        if life(&files)? != Life::Between || files.journal().exists() {
            return Err(taken());
        }
        let run_dir = files.dir().to_owned();
        let leases = Leases::open(&folders.leases)?;
        let host =
            Host { vm: vm.clone(), run_dir: run_dir.clone(), state_dir: folders.state_dir(vm), leases };
        Ok(Held { host, run_dir, _owner: owner })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = self.host.leases.release_all(&self.host.vm, &self.run_dir) {
            warn!(error = crate::request::chain(&error), "could not release all leases");
        }
        remove_folder(&self.run_dir);
    }
}

/// A VM that is held, with the machine that a start would make.
#[derive(Debug)]
pub struct StoppedVm {
    blueprint: Blueprint,
    held: Held,
}

impl StoppedVm {
    /// Holds a VM.
    ///
    /// # Errors
    /// It runs, or could not be started as it is.
    pub async fn hold(folders: &Folders, config: VmConfig) -> Result<StoppedVm, StoppedError> {
        let held = Held::take(folders, &config.name)?;
        let blueprint = Blueprint::draw(config, folders).await.map_err(Box::new)?;
        held.host.store().sweep(&held.host.vm)?;
        Ok(StoppedVm { blueprint, held })
    }

    /// Takes a snapshot: makes overlays, from which the next start starts.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub fn take_snapshot(&self, wish: &SnapshotCreate) -> Result<Snapshot, StoppedError> {
        let (layout, store, vm) = (&self.blueprint.layout, self.held.host.store(), &self.held.host.vm);
        if wish.quiesce {
            return Err(StoppedError::NoGuest { vm: vm.clone() });
        }
        let snapshot = choose::snapshot(layout, wish, (vm, "stopped"), &store.read()?)?;
        let mut overlays = Vec::new();
        for disk in &snapshot.disks {
            overlays.push(new_overlay(disk)?);
            // Another VM may write it.
            self.lease(&disk.id, &disk.image)?;
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

    /// Puts the disks of a snapshot back to what they were then. What was written since stays, as an overlay that nothing starts from, unless it
    /// is given up. Gives the overlays that the disks start from.
    ///
    /// # Errors
    /// The disks are as they were.
    pub fn revert(
        &self,
        snapshot: &Snapshot,
        discard: bool,
        sparse: bool,
    ) -> Result<Vec<String>, StoppedError> {
        let (store, vm) = (self.held.host.store(), &self.held.host.vm);
        let book = store.read()?;
        let mut back = snapshot.clone();
        let mut overlays = Vec::new();
        for disk in &mut back.disks {
            let top = book.chains.iter().find(|chain| chain.base == disk.base).map(|chain| &chain.top);
            self.lease(&disk.id, top.unwrap_or(&disk.image))?;
            disk.overlay = choose::beside_again(Path::new(&disk.base), &snapshot.name);
            overlays.push(new_overlay(disk)?);
        }
        if !sparse {
            check_room(&overlays)?;
        }
        let paths: Vec<String> = back.disks.iter().map(|disk| disk.overlay.clone()).collect();
        let mut steps = Steps::of("revert");
        let reverted = self.make(&back, &overlays, &mut steps).and_then(|()| {
            steps.enter("book")?;
            Ok(store.change::<_, StoreError>(|book| {
                book.revert(snapshot, &paths, discard);
                Ok(())
            })?)
        });
        if let Err(error) = reverted {
            store.sweep(vm)?;
            return Err(error);
        }
        self.tidy(snapshot.disks.iter().map(|disk| disk.base.clone()).collect(), &mut steps)?;
        Ok(paths)
    }

    /// Deletes snapshots; the disks stay as they are.
    ///
    /// # Errors
    /// The names may be gone already; what could not be merged yet is merged by the next one.
    pub fn delete(&self, names: &[SnapshotName]) -> Result<(), StoppedError> {
        let book = self.held.host.store().read()?;
        self.forget(&book, names, Vec::new())
    }

    /// Commits layers of a disk into one below them. Gives the names of the snapshots that are lost.
    ///
    /// # Errors
    /// As of a deletion, or something is in the way.
    pub fn commit(&self, wish: &BlockCommit) -> Result<Vec<SnapshotName>, StoppedError> {
        let (store, vm) = (self.held.host.store(), &self.held.host.vm);
        let placed = self.blueprint.layout.expect_device(&wish.id)?;
        let top = placed.layers().into_iter().next().map(|layer| layer.path).unwrap_or_default();
        let book = store.read()?;
        let commit = book.commit(vm, &placed.id, &top, wish)?;
        self.lease(&placed.id, &top)?;
        self.forget(&book, &commit.names, vec![commit.base])?;
        Ok(commit.names)
    }

    /// Pulls the data of a disk's layers into the uppermost one. Gives the image on which that stands then, if on any.
    ///
    /// # Errors
    /// The disk is as it was.
    pub fn pull(&self, wish: &BlockPull) -> Result<Option<String>, StoppedError> {
        let store = self.held.host.store();
        let placed = self.blueprint.layout.expect_device(&wish.id)?;
        let layers = placed.layers();
        let top = layers.first().map(|layer| layer.path.clone()).unwrap_or_default();
        let base = store.read()?.pull(&placed.id, &top, wish.base.as_deref())?;
        let depth = placed.layers_above(base.as_deref())?;
        self.lease(&placed.id, &top)?;
        if !wish.sparse {
            check_pull_room(&layers[..depth])?;
        }
        let mut steps = Steps::of("pull");
        steps.enter("intent")?;
        store.change::<_, StoreError>(|book| {
            book.pulling(&top);
            Ok(())
        })?;
        steps.enter("rebase")?;
        let pulled = tidy::pull_files(&top, layers.get(depth), &qemu_img(&self.blueprint.binary));
        steps.enter("book")?;
        // Also after a failure: the header knows.
        store.settle_pull(&top)?;
        pulled?;
        Ok(base)
    }

    /// Forgets snapshots, and shortens their chains and those on some bases.
    fn forget(
        &self,
        book: &Book,
        names: &[SnapshotName],
        mut bases: Vec<String>,
    ) -> Result<(), StoppedError> {
        let (store, vm) = (self.held.host.store(), &self.held.host.vm);
        let snapshots = names.iter().filter_map(|name| book.snapshot(vm, name));
        for disk in snapshots.flat_map(|snapshot| &snapshot.disks) {
            let Some(chain) = book.chains.iter().find(|chain| chain.base == disk.base) else { continue };
            self.lease(&disk.id, &chain.top)?;
            if !bases.contains(&chain.base) {
                bases.push(chain.base.clone());
            }
        }
        let mut steps = Steps::of("tidy");
        steps.enter("forget")?;
        store.change::<_, StoreError>(|book| {
            book.forget(vm, names);
            Ok(())
        })?;
        self.tidy(bases, &mut steps)
    }

    /// Also what an interrupted one left to do.
    fn tidy(&self, mut bases: Vec<String>, steps: &mut Steps) -> Result<(), StoppedError> {
        let store = self.held.host.store();
        let book = store.read()?;
        let mine =
            |path: &str| crate::launch::images(self.blueprint.layout.devices()).any(|image| image == path);
        bases.extend(book.chains.iter().filter(|chain| mine(&chain.top)).map(|chain| chain.base.clone()));
        bases.sort();
        bases.dedup();
        Ok(tidy::tidy(&store, &bases, &self.held.host.vm, &qemu_img(&self.blueprint.binary), steps)?)
    }

    fn lease(&self, id: &DeviceId, image: &str) -> Result<(), StoppedError> {
        let leased = self.held.host.lease(id, image, Access::Write);
        leased.map_err(|source| StoppedError::Need { id: id.clone(), source })
    }

    fn make(
        &self,
        snapshot: &Snapshot,
        overlays: &[NewOverlay],
        steps: &mut Steps,
    ) -> Result<(), StoppedError> {
        steps.enter("intent")?;
        self.held.host.store().intend(snapshot)?;
        let qemu_img = qemu_img(&self.blueprint.binary);
        for overlay in overlays {
            steps.enter("overlay")?;
            files::make(overlay, &qemu_img)?;
        }
        Ok(())
    }

    fn overlay(&self, snapshot: &Snapshot, overlays: &[NewOverlay]) -> Result<(), StoppedError> {
        let mut steps = Steps::of("snapshot");
        self.make(snapshot, overlays, &mut steps)?;
        steps.enter("book")?;
        Ok(self.held.host.store().add(snapshot)?)
    }
}

/// The overlay of a disk, of the size that its image has.
fn new_overlay(disk: &SnapshotDisk) -> Result<NewOverlay, ImageError> {
    let image = Layer { path: disk.image.clone(), format: disk.format, block_device: false };
    Ok(NewOverlay {
        path: disk.overlay.clone().into(),
        backing: disk.image.clone(),
        format: disk.format,
        size_bytes: image::virtual_size(&image)?,
    })
}
