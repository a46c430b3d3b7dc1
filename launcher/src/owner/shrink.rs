//! Chains that become shorter while the VM runs, as the owner sees it: snapshots are forgotten, and one job merges what is of no use any more, layer
//! by layer.

use devices::units::Size;
use devices::{Layout, Placed};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::plug::{Job, Outcome};
use super::{Finished, Owner, Reply};
use crate::folders::VmName;
use crate::injection::Steps;
use crate::request::{BlockCommit, BlockPull, Class, Failure, SnapshotDelete, chain};
use crate::snapshot::files::{check_pull_room, qemu_img};
use crate::snapshot::tidy::{self, Merge, Task};
use crate::snapshot::{Book, SnapshotName, Store, StoreError};
use crate::work::merge::{Merging, Shortening};
use crate::work::pull::Pulling;
use crate::work::snapshot::in_time;
use crate::work::{StepError, Workshop};

/// What is wanted.
#[derive(Debug)]
pub(super) enum Shrink {
    /// Layers are to go into those below them.
    Merge(Merges),
    /// Layers of a disk are to go into the uppermost one.
    Pull(BlockPull),
}

/// Which layers.
#[derive(Debug)]
pub(super) enum Merges {
    /// Those of snapshots that are to be forgotten.
    Delete(SnapshotDelete),
    /// Those of a disk.
    Commit(BlockCommit),
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Shrunk {
    /// Disks whose chains are shorter now.
    shorter: Vec<Placed>,
    outcome: Result<Value, Failure>,
    /// None where a former owner was asked.
    reply: Option<Reply>,
}

impl Owner {
    /// Makes chains shorter.
    pub(super) fn shrink(&mut self, wish: Shrink, reply: Reply) {
        match self.in_motion("ask for it") {
            Some(failure) => drop(reply.send(Err(failure))),
            None => self.queue.push_back(Job::Shrink(wish, reply)),
        }
    }

    /// The layout stays as it is meanwhile: whoever changes it needs the workshop.
    pub(super) fn begin_shrink(&mut self, wish: Shrink, reply: Reply) {
        let Some(mut shop) = self.shop.take() else { return };
        self.is_shrinking = true;
        let (layout, qemu_img) = (self.layout.clone(), qemu_img(&self.launch.binary));
        self.jobs.spawn(async move {
            let mut disks = Disks { layout, shorter: Vec::new() };
            let outcome = match &wish {
                Shrink::Pull(wish) => pull(&mut disks, wish, &mut shop).await,
                Shrink::Merge(wish) => merge(&mut disks, wish, &mut shop, &qemu_img).await,
            };
            let shrunk = Shrunk { shorter: disks.shorter, outcome, reply: Some(reply) };
            Finished::Work(shop, Outcome::Shrunk(Box::new(shrunk)))
        });
    }

    /// Goes on with what a former owner began.
    pub(super) fn resume(&mut self, shortening: Shortening) {
        let Some(mut shop) = self.shop.take() else { return };
        self.is_shrinking = true;
        self.jobs.spawn(async move {
            let (done, outcome) = match &shortening {
                Shortening::Merge(merging) => shop.finish_merge(merging, &mut Steps::of("merge")).await,
                Shortening::Pull(pulling) => shop.finish_pull(pulling, &mut Steps::of("pull")).await,
            };
            let shorter = if done == Some(true) { vec![shortening.placed().clone()] } else { Vec::new() };
            let outcome = outcome.map(|()| Value::Null).map_err(|error| Failure::of(Class::Generic, &error));
            Finished::Work(shop, Outcome::Shrunk(Box::new(Shrunk { shorter, outcome, reply: None })))
        });
    }

