//! Writes a disk all the time, reads it back and verifies it, and keeps account: what a guest's application feels of its storage.
//!
//! [`run`] does the I/O and the accounting, [`process`] makes a process of it that can be asked, [`verify`] looks at a disk afterwards,
//! [`block`] is what stands on the disk. The reports are what tests read.

use serde::{Deserialize, Serialize};

mod account;
pub mod block;
pub mod process;
pub mod run;
#[cfg(test)]
mod tests;
pub mod verify;

/// How much of a device is written, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes from the beginning of the device; a multiple of `block`.
    pub area: u64,
    /// Bytes of one write; a multiple of 512.
    pub block: u32,
}

impl Shape {
    /// How many blocks that is.
    pub fn blocks(self) -> u64 {
        self.area / u64::from(self.block)
    }

    /// Whether a pattern of this shape can be written.
    pub fn is_possible(self) -> bool {
        (512..=1 << 20).contains(&self.block)
            && self.block.is_multiple_of(512)
            && self.area.is_multiple_of(u64::from(self.block))
            && self.blocks() >= 2
    }
}

/// What was done to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// It was opened; again after each error, since the device may be another one.
    Open,
    /// A block was written.
    Write,
    /// A block was read.
    Read,
}

/// An operation that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed.
    pub operation: Operation,
    /// The system's number of the error, if it has one.
    pub errno: Option<i32>,
    /// Where on the device.
    pub offset: u64,
    /// When, in microseconds since the start.
    pub at_us: u64,
}

/// A block that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Where on the device.
    pub offset: u64,
    /// The generation that was to stand there, if there is but one that may.
    pub expected: Option<u64>,
    /// What stands there.
    pub found: String,
    /// When it was read, in microseconds since the start.
    pub at_us: u64,
}

/// The operation that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outstanding {
    /// What it does.
    pub operation: Operation,
    /// Where on the device.
    pub offset: u64,
    /// When it began, in microseconds since the start.
    pub since_us: u64,
}

/// From the first error to the next operation that went well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// When the first operation failed, in microseconds since the start.
    pub began_us: u64,
    /// When the next one went well, if one did.
    pub ended_us: Option<u64>,
    /// How many failed.
    pub errors: u64,
}

/// How many failures, mismatches and outages are kept one by one: the first ones. All are counted.
pub const KEPT: usize = 64;

/// The account of a running pattern, and of one that was stopped. Times are microseconds since its start, of a clock that nobody sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The device, by its path.
    pub device: String,
    /// What is written.
    pub shape: Shape,
    /// When it started: microseconds since 1970, as the guest's clock has it.
    pub started_unix_us: u64,
    /// When this report was made.
    pub now_us: u64,
    /// How often the area was begun.
    pub generation: u64,
    /// Writes that went well.
    pub writes: u64,
    /// Reads that went well.
    pub reads: u64,
    /// Blocks that were read and were what they had to be.
    pub verified: u64,
    /// Blocks that were not.
    pub mismatch_count: u64,
    /// The first of them.
    pub mismatches: Vec<Mismatch>,
    /// Operations that failed.
    pub error_count: u64,
    /// The first of them.
    pub errors: Vec<Failure>,
    /// Times without I/O.
    pub outage_count: u64,
    /// The first of them.
    pub outages: Vec<Outage>,
    /// Whether the last operation that ended went well.
    pub working: bool,
    /// The longest time from one operation that went well to the next one, less what the rate made it wait.
    pub longest_pause_us: u64,
    /// When that pause ended.
    pub longest_pause_at_us: u64,
    /// When the last operation went well.
    pub last_success_us: u64,
    /// The operation under way, with a disk that hangs for as long as it hangs.
    pub outstanding: Option<Outstanding>,
}

/// What stands on a disk that a pattern has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The device, by its path.
    pub device: String,
    /// What was written, as its blocks tell.
    pub shape: Shape,
    /// The newest generation.
    pub generation: u64,
    /// Whole blocks that stand where they belong.
    pub verified: u64,
    /// Those among them that should be newer, by the order in which blocks are written. One whose write failed is.
    pub stale: u64,
    /// Blocks that this run has not reached, in its first generation.
    pub unwritten: u64,
    /// Blocks that are damaged, or stand where they do not belong.
    pub mismatch_count: u64,
    /// The first of them.
    pub mismatches: Vec<Mismatch>,
}

impl Verdict {
    /// Whether all that stands there is whole and as new as it must be.
    pub fn is_consistent(&self) -> bool {
        self.mismatch_count == 0 && self.stale == 0
    }
}
