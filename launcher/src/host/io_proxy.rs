//! The process that serves a disk's images in QEMU's place, from outside: started, found again, ended. What it does is in [`crate::proxy`].
//!
//! It outlives its owner, as QEMU does. It inherits a lock, so the kernel tells whether it lives: from before its first instruction until its last
//! call at the storage has returned. So there is one at most, whoever dies when.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::DeviceId;
use devices::host::IoProxy;
use devices::retry::{AtTimeout, Retry};
use nix::sys::signal::Signal;
use serde_json::Value;
use tracing::info;

use super::need::NeedError;
use crate::locks::{LockError, OfdLock, probe};
use crate::process::{Identity, Memlock, Process, Spawn, last_lines};

/// How long it may take to serve. It gives its image up earlier and says so.
const STARTING: Duration = Duration::from_secs(10);

/// How long it may take to end when it was told to, before it is told so more firmly.
const ENDING: Duration = Duration::from_secs(2);

/// How long after SIGKILL it may take to end.
const KILLING: Duration = Duration::from_secs(5);

/// How long one that was killed takes to end at most, if the kernel does not keep it.
pub const KILLED: Duration = Duration::from_millis(500);

/// Between two looks at what cannot be waited for.
const PAUSE: Duration = Duration::from_millis(5);

/// Up to where qcow2 can address its file: an image that grows never reaches the end of its export, whatever is kept in it.
const LARGEST_QCOW2: u64 = 1 << 56;

/// Starts it unless it runs, and returns when it serves. What it says goes to `log`.
pub(super) fn start(id: &DeviceId, plan: &IoProxy, log: &Path) -> Result<(), NeedError> {
    let failed = |reason| NeedError::Proxy {
        id: id.clone(),
        image: plan.image.clone().into(),
        reason,
        log: log.to_owned(),
    };
    let lock_file = lock_file(plan);
    if let Some(lock) = OfdLock::try_acquire(&lock_file)? {
        let spawn = Spawn {
            binary: &this_program(),
            args: arguments(id, plan),
            inherit: vec![lock.as_fd()],
            log,
            memlock: Memlock::Inherited,
            env: Vec::new(),
        };
        let process = spawn.start()?;
        info!(device = %id, pid = process.pid(), image = plan.image, "started its io-proxy");
        // It is our child, and nobody else's to reap.
        tokio::spawn(async move { process.exited().await });
    }
    is_ready(Path::new(&plan.control), || probe(&lock_file).unwrap_or(true)).map_err(|reason| {
        let last = last_lines(log, 1);
        failed(if last.is_empty() || reason.contains(&last) { reason } else { format!("{reason} ({last})") })
    })
}

/// Waits for its first words.
fn is_ready(control: &Path, lives: impl Fn() -> bool) -> Result<(), String> {
    let until = Instant::now() + STARTING;
    let late = || format!("it is not ready after {} s", STARTING.as_secs());
    let ended = || "it ended".to_owned();
    let stream = loop {
        match UnixStream::connect(control) {
            Ok(stream) => break stream,
            Err(_) if !lives() => return Err(ended()),
            Err(error) if Instant::now() >= until => return Err(format!("{}: {error}", late())),
            Err(_) => std::thread::sleep(PAUSE),
        }
    };
    let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
    let mut line = String::new();
    let read = stream.set_read_timeout(Some(left)).and_then(|()| BufReader::new(stream).read_line(&mut line));
    read.map_err(|_| late())?;
    let event: Value = serde_json::from_str(&line).unwrap_or_default();
    match event["event"].as_str() {
        Some("state") => Ok(()),
        _ => Err(event["error"].as_str().map_or_else(ended, str::to_owned)),
    }
}

