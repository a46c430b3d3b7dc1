//! Moving a PCI function between drivers: to vfio-pci for a guest, to a vendor's vDPA driver, and back.
//!
//! `driver_override` names the one driver that may have a function, so that no other function of its kind moves, which `new_id` would make them. The
//! inverse looks at the world first: a function that somebody else has moved meanwhile stays where it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use devices::bdf::HostBdf;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

use super::begun::Change;
use super::sysfs::{Sysfs, link, text};

/// Why a function was not moved.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MoveError {
    #[error("the host has no PCI device {host}: `qvirt host pci` lists them")]
    NoDevice { host: HostBdf },
    #[error("the kernel has no driver {driver}{}: install its module, so that `modprobe {driver}` loads it", said(.reason))]
    NoDriver { driver: String, reason: String },
    #[error("{} cannot be written, to move {host}: {}", path.display(), remedy(.source))]
    Write { host: HostBdf, path: PathBuf, source: io::Error },
    #[error("{driver} did not take {host}{}: it may not be one for this device; `dmesg` may say why", instead(.found))]
    NotTaken { host: HostBdf, driver: String, found: Option<String> },
    #[error("{host} has {} now, not {}: it was moved meanwhile, so try again", or_none(.found), or_none(.expected))]
    Moved { host: HostBdf, expected: Option<String>, found: Option<String> },
}

fn said(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

fn instead(found: &Option<String>) -> String {
    found.as_ref().map(|driver| format!("; {driver} has it")).unwrap_or_default()
}

fn or_none(driver: &Option<String>) -> String {
    driver.clone().unwrap_or_else(|| "no driver".to_owned())
}

fn remedy(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => format!("{error}; drivers are bound as root"),
        _ => error.to_string(),
    }
}

/// What a function has, or had: the driver that holds it, and the one driver that may.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The driver that holds it.
    pub driver: Option<String>,
    /// `driver_override`.
    pub driver_override: Option<String>,
}

/// The one driver that may have a function.
pub(super) fn override_of(folder: &Path) -> Option<String> {
    text(&folder.join("driver_override")).filter(|driver| driver != "(null)")
}

/// A function in sysfs, to be moved between drivers.
pub struct Movable<'a> {
    sysfs: &'a Sysfs,
    host: HostBdf,
    folder: PathBuf,
}

