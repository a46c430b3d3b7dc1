//! The test guest as a test sees it: boots are awaited, scripts run, devices counted, all over one console line. The other end, and the
//! protocol, is `integration-images/guest/init`. It starts no guest and knows nothing of QEMU: whoever has the console has the guest.
//!
//! Every wait ends: with its answer, at its deadline, or when the console closes; an error shows the guest's last lines.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

mod base64;
mod inventory;
#[cfg(test)]
mod smoke;

use base64::{decode, encode};
pub use inventory::{Difference, Inventory};

/// How long a boot may take. Measured: 3 to 7 s on an idle machine without KVM; this is for a busy one.
pub const BOOT: Duration = Duration::from_secs(120);
/// How long a script may take when the test does not say.
pub const SCRIPT: Duration = Duration::from_secs(60);
/// How long [`Guest::wait_inventory`] waits for devices to come or go.
pub const DEVICES: Duration = Duration::from_secs(60);

/// What went wrong, and the last lines that the guest had written by then.
pub struct GuestError {
    reason: String,
    tail: String,
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest: {}; its last lines:\n{}", self.reason, self.tail)
    }
}

/// The same as `Display`, so that `expect` and a test's `Result` show lines and not escapes.
impl fmt::Debug for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for GuestError {}

/// What a script left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit status of the script.
    pub status: i32,
    /// Standard output and standard error, in the order written.
    pub stdout: String,
}

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

/// One guest on one console. Dropping it closes the console and harms nobody.
pub struct Guest {
    console: File,
    shared: Arc<Shared>,
    /// Where in the transcript the next wait begins: what one wait has seen no later one sees again.
    cursor: usize,
    tags: u64,
    /// Dropped to end the reader.
    stop: Option<UnixStream>,
    reader: Option<JoinHandle<()>>,
}

