//! USB: controllers of the guest with their ports, devices of the host that are given to it, and the tablet.
//!
//! A VM has at most one controller of each generation, in the order USB 1.1, 2.0, 3.0; its place in that order is its index, by which a
//! device names it. A device of the host is named by where it is (`1.4`, `1-1.4`) or by what it is (`12d1:0003`), found among the host's
//! facts when it is planned, and followed by QEMU on the port where it was found: bus and device number are others after each replug.

mod controller;
mod device;
mod rule;
mod selector;

pub use controller::{UsbControllerConfig, UsbGeneration, UsbModel, UsbSpeed, warnings};
pub use device::{InterfaceDriver, UsbConfig, UsbFact, UsbNeed};
pub use rule::UsbRule;
pub use selector::{PortPath, UsbSelector};
