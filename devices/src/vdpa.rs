//! vDPA: virtio in hardware (or in a process of the host, VDUSE), which the guest drives through the char device of vhost-vdpa.
//!
//! | `type` | QEMU's objects | the guest's config space is |
//! |---|---|---|
//! | `generic` | `vhost-vdpa-device-pci` on a descriptor set | the host device's own, whatever its class |
//! | `nic` | `-netdev vhost-vdpa` and `virtio-net-pci` | QEMU's virtio-net, its values from the host device |
//! | `disk` | block driver `virtio-blk-vhost-vdpa` and `virtio-blk-pci` | QEMU's virtio-blk |

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::address::{Address, PciSeat};
use crate::capabilities::Capabilities;
use crate::host::{HostNeed, HostVdpa, NewVdpa, VdpaClass};
use crate::id::{DeviceId, Generation};
use crate::refusal::Refusal;
use crate::spec::{Backend, Descriptors, DeviceSpec, Fdset, Frontend, Netdev, props};
use crate::text::{TextError, by_text, words};
use crate::units::Mac;

const GENERIC: &str = "vhost-vdpa-device-pci";
const NETDEV: &str = "vhost-vdpa";
const BLOCK_DRIVER: &str = "virtio-blk-vhost-vdpa";
const MAX_QUEUES: u16 = 256;

words! {
    /// As what a guest gets a vDPA device.
    VdpaType, "vDPA type" {
        /// As it is, whatever its class.
        Generic = "generic",
        /// As QEMU's virtio-net.
        Nic = "nic",
        /// As QEMU's virtio-blk.
        Disk = "disk",
    }
}

/// A vDPA device of the host, by its name or by its char device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VdpaRef {
    /// Its name on the vDPA bus.
    Name(String),
    /// The N of `/dev/vhost-vdpa-N`.
    Node(u32),
}

const NODE: &str = "/dev/vhost-vdpa-";

impl VdpaRef {
    /// Whether it means this device.
    pub fn is(&self, device: &HostVdpa) -> bool {
        match self {
            VdpaRef::Name(name) => *name == device.name,
            VdpaRef::Node(_) => device.node.as_ref() == Some(&self.to_string()),
        }
    }
}

impl FromStr for VdpaRef {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| Err(TextError::new("vDPA device", text, rule));
        if text.starts_with('/') {
            // One spelling a number, so that one device has one name.
            let number = text.strip_prefix(NODE).and_then(|number| number.parse::<u32>().ok());
            return match number.map(VdpaRef::Node).filter(|node| node.to_string() == text) {
                Some(node) => Ok(node),
                None => fail("a char device of vhost-vdpa is `/dev/vhost-vdpa-` and a number"),
            };
        }
        let fits = (1..=64).contains(&text.len()) && text != "." && text != "..";
        if !fits || text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
            return fail(
                "its name such as `vdpa0`, of 1 to 64 characters without `/` and blanks, or its char device such as `/dev/vhost-vdpa-0`",
            );
        }
        Ok(VdpaRef::Name(text.to_owned()))
    }
}

impl fmt::Display for VdpaRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VdpaRef::Name(name) => f.write_str(name),
            VdpaRef::Node(number) => write!(f, "{NODE}{number}"),
        }
    }
}

by_text!(VdpaRef);

