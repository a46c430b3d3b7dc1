//! Who sits where: the machine's root ports, bridges and controllers, and which device holds which address.
//!
//! qvirt keeps this table itself: the guest's own view lags (a bridge is empty until the guest has enumerated it). A seat whose
//! device was asked to leave is still taken; only `release` frees it. Does not know what kinds of device there are.

mod error;
mod seat;
mod usb;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

pub use error::TopologyError;
pub use seat::{Hold, Moment, Occupant, Seat, SeatCount};

use crate::address::{Address, Function, PciSeat, ScsiAddress, Slot};
use crate::id::DeviceId;
use crate::pcie::{Bridge, RootPort};
use crate::units::Size;
use crate::usb::UsbModel;

/// The table of seats of one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    ports: Vec<RootPort>,
    bridges: Vec<Bridge>,
    /// Whether ports are added as cold devices need them; not when they were written out.
    grows: bool,
    pref64_reserve: Option<Size>,
    scsi: BTreeMap<u8, DeviceId>,
    serial: BTreeMap<u8, DeviceId>,
    #[serde(default)]
    usb: BTreeMap<u8, (DeviceId, UsbModel)>,
    taken: BTreeMap<Address, Occupant>,
    /// Slots of the root bus whose function 0 says that there are more.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    multifunction: BTreeSet<Slot>,
    #[serde(skip)]
    vacated: Vacated,
}

/// Ports that devices left, the latest last. A preference and no fact about seats: tables that differ in nothing else are equal.
#[derive(Clone, Debug, Default)]
struct Vacated(Vec<DeviceId>);

impl PartialEq for Vacated {
    fn eq(&self, _: &Vacated) -> bool {
        true
    }
}

const DEVICE_SLOTS: RangeInclusive<u8> = 0x03..=0x1e;
const PORT_SLOTS: RangeInclusive<u8> = 0x01..=0x1e;
const TARGETS: usize = 256;
/// `max_ports` of virtio-serial: 0 to 30 usable.
const SERIAL_PORTS: u8 = 31;
const ISA_PORTS: u8 = 4;

impl Topology {
    /// A machine whose root ports grow with its cold devices.
    pub fn growing(pref64_reserve: Option<Size>) -> Topology {
        Topology { grows: true, pref64_reserve, ..Topology::default() }
    }

    /// A machine whose controllers were written out and checked.
    pub fn written_out(ports: Vec<RootPort>, bridges: Vec<Bridge>) -> Topology {
        let mut topology = Topology { ports, ..Topology::default() };
        for bridge in &bridges {
            let occupant = Occupant { name: bridge.id.to_string(), hold: Hold::Present };
            topology.taken.insert(Address::Pci(PciSeat::Port(bridge.seat.clone())), occupant);
        }
        topology.bridges = bridges;
        topology
    }

    /// Adds spare ports, for hot-plug.
    pub fn add_spare(&mut self, count: u16) -> Result<(), TopologyError> {
        (0..count).try_for_each(|_| self.grow().map(drop))
    }

    /// Root ports in order.
    pub fn ports(&self) -> &[RootPort] {
        &self.ports
    }

    /// Bridges in order.
    pub fn bridges(&self) -> &[Bridge] {
        &self.bridges
    }

    /// Every taken seat.
    pub fn taken(&self) -> &BTreeMap<Address, Occupant> {
        &self.taken
    }

    /// Free root ports, in order.
    pub fn free_ports(&self) -> impl Iterator<Item = &RootPort> {
        self.ports
            .iter()
            .filter(|port| !self.taken.contains_key(&Address::Pci(PciSeat::Port(port.id.clone()))))
    }

    /// The id of a virtio-scsi controller.
    pub fn scsi_controller(&self, index: u8) -> Option<&DeviceId> {
        self.scsi.get(&index)
    }

    /// The id of a virtio-serial controller.
    pub fn serial_controller(&self, index: u8) -> Option<&DeviceId> {
        self.serial.get(&index)
    }

    /// Makes the LUNs of a new virtio-scsi controller known; gives its index, or `None` when there are 256.
    pub fn add_scsi_controller(&mut self, id: &DeviceId) -> Option<u8> {
        add_controller(&mut self.scsi, id)
    }

    /// Makes the ports of a new virtio-serial controller known; gives its index, or `None` when there are 256.
    pub fn add_serial_controller(&mut self, id: &DeviceId) -> Option<u8> {
        add_controller(&mut self.serial, id)
    }

    /// Puts a virtio-scsi controller back that is known to have this index: adoption.
    pub(crate) fn set_scsi_controller(&mut self, index: u8, id: &DeviceId) {
        self.scsi.insert(index, id.clone());
    }

