//! What a device needs of the host, as values: facts that planning reads, and needs that the launcher meets. Nothing here opens anything.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bdf::HostBdf;
use crate::disk::{Aio, Discard};
use crate::retry::Retry;
use crate::text::words;
use crate::units::Mac;
use crate::usb::{UsbFact, UsbNeed};
use crate::vf::VfProfile;

words! {
    /// An image's format. Never probed: it stands in the config, or in the header of the overlay above.
    Format, "image format" {
        /// The bytes are the disk.
        Raw = "raw",
        /// QEMU's own, with backing files.
        Qcow2 = "qcow2",
    }
}

/// One layer of a disk's chain, top first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Absolute path.
    pub path: String,
    /// Its format.
    pub format: Format,
    /// Whether it is a block device (QEMU's `host_device`) and not a file.
    pub block_device: bool,
}

/// What is known of the host when a device is planned.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostFacts {
    /// Chains of the images that configs name, by path.
    pub chains: BTreeMap<String, Vec<Layer>>,
    /// The folder in which sockets without a path of their own are made.
    pub run_dir: String,
    /// vDPA devices. Looked at for such a device only.
    pub vdpa: Vec<HostVdpa>,
    /// Targets of vhost-scsi. Looked at for such a device only.
    pub scsi: Option<ScsiTargets>,
    /// PCI functions of the host. Looked at for a passthrough only.
    pub pci: BTreeMap<HostBdf, HostFunction>,
    /// Whether the kernel has iommufd.
    pub iommufd: bool,
    /// The USB devices of the host, hubs among them; looked at where a config names one.
    pub usb: Vec<UsbFact>,
}

words! {
    /// What a vDPA device is, as far as QEMU has a device of that class.
    VdpaClass, "vDPA class" {
        /// A network device.
        Net = "a network device",
        /// A block device.
        Block = "a block device",
        /// Anything else.
        Other = "a device of another class",
    }
}

/// A vDPA device of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostVdpa {
    /// Its name on the vDPA bus.
    pub name: String,
    /// Its char device: `/dev/vhost-vdpa-0`. Only the driver vhost_vdpa makes one.
    pub node: Option<String>,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its class, if the kernel told.
    pub class: Option<VdpaClass>,
    /// Whether a process or the kernel plays it, and maps the guest's memory by its file.
    pub in_software: bool,
    /// Virtqueues at most.
    pub max_queues: Option<u32>,
    /// Of a network device: its address, if it is not null.
    pub mac: Option<Mac>,
}

impl HostVdpa {
    /// Whether a management device is none of hardware, which is on a bus: `pci/0000:08:01.1`.
    pub fn is_in_software(mgmtdev: &str) -> bool {
        !mgmtdev.contains('/')
    }
}

/// A vDPA device that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVdpa {
    /// What makes it: `pci/0000:08:01.1`, `vduse`.
    pub mgmtdev: String,
    /// Of a network device: its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

/// The targets of vhost-scsi.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScsiTargets {
    /// Whether `/dev/vhost-scsi` is there.
    pub driver: bool,
    /// Their port groups, by name; unknown where they may not be listed.
    pub targets: Option<BTreeMap<String, Vec<ScsiGroup>>>,
}

/// A port group of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScsiGroup {
    /// The N of `tpgt_N`.
    pub number: u32,
    /// Whether it has the initiator's side, without which nobody gets to its LUNs.
    pub nexus: bool,
}

/// A PCI function of the host, as far as its passthrough is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFunction {
    /// Vendor.
    pub vendor: u16,
    /// Device, as its vendor numbers them.
    pub device: u16,
    /// The driver that holds it.
    pub driver: Option<String>,
    /// The one driver that may, where somebody said so.
    pub driver_override: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Whether it is a bridge, which stays with the host.
    pub bridge: bool,
    /// Whether the kernel offers it as an accelerator.
    pub uacce: bool,
    /// Its network interfaces.
    pub netdevs: Vec<String>,
    /// Whether one of them is up.
    pub up: bool,
    /// Of a physical function: how many virtual ones it can have.
    pub vfs_max: Option<u32>,
    /// Of a virtual function: its physical one, and its number there.
    pub vf_of: Option<(HostBdf, u32)>,
    /// Of a virtual function of a network card: what the card keeps of it.
    pub profile: Option<VfProfile>,
    /// Who uses it, for people: a VM, or a process that has its group open.
    pub held_by: Option<String>,
}

