//! Table `[[usb]]`: a device of the host given to the guest, or a tablet that QEMU makes.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::controller::UsbSpeed;
use super::rule::UsbRule;
use super::selector::{PortPath, UsbSelector};
use crate::address::Address;
use crate::host::{HostFacts, HostNeed};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{DeviceSpec, Frontend, props};
use crate::topology::Seat;

/// Table `[[usb]]`: exactly one of `host` and `tablet`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsbConfig {
    /// Default: `usbdev0`, `usbdev1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// A device of the host: `1.4`, `1-1.4` or `12d1:0003`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<UsbSelector>,
    /// A pointer that QEMU makes, on USB controller 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tablet: bool,
    /// Index of the USB controller. Default: the first for devices of that speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller: Option<u8>,
    /// Port of the controller. Default: the first free one for devices of that speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
    /// Whether a VM starts without it if it is not plugged into the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Boot order, 0 first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
}

/// A USB device of the host, as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsbFact {
    /// Its bus.
    pub bus: u8,
    /// Its number on the bus.
    pub device: u8,
    /// The ports on the way to it; a root hub has none.
    pub port: Option<PortPath>,
    /// How fast it is.
    pub speed: UsbSpeed,
    /// Vendor.
    pub vendor: u16,
    /// Product.
    pub product: u16,
    /// Its serial number.
    pub serial: Option<String>,
    /// What it calls itself.
    pub title: Option<String>,
    /// Whether it is a hub.
    pub hub: bool,
    /// Whether it is a disk.
    pub storage: bool,
    /// The drivers of the host that have its interfaces.
    pub drivers: Vec<InterfaceDriver>,
}

/// A driver of the host that has an interface of a USB device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceDriver {
    /// The interface: `1-1.4:1.0`.
    pub interface: String,
    /// The driver: `usb-storage`.
    pub driver: String,
}

/// A USB device of the host that a device needs: leased by its port, and the host's again afterwards, with the drivers that it had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct UsbNeed {
    /// Its bus.
    pub bus: u8,
    /// The ports on the way to it.
    pub port: PortPath,
    /// Its number on the bus when it was planned.
    pub device: u8,
    /// Vendor.
    pub vendor: u16,
    /// Product.
    pub product: u16,
    /// Its serial number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Whether it is a disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub storage: bool,
    /// Whether it is no matter which device is plugged into the port: the port was named, and not the device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_port: bool,
    /// The drivers that it had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<InterfaceDriver>,
}

impl UsbNeed {
    /// What it is and where, for people: `0781:5567 on 1-1.4`.
    pub fn name(&self) -> String {
        format!("{:04x}:{:04x} on {}-{}", self.vendor, self.product, self.bus, self.port)
    }
}

impl UsbSelector {
    fn is(&self, fact: &UsbFact) -> bool {
        match self {
            UsbSelector::Address { bus, device } => (fact.bus, fact.device) == (*bus, *device),
            UsbSelector::Port { bus, port } => fact.bus == *bus && fact.port.as_ref() == Some(port),
            UsbSelector::Ids { vendor, product, serial } => {
                (fact.vendor, fact.product) == (*vendor, *product)
                    && serial.as_ref().is_none_or(|serial| fact.serial.as_ref() == Some(serial))
            }
        }
    }

    /// The one device that it means.
    pub(crate) fn find<'a>(&self, host: &'a [UsbFact]) -> Result<(&'a UsbFact, &'a PortPath), UsbRule> {
        let selector = || self.clone();
        let (hubs, devices): (Vec<&UsbFact>, Vec<&UsbFact>) =
            host.iter().filter(|fact| self.is(fact)).partition(|fact| fact.hub || fact.port.is_none());
        match (&devices[..], hubs.is_empty()) {
            ([], true) => Err(UsbRule::Absent { selector: selector() }),
            ([], false) => Err(UsbRule::Hub { selector: selector() }),
            ([fact], _) => Ok((fact, fact.port.as_ref().expect("those without a port count as hubs"))),
            _ => {
                let choices = devices.iter().map(|fact| fact.choice()).collect();
                Err(UsbRule::Ambiguous { selector: selector(), choices })
            }
        }
    }
}

