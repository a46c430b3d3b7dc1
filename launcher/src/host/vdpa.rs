//! vDPA devices of this host: seen, made and deleted by generic netlink, as `vdpa` of iproute2 does; their char devices opened.
//!
//! The kernel tells class, queues and management device; sysfs the driver and the char device. What is in use is told by leases, and by who has
//! the char device open: only one process at a time can.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::DeviceConfig;
use devices::host::{HostFacts, HostVdpa, NewVdpa, VdpaClass};
use devices::units::Mac;
use serde::Serialize;
use thiserror::Error;
use tracing::warn;

use super::genl::{Attribute, Attributes, Family, GenlError};
use super::sysfs::{Sysfs, link, names};
use crate::users;

/// The family, its commands and attributes (linux/vdpa.h).
const FAMILY: &str = "vdpa";
const VERSION: u8 = 1;
const GET_MGMTDEV: u8 = 2;
const NEW_DEVICE: u8 = 3;
const DELETE_DEVICE: u8 = 4;
const GET_DEVICE: u8 = 5;
const GET_CONFIG: u8 = 6;
const MGMTDEV_BUS: u16 = 1;
const MGMTDEV_NAME: u16 = 2;
const CLASSES: u16 = 3;
const NAME: u16 = 4;
const ID: u16 = 5;
const VENDOR: u16 = 6;
const MAX_QUEUES: u16 = 7;
const MAX_QUEUE_SIZE: u16 = 8;
const MAC: u16 = 10;
const MAX_PAIRS: u16 = 12;
const MTU: u16 = 13;
const MGMTDEV_QUEUES: u16 = 15;

/// How long the char device of a new device may take: the kernel makes it at once, udev may take it away for a moment.
const APPEARING: Duration = Duration::from_secs(2);

/// Why something could not be done with vDPA devices.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum VdpaError {
    #[error(
        "the kernel has no vDPA: load the module (`modprobe vdpa`), and one that has devices, such as `vduse` or your card's"
    )]
    NoVdpa,
    #[error("cannot {step}{}", next_step(.source))]
    Kernel { step: String, source: GenlError },
    #[error("there is no vDPA device {name}: `qvirt host vdpa show` lists them")]
    NoDevice { name: String },
    #[error("there is no vDPA management device {name}: this host has {known}")]
    NoMgmtdev { name: String, known: String },
    #[error(
        "there is a vDPA device {name} already: choose another name, or delete it (`qvirt host vdpa del {name}`)"
    )]
    Exists { name: String },
    #[error("vDPA device {name} is used by {holder}: detach it there first")]
    InUse { name: String, holder: String },
    #[error("{} of vDPA device {name} does not exist: `modprobe vhost_vdpa`, and see that the driver has the device (`qvirt host vdpa show`)", node.display())]
    NoNode { name: String, node: PathBuf, source: io::Error },
    #[error("no permission to open {} of vDPA device {name}: run as root, or give your group access to it by a udev rule", node.display())]
    Permission { name: String, node: PathBuf, source: io::Error },
    #[error("{} of vDPA device {name} is open in {holder}, and only one can have it: end that first", node.display())]
    Busy { name: String, node: PathBuf, holder: String, source: io::Error },
    #[error("cannot open {} of vDPA device {name}", node.display())]
    Open { name: String, node: PathBuf, source: io::Error },
}

fn next_step(error: &GenlError) -> &'static str {
    match error.errno() {
        libc::EPERM | libc::EACCES => ": it needs CAP_NET_ADMIN; run as root",
        libc::EEXIST => ": there is one of that name; choose another",
        libc::EOPNOTSUPP => {
            ": the management device does not do that; `qvirt host vdpa mgmtdevs` shows what it does"
        }
        libc::ENOSPC => ": the management device has as many as it can; delete one (`qvirt host vdpa del`)",
        libc::EINVAL => {
            ": a device of VDUSE must be served first (by qemu-storage-daemon, say), under the same name"
        }
        libc::EBUSY => ": somebody uses it; `qvirt host vdpa show` tells who",
        _ => "",
    }
}

