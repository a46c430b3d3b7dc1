//! External snapshots: which image is the top of a disk's chain, and how it gets another one.
//!
//! ```text
//!  base <--- overlay of the oldest snapshot <--- ... <--- overlay of the newest one = the top, which the VM writes
//! ```
//!
//! A snapshot is the image below its overlay, frozen: nobody writes it any more. `book` is what is known of chains and snapshots, one file for all
//! VMs of a user, keyed by the base image's identity; `store` reads and changes it; `top` says from where a disk starts, and what must not be opened
//! for writing. `choose` turns a wish into disks and overlays, `files` makes and removes overlays, `freeze` quiets the guest by its agent, `stopped`
//! takes a snapshot of a VM that does not run, and reverts it to one; `tidy` is what becomes of a chain when a snapshot is
//! deleted, `commit` what is in the way of layers that are to go, `doctor` compares the book with the images, `nodes` with those that QEMU has open. Of one that runs the owner does (`owner::snapshot`, `work::snapshot`).
//!
//! In which order: the overlay is made and on the disk, then the book says that it is the top, then QEMU is told. Whoever dies in between leaves a
//! chain that is whole: an overlay without data is the image below it. What a dead one was about to make stands in the book before it is made.

pub mod book;
pub mod choose;
pub mod commit;
pub mod doctor;
pub mod files;
pub mod freeze;
pub mod nodes;
pub mod stopped;
pub mod store;
pub mod tidy;
pub mod top;

pub use book::{Book, Snapshot, SnapshotName};
pub use store::{Store, StoreError};
