//! USB controllers and their ports, and slots of the root complex for controllers.

use super::{Address, DEVICE_SLOTS, SeatCount, Topology, TopologyError};
use crate::address::{Function, PciSeat, Slot};
use crate::id::DeviceId;
use crate::usb::{UsbModel, UsbRule, UsbSpeed};

impl Topology {
    /// The id of a USB controller.
    pub fn usb_controller(&self, index: u8) -> Option<&DeviceId> {
        self.usb.get(&index).map(|(id, _)| id)
    }

    /// The USB controllers, by index.
    pub fn usb_controllers(&self) -> Vec<(DeviceId, UsbModel)> {
        self.usb.values().cloned().collect()
    }

    /// Makes the ports of a new USB controller known; gives its index. One that is known already keeps its own.
    pub(crate) fn add_usb_controller(
        &mut self,
        id: &DeviceId,
        model: UsbModel,
        wish: Option<u8>,
    ) -> Result<u8, UsbRule> {
        if let Some((index, _)) = self.usb.iter().find(|(_, (known, _))| known == id) {
            return Ok(*index);
        }
        let generation = model.generation();
        if let Some((holder, _)) = self.usb.values().find(|(_, other)| other.generation() == generation) {
            return Err(UsbRule::Twice { generation, holder: holder.clone() });
        }
        if let Some((before, other)) = self.usb.values().find(|(_, other)| other.generation() > generation) {
            return Err(UsbRule::Order { generation, before: before.clone(), other: other.generation() });
        }
        let expected = u8::try_from(self.usb.len()).unwrap_or(u8::MAX);
        if let Some(found) = wish.filter(|found| *found != expected) {
            return Err(UsbRule::Index { expected, found });
        }
        self.usb.insert(expected, (id.clone(), model));
        Ok(expected)
    }

    /// Puts a USB controller back that is known to have this index: adoption.
    pub(crate) fn set_usb_controller(&mut self, index: u8, id: &DeviceId, model: UsbModel) {
        self.usb.insert(index, (id.clone(), model));
    }

    /// The last slot of the root complex with no root port and no device.
    pub(super) fn root_slot(&self) -> Result<Address, TopologyError> {
        let is_free = |slot: &u8| {
            let in_slot =
                |address: &Address| matches!(address, Address::Pci(PciSeat::Root(s, _)) if s.0 == *slot);
            !self.taken.keys().any(in_slot) && self.ports.iter().all(|port| port.slot.0 != *slot)
        };
        let slot = DEVICE_SLOTS.rev().find(is_free).ok_or(TopologyError::NoSlot)?;
        Ok(Address::Pci(PciSeat::Root(Slot(slot), Function(0))))
    }

    /// A port for a device that can be as fast as any of `speeds`, in the order in which they are preferred.
    pub(super) fn usb_port(
        &self,
        speeds: &[UsbSpeed],
        controller: Option<u8>,
        port: Option<u8>,
    ) -> Result<Address, TopologyError> {
        let speed = speeds.first().copied().unwrap_or(UsbSpeed::High);
        let ports_of = |model: UsbModel| speeds.iter().find_map(|speed| model.ports_for(*speed));
        let mut candidates: Vec<(u8, UsbModel)> =
            self.usb.iter().map(|(index, (_, model))| (*index, *model)).collect();
        if let Some(index) = controller {
            let known = candidates.clone();
            candidates.retain(|(known, _)| *known == index);
            let Some((_, model)) = candidates.first().copied() else {
                return Err(UsbRule::NoSuchController { index, controllers: known }.into());
            };
            if ports_of(model).is_none() {
                return Err(UsbRule::WrongController { index, model, speed }.into());
            }
        }
        candidates.retain(|(_, model)| ports_of(*model).is_some());
        let Some((index, model)) = candidates.first().copied() else {
            return Err(UsbRule::NoController { speed, model: speed.model() }.into());
        };
        if let Some(port) = port {
            if !(1..=model.ports()).contains(&port) {
                return Err(UsbRule::NoSuchPort { index, model, port }.into());
            }
            if !ports_of(model).is_some_and(|ports| ports.contains(&port)) {
                return Err(UsbRule::WrongPort { index, model, port, speed }.into());
            }
            let address = Address::Usb { controller: index, port };
            self.is_free(&address)?;
            return Ok(address);
        }
        let all = candidates.iter().flat_map(|(index, model)| {
            let ports = ports_of(*model).into_iter().flatten();
            ports.map(move |port| Address::Usb { controller: *index, port })
        });
        let free = all.into_iter().find(|address| !self.taken.contains_key(address));
        free.ok_or_else(|| UsbRule::Full { speed, controllers: candidates }.into())
    }

    pub(super) fn usb_counts(&self) -> impl Iterator<Item = SeatCount> {
        self.usb.iter().map(|(index, (id, model))| {
            let on = |address: &&Address| matches!(address, Address::Usb { controller, .. } if controller == index);
            let (taken, total) = (self.taken.keys().filter(on).count(), usize::from(model.ports()));
            SeatCount { kind: format!("usb-port {id}"), free: total.saturating_sub(taken), total }
        })
    }
}
