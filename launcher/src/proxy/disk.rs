//! The export in front of an image, one for each layer of a disk: requests go to the storage, by `aio` or in threads of their own, and those that fail wait as `retry` has it.
//!
//! ```text
//! handle ──▶ drill? ──▶ aio ──▶ or a thread at the storage ──▶ done: answered
//!   ▲                                                   └────▶ failed: kept ── interval, people, timeout ──▶ answered
//!   └──────────────────────────── again ─────────────────────────┘
//! ```
//!
//! A request that is kept goes with its connection. A call that has reached the storage does not: nothing can recall it. So a new connection,
//! whose client sends again what the old one lost, is served once the calls of the old one have returned.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use super::aio::Aio;
use super::retry::{Decision, Kind, Moment, PerKind, Policy, Retry};
use super::storage::{Storage, unsupported};
use crate::nbd::{Errno, Export, Features, Reply, Request};

#[cfg(test)]
mod tests;

/// Threads at the storage of a layer at once: as many as QEMU has requests in flight. Storage that hangs holds up so many, and no thread else.
const THREADS: usize = 16;

/// What changes about a disk. Whoever watches it is told of outages and what is kept, not of every request.
#[derive(Debug)]
pub struct State {
    /// The failures.
    pub retry: Retry,
    /// Kinds of requests that fail as if the storage had said so.
    pub drill: PerKind<bool>,
    /// When each call began that is at the storage now.
    running: BTreeMap<u64, Instant>,
    /// New connections that wait for such calls.
    waiting: usize,
}

impl State {
    /// How many calls are at the storage, and since when the oldest is.
    pub fn running(&self) -> (usize, Option<Instant>) {
        // Not the first: that one's attempt may be younger than it.
        (self.running.len(), self.running.values().min().copied())
    }
}

/// A disk behind the proxy, or a layer of it.
#[derive(Debug)]
pub struct Disk {
    storage: Arc<Storage>,
    /// How far below the top it is.
    depth: usize,
    aio: Option<Aio>,
    size: AtomicU64,
    next: Arc<AtomicU64>,
    threads: Arc<Semaphore>,
    state: Arc<watch::Sender<State>>,
}

impl Disk {
    /// A disk of that size, the storage's own at this moment. Needs the runtime around it that is to [`Disk::run`] it.
    pub fn new(storage: Storage, size: u64, policy: Policy) -> Disk {
        let state = State {
            retry: Retry::new(policy),
            drill: PerKind::default(),
            running: BTreeMap::new(),
            waiting: 0,
        };
        Disk {
            storage: Arc::new(storage),
            depth: 0,
            aio: aio(),
            size: AtomicU64::new(size),
            next: Arc::default(),
            threads: Arc::new(Semaphore::new(THREADS)),
            state: Arc::new(watch::Sender::new(state)),
        }
    }

    /// Another layer of it, so far below: whichever fails, the disk does. What one file system cannot do the other's may, so it has I/O of its own.
    pub fn layer(&self, depth: usize, storage: Storage, size: u64) -> Disk {
        Disk {
            storage: Arc::new(storage),
            depth,
            aio: aio(),
            size: AtomicU64::new(size),
            next: self.next.clone(),
            threads: Arc::new(Semaphore::new(THREADS)),
            state: self.state.clone(),
        }
    }

