//! Giving a PCI function to a vendor's vDPA driver, and back.
//!
//! `driver_override` names the one driver that may have it, so that no other function of its kind moves, which `new_id` would make them. The inverse
//! looks at the world first.

use std::fs;
use std::io;
use std::path::PathBuf;

use devices::bdf::HostBdf;
use thiserror::Error;

use super::sysfs::{Sysfs, link, text};

/// Why a function was not moved.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum DriverError {
    #[error("the host has no PCI device {bdf}: `qvirt host pci` lists them")]
    NoDevice { bdf: HostBdf },
    #[error("the kernel has no driver {driver}: load its module (`modprobe {driver}`)")]
    NoDriver { driver: String },
    #[error("{bdf} is bound to vfio-pci, for a guest that drives it itself: unbind it first")]
    ForGuest { bdf: HostBdf },
    #[error("{} cannot be written, to move {bdf}: {source}; drivers are bound as root", path.display())]
    Write { bdf: HostBdf, path: PathBuf, source: io::Error },
    #[error("driver {driver} did not take {bdf}: it may not be one for this device; `dmesg` may say why")]
    NotTaken { bdf: HostBdf, driver: String },
}

/// Where a function was before it was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    driver: Option<String>,
    driver_override: Option<String>,
}

/// A function on its way to another driver.
#[derive(Debug)]
pub struct Function<'a> {
    sysfs: &'a Sysfs,
    bdf: HostBdf,
}

