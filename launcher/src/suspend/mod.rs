//! Disk I/O suspension: requests that failed are held and tried again while the guest runs on.
//!
//! `state` says where a disk stands, `native` when QEMU's own retries have gone through, `hang` when storage does not answer, `parking` has the nodes
//! that requests wait in, `turn` moves disks between these and their own, `line` leads to a disk's proxy. Who decides is the owner (`owner::io`): it
//! alone knows what happened. What engines there are and what of a device they need is in `devices::retry`.

pub mod hang;
pub mod line;
pub mod native;
pub mod parking;
pub mod state;
pub mod turn;

pub use state::{Change, Counters, DiskIo, Outage, Uptime, What};
