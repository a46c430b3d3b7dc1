//! USB controllers: which there are, what sits on their ports, and what people are warned of.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::device::UsbFact;
use super::rule::UsbRule;
use crate::address::{Address, Function, PciSeat, Slot};
use crate::id::DeviceId;
use crate::spec::{DeviceSpec, Frontend, props};
use crate::text::words;

words! {
    /// How fast a USB device is, in the kernel's words: megabits a second.
    UsbSpeed, "USB speed" {
        /// USB 1.1: keyboards, mice.
        Low = "1.5",
        /// USB 1.1.
        Full = "12",
        /// USB 2.0.
        High = "480",
        /// USB 3.0 and what came after it.
        Super = "5000" | "10000" | "20000" | "40000",
    }
}

words! {
    /// A model of a USB controller.
    UsbModel, "USB controller" {
        /// USB 1.1: QEMU's `piix3-usb-uhci`.
        Uhci = "uhci" | "piix3-uhci" | "piix3-usb-uhci",
        /// USB 2.0: QEMU's `usb-ehci`.
        Ehci = "ehci" | "usb-ehci",
        /// USB 2.0 with companions, so that its ports take USB 1.1 devices as well: the set of Intel's ICH9.
        Ich9Ehci = "ich9-ehci" | "ich9-ehci1",
        /// USB 3.0: QEMU's `qemu-xhci`.
        Xhci = "xhci" | "qemu-xhci",
        /// USB 3.0: QEMU's `nec-usb-xhci`, for guests that know NEC's.
        NecXhci = "nec-xhci" | "nec-usb-xhci",
    }
}

/// A generation of USB, and with it of controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UsbGeneration {
    /// USB 1.1
    One,
    /// USB 2.0
    Two,
    /// USB 3.0
    Three,
}

impl UsbGeneration {
    /// All of them, in order.
    pub const ALL: [UsbGeneration; 3] = [UsbGeneration::One, UsbGeneration::Two, UsbGeneration::Three];

    /// The model that brings it.
    fn model(self) -> UsbModel {
        match self {
            UsbGeneration::One => UsbModel::Uhci,
            UsbGeneration::Two => UsbModel::Ehci,
            UsbGeneration::Three => UsbModel::Xhci,
        }
    }
}

impl fmt::Display for UsbGeneration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UsbGeneration::One => "USB 1.1",
            UsbGeneration::Two => "USB 2.0",
            UsbGeneration::Three => "USB 3.0",
        })
    }
}

impl UsbSpeed {
    /// The generation whose controllers are made for it.
    pub fn generation(self) -> UsbGeneration {
        match self {
            UsbSpeed::Low | UsbSpeed::Full => UsbGeneration::One,
            UsbSpeed::High => UsbGeneration::Two,
            UsbSpeed::Super => UsbGeneration::Three,
        }
    }

    /// The model of controller that is made for it.
    pub(crate) fn model(self) -> UsbModel {
        self.generation().model()
    }
}

/// Ports of an xHCI that are for USB 3 devices; those behind them are for the others.
const XHCI_SUPER: u8 = 4;

impl UsbModel {
    /// Which generation it is of.
    pub fn generation(self) -> UsbGeneration {
        match self {
            UsbModel::Uhci => UsbGeneration::One,
            UsbModel::Ehci | UsbModel::Ich9Ehci => UsbGeneration::Two,
            UsbModel::Xhci | UsbModel::NecXhci => UsbGeneration::Three,
        }
    }

    /// How many ports it has.
    pub fn ports(self) -> u8 {
        match self {
            UsbModel::Uhci => 2,
            UsbModel::Ehci | UsbModel::Ich9Ehci => 6,
            UsbModel::Xhci | UsbModel::NecXhci => 8,
        }
    }

    /// Its ports for devices of a speed, if it takes them.
    pub fn ports_for(self, speed: UsbSpeed) -> Option<RangeInclusive<u8>> {
        use UsbSpeed::{Full, High, Low, Super};
        match (self, speed) {
            (UsbModel::Uhci, Low | Full)
            | (UsbModel::Ehci, High)
            | (UsbModel::Ich9Ehci, Low | Full | High) => Some(1..=self.ports()),
            (UsbModel::Xhci | UsbModel::NecXhci, Super) => Some(1..=XHCI_SUPER),
            (UsbModel::Xhci | UsbModel::NecXhci, Low | Full | High) => Some(XHCI_SUPER + 1..=self.ports()),
            _ => None,
        }
    }

    /// What sits on its ports, for somebody whose device has no place there.
    pub(super) fn rule(self) -> &'static str {
        match self {
            UsbModel::Uhci => "a UHCI takes two USB 1.1 devices",
            UsbModel::Ehci => "an EHCI takes six USB 2.0 devices",
            UsbModel::Ich9Ehci => "an EHCI with companions takes six devices of USB 1.1 and 2.0",
            UsbModel::Xhci | UsbModel::NecXhci => {
                "an xHCI takes four USB 3.0 devices on ports 1 to 4, and four of USB 1.1 and 2.0 on ports 5 to 8"
            }
        }
    }

    /// QEMU's name.
    fn driver(self) -> &'static str {
        match self {
            UsbModel::Uhci => "piix3-usb-uhci",
            UsbModel::Ehci => "usb-ehci",
            UsbModel::Ich9Ehci => "ich9-usb-ehci1",
            UsbModel::Xhci => "qemu-xhci",
            UsbModel::NecXhci => "nec-usb-xhci",
        }
    }
}

