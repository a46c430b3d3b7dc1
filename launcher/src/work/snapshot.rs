//! A snapshot of a running VM, step by step: overlays made, leased and given to QEMU; the book; then all disks moved onto theirs by one command.
//! Whatever fails, or whoever dies: what QEMU's disks stand on decides whether the overlays stay.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use devices::Placed;
use devices::host::Access;
use devices::layout::{is_on_top, take_snapshot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::{StepError, Workshop, aside};
use crate::injection::Steps;
use crate::record::Entry;
use crate::snapshot::Snapshot;
use crate::snapshot::files::{self, NewOverlay};
use crate::snapshot::freeze::{self, Agent};

/// Names of the steps, in order; those of disks come once for each.
pub const STEPS: &[&str] =
    &["record", "intent", "overlay", "lease", "node", "book", "freeze", "transaction", "thaw", "settle"];

/// How long storage may take to have a small file made and flushed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A snapshot that is being taken, as the journal has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Overlaying {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Its disks, as they were and as they will be.
    pub disks: Vec<(Placed, Placed)>,
    /// The channel of the guest agent, if the guest is to be frozen.
    pub agent: Option<PathBuf>,
}

impl Workshop {
    /// Takes a snapshot. Gives whether the disks stand on the overlays, if QEMU could say so; what could not be done was undone then.
    pub async fn take_snapshot(
        &mut self,
        wanted: &Overlaying,
        overlays: Vec<NewOverlay>,
        qemu_img: PathBuf,
    ) -> (Option<bool>, Result<(), StepError>) {
        let mut steps = Steps::of("snapshot");
        let recorded = steps.enter("record").map_err(StepError::from);
        let recorded =
            recorded.and_then(|()| Ok(self.journal.append(&Entry::Overlay(Box::new(wanted.clone())))?));
        if let Err(error) = recorded {
            return (Some(false), Err(error));
        }
        let mut agent = None;
        let outcome = self.overlay(wanted, overlays, qemu_img, &mut steps, &mut agent).await;
        let thawed = match &mut agent {
            Some(agent) => match steps.enter("thaw") {
                // A test that fails the step wants to see what is left by it, not a guest that stands still.
                Err(injected) => agent.thaw().await.map_err(StepError::from).and(Err(injected.into())),
                Ok(()) => agent.thaw().await.map(drop).map_err(StepError::from),
            },
            None => Ok(()),
        };
        if let Err(error) = &thawed {
            warn!(error = crate::request::chain(error), "the guest's file systems could not be thawed");
        }
        let outcome = outcome.and_then(|()| Ok(steps.enter("settle")?));
        let is_kept = self.settle_overlays(wanted, false).await;
        match (is_kept, &outcome) {
            // A command that timed out may have been done.
            (Some(true), Err(_)) => (is_kept, thawed),
            (Some(false), Ok(())) => (is_kept, Err(StepError::NotOnTop)),
            _ => (is_kept, outcome.and(thawed)),
        }
    }

    async fn overlay(
        &mut self,
        wanted: &Overlaying,
        overlays: Vec<NewOverlay>,
        qemu_img: PathBuf,
        steps: &mut Steps,
        agent: &mut Option<Agent>,
    ) -> Result<(), StepError> {
        steps.enter("intent")?;
        let (store, snapshot) = (self.host.store(), wanted.snapshot.clone());
        worker(move || store.intend(&snapshot)).await?;
        for overlay in overlays {
            steps.enter("overlay")?;
            let qemu_img = qemu_img.clone();
            worker(move || files::make(&overlay, &qemu_img)).await?;
        }
        for ((_, new), disk) in wanted.disks.iter().zip(&wanted.snapshot.disks) {
            steps.enter("lease")?;
            let (host, id, path) = (Arc::clone(&self.host), new.id.clone(), disk.overlay.clone());
            aside(move || host.lease(&id, &path, Access::Write)).await?;
            for call in new.overlay_nodes() {
                steps.enter("node")?;
                self.call(call).await?;
            }
        }
        // Before QEMU is told: from then on the guest's writes are in the overlays, and a VM that starts from the images below would lose them.
        steps.enter("book")?;
        let (store, snapshot) = (self.host.store(), wanted.snapshot.clone());
        worker(move || store.add(&snapshot)).await?;
        if let Some(channel) = &wanted.agent {
            steps.enter("freeze")?;
            let agent = agent.insert(Agent::connect(channel).await?);
            let count = agent.freeze().await?;
            info!(count, "the guest's file systems are frozen");
        }
        steps.enter("transaction")?;
        self.call(take_snapshot(wanted.disks.iter().map(|(old, new)| (old, new)))).await
    }

