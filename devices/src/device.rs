//! The kinds of device, as one type: what a config's tables become.

use serde::{Deserialize, Serialize};

use crate::address::PciSeat;
use crate::bdf::HostBdf;
use crate::controller::{IothreadConfig, ScsiControllerConfig, VirtioSerialConfig};
use crate::disk::DiskConfig;
use crate::id::DeviceId;
use crate::nic::NicConfig;
use crate::passthrough::{VfConfig, VfioConfig, rom_file};
use crate::port::{ChannelConfig, SerialConfig};
use crate::usb::{UsbConfig, UsbControllerConfig};
use crate::vdpa::VdpaConfig;
use crate::vhost_scsi::VhostScsiConfig;

/// A device as its config asks for it. In JSON: the table's name, then its keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceConfig {
    /// `[[iothread]]`
    Iothread(IothreadConfig),
    /// `[[scsi_controller]]`
    ScsiController(ScsiControllerConfig),
    /// `[[virtio_serial]]`
    VirtioSerial(VirtioSerialConfig),
    /// `[[disk]]`
    Disk(DiskConfig),
    /// `[[nic]]`
    Nic(NicConfig),
    /// `[[serial]]`
    Serial(SerialConfig),
    /// `[[channel]]`
    Channel(ChannelConfig),
    /// `[[vdpa]]`
    Vdpa(VdpaConfig),
    /// `[[vhost_scsi]]`
    VhostScsi(VhostScsiConfig),
    /// `[[vfio]]`
    Vfio(VfioConfig),
    /// `[[vf]]`
    Vf(VfConfig),
    /// `[[usb_controller]]`
    UsbController(UsbControllerConfig),
    /// `[[usb]]`
    Usb(UsbConfig),
}

/// One expression for the config inside, whatever its kind.
macro_rules! each {
    ($self:expr, $config:ident => $body:expr) => {
        match $self {
            DeviceConfig::Iothread($config) => $body,
            DeviceConfig::ScsiController($config) => $body,
            DeviceConfig::VirtioSerial($config) => $body,
            DeviceConfig::Disk($config) => $body,
            DeviceConfig::Nic($config) => $body,
            DeviceConfig::Serial($config) => $body,
            DeviceConfig::Channel($config) => $body,
            DeviceConfig::Vdpa($config) => $body,
            DeviceConfig::VhostScsi($config) => $body,
            DeviceConfig::Vfio($config) => $body,
            DeviceConfig::Vf($config) => $body,
            DeviceConfig::UsbController($config) => $body,
            DeviceConfig::Usb($config) => $body,
        }
    };
}

