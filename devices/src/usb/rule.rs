//! What a USB controller or device must not be. Each message names the thing, the rule and the next step.

use thiserror::Error;

use super::controller::{UsbGeneration, UsbModel, UsbSpeed};
use super::selector::UsbSelector;
use crate::id::DeviceId;

/// A rule for USB, broken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UsbRule {
    /// One controller of each generation.
    #[error(
        "a VM has at most one USB controller of each generation, and {holder} is its {generation} controller: leave one of them out"
    )]
    Twice {
        /// The generation.
        generation: UsbGeneration,
        /// Who is it already.
        holder: DeviceId,
    },
    /// Older generations come first.
    #[error(
        "a {generation} controller stands behind {before}, which is {other}: write USB controllers in the order USB 1.1, USB 2.0, USB 3.0"
    )]
    Order {
        /// The generation.
        generation: UsbGeneration,
        /// The controller before it.
        before: DeviceId,
        /// Its generation.
        other: UsbGeneration,
    },
    /// Controllers are counted from 0 without gaps.
    #[error(
        "index {found} stands where {expected} is due: USB controllers are numbered from 0 in the order in which they are written"
    )]
    Index {
        /// What was due.
        expected: u8,
        /// What was there.
        found: u8,
    },
    /// No controller at all, or none for devices of that speed.
    #[error(
        "no USB controller of this VM takes a {} device: write [[usb_controller]] with model = \"{model}\" into the VM's file and \
         start it anew; USB controllers cannot be plugged in while it runs",
        .speed.generation()
    )]
    NoController {
        /// The speed.
        speed: UsbSpeed,
        /// What would take it.
        model: UsbModel,
    },
    /// The controller of the wish is not there.
    #[error("there is no USB controller {index}: {}", known(.controllers))]
    NoSuchController {
        /// The wish.
        index: u8,
        /// What there is.
        controllers: Vec<(u8, UsbModel)>,
    },
    /// A port that the controller does not have.
    #[error("USB controller {index} ({model}) has no port {port}: its ports are 1 to {}", .model.ports())]
    NoSuchPort {
        /// The controller.
        index: u8,
        /// What it is.
        model: UsbModel,
        /// The wish.
        port: u8,
    },
    /// A port for devices of another speed.
    #[error("port {port} of USB controller {index} ({model}) does not take a {} device: {}", .speed.generation(), .model.rule())]
    WrongPort {
        /// The controller.
        index: u8,
        /// What it is.
        model: UsbModel,
        /// The wish.
        port: u8,
        /// The device's speed.
        speed: UsbSpeed,
    },
    /// The controller takes no device of that speed.
    #[error("USB controller {index} ({model}) takes no {} device: {}", .speed.generation(), .model.rule())]
    WrongController {
        /// The controller.
        index: u8,
        /// What it is.
        model: UsbModel,
        /// The device's speed.
        speed: UsbSpeed,
    },
    /// All ports are taken.
    #[error("no port for another {} device is free: {}; detach one", .speed.generation(), full(.controllers))]
    Full {
        /// The speed.
        speed: UsbSpeed,
        /// The controllers that take it.
        controllers: Vec<(u8, UsbModel)>,
    },
    /// A set of functions has a slot of its own on the root complex.
    #[error(
        "an ich9-ehci and its three companions are functions of one slot: give it a `seat` such as `pcie.0:1d.0`, or none"
    )]
    Companions,
    /// The tablet's place.
    #[error("a USB tablet is on USB controller 0, where every system looks for it: leave `controller` out")]
    TabletController,
    /// Nothing like it on the host.
    #[error(
        "no USB device {selector} is plugged into this host: `qvirt host usb` lists those that are; in a VM's file, `optional = true` lets \
         the VM start without it"
    )]
    Absent {
        /// What was asked for.
        selector: UsbSelector,
    },
    /// Several like it on the host.
    #[error("{selector} are several devices of this host: name one of them, {}", .choices.join(", "))]
    Ambiguous {
        /// What was asked for.
        selector: UsbSelector,
        /// How each of them could be named.
        choices: Vec<String>,
    },
    /// Hubs stay with the host.
    #[error("{selector} is a hub: name a device that is plugged into it; `qvirt host usb` lists them")]
    Hub {
        /// What was asked for.
        selector: UsbSelector,
    },
    /// The same device for two of this VM.
    #[error("{selector} is the host's device of {holder} already: a USB device is given once")]
    Given {
        /// What was asked for.
        selector: UsbSelector,
        /// Who has it.
        holder: DeviceId,
    },
}

fn known(controllers: &[(u8, UsbModel)]) -> String {
    let known: Vec<String> = controllers.iter().map(|(index, model)| format!("{index} ({model})")).collect();
    match known.as_slice() {
        [] => {
            "this VM has none, and none can be plugged in while it runs; write [[usb_controller]]".to_owned()
        }
        _ => format!("this VM has {}", known.join(", ")),
    }
}

fn full(controllers: &[(u8, UsbModel)]) -> String {
    let each = controllers.iter().map(|(index, model)| format!("controller {index}: {}", model.rule()));
    each.collect::<Vec<_>>().join("; ")
}
