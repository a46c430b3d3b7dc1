//! The test guest as a test sees it: boots are awaited, commands run, devices counted, over one line to the agent inside
//! (`integration-images/agent`, where the protocol is). It starts no guest and knows nothing of QEMU: whoever has the line has the guest.
//!
//! Every wait ends: with its answer, at its deadline, or when the line closes; an error shows the guest's last lines.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent::protocol::{INIT, READY};

mod command;
mod devices;
mod inventory;
mod line;
#[cfg(test)]
mod smoke;

pub use agent::pattern::process::Wish as PatternWish;
pub use agent::pattern::{Report as PatternReport, Verdict as PatternVerdict};
pub use agent::unplug::Unplug;
pub use command::{Output, Running};
pub use inventory::{Difference, Inventory};
use line::{Deadline, Line};

/// How long a boot may take. Measured: 3 to 7 s on an idle machine without KVM; this is for a busy one.
pub const BOOT: Duration = Duration::from_secs(120);
/// How long a command may take when the test does not say.
pub const SCRIPT: Duration = Duration::from_secs(60);
/// How long [`Guest::wait_inventory`] waits for devices to come or go.
pub const DEVICES: Duration = Duration::from_secs(60);

/// How much of a line an error shows: an inventory is one line.
const LINE: usize = 160;

/// What went wrong, and the last lines that the guest had written by then.
pub struct GuestError {
    reason: String,
    tail: String,
}

impl GuestError {
    /// What went wrong, without the guest's lines.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What went wrong comes last, where it is read first.
        write!(f, "the guest's last lines:\n{}guest: {}", self.tail, self.reason)
    }
}

/// The same as `Display`, so that `expect` and a test's `Result` show lines and not escapes.
impl fmt::Debug for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for GuestError {}

/// One guest on one line: a serial console or a virtio-serial channel. Dropping it closes the line and harms nobody.
pub struct Guest {
    line: Line,
    /// Where in the transcript the next wait for a boot begins: what one wait has seen no later one sees again.
    cursor: usize,
    tags: u64,
}

impl Guest {
    /// Opens a line by path: a pty (set to raw mode, so that nothing is echoed back) or a unix socket.
    pub fn attach(path: &Path) -> Result<Guest, GuestError> {
        Guest::from_fd(line::open(path)?)
    }

    /// Takes a line that is open for reading and writing already, and makes it non-blocking.
    pub fn from_fd(line: OwnedFd) -> Result<Guest, GuestError> {
        // A guest outlives the test programs that talk to it: a tag must not be one that an earlier program used.
        let tags = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64);
        Ok(Guest { line: Line::new(line)?, cursor: 0, tags })
    }

    /// Waits for the guest's first line: it has a console and has loaded no driver yet.
    pub fn wait_init(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.wait_line(&format!("its first line, {INIT}"), INIT, deadline)
    }

    /// Waits until the guest on a console takes commands. To be awaited once for each boot; a guest that was up before the console was opened
    /// says nothing: run a command at once.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.wait_line(READY, READY, deadline)
    }

    /// Waits until the guest on a channel answers. What is sent there before the guest is up waits for it, unlike on a console; and the agent
    /// greets a peer of a channel, but cannot know one from another that comes at once when the first has left.
    pub fn wait_answer(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.run_within("true", deadline).map(drop)
    }

    /// Waits until the other end closes the line, as QEMU does when it ends.
    pub fn wait_closed(&mut self, deadline: Duration) -> Result<(), GuestError> {
        self.line.wait_closed(Deadline::after(deadline))
    }

    /// Every byte that the guest wrote since the line was opened.
    pub fn transcript(&self) -> Vec<u8> {
        self.line.transcript()
    }

    /// Waits for a whole line that ends in `word`: a message of the firmware may stand before it.
    fn wait_line(&mut self, what: &str, word: &str, deadline: Duration) -> Result<(), GuestError> {
        self.line.wait(&mut self.cursor, what, Deadline::after(deadline), |seen| {
            let end = find(seen, word.as_bytes()).and_then(|at| Some(at + find(&seen[at..], b"\n")? + 1));
            (end.map(drop), end.unwrap_or(0))
        })
    }
}

fn failure(reason: String, transcript: &[u8]) -> GuestError {
    let text = String::from_utf8_lossy(transcript);
    let short = |line| command::readable(line).chars().take(LINE).collect::<String>();
    let tail = crate::last_lines(&text, 20).map(|line| format!("  | {}\n", short(line))).collect();
    GuestError { reason, tail }
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    bytes.windows(word.len()).position(|window| window == word)
}
