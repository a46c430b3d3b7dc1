//! The host's side of devices: interfaces, switches, vhost nodes, and meeting what a device needs of them.

pub mod link;
pub mod need;
pub mod ovs;
pub mod tap;
pub mod vhost;
