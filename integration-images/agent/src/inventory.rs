//! What a machine sees of itself: as JSON for programs, as lines for people and for comparisons. The same devices give the same lines.
//!
//! ```text
//! pci ADDRESS VENDOR:DEVICE DRIVER
//! disk NAME BYTES serial=... ro=0|1 queues=N cache=back|through discard=0|1 block=BYTES at=PCI-ADDRESS [hctl=H:C:T:L] [id=...]
//! cdrom NAME media=BYTES|none hctl=H:C:T:L at=PCI-ADDRESS
//! nic NAME MAC queues=N mtu=N at=PCI-ADDRESS
//! usb BUS-PORT VENDOR:PRODUCT serial=... speed=MBIT/S at=PCI-ADDRESS
//! channel NAME          the name of a virtserialport
//! console NAME          a virtio console, by its port (vport1p0, ...)
//! serial NAME           a UART
//! memory KIB            the sum of the online memory blocks
//! cpus N                those online
//! ```
//!
//! What is not known, or not there, is `-` in a line and `null` in JSON.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

mod sysfs;
#[cfg(test)]
mod tests;

/// All devices, each kind sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// PCI functions.
    pub pci: Vec<Pci>,
    /// Block devices: virtio, SCSI, USB storage, NVMe; no CD-ROM drives.
    pub disks: Vec<Disk>,
    /// CD-ROM drives.
    pub cdroms: Vec<Cdrom>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// USB devices, without the root hubs.
    pub usb: Vec<Usb>,
    /// The names of the virtio-serial ports that have one.
    pub channels: Vec<String>,
    /// The virtio consoles, by their port.
    pub consoles: Vec<String>,
    /// The UARTs that answered.
    pub serial: Vec<String>,
    /// The sum of the online memory blocks.
    pub memory_kib: u64,
    /// The processors online.
    pub cpus: u32,
}

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pci {
    /// `0000:01:00.0`
    pub address: String,
    /// Four hexadecimal digits.
    pub vendor: String,
    /// Four hexadecimal digits.
    pub device: String,
    /// The driver that a user knows: of a virtio device the one on the virtio bus, not virtio-pci.
    pub driver: Option<String>,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// `vda`
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its serial number; of a SCSI disk that of VPD page 0x80. Empty if it has none.
    pub serial: String,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Hardware queues.
    pub queues: usize,
    /// What the kernel makes of its write cache: `back` or `through`.
    pub cache: Option<String>,
    /// Whether it takes discards.
    pub discard: bool,
    /// Bytes of a logical block.
    pub block: u64,
    /// The PCI function it is behind.
    pub at: Option<String>,
    /// Its SCSI address.
    pub hctl: Option<String>,
    /// SCSI's name for it: the first designator of VPD page 0x83 if that is a text. QEMU's `device_id`.
    pub id: Option<String>,
}

/// A CD-ROM drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cdrom {
    /// `sr0`
    pub name: String,
    /// The bytes of its medium, if it has one.
    pub media: Option<u64>,
    /// Its SCSI address.
    pub hctl: Option<String>,
    /// The PCI function it is behind.
    pub at: Option<String>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// `eth0`
    pub name: String,
    /// Its address.
    pub mac: Option<String>,
    /// Receive queues.
    pub queues: usize,
    /// The largest packet.
    pub mtu: Option<u64>,
    /// The PCI function it is behind.
    pub at: Option<String>,
}

/// A USB device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usb {
    /// Bus and ports: `1-2.1`
    pub place: String,
    /// Four hexadecimal digits.
    pub vendor: String,
    /// Four hexadecimal digits.
    pub product: String,
    /// Its serial number.
    pub serial: Option<String>,
    /// Mbit/s: 1.5, 12, 480, 5000, ...
    pub speed: Option<String>,
    /// The PCI function of its controller.
    pub at: Option<String>,
}

impl Inventory {
    /// One line for each device.
    pub fn lines(&self) -> BTreeSet<String> {
        let mut lines = BTreeSet::new();
        lines.extend(self.pci.iter().map(|Pci { address, vendor, device, driver }| {
            format!("pci {address} {vendor}:{device} {}", or_dash(driver.as_ref()))
        }));
        lines.extend(self.disks.iter().map(Disk::line));
        lines.extend(self.cdroms.iter().map(|Cdrom { name, media, hctl, at }| {
            let media = media.map_or_else(|| "none".to_owned(), |bytes| bytes.to_string());
            format!("cdrom {name} media={media} hctl={} at={}", or_dash(hctl.as_ref()), or_dash(at.as_ref()))
        }));
        lines.extend(self.nics.iter().map(|Nic { name, mac, queues, mtu, at }| {
            let (mac, mtu, at) = (or_dash(mac.as_ref()), or_dash(mtu.as_ref()), or_dash(at.as_ref()));
            format!("nic {name} {mac} queues={queues} mtu={mtu} at={at}")
        }));
        lines.extend(self.usb.iter().map(|Usb { place, vendor, product, serial, speed, at }| {
            let (serial, speed, at) =
                (or_dash(serial.as_ref()), or_dash(speed.as_ref()), or_dash(at.as_ref()));
            format!("usb {place} {vendor}:{product} serial={serial} speed={speed} at={at}")
        }));
        for (kind, names) in
            [("channel", &self.channels), ("console", &self.consoles), ("serial", &self.serial)]
        {
            lines.extend(names.iter().map(|name| format!("{kind} {name}")));
        }
        lines.insert(format!("memory {}", self.memory_kib));
        lines.insert(format!("cpus {}", self.cpus));
        lines
    }
}

impl Disk {
    fn line(&self) -> String {
        let Disk { name, bytes, serial, queues, block, .. } = self;
        let (ro, discard) = (u8::from(self.read_only), u8::from(self.discard));
        let (cache, at) = (or_dash(self.cache.as_ref()), or_dash(self.at.as_ref()));
        let mut line = format!(
            "disk {name} {bytes} serial={serial} ro={ro} queues={queues} cache={cache} discard={discard} block={block} at={at}"
        );
        for (key, value) in [("hctl", &self.hctl), ("id", &self.id)] {
            if let Some(value) = value {
                line.push_str(&format!(" {key}={value}"));
            }
        }
        line
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