    pub(super) fn on_shrunk(&mut self, shrunk: Shrunk) {
        self.is_shrinking = false;
        for placed in shrunk.shorter {
            self.layout.replace(placed);
        }
        // A job that ended took the node away on which disks stood while it went on.
        for placed in self.layout.devices().to_vec() {
            self.moved_to(&placed);
        }
        self.look();
        match (&shrunk.outcome, &shrunk.reply) {
            (Ok(about), Some(_)) => {
                info!(?about, "chains are shorter");
                if about["names"].as_array().is_some_and(|names| !names.is_empty()) {
                    self.announce("QVIRT_SNAPSHOT_DELETED", about.clone());
                }
            }
            (Err(error), None) => warn!(%error, "what a former owner began did not end well"),
            _ => {}
        }
        if let Some(reply) = shrunk.reply {
            let _ = reply.send(shrunk.outcome);
        }
    }
}

/// The disks, as they become.
struct Disks {
    layout: Layout,
    shorter: Vec<Placed>,
}

impl Disks {
    /// What a merge is for QEMU; `None` if no disk of the VM has the layer.
    fn merging(&self, merge: &Merge, speed: Option<u64>) -> Result<Option<Merging>, devices::Refusal> {
        for placed in self.layout.devices() {
            if let Some(lesser) = placed.without_layer(&merge.from)? {
                return Ok(Some(Merging { id: placed.id.clone(), merge: merge.clone(), lesser, speed }));
            }
        }
        Ok(None)
    }

