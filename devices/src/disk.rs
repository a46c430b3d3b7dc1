//! Disks and CD-ROMs: virtio-blk and virtio-scsi, raw and qcow2, on files and block devices.

mod lower;

use serde::{Deserialize, Serialize};

use crate::address::PciSeat;
use crate::capabilities::Capabilities;
use crate::host::Format;
use crate::id::{DeviceId, Label};
use crate::port::SOCKET_PATH_MAX;
use crate::refusal::Refusal;
use crate::retry::{Engine, OnError, Retry};
use crate::text::words;
use crate::topology::Seat;

pub(crate) use lower::Storage;

words! {
    /// The bus a disk is on.
    DiskBus, "disk bus" {
        /// A PCI device of its own: `virtio-blk-pci`.
        VirtioBlk = "virtio-blk" | "virtio",
        /// A LUN of a virtio-scsi controller: `scsi-hd` or `scsi-cd`.
        VirtioScsi = "virtio-scsi" | "scsi",
    }
    "only on these can I/O be held while its storage fails, and qvirt has disks on no other"
}

words! {
    /// What the guest sees.
    Medium, "disk device" {
        /// A disk.
        Disk = "disk",
        /// A CD-ROM drive, empty or with an image.
        Cdrom = "cdrom",
    }
}

words! {
    /// How the host's cache is used. Sets `cache.direct` and `cache.no-flush` on every node of the chain and `write-cache` on the device.
    Cache, "cache mode" {
        /// Host cache, the guest flushes. QEMU's default.
        Writeback = "writeback",
        /// No host cache (O_DIRECT), the guest flushes.
        None = "none",
        /// Host cache, every write is flushed.
        Writethrough = "writethrough",
        /// No host cache, every write is flushed.
        Directsync = "directsync",
        /// Host cache, flushes are ignored: data is lost with the host.
        Unsafe = "unsafe",
    }
}

impl Cache {
    fn direct(self) -> bool {
        matches!(self, Cache::None | Cache::Directsync)
    }

    fn no_flush(self) -> bool {
        self == Cache::Unsafe
    }

    /// An OnOffAuto of QEMU, so a word and no JSON boolean.
    fn write_cache(self) -> &'static str {
        if matches!(self, Cache::Writethrough | Cache::Directsync) { "off" } else { "on" }
    }
}

words! {
    /// How the host's I/O is done.
    Aio, "aio" {
        /// A pool of threads. QEMU's default.
        Threads = "threads",
        /// Linux AIO; wants a cache mode without host cache.
        Native = "native",
        /// io_uring.
        IoUring = "io_uring",
    }
}

words! {
    /// What becomes of a discard (TRIM) of the guest.
    Discard, "discard" {
        /// Nothing. QEMU's default.
        Ignore = "ignore",
        /// The host frees the blocks.
        Unmap = "unmap",
    }
}

/// Table `scsi` of a disk: its place on a virtio-scsi controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScsiWish {
    /// Index of the controller.
    pub controller: Option<u8>,
    /// Channel: 0, virtio-scsi has no other.
    pub bus: Option<u8>,
    /// 0 to 255.
    pub target: Option<u8>,
    /// LUN: 0 to 16383.
    pub unit: Option<u16>,
}

/// Table `[[disk]]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Default: `disk0`, `disk1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The image: an absolute path of a file or block device. Only a CD-ROM may have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Default: `raw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Default: `virtio-blk` for a disk, `virtio-scsi` for a CD-ROM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<DiskBus>,
    /// Default: `disk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Medium>,
    /// Default: the first free label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Label>,
    /// Default: `writeback`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// Default: `threads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aio: Option<Aio>,
    /// Default: `ignore`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<Discard>,
    /// Whether the guest may only read. Default: no; a CD-ROM always.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Serial number that the guest reads: at most 20 characters on virtio-blk, 36 on SCSI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// SCSI device identification (VPD page 0x83). Default: the device's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// The iothread that does its I/O; of SCSI disks the controller has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iothread: Option<DeviceId>,
    /// Number of virtio-blk queues; of SCSI disks the controller has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Place in the boot order; 0 first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// What happens at an I/O error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// PCI seat of a virtio-blk disk. Default: the first free root port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
    /// Place of a SCSI disk. Default: the first free target, unit 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scsi: Option<ScsiWish>,
}

impl DiskConfig {
    /// Whether it is a CD-ROM drive.
    pub fn is_cdrom(&self) -> bool {
        self.device == Some(Medium::Cdrom)
    }

    /// The bus, given or by default.
    pub fn bus(&self) -> DiskBus {
        self.bus.unwrap_or(if self.is_cdrom() { DiskBus::VirtioScsi } else { DiskBus::VirtioBlk })
    }

