//! To be written.

pub mod fake;
pub mod guest;
pub mod qemu;
pub mod vhost_user;
pub mod vm;
