//! Snapshots that are forgotten while the VM runs, as the owner sees it: one job that merges what is of no use any more, layer by layer.

use devices::units::Size;
use devices::{Layout, Placed};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::plug::{Job, Outcome};
use super::{Finished, Owner, Reply, not_now};
use crate::injection::Steps;
use crate::record::Stage;
use crate::request::{Class, Failure, SnapshotDelete, chain};
use crate::snapshot::files::qemu_img;
use crate::snapshot::tidy::{self, Merge, Task};
use crate::snapshot::{Book, SnapshotName, Store, StoreError};
use crate::work::merge::Merging;
use crate::work::{StepError, Workshop};

/// What came of it.
#[derive(Debug)]
pub(super) struct Deleted {
    /// Disks whose chains are shorter now.
    shorter: Vec<Placed>,
    outcome: Result<Value, Failure>,
    /// None where a former owner was asked.
    reply: Option<Reply>,
}

impl Owner {
    /// Forgets snapshots.
    pub(super) fn delete_snapshot(&mut self, wish: SnapshotDelete, reply: Reply) {
        let moving = self.stages.iter().find(|(_, stage)| **stage != Stage::Present);
        let refusal = match moving {
            _ if self.farewell.is_ending() => {
                Some(not_now("the VM is shutting down", "delete the snapshot when it has stopped"))
            }
            Some((id, _)) => Some(not_now(
                &format!("device {id} comes or goes just now"),
                "delete the snapshot when it is there, or gone",
            )),
            None => None,
        };
        match refusal {
            Some(failure) => drop(reply.send(Err(failure))),
            None => self.queue.push_back(Job::Delete(wish, reply)),
        }
    }

    /// The layout stays as it is meanwhile: whoever changes it needs the workshop.
    pub(super) fn begin_delete(&mut self, wish: SnapshotDelete, reply: Reply) {
        let Some(mut shop) = self.shop.take() else { return };
        let (layout, qemu_img) = (self.layout.clone(), qemu_img(&self.launch.binary));
        self.jobs.spawn(async move {
            let mut disks = Disks { layout, shorter: Vec::new() };
            let outcome = delete(&mut disks, &wish, &mut shop, &qemu_img).await;
            let deleted = Deleted { shorter: disks.shorter, outcome, reply: Some(reply) };
            Finished::Work(shop, Outcome::Deleted(Box::new(deleted)))
        });
    }

    /// Goes on with a merge that a former owner began.
    pub(super) fn resume_merge(&mut self, merging: Merging) {
        let Some(mut shop) = self.shop.take() else { return };
        self.jobs.spawn(async move {
            let (done, outcome) = shop.finish_merge(&merging, &mut Steps::of("merge")).await;
            let shorter = if done == Some(true) { vec![merging.lesser.placed] } else { Vec::new() };
            let outcome = outcome.map(|()| Value::Null).map_err(|error| Failure::of(Class::Generic, &error));
            Finished::Work(shop, Outcome::Deleted(Box::new(Deleted { shorter, outcome, reply: None })))
        });
    }

    pub(super) fn on_deleted(&mut self, deleted: Deleted) {
        for placed in deleted.shorter {
            self.layout.replace(placed);
        }
        self.look();
        match (&deleted.outcome, &deleted.reply) {
            (Ok(about), Some(_)) => {
                info!(?about, "snapshots deleted");
                self.announce("QVIRT_SNAPSHOT_DELETED", about.clone());
            }
            (Err(error), None) => warn!(%error, "a merge that a former owner began did not end well"),
            _ => {}
        }
        if let Some(reply) = deleted.reply {
            let _ = reply.send(deleted.outcome);
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

async fn delete(
    disks: &mut Disks,
    wish: &SnapshotDelete,
    shop: &mut Workshop,
    qemu_img: &std::path::Path,
) -> Result<Value, Failure> {
    let (store, vm) = (shop.host.store(), shop.host.vm.clone());
    let failed = |error: &dyn std::error::Error| Failure::of(Class::Generic, error);
    let book = store.read().map_err(|error| failed(&error))?;
    if book.snapshot(&vm, &wish.name).is_none() {
        let words = format!("VM {vm} has no snapshot {}", wish.name);
        return Err(Failure::new(Class::DeviceNotFound, words));
    }
    let names = if wish.children { book.with_children(&vm, &wish.name) } else { vec![wish.name.clone()] };
    let bases = bases(&book, &vm, &names);
    rehearse(disks, book, &vm, &names, &bases).map_err(|refusal| Failure::of(Class::Refused, &refusal))?;
    let mut steps = Steps::of("merge");
    let speed = wish.speed.map(Size::as_bytes);
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
    match go().await {
        Ok(()) => Ok(json!({"names": names})),
        Err(error) => Err(Failure::new(
            Class::Generic,
            format!(
                "snapshot {}: what was begun is left as it is, each disk is as it was: {}",
                wish.name,
                chain(&error)
            ),
        )),
    }
}

fn bases(book: &Book, vm: &crate::folders::VmName, names: &[SnapshotName]) -> Vec<String> {
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
    vm: &crate::folders::VmName,
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
