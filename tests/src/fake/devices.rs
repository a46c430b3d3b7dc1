//! The fake's devices: buses, seats, properties, plugging and removal. Refusals are in the words of QEMU 10.0.2.

use serde_json::{Value, json};

use super::machine::{Machine, Props, text};
use super::{Effect, Failure};

/// A device that the guest sees.
pub(super) struct Device {
    pub(super) id: String,
    pub(super) driver: String,
    pub(super) props: Props,
    /// The bus it sits on, by name.
    pub(super) bus: String,
    /// Slot and function, on a PCI bus.
    pub(super) slot: Option<u32>,
    pub(super) hotplugged: bool,
    /// `device_del` was sent.
    pub(super) leaving: bool,
    /// `ok`, `failed` or `nospace`.
    pub(super) io_status: &'static str,
    /// Requests that were done.
    pub(super) done: u64,
}

/// Kinds of bus, by QEMU's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bus {
    Pcie,
    Pci,
    Scsi,
    VirtioSerial,
    Isa,
    Usb,
}

impl Bus {
    fn name(self) -> &'static str {
        match self {
            Bus::Pcie => "PCIE",
            Bus::Pci => "PCI",
            Bus::Scsi => "SCSI",
            Bus::VirtioSerial => "virtio-serial-bus",
            Bus::Isa => "ISA",
            Bus::Usb => "usb-bus",
        }
    }

    /// The bus that a driver's devices sit on.
    fn under(driver: &str) -> Bus {
        match driver {
            "isa-serial" => Bus::Isa,
            "virtconsole" | "virtserialport" => Bus::VirtioSerial,
            "usb-host" | "usb-storage" | "usb-tablet" => Bus::Usb,
            scsi if scsi.starts_with("scsi-") => Bus::Scsi,
            _ => Bus::Pci,
        }
    }

    /// The bus that a driver's devices bring along, and the suffix of its name.
    fn of(driver: &str) -> Option<(Bus, &'static str)> {
        match driver {
            "pcie-root-port" => Some((Bus::Pcie, "")),
            "pcie-pci-bridge" => Some((Bus::Pci, "")),
            "virtio-scsi-pci" | "vhost-scsi-pci" => Some((Bus::Scsi, ".0")),
            "virtio-serial-pci" => Some((Bus::VirtioSerial, ".0")),
            usb if usb.contains("xhci") || usb.contains("uhci") || usb.contains("ehci") => {
                Some((Bus::Usb, ".0"))
            }
            _ => None,
        }
    }

    fn takes(self, wanted: Bus) -> bool {
        self == wanted || (self == Bus::Pcie && wanted == Bus::Pci)
    }
}

impl Device {
    /// Whether QEMU would plug and unplug it while the machine lives: not on the root complex, nor on ISA.
    pub(super) fn hotpluggable(&self) -> bool {
        !matches!(self.bus.as_str(), "pcie.0" | "isa.0")
    }

    fn brings(&self) -> Option<(Bus, String)> {
        Bus::of(&self.driver).map(|(bus, suffix)| (bus, format!("{}{suffix}", self.id)))
    }

    fn is_virtio(&self) -> bool {
        self.driver.starts_with("virtio-") && self.driver.ends_with("-pci")
    }

    /// What QEMU gives as the `qdev` of `query-block` and the `qom-path` of BLOCK_IO_ERROR.
    pub(super) fn block_path(&self) -> String {
        let backend = if self.is_virtio() { "/virtio-backend" } else { "" };
        format!("/machine/peripheral/{}{backend}", self.id)
    }
}

fn refuse<T>(desc: String) -> Result<T, Failure> {
    Err(Failure::generic(desc))
}

/// `addr`: a slot, `slot.function` in hexadecimal, or the number of both.
fn devfn(addr: &Value) -> Option<u32> {
    if let Some(number) = addr.as_u64() {
        return u32::try_from(number).ok().filter(|number| *number < 256);
    }
    let text = addr.as_str()?;
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let (slot, function) = (hex(slot)?, hex(function)?);
    (slot < 32 && function < 8).then_some(slot << 3 | function)
}