/// A management device: what makes vDPA devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mgmtdev {
    /// `pci/0000:08:01.1`, or `vduse`.
    pub name: String,
    /// The classes that it can make, by virtio's words: `net`, `blk`, or the number.
    pub classes: Vec<String>,
    /// Virtqueues at most.
    pub max_queues: Option<u64>,
}

/// A vDPA device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VdpaDevice {
    /// Its name.
    pub name: String,
    /// `net`, `blk`, or virtio's number of the class.
    pub class: String,
    /// What made it.
    pub mgmtdev: String,
    /// Virtio's number of the vendor.
    pub vendor: Option<u64>,
    /// Virtqueues at most.
    pub max_queues: Option<u64>,
    /// Their size at most.
    pub max_queue_size: Option<u64>,
    /// Of a network device: its address, where we may ask.
    pub mac: Option<Mac>,
    /// The driver that has it: `vhost_vdpa` for guests, `virtio_vdpa` for the host itself.
    pub driver: Option<String>,
    /// Its char device.
    pub node: Option<String>,
}

/// What a new device is to be.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// Its name.
    pub name: String,
    /// The management device that makes it.
    pub mgmtdev: String,
    /// Of a network device: its address.
    pub mac: Option<Mac>,
    /// Of a network device: its queue pairs at most.
    pub max_pairs: Option<u16>,
    /// Of a network device: its MTU.
    pub mtu: Option<u16>,
}

/// Virtio's numbers of the classes, with the words that `vdpa` of iproute2 has for them.
const CLASS_WORDS: [(u64, &str); 3] = [(1, "net"), (2, "blk"), (26, "fs")];

fn class_word(id: u64) -> String {
    let known = CLASS_WORDS.iter().find(|(number, _)| *number == id);
    known.map_or_else(|| id.to_string(), |(_, word)| (*word).to_owned())
}

fn family() -> Result<Option<Family>, VdpaError> {
    Family::find(FAMILY, VERSION).map_err(kernel("ask the kernel for vDPA"))
}

fn kernel(step: impl Into<String>) -> impl FnOnce(GenlError) -> VdpaError {
    |source| VdpaError::Kernel { step: step.into(), source }
}

fn handle(found: &Attributes) -> Option<String> {
    let name = found.text(MGMTDEV_NAME)?;
    Some(found.text(MGMTDEV_BUS).map_or_else(|| name.clone(), |bus| format!("{bus}/{name}")))
}

