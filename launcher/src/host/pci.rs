//! The PCI devices of this host and their IOMMU groups, as sysfs has them. Changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use devices::bdf::HostBdf;
use devices::passthrough::is_of_the_host;
use serde::Serialize;
use thiserror::Error;

use super::sysfs::{Sysfs, hex4, link, names, text};

/// A PCI device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PciDevice {
    /// Where it is.
    pub bdf: HostBdf,
    /// Class code, 24 bits: `020000` is an Ethernet controller.
    #[serde(serialize_with = "hex6")]
    pub class: u32,
    /// Vendor.
    #[serde(serialize_with = "hex4")]
    pub vendor: u16,
    /// Device, as its vendor numbers them.
    #[serde(serialize_with = "hex4")]
    pub device: u16,
    /// The driver that holds it.
    pub driver: Option<String>,
    /// Its IOMMU group; none where no IOMMU is on.
    pub iommu_group: Option<u32>,
    /// Its NUMA node; none where the firmware does not say.
    pub numa_node: Option<u32>,
    /// Of a virtual function: its physical function.
    pub pf: Option<HostBdf>,
    /// Of a physical function: its virtual functions, in the order of their index.
    pub vfs: Vec<HostBdf>,
    /// Of a physical function: how many it can have.
    pub vfs_max: Option<u32>,
    /// Its network interfaces.
    pub netdevs: Vec<String>,
}

/// The devices that can only be given to a VM together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IommuGroup {
    /// Its number.
    pub number: u32,
    /// Its members.
    pub members: Vec<PciDevice>,
}

/// What could not be told of the host's PCI devices.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum PciError {
    #[error("the devices in {} cannot be listed: is sysfs mounted?", path.display())]
    List {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "this host has no IOMMU group, so nothing can be passed through: switch the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU), and on Intel \
         boot the kernel with intel_iommu=on"
    )]
    NoIommu,
    #[error("there is no IOMMU group {number}: `qvirt host iommu` lists them")]
    NoGroup { number: u32 },
}

impl Sysfs {
    /// All PCI devices, by their place.
    ///
    /// # Errors
    /// There is no such folder. A host without PCI has an empty one.
    pub fn pci_devices(&self) -> Result<Vec<PciDevice>, PciError> {
        let path = self.path("bus/pci/devices");
        let entries = fs::read_dir(&path).map_err(|source| PciError::List { path: path.clone(), source })?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // One that goes away meanwhile is none.
        let mut devices: Vec<PciDevice> = names.filter_map(|bdf| self.pci_device(bdf)).collect();
        devices.sort_by_key(|device| device.bdf);
        Ok(devices)
    }

    /// The IOMMU group of a function.
    pub fn iommu_group_of(&self, bdf: HostBdf) -> Option<u32> {
        link(&self.path("bus/pci/devices").join(bdf.to_string()).join("iommu_group"))?.parse().ok()
    }

    fn pci_device(&self, bdf: HostBdf) -> Option<PciDevice> {
        let folder = self.path("bus/pci/devices").join(bdf.to_string());
        let text = |name: &str| text(&folder.join(name));
        let hex = |name: &str| u32::from_str_radix(text(name)?.trim_start_matches("0x"), 16).ok();
        let number = |name: &str| text(name)?.parse().ok();
        Some(PciDevice {
            bdf,
            class: hex("class")?,
            vendor: u16::try_from(hex("vendor")?).ok()?,
            device: u16::try_from(hex("device")?).ok()?,
            driver: link(&folder.join("driver")),
            iommu_group: link(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
            // The kernel says -1 where it does not know.
            numa_node: number("numa_node"),
            pf: link(&folder.join("physfn")).and_then(|name| name.parse().ok()),
            vfs: virtual_functions(&folder),
            vfs_max: number("sriov_totalvfs"),
            netdevs: netdevs(&folder),
        })
    }

    /// All IOMMU groups, or the one that is asked for.
    ///
    /// # Errors
    /// There is none, or not that one.
    pub fn iommu_groups(&self, wanted: Option<u32>) -> Result<Vec<IommuGroup>, PciError> {
        let mut groups: BTreeMap<u32, Vec<PciDevice>> = BTreeMap::new();
        for device in self.pci_devices()? {
            if let Some(number) = device.iommu_group {
                groups.entry(number).or_default().push(device);
            }
        }
        if groups.is_empty() {
            return Err(PciError::NoIommu);
        }
        if let Some(number) = wanted {
            let members = groups.remove(&number).ok_or(PciError::NoGroup { number })?;
            return Ok(vec![IommuGroup { number, members }]);
        }
        Ok(groups.into_iter().map(|(number, members)| IommuGroup { number, members }).collect())
    }
}

impl PciDevice {
    /// Whether it is a bridge between PCI buses: the kernel lets these stay with the host.
    pub fn is_bridge(&self) -> bool {
        matches!(self.class >> 8, 0x0604 | 0x0609)
    }

    /// Whether it is of a class as people name them.
    pub fn is_of(&self, class: Class) -> bool {
        self.class >> 16 == class.code()
    }
}

impl IommuGroup {
    /// Whether it has anything that a VM can be given. Bridges stay with the host.
    pub fn has_devices(&self) -> bool {
        self.members.iter().any(|member| !member.is_bridge())
    }

    /// Members whose driver is the host's: they are in the way of every other member.
    pub fn in_the_way(&self) -> impl Iterator<Item = (&PciDevice, &str)> {
        let held = self.members.iter().filter(|member| !member.is_bridge());
        held.filter_map(|member| Some((member, member.driver.as_deref()?)))
            .filter(|(_, driver)| is_of_the_host(driver))
    }
}

/// A class of PCI devices, as people name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Class {
    /// Disks and their controllers
    Storage,
    /// Network cards
    Net,
    /// Graphics cards
    Display,
    /// Sound and video cards
    Multimedia,
    /// Bridges
    Bridge,
    /// Serial buses, USB among them
    Serial,
    /// Accelerators
    Accelerator,
}

impl Class {
    fn code(self) -> u32 {
        match self {
            Class::Storage => 0x01,
            Class::Net => 0x02,
            Class::Display => 0x03,
            Class::Multimedia => 0x04,
            Class::Bridge => 0x06,
            Class::Serial => 0x0c,
            Class::Accelerator => 0x12,
        }
    }
}

/// Of the device, or of the virtio device in it.
pub(super) fn netdevs(folder: &Path) -> Vec<String> {
    let virtio = names(folder).into_iter().filter(|name| name.starts_with("virtio"));
    let folders = std::iter::once(folder.to_owned()).chain(virtio.map(|name| folder.join(name)));
    folders.flat_map(|folder| names(&folder.join("net"))).collect()
}

/// `virtfn0` and so on, by number and not by name: `virtfn10` is after `virtfn9`.
pub(super) fn virtual_functions(folder: &Path) -> Vec<HostBdf> {
    let numbered = names(folder).into_iter().filter_map(|name| {
        let index: u32 = name.strip_prefix("virtfn")?.parse().ok()?;
        Some((index, link(&folder.join(&name))?.parse().ok()?))
    });
    let by_index: BTreeMap<u32, HostBdf> = numbered.collect();
    by_index.into_values().collect()
}

fn hex6<S: serde::Serializer>(number: &u32, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{number:06x}"))
}

#[cfg(test)]
mod tests;
