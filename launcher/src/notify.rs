//! The program that a VM's owner runs when the storage of a disk fails, works again, or has failed for too long.
//!
//! It gets the event as one line of JSON on its standard input. One run at a time, in the order of the events, each with a deadline; what is too much
//! is dropped, the oldest first. The owner never waits for it: a program that hangs, fails or is missing costs a warning.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};
use qmp_client::Event;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::broadcast::{self, error::RecvError};
use tracing::{debug, warn};

use crate::folders::VmName;

/// The events that the program is run for. Of retries there may be many, and they are no news.
const EVENTS: [&str; 5] =
    ["QVIRT_IO_SUSPENDED", "QVIRT_IO_RECOVERED", "QVIRT_IO_TIMED_OUT", "QVIRT_IO_HUNG", "QVIRT_IO_ANSWERS"];

/// How many events wait for the program at most.
const WAITING: usize = 64;

/// How long one run may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// The program and its arguments: `notify` of a VM's config, a list, or a text for a program without arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "Vec<String>")]
pub struct Notify {
    program: PathBuf,
    arguments: Vec<String>,
}

impl Notify {
    fn new(words: Vec<String>) -> Result<Notify, &'static str> {
        let mut words = words.into_iter();
        let program: PathBuf = words.next().unwrap_or_default().into();
        if !program.is_absolute() {
            return Err("notify needs a program's absolute path, such as \"/usr/local/bin/storage-alarm\"");
        }
        Ok(Notify { program, arguments: words.collect() })
    }

    /// Whether this process may run it.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn check(&self) -> Result<(), String> {
        let path = self.program.display();
        let next = "name an executable file, or leave notify out";
        match std::fs::metadata(&self.program) {
            Err(error) => Err(format!("notify: {path}: {error}; {next}")),
            Ok(found) if !found.is_file() => Err(format!("notify: {path} is no file; {next}")),
            Ok(_) => access(&self.program, AccessFlags::X_OK)
                .map_err(|_| format!("notify: {path} is not executable; `chmod +x` it, or leave notify out")),
        }
    }
}

impl From<Notify> for Vec<String> {
    fn from(notify: Notify) -> Vec<String> {
        let program = notify.program.to_string_lossy().into_owned();
        [vec![program], notify.arguments].concat()
    }
}

impl<'de> Deserialize<'de> for Notify {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Notify, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = Notify;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a program's path, or a list of a program and its arguments")
            }
            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Notify, E> {
                Notify::new(vec![path.to_owned()]).map_err(E::custom)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Notify, A::Error> {
                let mut words = Vec::new();
                while let Some(word) = list.next_element()? {
                    words.push(word);
                }
                Notify::new(words).map_err(A::Error::custom)
            }
        }
        source.deserialize_any(Words)
    }
}

/// The way to the program. It ends with the owner, and a run that is under way then ends too.
#[derive(Debug)]
pub struct Notifier {
    vm: VmName,
    lines: broadcast::Sender<Arc<str>>,
}

impl Notifier {
    /// Gets ready to run a program for the events of a VM.
    pub fn new(notify: Notify, vm: VmName) -> Notifier {
        Notifier::with_deadline(notify, vm, DEADLINE)
    }

    fn with_deadline(notify: Notify, vm: VmName, deadline: Duration) -> Notifier {
        // This kind of channel drops the oldest, and says how many.
        let (lines, waiting) = broadcast::channel(WAITING);
        tokio::spawn(run_all(notify, waiting, deadline));
        Notifier { vm, lines }
    }

    /// Runs the program for an event, if it is one of those, as soon as its turn has come.
    pub fn tell(&self, event: &Event) {
        if EVENTS.contains(&event.name.as_str()) {
            let line =
                json!({"vm": self.vm, "event": event.name, "timestamp": event.timestamp, "data": event.data});
            // It is refused only when nobody waits for it, at the end.
            let _ = self.lines.send(format!("{line}\n").into());
        }
    }
}

async fn run_all(notify: Notify, mut waiting: broadcast::Receiver<Arc<str>>, deadline: Duration) {
    let program = notify.program.display();
    loop {
        match waiting.recv().await {
            Ok(line) => match tokio::time::timeout(deadline, run(&notify, &line)).await {
                Ok(Ok(status)) if status.success() => {}
                Ok(Ok(status)) => warn!(%program, %status, "the program of notify failed"),
                Ok(Err(error)) => warn!(%program, %error, "the program of notify cannot be run"),
                Err(_) => {
                    warn!(%program, seconds = deadline.as_secs(), "the program of notify took too long: killed")
                }
            },
            Err(RecvError::Lagged(events)) => {
                warn!(%program, events, "the program of notify is too slow: the oldest events are dropped");
            }
            Err(RecvError::Closed) => return,
        }
    }
}

/// Runs the program for one event, to its end and that of its output.
async fn run(notify: &Notify, line: &str) -> std::io::Result<ExitStatus> {
    let mut child = start(notify).await?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read it does without.
            let _ = stdin.write_all(line.as_bytes()).await;
        }
    };
    tokio::join!(tell, log(&notify.program, stdout), log(&notify.program, stderr));
    let status = child.wait().await?;
    group.0 = None;
    Ok(status)
}

/// Starts it beside the owner's task: its file may be on the storage that hangs.
async fn start(notify: &Notify) -> std::io::Result<Child> {
    let mut command = Command::new(&notify.program);
    command.args(&notify.arguments).current_dir("/").process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    tokio::task::spawn_blocking(move || command.spawn()).await?
}

/// What the program says, in the pieces in which it comes.
async fn log(program: &Path, output: Option<impl AsyncRead + Unpin>) {
    let (Some(mut output), mut piece) = (output, [0; 4096]) else { return };
    while let Ok(length @ 1..) = output.read(&mut piece).await {
        debug!(program = %program.display(), "{}", String::from_utf8_lossy(&piece[..length]).trim_end());
    }
}

/// A program and all that it started; killed when it is dropped before its end.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // The leader is not reaped yet, so the number is its own.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests;