    /// Puts a virtio-serial controller back that is known to have this index: adoption.
    pub(crate) fn set_serial_controller(&mut self, index: u8, id: &DeviceId) {
        self.serial.insert(index, id.clone());
    }

    /// Takes a seat for a device: the one wished for, or the first free one.
    pub fn claim(&mut self, id: &DeviceId, seat: &Seat, moment: Moment) -> Result<Address, TopologyError> {
        let address = match seat {
            Seat::Pci(Some(wish)) => self.wished_pci(wish, moment)?,
            Seat::Pci(None) => self.any_port(moment)?,
            Seat::Scsi { controller, target, unit } => {
                Address::Scsi(self.lun(*controller, *target, *unit)?)
            }
            Seat::SerialPort { console } => self.serial_port(*console)?,
            Seat::Isa => self.first_free((0..ISA_PORTS).map(Address::Isa), "ISA serial port")?,
            Seat::RootSlot => self.root_slot()?,
            Seat::Usb { speeds, controller, port } => self.usb_port(speeds, *controller, *port)?,
        };
        self.take(address.clone(), Occupant { name: id.to_string(), hold: Hold::Present })?;
        Ok(address)
    }

    /// Takes the very seat that a device is known to have: adoption.
    pub fn take(&mut self, address: Address, occupant: Occupant) -> Result<(), TopologyError> {
        match self.taken.get(&address) {
            Some(held) if held.name != occupant.name => {
                Err(TopologyError::Taken { address, occupant: held.name.clone() })
            }
            _ => {
                self.taken.insert(address, occupant);
                Ok(())
            }
        }
    }

    /// `device_del` was sent: the seat stays taken.
    pub fn leaving(&mut self, id: &DeviceId) {
        self.set_hold(id, Hold::Leaving);
    }

    /// The guest refused to let go: the device is present again.
    pub fn stays(&mut self, id: &DeviceId) {
        self.set_hold(id, Hold::Present);
    }

    fn set_hold(&mut self, id: &DeviceId, hold: Hold) {
        self.taken
            .values_mut()
            .filter(|o| o.name == id.as_str() && o.hold != Hold::Foreign)
            .for_each(|o| o.hold = hold);
    }

    /// The device is gone: its seat is free. A controller's own seats go with it.
    pub fn release(&mut self, id: &DeviceId) {
        let seats = self.taken.iter().filter(|(_, o)| o.name == id.as_str() && o.hold != Hold::Foreign);
        let seats: Vec<Address> = seats.map(|(address, _)| address.clone()).collect();
        seats.iter().for_each(|seat| self.was_left(seat));
        self.taken.retain(|_, occupant| occupant.name != id.as_str() || occupant.hold == Hold::Foreign);
        self.scsi.retain(|_, controller| controller != id);
        self.serial.retain(|_, controller| controller != id);
        self.usb.retain(|_, (controller, _)| controller != id);
    }

    /// Function 0 of a slot of the root bus says that there are more.
    pub(crate) fn has_functions(&mut self, slot: Slot) {
        self.multifunction.insert(slot);
    }

    /// Replaces what is known of foreign devices.
    pub fn set_foreign(&mut self, seats: impl IntoIterator<Item = (Address, String)>) {
        self.taken.retain(|_, occupant| occupant.hold != Hold::Foreign);
        for (address, name) in seats {
            self.taken.entry(address).or_insert(Occupant { name, hold: Hold::Foreign });
        }
    }

    /// Devices that sit on a controller.
    pub fn users_of(&self, controller: &DeviceId) -> Vec<&str> {
        let on = |address: &Address| match address {
            Address::Scsi(a) => self.scsi.get(&a.controller) == Some(controller),
            Address::SerialPort { controller: index, .. } => self.serial.get(index) == Some(controller),
            Address::Pci(PciSeat::Port(port) | PciSeat::Bridge(port, ..)) => port == controller,
            Address::Usb { controller: index, .. } => {
                self.usb.get(index).is_some_and(|(id, _)| id == controller)
            }
            Address::Pci(PciSeat::Root(..)) | Address::Isa(_) => false,
        };
        self.taken.iter().filter(|(address, _)| on(address)).map(|(_, o)| o.name.as_str()).collect()
    }

