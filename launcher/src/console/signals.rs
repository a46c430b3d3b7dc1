//! Signals as bytes in a pipe, so that one `poll` waits for them together with everything else.
//!
//! Owns the one handler and the one pipe of this process. There is one console in a process, so nobody else reads it.

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd,
};

/// A signal and who sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caught {
    pub(super) signal: i32,
    pub(super) pid: i32,
    pub(super) uid: u32,
}

impl Caught {
    const SIZE: usize = 3 * size_of::<u32>();

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&self.signal.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.uid.to_ne_bytes());
        bytes
    }

    fn from_bytes([s0, s1, s2, s3, p0, p1, p2, p3, u0, u1, u2, u3]: [u8; Self::SIZE]) -> Self {
        Caught {
            signal: i32::from_ne_bytes([s0, s1, s2, s3]),
            pid: i32::from_ne_bytes([p0, p1, p2, p3]),
            uid: u32::from_ne_bytes([u0, u1, u2, u3]),
        }
    }
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

static PIPE: OnceLock<Pipe> = OnceLock::new();

/// The pipe, made on first use. Neither side ever blocks: a full pipe means that there is enough to read.
fn pipe() -> Result<&'static Pipe, Errno> {
    if let Some(pipe) = PIPE.get() {
        return Ok(pipe);
    }
    let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    Ok(PIPE.get_or_init(|| Pipe { read, write }))
}

/// Readable when [`caught`] has something.
pub(super) fn caught_fd() -> Result<BorrowedFd<'static>, Errno> {
    Ok(pipe()?.read.as_fd())
}

/// The next signal that came.
pub(super) fn caught() -> Option<Caught> {
    let mut bytes = [0; Caught::SIZE];
    // Each was written in one piece shorter than PIPE_BUF, so each is read whole.
    let length = unistd::read(&pipe().ok()?.read, &mut bytes).ok()?;
    (length == Caught::SIZE).then(|| Caught::from_bytes(bytes))
}

/// Signals that are watched for; what they did before comes back on drop.
pub(super) struct Signals {
    before: Vec<(Signal, SigAction)>,
}

impl Signals {
    /// Watches for these signals, but for those that this process was told to ignore (`nohup`).
    pub(super) fn watch(signals: &[Signal]) -> Result<Signals, Errno> {
        let mut watching = Signals { before: Vec::new() };
        for &signal in signals {
            let before = handle(signal)?;
            if matches!(before.handler(), SigHandler::SigIgn) {
                install(signal, &before)?;
            } else {
                watching.before.push((signal, before));
            }
        }
        Ok(watching)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, before) in self.before.drain(..) {
            // It went in, so it goes out.
            let _ = install(signal, &before);
        }
    }
}

/// Has `signal` put into the pipe from now on; returns what it did before.
pub(super) fn handle(signal: Signal) -> Result<SigAction, Errno> {
    // The handler does not make it.
    pipe()?;
    // Without SA_RESTART: a write to a slow terminal is to be interrupted.
    install(signal, &SigAction::new(SigHandler::SigAction(on_signal), SaFlags::SA_SIGINFO, SigSet::empty()))
}

#[expect(unsafe_code, reason = "signal handlers have no safe form")]
fn install(signal: Signal, action: &SigAction) -> Result<SigAction, Errno> {
    // SAFETY: the action is one that was there before, or `on_signal`, which does only what a handler may.
    unsafe { sigaction(signal, action) }
}

/// Only calls that POSIX allows in a handler: a look at an initialised static and `write`.
#[expect(unsafe_code, reason = "the kernel passes a pointer")]
extern "C" fn on_signal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    if let Some(pipe) = PIPE.get() {
        // SAFETY: with SA_SIGINFO the kernel passes a valid structure. Signals from a process or the terminal have
        // these fields; where the kernel sends one itself they are 0.
        let (pid, uid) = unsafe { ((*info).si_pid(), (*info).si_uid()) };
        let bytes = Caught { signal, pid, uid }.to_bytes();
        // SAFETY: the descriptor is never closed, and the buffer is as long as is said.
        unsafe { libc::write(pipe.write.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    }
    Errno::set_raw(errno);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_its_bytes() {
        let caught = Caught { signal: 15, pid: 123_456, uid: u32::MAX - 1 };
        assert_eq!(Caught::from_bytes(caught.to_bytes()), caught);
    }
}