    /// Finds out whether the disks stand on their overlays; if not, removes these. `None` if QEMU does not say: the next owner finds out.
    pub async fn settle_overlays(&mut self, wanted: &Overlaying, may_be_frozen: bool) -> Option<bool> {
        let name = &wanted.snapshot.name;
        if let Some(channel) = wanted.agent.as_ref().filter(|_| may_be_frozen)
            && let Err(error) = freeze::thaw(channel).await
        {
            warn!(snapshot = %name, error = crate::request::chain(&error), "the guest's file systems may be frozen: thaw them in the guest");
        }
        let nodes = match self.qmp.call("query-named-block-nodes", Value::Null).await {
            Ok(nodes) => nodes,
            Err(error) => {
                warn!(snapshot = %name, %error, "QEMU does not say what its disks stand on");
                return None;
            }
        };
        let nodes = nodes.as_array().cloned().unwrap_or_default();
        let stands = |new: &Placed| {
            nodes.iter().any(|node| node["node-name"].as_str() == new.top_node() && is_on_top(node))
        };
        let is_kept = wanted.disks.iter().all(|(_, new)| stands(new));
        if !is_kept && let Err(error) = self.remove_overlays(wanted).await {
            let error = crate::request::chain(&error);
            warn!(snapshot = %name, error, "not everything of the snapshot that was not taken could be removed: `qvirt recover` tries again");
        }
        self.note(&Entry::Overlaid { kept: is_kept });
        Some(is_kept)
    }

    /// In this order, so that whoever dies in between leaves nothing that the book does not know.
    async fn remove_overlays(&mut self, wanted: &Overlaying) -> Result<(), StepError> {
        let mut outcome = Ok(());
        for (_, new) in &wanted.disks {
            for call in new.overlay_nodes_undone() {
                outcome = outcome.and(self.undo(call).await);
            }
        }
        // What QEMU has open still is not removed.
        outcome?;
        let (store, snapshot) = (self.host.store(), wanted.snapshot.clone());
        worker(move || store.take_back(&snapshot)).await?;
        for (old, _) in &wanted.disks {
            let (host, old) = (Arc::clone(&self.host), old.clone());
            aside(move || host.give_back_but(&old)).await?;
        }
        Ok(())
    }
}

/// Does what waits for storage in a thread of its own, and does not wait for it for ever.
pub(crate) async fn worker<T: Send + 'static, E: Into<StepError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, StepError> {
    match tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(outcome)) => outcome.map_err(Into::into),
        Ok(Err(error)) => Err(StepError::Lost(error)),
        Err(_) => Err(StepError::Storage(PATIENCE)),
    }
}

/// What a thread brings home that waits for storage, if it does so in time.
pub(crate) async fn in_time<T>(
    thread: tokio::task::JoinHandle<Result<T, crate::request::Failure>>,
) -> Result<T, crate::request::Failure> {
    use crate::request::{Class, Failure};
    match tokio::time::timeout(PATIENCE, thread).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => Err(Failure::of(Class::Generic, &StepError::Lost(error))),
        Err(_) => Err(Failure::of(Class::Generic, &StepError::Storage(PATIENCE))),
    }
}

/// A snapshot for events and clients.
pub(crate) fn about(snapshot: &Snapshot) -> Value {
    let disks: Vec<Value> =
        snapshot.disks.iter().map(|d| json!({"id": d.id, "image": d.image, "overlay": d.overlay})).collect();
    json!({"name": snapshot.name, "parent": snapshot.parent, "quiesced": snapshot.quiesced, "disks": disks})
}
