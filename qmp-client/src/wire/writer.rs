//! Lines to bytes. Owns the lines that wait for the peer to read.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::MAX_FDS;

/// The lines on their way to one stream.
///
/// Cancel-safe: a dropped [`flush`](LineWriter::flush) goes on at the same byte in the next one, so no line
/// is torn.
#[derive(Debug, Default)]
pub struct LineWriter {
    queue: VecDeque<Outgoing>,
    backlog: usize,
}

#[derive(Debug)]
struct Outgoing {
    text: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl LineWriter {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a line, given without its end. `fds` leave with its first byte and are closed here once they
    /// left; there may be at most [`MAX_FDS`].
    pub fn push(&mut self, mut text: Vec<u8>, fds: Vec<OwnedFd>) {
        text.push(b'\n');
        self.backlog += text.len();
        self.queue.push_back(Outgoing { text, sent: 0, fds });
    }

    /// True when all is sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The bytes that the peer has not made room for yet.
    pub fn backlog(&self) -> usize {
        self.backlog
    }

    /// Sends until nothing is left.
    ///
    /// # Errors
    /// The kernel's, `BrokenPipe` when the peer is gone. What was not sent stays queued.
    pub async fn flush(&mut self, stream: &UnixStream) -> io::Result<()> {
        while let Some(line) = self.queue.front_mut() {
            let rest = &line.text[line.sent..];
            let sent = stream
                .async_io(Interest::WRITABLE, || send(stream, &[IoSlice::new(rest)], &line.fds))
                .await?;
            line.fds.clear();
            line.sent += sent;
            self.backlog -= sent;
            if line.sent == line.text.len() {
                self.queue.pop_front();
            }
        }
        // A burst (many events for a slow client) should not be paid for ever after.
        self.queue.shrink_to(16);
        Ok(())
    }
}

/// Sends one line, given without its end, and with its first byte the descriptors `fds` (at most
/// [`MAX_FDS`]).
///
/// Not cancel-safe: dropped halfway it leaves a torn line. Where that can happen, use a [`LineWriter`].
///
/// # Errors
/// The kernel's, `BrokenPipe` when the peer is gone.
pub async fn write_line(stream: &UnixStream, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut fds = fds;
    let mut sent = 0;
    while sent <= line.len() {
        let parts = [IoSlice::new(&line[sent..]), IoSlice::new(b"\n")];
        sent += stream.async_io(Interest::WRITABLE, || send(stream, &parts, fds)).await?;
        fds = &[];
    }
    Ok(())
}

fn send(stream: &UnixStream, parts: &[IoSlice<'_>], fds: &[impl AsFd]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one line"));
    }
    Ok(sendmsg(stream, parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}
