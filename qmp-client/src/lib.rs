//! One QMP session over a unix stream: negotiated, tolerant of what it does not know, cancel-safe.
//!
//! ```text
//!  Qmp (clones) --requests--> session task --lines--> stream --> QEMU
//!       ^----replies (one each)---'  '--events--> Events
//! ```
//!
//! - [`Qmp`] sends commands and gets their results. Any number may be in flight; each is matched by its id.
//! - [`Events`] is the stream of events. Each is raw, with a typed [view](Event::view) on request.
//! - The session's task alone owns the socket and all that changes, so a caller's dropped future cannot tear
//!   a line, mix up replies or hold up anybody. It ends with the stream, or when every `Qmp` and `Events` is
//!   dropped.
//! - Whatever a newer QEMU may say that is not known here passes through: events, words, members, error
//!   classes.
//! - [`wire`] is the framing alone, for those who speak QMP from the other side.
//!
//! The `qapi` crates give the *types* of commands ([`Qmp::run`]) and nothing more. Their transport ends the
//! session at an unknown event, word or error class, panics on a late reply, cannot negotiate out-of-band
//! execution and cannot send descriptors. Never send a user's JSON back through those types: they lose
//! members such as `"backing": null`. [`Qmp::call`] and [`Qmp::call_raw`] keep them.
//!
//! This crate knows no device, spawns no process and never connects by itself.

mod error;
mod event;
mod greeting;
mod known;
mod message;
mod qmp;
mod session;
pub mod wire;

pub use qapi;

pub use error::{CloseReason, ConnectError, QemuError, QmpError};
pub use event::{Event, Events, Timestamp};
pub use greeting::{Greeting, Version};
pub use known::{
    BlockIoError, BlockJob, DeviceGone, IoAction, IoOperation, JobChange, JobStatus, KnownEvent,
    MemoryFailure, PanicAction, Shutdown, ShutdownCause,
};
pub use qmp::{Options, Qmp};
