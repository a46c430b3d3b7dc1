//! What a command that changes this host has begun: written down before it is done, gone when it is done or undone.
//!
//! A command that dies in between leaves its note. The next one that changes the host, or `qvirt recover`, undoes what it says, after a look at the
//! world: only what is there and as the dead one may have left it, and what nobody has begun to use meanwhile.

use std::error::Error as AnyError;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use devices::bdf::HostBdf;
use devices::vf::VfProfile;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

use super::bound;
use super::movable::{Movable, MoveError, Place};
use super::sriov::SriovError;
use super::sysfs::Sysfs;
use super::vdpa;
use super::vfio::{self, Users};
use crate::folders::{Folders, FoldersError, WriteError, make_private, write_volatile};
use crate::injection::Steps;
use crate::lease::Leases;
use crate::process::Identity;

/// Why a change was not begun, or not undone.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum BegunError {
    #[error("the folder for what is begun")]
    Folder(#[from] FoldersError),
    #[error("what is to be changed could not be written down, so nothing was")]
    Write(#[from] WriteError),
    #[error("this process is not known to the kernel: is /proc mounted?")]
    Identity(#[source] io::Error),
    #[error("{} cannot be read; if it is damaged, undo by hand what it lists, and remove it", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{change} could not be undone: mend that, then `qvirt recover`; or remove {} to leave it as it is", path.display()
    )]
    Undo { change: Change, path: PathBuf, source: Box<dyn AnyError + Send + Sync> },
}

/// A change with what was before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// A function goes to a driver.
    Driver {
        /// The function.
        host: HostBdf,
        /// The driver.
        to: String,
        /// What it had.
        before: Place,
    },
    /// A physical function gets another number of virtual ones.
    Vfs {
        /// The physical function.
        pf: HostBdf,
        /// How many it had.
        before: u32,
        /// How many it gets.
        wanted: u32,
    },
    /// A virtual function gets another profile.
    VfProfile {
        /// Its physical function.
        pf: HostBdf,
        /// Its number.
        index: u32,
        /// What it had.
        before: VfProfile,
        /// What it gets.
        wanted: VfProfile,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Driver { host, to, .. } => write!(f, "{host} on its way to {to}"),
            Change::Vfs { pf, before, .. } => {
                write!(f, "the number of virtual functions of {pf}, once {before}")
            }
            Change::VfProfile { pf, index, .. } => {
                write!(f, "the profile of virtual function {index} of {pf}")
            }
        }
    }
}

impl Change {
    /// Undoes it as far as it was done. `false`: somebody uses it by now, so it stays.
    fn undo(&self, folders: &Folders) -> Result<bool, Box<dyn AnyError + Send + Sync>> {
        let sysfs = Sysfs::default();
        let users = Users::find(&Leases::open(&folders.leases)?);
        if let Some(user) = self.user(&sysfs, &users) {
            warn!(change = %self, user, "it is in use by now: it stays");
            return Ok(false);
        }
        match self {
            Change::Driver { host, to, before } => {
                match Movable::find(&sysfs, *host) {
                    // Its card was pulled, or its virtual functions were switched off.
                    Err(MoveError::NoDevice { .. }) => {}
                    function => function?.give_back(to, before)?,
                }
                bound::forget(folders, *host, before);
            }
            Change::Vfs { pf, before, wanted } => match sysfs.pf(&pf.to_string()) {
                Err(SriovError::NoPf { .. }) => {}
                found => {
                    let found = found?;
                    let now = u32::try_from(found.vfs.len()).unwrap_or(u32::MAX);
                    // Another number is somebody else's.
                    if now != *before && (now == 0 || now == *wanted) {
                        sysfs.set_vfs(&found, *before, &users, &mut Steps::of("undo"))?;
                    }
                }
            },
            Change::VfProfile { pf, index, before, wanted } => {
                vfio::restore_profile(&sysfs, *pf, *index, before, wanted)?
            }
        }
        Ok(true)
    }