    /// Whether the guest may only read.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.is_cdrom()
    }

    /// The format, given or by default.
    pub fn format(&self) -> Format {
        self.format.unwrap_or(Format::Raw)
    }

    /// `vd` or `sd`.
    pub(crate) fn label_prefix(&self) -> &'static str {
        match self.bus() {
            DiskBus::VirtioBlk => "vd",
            DiskBus::VirtioScsi => "sd",
        }
    }

    pub(crate) fn driver(&self) -> &'static str {
        match (self.bus(), self.is_cdrom()) {
            (DiskBus::VirtioBlk, _) => "virtio-blk-pci",
            (DiskBus::VirtioScsi, false) => "scsi-hd",
            (DiskBus::VirtioScsi, true) => "scsi-cd",
        }
    }

    /// The seat it wants.
    pub(crate) fn seat(&self) -> Seat {
        let wish = self.scsi.unwrap_or_default();
        match self.bus() {
            DiskBus::VirtioBlk => Seat::Pci(self.seat.clone()),
            DiskBus::VirtioScsi => {
                Seat::Scsi { controller: wish.controller, target: wish.target, unit: wish.unit }
            }
        }
    }

    /// What can be said against it without looking at the machine; gives how it retries.
    pub(crate) fn check(
        &self,
        id: &DeviceId,
        threaded: bool,
        run_dir: &str,
        qemu: &Capabilities,
    ) -> Result<Option<Retry>, Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        let scsi = self.bus() == DiskBus::VirtioScsi;
        match self {
            Self { path: None, .. } if !self.is_cdrom() => Err(Refusal::Missing {
                id: id.clone(),
                key: "path",
                next: "write the absolute path of its image",
            }),
            _ if self.is_cdrom() && !scsi => {
                misplaced("device", "bus virtio-blk", "a CD-ROM needs bus = \"virtio-scsi\"")
            }
            Self { seat: Some(_), .. } if scsi => {
                misplaced("seat", "bus virtio-scsi", "write scsi = { target = ... }")
            }
            Self { scsi: Some(_), .. } if !scsi => {
                misplaced("scsi", "bus virtio-blk", "write seat = \"rp1\"")
            }
            Self { queues: Some(_), .. } if scsi => {
                misplaced("queues", "bus virtio-scsi", "write it in [[scsi_controller]]")
            }
            Self { iothread: Some(_), .. } if scsi => {
                misplaced("iothread", "bus virtio-scsi", "write it in [[scsi_controller]]")
            }
            Self { device_id: Some(_), .. } if !scsi => {
                misplaced("device_id", "bus virtio-blk", "use serial")
            }
            Self { aio: Some(Aio::Native), .. } if !self.cache.is_some_and(Cache::direct) => misplaced(
                "aio",
                "this cache mode",
                "aio = \"native\" needs cache = \"none\" or \"directsync\"",
            ),
            _ => self.check_values(id, scsi),
        }?;
        let missing = |kind, name: &str| Refusal::NotInQemu {
            id: id.clone(),
            kind,
            name: name.to_owned(),
            version: qemu.version.clone(),
        };
        match self.aio {
            Some(aio) if !qemu.aio.contains(aio.word()) => Err(missing("aio", aio.word())),
            _ if !qemu.block_drivers.contains(self.format().word()) => {
                Err(missing("block driver", self.format().word()))
            }
            _ => self.check_retry(id, threaded, run_dir, qemu),
        }
    }

    fn check_retry(
        &self,
        id: &DeviceId,
        threaded: bool,
        run_dir: &str,
        qemu: &Capabilities,
    ) -> Result<Option<Retry>, Refusal> {
        let retry = self.retry(id, threaded, qemu)?;
        let longest = id.io_control(run_dir);
        if retry.as_ref().is_some_and(|r| r.engine == Engine::Proxy) && longest.len() > SOCKET_PATH_MAX {
            let rule = format!(
                "the proxy's socket {longest} has {} bytes and the kernel takes at most {SOCKET_PATH_MAX}: use a shorter id or VM \
                 name, or another engine",
                longest.len()
            );
            let (key, value) = ("on_error.engine", "\"proxy\"".to_owned());
            return Err(Refusal::Value { id: id.clone(), key, value, rule });
        }
        Ok(retry)
    }

    fn check_values(&self, id: &DeviceId, scsi: bool) -> Result<(), Refusal> {
        let value = |key, value: String, rule: &str| {
            Err(Refusal::Value { id: id.clone(), key, value, rule: rule.to_owned() })
        };
        let longest = if scsi { 36 } else { 20 };
        for (key, text) in [("serial", &self.serial), ("device_id", &self.device_id)] {
            let Some(text) = text else { continue };
            if text.is_empty()
                || text.len() > longest
                || !text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
            {
                return value(
                    key,
                    format!("{text:?}"),
                    &format!("write 1 to {longest} printable ASCII characters on this bus"),
                );
            }
        }
        if let Some(queues) = self.queues.filter(|q| !(1..=1024).contains(q)) {
            return value("queues", queues.to_string(), "write 1 to 1024");
        }
        let wish = self.scsi.unwrap_or_default();
        if let Some(bus) = wish.bus.filter(|b| *b != 0) {
            return value("scsi.bus", bus.to_string(), "a virtio-scsi controller has one bus, 0");
        }
        if let Some(unit) = wish.unit.filter(|u| *u >= crate::address::ScsiAddress::UNITS) {
            return value("scsi.unit", unit.to_string(), "a LUN is 0 to 16383");
        }
        if let (Some(label), wanted) = (&self.target, self.label_prefix())
            && label.prefix() != wanted
        {
            return Err(Refusal::LabelPrefix { id: id.clone(), label: label.clone(), wanted });
        }
        Ok(())
    }
}
