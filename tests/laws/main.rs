//! Laws of the pure crate, and of what takes bytes from strangers, for whatever configs and sequences chance makes up. A failure prints the smallest input that breaks the law.

mod configs;
mod layout;
mod names;
mod nbd;
#[allow(dead_code, reason = "the laws need the capabilities alone")]
#[path = "../golden/recorded.rs"]
mod recorded;
mod retry;
mod seats;
mod texts;
