//! One disk that retries: where it belongs, and when it is to be looked at.

use devices::Placed;
use devices::retry::{AtTimeout, Engine, Retry};
use serde_json::Value;
use tokio::time::Instant;

use super::hang::Probe;
use super::native::Native;
use super::proxied::Proxy;
use crate::suspend::hang::Detector;
use crate::suspend::parking::Seat;
use crate::suspend::{DiskIo, Uptime};

/// A disk that retries.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) io: DiskIo,
    /// The node it stands on when it is not parked.
    pub(super) top: String,
    pub(super) size_bytes: u64,
    /// How it was when it was moved to its own node again, to see whether it has recovered.
    pub(super) trying: Option<Trying>,
    /// A drill: this node takes the place of its own.
    pub(super) drill: Option<Drill>,
    /// Who tries its storage, if that is a process of its own.
    pub(super) proxy: Option<Proxy>,
    /// When people were last told of an attempt.
    pub(super) told: Option<Uptime>,
    /// Whether it stands on a place that keeps its requests, as last seen.
    pub(super) parked: bool,
    /// Requests that were done, as the owner's tick saw last.
    pub(super) done: u64,
    /// Whether its storage hangs.
    pub(super) hang: Detector,
    /// Whether its storage was asked.
    pub(super) probe: Probe,
    /// What is seen of it while QEMU itself retries.
    pub(super) native: Option<Native>,
    /// Failures up to then (microseconds since 1970) are of an outage that is over.
    pub(super) settled: i64,
    /// Whether the guest was reset since it failed: its requests may be gone.
    pub(super) was_reset: bool,
}

impl Disk {
    /// Whether a node is the one of its drill.
    pub(super) fn is_drilled_on(&self, node: &str) -> bool {
        self.drill.as_ref().is_some_and(|drill| drill.node.as_deref() == Some(node))
    }

    /// Whether the VM stands still for its timeout, which a proxy brought about.
    pub(super) fn pauses_behind_proxy(&self) -> bool {
        let timed_out = self.io.outage.as_ref().and_then(|outage| outage.timed_out);
        self.proxy.is_some() && timed_out == Some(AtTimeout::Pause)
    }

    /// Ends a drill whose time is over; its node is then one of the leavings.
    pub(super) fn end_drill(&mut self, leavings: &mut Vec<String>) {
        if let Some(drill) = self.drill.take_if(|drill| drill.until <= Uptime::now()) {
            leavings.extend(drill.node.filter(|_| drill.add.is_none()));
        }
    }

    /// The node it belongs on when it is not parked; with the arguments of `blockdev-add`, once, if there is no such node yet.
    pub(super) fn top_now(&mut self) -> (String, Option<Value>) {
        match &mut self.drill {
            Some(Drill { node: Some(node), add, .. }) => (node.clone(), add.take()),
            _ => (self.top.clone(), None),
        }
    }

    /// When it is to be looked at next.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        let uptime = Uptime::now();
        let drill = self.drill.as_ref().map(|drill| now + drill.until.since(uptime));
        let Some(outage) = &self.io.outage else { return drill };
        let look = match &self.trying {
            Some(trying) => Some(trying.look),
            // A person lets it go on.
            None if outage.timed_out == Some(AtTimeout::Pause) => None,
            // Its storage is asked first, and has not answered.
            None if self.parked && self.probe == Probe::Asked => None,
            None if self.io.retry.engine == Engine::Native => {
                Some(self.native.as_ref().map_or(now, |native| native.look))
            }
            // It says so itself.
            None if self.io.retry.engine == Engine::Proxy => None,
            None => Some(now + outage.next.since(uptime)),
        };
        look.into_iter().chain(drill).min()
    }

    /// Whether it may be tried when it is due: its storage is asked before that.
    pub(super) fn has_been_asked(&self) -> bool {
        !self.parked || self.probe == Probe::Passed
    }

    /// Where it belongs now; whether it may be tried if it is due.
    pub(super) fn wish(&self, may_try: bool, is_blk: bool) -> Wish {
        let stay = Wish { seat: Seat::Top, tries: false, waits: false };
        let Some(outage) = self.io.outage.as_ref().filter(|_| self.trying.is_none()) else { return stay };
        match (self.io.retry.engine, outage.timed_out) {
            (Engine::Native, _) => stay,
            (_, Some(AtTimeout::Pause)) => Wish { waits: true, ..stay },
            (Engine::Proxy, _) => stay,
            _ if may_try => Wish { tries: true, ..stay },
            (Engine::Pause, _) => Wish { waits: true, ..stay },
            (Engine::Hold, Some(AtTimeout::Report | AtTimeout::Unplug)) if is_blk => {
                Wish { seat: Seat::Tiny, ..stay }
            }
            (Engine::Hold, _) => Wish { seat: Seat::Park, ..stay },
        }
    }
}

/// A failure on purpose.
#[derive(Debug)]
pub(super) struct Drill {
    /// The node that fails; none where a proxy does.
    pub(super) node: Option<String>,
    /// Arguments of `blockdev-add`, until QEMU has it.
    pub(super) add: Option<Value>,
    pub(super) until: Uptime,
}

/// Where a disk belongs, and what that means for the VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) seat: Seat,
    /// Whether its storage is tried.
    pub(super) tries: bool,
    /// Whether the VM must stand still.
    pub(super) waits: bool,
}

/// A disk whose storage is being tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trying {
    pub(super) since: Uptime,
    /// Requests that were done before.
    pub(super) done: u64,
    /// When to look how it goes.
    pub(super) look: Instant,
}

/// How a device retries, and the node it was made with.
pub(super) fn retrying(placed: &Placed) -> Option<(Retry, String)> {
    let top = placed.spec.frontend.as_ref()?.0.get("drive")?.as_str()?.to_owned();
    Some((placed.retry.clone()?, top))
}