/// How a file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// By any number of readers.
    Read,
    /// By one writer and nobody else.
    Write,
}

/// Something of the host that a device needs while it is plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostNeed {
    /// An image: leased host-wide, opened by QEMU itself.
    Image {
        /// Absolute path.
        path: String,
        /// How it is used.
        access: Access,
    },
    /// A tap, opened by the launcher, and made if there is none.
    Tap {
        /// Its name on the host.
        name: String,
        /// Names of its descriptors, one a queue.
        descriptors: Vec<String>,
        /// The switch that it is plugged into.
        switch: Option<Switch>,
        /// The guest's address; the host's side gets one derived from it, so that a bridge keeps its own.
        mac: Mac,
    },
    /// `/dev/vhost-net`, opened once a queue.
    VhostNet {
        /// Names of the descriptors.
        descriptors: Vec<String>,
    },
    /// A socket file that QEMU makes, to be removed with the device.
    Socket {
        /// Absolute path.
        path: String,
    },
    /// A process that serves a disk's image to QEMU.
    IoProxy(IoProxy),
    /// A vDPA device: leased host-wide, its char device opened by the launcher.
    Vdpa {
        /// Its name on the vDPA bus.
        name: String,
        /// Its char device; unknown of one that is to be made.
        node: Option<String>,
        /// Name of the descriptor, unless QEMU opens it itself.
        descriptor: Option<String>,
        /// How it is made, if it is not there; it is deleted again with the guest's device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        make: Option<NewVdpa>,
    },
    /// A target of vhost-scsi: leased host-wide, `/dev/vhost-scsi` opened by the launcher.
    VhostScsi {
        /// The target.
        wwpn: String,
        /// Name of the descriptor.
        descriptor: String,
    },
    /// A PCI function and its IOMMU group: leased host-wide, opened by QEMU itself.
    Function {
        /// The function.
        host: HostBdf,
        /// Its group.
        group: u32,
        /// Whether it is an accelerator, which takes no hot-plug.
        #[serde(default)]
        accelerator: bool,
    },
    /// A PCI function bound to vfio-pci, and given back to the driver it had.
    Driver {
        /// The function.
        host: HostBdf,
        /// The driver it had.
        before: Option<String>,
        /// The one driver that was allowed to have it.
        override_before: Option<String>,
    },
    /// What a network card keeps of a virtual function.
    VfProfile {
        /// The physical function.
        pf: HostBdf,
        /// The virtual function's number there.
        index: u32,
        /// What it was.
        before: VfProfile,
        /// What it is to be.
        wanted: VfProfile,
    },
    /// A USB device: leased host-wide, opened by QEMU itself.
    Usb(UsbNeed),
}

/// A process that opens a disk's images in QEMU's place, serves them over NBD, and retries what fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoProxy {
    /// The socket that QEMU connects to; the exports are named after the device.
    pub socket: String,
    /// The socket that the owner connects to.
    pub control: String,
    /// Absolute path of the chain's top.
    pub image: String,
    /// Whether it is a block device and not a file.
    pub block_device: bool,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the format above writes past the image's end, as qcow2 in a file does. QEMU never grows what it reaches over NBD, so
    /// such an export has to be larger than the file from the start.
    pub grows: bool,
    /// Whether the host's cache is bypassed (O_DIRECT).
    pub direct: bool,
    /// How the host's I/O is done.
    pub aio: Aio,
    /// What becomes of a discard.
    pub discard: Discard,
    /// What it retries, and how long.
    pub retry: Retry,
    /// The layers below the top, the uppermost first, which are only read.
    #[serde(default)]
    pub below: Vec<Layer>,
}

impl IoProxy {
    /// Paths of all its images, top first.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.image.as_str()).chain(self.below.iter().map(|layer| layer.path.as_str()))
    }

    /// Whether an image of it is a block device.
    pub(crate) fn is_block_device(&self, path: &str) -> bool {
        self.block_device && self.image == path
            || self.below.iter().any(|layer| layer.block_device && layer.path == path)
    }
}

/// A bridge of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Its name.
    pub bridge: String,
    /// Whether it is an Open vSwitch bridge.
    pub openvswitch: bool,
    /// VLAN tag of the port; Open vSwitch only.
    pub vlan: Option<u16>,
}