/// Table `[[usb_controller]]`: a USB controller. At most one of each generation, the older ones first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsbControllerConfig {
    /// Default: `usb0`, `usb1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// What it is.
    pub model: UsbModel,
    /// Its place among the USB controllers, from 0: written for people, and checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u8>,
    /// PCI seat. Default: a slot of the root complex, from the last one down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Functions of the ICH9's companions: number, and the first of the EHCI's ports that is also theirs.
const COMPANIONS: [(u8, u8); 3] = [(0, 0), (1, 2), (2, 4)];
/// The function of the ICH9's EHCI.
const ICH9_EHCI: u8 = 7;

impl UsbControllerConfig {
    pub(crate) fn check(&self) -> Result<(), UsbRule> {
        match (self.model, &self.seat) {
            (UsbModel::Ich9Ehci, Some(seat)) if !matches!(seat, PciSeat::Root(..)) => {
                Err(UsbRule::Companions)
            }
            _ => Ok(()),
        }
    }

    /// The seats beside its own that it takes: those of its companions and its own function.
    pub(crate) fn further_seats(&self, address: &Address) -> Vec<Address> {
        match (self.model, address) {
            (UsbModel::Ich9Ehci, Address::Pci(PciSeat::Root(slot, _))) => {
                let numbers = COMPANIONS[1..].iter().map(|(number, _)| *number).chain([ICH9_EHCI]);
                numbers.map(|number| Address::Pci(PciSeat::Root(*slot, Function(number)))).collect()
            }
            _ => Vec::new(),
        }
    }

    pub(crate) fn lower(&self, id: &DeviceId, address: &Address) -> DeviceSpec {
        let Address::Pci(seat) = address else { unreachable!("a controller claims a PCI seat and gets one") };
        let spec = |frontend, companions| DeviceSpec {
            id: id.clone(),
            backends: Vec::new(),
            frontend: Some(Frontend(props(frontend))),
            companions,
        };
        let driver = self.model.driver();
        let (bus, addr) = (seat.bus(), seat.addr());
        match (self.model, seat) {
            (UsbModel::Ich9Ehci, PciSeat::Root(slot, _)) => {
                let addr = PciSeat::Root(*slot, Function(ICH9_EHCI)).addr();
                spec(
                    json!({"driver": driver, "id": id.as_str(), "bus": bus, "addr": addr, "multifunction": true}),
                    companions(id, *slot),
                )
            }
            (UsbModel::Xhci | UsbModel::NecXhci, _) => spec(
                // So many of each that port N takes USB 3 devices up to 4, and USB 2 devices above.
                json!({"driver": driver, "id": id.as_str(), "bus": bus, "addr": addr, "p2": self.model.ports(), "p3": XHCI_SUPER}),
                Vec::new(),
            ),
            _ => spec(json!({"driver": driver, "id": id.as_str(), "bus": bus, "addr": addr}), Vec::new()),
        }
    }
}

fn companions(id: &DeviceId, slot: Slot) -> Vec<Frontend> {
    let one = |(function, first): (u8, u8)| {
        let number = function + 1;
        Frontend(props(json!({
            "driver": format!("ich9-usb-uhci{number}"),
            "id": id.companion(number),
            "bus": "pcie.0",
            "addr": PciSeat::Root(slot, Function(function)).addr(),
            "multifunction": (function == 0).then_some(true),
            "masterbus": format!("{id}.0"),
            "firstport": first,
        })))
    };
    COMPANIONS.into_iter().map(one).collect()
}

/// What is allowed and yet worth a word, of a VM with these controllers on a host with these devices. Nothing of one without USB.
pub fn warnings(controllers: &[(DeviceId, UsbModel)], host: &[UsbFact]) -> Vec<String> {
    let Some((_, last)) = controllers.last() else { return Vec::new() };
    let mut warnings = Vec::new();
    let has = |generation| controllers.iter().any(|(_, model)| model.generation() == generation);
    let lacking: Vec<String> = UsbGeneration::ALL
        .into_iter()
        .filter(|generation| !has(*generation))
        .map(|generation| format!("{generation} (model = \"{}\")", generation.model()))
        .collect();
    if !lacking.is_empty() {
        warnings.push(format!(
            "this VM has fewer than three USB controllers: it lacks {}, and with it devices that need that generation",
            lacking.join(" and ")
        ));
    }
    for (id, model) in controllers.iter().filter(|(_, model)| model.generation() == UsbGeneration::Three) {
        warnings.push(format!(
            "{id}: a guest without a driver for USB 3.0 does not see the {model} controller nor what is plugged into it: see its system's \
             documentation for the driver"
        ));
    }
    let fastest = host.iter().filter(|fact| fact.port.is_none()).map(|fact| fact.speed.generation()).max();
    match fastest {
        None => warnings.push(
            "this host has no USB controller, or no driver for it: only the USB tablet can be used in this VM".to_owned(),
        ),
        // A controller of a generation takes the devices of those before.
        Some(fastest) if fastest < last.generation() => warnings.push(format!(
            "this host has no {} controller, or no driver for it: {} gets no {} device",
            last.generation(),
            controllers.last().map_or("", |(id, _)| id.as_str()),
            last.generation()
        )),
        Some(_) => {}
    }
    warnings
}
