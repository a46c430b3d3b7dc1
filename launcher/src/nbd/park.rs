//! A node that I/O is sent to while its storage is broken.
//!
//! ```text
//!              hold                       answers EIO at once, and is so at the start;
//!   answering ──────▶ silent              while it is silent it keeps what comes,
//!             ◀──────                     and giving back answers EIO to everything kept
//!             give_back
//! ```
//!
//! EIO is the default for a reason: every stop of the VM flushes all nodes, and a silent node then hangs QEMU for good. So it is silenced
//! only after the device was moved to it, and made to answer before anything that drains. Both are plain calls that wait for nothing, for a
//! loop or a watchdog to make at any time.

use tokio::sync::watch;

use super::{Bytes, Errno, Export, Features, Reply, Request};

/// What it keeps while it is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Everything.
    Full,
    /// Flushes only. For the timeout of a virtio-blk disk: its size is to be 512, so that the device itself refuses reads and writes as out
    /// of range, and a flush neither lies nor stops the VM.
    Tiny,
}

/// How many requests are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Reads, and questions about allocation.
    pub reads: usize,
    /// Writes, discards and zeroes.
    pub writes: usize,
    /// Flushes.
    pub flushes: usize,
}

impl Held {
    /// All of them.
    pub fn total(self) -> usize {
        self.reads + self.writes + self.flushes
    }

    fn of(&mut self, request: &Request) -> &mut usize {
        match request {
            Request::Read { .. } | Request::BlockStatus { .. } => &mut self.reads,
            Request::Write { .. } | Request::Trim { .. } | Request::WriteZeroes { .. } => &mut self.writes,
            Request::Flush => &mut self.flushes,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    silent: bool,
    /// How often it was told to give back: what is kept waits for the next time, even if it is silent again by then.
    given_back: u64,
}

/// An export without storage; see the module.
#[derive(Debug)]
pub struct Park {
    size: u64,
    kind: Kind,
    mode: watch::Sender<Mode>,
    held: watch::Sender<Held>,
}

impl Park {
    /// One of that size in bytes that answers EIO.
    pub fn new(size: u64, kind: Kind) -> Park {
        Park { size, kind, mode: watch::Sender::default(), held: watch::Sender::default() }
    }

    /// Keeps what comes from now on.
    pub fn hold(&self) {
        self.mode.send_modify(|mode| mode.silent = true);
    }

    /// Answers EIO to everything kept, and to what comes.
    pub fn give_back(&self) {
        self.mode.send_modify(|mode| {
            mode.silent = false;
            mode.given_back += 1;
        });
    }

    /// Whether it keeps what comes.
    pub fn is_silent(&self) -> bool {
        self.mode.borrow().silent
    }

    /// How many requests are kept now.
    pub fn held(&self) -> usize {
        self.held.borrow().total()
    }

    /// What is kept, and every change of it.
    pub fn changed(&self) -> watch::Receiver<Held> {
        self.held.subscribe()
    }

    fn keeps(&self, request: &Request) -> bool {
        self.kind == Kind::Full || *request == Request::Flush
    }
}

impl Export for Park {
    fn size(&self) -> u64 {
        self.size
    }

    fn features(&self) -> Features {
        Features {
            read_only: false,
            flush: true,
            trim: true,
            write_zeroes: true,
            fast_zero: false,
            block_status: false,
            min_block: 1,
            preferred_block: 4096,
        }
    }

    async fn handle(&self, request: Request) -> Result<Reply, Errno> {
        let mut mode = self.mode.subscribe();
        let now = *mode.borrow();
        if now.silent && self.keeps(&request) {
            let _counted = Counted::new(&self.held, request);
            // An error would mean that the sender is gone, which is in `self`.
            let _ = mode.wait_for(|mode| mode.given_back != now.given_back).await;
        }
        Err(Errno::Io)
    }
}

/// A request that is kept: counted until it is answered, or until its connection is gone.
struct Counted<'a> {
    held: &'a watch::Sender<Held>,
    request: Request,
}

impl<'a> Counted<'a> {
    fn new(held: &'a watch::Sender<Held>, mut request: Request) -> Counted<'a> {
        if let Request::Write { data, .. } = &mut request {
            // It will never be written; QEMU has it and sends it again.
            *data = Bytes::default();
        }
        held.send_modify(|held| *held.of(&request) += 1);
        Counted { held, request }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.held.send_modify(|held| *held.of(&self.request) -= 1);
    }
}
