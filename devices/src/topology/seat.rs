//! The words for seats: which kinds there are, who holds one, how many are free.

use serde::{Deserialize, Serialize};

use crate::address::PciSeat;
use crate::usb::UsbSpeed;

/// Who holds a seat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Occupant {
    /// The device's id; of a foreign one, what QEMU calls it.
    pub name: String,
    /// How it holds it.
    pub hold: Hold,
}

/// How a seat is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// By a device of ours.
    Present,
    /// By a device of ours that was asked to leave.
    Leaving,
    /// By something that qvirt did not make.
    Foreign,
}

/// A kind of seat with a wish, if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seat {
    /// A PCI function; without a wish, a root port.
    Pci(Option<PciSeat>),
    /// A LUN on a virtio-scsi controller.
    Scsi {
        /// The controller's index; default: the first with a free target.
        controller: Option<u8>,
        /// Default: the first free one.
        target: Option<u8>,
        /// Default: 0.
        unit: Option<u16>,
    },
    /// A port of a virtio-serial controller; consoles begin at 0, channels at 1.
    SerialPort {
        /// Whether it is a console.
        console: bool,
    },
    /// An ISA serial port.
    Isa,
    /// A slot of the root complex, function 0, for what is not plugged while the machine runs: the last one that is free.
    RootSlot,
    /// A port of a USB controller.
    Usb {
        /// How fast the device can be.
        speeds: Vec<UsbSpeed>,
        /// The controller's index; default: the first that takes it.
        controller: Option<u8>,
        /// Default: the first free one.
        port: Option<u8>,
    },
}

/// Whether the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the start: everything can be placed everywhere, and root ports grow on demand.
    Cold,
    /// In a running machine.
    Hot,
}

/// Free and taken seats of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SeatCount {
    /// `root-port`, `scsi-target CONTROLLER`, `virtio-serial CONTROLLER`, `isa-serial`, `usb-port CONTROLLER`.
    pub kind: String,
    /// Free seats.
    pub free: usize,
    /// All seats.
    pub total: usize,
}