    /// How many seats of each kind are free.
    pub fn counts(&self) -> Vec<SeatCount> {
        let targets = |index: &u8| {
            let held = self.taken.keys().filter_map(|a| match a {
                Address::Scsi(a) if a.controller == *index => Some(a.target),
                _ => None,
            });
            held.collect::<BTreeSet<u8>>().len()
        };
        let ports = |index: &u8| {
            self.taken
                .keys()
                .filter(|a| matches!(a, Address::SerialPort { controller, .. } if controller == index))
                .count()
        };
        let count = |kind: String, taken: usize, total: usize| SeatCount {
            kind,
            free: total.saturating_sub(taken),
            total,
        };
        let free = self.free_ports().count();
        let mut counts = vec![count("root-port".into(), self.ports.len() - free, self.ports.len())];
        counts
            .extend(self.scsi.iter().map(|(i, id)| count(format!("scsi-target {id}"), targets(i), TARGETS)));
        counts.extend(
            self.serial
                .iter()
                .map(|(i, id)| count(format!("virtio-serial {id}"), ports(i), SERIAL_PORTS.into())),
        );
        counts.extend(self.usb_counts());
        counts
    }

    fn wished_pci(&mut self, wish: &PciSeat, moment: Moment) -> Result<Address, TopologyError> {
        let address = Address::Pci(wish.clone());
        match wish {
            PciSeat::Port(port) => {
                while moment == Moment::Cold && self.could_grow_to(port) {
                    self.grow()?;
                }
                if !self.has_port(port) {
                    return Err(self.no_such_seat(port.to_string(), moment));
                }
            }
            PciSeat::Root(..) | PciSeat::Bridge(..) if moment == Moment::Hot => {
                return Err(TopologyError::NotHot { address });
            }
            PciSeat::Root(slot, _) if !DEVICE_SLOTS.contains(&slot.0) => {
                return Err(TopologyError::ReservedSlot { slot: slot.0 });
            }
            PciSeat::Root(slot, Function(1..)) if self.multifunction.contains(slot) => {}
            PciSeat::Root(slot, Function(1..)) | PciSeat::Bridge(_, slot, Function(1..)) => {
                let bus = wish.bus().to_owned();
                return Err(TopologyError::NotFunctionZero { address, bus, slot: slot.0 });
            }
            PciSeat::Root(slot, _) => {
                if let Some(port) = self.ports.iter().find(|p| p.slot == *slot) {
                    return Err(TopologyError::Taken { address, occupant: format!("root port {}", port.id) });
                }
            }
            // Slot 0 of the bridge's bus is its own hot-plug controller's.
            PciSeat::Bridge(bridge, slot, _) => {
                if slot.0 == 0 || self.bridges.iter().all(|b| b.id != *bridge) {
                    return Err(self.no_such_seat(wish.to_string(), moment));
                }
            }
        }
        Ok(address)
    }

    /// Notes that a device left a seat a moment ago.
    pub(crate) fn was_left(&mut self, seat: &Address) {
        if let Address::Pci(PciSeat::Port(port)) = seat {
            self.vacated.0.retain(|other| other != port);
            self.vacated.0.push(port.clone());
        }
    }

    /// The first port that nobody sat on, or the one that was left the longest ago. Seen with QEMU 7.2 and 10.0: a guest with ACPI hot-plug may
    /// be told of an eject twice, if anything else is plugged meanwhile, and the second time it ejects whatever sits there by then.
    fn any_port(&mut self, moment: Moment) -> Result<Address, TopologyError> {
        let left = |port: &&RootPort| {
            self.vacated.0.iter().position(|other| *other == port.id).map_or(0, |place| place + 1)
        };
        if let Some(port) = self.free_ports().min_by_key(left) {
            return Ok(Address::Pci(PciSeat::Port(port.id.clone())));
        }
        if self.grows && moment == Moment::Cold {
            return self.grow().map(|id| Address::Pci(PciSeat::Port(id)));
        }
        Err(TopologyError::NoFreePort { ports: self.ports.len() })
    }

    fn has_port(&self, id: &DeviceId) -> bool {
        self.ports.iter().any(|port| port.id == *id)
    }

    /// Whether `id` is a name that a port to come will have.
    pub(crate) fn could_grow_to(&self, id: &DeviceId) -> bool {
        let number = id.as_str().strip_prefix("rp").and_then(|n| n.parse::<usize>().ok());
        let to_come = self.ports.len() + 1..=30 * 8;
        self.grows && number.is_some_and(|n| to_come.contains(&n) && DeviceId::numbered("rp", n) == *id)
    }

    fn no_such_seat(&self, address: String, moment: Moment) -> TopologyError {
        let buses = self
            .ports
            .iter()
            .map(|p| p.id.to_string())
            .chain(self.bridges.iter().map(|b| format!("{}:SLOT.0", b.id)));
        let known = match buses.collect::<Vec<_>>().join(", ") {
            _ if self.grows && moment == Moment::Cold => {
                "rp1 to rp240, made as they are asked for".to_owned()
            }
            none if none.is_empty() => "none".to_owned(),
            known => known,
        };
        TopologyError::NoSuchSeat { address, known }
    }