    /// The state, and every change that a person would call one. Requests wait while somebody looks: borrow it for a moment only.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Changes the state.
    pub fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }

    /// Asks the storage for its size, and serves that from now on if it has grown.
    pub async fn resize(&self) -> io::Result<u64> {
        let storage = self.storage.clone();
        let size = tokio::task::spawn_blocking(move || storage.size()).await??;
        let served = self.size.load(Ordering::Relaxed);
        if size < served {
            let reason =
                format!("it says {size} bytes, and {served} are in use: it shrank, or was unplugged");
            return Err(io::Error::other(reason));
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Answers what the storage has ended, for ever, or until the kernel no longer tells of it. To run where requests are handled.
    pub async fn run(&self) {
        match &self.aio {
            Some(aio) => {
                let outcome = aio.run().await;
                warn!(?outcome, "asynchronous I/O is broken");
            }
            None => std::future::pending().await,
        }
    }

    /// Wakes what is kept when its time has come, for ever.
    pub async fn tick(&self) {
        let mut state = self.watch();
        loop {
            let wake_at = state.borrow_and_update().retry.wake_at();
            let due = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {
                    self.state.send_if_modified(|state| state.retry.woken(Instant::now()));
                }
                // The sender is in `self`.
                _ = state.changed() => {}
            }
        }
    }

    /// One attempt. The request comes back with what came of it.
    async fn attempt(&self, id: u64, mut request: Request) -> (Request, io::Result<Reply>) {
        if *self.state.borrow().drill.clone().of(Kind::of(&request)) {
            return (request, Err(io::Error::from_raw_os_error(libc::EIO)));
        }
        if let Some(aio) = self.aio.as_ref().filter(|_| self.storage.can_submit(&request)) {
            let running = Running::new(self.state.clone(), id);
            if let Some(outcome) = self.storage.submit(aio, &mut request, running).await {
                return (request, outcome);
            }
        }
        let permit = self.threads.clone().acquire_owned().await.expect("nobody closes it");
        let running = Running::new(self.state.clone(), id);
        let storage = self.storage.clone();
        let call = tokio::task::spawn_blocking(move || {
            let _until_done = (permit, running);
            let outcome = storage.perform(&request);
            (request, outcome)
        });
        call.await.expect("a call at the storage does not panic, and nobody aborts it")
    }

    /// A failed attempt: what it is answered, or `None` when it is tried again.
    async fn failed(&self, id: u64, kind: Kind, error: &io::Error) -> Option<Errno> {
        if unsupported(error) {
            return Some(Errno::from(error));
        }
        let mut outcome = Ok(());
        self.state.send_modify(|state| {
            let before = state.retry.outage().is_some();
            outcome = state.retry.failed(id, self.depth, kind, error, Moment::now());
            if !before && state.retry.outage().is_some() {
                warn!(?kind, %error, image = %self.storage.path().display(), "the storage fails: requests are kept and tried again");
            }
        });
        if let Err(errno) = outcome {
            return Some(errno);
        }
        let mut state = self.state.subscribe();
        // An error would mean that the sender is gone, which is in `self`.
        let _ = state.wait_for(|state| state.retry.is_decided(id)).await;
        let mut decision = None;
        self.state.send_if_modified(|state| {
            decision = state.retry.decision(id);
            matches!(decision, Some(Decision::Answer(_)))
        });
        match decision? {
            Decision::Again => None,
            Decision::Answer(errno) => Some(errno),
        }
    }

    fn succeeded(&self, id: u64) {
        self.state.send_if_modified(|state| {
            let before = state.retry.outage().is_some();
            let changed = state.retry.succeeded(id, self.depth);
            if before && state.retry.outage().is_none() {
                info!(image = %self.storage.path().display(), "the storage works again, and nothing is kept any more");
            }
            changed
        });
    }
}

fn aio() -> Option<Aio> {
    let aio = Aio::new();
    if let Err(error) = &aio {
        info!(%error, "no asynchronous I/O here: every request gets a thread");
    }
    aio.ok()
}

impl Export for Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn features(&self) -> Features {
        self.storage.features()
    }

    async fn connected(&self) {
        let before = self.next.load(Ordering::Relaxed);
        self.state.send_modify(|state| state.waiting += 1);
        let _waiting = Waiting(&self.state);
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| state.running.keys().next().is_none_or(|id| *id >= before)).await;
    }

    async fn handle(&self, mut request: Request) -> Result<Reply, Errno> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let kind = Kind::of(&request);
        let _kept = Kept { state: &self.state, id };
        loop {
            let (back, outcome) = self.attempt(id, request).await;
            request = back;
            match outcome {
                Ok(reply) => {
                    self.succeeded(id);
                    return Ok(reply);
                }
                Err(error) => {
                    if let Some(errno) = self.failed(id, kind, &error).await {
                        return Err(errno);
                    }
                }
            }
        }
    }
}

/// A request that may be kept; forgotten when its connection is gone.
struct Kept<'a> {
    state: &'a watch::Sender<State>,
    id: u64,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.state.send_if_modified(|state| state.retry.forget(self.id));
    }
}

/// A call at the storage, until it returns.
struct Running {
    state: Arc<watch::Sender<State>>,
    id: u64,
}

impl Running {
    fn new(state: Arc<watch::Sender<State>>, id: u64) -> Running {
        state.send_if_modified(|state| {
            state.running.insert(id, Instant::now());
            false
        });
        Running { state, id }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.state.send_if_modified(|state| {
            state.running.remove(&self.id);
            state.waiting > 0
        });
    }
}

/// A new connection that waits for the calls of older ones.
struct Waiting<'a>(&'a watch::Sender<State>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_if_modified(|state| {
            state.waiting -= 1;
            false
        });
    }
}