/// Table `[[vdpa]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VdpaConfig {
    /// Default: `vdpa0`, `vdpa1`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The host's device: its name, or its char device.
    pub device: VdpaRef,
    /// Default: `generic`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<VdpaType>,
    /// The management device that makes it, if it is not there: `pci/0000:08:01.1`. It is deleted again with the guest's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mgmtdev: Option<String>,
    /// Queues of a disk, queue pairs of a NIC. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// MAC address of a NIC. Default: the device's own, or one derived from the names of VM and device where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Place in the boot order; 0 first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// PCI seat. Default: the first free root port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Why a vDPA device of the host cannot be given to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum VdpaError {
    #[error(
        "the host has no vDPA device {device}: it has {known}; `qvirt host vdpa mgmtdevs` shows where one can be made, \
         `qvirt host vdpa add` makes it"
    )]
    NoDevice { device: VdpaRef, known: String },
    #[error(
        "vDPA device {name} has no char device, since {driver} has it and not vhost_vdpa: `modprobe vhost_vdpa`, then \
         `echo {name} > /sys/bus/vdpa/drivers/{driver}/unbind` and `echo {name} > /sys/bus/vdpa/drivers/vhost_vdpa/bind`"
    )]
    NoNode { name: String, driver: String },
    #[error(
        "vDPA device {name} goes to {holder} of this VM: one device goes to one guest device; name another"
    )]
    Taken { name: String, holder: DeviceId },
    #[error(
        "vDPA device {name} is {found}: type = \"{wanted}\" wants another; leave `type` out to pass it as it is"
    )]
    Class { name: String, found: VdpaClass, wanted: VdpaType },
    #[error(
        "vDPA device {name} has {found} and the guest would get {mac}: a device in software (VDUSE) keeps its own; leave `mac` out, or \
         have it made with {mac}"
    )]
    Mac { name: String, found: Mac, mac: Mac },
    #[error(
        "vDPA device {name} has {found} queues and {wanted} are needed for queues = {queues}: lower `queues`, or have it made with more"
    )]
    Queues { name: String, found: u32, wanted: u32, queues: u16 },
    #[error("this QEMU ({version}) has no `vhost-vdpa-device-pci`, which came with QEMU 8.0: {instead}")]
    NoGeneric { version: String, instead: &'static str },
    #[error(
        "this QEMU ({version}) has no block driver `virtio-blk-vhost-vdpa`, which is in those that were built with libblkio: leave `type` out to \
         pass the disk as it is, by `vhost-vdpa-device-pci`{}", later(.generic)
    )]
    NoBlockDriver { version: String, generic: bool },
}

fn later(generic: &bool) -> &'static str {
    if *generic { "" } else { " of a QEMU from 8.0 on, which this one is not" }
}

impl VdpaConfig {
    fn kind(&self) -> VdpaType {
        self.kind.unwrap_or(VdpaType::Generic)
    }

    fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// What can be said against it; gives the host's device.
    pub(crate) fn check<'a>(
        &self,
        id: &DeviceId,
        shared_memory: bool,
        host: &'a [HostVdpa],
        qemu: &Capabilities,
    ) -> Result<Cow<'a, HostVdpa>, Refusal> {
        let kind = self.kind();
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        if self.queues.is_some() && kind == VdpaType::Generic {
            return misplaced(
                "queues",
                "type = \"generic\"",
                "the guest gets those that the device has; leave it out",
            );
        }
        if self.mac.is_some() && kind != VdpaType::Nic {
            return misplaced(
                "mac",
                "this type",
                "the guest sees the device's own; write type = \"nic\" to give another",
            );
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            let (value, rule) = (queues.to_string(), "write 1 to 256".to_owned());
            return Err(Refusal::Value { id: id.clone(), key: "queues", value, rule });
        }
        if let Some(mgmtdev) = &self.mgmtdev {
            let fits =
                !mgmtdev.is_empty() && !mgmtdev.contains(|c: char| c.is_whitespace() || c.is_control());
            if !fits {
                let rule =
                    "write it as `qvirt host vdpa mgmtdevs` lists it, such as pci/0000:08:01.1".to_owned();
                return Err(Refusal::Value {
                    id: id.clone(),
                    key: "mgmtdev",
                    value: format!("{mgmtdev:?}"),
                    rule,
                });
            }
            if matches!(self.device, VdpaRef::Node(_)) {
                return misplaced(
                    "mgmtdev",
                    "a char device",
                    "what is to be made is named: device = \"vdpa0\"",
                );
            }
            if kind == VdpaType::Disk {
                return misplaced(
                    "mgmtdev",
                    "type = \"disk\"",
                    "make it before, by `qvirt host vdpa add`, or leave `type` out",
                );
            }
        }
        let refuse = |source| Refusal::Vdpa { id: id.clone(), source };
        self.probe(qemu, host).map_err(refuse)?;
        let device = self.find(host).map_err(refuse)?;
        self.suits(&device).map_err(refuse)?;
        if device.in_software && !shared_memory {
            let what = "a vDPA device in software (VDUSE)";
            return Err(Refusal::PrivateMemory { id: id.clone(), what });
        }
        Ok(device)
    }

    /// Whether this QEMU has what it takes.
    fn probe(&self, qemu: &Capabilities, host: &[HostVdpa]) -> Result<(), VdpaError> {
        let version = qemu.version.clone();
        let generic = qemu.driver(GENERIC).is_some();
        match self.kind() {
            VdpaType::Generic if !generic => {
                let class = host.iter().find(|device| self.device.is(device)).and_then(|device| device.class);
                let blkio = qemu.block_drivers.contains(BLOCK_DRIVER);
                let instead = match (class, blkio) {
                    (Some(VdpaClass::Net), _) => "write type = \"nic\", which it has",
                    (Some(VdpaClass::Block), true) => "write type = \"disk\", which it has",
                    (None, true) => "write type = \"nic\" or type = \"disk\", which it has",
                    (None, false) => {
                        "write type = \"nic\" if it is a network device; for others name a newer QEMU with `qemu`"
                    }
                    _ => "name a newer QEMU with `qemu`",
                };
                Err(VdpaError::NoGeneric { version, instead })
            }
            VdpaType::Disk if !qemu.block_drivers.contains(BLOCK_DRIVER) => {
                Err(VdpaError::NoBlockDriver { version, generic })
            }
            _ => Ok(()),
        }
    }

    fn find<'a>(&self, host: &'a [HostVdpa]) -> Result<Cow<'a, HostVdpa>, VdpaError> {
        let Some(device) = host.iter().find(|device| self.device.is(device)) else {
            let (VdpaRef::Name(name), Some(mgmtdev)) = (&self.device, &self.mgmtdev) else {
                let known: Vec<&str> = host.iter().map(|device| device.name.as_str()).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(VdpaError::NoDevice { device: self.device.clone(), known });
            };
            let in_software = HostVdpa::is_in_software(mgmtdev);
            return Ok(Cow::Owned(HostVdpa { name: name.clone(), in_software, ..HostVdpa::default() }));
        };
        if device.node.is_none() {
            let driver = device.driver.clone().unwrap_or_else(|| "no driver".to_owned());
            return Err(VdpaError::NoNode { name: device.name.clone(), driver });
        }
        Ok(Cow::Borrowed(device))
    }

    /// Whether the device is what the type says.
    fn suits(&self, device: &HostVdpa) -> Result<(), VdpaError> {
        let name = device.name.clone();
        let wanted = match self.kind() {
            VdpaType::Generic => return Ok(()),
            VdpaType::Nic => VdpaClass::Net,
            VdpaType::Disk => VdpaClass::Block,
        };
        if let Some(found) = device.class.filter(|class| *class != wanted) {
            return Err(VdpaError::Class { name, found, wanted: self.kind() });
        }
        if let (Some(mac), Some(found)) = (self.mac, device.mac)
            && mac != found
            && device.in_software
        {
            return Err(VdpaError::Mac { name, found, mac });
        }
        // Of a NIC two a pair, and one for the control of more than one pair.
        let queues = self.queues();
        let needed = match (self.kind(), queues) {
            (VdpaType::Nic, 1) => 2,
            (VdpaType::Nic, pairs) => 2 * u32::from(pairs) + 1,
            _ => u32::from(queues),
        };
        match device.max_queues.filter(|found| *found < needed) {
            Some(found) => Err(VdpaError::Queues { name, found, wanted: needed, queues }),
            None => Ok(()),
        }
    }

    fn descriptor(id: &DeviceId) -> String {
        id.descriptor("vdpa", 0)
    }

    /// What it needs of the host.
    pub(crate) fn needs(&self, id: &DeviceId, device: &HostVdpa) -> Vec<HostNeed> {
        // The block driver opens the char device itself, through a library.
        let descriptor = (self.kind() != VdpaType::Disk).then(|| Self::descriptor(id));
        let new = self.mgmtdev.clone().filter(|_| device.node.is_none());
        // What is served in software has the address that its server gave it.
        let mac = self.mac.filter(|_| !device.in_software);
        let make = new.map(|mgmtdev| NewVdpa { mgmtdev, mac });
        vec![HostNeed::Vdpa { name: device.name.clone(), node: device.node.clone(), descriptor, make }]
    }

    /// The device as QEMU's objects. `set` is the number of a descriptor set that no other device has.
    pub(crate) fn lower(
        &self,
        id: &DeviceId,
        address: &Address,
        device: &HostVdpa,
        set: u32,
        generation: Generation,
    ) -> DeviceSpec {
        let Address::Pci(seat) = address else {
            unreachable!("a vDPA device claims a PCI seat and gets one")
        };
        let place =
            json!({"id": id.as_str(), "bus": seat.bus(), "addr": seat.addr(), "bootindex": self.bootindex});
        let (backend, more) = match self.kind() {
            VdpaType::Generic => {
                let set = Fdset { number: set, descriptor: Self::descriptor(id) };
                let more = json!({"driver": GENERIC, "vhostdev": set.path()});
                (Backend::Fdset(set), more)
            }
            VdpaType::Nic => (Backend::Netdev(self.netdev(id)), self.nic(id)),
            VdpaType::Disk => {
                let node = id.file_node(generation);
                let backend = props(json!({
                    "driver": BLOCK_DRIVER,
                    "node-name": node,
                    "path": device.node,
                    // It has no cache of the host to go through.
                    "cache": {"direct": true},
                }));
                (
                    Backend::Blockdev(backend),
                    json!({"driver": "virtio-blk-pci", "drive": node, "num-queues": self.queues}),
                )
            }
        };
        let mut frontend = props(json!({"driver": more["driver"]}));
        frontend.extend(props(place));
        frontend.extend(props(more));
        DeviceSpec {
            id: id.clone(),
            backends: vec![backend],
            frontend: Some(Frontend(frontend)),
            companions: Vec::new(),
        }
    }

    fn netdev(&self, id: &DeviceId) -> Netdev {
        let queues = (self.queues() > 1).then(|| self.queues());
        let props = props(json!({"type": NETDEV, "id": id.netdev(), "queues": queues}));
        let descriptors =
            vec![Descriptors { member: "vhostfd".to_owned(), names: vec![Self::descriptor(id)] }];
        Netdev { props, descriptors }
    }

    fn nic(&self, id: &DeviceId) -> serde_json::Value {
        let queues = self.queues();
        json!({
            "driver": "virtio-net-pci",
            "netdev": id.netdev(),
            // QEMU would write an address of its own into the device, the same for every VM.
            "mac": self.mac.map(|mac| mac.to_string()),
            "mq": (queues > 1).then_some(true),
            // Two a queue pair, one for the configuration, one for the control queue.
            "vectors": (queues > 1).then(|| 2 * u32::from(queues) + 2),
            // The option ROM serves PXE alone, and comes in a package that a small host does not have.
            "romfile": self.bootindex.is_none().then_some(""),
        })
    }

    /// Whether it shows the guest an address of its own, which then must be unique.
    pub(crate) fn is_nic(&self) -> bool {
        self.kind() == VdpaType::Nic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_in_one_way() {
        for good in ["vdpa0", "/dev/vhost-vdpa-0", "/dev/vhost-vdpa-17", "a:b"] {
            assert_eq!(good.parse::<VdpaRef>().map(|found| found.to_string()).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "a b",
            "..",
            "a/b",
            "/dev/vda",
            "/dev/vhost-vdpa-",
            "/dev/vhost-vdpa-01",
            "/dev/vhost-vdpa-+1",
            "/dev/vhost-vdpa-4294967296",
        ] {
            assert!(bad.parse::<VdpaRef>().is_err(), "{bad}");
        }
    }
}
