//! Asking a QEMU binary what it can do, once, and remembering the answer.
//!
//! Owns the short run of QEMU without a machine, the questions, and the cache of the answer, which is keyed
//! by the binary's path, size, mtime and inode. What the answers mean belongs to [`devices::capabilities`].

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::capabilities::{Capabilities, Replies};
use qmp_client::{ConnectError, Options, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::folders::write_durably;
use crate::process::{Exit, Memlock, Process, ProcessError, Spawn, SpawnError, find_binary, last_lines};

/// The format of the cache that this qvirt writes, and the only one it reads: another one is asked anew.
const FORMAT: u32 = 1;

/// All questions together take a tenth of a second; this is for a host under heavy load.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long QEMU may take to end after `quit`, or after SIGKILL.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How much of QEMU's own words an error carries.
const QUOTED_LINES: usize = 10;

/// Why a QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ProbeError {
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("cannot prepare to ask {binary:?} what it can do: see the reason below")]
    Prepare { binary: PathBuf, source: io::Error },
    #[error("{binary:?} does not speak QMP{}: check that it is a QEMU system emulator", ended(.exit, .output))]
    Connect { binary: PathBuf, exit: Option<Exit>, output: String, source: ConnectError },
    #[error("{binary:?} did not answer {question}{}: qvirt needs QEMU 6.2 or newer", ended(.exit, .output))]
    Ask { binary: PathBuf, question: String, exit: Option<Exit>, output: String, source: QmpError },
    #[error(
        "{binary:?} did not answer all questions within {patience:?}, so it was killed: try again when the host is less busy"
    )]
    Slow { binary: PathBuf, patience: Duration },
    #[error(
        "{binary:?} describes itself in a way that qvirt does not understand: please report this with its version"
    )]
    Reply { binary: PathBuf, source: serde_json::Error },
    #[error("{binary:?} was asked and could not be ended")]
    End { binary: PathBuf, source: ProcessError },
}

fn ended(exit: &Option<Exit>, output: &str) -> String {
    let exit = exit.map(|exit| format!(" ({exit})")).unwrap_or_default();
    match output {
        "" => exit,
        output => format!("{exit}; it said:\n{output}\n"),
    }
}

/// What `binary` (a path, or a name to look for in `PATH`) can do: from the cache in `cache_dir`, or by
/// asking it, which takes about a tenth of a second and then fills the cache. A cache that cannot be read or
/// written is only warned about.
///
/// # Errors
/// The binary is missing, does not start, or does not answer as a QEMU.
pub async fn probe(binary: &Path, cache_dir: &Path) -> Result<Capabilities, ProbeError> {
    let binary = find_binary(binary)?;
    let key = Key::of(&binary).map_err(|source| ProbeError::Prepare { binary: binary.clone(), source })?;
    let file = cache_dir.join(key.file_name());
    if let Some(capabilities) = load(&file, &key) {
        return Ok(capabilities);
    }
    let capabilities = ask(&binary, PATIENCE).await?;
    info!(?binary, version = capabilities.version, "asked QEMU what it can do");
    store(cache_dir, &file, Entry { format: FORMAT, key, capabilities: &capabilities });
    give_memory_back();
    Ok(capabilities)
}

/// What the answer depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    /// Without symbolic links.
    path: PathBuf,
    size_bytes: u64,
    mtime_ns: i128,
    inode: u64,
    /// Of what is asked and how it is understood: another qvirt may want to know more.
    questions: u64,
}

impl Key {
    fn of(binary: &Path) -> io::Result<Key> {
        let path = fs::canonicalize(binary)?;
        let found = fs::metadata(&path)?;
        Ok(Key {
            path,
            size_bytes: found.size(),
            mtime_ns: i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec()),
            inode: found.ino(),
            questions: hash(&(env!("CARGO_PKG_VERSION"), Capabilities::DRIVERS)),
        })
    }

    /// By the path alone, so that an upgraded QEMU takes the place of the old one.
    fn file_name(&self) -> String {
        format!("qemu-{:016x}.json", hash(&self.path))
    }
}

/// A release of Rust may change this function, which costs one more probe.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The content of a cache file.
#[derive(Debug, Serialize, Deserialize)]
struct Entry<C> {
    format: u32,
    key: Key,
    capabilities: C,
}

fn load(file: &Path, key: &Key) -> Option<Capabilities> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(?file, %error, "cannot read what is cached about QEMU; asking it anew");
            return None;
        }
    };
    match serde_json::from_slice::<Entry<Capabilities>>(&text) {
        Ok(entry) if entry.format == FORMAT && entry.key == *key => Some(entry.capabilities),
        Ok(_) => None,
        Err(error) => {
            warn!(?file, %error, "what is cached about QEMU is damaged; asking it anew");
            None
        }
    }
}

fn store(cache_dir: &Path, file: &Path, entry: Entry<&Capabilities>) {
    let stored = fs::create_dir_all(cache_dir).map_err(|error| error.to_string()).and_then(|()| {
        let text = serde_json::to_vec(&entry).map_err(|error| error.to_string())?;
        write_durably(file, &text).map_err(|error| format!("{error}: {}", error.source))
    });
    if let Err(error) = stored {
        warn!(?file, error, "what QEMU said is not cached, so every start asks it again");
    }
}

