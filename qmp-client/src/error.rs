//! What can go wrong: with connecting, with one command, with the whole session.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::wire::{MAX_FDS, MAX_LINE, WireError};

/// QEMU's own answer to a command that it refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("QEMU answered {class}: {desc}")]
pub struct QemuError {
    /// Nearly always `GenericError`; any other text passes through.
    #[serde(default)]
    pub class: String,
    /// QEMU's words, for people.
    #[serde(default)]
    pub desc: String,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody greeted.
    #[error(
        "no QMP greeting within {after:?}{}: another client may hold this monitor socket (it serves one at a time), \
         or the process is stopped; close the other client or try again later",
        peer_text(*peer)
    )]
    NoGreeting {
        /// The deadline that passed.
        after: Duration,
        /// The process that listens on the socket, where the kernel says (`SO_PEERCRED`); it is *us* on the
        /// first connection to a listener that we bound and passed on.
        peer: Option<i32>,
    },
    /// The greeting came, the answer to `qmp_capabilities` did not.
    #[error(
        "QMP was greeted but not negotiated within {after:?}{}: the process may be stopped or busy; try again later",
        peer_text(*peer)
    )]
    NotNegotiated {
        /// The deadline that passed, counted from the connect.
        after: Duration,
        /// As in [`ConnectError::NoGreeting`].
        peer: Option<i32>,
    },
    /// What the peer says first is no greeting of QMP.
    #[error("the peer does not speak QMP: it began with {beginning:?}; check the socket's path")]
    NotQmp {
        /// The beginning of its first line.
        beginning: String,
        /// What the JSON parser found wrong.
        source: serde_json::Error,
    },
    /// QEMU refuses `qmp_capabilities`.
    #[error("the negotiation of QMP capabilities was refused")]
    Refused(#[source] QemuError),
    /// The stream ended or broke first.
    #[error("the QMP session ended before it was negotiated; QEMU's own output says why")]
    Closed(#[source] CloseReason),
}

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU says no. Nothing changed, as far as QEMU says.
    #[error(transparent)]
    Refused(#[from] QemuError),
    /// No answer in time. The command is **unknown, not failed**: QEMU may have done it, or do it any time
    /// later. Ask (`query-...`) before undoing or repeating it. Its late answer is dropped.
    #[error(
        "{command:?} was not answered within {after:?}: its outcome is unknown, not failed; query before you undo or \
         repeat it, or allow it more time"
    )]
    TimedOut {
        /// The command's name.
        command: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// The deadline passed while the command waited for its turn behind others (see
    /// [`Qmp::call_with_fds`](crate::Qmp::call_with_fds) and [`Options::oob`](crate::Options::oob)).
    /// QEMU never saw it.
    #[error(
        "{command:?} was not sent within {after:?}, since earlier commands are unanswered; nothing was done, try again"
    )]
    NotSent {
        /// The command's name.
        command: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// The session is over. If the command was on its way, its outcome is unknown.
    #[error("the QMP session is closed; connect again")]
    Closed(#[source] Arc<CloseReason>),
    /// The command is longer than what is sent. QEMU never saw it.
    #[error(
        "{command:?} with its arguments has {bytes} bytes, more than the {MAX_LINE} that are sent; split it"
    )]
    TooLong {
        /// The command's name.
        command: String,
        /// Its length as JSON.
        bytes: usize,
    },
    /// More descriptors than one message takes. QEMU never saw the command.
    #[error(
        "{command:?} has {count} descriptors, more than the {MAX_FDS} that go with one command; split it"
    )]
    TooManyFds {
        /// The command's name.
        command: String,
        /// How many there are.
        count: usize,
    },
    /// The arguments cannot be written as JSON. QEMU never saw the command.
    #[error("the arguments of {command:?} cannot be written as JSON; correct them")]
    Encode {
        /// The command's name.
        command: String,
        /// What is wrong with them.
        source: serde_json::Error,
    },
    /// QEMU did the command, but its answer does not fit the type asked for.
    #[error(
        "{command:?} was done, but its answer was not understood; it began {beginning:?}; use the untyped call"
    )]
    Decode {
        /// The command's name.
        command: String,
        /// The beginning of what `return` holds.
        beginning: String,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// Out-of-band execution was not asked for in [`Options`](crate::Options), or this peer does not offer
    /// it.
    #[error(
        "{command:?} cannot run out of band: this session did not negotiate \"oob\"; connect with Options::oob"
    )]
    NoOob {
        /// The command's name.
        command: String,
    },
}

/// Why a session is over: the first cause. Every caller gets the same one.
#[derive(Debug, thiserror::Error)]
pub enum CloseReason {
    /// The peer closed the stream between two lines, as QEMU does when it exits.
    #[error("QEMU closed the session")]
    Eof,
    /// Reading failed, or what was read can be no QMP.
    #[error("the session cannot be read any further")]
    Read(#[source] WireError),
    /// Writing failed, and the peer had not closed its side.
    #[error("the session cannot be written to")]
    Write(#[source] io::Error),
    /// A line that is no message of QMP.
    #[error("the peer sent a line that is no QMP message, which began {beginning:?}")]
    Garbage {
        /// The beginning of the line.
        beginning: String,
        /// What the JSON parser found wrong.
        source: serde_json::Error,
    },
    /// The runtime that the session ran in was shut down.
    #[error("the session's task was dropped with its runtime")]
    Abandoned,
}

fn peer_text(peer: Option<i32>) -> String {
    match peer {
        Some(pid) if pid.cast_unsigned() == std::process::id() => {
            " from the heir of this process's listener".into()
        }
        Some(pid) => format!(" from process {pid}"),
        None => String::new(),
    }
}
