//! A layer of a running disk's chain merged into the one below it, by a job of QEMU's that goes on when its owner dies.
//!
//! Where it is the layer that is written, the book says where the disk is from then on at the one moment at which both images show the same disk and no
//! request of the guest is let through: when the job is `pending`. Whoever dies before leaves the disk on the upper image, whoever dies after that on
//! the lower one. If it is the owner, the guest's requests to that disk wait for the next owner, which goes on from there.

use std::sync::Arc;
use std::time::Duration;

use devices::DeviceId;
use devices::host::Access;
use devices::layout::Lesser;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{info, warn};

use super::snapshot::worker;
use super::{StepError, Workshop, aside};
use crate::injection::Steps;
use crate::record::Entry;
use crate::snapshot::StoreError;
use crate::snapshot::tidy::Merge;
use crate::suspend::turn;

/// Names of the steps, in order; the two in the middle are of the layer that is written.
pub const STEPS: &[&str] = &["record", "lease", "commit", "complete", "pivot", "book"];

/// How often the job is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A merge that is under way, as the journal has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Merging {
    /// The disk.
    pub id: DeviceId,
    /// What is done, as the book has it.
    pub merge: Merge,
    /// What is done, as QEMU has it.
    pub lesser: Lesser,
    /// How fast at most, in bytes a second.
    pub speed: Option<u64>,
}

impl Workshop {
    /// Merges. Gives whether it is done, if QEMU could say so.
    pub async fn merge(
        &mut self,
        merging: &Merging,
        steps: &mut Steps,
    ) -> (Option<bool>, Result<(), StepError>) {
        let begun = self.begin_merge(merging, steps).await;
        match begun {
            Ok(()) => self.finish_merge(merging, steps).await,
            Err(error) => (self.settle_merge(merging).await.0, Err(error)),
        }
    }

    async fn begin_merge(&mut self, merging: &Merging, steps: &mut Steps) -> Result<(), StepError> {
        steps.enter("record")?;
        self.journal.append(&Entry::Merging(Box::new(merging.clone())))?;
        steps.enter("lease")?;
        let (host, id, into) = (Arc::clone(&self.host), merging.id.clone(), merging.merge.into.clone());
        aside(move || host.lease(&id, &into, Access::Write)).await?;
        steps.enter("commit")?;
        self.call(merging.lesser.begin(merging.speed)).await
    }

    /// Waits for a job that was begun, by this owner or a former one, and clears up behind it.
    pub async fn finish_merge(
        &mut self,
        merging: &Merging,
        steps: &mut Steps,
    ) -> (Option<bool>, Result<(), StepError>) {
        let waited = self.wait_for_job(merging, steps).await;
        let entered = steps.enter("book").map_err(StepError::from);
        let (done, settled) = self.settle_merge(merging).await;
        (done, waited.and(entered).and(settled))
    }

