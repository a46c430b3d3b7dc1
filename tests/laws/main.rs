//! Laws of the pure crate, for whatever configs and sequences chance makes up. A failure prints the smallest input that breaks the law.

mod configs;
mod layout;
mod names;
#[allow(dead_code, reason = "the laws need the capabilities alone")]
#[path = "../golden/recorded.rs"]
mod recorded;
mod seats;
mod texts;
