//! The user's end of a guest's serial console: bytes from the pseudo terminal that QEMU made to the user's terminal, and
//! back.
//!
//! Owns the copying ([`Console::attach`]), the user's terminal while that lasts (`raw`), the signals that end it
//! (`signals`), and who may do it ([`hold`]: one at a time). Does not find the pseudo terminal, prints nothing of its
//! own, and never ends the process.
//!
//! A serial line has no size, so changes of the window's size are not passed on; `stty rows R cols C` in the guest is
//! the way.
//!
//! ```text
//! user's keys ──▶ to_guest ──▶ QEMU's pty        ^] (terminals only), signals, a take-over,
//! user's screen ◀── to_user ◀── QEMU's pty        the end of either side: Leave
//! ```
//!
//! Everything blocks: it runs in the main thread of `qvirt console`, and in a thread of its own beside an owner. No byte
//! is lost after [`Console::open`]: what comes before [`Console::attach`] waits in the kernel (4 KiB of it).

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
    unistd,
};

use self::{hold::Hold, raw::Raw, signals::Signals};

pub mod hold;
mod raw;
mod signals;

#[cfg(test)]
mod tests;

/// The byte of `^]`, which leaves the console when it is typed at a terminal.
pub const ESCAPE: u8 = 0x1d;

/// Bytes on their way to the guest beyond which a pipe is not read, and a terminal's are dropped as a UART would.
const PIPE_AHEAD: usize = 4096;
const KEYS_AHEAD: usize = 1 << 20;
/// Bytes written to the user in one piece: little, so that a slow terminal does not hold up `^]`.
const PIECE: usize = 512;

/// How the console was left; its text is for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leave {
    /// The user typed `^]`.
    Escape,
    /// QEMU closed the console: the VM ended.
    Closed,
    /// The user's terminal is gone.
    InputClosed,
    /// Nobody reads the output any more.
    OutputClosed,
    /// This process got a signal that ends programs.
    Signal(i32),
    /// Another console took over by force.
    TakenOver {
        /// Its process.
        pid: i32,
        /// Its user.
        user: String,
    },
    /// The descriptor of [`Until::Readable`] became readable.
    Asked,
}

impl std::fmt::Display for Leave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Leave::Escape => f.write_str("console left, the guest goes on"),
            Leave::Closed => f.write_str("console closed: the VM has ended"),
            Leave::InputClosed => f.write_str("console left: the terminal is gone"),
            Leave::OutputClosed => f.write_str("console left: nobody reads the output"),
            Leave::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "console left on {signal}"),
                Err(_) => write!(f, "console left on signal {number}"),
            },
            Leave::TakenOver { pid, user } => write!(f, "console taken over by {user} (pid {pid})"),
            Leave::Asked => f.write_str("console left"),
        }
    }
}