    fn became(&mut self, placed: Placed) {
        self.shorter.retain(|former| former.id != placed.id);
        self.shorter.push(placed.clone());
        self.layout.replace(placed);
    }
}

/// What is to be done.
struct Plan {
    /// Whose failure it is, for people.
    subject: String,
    names: Vec<SnapshotName>,
    bases: Vec<String>,
    speed: Option<Size>,
}

impl Plan {
    fn of(wish: &Merges, book: &Book, vm: &VmName, layout: &Layout) -> Result<Plan, Failure> {
        match wish {
            Merges::Delete(wish) => {
                if book.snapshot(vm, &wish.name).is_none() {
                    let words = format!("VM {vm} has no snapshot {}", wish.name);
                    return Err(Failure::new(Class::DeviceNotFound, words));
                }
                let names =
                    if wish.children { book.with_children(vm, &wish.name) } else { vec![wish.name.clone()] };
                let bases = bases(book, vm, &names);
                Ok(Plan { subject: format!("snapshot {}", wish.name), names, bases, speed: wish.speed })
            }
            Merges::Commit(wish) => {
                let placed = layout.expect_device(&wish.id);
                let placed = placed.map_err(|error| Failure::of(Class::DeviceNotFound, &error))?;
                let top = placed.layers().into_iter().next().map(|layer| layer.path).unwrap_or_default();
                let commit = book.commit(vm, &placed.id, &top, wish);
                let commit = commit.map_err(|error| Failure::of(Class::Refused, &error))?;
                let mut bases = bases(book, vm, &commit.names);
                bases.push(commit.base);
                bases.dedup();
                Ok(Plan {
                    subject: format!("disk {}", placed.id),
                    names: commit.names,
                    bases,
                    speed: wish.speed,
                })
            }
        }
    }
}

async fn pull(disks: &mut Disks, wish: &BlockPull, shop: &mut Workshop) -> Result<Value, Failure> {
    let refused = |error: &dyn std::error::Error| Failure::of(Class::Refused, error);
    let placed = disks.layout.expect_device(&wish.id);
    let placed = placed.map_err(|error| Failure::of(Class::DeviceNotFound, &error))?.clone();
    let book = shop.host.store().read().map_err(|error| Failure::of(Class::Generic, &error))?;
    let layers = placed.layers();
    let top = layers.first().map(|layer| layer.path.clone()).unwrap_or_default();
    let base = book.pull(&placed.id, &top, wish.base.as_deref()).map_err(|error| refused(&error))?;
    let depth = placed.layers_above(base.as_deref()).map_err(|error| refused(&error))?;
    let pull = placed.pulled_onto(base.as_deref()).map_err(|error| refused(&error))?;
    if !wish.sparse {
        let checking = tokio::task::spawn_blocking(move || {
            check_pull_room(&layers[..depth]).map_err(|error| Failure::of(Class::Refused, &error))
        });
        in_time(checking).await?;
    }
    let speed = wish.speed.map(Size::as_bytes);
    let pulling = Pulling { id: placed.id.clone(), top, base, pull, speed };
    let (done, outcome) = shop.pull(&pulling, &mut Steps::of("pull")).await;
    if done == Some(true) {
        disks.became(pulling.pull.placed);
    }
    outcome.map(|()| json!({"id": placed.id, "base": pulling.base})).map_err(|error| {
        Failure::new(Class::Generic, format!("disk {} is as it was: {}", placed.id, chain(&error)))
    })
}

async fn merge(
    disks: &mut Disks,
    wish: &Merges,
    shop: &mut Workshop,
    qemu_img: &std::path::Path,
) -> Result<Value, Failure> {
    let (store, vm) = (shop.host.store(), shop.host.vm.clone());
    let book = store.read().map_err(|error| Failure::of(Class::Generic, &error))?;
    let Plan { subject, names, bases, speed } = Plan::of(wish, &book, &vm, &disks.layout)?;
    rehearse(disks, book, &vm, &names, &bases).map_err(|refusal| Failure::of(Class::Refused, &refusal))?;
    let mut steps = Steps::of("merge");
    let speed = speed.map(Size::as_bytes);
    let mut go = async || -> Result<(), StepError> {
        steps.enter("forget")?;
        let (forgetful, forgotten, of) = (store.clone(), names.clone(), vm.clone());
        crate::work::snapshot::worker(move || {
            forgetful.change::<_, StoreError>(|book| {
                book.forget(&of, &forgotten);
                Ok(())
            })
        })
        .await?;
        for base in &bases {
            while let Some(task) = store.read()?.task(base) {
                one(disks, task, shop, (&store, qemu_img, speed), &mut steps).await?;
            }
        }
        Ok(())
    };
    go().await.map(|()| json!({"names": names})).map_err(|error| {
        let words =
            format!("{subject}: what was begun is left as it is, each disk is as it was: {}", chain(&error));
        Failure::new(Class::Generic, words)
    })
}

fn bases(book: &Book, vm: &VmName, names: &[SnapshotName]) -> Vec<String> {
    let snapshots = names.iter().filter_map(|name| book.snapshot(vm, name));
    let mut bases: Vec<String> =
        snapshots.flat_map(|snapshot| &snapshot.disks).map(|disk| disk.base.clone()).collect();
    bases.sort();
    bases.dedup();
    bases
}

/// Whether all of it can be done, before any of it is.
fn rehearse(
    disks: &Disks,
    mut book: Book,
    vm: &VmName,
    names: &[SnapshotName],
    bases: &[String],
) -> Result<(), devices::Refusal> {
    book.forget(vm, names);
    let mut disks = Disks { layout: disks.layout.clone(), shorter: Vec::new() };
    for base in bases {
        while let Some(task) = book.task(base) {
            match task {
                Task::Drop(overlay) => book.dropped(&overlay),
                Task::Merge(merge) => {
                    if let Some(merging) = disks.merging(&merge, None)? {
                        disks.became(merging.lesser.placed);
                    }
                    book.merged(&merge);
                }
            }
        }
    }
    Ok(())
}

async fn one(
    disks: &mut Disks,
    task: Task,
    shop: &mut Workshop,
    (store, qemu_img, speed): (&Store, &std::path::Path, Option<u64>),
    steps: &mut Steps,
) -> Result<(), StepError> {
    if let Task::Merge(merge) = &task
        && let Some(merging) = disks.merging(merge, speed)?
    {
        let (done, outcome) = shop.merge(&merging, steps).await;
        if done == Some(true) {
            disks.became(merging.lesser.placed);
            return outcome;
        }
        return outcome.and(Err(StepError::NotMerged));
    }
    // Images that this QEMU does not have open.
    let (store, qemu_img, vm) = (store.clone(), qemu_img.to_owned(), shop.host.vm.clone());
    let files =
        tokio::task::spawn_blocking(move || tidy::one(&store, task, &vm, &qemu_img, &mut Steps::of("tidy")));
    Ok(files.await.map_err(StepError::Lost)??)
}
