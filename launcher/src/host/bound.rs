//! Functions that `qvirt host bind` has taken from their drivers, and what they had: written down before it is done, and gone with the boot, as the
//! bindings are.

use std::fs;
use std::path::{Path, PathBuf};

use devices::bdf::HostBdf;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::movable::{Movable, MoveError, Place};
use super::vfio::DRIVER;
use crate::folders::{Folders, WriteError, make_private, write_volatile};
use crate::process::BootId;

/// Why a function was not moved.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum BoundError {
    #[error(transparent)]
    Move(#[from] MoveError),
    #[error("what {host} had could not be written down, so it was not moved")]
    Write { host: HostBdf, source: WriteError },
    #[error("the folder of what was bound")]
    Folder(#[from] crate::folders::FoldersError),
    #[error("this boot has no id: is /proc mounted?")]
    Boot(#[from] std::io::Error),
    #[error("{host} is not bound to {DRIVER}: {}", has(.found))]
    NotBound { host: HostBdf, found: Option<String> },
}

fn has(driver: &Option<String>) -> String {
    driver.as_ref().map_or_else(|| "it has no driver".to_owned(), |driver| format!("it has {driver}"))
}

/// What a function had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    boot: BootId,
    #[serde(flatten)]
    place: Place,
}

/// The folder of what commands note of this host.
pub(super) fn folder(folders: &Folders) -> PathBuf {
    // A dot first: no VM is called so.
    folders.run.join(".host")
}

/// Removes a note, and the folder with the last one.
pub(super) fn remove(note: &Path) {
    // One that stays is looked at before it is believed: whether its process lives, or its boot.
    let _ = fs::remove_file(note);
    // While there are others, this fails.
    let _ = note.parent().map(fs::remove_dir);
}

fn note(folder: &Path, host: HostBdf) -> PathBuf {
    folder.join(format!("bound-{host}.json"))
}

/// Forgets that a function had that, which it has again. What it had before, when an `unbind` died at work, is still to be given back.
pub(super) fn forget(folders: &Folders, host: HostBdf, had: &Place) {
    let path = note(&folder(folders), host);
    if read(&path).is_some_and(|before| before.place == *had) {
        remove(&path);
    }
}

fn read(note: &Path) -> Option<Before> {
    serde_json::from_slice(&fs::read(note).ok()?).ok()
}

/// The notes.
pub struct Bound {
    folder: PathBuf,
    boot: BootId,
}

impl Bound {
    /// Those of this user. Nothing is made.
    ///
    /// # Errors
    /// This boot has no id.
    pub fn of(folders: &Folders) -> Result<Bound, BoundError> {
        Ok(Bound { folder: folder(folders), boot: BootId::current()? })
    }

    /// Binds a function to vfio-pci, which has that now.
    ///
    /// # Errors
    /// It has what it had.
    pub fn bind(&self, folders: &Folders, function: &Movable<'_>, place: &Place) -> Result<(), BoundError> {
        if place.driver.as_deref() == Some(DRIVER) {
            return Ok(());
        }
        let host = function.host();
        // Where an `unbind` died at work there is one already, of what is still to be given back.
        if place.driver.is_some() || self.before(host).is_none() {
            let before = Before { boot: self.boot.clone(), place: place.clone() };
            folders.make()?;
            make_private(&self.folder)?;
            let text = serde_json::to_vec(&before).expect("a struct of texts is JSON");
            write_volatile(&self.path(host), &text).map_err(|source| BoundError::Write { host, source })?;
        }
        Ok(function.bind(DRIVER, place).inspect_err(|_| forget(folders, host, place))?)
    }

    /// Gives a function back to the driver that it had; where that is not known, to the one that the kernel finds for it.
    ///
    /// # Errors
    /// It is not bound, or its driver does not take it.
    pub fn unbind(&self, function: &Movable<'_>) -> Result<(), BoundError> {
        self.can_unbind(function)?;
        let host = function.host();
        match self.before(host) {
            Some(before) => function.give_back(DRIVER, &before.place)?,
            None => function.give_to_anyone()?,
        }
        self.forget(host);
        Ok(())
    }

    /// Whether a function is bound to vfio-pci, or to nothing by an `unbind` that died at work.
    ///
    /// # Errors
    /// It is not.
    pub fn can_unbind(&self, function: &Movable<'_>) -> Result<(), BoundError> {
        let (host, found) = (function.host(), function.driver());
        match found.as_deref() {
            Some(DRIVER) => Ok(()),
            None if self.before(host).is_some() => Ok(()),
            _ => Err(BoundError::NotBound { host, found }),
        }
    }

    /// The driver that a function would get back; `None` if that is not known.
    pub fn driver_before(&self, host: HostBdf) -> Option<Option<String>> {
        self.before(host).map(|before| before.place.driver)
    }

    fn before(&self, host: HostBdf) -> Option<Before> {
        read(&self.path(host)).filter(|before| before.boot == self.boot)
    }

    fn forget(&self, host: HostBdf) {
        remove(&self.path(host));
    }

    fn path(&self, host: HostBdf) -> PathBuf {
        note(&self.folder, host)
    }
}
