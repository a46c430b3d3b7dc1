//! To be written.

pub mod guest;
pub mod qemu;