    /// Adds the next port by the convention, in the first slot that no device was put into.
    fn grow(&mut self) -> Result<DeviceId, TopologyError> {
        let chassis = u8::try_from(self.ports.len() + 1).map_err(|_| TopologyError::NoRoom)?;
        let next = match self.ports.last() {
            Some(last) if last.function.0 < 7 => Some((last.slot, Function(last.function.0 + 1))),
            last => {
                let after = last.map_or(*PORT_SLOTS.start(), |l| l.slot.0 + 1);
                let device_in = |slot: u8| {
                    self.taken.keys().any(|a| matches!(a, Address::Pci(PciSeat::Root(s, _)) if s.0 == slot))
                };
                (after..=*PORT_SLOTS.end())
                    .find(|slot| !device_in(*slot))
                    .map(|slot| (Slot(slot), Function(0)))
            }
        };
        let (slot, function) = next.ok_or(TopologyError::NoRoom)?;
        let id = DeviceId::numbered("rp", chassis.into());
        let port = slot.0 << 3 | function.0;
        self.ports.push(RootPort {
            id: id.clone(),
            chassis,
            port,
            slot,
            function,
            pref64_reserve: self.pref64_reserve,
        });
        Ok(id)
    }

    pub(crate) fn lun(
        &self,
        controller: Option<u8>,
        target: Option<u8>,
        unit: Option<u16>,
    ) -> Result<ScsiAddress, TopologyError> {
        let controllers: Vec<u8> = match controller {
            Some(index) if self.scsi.contains_key(&index) => vec![index],
            Some(index) => return Err(TopologyError::NoController { index }),
            None => {
                self.scsi.iter().filter(|(_, id)| !self.is_leaving(id)).map(|(index, _)| *index).collect()
            }
        };
        let free = |a: &ScsiAddress| !self.taken.contains_key(&Address::Scsi(*a));
        let unused = |c: u8, t: u8| {
            !self.taken.keys().any(|a| matches!(a, Address::Scsi(a) if a.controller == c && a.target == t))
        };
        for controller in controllers.iter().copied() {
            let found = match (target, unit) {
                (Some(target), Some(unit)) => {
                    let wish = ScsiAddress { controller, target, unit };
                    self.is_free(&Address::Scsi(wish))?;
                    Some(wish)
                }
                (Some(target), None) => {
                    (0..ScsiAddress::UNITS).map(|unit| ScsiAddress { controller, target, unit }).find(free)
                }
                (None, unit) => {
                    let target = (0..=u8::MAX).find(|target| unused(controller, *target));
                    target.map(|target| ScsiAddress { controller, target, unit: unit.unwrap_or(0) })
                }
            };
            if let Some(address) = found {
                return Ok(address);
            }
        }
        Err(TopologyError::Full { kind: "SCSI target" })
    }

    /// Whether a controller was asked to leave: then it takes no new devices.
    fn is_leaving(&self, id: &DeviceId) -> bool {
        self.taken.values().any(|o| o.name == id.as_str() && o.hold == Hold::Leaving)
    }

    /// Whether a virtio-serial port of this kind is free.
    pub fn has_free_serial_port(&self, console: bool) -> bool {
        self.serial_port(console).is_ok()
    }

    /// Whether a LUN without a wish for a controller would find one.
    pub fn has_free_target(&self) -> bool {
        self.lun(None, None, None).is_ok()
    }

    fn serial_port(&self, console: bool) -> Result<Address, TopologyError> {
        let first = u8::from(!console);
        let staying = self.serial.iter().filter(|(_, id)| !self.is_leaving(id)).map(|(index, _)| *index);
        let ports = staying.flat_map(|controller| {
            (first..SERIAL_PORTS).map(move |nr| Address::SerialPort { controller, nr })
        });
        self.first_free(ports, "virtio-serial port")
    }

    fn first_free(
        &self,
        mut candidates: impl Iterator<Item = Address>,
        kind: &'static str,
    ) -> Result<Address, TopologyError> {
        candidates.find(|a| !self.taken.contains_key(a)).ok_or(TopologyError::Full { kind })
    }

    fn is_free(&self, address: &Address) -> Result<(), TopologyError> {
        match self.taken.get(address) {
            Some(held) => Err(TopologyError::Taken { address: address.clone(), occupant: held.name.clone() }),
            None => Ok(()),
        }
    }
}

/// The index of a controller that is known already, or the lowest free one.
fn add_controller(controllers: &mut BTreeMap<u8, DeviceId>, id: &DeviceId) -> Option<u8> {
    let known = controllers.iter().find(|(_, known)| *known == id).map(|(index, _)| *index);
    let index = known.or_else(|| (0..=u8::MAX).find(|index| !controllers.contains_key(index)))?;
    controllers.insert(index, id.clone());
    Some(index)
}
