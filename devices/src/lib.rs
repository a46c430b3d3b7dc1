//! Virtual devices as pure data: config in, QEMU objects out.
//!
//! Nothing here opens, reads, connects or awaits. A config table ([`device::DeviceConfig`]) is planned against a machine
//! ([`layout::Layout`]), the host's facts ([`host::HostFacts`]) and what this QEMU can do ([`capabilities::Capabilities`]); whatever can
//! be wrong is refused there ([`refusal::Refusal`]). The planned device ([`layout::Placed`]) carries its QEMU objects
//! ([`spec::DeviceSpec`]), which print themselves as a command line and as QMP commands. Nowhere else is a device option spelled.
//!
//! ```text
//!  DeviceConfig --plan--> Placed { address, spec, needs } --argv--> -blockdev ... -device ...
//!   disk retry nic port      |                            --calls-> blockdev-add ... device_add ...
//!   controller vdpa ...  Layout: Topology (seats), labels, MAC addresses, generations
//! ```
//!
//! `id` builds every name, `address` every place in the guest and `bdf` those on the host, `text` and `units` are the newtypes' one door, `keyval` is QEMU's `key=value` notation,
//! `machine` the part of the command line that is no device.

pub mod address;
pub mod bdf;
pub mod capabilities;
pub mod chardev;
pub mod controller;
pub mod device;
pub mod disk;
pub mod host;
pub mod id;
pub mod keyval;
pub mod layout;
pub mod machine;
pub mod nic;
pub mod passthrough;
pub mod pcie;
pub mod port;
pub mod refusal;
pub mod retry;
pub mod spec;
pub mod text;
pub mod topology;
pub mod units;
pub mod usb;
pub mod vdpa;
pub mod vf;
pub mod vhost_scsi;

pub use device::DeviceConfig;
pub use id::DeviceId;
pub use layout::{Layout, Placed, Plan, plan, plan_machine};
pub use refusal::Refusal;
pub use topology::Moment;
