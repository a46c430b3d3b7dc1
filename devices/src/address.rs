//! Where a device sits in the guest: PCI seats, SCSI addresses, serial ports. Text is the one form for configs, journals and people.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::DeviceId;
use crate::text::{TextError, by_text};

/// A place for one PCI function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PciSeat {
    /// Behind a root port, slot 0, function 0: the one place a device can be plugged into and out of. Text: the port's id.
    Port(DeviceId),
    /// On the root complex itself. Text: `pcie.0:SLOT.FUNCTION`, in hex.
    Root(Slot, Function),
    /// Behind a PCIe-to-PCI bridge. Text: `BRIDGE:SLOT.FUNCTION`, in hex.
    Bridge(DeviceId, Slot, Function),
}

/// A PCI slot: 0 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u8);

/// A PCI function: 0 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Function(pub u8);

impl PciSeat {
    /// The bus as QEMU names it.
    pub fn bus(&self) -> &str {
        match self {
            PciSeat::Port(port) => port.as_str(),
            PciSeat::Root(..) => "pcie.0",
            PciSeat::Bridge(bridge, ..) => bridge.as_str(),
        }
    }

    /// Slot and function as QEMU's `addr` property wants them.
    pub fn addr(&self) -> String {
        match self {
            PciSeat::Port(_) => "00.0".to_owned(),
            PciSeat::Root(slot, function) | PciSeat::Bridge(_, slot, function) => {
                format!("{:02x}.{:x}", slot.0, function.0)
            }
        }
    }
}

impl FromStr for PciSeat {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let rule =
            "the id of a root port such as `rp3`, or bus, slot and function in hex such as `pcie.0:04.0`";
        let fail = || TextError::new("PCI seat", text, rule);
        let Some((bus, place)) = text.split_once(':') else {
            return text.parse().map(PciSeat::Port).map_err(|_| fail());
        };
        let (slot, function) = place.split_once('.').ok_or_else(fail)?;
        let hex = |digits: &str, past: u8| {
            let short = (1..=2).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            u8::from_str_radix(digits, 16).ok().filter(|value| short && *value < past)
        };
        let (slot, function) =
            (Slot(hex(slot, 32).ok_or_else(fail)?), Function(hex(function, 8).ok_or_else(fail)?));
        match bus {
            "pcie.0" => Ok(PciSeat::Root(slot, function)),
            bridge => Ok(PciSeat::Bridge(bridge.parse().map_err(|_| fail())?, slot, function)),
        }
    }
}

impl fmt::Display for PciSeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PciSeat::Port(port) => write!(f, "{port}"),
            PciSeat::Root(..) | PciSeat::Bridge(..) => write!(f, "{}:{}", self.bus(), self.addr()),
        }
    }
}

by_text!(PciSeat);

/// A SCSI address on a virtio-scsi controller. virtio-scsi has one bus (channel), number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScsiAddress {
    /// The controller's index.
    pub controller: u8,
    /// 0 to 255.
    pub target: u8,
    /// The LUN: 0 to 16383.
    pub unit: u16,
}

impl ScsiAddress {
    /// Past the last LUN.
    pub const UNITS: u16 = 16384;
}

/// A device's place in the guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A PCI function.
    Pci(PciSeat),
    /// A SCSI LUN. Text: `scsi:CONTROLLER:BUS:TARGET:UNIT`.
    Scsi(ScsiAddress),
    /// A port of a virtio-serial controller. Text: `virtio-serial:CONTROLLER:NUMBER`.
    SerialPort {
        /// The controller's index.
        controller: u8,
        /// The port's number; 0 is for a console.
        nr: u8,
    },
    /// An ISA serial port. Text: `isa-serial:INDEX`.
    Isa(u8),
    /// A port of a USB controller. Text: `usb:CONTROLLER:PORT`.
    Usb {
        /// The controller's index.
        controller: u8,
        /// The port, from 1.
        port: u8,
    },
}

impl FromStr for Address {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| TextError::new("address", text, rule);
        let numbers = |rest: &str, rule: &str| -> Result<Vec<u16>, TextError> {
            rest.split(':').map(|part| part.parse().map_err(|_| fail(rule))).collect()
        };
        let byte = |number: u16, rule: &str| u8::try_from(number).map_err(|_| fail(rule));
        if let Some(rest) = text.strip_prefix("scsi:") {
            let rule = "`scsi:CONTROLLER:0:TARGET:UNIT`";
            return match numbers(rest, rule)?.as_slice() {
                &[controller, 0, target, unit] if unit < ScsiAddress::UNITS => {
                    let (controller, target) = (byte(controller, rule)?, byte(target, rule)?);
                    Ok(Address::Scsi(ScsiAddress { controller, target, unit }))
                }
                _ => Err(fail(rule)),
            };
        }
        if let Some(rest) = text.strip_prefix("virtio-serial:") {
            let rule = "`virtio-serial:CONTROLLER:NUMBER`";
            return match numbers(rest, rule)?.as_slice() {
                &[controller, nr] => {
                    Ok(Address::SerialPort { controller: byte(controller, rule)?, nr: byte(nr, rule)? })
                }
                _ => Err(fail(rule)),
            };
        }
        if let Some(rest) = text.strip_prefix("usb:") {
            let rule = "`usb:CONTROLLER:PORT`";
            return match numbers(rest, rule)?.as_slice() {
                &[controller, port] if port != 0 => {
                    Ok(Address::Usb { controller: byte(controller, rule)?, port: byte(port, rule)? })
                }
                _ => Err(fail(rule)),
            };
        }
        if let Some(rest) = text.strip_prefix("isa-serial:") {
            return rest.parse().map(Address::Isa).map_err(|_| fail("`isa-serial:INDEX`"));
        }
        text.parse().map(Address::Pci)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Pci(seat) => write!(f, "{seat}"),
            Address::Scsi(a) => write!(f, "scsi:{}:0:{}:{}", a.controller, a.target, a.unit),
            Address::SerialPort { controller, nr } => write!(f, "virtio-serial:{controller}:{nr}"),
            Address::Isa(index) => write!(f, "isa-serial:{index}"),
            Address::Usb { controller, port } => write!(f, "usb:{controller}:{port}"),
        }
    }
}

by_text!(Address);