impl<'a> Movable<'a> {
    /// The function.
    ///
    /// # Errors
    /// There is none.
    pub fn find(sysfs: &'a Sysfs, host: HostBdf) -> Result<Movable<'a>, MoveError> {
        let folder = sysfs.path("bus/pci/devices").join(host.to_string());
        if !folder.exists() {
            return Err(MoveError::NoDevice { host });
        }
        Ok(Movable { sysfs, host, folder })
    }

    /// Where it is.
    pub fn host(&self) -> HostBdf {
        self.host
    }

    /// The driver that holds it.
    pub fn driver(&self) -> Option<String> {
        link(&self.folder.join("driver"))
    }

    /// What it has now.
    pub fn place(&self) -> Place {
        Place { driver: self.driver(), driver_override: override_of(&self.folder) }
    }

    /// Its way from a place to a driver, to be written down before it goes.
    pub fn change(&self, before: &Place, to: &str) -> Change {
        Change::Driver { host: self.host, to: to.to_owned(), before: before.clone() }
    }

    /// Its virtual functions.
    pub fn vfs(&self) -> Vec<HostBdf> {
        super::pci::virtual_functions(&self.folder)
    }

    /// Binds it to a driver, if it still has the one that it was planned with. Inverse: [`Movable::give_back`].
    ///
    /// # Errors
    /// It is back with the driver it had, as far as that can be done.
    pub fn bind(&self, driver: &str, before: &Place) -> Result<(), MoveError> {
        let found = self.driver();
        if found.as_deref() == Some(driver) {
            return Ok(());
        }
        if found != before.driver {
            return Err(MoveError::Moved { host: self.host, expected: before.driver.clone(), found });
        }
        self.sysfs.load_driver(driver)?;
        self.move_to(driver).inspect_err(|_| {
            if let Err(error) = self.give_back(driver, before) {
                warn!(host = %self.host, %error, "it could not be given back");
            }
        })
    }

    /// Gives it from a driver back to the one that it had, unless somebody else has moved it.
    ///
    /// # Errors
    /// The driver does not take it; trying again later is safe.
    pub fn give_back(&self, from: &str, before: &Place) -> Result<(), MoveError> {
        let now = self.place();
        match now.driver {
            // Whoever died, or failed, before it was moved has left our override at most.
            Some(driver) if Some(&driver) == before.driver.as_ref() => {
                if now.driver_override.as_deref() != Some(from) {
                    return Ok(());
                }
            }
            Some(driver) if driver != from => {
                warn!(host = %self.host, driver, "somebody else has bound it meanwhile: it stays there");
                return Ok(());
            }
            // Bound to nothing by us a moment ago, or by whoever died in between.
            _ => {
                self.unbind()?;
                if let Some(driver) = &before.driver {
                    self.move_to(driver)?;
                }
            }
        }
        self.set_override(before.driver_override.as_deref())
    }

    /// Gives it to the driver that the kernel finds for it, if it finds one.
    ///
    /// # Errors
    /// sysfs cannot be written.
    pub fn give_to_anyone(&self) -> Result<(), MoveError> {
        self.unbind()?;
        self.set_override(None)?;
        self.probe()
    }

    fn move_to(&self, driver: &str) -> Result<(), MoveError> {
        self.set_override(Some(driver))?;
        self.unbind()?;
        self.probe()?;
        match self.driver() {
            Some(found) if found == driver => Ok(()),
            found => Err(MoveError::NotTaken { host: self.host, driver: driver.to_owned(), found }),
        }
    }

    fn probe(&self) -> Result<(), MoveError> {
        self.write(&self.sysfs.path("bus/pci/drivers_probe"), &self.host.to_string())
    }

    /// Takes it from its driver, if it has one.
    fn unbind(&self) -> Result<(), MoveError> {
        match self.driver() {
            Some(_) => self.write(&self.folder.join("driver/unbind"), &self.host.to_string()),
            None => Ok(()),
        }
    }

    fn set_override(&self, driver: Option<&str>) -> Result<(), MoveError> {
        // Who may not write it has not changed it either.
        if override_of(&self.folder).as_deref() == driver {
            return Ok(());
        }
        // An empty line clears it.
        self.write(&self.folder.join("driver_override"), &format!("{}\n", driver.unwrap_or_default()))
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), MoveError> {
        let failed = |source| MoveError::Write { host: self.host, path: path.to_owned(), source };
        fs::write(path, text).map_err(failed)
    }
}

impl Sysfs {
    /// Sees to it that the kernel has a driver of PCI functions. It is a module, as a rule, which nobody may have loaded yet.
    ///
    /// # Errors
    /// It has none.
    fn load_driver(&self, driver: &str) -> Result<(), MoveError> {
        self.modprobe(driver, &[], || self.has_driver(driver))
    }

    /// Whether the kernel has a driver of PCI functions, or would have it once it is needed. Nothing is loaded.
    ///
    /// # Errors
    /// It has none.
    pub fn knows_driver(&self, driver: &str) -> Result<(), MoveError> {
        self.modprobe(driver, &["--dry-run"], || true)
    }

    fn has_driver(&self, driver: &str) -> bool {
        self.path("bus/pci/drivers").join(driver).exists()
    }

    fn modprobe(&self, driver: &str, how: &[&str], is_done: impl Fn() -> bool) -> Result<(), MoveError> {
        if self.has_driver(driver) {
            return Ok(());
        }
        let reason = match Command::new("modprobe").args(how).args(["--", driver]).output() {
            Ok(output) if output.status.success() && is_done() => return Ok(()),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("modprobe: {error}"),
        };
        Err(MoveError::NoDriver { driver: driver.to_owned(), reason })
    }
}

#[cfg(test)]
mod tests;
