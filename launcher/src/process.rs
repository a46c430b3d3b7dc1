//! The QEMU process: launched or adopted, watched and signalled through its pidfd.
//!
//! Owns what is known of a process from outside. It knows nothing of QMP, and dropping a [`Process`] does
//! nothing to the process, because QEMU outlives its owner.
//!
//! A child and an adopted process are one type: both are a pidfd, and the kernel says at the end whether
//! there is an exit status for us to collect (a child) or not (adopted: its status went to whoever is its
//! parent).
//!
//! - [`Spawn`] starts a child (`process/spawn.rs`),
//! - [`Identity`] is what tells it from any other process, ever (`process/identity.rs`),
//! - [`last_lines`] and [`keep_under_cap`] look after its log (`process/log.rs`).

mod identity;
mod log;
mod spawn;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use identity::{BootId, Identity};
pub use log::{LOG_CAP_BYTES, keep_under_cap, last_lines};
pub use spawn::{Memlock, Spawn, SpawnError, find_binary};

/// A process that cannot be watched or signalled.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} process {pid}: {}", remedy(.source))]
#[allow(missing_docs)]
pub struct ProcessError {
    pub pid: u32,
    pub step: &'static str,
    pub source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "it belongs to another user, so run qvirt as that user or as root",
        io::ErrorKind::Unsupported => "qvirt needs Linux 5.4 or newer",
        _ => "see the reason below; `qvirt list` shows what runs",
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It ended by itself with this status.
    Status(i32),
    /// This signal ended it.
    Signal(i32),
    /// It is gone and was not our child, so its status is not ours to know.
    Gone,
}

impl Exit {
    /// Whether it ended by itself with status 0.
    pub fn success(&self) -> bool {
        *self == Exit::Status(0)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Exit::Status(status) => write!(f, "exited with status {status}"),
            Exit::Signal(number) => match Signal::try_from(number) {
                Ok(signal) => write!(f, "killed by signal {number} ({signal})"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Exit::Gone => f.write_str("gone"),
        }
    }
}

/// A process that runs, or whose end is known.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    exit: OnceLock<Exit>,
}

impl Process {
    /// Takes over the process that `identity` names; `None` if it has ended, whoever has its pid now.
    ///
    /// # Errors
    /// The kernel does not let us look.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn adopt(identity: &Identity) -> Result<Option<Process>, ProcessError> {
        if !identity.is_alive() {
            return Ok(None);
        }
        let process = match Process::watch(identity.clone()) {
            Ok(process) => process,
            Err(error) if error.source.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The pid may have changed hands between the look and the open; after the open it cannot any more.
        Ok(identity.is_alive().then_some(process))
    }

    fn watch(identity: Identity) -> Result<Process, ProcessError> {
        let failed = |source| ProcessError { pid: identity.pid, step: "watch", source };
        let pid = i32::try_from(identity.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
        let pidfd = readable(pidfd).map_err(failed)?;
        Ok(Process { identity, pidfd, exit: OnceLock::new() })
    }

    /// What tells this process from any other.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its number, for people and logs; never act on it.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Sends `signal`; `false` if the process has ended already.
    ///
    /// # Errors
    /// The kernel refuses (another user's process).
    pub fn signal(&self, signal: Signal) -> Result<bool, ProcessError> {
        let failed = |source| ProcessError { pid: self.pid(), step: "signal", source };
        let signal = rustix::process::Signal::from_named_raw(signal as i32)
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Waits for the end, and reaps a child. Cancel-safe; once it has ended every call returns the same at
    /// once.
    pub async fn exited(&self) -> Exit {
        loop {
            if let Some(exit) = self.exit.get() {
                return *exit;
            }
            let Ok(mut ready) = self.pidfd.readable().await else {
                // The runtime is shutting down: nobody is left to act on an exit.
                return std::future::pending().await;
            };
            match self.try_exited() {
                Some(exit) => return exit,
                None => ready.clear_ready(),
            }
        }
    }

    /// The end, if it has come. Does not wait.
    pub fn try_exited(&self) -> Option<Exit> {
        if let Some(exit) = self.exit.get() {
            return Some(*exit);
        }
        let exit =
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(None) => return None,
                Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => return None,
                },
                // Not our child. A pidfd cannot be mistaken about who it is, so ask it.
                Err(_) => match runs(self.pidfd.get_ref()) {
                    true => return None,
                    false => Exit::Gone,
                },
            };
        Some(*self.exit.get_or_init(|| exit))
    }

    /// Sends SIGKILL and waits for the end, at most `patience`: a process in uninterruptible I/O does not
    /// end.
    ///
    /// # Errors
    /// As [`Process::signal`].
    pub async fn kill(&self, patience: Duration) -> Result<Option<Exit>, ProcessError> {
        self.signal(Signal::SIGKILL)?;
        Ok(tokio::time::timeout(patience, self.exited()).await.ok())
    }
}

/// A descriptor whose readiness can be waited for.
#[allow(unsafe_code)]
pub(crate) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open as long as it lives and always gives the same number, and nobody takes it
    // out of the `AsyncFd`.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
}

/// Whether the process of `pidfd` has not ended; one that its parent has not reaped yet counts as ended.
fn runs(pidfd: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    !matches!(poll(&mut asked, PollTimeout::ZERO), Ok(1..))
}

#[cfg(test)]
mod tests;