impl Machine {
    fn buses(&self) -> Vec<(Bus, String)> {
        let fixed = [(Bus::Pcie, "pcie.0".to_owned()), (Bus::Isa, "isa.0".to_owned())];
        fixed.into_iter().chain(self.devices.iter().filter_map(Device::brings)).collect()
    }

    /// The bus's place in the object tree: `parent_bus` of what sits on it.
    pub(super) fn bus_path(&self, bus: &str) -> String {
        let owner = self.devices.iter().find(|device| device.brings().is_some_and(|(_, name)| name == bus));
        match (bus, owner) {
            ("pcie.0", _) => "/machine/q35/pcie.0".to_owned(),
            (_, Some(owner)) if owner.is_virtio() => {
                format!("/machine/peripheral/{}/virtio-backend/{bus}", owner.id)
            }
            (_, Some(owner)) => format!("/machine/peripheral/{}/{bus}", owner.id),
            _ => "/machine/unattached/device[2]/isa.0".to_owned(),
        }
    }

    /// `device_add` and `-device`.
    pub(super) fn device_add(&mut self, props: &Props, hotplugged: bool) -> Result<Value, Failure> {
        let driver = text(props, "driver");
        if driver.is_empty() {
            return refuse("Parameter 'driver' is missing".to_owned());
        }
        if !self.qemu.devices.contains_key(driver) {
            return refuse(format!("'{driver}' is not a valid device model name"));
        }
        let bus = self.bus_for(driver, text(props, "bus"))?;
        let id = text(props, "id");
        let mut device = Device {
            id: id.to_owned(),
            driver: driver.to_owned(),
            props: props.clone(),
            bus,
            slot: None,
            hotplugged,
            leaving: false,
            io_status: "ok",
            done: 0,
        };
        if hotplugged && !device.hotpluggable() {
            return refuse(format!("Bus '{}' does not support hotplugging", device.bus));
        }
        if self.devices.iter().any(|other| other.id == id) && !id.is_empty() {
            return refuse(format!("Duplicate device ID '{id}'"));
        }
        self.check_properties(&device)?;
        self.check_backends(&device)?;
        device.slot = self.seat(&device)?;
        if device.driver == "virtio-blk-pci" && text(props, "drive").is_empty() {
            return refuse("drive property not set".to_owned());
        }
        self.check_drive(&device)?;
        if id.is_empty() {
            device.id = format!("device[{}]", self.devices.len());
        }
        self.devices.push(device);
        Ok(json!({}))
    }

    fn bus_for(&self, driver: &str, name: &str) -> Result<String, Failure> {
        let wanted = Bus::under(driver);
        let buses = self.buses();
        if name.is_empty() {
            let first = buses.into_iter().find(|(bus, _)| bus.takes(wanted));
            return match first {
                Some((_, name)) => Ok(name),
                None => refuse(format!("No '{}' bus found for device '{driver}'", wanted.name())),
            };
        }
        match buses.into_iter().find(|(_, known)| known == name) {
            Some((bus, name)) if bus.takes(wanted) => Ok(name),
            Some((bus, _)) => refuse(format!("Device '{driver}' can't go on {} bus", bus.name())),
            None => refuse(format!("Bus '{name}' not found")),
        }
    }

