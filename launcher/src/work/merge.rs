//! A layer of a running disk's chain merged into the one below it, by a job of QEMU's that goes on when its owner dies.

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
            Err(error) => (self.settle_merge(merging).await.unwrap_or(None), Err(error)),
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
        let waited = self.wait_for_job(&merging.lesser).await;
        let entered = steps.enter("book").map_err(StepError::from);
        match self.settle_merge(merging).await {
            Ok(done) => (done, waited.and(entered)),
            Err(error) => (Some(true), Err(error)),
        }
    }

    async fn wait_for_job(&self, lesser: &Lesser) -> Result<(), StepError> {
        let failed = |source| StepError::Qmp { command: "query-jobs", source };
        loop {
            let jobs = self.qmp.call("query-jobs", Value::Null).await.map_err(failed)?;
            let job =
                jobs.as_array().into_iter().flatten().find(|job| job["id"].as_str() == Some(&lesser.job));
            // One that was dismissed already is over.
            let Some(job) = job else { return Ok(()) };
            if job["status"].as_str() == Some("concluded") {
                let error = job["error"].as_str().map(str::to_owned);
                self.undo(lesser.dismiss()).await?;
                return error.map_or(Ok(()), |words| Err(StepError::Job { words }));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Finds out whether it is done; if so the nodes go, and the book learns of it, and the file goes. `None` if QEMU does not say.
    async fn settle_merge(&mut self, merging: &Merging) -> Result<Option<bool>, StepError> {
        let nodes = match self.qmp.call("query-named-block-nodes", Value::Null).await {
            Ok(nodes) => nodes.as_array().cloned().unwrap_or_default(),
            Err(error) => {
                warn!(device = %merging.id, %error, "QEMU does not say what its disks stand on");
                return Ok(None);
            }
        };
        let is_done = merging.lesser.is_done(&nodes);
        if is_done {
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
            aside(move || host.give_back_but(&placed)).await?;
        }
        self.note(&Entry::Merged { done: is_done });
        Ok(Some(is_done))
    }
}
