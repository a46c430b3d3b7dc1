//! The agent inside the test guest and inside the lab host, and what its peer on the other side of the line needs to understand it.
//!
//! [`protocol`] is what the two say to each other, [`serve`] the agent's side of it. [`inventory`], [`pattern`] and [`unplug`] are the
//! programs beside it; their reports are types here, which the tests read.

pub mod base64;
pub mod inventory;
pub mod pattern;
pub mod protocol;
pub mod serve;
pub mod unplug;
