//! Another medium in a CD-ROM drive, step by step: the new image beside the old one; the drive opened, emptied, filled, closed; then what is not in
//! it goes. Whatever fails, or whoever dies: what QEMU has in the drive decides which of the two images stays.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::Placed;
use serde_json::{Value, json};
use tracing::warn;

use super::{StepError, Workshop, aside};
use crate::injection::Steps;
use crate::record::Entry;
use crate::suspend::turn::id_in;

/// How long a guest may take to let go of a medium that it has locked.
const GUEST: Duration = Duration::from_secs(3);
/// How often the tray is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// The node that a drive stands on, if it has a medium.
fn top(drive: &Placed) -> Option<&str> {
    drive.spec.frontend.as_ref()?.0.get("drive")?.as_str()
}

impl Workshop {
    /// Changes the medium of a drive. Gives the drive as it is then, if QEMU could say so.
    pub async fn change_medium(
        &mut self,
        old: &Placed,
        new: &Placed,
        force: bool,
    ) -> (Option<Placed>, Result<(), StepError>) {
        let mut steps = Steps::of("media");
        let recorded = steps.enter("record").map_err(StepError::from);
        let recorded =
            recorded.and_then(|()| Ok(self.journal.append(&Entry::Medium(Box::new(new.clone())))?));
        if let Err(error) = recorded {
            return (Some(old.clone()), Err(error));
        }
        let outcome = self.swap(old, new, force, &mut steps).await;
        let settled = self.settle_medium(old, new).await;
        match (&settled, &outcome) {
            // A command that timed out may have been done.
            (Some(now), Err(_)) if now == new => (settled, Ok(())),
            (None, Ok(())) => (Some(new.clone()), outcome),
            _ => (settled, outcome),
        }
    }

    /// Ends with an open tray.
    async fn swap(
        &mut self,
        old: &Placed,
        new: &Placed,
        force: bool,
        steps: &mut Steps,
    ) -> Result<(), StepError> {
        for need in new.needs.clone() {
            steps.enter("lease")?;
            let (host, id) = (Arc::clone(&self.host), new.id.clone());
            aside(move || host.meet(&id, &need)).await?;
        }
        for backend in &new.spec.backends {
            steps.enter("blockdev")?;
            self.call(backend.add()).await?;
        }
        steps.enter("open")?;
        self.drive(new, "blockdev-open-tray", json!({"force": force})).await?;
        self.wait_for_tray(new).await?;
        if top(old).is_some() {
            steps.enter("remove")?;
            self.drive(new, "blockdev-remove-medium", json!({})).await?;
        }
        if let Some(node) = top(new) {
            steps.enter("insert")?;
            self.drive(new, "blockdev-insert-medium", json!({"node-name": node})).await?;
        }
        Ok(steps.enter("settle")?)
    }

    /// A command about a drive.
    async fn drive(
        &self,
        drive: &Placed,
        command: &'static str,
        mut arguments: Value,
    ) -> Result<(), StepError> {
        arguments["id"] = drive.id.as_str().into();
        let sent = self.qmp.call(command, arguments).await;
        sent.map(drop).map_err(|source| StepError::Qmp { command, source })
    }

    /// A guest that has locked the drive is asked by QEMU, which waits for nothing: its event may be lost, so the drive is looked at.
    async fn wait_for_tray(&self, drive: &Placed) -> Result<(), StepError> {
        let until = Instant::now() + GUEST;
        while !self.look_into(drive).await?["tray_open"].as_bool().unwrap_or_default() {
            if Instant::now() > until {
                return Err(StepError::Locked);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// What QEMU says of a drive.
    async fn look_into(&self, drive: &Placed) -> Result<Value, StepError> {
        let drives = self.qmp.call("query-block", Value::Null).await;
        let drives = drives.map_err(|source| StepError::Qmp { command: "query-block", source })?;
        let is = |found: &&Value| found["qdev"].as_str().and_then(id_in).as_ref() == Some(&drive.id);
        drives.as_array().into_iter().flatten().find(is).cloned().ok_or(StepError::Vanished)
    }

    /// Finds out which medium the drive has, and clears up behind the other one. `None` if QEMU does not say: the next owner finds out.
    pub async fn settle_medium(&mut self, old: &Placed, new: &Placed) -> Option<Placed> {
        let id = &new.id;
        let found = match self.look_into(new).await {
            Ok(found) => found,
            Err(error) => {
                warn!(device = %id, %error, "QEMU does not say which medium is in the drive");
                return None;
            }
        };
        let inside = found["inserted"]["node-name"].as_str();
        let (stays, goes) = if inside == top(new) { (new, old) } else { (old, new) };
        if inside != top(stays)
            && let Some(node) = top(stays)
            && let Err(error) = self.drive(stays, "blockdev-insert-medium", json!({"node-name": node})).await
        {
            warn!(device = %id, %error, "the former medium could not be put back: the drive is empty");
        }
        if let Err(error) = self.drive(stays, "blockdev-close-tray", json!({})).await {
            warn!(device = %id, %error, "the drive's tray stays open");
        }
        let of_both = |backend| stays.spec.backends.contains(backend);
        for backend in goes.spec.backends.iter().rev().filter(|backend| !of_both(backend)) {
            if let Err(error) = self.undo(backend.del()).await {
                warn!(device = %id, %error, "QEMU keeps a node of the medium that is not in the drive");
            }
        }
        let (host, kept) = (Arc::clone(&self.host), stays.clone());
        if let Err(error) = aside(move || host.give_back_but(&kept)).await {
            warn!(device = %id, %error, "the lease of the medium that is not in the drive stays");
        }
        self.note(&Entry::Drive(Box::new(stays.clone())));
        Some(stays.clone())
    }
}
