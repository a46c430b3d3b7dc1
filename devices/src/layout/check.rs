//! What a config is by itself: what speaks against it, the seat it wants, what it needs of the host, and whether this QEMU has all of it.

use crate::capabilities::Capabilities;
use crate::device::DeviceConfig;
use crate::disk::Storage;
use crate::host::{HostFacts, HostNeed};
use crate::id::DeviceId;
use crate::port::SerialType;
use crate::refusal::Refusal;
use crate::spec::{Backend, DeviceSpec, Frontend};
use crate::topology::Seat;

pub(super) fn hot_pluggable(id: &DeviceId, config: &DeviceConfig) -> Result<(), Refusal> {
    match config {
        DeviceConfig::Serial(serial) if serial.kind() == SerialType::IsaSerial => {
            Err(Refusal::NotHotPluggable { id: id.clone(), kind: "an isa-serial port" })
        }
        DeviceConfig::UsbController(_) => {
            Err(Refusal::NotHotPluggable { id: id.clone(), kind: "a USB controller" })
        }
        _ => Ok(()),
    }
}

/// What can be said against a config by itself; gives what a disk stands on.
pub(super) fn check(
    id: &DeviceId,
    config: &DeviceConfig,
    (shared_memory, threaded): (bool, bool),
    host: &HostFacts,
    qemu: &Capabilities,
) -> Result<Storage, Refusal> {
    let (mut retry, mut vdpa) = (None, None);
    match config {
        DeviceConfig::Vdpa(device) => {
            vdpa = Some(device.check(id, shared_memory, &host.vdpa, qemu)?.into_owned())
        }
        DeviceConfig::VhostScsi(scsi) => scsi.check(id, host.scsi.as_ref())?,
        DeviceConfig::Disk(disk) => retry = disk.check(id, threaded, &host.run_dir, qemu)?,
        DeviceConfig::Nic(nic) => nic.check(id, shared_memory, qemu)?,
        DeviceConfig::Channel(channel) => channel.check(id, &host.run_dir)?,
        DeviceConfig::ScsiController(controller) => controller.check(id)?,
        DeviceConfig::Vfio(vfio) => vfio.check(id)?,
        DeviceConfig::Vf(vf) => vf.check(id)?,
        DeviceConfig::UsbController(usb) => {
            usb.check().map_err(|source| Refusal::Usb { id: id.clone(), source })?;
        }
        DeviceConfig::Usb(usb) => usb.check(id, host)?,
        DeviceConfig::Serial(_) | DeviceConfig::VirtioSerial(_) | DeviceConfig::Iothread(_) => {}
    }
    for path in config.clone().paths_mut() {
        let value = |rule: &str| {
            Err(Refusal::Value {
                id: id.clone(),
                key: "path",
                value: format!("{path:?}"),
                rule: rule.to_owned(),
            })
        };
        if !path.starts_with('/') {
            return value("paths are absolute here: begin it with `/`");
        }
        if path.chars().any(char::is_control) {
            return value(
                "a path with control characters (a newline, say) cannot be shown or logged truthfully: rename the file",
            );
        }
    }
    let chain = match config.image() {
        Some(path) => {
            let chain = host.chains.get(path).filter(|chain| !chain.is_empty());
            chain.cloned().ok_or_else(|| Refusal::UnknownImage { id: id.clone(), path: path.to_owned() })?
        }
        None => Vec::new(),
    };
    Ok(Storage { chain, retry, vdpa })
}

pub(super) fn seat(config: &DeviceConfig, host: &HostFacts) -> Option<Seat> {
    Some(match config {
        DeviceConfig::Disk(disk) => disk.seat(),
        DeviceConfig::Nic(nic) => Seat::Pci(nic.seat.clone()),
        DeviceConfig::Vfio(vfio) => Seat::Pci(vfio.seat.clone()),
        DeviceConfig::Vf(vf) => Seat::Pci(vf.seat.clone()),
        DeviceConfig::ScsiController(controller) => Seat::Pci(controller.seat.clone()),
        DeviceConfig::VirtioSerial(controller) => Seat::Pci(controller.seat.clone()),
        DeviceConfig::Serial(serial) => serial.seat(),
        DeviceConfig::Channel(_) => Seat::SerialPort { console: false },
        DeviceConfig::Vdpa(vdpa) => Seat::Pci(vdpa.seat.clone()),
        DeviceConfig::VhostScsi(scsi) => Seat::Pci(scsi.seat.clone()),
        DeviceConfig::UsbController(usb) => {
            usb.seat.clone().map_or(Seat::RootSlot, |seat| Seat::Pci(Some(seat)))
        }
        DeviceConfig::Usb(usb) => usb.seat(host),
        DeviceConfig::Iothread(_) => return None,
    })
}

pub(super) fn needs(
    vm: &str,
    id: &DeviceId,
    config: &DeviceConfig,
    storage: &Storage,
    host: &HostFacts,
) -> Vec<HostNeed> {
    match config {
        DeviceConfig::Disk(disk) => disk.needs(id, storage, &host.run_dir),
        DeviceConfig::Nic(nic) => nic.needs(vm, id),
        DeviceConfig::Channel(channel) => channel.needs(id, &host.run_dir),
        DeviceConfig::Vdpa(vdpa) => storage.vdpa.iter().flat_map(|device| vdpa.needs(id, device)).collect(),
        DeviceConfig::VhostScsi(scsi) => scsi.needs(id),
        DeviceConfig::Usb(usb) => usb.needs(host),
        DeviceConfig::UsbController(_)
        | DeviceConfig::Serial(_)
        | DeviceConfig::Vfio(_)
        | DeviceConfig::Vf(_)
        | DeviceConfig::ScsiController(_)
        | DeviceConfig::VirtioSerial(_)
        | DeviceConfig::Iothread(_) => Vec::new(),
    }
}

/// Whether this QEMU has every driver and property that a spec names.
pub fn check_spec(spec: &DeviceSpec, qemu: &Capabilities) -> Result<(), Refusal> {
    let missing = |kind, name: &str| {
        let (id, version) = (spec.id.clone(), qemu.version.clone());
        Err(Refusal::NotInQemu { id, kind, name: name.to_owned(), version })
    };
    for backend in &spec.backends {
        let text = |props: &crate::spec::Props, key: &str| {
            props.get(key).and_then(|v| v.as_str()).unwrap_or("").to_owned()
        };
        match backend {
            Backend::Object(props) if !qemu.objects.contains(&text(props, "qom-type")) => {
                return missing("object", &text(props, "qom-type"));
            }
            Backend::Blockdev(props) if !qemu.block_drivers.contains(&text(props, "driver")) => {
                return missing("block driver", &text(props, "driver"));
            }
            _ => {}
        }
    }
    spec.frontends().try_for_each(|frontend| check_frontend(spec, frontend, qemu))
}

fn check_frontend(spec: &DeviceSpec, frontend: &Frontend, qemu: &Capabilities) -> Result<(), Refusal> {
    let driver = frontend.driver();
    let Some(properties) = qemu.driver(driver) else {
        return Err(Refusal::NotInQemu {
            id: spec.id.clone(),
            kind: "device",
            name: driver.to_owned(),
            version: qemu.version.clone(),
        });
    };
    match frontend.properties().find(|(name, _)| !properties.contains_key(*name)) {
        Some((property, _)) => Err(Refusal::NoProperty {
            id: spec.id.clone(),
            driver: driver.to_owned(),
            property: property.clone(),
            version: qemu.version.clone(),
        }),
        None => Ok(()),
    }
}