    fn check_properties(&self, device: &Device) -> Result<(), Failure> {
        let driver = &device.driver;
        let known = self.qemu.devices.get(driver).map_or(&[][..], Vec::as_slice);
        let given = device.props.iter().filter(|(key, _)| !matches!(key.as_str(), "driver" | "id" | "bus"));
        for (key, value) in given {
            let Some(property) = known.iter().find(|property| property.name == *key) else {
                return refuse(format!("Property '{driver}.{key}' not found"));
            };
            if !self.qemu.strict() {
                continue;
            }
            let wrong =
                |expected: &str| refuse(format!("Invalid parameter type for '{key}', expected: {expected}"));
            let integer = value.is_u64() || value.is_i64();
            match property.kind.as_str() {
                _ if key == "addr" => match devfn(value) {
                    Some(_) => {}
                    None => return refuse(format!("Property '{driver}.addr' doesn't take value {value}")),
                },
                "bool" if !value.is_boolean() => return wrong("boolean"),
                "str" | "OnOffAuto" | "BlockdevOnError" if !value.is_string() => return wrong("string"),
                "OnOffAuto" if !matches!(text(&device.props, key), "on" | "off" | "auto") => {
                    return refuse(format!("Parameter '{key}' does not accept value {value}"));
                }
                kind if kind.starts_with("uint") && !integer => {
                    return refuse(format!("Parameter '{key}' expects uint64"));
                }
                kind if kind.starts_with("int") && !integer => {
                    return refuse(format!("Parameter '{key}' expects int64"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_backends(&self, device: &Device) -> Result<(), Failure> {
        // A virtio device's own properties belong to the device within it.
        let owner = match device.driver.strip_suffix("-pci") {
            Some(virtio) if device.is_virtio() => format!("{virtio}-device"),
            _ => device.driver.clone(),
        };
        let used = |key: &str, value: &str| self.devices.iter().any(|other| text(&other.props, key) == value);
        let missing =
            |key: &str, value: &str| refuse(format!("Property '{owner}.{key}' can't find value '{value}'"));
        let (drive, netdev) = (text(&device.props, "drive"), text(&device.props, "netdev"));
        let (chardev, iothread) = (text(&device.props, "chardev"), text(&device.props, "iothread"));
        if !drive.is_empty() && self.info_of(drive).is_none() {
            return missing("drive", drive);
        }
        if !netdev.is_empty() && !self.netdevs.contains_key(netdev) {
            return missing("netdev", netdev);
        }
        if used("netdev", netdev) && !netdev.is_empty() {
            return refuse(format!("Property '{owner}.netdev' can't take value '{netdev}', it's in use"));
        }
        if !chardev.is_empty() && !self.chardevs.contains_key(chardev) {
            return missing("chardev", chardev);
        }
        if used("chardev", chardev) && !chardev.is_empty() {
            return refuse(format!(
                "Property '{owner}.chardev' can't take value '{chardev}': chardev '{chardev}' is already in use"
            ));
        }
        if !iothread.is_empty() && !self.objects.contains_key(iothread) {
            return Err(Failure::absent(iothread));
        }
        let mac = text(&device.props, "mac");
        let pairs = mac.split(':').filter(|pair| u8::from_str_radix(pair, 16).is_ok()).count();
        if !mac.is_empty() && pairs != 6 {
            return refuse(format!("Property '{owner}.mac' doesn't take value '{mac}'"));
        }
        Ok(())
    }

    /// Takes a free place on the device's bus, or the one asked for.
    fn seat(&self, device: &Device) -> Result<Option<u32>, Failure> {
        let others = || self.devices.iter().filter(|other| other.bus == device.bus);
        let number = |props: &Props, key: &str| props.get(key).and_then(Value::as_u64).unwrap_or(0);
        match Bus::under(&device.driver) {
            Bus::Pci | Bus::Pcie => self.pci_seat(device).map(Some),
            Bus::Scsi => {
                let lun = |props: &Props| ["channel", "scsi-id", "lun"].map(|key| number(props, key));
                let wanted = lun(&device.props);
                if wanted[1] > 255 {
                    return refuse(format!("bad scsi device id: {}", wanted[1]));
                }
                match others().find(|other| lun(&other.props) == wanted) {
                    Some(other) => refuse(format!("lun already used by '{}'", other.id)),
                    None => Ok(None),
                }
            }
            Bus::VirtioSerial => {
                let nr = number(&device.props, "nr");
                match others()
                    .any(|other| device.props.contains_key("nr") && number(&other.props, "nr") == nr)
                {
                    true => refuse(format!("virtio-serial-bus: A port already exists at id {nr}")),
                    false => Ok(None),
                }
            }
            Bus::Isa | Bus::Usb => Ok(None),
        }
    }

    fn pci_seat(&self, device: &Device) -> Result<u32, Failure> {
        let at = |place: u32| {
            self.devices.iter().find(|other| other.bus == device.bus && other.slot == Some(place))
        };
        // Slot 0 of the root complex is the host bridge, 31 the ISA bridge.
        let reserved = |place: u32| device.bus == "pcie.0" && (place >> 3 == 0 || place >> 3 == 31);
        let place = match device.props.get("addr").and_then(devfn) {
            Some(place) => place,
            None => {
                let free =
                    (0..32).map(|slot| slot << 3).find(|place| at(*place).is_none() && !reserved(*place));
                free.ok_or_else(|| {
                    Failure::generic(format!("PCI: no slot/function available for {}", device.driver))
                })?
            }
        };
        let (slot, function) = (place >> 3, place & 7);
        if let Some(other) = at(place) {
            return refuse(format!(
                "PCI: slot {slot} function {function} not available for {}, in use by {},id={}",
                device.driver, other.driver, other.id
            ));
        }
        // A port has one slot only, so whatever comes later finds function 0 there.
        let port =
            self.devices.iter().any(|other| other.id == device.bus && other.driver == "pcie-root-port");
        let first = at(if port { 0 } else { slot << 3 });
        match first {
            Some(first) if device.hotplugged => refuse(format!(
                "PCI: slot {} function 0 already occupied by {}, new func {} cannot be exposed to guest.",
                if port { 0 } else { slot },
                first.driver,
                device.driver
            )),
            _ => Ok(place),
        }
    }

    /// A node has one writer.
    fn check_drive(&self, device: &Device) -> Result<(), Failure> {
        let drive = text(&device.props, "drive");
        if drive.is_empty() || device.driver == "scsi-cd" {
            return Ok(());
        }
        let user = |device: &Device| match device.is_virtio() {
            true => device.block_path(),
            false => device.id.clone(),
        };
        let other = self.devices.iter().find(|other| text(&other.props, "drive") == drive);
        let above = self.nodes.iter().find(|node| node.children.iter().any(|(_, child)| child == drive));
        let holder = match (other, above) {
            (Some(other), _) => {
                format!("block device '{}' (uses node '{drive}' as 'root' child)", user(other))
            }
            (None, Some(node)) => format!("node '{}' (uses node '{drive}' as 'file' child)", node.name),
            (None, None) => return Ok(()),
        };
        refuse(format!(
            "Permission conflict on node '{drive}': permissions 'write' are both required by {holder} and unshared by block device \
             '{}' (uses node '{drive}' as 'root' child).",
            user(device)
        ))
    }

    /// The device goes, and with it what sits on its bus.
    pub(super) fn remove(&mut self, id: &str) -> Vec<Effect> {
        let Some(index) = self.devices.iter().position(|device| device.id == id) else { return Vec::new() };
        let device = self.devices.remove(index);
        let mut effects = Vec::new();
        if let Some((_, bus)) = device.brings() {
            let above = self.devices.iter().filter(|other| other.bus == bus).map(|other| other.id.clone());
            for other in above.collect::<Vec<_>>() {
                effects.extend(self.remove(&other));
            }
        }
        let path = format!("/machine/peripheral/{id}");
        if device.is_virtio() {
            effects.push(Effect::event("DEVICE_DELETED", json!({"path": format!("{path}/virtio-backend")})));
        }
        effects.push(Effect::event("DEVICE_DELETED", json!({"device": id, "path": path})));
        effects
    }
}
