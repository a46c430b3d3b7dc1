//! The framing of QMP: JSON lines over a unix stream, some of them with descriptors. QEMU ends each message with a line; its clients need
//! not, and some do not (Python's `qemu.qmp`), so a server reads objects.
//!
//! Owns how bytes become lines and lines become bytes, on both sides: this crate's session, a server of QMP
//! and a fake QEMU use the same code. It does not know what a line says.
//!
//! A descriptor travels in the `sendmsg` of the first byte of its line. The kernel never puts the bytes of
//! two messages into one read when the first of them carries descriptors, so whatever descriptors a read
//! brings belong to the last line that begins in it; [`LineReader`] hands them out with that line.
//!
//! Neither side owns the stream: the reader and the writer hold only their state and are given the stream, so
//! one task can wait for both directions, and two tasks can share a stream that was split (`as_ref()` of a
//! half).

use std::io;

mod cut;
mod reader;
mod writer;

pub use reader::{Line, LineReader};
pub use writer::{LineWriter, write_line};

/// The longest line that is read or sent, in bytes: 16 MiB. `query-qmp-schema` needs a quarter of a MiB.
pub const MAX_LINE: usize = 16 << 20;

/// The most descriptors that the kernel takes in one message (`SCM_MAX_FD`), and that a reader holds for one
/// line.
pub const MAX_FDS: usize = 253;

/// Why no further line can be read from this stream.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The kernel's own error.
    #[error("reading failed")]
    Io(#[from] io::Error),
    /// A line did not end within the limit; the rest of the stream cannot be understood.
    #[error("a line is longer than {limit} bytes, the most that is read")]
    TooLong {
        /// The limit in bytes, [`MAX_LINE`] unless another was set.
        limit: usize,
    },
    /// The peer closed the stream within a line.
    #[error("the stream ended within a line, which began {beginning:?}")]
    Torn {
        /// The beginning of what was received of the line.
        beginning: String,
    },
    /// The peer sent more descriptors than one line can have.
    #[error("more than {MAX_FDS} descriptors came with one line")]
    TooManyFds,
    /// The kernel could not hand over all descriptors, usually because this process may open no more.
    #[error("descriptors were lost on the way: raise the limit of open files (RLIMIT_NOFILE)")]
    FdsLost,
}

/// The beginning of `text` for a message to people: at most 80 bytes, whatever they are.
pub(crate) fn beginning(text: &[u8]) -> String {
    const SHOWN: usize = 80;
    let shown = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]).into_owned();
    if text.len() > SHOWN { shown + "..." } else { shown }
}
