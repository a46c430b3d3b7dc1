//! Virtual functions of the host: how many a physical one has, and who uses them.
//!
//! The kernel changes the number through none at all, which destroys those that are in use: they are looked at first.

use std::fs;
use std::io;
use std::path::PathBuf;

use devices::bdf::HostBdf;
use thiserror::Error;

use super::link::{self, LinkError};
use super::pci::{PciDevice, PciError};
use super::sysfs::{Sysfs, link as link_of, names};
use super::vfio::Users;
use crate::injection::{Injected, Steps};

/// Why there are not as many virtual functions as were asked for.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum SriovError {
    #[error(transparent)]
    List(#[from] PciError),
    #[error(
        "there is no physical function {name}: name its interface, its accelerator or its address (`qvirt host pci` lists them)"
    )]
    NoPf { name: String },
    #[error("{pf} has no virtual function {index}: it has {}", counted(*.found))]
    NoVf { pf: HostBdf, index: u32, found: usize },
    #[error("{pf} can have {max} virtual functions at most: ask for no more")]
    TooMany { pf: HostBdf, max: u32 },
    #[error("virtual function {vf} of {pf} is used by {holder}: detach it there first")]
    InUse { pf: HostBdf, vf: HostBdf, holder: String },
    #[error("{} does not take {number}: {source}; {}", path.display(), remedy(.source))]
    Write { path: PathBuf, number: u32, source: io::Error },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Injected(#[from] Injected),
}

fn counted(number: usize) -> String {
    match number {
        0 => "none (`qvirt host sriov PF --vfs N` makes them)".to_owned(),
        1 => "one, number 0".to_owned(),
        more => format!("{more}, from 0 on"),
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => "run as root",
        Some(libc::EBUSY) => "something uses them: `qvirt host sriov PF` shows what is known",
        _ => "`dmesg` may say why",
    }
}

/// What HPRE and its siblings can have, whatever their registers say.
const ACCELERATOR_VFS: u32 = 63;

impl Sysfs {
    /// The physical function of that interface, accelerator (`hisi_hpre-0`) or address.
    ///
    /// # Errors
    /// There is none.
    pub fn pf(&self, name: &str) -> Result<PciDevice, SriovError> {
        let device = link_of(&self.path("class/uacce").join(name).join("device"));
        let address = device.as_deref().unwrap_or(name).parse::<HostBdf>().ok();
        let is_it = |device: &PciDevice| {
            device.vfs_max.is_some()
                && (Some(device.bdf) == address || device.netdevs.iter().any(|netdev| netdev == name))
        };
        let found = self.pci_devices()?.into_iter().find(is_it);
        found.ok_or_else(|| SriovError::NoPf { name: name.to_owned() })
    }

    /// How many virtual functions a physical one can have.
    pub fn vfs_max(&self, pf: &PciDevice) -> u32 {
        let max = pf.vfs_max.unwrap_or_default();
        let uacce = self.path("bus/pci/devices").join(pf.bdf.to_string()).join("uacce");
        if names(&uacce).is_empty() { max } else { max.min(ACCELERATOR_VFS) }
    }

    /// Gives a physical function so many virtual ones, and sets its interface up. Nothing is done where it has them.
    ///
    /// # Errors
    /// They are too many, one that there is now is in use, or the kernel refuses.
    pub fn set_vfs(
        &self,
        pf: &PciDevice,
        number: u32,
        users: &Users,
        steps: &mut Steps,
    ) -> Result<(), SriovError> {
        self.can_set_vfs(pf, number, users)?;
        let before = u32::try_from(pf.vfs.len()).unwrap_or(u32::MAX);
        if before != number {
            if before != 0 {
                steps.enter("none")?;
                self.write_vfs(pf, 0)?;
            }
            if number != 0 {
                steps.enter("number")?;
                self.write_vfs(pf, number)?;
            }
        }
        steps.enter("up")?;
        for netdev in pf.netdevs.iter().filter(|_| number != 0) {
            let link = link::show(netdev)?;
            if !link.up {
                link::set_up(link.index)?;
            }
        }
        Ok(())
    }

    /// What speaks against so many.
    ///
    /// # Errors
    /// As [`Sysfs::set_vfs`], before anything was done.
    pub fn can_set_vfs(&self, pf: &PciDevice, number: u32, users: &Users) -> Result<(), SriovError> {
        let max = self.vfs_max(pf);
        if number > max {
            return Err(SriovError::TooMany { pf: pf.bdf, max });
        }
        if pf.vfs.len() == usize::try_from(number).unwrap_or(usize::MAX) {
            return Ok(());
        }
        let used =
            pf.vfs.iter().find_map(|vf| Some((*vf, users.of(*vf, self.iommu_group_of(*vf))?.to_owned())));
        match used {
            Some((vf, holder)) => Err(SriovError::InUse { pf: pf.bdf, vf, holder }),
            None => Ok(()),
        }
    }

    fn write_vfs(&self, pf: &PciDevice, number: u32) -> Result<(), SriovError> {
        let path = self.path("bus/pci/devices").join(pf.bdf.to_string()).join("sriov_numvfs");
        fs::write(&path, number.to_string()).map_err(|source| SriovError::Write { path, number, source })
    }
}

#[cfg(test)]
mod tests;