/// Makes it give back what it holds, and what fails from now on: QEMU does not answer while it drains, and it drains until it has all of it.
///
/// # Errors
/// It cannot be told, or does not obey in time.
pub fn park(plan: &IoProxy) -> std::io::Result<()> {
    let mut line = UnixStream::connect(&plan.control)?;
    line.set_write_timeout(Some(ENDING))?;
    line.set_read_timeout(Some(ENDING))?;
    line.write_all(b"{\"command\":\"park\"}\n")?;
    // States come in between.
    for said in BufReader::new(line).lines() {
        if said?.starts_with("{\"return\"") {
            return Ok(());
        }
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}

/// Ends it, if it runs, and removes its files. QEMU has let go of it before, or is dead.
pub(super) fn end(id: &DeviceId, plan: &IoProxy) -> Result<(), NeedError> {
    // It hears us only as long as the line is open.
    let _line = UnixStream::connect(&plan.control).and_then(|mut line| {
        line.set_write_timeout(Some(ENDING))?;
        line.write_all(b"{\"command\":\"quit\"}\n")?;
        Ok(line)
    });
    for (signal, patience) in
        [(None, ENDING), (Some(Signal::SIGTERM), ENDING), (Some(Signal::SIGKILL), KILLING)]
    {
        if let Some(signal) = signal {
            for process in processes(plan) {
                // It may end by itself just now.
                let _ = process.signal(signal);
            }
        }
        if has_ended(&lock_file(plan), patience)? {
            return remove_files(plan);
        }
    }
    Err(NeedError::ProxyStays { id: id.clone(), image: plan.image.clone().into() })
}

/// Kills those that serve so, and says which of them have not ended by a time: the kernel keeps them in a call at their storage. QEMU is dead.
pub fn kill(plans: Vec<IoProxy>, until: Instant) -> Vec<IoProxy> {
    for process in plans.iter().flat_map(processes) {
        // It may end by itself just now.
        let _ = process.signal(Signal::SIGKILL);
    }
    let stays = |plan: &IoProxy| {
        let patience = until.saturating_duration_since(Instant::now());
        !has_ended(&lock_file(plan), patience).unwrap_or(true)
    };
    plans.into_iter().filter(stays).collect()
}

fn has_ended(lock_file: &Path, patience: Duration) -> Result<bool, LockError> {
    let until = Instant::now() + patience;
    while probe(lock_file)? {
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(true)
}

/// The processes that serve so: one at most, found by their arguments.
fn processes(plan: &IoProxy) -> impl Iterator<Item = Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        // In this order: whoever has the pid when it is adopted is whoever had it before its arguments were read.
        let identity = Identity::of(pid).ok()?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = arguments.split(|byte| *byte == 0);
        let is_it = words.nth(1) == Some(b"io-proxy") && words.any(|word| word == plan.control.as_bytes());
        if is_it { Process::adopt(&identity).ok()? } else { None }
    })
}

fn remove_files(plan: &IoProxy) -> Result<(), NeedError> {
    for path in [PathBuf::from(&plan.socket), PathBuf::from(&plan.control), lock_file(plan)] {
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(NeedError::Socket { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn lock_file(plan: &IoProxy) -> PathBuf {
    Path::new(&plan.socket).with_extension("lock")
}

/// This very executable, also when another version has taken its place.
fn this_program() -> PathBuf {
    std::env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(|| "/proc/self/exe".into())
}

/// How long the proxy itself retries: any other act at the timeout is the owner's.
pub fn own_timeout(retry: &Retry) -> Option<u64> {
    retry.timeout.filter(|_| retry.at_timeout == AtTimeout::Report).map(|timeout| timeout.as_millis())
}

fn arguments(id: &DeviceId, plan: &IoProxy) -> Vec<OsString> {
    let IoProxy { socket, control, image, read_only, grows, direct, discard, retry, below, .. } = plan;
    let mut words = vec!["io-proxy".to_owned()];
    let interval = format!("{}ms", retry.interval.as_millis());
    let timeout = own_timeout(retry).map(|timeout| format!("{timeout}ms"));
    let values = [
        ("--socket", Some(socket.clone())),
        ("--control", Some(control.clone())),
        ("--name", Some(id.to_string())),
        ("--file", Some(image.clone())),
        ("--discard", Some(discard.word().to_owned())),
        ("--interval", Some(interval)),
        ("--timeout", timeout),
        ("--size", grows.then(|| format!("{LARGEST_QCOW2}B"))),
    ];
    for (name, value) in values {
        words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
    }
    words.extend(below.iter().flat_map(|layer| ["--below".to_owned(), layer.path.clone()]));
    let flags = [
        ("--read-only", *read_only),
        ("--direct", *direct),
        ("--retry-read", retry.read),
        ("--retry-write", retry.write),
    ];
    words.extend(flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name.to_owned()));
    words.into_iter().map(OsString::from).collect()
}
