//! A layer of a running disk's chain merged into the one below it, by a job of QEMU's that goes on when its owner dies.
//!
//! Where it is the layer that is written, the book says where the disk is from then on at the one moment at which both images show the same disk and no
//! request of the guest is let through: when the job is `pending`. Whoever dies before leaves the disk on the upper image, whoever dies after that on
//! the lower one. If it is the owner, the guest's requests to that disk wait for the next owner, which goes on from there.

use std::sync::Arc;
use std::time::Duration;

use devices::host::Access;
use devices::layout::{Lesser, cancel, dismiss, finalize};
use devices::spec::Call;
use devices::{DeviceId, Placed};
use qmp_client::QmpError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{info, warn};

use super::pull::Pulling;
use super::snapshot::worker;
use super::{StepError, Workshop, aside};
use crate::injection::Steps;
use crate::record::Entry;
use crate::snapshot::tidy::Merge;
use crate::snapshot::{Book, StoreError};
use crate::suspend::turn;

/// Names of the steps, in order; `flush` is of layers that are frozen, `complete` and `pivot` of the one that is written.
pub const STEPS: &[&str] = &["record", "lease", "commit", "flush", "complete", "pivot", "book"];

/// How often the job is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// A chain that becomes shorter, as the journal has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shortening {
    /// A layer goes into the one below.
    Merge(Merging),
    /// Layers go into the uppermost one.
    Pull(Pulling),
}

impl Shortening {
    /// The disk as it will be.
    pub fn placed(&self) -> &Placed {
        match self {
            Shortening::Merge(merging) => &merging.lesser.placed,
            Shortening::Pull(pulling) => &pulling.pull.placed,
        }
    }
}

/// A merge that is under way.
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
        self.journal.append(&Entry::Shortening(Box::new(Shortening::Merge(merging.clone()))))?;
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
        let lesser = &merging.lesser;
        let mut outcome = Ok(());
        let (mut is_asked, mut is_told) = (false, false);
        loop {
            // One that was dismissed already is over.
            let Some(job) = self.job(&lesser.job).await? else { return outcome };
            match job["status"].as_str() {
                Some("ready") if !is_asked => {
                    is_asked = true;
                    outcome = self.complete(lesser, steps).await;
                }
                Some("pending") if !is_told => {
                    is_told = true;
                    let ended = if lesser.is_active() {
                        self.pivot(merging, steps).await
                    } else {
                        self.flush_and_finalize(lesser.flush(), &lesser.job, steps).await
                    };
                    outcome = self.or_cancel(ended, &lesser.job).await;
                }
                Some("concluded") => return outcome.and(self.conclude(&job).await),
                _ => {}
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A job of QEMU's, if it has one of that id. While QEMU does not answer, for storage that hangs, say, the job is as it was: whoever gave up now would
    /// leave it without anybody who ends it.
    pub(super) async fn job(&self, id: &str) -> Result<Option<Value>, StepError> {
        let failed = |source| StepError::Qmp { command: "query-jobs", source };
        let jobs = loop {
            match self.qmp.call("query-jobs", Value::Null).await {
                Err(QmpError::TimedOut { .. }) => {}
                jobs => break jobs.map_err(failed)?,
            }
        };
        Ok(jobs.as_array().into_iter().flatten().find(|job| job["id"].as_str() == Some(id)).cloned())
    }

    /// Lets QEMU forget a job that is over; says what it failed of.
    pub(super) async fn conclude(&mut self, job: &Value) -> Result<(), StepError> {
        self.undo(dismiss(job["id"].as_str().unwrap_or_default())).await?;
        job["error"].as_str().map_or(Ok(()), |words| Err(StepError::Job { words: words.to_owned() }))
    }

    /// Changes the book.
    pub(super) async fn book(
        &self,
        change: impl FnOnce(&mut Book) + Send + 'static,
    ) -> Result<(), StepError> {
        let store = self.host.store();
        worker(move || {
            store.change::<_, StoreError>(|book| {
                change(book);
                Ok(())
            })
        })
        .await
    }

    async fn complete(&mut self, lesser: &Lesser, steps: &mut Steps) -> Result<(), StepError> {
        let completed = match steps.enter("complete") {
            Ok(()) => self.call(lesser.complete()).await,
            Err(injected) => Err(injected.into()),
        };
        self.or_cancel(completed, &lesser.job).await
    }

    /// Lets a job change a header once what it copied is on its storage.
    pub(super) async fn flush_and_finalize(
        &mut self,
        flush: Call,
        job: &str,
        steps: &mut Steps,
    ) -> Result<(), StepError> {
        steps.enter("flush")?;
        self.call(flush).await?;
        self.call(finalize(job)).await
    }

    /// Moves the device from the image that it writes to the one below, both of which show the same disk just now, and are flushed.
    async fn pivot(&mut self, merging: &Merging, steps: &mut Steps) -> Result<(), StepError> {
        let stands_on = self.stands_on(merging).await?;
        if !merging.lesser.is_seen(&stands_on) {
            // Its I/O is held on another node, or was: the job knows nothing of what the guest wrote since.
            return Err(StepError::Held(merging.id.clone()));
        }
        let merge = merging.merge.clone();
        self.book(move |book| book.merged(&merge)).await?;
        steps.enter("pivot")?;
        self.call(finalize(&merging.lesser.job)).await
    }

    /// A job that cannot go on is given up: it ends, and its disk is as it was.
    pub(super) async fn or_cancel(
        &mut self,
        outcome: Result<(), StepError>,
        job: &str,
    ) -> Result<(), StepError> {
        if outcome.is_err() {
            self.undo(cancel(job)).await?;
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
        self.note(&Entry::Shortened { done: is_done });
        (Some(is_done), settled)
    }

    async fn clear_merged(&mut self, merging: &Merging) -> Result<(), StepError> {
        info!(device = %merging.id, from = merging.merge.from, into = merging.merge.into, "merged");
        for call in merging.lesser.clear() {
            self.undo(call).await?;
        }
        let (store, merge, vm) = (self.host.store(), merging.merge.clone(), self.host.vm.clone());
        self.book(move |book| book.merged(&merge)).await?;
        worker(move || store.sweep(&vm)).await?;
        let (host, placed) = (Arc::clone(&self.host), merging.lesser.placed.clone());
        aside(move || host.give_back_but(&placed)).await
    }

    /// The book may say already that it is done where the layer is written.
    async fn take_back(&mut self, merging: &Merging) -> Result<(), StepError> {
        if !merging.lesser.is_active() {
            return Ok(());
        }
        let merge = merging.merge.clone();
        self.book(move |book| book.not_merged(&merge)).await
    }

    /// Whether QEMU has the disk on the image below; `None` if it does not say.
    async fn is_merged(&self, merging: &Merging) -> Option<bool> {
        let nodes = self.qmp.call("query-named-block-nodes", Value::Null).await.ok()?;
        let stands_on = self.stands_on(merging).await.ok()?;
        merging.lesser.is_done(nodes.as_array().map(Vec::as_slice).unwrap_or_default(), &stands_on)
    }
}