/// Why a console could not be had, or broke.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Somebody else has it.
    #[error("the console is held by {user} (pid {pid}) for {}: leave it there with ^], or take it over with --force", hold::age(*since))]
    Held {
        /// The holder's process.
        pid: i32,
        /// The holder's user.
        user: String,
        /// Since when.
        since: SystemTime,
    },
    /// The holder was told to leave and could not be, or did not.
    #[error("the console is held by {user} (pid {pid}), who cannot be made to leave: {reason}")]
    Stubborn {
        /// The holder's process, 0 if it cannot be seen from here.
        pid: i32,
        /// The holder's user.
        user: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock the console with {}: see that its folder exists and that you may write there", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The pseudo terminal cannot be opened.
    #[error("cannot open the console {}: see that the VM runs (`qvirt status`) and that you are its user or root", path.display())]
    Open {
        /// The pseudo terminal.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Something else failed underway.
    #[error("the console broke: cannot {step}")]
    Broken {
        /// What was tried.
        step: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

fn broken<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ConsoleError {
    move |error| ConsoleError::Broken { step, source: error.into() }
}

/// Where the user is.
#[derive(Debug)]
pub struct User {
    /// Where the user's bytes come from; a terminal is put into raw mode.
    pub input: OwnedFd,
    /// Where the guest's bytes go.
    pub output: OwnedFd,
}

impl User {
    /// Standard input and output of this process.
    pub fn of_process() -> io::Result<User> {
        Ok(User {
            input: io::stdin().as_fd().try_clone_to_owned()?,
            output: io::stdout().as_fd().try_clone_to_owned()?,
        })
    }
}

/// What ends a console from outside.
#[derive(Debug)]
pub enum Until {
    /// SIGTERM, SIGHUP, SIGINT, SIGQUIT to this process, those not ignored: for a process that is only a console.
    Signals,
    /// This descriptor becoming readable: for a process that has other uses for its signals.
    Readable(OwnedFd),
}

/// A guest's console, ours alone until dropped.
#[derive(Debug)]
pub struct Console {
    // Closed before the hold is let go.
    pty: OwnedFd,
    _hold: Hold,
}

impl Console {
    /// Takes the console `pty` (as `query-chardev` names it) under the lock file `lock`, which is made and, in the end,
    /// removed. If somebody holds it: [`ConsoleError::Held`], or with `force` that one is made to leave.
    pub fn open(pty: &Path, lock: &Path, force: bool) -> Result<Console, ConsoleError> {
        let hold = Hold::acquire(lock, force)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(pty)
            .map_err(|source| ConsoleError::Open { path: pty.to_owned(), source })?;
        // QEMU made it raw; another program may have left it otherwise, and the guest's output would echo into its input.
        let _ = raw::make_raw(file.as_fd());
        Ok(Console { pty: file.into(), _hold: hold })
    }

    /// Copies both ways until there is a reason to leave. A terminal at `user.input` is raw meanwhile and as before on
    /// every way out, except SIGKILL; other input is copied as it is (also `^]`), and its end stops only the input.
    pub fn attach(&self, user: &User, until: &Until) -> Result<Leave, ConsoleError> {
        const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT];
        // After `kill -STOP` and `fg` the shell has changed the terminal's mode.
        let mut watched = vec![Signal::SIGCONT];
        if matches!(until, Until::Signals) {
            watched.extend(ENDING);
        }
        // Dropped after `raw`, so a signal cannot end the process with the terminal still raw.
        let _signals = Signals::watch(&watched).map_err(broken("watch for signals"))?;
        let raw = Raw::enter(user.input.as_fd()).map_err(broken("put the terminal into raw mode"))?;
        let mut copy = Copy {
            pty: self.pty.as_fd(),
            user,
            raw,
            input_open: true,
            to_guest: Vec::new(),
            to_user: Vec::new(),
        };
        loop {
            if let Some(leave) = copy.turn(until)? {
                return Ok(leave);
            }
        }
    }
}

/// The state of one attachment.
struct Copy<'a> {
    pty: BorrowedFd<'a>,
    user: &'a User,
    raw: Option<Raw>,
    input_open: bool,
    to_guest: Vec<u8>,
    to_user: Vec<u8>,
}

impl Copy<'_> {
    /// Waits for something to do and does it.
    fn turn(&mut self, until: &Until) -> Result<Option<Leave>, ConsoleError> {
        let ready = self.wait(until).map_err(broken("wait for bytes"))?;
        if ready.signal
            && let Some(leave) = self.on_signal()
        {
            return Ok(Some(leave));
        }
        if ready.asked {
            return Ok(Some(Leave::Asked));
        }
        if ready.input
            && let Some(leave) = self.read_user()?
        {
            return Ok(Some(leave));
        }
        if ready.pty {
            self.write_guest()?;
            if self.to_user.is_empty() && !self.read_guest()? {
                return Ok(Some(Leave::Closed));
            }
        }
        if ready.output && !self.write_user()? {
            return Ok(Some(Leave::OutputClosed));
        }
        Ok(None)
    }

    fn wait(&self, until: &Until) -> Result<Ready, Errno> {
        let flag = |on: bool, flag: PollFlags| if on { flag } else { PollFlags::empty() };
        let room = if self.raw.is_some() { usize::MAX } else { PIPE_AHEAD };
        let input = self.input_open && self.to_guest.len() < room;
        // One direction at a time needs no more: the guest is read when its last bytes are shown.
        let pty = flag(self.to_user.is_empty(), PollFlags::POLLIN)
            | flag(!self.to_guest.is_empty(), PollFlags::POLLOUT);
        let mut fds = vec![
            PollFd::new(signals::caught_fd()?, PollFlags::POLLIN),
            // Without flags it still tells that nobody reads any more.
            PollFd::new(self.user.output.as_fd(), flag(!self.to_user.is_empty(), PollFlags::POLLOUT)),
        ];
        // A descriptor that hung up is always ready, so those of no use now are left out.
        let mut add = |wanted: bool, fd, flags| {
            wanted.then(|| {
                fds.push(PollFd::new(fd, flags));
                fds.len() - 1
            })
        };
        let input = add(input, self.user.input.as_fd(), PollFlags::POLLIN);
        let pty = add(!pty.is_empty(), self.pty, pty);
        let asked = match until {
            Until::Signals => None,
            Until::Readable(fd) => add(true, fd.as_fd(), PollFlags::POLLIN),
        };
        match poll(&mut fds, PollTimeout::NONE) {
            // A signal: its report is in the pipe at the next turn.
            Err(Errno::EINTR) => return Ok(Ready::default()),
            other => other?,
        };
        let ready = |index: Option<usize>| index.is_some_and(|index| fds[index].any().unwrap_or(true));
        Ok(Ready {
            signal: ready(Some(0)),
            output: ready(Some(1)),
            input: ready(input),
            pty: ready(pty),
            asked: ready(asked),
        })
    }

    fn on_signal(&mut self) -> Option<Leave> {
        let caught = signals::caught()?;
        match Signal::try_from(caught.signal) {
            Ok(Signal::SIGCONT) => {
                if let Some(raw) = &self.raw {
                    raw.again();
                }
                None
            }
            Ok(hold::TAKE_OVER) => {
                Some(Leave::TakenOver { pid: caught.pid, user: hold::user_name(caught.uid) })
            }
            _ => Some(Leave::Signal(caught.signal)),
        }
    }

    /// Takes the user's bytes; a terminal's up to `^]`.
    fn read_user(&mut self) -> Result<Option<Leave>, ConsoleError> {
        let mut bytes = [0; PIPE_AHEAD];
        let Some(length) =
            read(self.user.input.as_fd(), &mut bytes).map_err(broken("read the user's input"))?
        else {
            return Ok(None);
        };
        let bytes = &bytes[..length];
        let escape = bytes.iter().position(|&byte| byte == ESCAPE).filter(|_| self.raw.is_some());
        let room = KEYS_AHEAD.saturating_sub(self.to_guest.len());
        self.to_guest.extend(bytes[..escape.unwrap_or(length)].iter().take(room));
        if escape.is_some() {
            self.write_guest()?;
            return Ok(Some(Leave::Escape));
        }
        if length == 0 {
            self.input_open = false;
            return Ok(self.raw.is_some().then_some(Leave::InputClosed));
        }
        Ok(None)
    }

    /// Takes the guest's bytes; `false` once there will be no more.
    fn read_guest(&mut self) -> Result<bool, ConsoleError> {
        let mut bytes = [0; 4096];
        let Some(length) = read(self.pty, &mut bytes).map_err(broken("read the guest's output"))? else {
            return Ok(true);
        };
        self.to_user.extend(&bytes[..length]);
        Ok(length > 0)
    }

    fn write_guest(&mut self) -> Result<(), ConsoleError> {
        if self.to_guest.is_empty() {
            return Ok(());
        }
        match unistd::write(self.pty, &self.to_guest) {
            Ok(length) => drop(self.to_guest.drain(..length)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // QEMU closed it; reading says so next.
            Err(Errno::EIO) => self.to_guest.clear(),
            Err(errno) => return Err(broken("write to the guest")(errno)),
        }
        Ok(())
    }

    /// Shows a piece of the guest's bytes; `false` if nobody can see it.
    fn write_user(&mut self) -> Result<bool, ConsoleError> {
        if self.to_user.is_empty() {
            // Ready without having been asked: it hung up.
            return Ok(false);
        }
        let piece = self.to_user.len().min(PIECE);
        match unistd::write(&self.user.output, &self.to_user[..piece]) {
            Ok(length) => drop(self.to_user.drain(..length)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::EIO | Errno::ECONNRESET) => return Ok(false),
            Err(errno) => return Err(broken("write the guest's output")(errno)),
        }
        Ok(true)
    }
}

/// Which descriptors have something to say.
#[derive(Default)]
struct Ready {
    signal: bool,
    asked: bool,
    input: bool,
    pty: bool,
    output: bool,
}

/// The bytes that are there: 0 is the end, `None` is "not now". A terminal whose other side is gone says EIO.
fn read(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<Option<usize>, Errno> {
    match unistd::read(fd, bytes) {
        Ok(length) => Ok(Some(length)),
        Err(Errno::EIO) => Ok(Some(0)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno),
    }
}
