//! The owner of a QEMU virtual machine.

pub mod accel;
pub mod blueprint;
pub mod config;
pub mod console;
pub mod folders;
pub mod host;
pub mod image;
pub mod journal;
pub mod lease;
pub mod locks;
pub mod probe;
pub mod process;
