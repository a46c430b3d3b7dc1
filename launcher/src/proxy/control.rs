//! The proxy's control line: JSON lines both ways on a unix socket, for the VM's owner and for whoever helps it.
//!
//! Everybody connected is told the state when it connects, at every change (ten times a second at most), and every second while a call at the
//! storage takes longer than that:
//!
//! ```json
//! {"event": "state", "held": {"read": 0, "write": 1, "flush": 0}, "since_unix_ms": 1700000000000, "attempts": 3, "operation": "write",
//!  "errno": 5, "layer": 0, "error": "Input/output error", "timed_out": false, "parked": false, "outages": 1, "timeouts": 0,
//!  "fault": {"read": false, "write": false, "flush": false}, "interval_ms": 1000, "timeout_ms": 10000, "size": 1048576,
//!  "outstanding": 1, "oldest_outstanding_ms": 0, "heir": false}
//! ```
//!
//! `since_unix_ms` to `error` are null while nothing fails, `timeout_ms` without a timeout, `oldest_outstanding_ms` while nothing is at the
//! storage. `outages` and `timeouts` count what happened since the start, for whoever missed a state. `outstanding` counts the calls at the
//! storage, `held` what failed and waits for another attempt, attempts that are at the storage among it. `heir` is true from `since` until a request has shown
//! whether that outage lasts.
//!
//! A command is answered `{"return": ...}` or `{"error": "..."}`, in order, with states in between. [`Command`] lists them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qmp_client::wire::{LineReader, LineWriter, WireError};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::LEAST_INTERVAL;
use super::disk::{Disk, State};
use super::retry::{Moment, Outage, PerKind};
use crate::nbd::Export;

/// Between two states.
const PACE: Duration = Duration::from_millis(100);

/// From when on a call at the storage is worth telling.
const LONG: Duration = Duration::from_secs(1);

/// How long the storage may take to tell its size.
const SIZE: Duration = Duration::from_secs(10);

/// What the proxy can be told: `{"command": "set", "interval_ms": 500}`.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// Other times; one that is not given stays, and a timeout of 0 is none.
    Set {
        /// At least 100.
        interval_ms: Option<u64>,
        /// From the first failure on.
        timeout_ms: Option<u64>,
    },
    /// Go on with an outage that a process before this one saw, if it lasts: its clock then began so many milliseconds after 1970.
    Since {
        /// Its first failure.
        unix_ms: u64,
    },
    /// Try everything that is held again now.
    Retry,
    /// Answer EIO to everything that is held; what fails later is held again.
    Fail,
    /// Answer ENOSPC to everything that is held and to what fails from now on.
    Park,
    /// Hold again what fails.
    Unpark,
    /// A drill: let requests of these kinds fail with EIO as if the storage had said so, or no longer.
    Fault {
        /// Reads.
        #[serde(default)]
        reads: bool,
        /// Writes, discards and zeroes.
        #[serde(default)]
        writes: bool,
        /// Flushes.
        #[serde(default)]
        flushes: bool,
        /// Begin, or end.
        on: bool,
    },
    /// Look how large the storage has grown, and serve that much; returns `{"size": BYTES}`.
    Size,
    /// Return the state.
    State,
    /// End.
    Quit,
}

/// Serves clients, for ever.
pub async fn serve(listener: UnixListener, disk: Arc<Disk>, quit: Arc<Notify>) {
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                clients.spawn(client(stream, disk.clone(), quit.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: it passes, and spinning would not help it.
                warn!(%error, "a control client could not be accepted");
                tokio::time::sleep(PACE).await;
            }
        }
    }
}

async fn client(stream: UnixStream, disk: Arc<Disk>, quit: Arc<Notify>) {
    match talk(&stream, &disk, &quit).await {
        Ok(()) | Err(WireError::Io(_)) => debug!("a control client left"),
        Err(error) => warn!(%error, "a control client was cut off"),
    }
}