    async fn wait_for_job(&mut self, merging: &Merging, steps: &mut Steps) -> Result<(), StepError> {
        let failed = |source| StepError::Qmp { command: "query-jobs", source };
        let lesser = &merging.lesser;
        let mut outcome = Ok(());
        let mut is_asked = false;
        loop {
            let jobs = self.qmp.call("query-jobs", Value::Null).await.map_err(failed)?;
            let job =
                jobs.as_array().into_iter().flatten().find(|job| job["id"].as_str() == Some(&lesser.job));
            // One that was dismissed already is over.
            let Some(job) = job else { return outcome };
            match job["status"].as_str() {
                Some("ready") if outcome.is_ok() && !is_asked => {
                    outcome = self.complete(lesser, steps).await;
                    is_asked = true;
                }
                Some("pending") if outcome.is_ok() => outcome = self.pivot(merging, steps).await,
                Some("concluded") => {
                    let error = job["error"].as_str().map(str::to_owned);
                    self.undo(lesser.dismiss()).await?;
                    return outcome.and(error.map_or(Ok(()), |words| Err(StepError::Job { words })));
                }
                _ => {}
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn complete(&mut self, lesser: &Lesser, steps: &mut Steps) -> Result<(), StepError> {
        let completed = match steps.enter("complete") {
            Ok(()) => self.call(lesser.complete()).await,
            Err(injected) => Err(injected.into()),
        };
        self.or_cancel(completed, lesser).await
    }

    /// Moves the device from the image that it writes to the one below, both of which show the same disk just now.
    async fn pivot(&mut self, merging: &Merging, steps: &mut Steps) -> Result<(), StepError> {
        let pivoted = self.try_pivot(merging, steps).await;
        self.or_cancel(pivoted, &merging.lesser).await
    }

    async fn try_pivot(&mut self, merging: &Merging, steps: &mut Steps) -> Result<(), StepError> {
        let stands_on = self.stands_on(merging).await?;
        if !merging.lesser.is_seen(&stands_on) {
            // Its I/O is held on another node, or was: the job knows nothing of what the guest wrote since.
            return Err(StepError::Held(merging.id.clone()));
        }
        let (store, merge) = (self.host.store(), merging.merge.clone());
        worker(move || {
            store.change::<_, StoreError>(|book| {
                book.merged(&merge);
                Ok(())
            })
        })
        .await?;
        steps.enter("pivot")?;
        self.call(merging.lesser.finalize()).await
    }

    /// A job that cannot go on is given up: it ends, and its disk is as it was.
    async fn or_cancel(&mut self, outcome: Result<(), StepError>, lesser: &Lesser) -> Result<(), StepError> {
        if outcome.is_err() {
            self.undo(lesser.cancel()).await?;
        }
        outcome
    }

    /// The node that the disk's device stands on.
    async fn stands_on(&self, merging: &Merging) -> Result<String, StepError> {
        let failed = |source| StepError::Qmp { command: "query-block", source };
        let look = turn::look(&self.qmp).await.map_err(failed)?;
        Ok(look.disks.get(&merging.id).map(|disk| disk.node.clone()).unwrap_or_default())
    }

    /// Finds out whether it is done; if so the nodes go, and the book learns of it, and the file goes. `None` if QEMU does not say.
    async fn settle_merge(&mut self, merging: &Merging) -> (Option<bool>, Result<(), StepError>) {
        let Some(is_done) = self.is_merged(merging).await else {
            warn!(device = %merging.id, "it is not known what its disk stands on: the next owner finds out");
            return (None, Ok(()));
        };
        let settled = if is_done { self.clear_merged(merging).await } else { self.take_back(merging).await };
        self.note(&Entry::Merged { done: is_done });
        (Some(is_done), settled)
    }

    async fn clear_merged(&mut self, merging: &Merging) -> Result<(), StepError> {
        info!(device = %merging.id, from = merging.merge.from, into = merging.merge.into, "merged");
        for call in merging.lesser.clear() {
            self.undo(call).await?;
        }
        let (store, merge, vm) = (self.host.store(), merging.merge.clone(), self.host.vm.clone());
        worker(move || {
            store.change::<_, StoreError>(|book| {
                book.merged(&merge);
                Ok(())
            })?;
            store.sweep(&vm)
        })
        .await?;
        let (host, placed) = (Arc::clone(&self.host), merging.lesser.placed.clone());
        aside(move || host.give_back_but(&placed)).await
    }

    /// The book may say already that it is done where the layer is written.
    async fn take_back(&mut self, merging: &Merging) -> Result<(), StepError> {
        if !merging.lesser.is_active() {
            return Ok(());
        }
        let (store, merge) = (self.host.store(), merging.merge.clone());
        worker(move || {
            store.change::<_, StoreError>(|book| {
                book.not_merged(&merge);
                Ok(())
            })
        })
        .await
    }

    /// Whether QEMU has the disk on the image below; `None` if it does not say.
    async fn is_merged(&self, merging: &Merging) -> Option<bool> {
        let nodes = self.qmp.call("query-named-block-nodes", Value::Null).await.ok()?;
        let stands_on = self.stands_on(merging).await.ok()?;
        merging.lesser.is_done(nodes.as_array().map(Vec::as_slice).unwrap_or_default(), &stands_on)
    }
}
