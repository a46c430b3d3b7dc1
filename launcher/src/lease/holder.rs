//! Who has a lease, whether they live, and how to tell people.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::folders::VmName;
use crate::{journal, locks};

/// Who uses a thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The VM.
    pub vm: VmName,
    /// Its user; when read back, the owner of the lease file.
    pub uid: u32,
    /// Its runtime folder, absolute: there are the locks and the journal that tell whether it lives.
    pub run_dir: PathBuf,
    /// The id of its device that uses the thing.
    pub device: String,
    /// What the user called the thing.
    pub path: String,
    /// When, in seconds since 1970.
    pub since_unix_secs: u64,
}

impl Holder {
    /// A holder of this process' user, from now on.
    pub fn new(vm: &VmName, run_dir: &Path, device: &str, path: &str) -> Holder {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Holder {
            vm: vm.clone(),
            uid: Uid::effective().as_raw(),
            run_dir: run_dir.into(),
            device: device.into(),
            path: path.into(),
            since_unix_secs: now.as_secs(),
        }
    }

    pub(super) fn is(&self, vm: &VmName, run_dir: &Path) -> bool {
        self.vm == *vm && self.run_dir == run_dir
    }

    /// `root`, or the number where it has no name.
    pub(super) fn user(&self) -> String {
        let named = User::from_uid(Uid::from_raw(self.uid)).ok().flatten();
        named.map_or_else(|| format!("uid {}", self.uid), |user| user.name)
    }
}

/// Whether a holder still uses what it leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Staleness {
    /// Its owner or its QEMU runs.
    Live,
    /// Both are dead, and its journal lists changes to undo first.
    NeedsRecovery,
    /// Its locks or journal cannot be looked at: another user's.
    Unknown,
    /// Both are dead and nothing is left to undo.
    Stale,
}

/// Asks the locks and the journal in the holder's runtime folder.
pub fn look(holder: &Holder) -> Staleness {
    // What a stranger's lease says of a folder that is not the stranger's tells nothing.
    match std::fs::symlink_metadata(&holder.run_dir) {
        Ok(folder) if !folder.is_dir() || folder.uid() != holder.uid => return Staleness::Unknown,
        _ => {}
    }
    for lock in ["life", "owner"] {
        match locks::probe(&holder.run_dir.join(lock)) {
            Ok(true) => return Staleness::Live,
            Ok(false) => {}
            Err(error) => {
                info!(vm = %holder.vm, %error, "cannot tell whether it lives");
                return Staleness::Unknown;
            }
        }
    }
    match journal::has_entries(&holder.run_dir.join("journal")) {
        Ok(false) => Staleness::Stale,
        Ok(true) | Err(_) => Staleness::NeedsRecovery,
    }
}

/// For the one who wanted it: who has it, and what to do about that.
pub(super) fn describe(holder: &Holder, state: Staleness) -> String {
    let Holder { vm, device, path, .. } = holder;
    let user = holder.user();
    let who = format!("device {device} of VM {vm} (user {user}) has it as {path}");
    match state {
        Staleness::Live | Staleness::Stale => format!("{who}; detach it there first"),
        Staleness::NeedsRecovery => {
            format!("{who}; that VM is dead and left changes to undo: `qvirt recover {vm}` first")
        }
        Staleness::Unknown => {
            format!(
                "{who}; whether it runs is not ours to see: ask {user} for `qvirt status {vm}`, or `qvirt recover {vm}` if it is dead"
            )
        }
    }
}