    /// Who uses what it changes.
    fn user(&self, sysfs: &Sysfs, users: &Users) -> Option<String> {
        let pci = |host: &HostBdf| users.of(*host, sysfs.iommu_group_of(*host)).map(str::to_owned);
        let vfs = |pf: &HostBdf| Movable::find(sysfs, *pf).map(|pf| pf.vfs()).unwrap_or_default();
        match self {
            Change::Driver { host, to, .. } => {
                let mgmtdev = format!("pci/{host}");
                let made = || vdpa::devices(sysfs).ok()?.into_iter().find(|device| device.mgmtdev == mgmtdev);
                let vdpa = || made().map(|device| format!("vDPA device {}", device.name));
                let used = pci(host).or_else(|| vfs(host).iter().find_map(pci));
                // No driver of vDPA is vfio-pci.
                used.or_else(|| if to == vfio::DRIVER { None } else { vdpa() })
            }
            Change::Vfs { pf, .. } => vfs(pf).iter().find_map(pci),
            Change::VfProfile { pf, index, .. } => vfs(pf).get(usize::try_from(*index).ok()?).and_then(pci),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    by: Identity,
    changes: Vec<Change>,
}

/// Changes that are being made.
#[derive(Debug)]
#[must_use = "the note stays until they are done or undone"]
pub struct Begun {
    path: PathBuf,
    changes: Vec<Change>,
}

impl Begun {
    /// Writes changes down. Only then may the first be made.
    ///
    /// # Errors
    /// Nothing was written, and nothing is to be done.
    pub fn note(folders: &Folders, changes: Vec<Change>) -> Result<Begun, BegunError> {
        let by = Identity::of(std::process::id()).map_err(BegunError::Identity)?;
        let folder = bound::folder(folders);
        make_private(&folder)?;
        let path = folder.join(format!("{PREFIX}{}.json", by.pid));
        let note = Note { by, changes };
        write_volatile(&path, &serde_json::to_vec(&note).expect("texts and numbers are JSON"))?;
        Ok(Begun { path, changes: note.changes })
    }

    /// All of them are made.
    pub fn done(self) {
        bound::remove(&self.path);
    }

    /// Undoes them, the last first, as far as they were made; says which.
    ///
    /// # Errors
    /// One cannot be undone, the others are; the note stays.
    pub fn undo(self, folders: &Folders) -> Result<Vec<Change>, BegunError> {
        let (mut undone, mut failed) = (Vec::new(), None);
        for change in self.changes.into_iter().rev() {
            match change.undo(folders) {
                Ok(true) => undone.push(change),
                Ok(false) => {}
                Err(source) => {
                    let error = BegunError::Undo { change, path: self.path.clone(), source };
                    failed.get_or_insert(error);
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                bound::remove(&self.path);
                Ok(undone)
            }
        }
    }
}

/// Which files are notes.
const PREFIX: &str = "begun-";

/// Undoes what commands of this user began that have died; says what, and the first error. The notes of what cannot be undone stay.
pub fn undo_of_the_dead(folders: &Folders) -> (Vec<Change>, Option<BegunError>) {
    let (mut undone, mut failed) = (Vec::new(), None);
    // One at a time: who comes second finds nothing left, and begins when all is undone. Without the folder there is nothing.
    let Ok(folder) = File::open(&folders.run) else { return (undone, failed) };
    let _lock = Flock::lock(folder, FlockArg::LockExclusive);
    for path in notes(&bound::folder(folders)) {
        let outcome = dead(&path).and_then(|begun| begun.map(|begun| begun.undo(folders)).transpose());
        match outcome {
            Ok(changes) => undone.extend(changes.into_iter().flatten()),
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
    }
    (undone, failed)
}

/// What a dead command has begun; `None` if it lives, or has just done its work.
fn dead(path: &Path) -> Result<Option<Begun>, BegunError> {
    let read = |source| BegunError::Read { path: path.to_owned(), source };
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(read)?,
    };
    let note: Note = serde_json::from_slice(&text).map_err(|error| read(error.into()))?;
    if note.by.is_alive() {
        return Ok(None);
    }
    let me = Identity::of(std::process::id()).map_err(BegunError::Identity)?;
    // What was done to another boot went with that.
    let changes = if me.boot == note.by.boot { note.changes } else { Vec::new() };
    Ok(Some(Begun { path: path.to_owned(), changes }))
}

fn notes(folder: &Path) -> Vec<PathBuf> {
    let is_note =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
    // There is no folder where nothing was ever begun.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_note).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a host without such functions: undoing finds nothing to do.
    fn changes() -> Vec<Change> {
        let host = "ffff:1f:1f.7".parse().expect("an address");
        let before = Place { driver: Some("igbvf".into()), driver_override: None };
        vec![
            Change::Driver { host, to: "vfio-pci".into(), before },
            Change::Vfs { pf: host, before: 2, wanted: 4 },
        ]
    }

    fn folders(root: &Path) -> Folders {
        Folders::from_env(true, |name| (name == "QVIRT_ROOT").then(|| root.into())).expect("a root")
    }

    #[test]
    fn what_the_dead_have_begun_is_undone_once_and_what_the_living_have_is_not() {
        let temp = tempfile::tempdir().expect("a folder");
        let folders = folders(temp.path());
        let undone = || {
            let (undone, failed) = undo_of_the_dead(&folders);
            assert!(failed.is_none(), "{failed:?}");
            undone
        };
        let none = || undone().is_empty();
        assert!(none());
        let begun = Begun::note(&folders, changes()).expect("noted");
        assert!(none() && begun.path.exists(), "its process lives");
        let mut note: Note = serde_json::from_slice(&fs::read(&begun.path).expect("a note")).expect("a note");
        assert_eq!(note.changes, changes());
        note.by.start_time += 1;
        fs::write(&begun.path, serde_json::to_vec(&note).expect("JSON")).expect("written");
        let mut last_first = changes();
        last_first.reverse();
        assert_eq!(undone(), last_first);
        assert!(none() && !begun.path.exists() && !bound::folder(&folders).exists());
        begun.done();
    }

    #[test]
    fn a_damaged_note_is_named_and_stays() {
        let temp = tempfile::tempdir().expect("a folder");
        let folders = folders(temp.path());
        let begun = Begun::note(&folders, changes()).expect("noted");
        fs::write(&begun.path, "what is this").expect("written");
        let error = undo_of_the_dead(&folders).1.expect("it is damaged").to_string();
        assert!(error.contains("begun-") && error.contains("undo by hand"), "{error}");
        assert!(begun.path.exists());
        begun.done();
    }
}
