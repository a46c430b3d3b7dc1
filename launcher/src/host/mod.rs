//! The host's side of devices: interfaces, switches, vhost nodes, and meeting what a device needs of them; huge pages for the memory; and what PCI and
//! USB devices, vDPA devices and targets of vhost-scsi there are.

pub mod begun;
pub mod bound;
pub mod genl;
pub mod io_proxy;
pub mod link;
pub mod movable;
pub mod names;
pub mod need;
pub mod ovs;
pub mod pages;
pub mod pci;
pub mod scsi_target;
pub mod sriov;
pub mod sysfs;
pub mod tap;
pub mod usb;
pub mod vdpa;
pub mod vfio;
pub mod vhost;
