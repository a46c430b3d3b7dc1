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
pub mod injection;
pub mod quirks;
pub mod record;
pub mod request;
pub mod status;
pub mod work;
pub mod control;
pub mod policy;
pub mod owner;
pub mod adopt;
pub mod launch;
pub mod cli;
pub mod edit;
