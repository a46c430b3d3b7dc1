//! What a command that changes this host has begun: written down before it is done, gone when it is done or undone.
//!
//! A command that dies in between leaves its note. The next one that changes the host, or `qvirt recover`, undoes what it says, after a look at the
//! world: only what is there and as the dead one may have left it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use devices::bdf::HostBdf;
use devices::vf::VfProfile;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

use super::bound;
use super::movable::{Movable, MoveError, Place};
use super::sriov::SriovError;
use super::sysfs::Sysfs;
use super::vfio::{self, Users, VfioError};
use crate::folders::{Folders, FoldersError, WriteError, make_private, write_volatile};
use crate::injection::Steps;
use crate::lease::{LeaseError, Leases};
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
    #[error(transparent)]
    Leases(#[from] LeaseError),
    #[error("{change} could not be undone: mend that, then `qvirt recover`")]
    Undo { change: Change, source: Box<dyn std::error::Error + Send + Sync> },
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
            Change::Vfs { pf, before } => write!(f, "the number of virtual functions of {pf}, once {before}"),
            Change::VfProfile { pf, index, .. } => {
                write!(f, "the profile of virtual function {index} of {pf}")
            }
        }
    }
}

impl Change {
    /// Undoes it as far as it was done.
    fn undo(&self, folders: &Folders, sysfs: &Sysfs, users: &Users) -> Result<(), BegunError> {
        let failed = |source| BegunError::Undo { change: self.clone(), source };
        match self {
            Change::Driver { host, to, before } => {
                match Movable::find(sysfs, *host) {
                    Err(MoveError::NoDevice { .. }) => {}
                    function => function
                        .and_then(|function| function.give_back(to, before))
                        .map_err(|error| failed(error.into()))?,
                }
                bound::forget(folders, *host);
                Ok(())
            }
            Change::Vfs { pf, before } => match sysfs.pf(&pf.to_string()) {
                Err(SriovError::NoPf { .. }) => Ok(()),
                // It was never begun.
                Ok(pf) if u32::try_from(pf.vfs.len()) == Ok(*before) => Ok(()),
                found => found
                    .and_then(|pf| sysfs.set_vfs(&pf, *before, users, &mut Steps::of("undo")))
                    .map_err(|error| failed(error.into())),
            },
            Change::VfProfile { pf, index, before, wanted } => {
                match vfio::restore_profile(sysfs, *pf, *index, before, wanted) {
                    Err(VfioError::NoInterface { .. }) | Ok(()) => Ok(()),
                    Err(error) => Err(failed(error.into())),
                }
            }
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
        folders.make()?;
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

    /// Undoes them, the last first, as far as they were made.
    ///
    /// # Errors
    /// One cannot be undone; the note stays.
    pub fn undo(self, folders: &Folders, users: &Users) -> Result<(), BegunError> {
        let sysfs = Sysfs::default();
        self.changes.iter().rev().try_for_each(|change| change.undo(folders, &sysfs, users))?;
        bound::remove(&self.path);
        Ok(())
    }
}

/// Which files are notes.
const PREFIX: &str = "begun-";

/// Undoes what commands of this user began that have died; says what.
///
/// # Errors
/// One cannot be read or undone; its note stays.
pub fn undo_of_the_dead(folders: &Folders) -> Result<Vec<Change>, BegunError> {
    let mut undone = Vec::new();
    for path in notes(&bound::folder(folders)) {
        let read = |source| BegunError::Read { path: path.clone(), source };
        let text = match fs::read(&path) {
            // Its process has just done its work.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text.map_err(read)?,
        };
        let note: Note = serde_json::from_slice(&text).map_err(|error| read(error.into()))?;
        if note.by.is_alive() {
            continue;
        }
        warn!(pid = note.by.pid, changes = ?note.changes, "a command has died at work: what it began is undone");
        // What it did to another boot went with that.
        let of_this_boot = Identity::of(std::process::id()).is_ok_and(|me| me.boot == note.by.boot);
        let changes = if of_this_boot { note.changes } else { Vec::new() };
        let users = Users::find(&Leases::open(&folders.leases)?);
        Begun { path, changes: changes.clone() }.undo(folders, &users)?;
        undone.extend(changes);
    }
    Ok(undone)
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
        vec![Change::Driver { host, to: "vfio-pci".into(), before }, Change::Vfs { pf: host, before: 2 }]
    }

    fn folders(root: &Path) -> Folders {
        Folders::from_env(true, |name| (name == "QVIRT_ROOT").then(|| root.into())).expect("a root")
    }

    #[test]
    fn what_the_dead_have_begun_is_undone_once_and_what_the_living_have_is_not() {
        let temp = tempfile::tempdir().expect("a folder");
        let folders = folders(temp.path());
        let none = || undo_of_the_dead(&folders).expect("nothing to do").is_empty();
        assert!(none());
        let begun = Begun::note(&folders, changes()).expect("noted");
        assert!(none() && begun.path.exists(), "its process lives");
        let mut note: Note = serde_json::from_slice(&fs::read(&begun.path).expect("a note")).expect("a note");
        assert_eq!(note.changes, changes());
        note.by.start_time += 1;
        fs::write(&begun.path, serde_json::to_vec(&note).expect("JSON")).expect("written");
        assert_eq!(undo_of_the_dead(&folders).expect("undone"), changes());
        assert!(none() && !begun.path.exists() && !bound::folder(&folders).exists());
        begun.done();
    }

    #[test]
    fn a_damaged_note_is_named_and_stays() {
        let temp = tempfile::tempdir().expect("a folder");
        let folders = folders(temp.path());
        let begun = Begun::note(&folders, changes()).expect("noted");
        fs::write(&begun.path, "what is this").expect("written");
        let error = undo_of_the_dead(&folders).expect_err("damaged").to_string();
        assert!(error.contains("begun-") && error.contains("undo by hand"), "{error}");
        assert!(begun.path.exists());
        begun.done();
    }
}