/// The management devices, by name; none where the kernel has no vDPA.
///
/// # Errors
/// The kernel's.
pub fn mgmtdevs() -> Result<Vec<Mgmtdev>, VdpaError> {
    let Some(family) = family()? else { return Ok(Vec::new()) };
    let found = family.dump(GET_MGMTDEV).map_err(kernel("list vDPA management devices"))?;
    let mut all: Vec<Mgmtdev> = found.iter().filter_map(read_mgmtdev).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn read_mgmtdev(found: &Attributes) -> Option<Mgmtdev> {
    let bits = found.number(CLASSES).unwrap_or(0);
    let classes = (0..64).filter(|id| bits >> id & 1 == 1).map(class_word).collect();
    Some(Mgmtdev { name: handle(found)?, classes, max_queues: found.number(MGMTDEV_QUEUES) })
}

/// The vDPA devices, by name; none where the kernel has no vDPA.
///
/// # Errors
/// The kernel's.
pub fn devices(sysfs: &Sysfs) -> Result<Vec<VdpaDevice>, VdpaError> {
    let Some(family) = family()? else { return Ok(Vec::new()) };
    let found = family.dump(GET_DEVICE).map_err(kernel("list vDPA devices"))?;
    let mut all: Vec<VdpaDevice> = found.iter().filter_map(|found| read_device(found, sysfs)).collect();
    for device in all.iter_mut().filter(|device| device.class == "net") {
        // Only root may ask; whoever may not does without.
        let config = family.get(GET_CONFIG, &[Attribute::text(NAME, &device.name)]).unwrap_or_default();
        device.mac = config.bytes(MAC).and_then(mac);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn read_device(found: &Attributes, sysfs: &Sysfs) -> Option<VdpaDevice> {
    let name = found.text(NAME)?;
    let folder = sysfs.path("bus/vdpa/devices").join(&name);
    let node = names(&folder).into_iter().find(|entry| entry.starts_with("vhost-vdpa-"));
    Some(VdpaDevice {
        class: class_word(found.number(ID)?),
        mgmtdev: handle(found).unwrap_or_default(),
        vendor: found.number(VENDOR),
        max_queues: found.number(MAX_QUEUES),
        max_queue_size: found.number(MAX_QUEUE_SIZE),
        mac: None,
        driver: link(&folder.join("driver")),
        node: node.map(|node| format!("/dev/{node}")),
        name,
    })
}

/// An address that is not null.
fn mac(bytes: &[u8]) -> Option<Mac> {
    let text: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.join(":").parse().ok().filter(|_| bytes.iter().any(|byte| *byte != 0))
}

impl VdpaDevice {
    /// What planning must know of it.
    fn facts(&self) -> HostVdpa {
        HostVdpa {
            name: self.name.clone(),
            node: self.node.clone(),
            driver: self.driver.clone(),
            class: Some(match self.class.as_str() {
                "net" => VdpaClass::Net,
                "blk" => VdpaClass::Block,
                _ => VdpaClass::Other,
            }),
            in_software: HostVdpa::is_in_software(&self.mgmtdev),
            max_queues: self.max_queues.and_then(|queues| queues.try_into().ok()),
            mac: self.mac,
        }
    }
}

/// Adds what planning must know of this host's vDPA devices; nothing where no device wants one.
pub fn learn<'a>(facts: &mut HostFacts, wanted: impl IntoIterator<Item = &'a DeviceConfig>) {
    if !wanted.into_iter().any(|device| matches!(device, DeviceConfig::Vdpa(_))) {
        return;
    }
    match devices(&Sysfs::default()) {
        Ok(found) => facts.vdpa = found.iter().map(VdpaDevice::facts).collect(),
        // What is not known is refused by name, as if it was not there.
        Err(error) => warn!(error = crate::request::chain(&error), "vDPA devices could not be listed"),
    }
}

impl NewDevice {
    /// What a VM wants, under that name.
    pub fn wanted(new: &NewVdpa, name: &str) -> NewDevice {
        let (name, mgmtdev) = (name.to_owned(), new.mgmtdev.clone());
        NewDevice { name, mgmtdev, mac: new.mac, max_pairs: None, mtu: None }
    }
}

/// Makes a device. Inverse: [`delete`].
///
/// # Errors
/// The kernel's, or there is no such management device.
pub fn add(new: &NewDevice) -> Result<(), VdpaError> {
    let family = family()?.ok_or(VdpaError::NoVdpa)?;
    is_free(new, false)?;
    let (bus, name) = match new.mgmtdev.split_once('/') {
        Some((bus, name)) => (Some(bus), name),
        None => (None, new.mgmtdev.as_str()),
    };
    let mut attributes = vec![Attribute::text(NAME, &new.name), Attribute::text(MGMTDEV_NAME, name)];
    attributes.extend(bus.map(|bus| Attribute::text(MGMTDEV_BUS, bus)));
    attributes.extend(new.mac.map(|mac| Attribute::bytes(MAC, &mac.bytes())));
    attributes.extend(new.max_pairs.map(|pairs| Attribute::bytes(MAX_PAIRS, &pairs.to_ne_bytes())));
    attributes.extend(new.mtu.map(|mtu| Attribute::bytes(MTU, &mtu.to_ne_bytes())));
    let step = format!("make vDPA device {} at {}", new.name, new.mgmtdev);
    family.change(NEW_DEVICE, &attributes).map_err(kernel(step))
}

/// Whether there is a management device for it and no device of its name. `to_come` is that the management device need not be there yet.
///
/// # Errors
/// What speaks against it.
pub fn is_free(new: &NewDevice, to_come: bool) -> Result<(), VdpaError> {
    let known = mgmtdevs()?;
    if !to_come && !known.iter().any(|mgmtdev| mgmtdev.name == new.mgmtdev) {
        let known: Vec<String> = known.into_iter().map(|mgmtdev| mgmtdev.name).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(VdpaError::NoMgmtdev { name: new.mgmtdev.clone(), known });
    }
    match devices(&Sysfs::default())?.iter().any(|device| device.name == new.name) {
        true => Err(VdpaError::Exists { name: new.name.clone() }),
        false => Ok(()),
    }
}

/// Deletes a device.
///
/// # Errors
/// The kernel's; there is none of that name; or somebody has it open, and the kernel would wait for them.
pub fn delete(name: &str) -> Result<(), VdpaError> {
    let family = family()?.ok_or(VdpaError::NoVdpa)?;
    let found = devices(&Sysfs::default())?.into_iter().find(|device| device.name == name);
    let device = found.ok_or_else(|| VdpaError::NoDevice { name: name.to_owned() })?;
    if let Some(pid) = device.node.as_ref().and_then(|node| users::of(Path::new(node)).first().copied()) {
        return Err(VdpaError::InUse { name: name.to_owned(), holder: users::name(pid) });
    }
    let step = format!("delete vDPA device {name}");
    family.change(DELETE_DEVICE, &[Attribute::text(NAME, name)]).map_err(kernel(step))
}

/// Deletes a device that was made for a VM, if there is one of that name and that management device.
///
/// # Errors
/// As [`delete`].
pub fn delete_made(name: &str, mgmtdev: &str) -> Result<(), VdpaError> {
    let found = devices(&Sysfs::default())?;
    match found.iter().any(|device| device.name == name && device.mgmtdev == mgmtdev) {
        true => delete(name),
        false => Ok(()),
    }
}

/// The char device of a device that was just made.
fn node_of(name: &str) -> Result<String, VdpaError> {
    let until = Instant::now() + APPEARING;
    loop {
        let found = devices(&Sysfs::default())?.into_iter().find(|device| device.name == name);
        let node = found.and_then(|device| device.node);
        if let Some(node) = node.filter(|node| Path::new(node).exists()) {
            return Ok(node);
        }
        if Instant::now() > until {
            let (node, source) = ("the char device".into(), io::ErrorKind::NotFound.into());
            return Err(VdpaError::NoNode { name: name.to_owned(), node, source });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Opens a device's char device for QEMU; one that was just made has none that was known before.
///
/// # Errors
/// It is not there, not ours to open, or somebody has it.
pub fn open(name: &str, node: Option<&str>) -> Result<OwnedFd, VdpaError> {
    let node = &node.map_or_else(|| node_of(name), |node| Ok(node.to_owned()))?;
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(node);
    opened.map(OwnedFd::from).map_err(|source| {
        let (name, node) = (name.to_owned(), PathBuf::from(node));
        match source.raw_os_error() {
            Some(libc::EBUSY) => {
                let users: Vec<String> = users::of(&node).into_iter().map(users::name).collect();
                let holder =
                    if users.is_empty() { "a process of another user".to_owned() } else { users.join(", ") };
                VdpaError::Busy { name, node, holder, source }
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => VdpaError::NoNode { name, node, source },
            Some(libc::EACCES | libc::EPERM) => VdpaError::Permission { name, node, source },
            _ => VdpaError::Open { name, node, source },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_is_told_by_its_reason() {
        let missing = open("vdpa0", Some("/nonexistent/vhost-vdpa-0")).expect_err("missing").to_string();
        assert!(missing.contains("modprobe vhost_vdpa") && missing.contains("vdpa0"), "{missing}");
        let folder = open("vdpa0", Some("/")).expect_err("a folder").to_string();
        assert!(folder.starts_with("cannot open /"), "{folder}");
    }

    #[test]
    fn addresses_are_read_and_a_null_one_is_none() {
        assert_eq!(
            mac(&[0x52, 0x54, 0, 0x1a, 0xb0, 0x31]).map(|mac| mac.to_string()).as_deref(),
            Some("52:54:00:1a:b0:31")
        );
        assert_eq!(mac(&[0; 6]), None);
        assert_eq!(mac(&[1, 2]), None);
    }

    #[test]
    fn the_kernels_refusals_have_a_next_step() {
        assert_eq!(class_word(1), "net");
        assert_eq!(class_word(7), "7");
        let error = add(&NewDevice {
            name: "x".into(),
            mgmtdev: "qvirt-none".into(),
            mac: None,
            max_pairs: None,
            mtu: None,
        });
        assert!(matches!(error, Err(VdpaError::NoVdpa | VdpaError::NoMgmtdev { .. })), "{error:?}");
    }
}
