//! Bytes to lines. Owns the receive buffer and the descriptors that wait for the end of their line.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::cut::{Cut, Scan};
use super::{MAX_FDS, MAX_LINE, WireError, beginning};

/// What is read at once at first, and what a quiet session keeps.
const SMALL: usize = 4 << 10;
/// What is read at once in the midst of a long line.
const LARGE: usize = 256 << 10;

/// One line of the peer.
#[derive(Debug)]
pub struct Line {
    /// The line without its end (`\n` or `\r\n`); never blank.
    pub text: Vec<u8>,
    /// The descriptors that came with it, in the order they were sent, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Cuts what a stream delivers into lines. Blank lines are skipped, their descriptors go to the next line.
///
/// Cancel-safe: all state is in here, so a dropped [`next`](LineReader::next) loses nothing. Holds 4 KiB when
/// quiet, and gives back what a long line took.
#[derive(Debug)]
pub struct LineReader {
    buffer: Vec<u8>,
    /// Where the first unread line begins.
    start: usize,
    /// Up to here the buffer is known to hold no end of that line.
    scanned: usize,
    /// Descriptors, each with a place in the buffer that lies within its line.
    fds: Vec<(usize, OwnedFd)>,
    cut: Cut,
    limit: usize,
}

impl Default for LineReader {
    fn default() -> Self {
        Self::new()
    }
}

impl LineReader {
    /// A reader that takes lines of up to [`MAX_LINE`] bytes.
    pub fn new() -> Self {
        Self::with_limit(MAX_LINE)
    }

    /// A reader that takes lines of up to `limit` bytes, the end of line not counted.
    pub fn with_limit(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, scanned: 0, fds: Vec::new(), cut: Cut::Lines, limit }
    }

    /// A reader for the server's side: it takes what QEMU's own monitor takes, so JSON objects with or without ends of line between or
    /// in them. What is no object is a line.
    pub fn of_objects() -> Self {
        Self { cut: Cut::Objects(Scan::default()), ..Self::new() }
    }

    /// The next line of `stream`, which must be the same stream on every call; `None` once the peer has
    /// closed it.
    ///
    /// # Errors
    /// [`WireError`]; none of them goes away by trying again.
    pub async fn next(&mut self, stream: &UnixStream) -> Result<Option<Line>, WireError> {
        loop {
            if let Some(line) = self.take_line()? {
                return Ok(Some(line));
            }
            let received = stream.async_io(Interest::READABLE, || self.receive(stream)).await?;
            if !self.accept(received)? {
                return self.end();
            }
        }
    }

    /// As [`next`](LineReader::next), but only with what has arrived already: where that holds no whole line,
    /// the error is [`WireError::Io`] of kind `WouldBlock`. Serves to read a peer's last words.
    pub(crate) fn next_arrived(&mut self, stream: &UnixStream) -> Result<Option<Line>, WireError> {
        loop {
            if let Some(line) = self.take_line()? {
                return Ok(Some(line));
            }
            let received = self.receive(stream)?;
            if !self.accept(received)? {
                return self.end();
            }
        }
    }

    fn take_line(&mut self) -> Result<Option<Line>, WireError> {
        loop {
            let end = self
                .cut
                .end(&self.buffer[self.scanned..])
                .map(|(end, next)| (self.scanned + end, self.scanned + next));
            let text = &self.buffer[self.start..end.map_or(self.buffer.len(), |(end, _)| end)];
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            if text.len() > self.limit {
                return Err(WireError::TooLong { limit: self.limit });
            }
            let Some((_, next)) = end else {
                self.scanned = self.buffer.len();
                return Ok(None);
            };
            let text = (!text.trim_ascii().is_empty()).then(|| text.to_vec());
            self.start = next;
            self.scanned = next;
            if let Some(text) = text {
                let mine = self.fds.partition_point(|(at, _)| *at < next);
                let fds = self.fds.drain(..mine).map(|(_, fd)| fd).collect();
                return Ok(Some(Line { text, fds }));
            }
        }
    }

    /// Makes room and receives once. On an error, `WouldBlock` among them, nothing has changed.
    fn receive(&mut self, stream: &UnixStream) -> io::Result<Received> {
        self.forget_read_lines();
        let old = self.buffer.len();
        self.buffer.resize(old + old.clamp(SMALL, LARGE), 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let result = recvmsg(stream, &mut [IoSliceMut::new(&mut self.buffer[old..])], &mut control, flags);
        self.buffer.truncate(old + result.as_ref().map_or(0, |message| message.bytes));
        let message = result?;
        let mut fds = Vec::new();
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = item {
                fds.extend(rights);
            }
        }
        Ok(Received { bytes: message.bytes, fds, lost: message.flags.contains(ReturnFlags::CTRUNC) })
    }

    /// Files the descriptors of one read under their line. False at the end of the stream.
    fn accept(&mut self, received: Received) -> Result<bool, WireError> {
        if received.lost {
            return Err(WireError::FdsLost);
        }
        if self.fds.len() + received.fds.len() > MAX_FDS {
            return Err(WireError::TooManyFds);
        }
        if !received.fds.is_empty() {
            let chunk = self.buffer.len() - received.bytes;
            let text = self.buffer[chunk..].strip_suffix(b"\n").unwrap_or(&self.buffer[chunk..]);
            let begun = memchr::memrchr(b'\n', text).map_or(0, |at| at + 1);
            self.fds.extend(received.fds.into_iter().map(|fd| (chunk + begun, fd)));
        }
        Ok(received.bytes > 0)
    }

    fn end(&self) -> Result<Option<Line>, WireError> {
        let rest = self.buffer[self.start..].trim_ascii();
        if rest.is_empty() { Ok(None) } else { Err(WireError::Torn { beginning: beginning(rest) }) }
    }

    fn forget_read_lines(&mut self) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            for (at, _) in &mut self.fds {
                *at = at.saturating_sub(self.start);
            }
            self.start = 0;
        }
        if self.buffer.len() < SMALL && self.buffer.capacity() > 4 * SMALL {
            self.buffer.shrink_to(2 * SMALL);
        }
    }
}

struct Received {
    bytes: usize,
    fds: Vec<OwnedFd>,
    /// The kernel says that it dropped descriptors.
    lost: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn what_a_long_line_took_is_given_back() {
        let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut reader = LineReader::new();
        let send = tokio::spawn(async move {
            ours.write_all(&[b'x'; 1 << 20]).await.expect("the reader reads");
            ours.write_all(b"\nshort\n").await.expect("the reader reads");
            ours
        });
        let long = reader.next(&theirs).await.expect("readable").expect("a line");
        assert_eq!(long.text.len(), 1 << 20);
        assert!(reader.buffer.capacity() >= 1 << 20);
        reader.next(&theirs).await.expect("readable").expect("a line");
        drop(send.await.expect("no panic"));
        assert!(reader.next(&theirs).await.expect("readable").is_none());
        assert!(reader.buffer.capacity() <= 4 * SMALL, "{}", reader.buffer.capacity());
    }
}
