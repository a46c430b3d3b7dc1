//! `qvirt io-proxy`: an NBD server in front of a disk's images that tries failed requests again, so that QEMU, and the guest, see no outage.
//!
//! ```text
//! QEMU ──NBD──▶ disk ──▶ storage (aio, threads)   disk: what is kept, when it is tried again and when given up (`retry`);
//!                ▲                                one for each layer of the chain, with one state for all
//! owner ──JSON──▶ control                       told what is kept; may hurry it, give it up, park it, or play an outage
//! ```
//!
//! One process per disk, which belongs to nobody: it runs until it is told to quit, or by SIGTERM. It takes no lock on its images and starts
//! and watches nothing; that is the affair of whoever starts it.
//!
//! It can be killed and started again at any time: QEMU reconnects and sends again what was not answered. This also opens a device anew that
//! was unplugged. The next one is to start when the last one has ended: until then a write of that one could still arrive, and it would remove
//! the sockets. For the same reason an attempt that hangs in the storage is not answered before it returns, whatever people say.
//!
//! The control socket is there first. Until all images are open, clients wait on it; if one cannot be opened within [`OPENING`], those there are
//! told `{"event": "failed", "error": "..."}`, and the process ends with status 1. The NBD socket is there before the first state is told.

mod aio;
mod control;
mod disk;
mod retry;
mod storage;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::control::{ControlError, bind};
use crate::nbd::{Server, ServerError};
use disk::Disk;
pub use retry::Policy;
pub use storage::Options;
use storage::Storage;

/// How long the images may take to open.
pub const OPENING: Duration = Duration::from_secs(8);

/// How long a proxy that cannot open its image waits for somebody to tell so.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The shortest time between two attempts.
pub const LEAST_INTERVAL: Duration = Duration::from_millis(100);

/// What a proxy is to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The NBD socket to serve on.
    pub socket: PathBuf,
    /// The socket of the control line.
    pub control: PathBuf,
    /// The export's name.
    pub name: String,
    /// The image.
    pub image: Options,
    /// The images below it, the uppermost first.
    pub below: Vec<PathBuf>,
    /// What to do about failures.
    pub policy: Policy,
}

/// Why a proxy does not serve.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ProxyError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("signals cannot be watched")]
    Signals(#[source] io::Error),
    #[error("there is no thread for its requests")]
    Thread(#[source] io::Error),
    #[error("image {} cannot be served; see that its storage works, and the rights on it of whoever runs qvirt", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "image {} did not open within {} s: its storage hangs; start again when it works", path.display(), OPENING.as_secs()
    )]
    Hangs { path: PathBuf },
}

/// Serves until told to quit. Both sockets are gone afterwards.
///
/// # Errors
/// The sockets cannot be made, or the image cannot be opened in time.
pub async fn run(plan: Plan) -> Result<(), ProxyError> {
    let mut terminated = signal(SignalKind::terminate()).map_err(ProxyError::Signals)?;
    let listener = bind(&plan.control, 0o600)?;
    let _removed = Removed(&plan.control);
    let opened = tokio::select! {
        opened = open(&plan) => opened,
        _ = terminated.recv() => return Ok(()),
    };
    match opened {
        Ok(opened) => serve(&plan, listener, opened, terminated).await,
        Err(error) => {
            tell(&listener, &error).await;
            Err(error)
        }
    }
}

async fn serve(
    plan: &Plan,
    listener: UnixListener,
    Opened { top: (storage, size), below }: Opened,
    mut terminated: Signal,
) -> Result<(), ProxyError> {
    let there = beside().map_err(ProxyError::Thread)?;
    let (disk, server) = {
        let _there = there.enter();
        (Arc::new(Disk::new(storage, size, plan.policy)), Server::bind(&plan.socket)?)
    };
    let mut layers = vec![(plan.name.clone(), disk.clone())];
    for (depth, (storage, size)) in (1..).zip(below) {
        let _there = there.enter();
        layers.push((format!("{}-{depth}", plan.name), Arc::new(disk.layer(depth, storage, size))));
    }
    let mut serving = JoinSet::new();
    for (name, layer) in layers {
        server.add(&name, layer.clone());
        serving.spawn_on(async move { layer.run().await }, &there);
    }
    let quit = Arc::new(Notify::new());
    tokio::select! {
        () = control::serve(listener, disk.clone(), quit.clone()) => {}
        () = disk.tick() => {}
        () = quit.notified() => {}
        _ = terminated.recv() => {}
        // One that is broken.
        _ = serving.join_next() => {}
    }
    Ok(())
}

/// A thread that runs what is spawned there until the process ends. Requests are handled in it, as handing one to the storage may have to wait
/// for that (see `aio`); the control line and the timers do not wait with them.
fn beside() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("requests".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// Images that are open, with their sizes.
struct Opened {
    top: (Storage, u64),
    below: Vec<(Storage, u64)>,
}

/// Opens all images, in [`OPENING`].
async fn open(plan: &Plan) -> Result<Opened, ProxyError> {
    let until = Instant::now() + OPENING;
    let image = plan.image.clone();
    let top = open_one(plan.image.path.clone(), until, move || Storage::open(image)).await?;
    let mut below = Vec::new();
    for path in &plan.below {
        let (image, direct) = (path.clone(), plan.image.direct);
        below.push(open_one(path.clone(), until, move || Storage::open_below(image, direct)).await?);
    }
    Ok(Opened { top, below })
}

/// Opens an image in a thread that nobody waits for longer than that.
async fn open_one(
    path: PathBuf,
    until: Instant,
    open: impl FnOnce() -> io::Result<Storage> + Send + 'static,
) -> Result<(Storage, u64), ProxyError> {
    let opening = tokio::task::spawn_blocking(move || {
        let storage = open()?;
        let size = storage.size()?;
        Ok((storage, size))
    });
    match tokio::time::timeout_at(until.into(), opening).await {
        Err(_) => Err(ProxyError::Hangs { path }),
        Ok(opened) => opened
            .unwrap_or_else(|panic| Err(panic.into()))
            .map_err(|source| ProxyError::Open { path, source }),
    }
}

/// Tells those on the control line why there will be no proxy.
async fn tell(listener: &UnixListener, error: &ProxyError) {
    let line = format!("{}\n", json!({"event": "failed", "error": crate::request::chain(error)}));
    let told = async {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Who has left needs no telling.
            let _ = stream.write_all(line.as_bytes()).await;
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, told).await;
}

/// A socket that goes with its process.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(self.0);
    }
}