impl<'a> Function<'a> {
    /// The function of that address, on its way to that driver.
    ///
    /// # Errors
    /// There is none, the kernel has no such driver, or a guest is to have it.
    pub fn find(sysfs: &'a Sysfs, bdf: HostBdf, driver: &str) -> Result<Function<'a>, DriverError> {
        let function = Function::of(sysfs, bdf)?;
        if !sysfs.path("bus/pci/drivers").join(driver).is_dir() {
            return Err(DriverError::NoDriver { driver: driver.to_owned() });
        }
        match function.driver().as_deref() {
            Some("vfio-pci") => Err(DriverError::ForGuest { bdf }),
            _ => Ok(function),
        }
    }

    /// The function of that address, wherever it is to go.
    ///
    /// # Errors
    /// There is none.
    pub fn of(sysfs: &'a Sysfs, bdf: HostBdf) -> Result<Function<'a>, DriverError> {
        let function = Function { sysfs, bdf };
        match function.folder().is_dir() {
            true => Ok(function),
            false => Err(DriverError::NoDevice { bdf }),
        }
    }

    fn folder(&self) -> PathBuf {
        self.sysfs.path("bus/pci/devices").join(self.bdf.to_string())
    }

    /// The driver that has it.
    pub fn driver(&self) -> Option<String> {
        link(&self.folder().join("driver"))
    }

    /// Moves it to a driver; tells where it was. What was begun and failed is undone.
    ///
    /// # Errors
    /// The kernel's, or the driver did not take it.
    pub fn bind(&self, driver: &str) -> Result<Before, DriverError> {
        let set = text(&self.folder().join("driver_override")).filter(|set| set != "(null)");
        let before = Before { driver: self.driver(), driver_override: set };
        if before.driver.as_deref() == Some(driver) {
            return Ok(before);
        }
        let moved = self.go(Some(driver), Some(driver));
        let taken = moved.and_then(|()| match self.driver().as_deref() == Some(driver) {
            true => Ok(()),
            false => Err(DriverError::NotTaken { bdf: self.bdf, driver: driver.to_owned() }),
        });
        if let Err(error) = taken {
            self.give_back(&before)?;
            return Err(error);
        }
        Ok(before)
    }

    /// Gives it back to where it was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give_back(&self, before: &Before) -> Result<(), DriverError> {
        self.go(before.driver_override.as_deref(), before.driver.as_deref())
    }

    /// Gives it to whichever driver the kernel chooses.
    ///
    /// # Errors
    /// The kernel's.
    pub fn release(&self) -> Result<(), DriverError> {
        self.unbind()?;
        self.write(self.folder().join("driver_override"), "\n")?;
        self.write(self.sysfs.path("bus/pci/drivers_probe"), &self.bdf.to_string())
    }

    fn go(&self, only: Option<&str>, to: Option<&str>) -> Result<(), DriverError> {
        if self.driver().as_deref() != to {
            self.unbind()?;
        }
        self.write(self.folder().join("driver_override"), only.unwrap_or("\n"))?;
        match to {
            Some(_) => self.write(self.sysfs.path("bus/pci/drivers_probe"), &self.bdf.to_string()),
            None => Ok(()),
        }
    }

    fn unbind(&self) -> Result<(), DriverError> {
        match self.driver() {
            Some(_) => self.write(self.folder().join("driver/unbind"), &self.bdf.to_string()),
            None => Ok(()),
        }
    }

    fn write(&self, path: PathBuf, words: &str) -> Result<(), DriverError> {
        fs::write(&path, words).map_err(|source| DriverError::Write { bdf: self.bdf, path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const BDF: &str = "0000:08:01.1";

    /// A function that `virtio-pci` has, and a driver for it; nobody acts on what is written.
    fn host() -> (tempfile::TempDir, Sysfs) {
        let temp = tempfile::tempdir().expect("a folder");
        let path = |path: &str| temp.path().join("bus/pci").join(path);
        for folder in
            ["drivers/virtio-pci", "drivers/vfio-pci", "drivers/vendor_vdpa", "devices/0000:08:01.1"]
        {
            fs::create_dir_all(path(folder)).expect("made");
        }
        symlink(path("drivers/virtio-pci"), path("devices/0000:08:01.1/driver")).expect("linked");
        fs::write(path("devices/0000:08:01.1/driver_override"), "(null)\n").expect("written");
        let sysfs = Sysfs::below(temp.path());
        (temp, sysfs)
    }

    fn function<'a>(sysfs: &'a Sysfs, bdf: &str, driver: &str) -> Result<Function<'a>, DriverError> {
        Function::find(sysfs, bdf.parse().expect("an address"), driver)
    }

    #[test]
    fn what_does_not_move_is_put_back() {
        let (temp, sysfs) = host();
        let written =
            |path: &str| fs::read_to_string(temp.path().join("bus/pci").join(path)).expect("written");
        let moving = function(&sysfs, BDF, "vendor_vdpa").expect("there");
        let error = moving.bind("vendor_vdpa").expect_err("nobody acts on it").to_string();
        assert!(error.starts_with("driver vendor_vdpa did not take 0000:08:01.1"), "{error}");
        assert_eq!(written("drivers/virtio-pci/unbind"), BDF);
        assert_eq!(written("drivers_probe"), BDF);
        assert_eq!(written("devices/0000:08:01.1/driver_override"), "\n", "no override, as before");
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let (temp, sysfs) = host();
        let before =
            function(&sysfs, BDF, "virtio-pci").expect("there").bind("virtio-pci").expect("it has it");
        assert_eq!(before, Before { driver: Some("virtio-pci".to_owned()), driver_override: None });
        assert!(!temp.path().join("bus/pci/drivers_probe").exists());
    }

    #[test]
    fn what_is_not_there_or_a_guests_is_refused() {
        let (temp, sysfs) = host();
        assert!(matches!(function(&sysfs, "0000:08:01.2", "vendor_vdpa"), Err(DriverError::NoDevice { .. })));
        assert!(matches!(function(&sysfs, BDF, "none"), Err(DriverError::NoDriver { .. })));
        let driver = temp.path().join("bus/pci/devices/0000:08:01.1/driver");
        fs::remove_file(&driver).expect("removed");
        symlink(temp.path().join("bus/pci/drivers/vfio-pci"), &driver).expect("linked");
        assert!(matches!(function(&sysfs, BDF, "vendor_vdpa"), Err(DriverError::ForGuest { .. })));
    }
}
