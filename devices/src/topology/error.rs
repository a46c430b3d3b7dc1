//! Why no seat could be had, in words that name the seat, the reason and the next step.

use thiserror::Error;

use crate::address::Address;
use crate::usb::UsbRule;

/// Why no seat could be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TopologyError {
    /// Every root port is taken.
    #[error(
        "no root port is free, of {ports}: detach a device, or plan more ([pcie] root_ports, or another [[pcie_controller]]) and start the VM anew"
    )]
    NoFreePort {
        /// How many there are.
        ports: usize,
    },
    /// The machine cannot have more root ports.
    #[error("no room for another root port: pcie.0 has 30 slots of eight; ask for fewer")]
    NoRoom,
    /// The wish is taken.
    #[error("seat {address} is taken by {occupant}: choose another, or none to get the first free one")]
    Taken {
        /// The wish.
        address: Address,
        /// Who holds it.
        occupant: String,
    },
    /// The wish does not exist.
    #[error("there is no seat {address}: `qvirt devices` lists the seats; known here: {known}")]
    NoSuchSeat {
        /// The wish.
        address: String,
        /// What there is.
        known: String,
    },
    /// The root complex while the machine runs.
    #[error(
        "seat {address} cannot be plugged into while the VM runs: pcie.0 and conventional PCI buses take no hot-plug; use a root port, or --config"
    )]
    NotHot {
        /// The wish.
        address: Address,
    },
    /// A slot of the root complex that is not for devices.
    #[error(
        "slot {slot:#04x} of pcie.0 is not for devices: 0x00 to 0x02 are the system's, IDE and USB's, and the display's, 0x1f the chipset's; \
             use 0x03 to 0x1e, or a root port"
    )]
    ReservedSlot {
        /// The slot.
        slot: u8,
    },
    /// A function of a slot that the guest would not look for.
    #[error(
        "seat {address} is not function 0: a guest looks for the others only in a device of several functions; write {bus}:{slot:02x}.0, or on \
         pcie.0 put a [[vfio]] with multifunction = true there first"
    )]
    NotFunctionZero {
        /// The wish.
        address: Address,
        /// Its bus.
        bus: String,
        /// Its slot.
        slot: u8,
    },
    /// The controller of the wish is not there.
    #[error(
        "there is no virtio-scsi controller {index}: leave the controller out to have one made, or write [[scsi_controller]]"
    )]
    NoController {
        /// The wish.
        index: u8,
    },
    /// A rule for USB ports.
    #[error(transparent)]
    Usb(#[from] UsbRule),
    /// No slot of the root complex is free.
    #[error(
        "no slot of pcie.0 is free for it: 0x03 to 0x1e have root ports or devices; ask for fewer root ports"
    )]
    NoSlot,
    /// All addresses of a kind are taken.
    #[error("no free {kind} is left: detach a device that has one, or give this one another place")]
    Full {
        /// `SCSI target`, `virtio-serial port`, `ISA serial port`.
        kind: &'static str,
    },
}
