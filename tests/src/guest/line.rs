//! One line to a guest, as bytes: what comes is kept by a thread, what goes is written with a deadline.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use super::{GuestError, failure};

/// All that the guest ever wrote, filled by the reading thread.
#[derive(Default)]
struct Transcript {
    bytes: Vec<u8>,
    closed: Option<String>,
}

#[derive(Default)]
struct Shared {
    transcript: Mutex<Transcript>,
    changed: Condvar,
}

impl Shared {
    /// The transcript stays whole even if a thread panicked while it held it: bytes are only ever appended.
    fn lock(&self) -> MutexGuard<'_, Transcript> {
        self.transcript.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open line.
pub(super) struct Line {
    file: File,
    shared: Arc<Shared>,
    /// Dropped to end the reader.
    stop: Option<UnixStream>,
    reader: Option<JoinHandle<()>>,
}

/// Opens a pty, set to raw mode, or a unix socket.
pub(super) fn open(path: &Path) -> Result<OwnedFd, GuestError> {
    let error =
        |what: &str, source: &dyn fmt::Display| failure(format!("{}: {what}: {source}", path.display()), &[]);
    let kind = path.metadata().map_err(|e| error("the line cannot be found", &e))?.file_type();
    if kind.is_socket() {
        return Ok(UnixStream::connect(path).map_err(|e| error("cannot connect", &e))?.into());
    }
    let options = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).clone();
    let pty = options.open(path).map_err(|e| error("cannot open", &e))?;
    let mut mode = tcgetattr(&pty).map_err(|e| error("not a terminal", &e))?;
    cfmakeraw(&mut mode);
    tcsetattr(&pty, SetArg::TCSANOW, &mode).map_err(|e| error("cannot set raw mode", &e))?;
    Ok(pty.into())
}

impl Line {
    /// Makes the line non-blocking and begins to read.
    pub(super) fn new(line: OwnedFd) -> Result<Line, GuestError> {
        let error =
            |source: &dyn fmt::Display| failure(format!("the line cannot be prepared: {source}"), &[]);
        let flags = fcntl(&line, FcntlArg::F_GETFL).map_err(|e| error(&e))?;
        fcntl(&line, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))
            .map_err(|e| error(&e))?;
        let file = File::from(line);
        let from = file.try_clone().map_err(|e| error(&e))?;
        let (stop, stopped) = UnixStream::pair().map_err(|e| error(&e))?;
        let shared = Arc::new(Shared::default());
        let reader = std::thread::Builder::new().name("guest line".into());
        let into = shared.clone();
        let reader = reader.spawn(move || read(from, &stopped, &into)).map_err(|e| error(&e))?;
        Ok(Line { file, shared, stop: Some(stop), reader: Some(reader) })
    }

    /// Every byte that came.
    pub(super) fn transcript(&self) -> Vec<u8> {
        self.shared.lock().bytes.clone()
    }

    /// How many bytes came.
    pub(super) fn length(&self) -> usize {
        self.shared.lock().bytes.len()
    }

    /// An error that shows the last lines.
    pub(super) fn failure(&self, reason: String) -> GuestError {
        failure(reason, &self.shared.lock().bytes)
    }

    /// Waits until `find` finds its value in what came after the first `from` bytes; it tells how many of these it has seen for good, and
    /// `from` grows by that.
    pub(super) fn wait<T>(
        &self,
        from: &mut usize,
        what: &str,
        until: Deadline,
        mut find: impl FnMut(&[u8]) -> (Option<T>, usize),
    ) -> Result<T, GuestError> {
        let mut transcript = self.shared.lock();
        loop {
            let (found, seen) = find(&transcript.bytes[*from..]);
            *from += seen;
            if let Some(found) = found {
                return Ok(found);
            }
            if let Some(cause) = &transcript.closed {
                return Err(failure(format!("the line closed ({cause}) before {what}"), &transcript.bytes));
            }
            let Some(left) = until.left() else {
                return Err(failure(
                    format!("waited {:?} in vain for {what}", until.length),
                    &transcript.bytes,
                ));
            };
            transcript =
                self.shared.changed.wait_timeout(transcript, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the other end closes the line.
    pub(super) fn wait_closed(&self, until: Deadline) -> Result<(), GuestError> {
        let mut transcript = self.shared.lock();
        while transcript.closed.is_none() {
            let Some(left) = until.left() else {
                let reason = format!("the line is still open after {:?}", until.length);
                return Err(failure(reason, &transcript.bytes));
            };
            transcript =
                self.shared.changed.wait_timeout(transcript, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Writes all bytes; a paused guest takes no more than the line holds, so this too has a deadline.
    pub(super) fn send(&self, mut bytes: &[u8], until: Deadline) -> Result<(), GuestError> {
        while !bytes.is_empty() {
            let reason = match (&self.file).write(bytes) {
                Ok(written) => {
                    bytes = &bytes[written..];
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() != ErrorKind::WouldBlock => format!("the line takes no bytes: {e}"),
                Err(_) if until.left().is_none() => {
                    format!("the line took no more bytes for {:?}", until.length)
                }
                Err(_) => {
                    let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    match poll(&mut fds, PollTimeout::from(200u8)) {
                        Ok(_) | Err(Errno::EINTR) => continue,
                        Err(e) => format!("the line cannot be polled: {e}"),
                    }
                }
            };
            return Err(self.failure(reason));
        }
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(reader) = self.reader.take() {
            // It ends by itself once the stop line is closed; a panic of its own is no news by now.
            drop(reader.join());
        }
    }
}

/// The end of a wait.
#[derive(Clone, Copy)]
pub(super) struct Deadline {
    begin: Instant,
    length: Duration,
}

impl Deadline {
    pub(super) fn after(length: Duration) -> Deadline {
        Deadline { begin: Instant::now(), length }
    }

    /// This one or one that comes so long after now, whichever is sooner.
    pub(super) fn or_after(self, length: Duration) -> Deadline {
        if self.left().is_some_and(|left| left > length) { Deadline::after(length) } else { self }
    }

    /// None when it is over.
    fn left(self) -> Option<Duration> {
        self.length.checked_sub(self.begin.elapsed()).filter(|left| !left.is_zero())
    }
}

/// The reading thread: appends what comes until the line or the stop line closes.
fn read(mut line: File, stopped: &UnixStream, shared: &Shared) {
    let mut chunk = [0; 4096];
    let cause = loop {
        let mut fds =
            [PollFd::new(line.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(e) => break format!("poll: {e}"),
            Ok(_) if fds[1].any() == Some(true) => break "dropped".to_owned(),
            Ok(_) => {}
        }
        match line.read(&mut chunk) {
            Ok(0) => break "end of file".to_owned(),
            Ok(count) => {
                shared.lock().bytes.extend_from_slice(&chunk[..count]);
                shared.changed.notify_all();
            }
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // A pty whose master is gone says EIO.
            Err(e) => break e.to_string(),
        }
    };
    shared.lock().closed = Some(cause);
    shared.changed.notify_all();
}