impl Guest {
    /// Opens a console by path: a pty (set to raw mode, so that nothing is echoed back) or a unix socket.
    pub fn attach(path: &Path) -> Result<Guest, GuestError> {
        let error = |what: &str, source: &dyn fmt::Display| {
            failure(format!("{}: {what}: {source}", path.display()), &[])
        };
        let kind = path.metadata().map_err(|e| error("the console cannot be found", &e))?.file_type();
        if kind.is_socket() {
            let socket = UnixStream::connect(path).map_err(|e| error("cannot connect", &e))?;
            return Guest::from_fd(socket.into());
        }
        let options = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).clone();
        let pty = options.open(path).map_err(|e| error("cannot open", &e))?;
        let mut mode = tcgetattr(&pty).map_err(|e| error("not a terminal", &e))?;
        cfmakeraw(&mut mode);
        tcsetattr(&pty, SetArg::TCSANOW, &mode).map_err(|e| error("cannot set raw mode", &e))?;
        Guest::from_fd(pty.into())
    }

    /// Takes a console that is open for reading and writing already, and makes it non-blocking.
    pub fn from_fd(console: OwnedFd) -> Result<Guest, GuestError> {
        let error =
            |source: &dyn fmt::Display| failure(format!("the console cannot be prepared: {source}"), &[]);
        let flags = fcntl(&console, FcntlArg::F_GETFL).map_err(|e| error(&e))?;
        fcntl(&console, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))
            .map_err(|e| error(&e))?;
        let console = File::from(console);
        let from = console.try_clone().map_err(|e| error(&e))?;
        let (stop, stopped) = UnixStream::pair().map_err(|e| error(&e))?;
        let shared = Arc::new(Shared::default());
        let reader = std::thread::Builder::new().name("guest console".into());
        let into = shared.clone();
        let reader = reader.spawn(move || read_console(from, &stopped, &into)).map_err(|e| error(&e))?;
        // A guest outlives the test programs that talk to it: a tag must not be one that an earlier program used.
        let tags = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64);
        Ok(Guest { console, shared, cursor: 0, tags, stop: Some(stop), reader: Some(reader) })
    }

    /// Waits for the guest's first line: it has a console and has loaded no driver yet.
    pub fn wait_init(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.wait("its first line, QVIRT-GUEST-INIT", deadline, |seen| {
            line_ending_in(seen, b"QVIRT-GUEST-INIT")
        })
    }

    /// Waits until the guest takes scripts. To be awaited once for each boot; a guest that was up before the console was
    /// opened says nothing: run a script at once.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.wait("QVIRT-GUEST-READY", deadline, |seen| line_ending_in(seen, b"QVIRT-GUEST-READY"))
    }

    /// Waits until the other end closes the console, as QEMU does when it ends.
    pub fn wait_closed(&mut self, deadline: Duration) -> Result<(), GuestError> {
        let until = Instant::now() + deadline;
        let mut transcript = self.shared.lock();
        while transcript.closed.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failure(
                    format!("the console is still open after {deadline:?}"),
                    &transcript.bytes,
                ));
            }
            transcript =
                self.shared.changed.wait_timeout(transcript, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Runs a shell script (busybox) in the guest and waits for its end, at most [`SCRIPT`].
    pub fn run(&mut self, script: &str) -> Result<Output, GuestError> {
        self.run_within(script, SCRIPT)
    }

    /// Runs a shell script with a deadline of its own. The guest runs one script at a time: what may hang belongs in the
    /// background of a script (`( ... ) >/tmp/log 2>&1 &`).
    pub fn run_within(&mut self, script: &str, deadline: Duration) -> Result<Output, GuestError> {
        self.tags += 1;
        let tag = format!("t{}", self.tags);
        // The empty line ends whatever a program that died half-way may have left in the guest's line.
        self.send(format!("\nRUN {tag} {}\n", encode(script.as_bytes())).as_bytes(), deadline)?;
        let (begin, end) = (format!("BEGIN {tag}\n"), format!("END {tag} "));
        let what = format!("the end of the script {script:?}");
        let (status, text) = self.wait(&what, deadline, |seen| {
            let from = find(seen, begin.as_bytes())? + begin.len();
            let to = from + find(&seen[from..], end.as_bytes())?;
            let rest = to + end.len();
            let newline = rest + find(&seen[rest..], b"\n")?;
            let status = String::from_utf8_lossy(&seen[rest..newline]).trim().to_owned();
            Some(((status, seen[from..to].to_vec()), newline + 1))
        })?;
        let broken = |part: &str| {
            failure(format!("the answer to {script:?} has a broken {part}"), &self.shared.lock().bytes)
        };
        let status = status.parse().map_err(|_| broken("exit status"))?;
        let stdout = decode(&text).ok_or_else(|| broken("base64 text"))?;
        Ok(Output { status, stdout: String::from_utf8_lossy(&stdout).into_owned() })
    }

    /// Runs a script that must succeed, and gives its output.
    pub fn check(&mut self, script: &str) -> Result<String, GuestError> {
        match self.run(script)? {
            Output { status: 0, stdout } => Ok(stdout),
            Output { status, stdout } => Err(failure(
                format!("the script {script:?} ended with {status} and said {stdout:?}"),
                &self.shared.lock().bytes,
            )),
        }
    }

    /// The devices that the guest sees now.
    pub fn inventory(&mut self) -> Result<Inventory, GuestError> {
        Ok(Inventory(self.check("inventory")?.lines().map(str::to_owned).collect()))
    }

    /// Asks for the inventory until `done` likes it, at most [`DEVICES`]; `what` names what is awaited, for the error.
    pub fn wait_inventory(
        &mut self,
        what: &str,
        done: impl Fn(&Inventory) -> bool,
    ) -> Result<Inventory, GuestError> {
        let until = Instant::now() + DEVICES;
        loop {
            let inventory = self.inventory()?;
            if done(&inventory) {
                return Ok(inventory);
            }
            if Instant::now() > until {
                return Err(failure(
                    format!("no {what} after {DEVICES:?}, but\n{inventory}"),
                    &self.shared.lock().bytes,
                ));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Every byte that the guest wrote since the console was opened.
    pub fn transcript(&self) -> Vec<u8> {
        self.shared.lock().bytes.clone()
    }

    /// Waits until `find` finds its value in what was not consumed yet; it tells how many bytes it took.
    fn wait<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        find: impl Fn(&[u8]) -> Option<(T, usize)>,
    ) -> Result<T, GuestError> {
        let until = Instant::now() + deadline;
        let mut transcript = self.shared.lock();
        loop {
            if let Some((value, taken)) = find(&transcript.bytes[self.cursor..]) {
                self.cursor += taken;
                return Ok(value);
            }
            if let Some(cause) = &transcript.closed {
                return Err(failure(
                    format!("the console closed ({cause}) before {what}"),
                    &transcript.bytes,
                ));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failure(format!("waited {deadline:?} in vain for {what}"), &transcript.bytes));
            }
            transcript =
                self.shared.changed.wait_timeout(transcript, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes all bytes; a paused guest takes no more than the line holds, so this too has a deadline.
    fn send(&mut self, mut bytes: &[u8], deadline: Duration) -> Result<(), GuestError> {
        let until = Instant::now() + deadline;
        while !bytes.is_empty() {
            let reason = match (&self.console).write(bytes) {
                Ok(written) => {
                    bytes = &bytes[written..];
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() != ErrorKind::WouldBlock => format!("the console takes no bytes: {e}"),
                Err(_) if Instant::now() > until => {
                    format!("the console took no more bytes for {deadline:?}")
                }
                Err(_) => {
                    let mut fds = [PollFd::new(self.console.as_fd(), PollFlags::POLLOUT)];
                    match poll(&mut fds, PollTimeout::from(200u8)) {
                        Ok(_) | Err(Errno::EINTR) => continue,
                        Err(e) => format!("the console cannot be polled: {e}"),
                    }
                }
            };
            return Err(failure(reason, &self.shared.lock().bytes));
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(reader) = self.reader.take() {
            // It ends by itself once the stop line is closed; a panic of its own is no news by now.
            drop(reader.join());
        }
    }
}

/// The reading thread: appends what comes until the console or the stop line closes.
fn read_console(mut console: File, stopped: &UnixStream, shared: &Shared) {
    let mut chunk = [0; 4096];
    let cause = loop {
        let mut fds = [
            PollFd::new(console.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(e) => break format!("poll: {e}"),
            Ok(_) if fds[1].any() == Some(true) => break "dropped".to_owned(),
            Ok(_) => {}
        }
        match console.read(&mut chunk) {
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

fn failure(reason: String, transcript: &[u8]) -> GuestError {
    let text = String::from_utf8_lossy(transcript);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(20)..].iter().map(|line| format!("  | {line}\n")).collect();
    GuestError { reason, tail }
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    bytes.windows(word.len()).position(|window| window == word)
}

/// The end of the first whole line that ends in `word`: a message of the firmware may stand before it.
fn line_ending_in(seen: &[u8], word: &[u8]) -> Option<((), usize)> {
    let end = find(seen, word)? + word.len();
    let newline = end + find(&seen[end..], b"\n")?;
    Some(((), newline + 1))
}