impl UsbFact {
    /// Every way in which it can be named.
    fn choice(&self) -> String {
        let port = self.port.as_ref().map(|port| format!("{}-{port}", self.bus)).unwrap_or_default();
        let serial = self.serial.as_ref();
        let serial = serial.map(|serial| format!(" (serial {serial})")).unwrap_or_default();
        format!("{port}{serial}")
    }
}

impl UsbConfig {
    /// What speaks against it by itself, or by the host.
    pub(crate) fn check(&self, id: &DeviceId, host: &HostFacts) -> Result<(), Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        let rule = |source| Refusal::Usb { id: id.clone(), source };
        match &self.host {
            Some(_) if self.tablet => {
                misplaced("tablet", "host", "a device is the host's or QEMU's tablet; leave one of them out")
            }
            Some(selector) => selector.find(&host.usb).map(drop).map_err(rule),
            None if !self.tablet => {
                let next =
                    "write host = \"12d1:0003\" (`qvirt host usb` lists what there is), or tablet = true";
                Err(Refusal::Missing { id: id.clone(), key: "host", next })
            }
            None if self.optional => {
                misplaced("optional", "tablet", "QEMU makes the tablet, so it is always there")
            }
            None if self.bootindex.is_some() => {
                misplaced("bootindex", "tablet", "nothing can be booted from it")
            }
            None if self.controller.is_some_and(|index| index != 0) => Err(rule(UsbRule::TabletController)),
            None => Ok(()),
        }
    }

    /// Whether its host device may be missing, and is.
    pub fn is_left_out(&self, host: &[UsbFact]) -> bool {
        let absent = |selector: &UsbSelector| matches!(selector.find(host), Err(UsbRule::Absent { .. }));
        self.optional && self.host.as_ref().is_some_and(absent)
    }

    pub(crate) fn seat(&self, host: &HostFacts) -> Seat {
        let (controller, port) = (self.controller, self.port);
        match self.found(host) {
            Some((fact, _)) => Seat::Usb { speeds: vec![fact.speed], controller, port },
            // It is as fast as the controller: QEMU makes it so.
            None => Seat::Usb { speeds: vec![UsbSpeed::Full, UsbSpeed::High], controller: Some(0), port },
        }
    }

    /// Whoever names a port wants what is plugged in there, whatever it is; others want a device like the one they have.
    fn is_by_port(&self) -> bool {
        matches!(self.host, Some(UsbSelector::Port { .. }))
    }

    fn found<'a>(&self, host: &'a HostFacts) -> Option<(&'a UsbFact, &'a PortPath)> {
        self.host.as_ref()?.find(&host.usb).ok()
    }

    pub(crate) fn needs(&self, host: &HostFacts) -> Vec<HostNeed> {
        let need = |(fact, port): (&UsbFact, &PortPath)| {
            HostNeed::Usb(UsbNeed {
                bus: fact.bus,
                port: port.clone(),
                device: fact.device,
                vendor: fact.vendor,
                product: fact.product,
                serial: fact.serial.clone(),
                storage: fact.storage,
                by_port: self.is_by_port(),
                drivers: fact.drivers.clone(),
            })
        };
        self.found(host).map(need).into_iter().collect()
    }

    pub(crate) fn lower(
        &self,
        id: &DeviceId,
        address: &Address,
        controller: Option<&DeviceId>,
        host: &HostFacts,
    ) -> DeviceSpec {
        let Address::Usb { port, .. } = address else {
            unreachable!("a USB device claims a USB port and gets one")
        };
        let (bus, port) = (controller.map(|controller| format!("{controller}.0")), port.to_string());
        let frontend = match self.found(host) {
            Some((fact, path)) => {
                let by_port = self.is_by_port();
                json!({
                    "driver": "usb-host",
                    "id": id.as_str(),
                    "bus": bus,
                    "port": port,
                    "hostbus": fact.bus,
                    "hostport": path.as_str(),
                    "vendorid": (!by_port).then_some(fact.vendor),
                    "productid": (!by_port && fact.product != 0).then_some(fact.product),
                    "bootindex": self.bootindex,
                })
            }
            None => json!({"driver": "usb-tablet", "id": id.as_str(), "bus": bus, "port": port}),
        };
        DeviceSpec {
            id: id.clone(),
            backends: Vec::new(),
            frontend: Some(Frontend(props(frontend))),
            companions: Vec::new(),
        }
    }
}