async fn ask(binary: &Path, patience: Duration) -> Result<Capabilities, ProbeError> {
    let prepare = |source| ProbeError::Prepare { binary: binary.into(), source };
    let (ours, theirs) = UnixStream::pair().map_err(prepare)?;
    ours.set_nonblocking(true).map_err(prepare)?;
    let stream = tokio::net::UnixStream::from_std(ours).map_err(prepare)?;
    let log = tempfile::NamedTempFile::new().map_err(prepare)?;
    let chardev = format!("socket,id=qmp,fd={}", theirs.as_raw_fd());
    let args =
        ["-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-chardev", &chardev];
    let args = args.into_iter().chain(["-mon", "chardev=qmp,mode=control"]);
    let spawn = Spawn {
        binary,
        args: args.map(Into::into).collect(),
        inherit: vec![theirs.as_fd()],
        log: log.path(),
        memlock: Memlock::Inherited,
        env: Vec::new(),
    };
    let qemu = Ended(spawn.start()?);
    // Only QEMU holds its end now, so its death is our end of file.
    drop(theirs);
    let asked = tokio::time::timeout(patience, questions(binary, stream)).await;
    let end = |source| ProbeError::End { binary: binary.into(), source };
    match asked {
        Ok(Ok(capabilities)) => {
            if tokio::time::timeout(END_PATIENCE, qemu.0.exited()).await.is_err() {
                qemu.0.kill(END_PATIENCE).await.map_err(end)?;
            }
            Ok(capabilities)
        }
        Ok(Err(error)) => {
            // A QEMU that refused its arguments ends by itself, and its status says more than our SIGKILL.
            let exit = tokio::time::timeout(Duration::from_secs(1), qemu.0.exited()).await.ok();
            if exit.is_none() {
                qemu.0.kill(END_PATIENCE).await.map_err(end)?;
            }
            Err(error.with(exit, last_lines(log.path(), QUOTED_LINES)))
        }
        Err(_) => {
            qemu.0.kill(END_PATIENCE).await.map_err(end)?;
            Err(ProbeError::Slow { binary: binary.into(), patience })
        }
    }
}

/// Kills its process when it is dropped, so that a cancelled probe leaves none behind.
struct Ended(Process);

impl Drop for Ended {
    fn drop(&mut self) {
        if self.0.try_exited().is_none() {
            // It fails only if the process has ended.
            let _ = self.0.signal(nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl ProbeError {
    /// The same with what QEMU left behind.
    fn with(self, exit: Option<Exit>, output: String) -> ProbeError {
        match self {
            ProbeError::Connect { binary, source, .. } => {
                ProbeError::Connect { binary, exit, output, source }
            }
            ProbeError::Ask { binary, question, source, .. } => {
                ProbeError::Ask { binary, question, exit, output, source }
            }
            other => other,
        }
    }
}

async fn questions(binary: &Path, stream: tokio::net::UnixStream) -> Result<Capabilities, ProbeError> {
    let path = || binary.to_path_buf();
    // The one deadline is our caller's; these only have to be longer.
    let endless = Options { greeting_deadline: 2 * PATIENCE, command_deadline: 2 * PATIENCE, oob: false };
    let connected = Qmp::connect(stream, endless).await;
    let (qmp, _events) = connected.map_err(|source| ProbeError::Connect {
        binary: path(),
        exit: None,
        output: String::new(),
        source,
    })?;
    let failed = |question: &str| {
        let (binary, question) = (path(), question.to_owned());
        move |source| ProbeError::Ask { binary, question, exit: None, output: String::new(), source }
    };
    let ask = async |name: &'static str, arguments| qmp.call(name, arguments).await.map_err(failed(name));

    let version = ask("query-version", Value::Null).await?;
    let objects = ask("qom-list-types", json!({"implements": "user-creatable"})).await?;
    let machines = ask("query-machines", Value::Null).await?;
    let mut drivers = BTreeMap::new();
    for driver in Capabilities::DRIVERS {
        match qmp.call("device-list-properties", json!({"typename": driver})).await {
            Ok(properties) => drop(drivers.insert((*driver).to_owned(), properties)),
            Err(QmpError::Refused(error)) if error.class == "DeviceNotFound" => {}
            Err(source) => return Err(failed(&format!("device-list-properties of {driver}"))(source)),
        }
    }
    // A quarter of a megabyte, so it stays text.
    let schema = qmp.call_raw("query-qmp-schema", None).await.map_err(failed("query-qmp-schema"))?;
    // It may close the session before it answers.
    let _ = qmp.call("quit", Value::Null).await;
    let replies = Replies {
        version: &version,
        schema: schema.get(),
        devices: &drivers,
        objects: &objects,
        machines: &machines,
    };
    Capabilities::from_replies(&replies).map_err(|source| ProbeError::Reply { binary: path(), source })
}

/// The answers were megabytes for a moment, and the owner lives for months: what is free goes back to the
/// kernel.
#[allow(unsafe_code)]
fn give_memory_back() {
    // SAFETY: it takes a number and touches only memory that nobody has allocated.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests;
