//! The host's side of devices: interfaces, switches, vhost nodes, and meeting what a device needs of them; and huge pages for the memory.

pub mod io_proxy;
pub mod link;
pub mod need;
pub mod ovs;
pub mod pages;
pub mod pci;
pub mod pci_names;
pub mod tap;
pub mod vhost;