impl DeviceConfig {
    /// Names of the tables, in the order in which their devices are made: what others stand on comes first.
    pub const TABLES: &'static [&'static str] = &[
        "iothread",
        "scsi_controller",
        "virtio_serial",
        "disk",
        "nic",
        "serial",
        "channel",
        "vdpa",
        "vhost_scsi",
        "vfio",
        "vf",
        "usb_controller",
        "usb",
    ];

    /// The table's name.
    pub fn table(&self) -> &'static str {
        Self::TABLES[self.rank()]
    }

    /// Place of its kind in [`DeviceConfig::TABLES`].
    pub(crate) fn rank(&self) -> usize {
        match self {
            DeviceConfig::Iothread(_) => 0,
            DeviceConfig::ScsiController(_) => 1,
            DeviceConfig::VirtioSerial(_) => 2,
            DeviceConfig::Disk(_) => 3,
            DeviceConfig::Nic(_) => 4,
            DeviceConfig::Serial(_) => 5,
            DeviceConfig::Channel(_) => 6,
            DeviceConfig::Vdpa(_) => 7,
            DeviceConfig::VhostScsi(_) => 8,
            DeviceConfig::Vfio(_) => 9,
            DeviceConfig::Vf(_) => 10,
            DeviceConfig::UsbController(_) => 11,
            DeviceConfig::Usb(_) => 12,
        }
    }

    /// The id it was given.
    pub fn id(&self) -> Option<&DeviceId> {
        each!(self, config => config.id.as_ref())
    }

    /// Gives it an id.
    pub fn set_id(&mut self, id: DeviceId) {
        each!(self, config => config.id = Some(id));
    }

    /// What an id that was not given begins with.
    pub(crate) fn id_prefix(&self) -> &'static str {
        match self {
            DeviceConfig::Iothread(_) => "io",
            DeviceConfig::ScsiController(_) => "scsi",
            DeviceConfig::VirtioSerial(_) => "vser",
            DeviceConfig::Disk(_) => "disk",
            DeviceConfig::Nic(_) => "net",
            DeviceConfig::Serial(_) => "serial",
            DeviceConfig::Channel(_) => "channel",
            DeviceConfig::Vdpa(_) => "vdpa",
            DeviceConfig::VhostScsi(_) => "vscsi",
            DeviceConfig::Vfio(_) => "vfio",
            DeviceConfig::Vf(_) => "vf",
            DeviceConfig::UsbController(_) => "usb",
            DeviceConfig::Usb(_) => "usbdev",
        }
    }

    /// The boot index it was given.
    pub fn bootindex(&self) -> Option<u32> {
        match self {
            DeviceConfig::Disk(disk) => disk.bootindex,
            DeviceConfig::Nic(nic) => nic.bootindex,
            DeviceConfig::Vdpa(vdpa) => vdpa.bootindex,
            DeviceConfig::VhostScsi(scsi) => scsi.bootindex,
            DeviceConfig::Vfio(vfio) => vfio.bootindex,
            DeviceConfig::Vf(vf) => vf.bootindex,
            DeviceConfig::Usb(usb) => usb.bootindex,
            _ => None,
        }
    }

    /// The iothread it names.
    pub(crate) fn iothread(&self) -> Option<&DeviceId> {
        match self {
            DeviceConfig::Disk(disk) => disk.iothread.as_ref(),
            DeviceConfig::ScsiController(controller) => controller.iothread.as_ref(),
            _ => None,
        }
    }

    /// When it chooses its seat, among the devices of a machine that is planned as a whole. Whoever asks for a PCI seat by name comes
    /// before those that take any; a LUN comes after the controllers, and one that is asked for before the others.
    pub(crate) fn turn(&self) -> usize {
        let pci = |seat: &Option<PciSeat>, controller: bool| match (seat, controller) {
            (Some(_), true) => 1,
            (Some(_), false) => 2,
            (None, true) => 3,
            (None, false) => 5,
        };
        match self {
            DeviceConfig::Iothread(_) => 0,
            DeviceConfig::ScsiController(controller) => pci(&controller.seat, true),
            DeviceConfig::VirtioSerial(controller) => pci(&controller.seat, true),
            DeviceConfig::Disk(disk) if disk.scsi.is_some() => 4,
            DeviceConfig::Disk(disk) => pci(&disk.seat, false),
            DeviceConfig::Nic(nic) => pci(&nic.seat, false),
            DeviceConfig::Vdpa(vdpa) => pci(&vdpa.seat, false),
            DeviceConfig::VhostScsi(scsi) => pci(&scsi.seat, false),
            DeviceConfig::Vfio(vfio) => pci(&vfio.seat, false),
            DeviceConfig::Vf(vf) => pci(&vf.seat, false),
            DeviceConfig::Serial(_) | DeviceConfig::Channel(_) => 5,
            // Slots of the root complex are taken from the other end than ports take them.
            DeviceConfig::UsbController(controller) => pci(&controller.seat, true),
            DeviceConfig::Usb(usb) if usb.port.is_some() => 4,
            DeviceConfig::Usb(_) => 5,
        }
    }

    /// Paths of images that must be looked at before it can be planned.
    pub fn image(&self) -> Option<&str> {
        match self {
            DeviceConfig::Disk(disk) => disk.path.as_deref(),
            _ => None,
        }
    }

    /// The function of the host that it names.
    pub fn host_function(&self) -> Option<HostBdf> {
        match self {
            DeviceConfig::Vfio(vfio) => Some(vfio.host),
            DeviceConfig::Vf(vf) => vf.host,
            _ => None,
        }
    }

    /// What is behind it on the host, for people: an image, a bridge, a socket.
    pub fn backing(&self) -> Option<String> {
        match self {
            DeviceConfig::Disk(disk) => disk.path.clone(),
            DeviceConfig::Nic(nic) if nic.user => Some("user".to_owned()),
            DeviceConfig::Nic(nic) => {
                nic.bridge.clone().or_else(|| nic.tap.clone()).or_else(|| nic.vhost_user.clone())
            }
            DeviceConfig::Channel(channel) => channel.path.clone(),
            DeviceConfig::Vdpa(vdpa) => Some(vdpa.device.to_string()),
            DeviceConfig::VhostScsi(scsi) => Some(scsi.wwpn.to_string()),
            DeviceConfig::Vfio(vfio) => Some(vfio.host.to_string()),
            DeviceConfig::Vf(vf) => vf.host.map(|host| host.to_string()).or_else(|| vf.pf.clone()),
            DeviceConfig::Usb(usb) => usb.host.as_ref().map(ToString::to_string),
            DeviceConfig::UsbController(_)
            | DeviceConfig::Serial(_)
            | DeviceConfig::Iothread(_)
            | DeviceConfig::ScsiController(_)
            | DeviceConfig::VirtioSerial(_) => None,
        }
    }

    /// Every path in it that names a file of the host, to be made absolute by whoever knows the folder.
    pub fn paths_mut(&mut self) -> Vec<&mut String> {
        match self {
            DeviceConfig::Disk(disk) => disk.path.as_mut().into_iter().collect(),
            DeviceConfig::Nic(nic) => nic.vhost_user.as_mut().into_iter().collect(),
            DeviceConfig::Serial(serial) => serial.log.as_mut().into_iter().collect(),
            DeviceConfig::Channel(channel) => channel.path.as_mut().into_iter().collect(),
            DeviceConfig::Vfio(vfio) => rom_file(&mut vfio.rom).into_iter().collect(),
            DeviceConfig::Vf(vf) => rom_file(&mut vf.rom).into_iter().collect(),
            DeviceConfig::Iothread(_)
            | DeviceConfig::ScsiController(_)
            | DeviceConfig::VirtioSerial(_)
            | DeviceConfig::Vdpa(_)
            | DeviceConfig::VhostScsi(_)
            | DeviceConfig::UsbController(_)
            | DeviceConfig::Usb(_) => Vec::new(),
        }
    }
}