async fn talk(stream: &UnixStream, disk: &Disk, quit: &Notify) -> Result<(), WireError> {
    let mut reader = LineReader::of_objects();
    let mut writer = LineWriter::new();
    let mut states = disk.watch();
    states.mark_changed();
    let mut answer: Option<Answer<'_>> = None;
    let mut seconds = tokio::time::interval(LONG);
    let mut quiet_until = tokio::time::Instant::now();
    let mut told_long = false;
    let mut leaving = false;
    loop {
        if leaving && answer.is_none() && writer.is_empty() {
            quit.notify_one();
            return Ok(());
        }
        // Nothing is made ready for a client that does not read.
        let idle = writer.is_empty();
        tokio::select! {
            biased;
            sent = writer.flush(stream), if !idle => sent?,
            text = async { answer.as_mut().expect("only polled while there is one").await }, if answer.is_some() => {
                answer = None;
                writer.push(text, Vec::new());
            }
            () = changed(&mut states, quiet_until), if idle => {
                states.mark_unchanged();
                quiet_until = tokio::time::Instant::now() + PACE;
                writer.push(event(disk), Vec::new());
                // It may tell of a call that takes long: then its end is to be told as well.
                told_long = true;
            }
            _ = seconds.tick(), if idle => {
                let long = disk.watch().borrow().running().1.is_some_and(|since| since.elapsed() >= LONG);
                if long || told_long {
                    writer.push(event(disk), Vec::new());
                }
                told_long = long;
            }
            line = reader.next(stream), if idle && answer.is_none() => {
                let Some(line) = line? else { return Ok(()) };
                let command = serde_json::from_slice(&line.text);
                leaving |= matches!(command, Ok(Command::Quit));
                answer = Some(Box::pin(reply(disk, command)));
            }
        }
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Vec<u8>> + Send + 'a>>;

async fn reply(disk: &Disk, command: Result<Command, serde_json::Error>) -> Vec<u8> {
    let outcome = match command {
        Ok(command) => execute(disk, command).await,
        Err(error) => Err(format!("this is no command: {error}")),
    };
    let answer = outcome.map_or_else(|error| json!({"error": error}), |value| json!({"return": value}));
    answer.to_string().into_bytes()
}

/// A change that is not to be told before its time.
async fn changed(states: &mut watch::Receiver<State>, quiet_until: tokio::time::Instant) {
    tokio::time::sleep_until(quiet_until).await;
    let _ = states.changed().await;
}

async fn execute(disk: &Disk, command: Command) -> Result<Value, String> {
    match command {
        Command::Set { interval_ms, timeout_ms } => {
            let interval = interval_ms.map(Duration::from_millis);
            if interval.is_some_and(|interval| interval < LEAST_INTERVAL) {
                return Err(format!("interval_ms is less than {}: give it more", LEAST_INTERVAL.as_millis()));
            }
            disk.change(|state| {
                let (old_interval, old_timeout) = state.retry.times();
                let timeout =
                    timeout_ms.map_or(old_timeout, |ms| (ms > 0).then(|| Duration::from_millis(ms)));
                state.retry.set(interval.unwrap_or(old_interval), timeout, Instant::now());
            });
        }
        Command::Since { unix_ms } => disk.change(|state| state.retry.inherit(Moment::of_unix(unix_ms))),
        Command::Retry => disk.change(|state| state.retry.try_now()),
        Command::Fail => disk.change(|state| state.retry.fail_now()),
        Command::Park => disk.change(|state| state.retry.park(true)),
        Command::Unpark => disk.change(|state| state.retry.park(false)),
        Command::Fault { reads, writes, flushes, on } => disk.change(|state| {
            let PerKind { read, write, flush } = &mut state.drill;
            for (kind, meant) in [(read, reads), (write, writes), (flush, flushes)] {
                *kind = if meant { on } else { *kind };
            }
        }),
        Command::Size => {
            let asked = tokio::time::timeout(SIZE, disk.resize()).await;
            let size = asked
                .map_err(|_| format!("the storage did not tell its size within {} s", SIZE.as_secs()))?;
            return Ok(json!({"size": size.map_err(|error| format!("the size cannot be used: {error}"))?}));
        }
        Command::State => return Ok(view(disk)),
        Command::Quit => {}
    }
    Ok(json!({}))
}

fn event(disk: &Disk) -> Vec<u8> {
    let mut event = json!({"event": "state"});
    if let (Some(event), Value::Object(view)) = (event.as_object_mut(), view(disk)) {
        event.extend(view);
    }
    event.to_string().into_bytes()
}

/// An error of the system in its words, without the number that Rust puts behind them.
fn words(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// The state as people read it.
fn view(disk: &Disk) -> Value {
    let receiver = disk.watch();
    let state = receiver.borrow();
    let outage = state.retry.outage();
    let error = outage.map(|outage| words(outage.errno));
    let (interval, timeout) = state.retry.times();
    let counts = state.retry.counts();
    let (outstanding, oldest) = state.running();
    json!({
        "held": state.retry.held(),
        "since_unix_ms": outage.map(|outage| outage.since.unix_ms),
        "attempts": outage.map(|outage| outage.attempts),
        "operation": outage.map(|outage| outage.kind),
        "errno": outage.map(|outage| outage.errno),
        "layer": outage.map(|outage| outage.layer),
        "error": error,
        "timed_out": outage.is_some_and(Outage::timed_out),
        "parked": state.retry.parked(),
        "outages": counts.outages,
        "timeouts": counts.timeouts,
        "fault": state.drill,
        "interval_ms": interval.as_millis() as u64,
        "timeout_ms": timeout.map(|timeout| timeout.as_millis() as u64),
        "size": disk.size(),
        "outstanding": outstanding,
        "oldest_outstanding_ms": oldest.map(|since| since.elapsed().as_millis() as u64),
        "heir": state.retry.is_heir(),
    })
}
