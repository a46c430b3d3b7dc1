//! The data of a running disk's layers pulled into the uppermost one, by a job of QEMU's that goes on when its owner dies.
//!
//! Both chains show the same disk at any moment. The header of the uppermost layer says which of them it is: QEMU changes it at the end. What the book
//! says follows; from before the job until then it says that the header knows better.

use std::sync::Arc;

use devices::DeviceId;
use devices::layout::Pull;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{info, warn};

use super::merge::{LOOK, Shortening};
use super::snapshot::worker;
use super::{StepError, Workshop, aside};
use crate::injection::Steps;
use crate::record::Entry;
use crate::snapshot::tidy;

/// Names of the steps, in order.
pub const STEPS: &[&str] = &["record", "intent", "stream", "flush", "book"];

/// A pull that is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pulling {
    /// The disk.
    pub id: DeviceId,
    /// Its uppermost layer, and what that stands on then.
    pub top: String,
    /// See there.
    pub base: Option<String>,
    /// What is done, as QEMU has it.
    pub pull: Pull,
    /// How fast at most, in bytes a second.
    pub speed: Option<u64>,
}

impl Workshop {
    /// Pulls. Gives whether it is done, if QEMU could say so.
    pub async fn pull(
        &mut self,
        pulling: &Pulling,
        steps: &mut Steps,
    ) -> (Option<bool>, Result<(), StepError>) {
        match self.begin_pull(pulling, steps).await {
            Ok(()) => self.finish_pull(pulling, steps).await,
            Err(error) => (self.settle_pull(pulling).await.0, Err(error)),
        }
    }

    async fn begin_pull(&mut self, pulling: &Pulling, steps: &mut Steps) -> Result<(), StepError> {
        steps.enter("record")?;
        self.journal.append(&Entry::Shortening(Box::new(Shortening::Pull(pulling.clone()))))?;
        steps.enter("intent")?;
        let top = pulling.top.clone();
        self.book(move |book| book.pulling(&top)).await?;
        steps.enter("stream")?;
        self.call(pulling.pull.begin(pulling.speed)).await
    }

    /// Waits for a job that was begun, by this owner or a former one, and clears up behind it.
    pub async fn finish_pull(
        &mut self,
        pulling: &Pulling,
        steps: &mut Steps,
    ) -> (Option<bool>, Result<(), StepError>) {
        let waited = self.wait_for_pull(pulling, steps).await;
        let entered = steps.enter("book").map_err(StepError::from);
        let (done, settled) = self.settle_pull(pulling).await;
        (done, waited.and(entered).and(settled))
    }

    async fn wait_for_pull(&mut self, pulling: &Pulling, steps: &mut Steps) -> Result<(), StepError> {
        let (mut outcome, mut is_told) = (Ok(()), false);
        // One that was dismissed already is over.
        while let Some(job) = self.job(&pulling.pull.job).await? {
            match job["status"].as_str() {
                Some("pending") if !is_told => {
                    is_told = true;
                    let ended = self.flush_and_finalize(pulling.pull.flush(), &pulling.pull.job, steps).await;
                    outcome = self.or_cancel(ended, &pulling.pull.job).await;
                }
                Some("concluded") => return outcome.and(self.conclude(&job).await),
                _ => {}
            }
            tokio::time::sleep(LOOK).await;
        }
        outcome
    }

    /// Finds out whether it is done, and lets the book know. `None` if QEMU does not say.
    async fn settle_pull(&mut self, pulling: &Pulling) -> (Option<bool>, Result<(), StepError>) {
        let nodes = match self.qmp.call("query-named-block-nodes", Value::Null).await {
            Ok(nodes) => nodes,
            Err(error) => {
                warn!(device = %pulling.id, %error, "QEMU does not say what its disks stand on");
                return (None, Ok(()));
            }
        };
        let is_done = pulling.pull.is_done(nodes.as_array().map(Vec::as_slice).unwrap_or_default());
        let settled = self.note_pull(pulling, is_done).await;
        self.note(&Entry::Shortened { done: is_done });
        (Some(is_done), settled)
    }

    async fn note_pull(&mut self, pulling: &Pulling, is_done: bool) -> Result<(), StepError> {
        if is_done {
            // Its header: the layers that it named may be removed from now on.
            let top = pulling.top.clone();
            worker(move || tidy::flush(&top)).await?;
        }
        let (top, base) = (pulling.top.clone(), pulling.base.clone().filter(|_| is_done));
        self.book(move |book| match base {
            Some(base) => book.pulled(&top, &base),
            None => book.not_pulled(&top),
        })
        .await?;
        if is_done {
            info!(device = %pulling.id, top = pulling.top, base = pulling.base, "pulled");
            for call in pulling.pull.clear() {
                self.undo(call).await?;
            }
            let (host, placed) = (Arc::clone(&self.host), pulling.pull.placed.clone());
            aside(move || host.give_back_but(&placed)).await?;
        }
        Ok(())
    }
}
