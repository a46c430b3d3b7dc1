//! A snapshot, as the owner sees it: one job that chooses disks and overlays, looks whether there is room, and takes it.

use devices::Layout;
use devices::capabilities::Capabilities;
use serde_json::Value;
use tracing::info;

use super::plug::{Job, Outcome};
use super::{Finished, Owner, Reply, not_now};
use crate::record::Stage;
use crate::request::{Class, Failure, SnapshotCreate, chain};
use crate::snapshot::choose;
use crate::snapshot::files::{NewOverlay, check_room, qemu_img};
use crate::snapshot::freeze;
use crate::status::VmState;
use crate::suspend::turn;
use crate::work::snapshot::{Overlaying, about};
use crate::work::{StepError, Workshop};

/// What came of it.
#[derive(Debug)]
pub(super) struct Taken {
    /// The snapshot as it was to be, if it came so far; and whether the disks stand on its overlays, if QEMU said so.
    tried: Option<(Overlaying, Option<bool>)>,
    outcome: Result<Value, Failure>,
    reply: Reply,
}

/// What is known when it begins.
struct Scene {
    layout: Layout,
    qemu: Capabilities,
    state: &'static str,
    qemu_binary: std::path::PathBuf,
}

impl Owner {
    /// Takes a snapshot of the VM's disks.
    pub(super) fn snapshot(&mut self, wish: SnapshotCreate, reply: Reply) {
        let refusal = self.in_motion("take the snapshot").or_else(|| match &self.run {
            run if wish.quiesce && *run != VmState::Running => Some(not_now(
                &format!("the VM is {run}, so its guest cannot be asked to be quiet"),
                "leave --quiesce out, or let it run first",
            )),
            _ => None,
        });
        match refusal {
            Some(failure) => drop(reply.send(Err(failure))),
            None => self.queue.push_back(Job::Snapshot(wish, reply)),
        }
    }

    /// Why nothing is done to the disks as a whole just now; `act` is what to do later.
    pub(super) fn in_motion(&self, act: &str) -> Option<Failure> {
        if self.farewell.is_ending() {
            return Some(not_now("the VM is shutting down", &format!("{act} when it has stopped")));
        }
        let (id, _) = self.stages.iter().find(|(_, stage)| **stage != Stage::Present)?;
        let what = format!("device {id} comes or goes just now");
        Some(not_now(&what, &format!("{act} when it is there, or gone")))
    }

    /// The layout stays as it is meanwhile: whoever changes it needs the workshop.
    pub(super) fn begin_snapshot(&mut self, wish: SnapshotCreate, reply: Reply) {
        let Some(mut shop) = self.shop.take() else { return };
        let scene = Scene {
            layout: self.layout.clone(),
            qemu: self.launch.qemu.clone(),
            state: if self.run == VmState::Running { "running" } else { "paused" },
            qemu_binary: self.launch.binary.clone(),
        };
        self.jobs.spawn(async move {
            let taken = match plan(scene, wish, &shop).await {
                Ok((wanted, overlays, qemu_img)) => {
                    let (is_kept, outcome) = shop.take_snapshot(&wanted, overlays, qemu_img).await;
                    let outcome = match outcome {
                        Ok(()) => Ok(about(&wanted.snapshot)),
                        Err(error) => Err(failure(&wanted, is_kept, &error)),
                    };
                    Taken { tried: Some((wanted, is_kept)), outcome, reply }
                }
                Err(failure) => Taken { tried: None, outcome: Err(failure), reply },
            };
            Finished::Work(shop, Outcome::Snapshot(Box::new(taken)))
        });
    }

    pub(super) fn on_taken(&mut self, taken: Taken) {
        if let Some((wanted, is_kept)) = taken.tried {
            for (_, new) in wanted.disks {
                self.layout.note_nodes(&new);
                if is_kept == Some(true) {
                    self.moved_to(&new);
                    self.layout.replace(new);
                }
            }
            self.look();
        }
        if let Ok(about) = &taken.outcome {
            info!(?about, "snapshot");
            self.announce("QVIRT_SNAPSHOT_CREATED", about.clone());
        }
        let _ = taken.reply.send(taken.outcome);
    }
}

fn failure(wanted: &Overlaying, is_kept: Option<bool>, error: &StepError) -> Failure {
    let name = &wanted.snapshot.name;
    let class = match (is_kept, error) {
        (None, _) => Class::Pending,
        (_, StepError::Overlay(_)) => Class::Refused,
        (_, error) if super::plug::is_refusal(error) => Class::Refused,
        _ => Class::Generic,
    };
    let what = match is_kept {
        Some(true) => "was taken, but",
        Some(false) => "was not taken, and nothing of it is left:",
        None => "was taken or not, which the next owner finds out:",
    };
    Failure::new(class, format!("snapshot {name} {what} {}", chain(error)))
}

/// The snapshot, its overlays, and who makes them.
async fn plan(
    scene: Scene,
    wish: SnapshotCreate,
    shop: &Workshop,
) -> Result<(Overlaying, Vec<NewOverlay>, std::path::PathBuf), Failure> {
    let refused = |error: &dyn std::error::Error| Failure::of(Class::Refused, error);
    let agent = match wish.quiesce {
        true => Some(freeze::channel(&scene.layout).map_err(|error| refused(&error))?),
        false => None,
    };
    // What storage says may be long in coming: not in the owner's task, and not for ever.
    let (store, vm, layout) = (shop.host.store(), shop.host.vm.clone(), scene.layout.clone());
    let (is_sparse, state) = (wish.sparse, scene.state);
    let choosing = tokio::task::spawn_blocking(move || {
        let book = store.read().map_err(|error| Failure::of(Class::Generic, &error))?;
        choose::snapshot(&layout, &wish, (&vm, state), &book)
            .map_err(|error| Failure::of(Class::Refused, &error))
    });
    let snapshot = crate::work::snapshot::in_time(choosing).await?;
    let look = turn::look(&shop.qmp).await.map_err(|error| Failure::of(Class::Generic, &error))?;
    let (mut disks, mut overlays) = (Vec::new(), Vec::new());
    for disk in &snapshot.disks {
        let old = scene.layout.expect_device(disk.id.as_str()).map_err(|error| refused(&error))?;
        let new = scene.layout.with_overlay(disk.id.as_str(), &disk.overlay, &scene.qemu);
        disks.push((old.clone(), new.map_err(|error| refused(&error))?));
        let size_bytes = look.disks.get(&disk.id).map_or(0, |seen| seen.size_bytes);
        if size_bytes == 0 {
            let words = format!("QEMU does not say how large disk {} is: try again", disk.id);
            return Err(Failure::new(Class::Generic, words));
        }
        let path = disk.overlay.clone().into();
        overlays.push(NewOverlay { path, backing: disk.image.clone(), format: disk.format, size_bytes });
    }
    if !is_sparse {
        let overlays = overlays.clone();
        let checking = tokio::task::spawn_blocking(move || {
            check_room(&overlays).map_err(|error| Failure::of(Class::Refused, &error))
        });
        crate::work::snapshot::in_time(checking).await?;
    }
    Ok((Overlaying { snapshot, disks, agent }, overlays, qemu_img(&scene.qemu_binary)))
}
