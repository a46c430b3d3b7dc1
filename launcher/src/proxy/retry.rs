//! When a failed request is tried again and when it is given up: a pure machine, told what happened and when.
//!
//! ```text
//!       first failure                    timeout since the first failure
//!  ok ───────────────▶ suspended ─────────────────────────────────▶ timed out
//!   ▲                   │  ▲   every interval: all that is kept        │      what is kept is answered EIO,
//!   │                   └──┘   is tried again                          │      and so is every failure from now on
//!   └──────────────── any success ────────────────────────────────────┘
//! ```
//!
//! A success ends the outage, but not the wait of the others that are kept: they are tried at their interval, and the next failure begins
//! another outage. So one bad sector among good ones never times out, and is not tried more often for it. Layers may be on storage of their own: each has
//! its clock and times out for itself, and a success of another layer does not touch its clock while anything is kept of it. For people the disk
//! fails as long as any layer does.
//!
//! Reads and writes are retried or not apart; a flush counts as a write. A failure of a kind that is not retried is answered at once with
//! the error it has. Parked, everything kept and every failure that would be is answered ENOSPC: with the policy `enospc` the device then
//! keeps the request itself.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::nbd::{Errno, Request};

#[cfg(test)]
mod tests;

/// What a request is to those who retry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Reading, and asking what is allocated.
    Read,
    /// Writing, discarding and zeroing.
    Write,
    /// Making durable.
    Flush,
}

impl Kind {
    /// The kind of a request.
    pub fn of(request: &Request) -> Kind {
        match request {
            Request::Read { .. } | Request::BlockStatus { .. } => Kind::Read,
            Request::Write { .. } | Request::Trim { .. } | Request::WriteZeroes { .. } => Kind::Write,
            Request::Flush => Kind::Flush,
        }
    }
}

/// A number or a truth for each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct PerKind<T> {
    pub read: T,
    pub write: T,
    pub flush: T,
}

impl<T> PerKind<T> {
    /// That of one kind.
    pub fn of(&mut self, kind: Kind) -> &mut T {
        match kind {
            Kind::Read => &mut self.read,
            Kind::Write => &mut self.write,
            Kind::Flush => &mut self.flush,
        }
    }
}

/// What to do about failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// From a failure to the next attempt.
    pub interval: Duration,
    /// From the first failure to giving up; never without one.
    pub timeout: Option<Duration>,
    /// Whether failed reads are retried.
    pub reads: bool,
    /// Whether failed writes and flushes are retried.
    pub writes: bool,
}

impl Policy {
    fn retries(&self, kind: Kind) -> bool {
        if kind == Kind::Read { self.reads } else { self.writes }
    }
}

/// A moment, as this process and as people have it.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Moment {
    pub at: Instant,
    pub unix_ms: u64,
}

impl Moment {
    /// This one.
    pub fn now() -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { at: Instant::now(), unix_ms: unix.as_millis() as u64 }
    }

    /// The one of that many milliseconds after 1970, or this one if that is still to come.
    pub fn of_unix(unix_ms: u64) -> Moment {
        let now = Moment::now();
        let ago = Duration::from_millis(now.unix_ms.saturating_sub(unix_ms));
        now.at.checked_sub(ago).map_or(now, |at| Moment { at, unix_ms: unix_ms.min(now.unix_ms) })
    }
}

/// What is known of an outage, for people.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Outage {
    pub since: Moment,
    /// Attempts that failed.
    pub attempts: u64,
    /// What failed last, and how.
    pub kind: Kind,
    pub errno: i32,
    /// Which layer that was.
    pub layer: usize,
    /// Of each layer that fails.
    clocks: BTreeMap<usize, Clock>,
}

impl Outage {
    /// Whether any layer has timed out.
    pub fn timed_out(&self) -> bool {
        self.clocks.values().any(|clock| clock.timed_out)
    }
}

/// How long a layer has failed.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// The first failure since its last success: what the timeout counts from.
    since: Instant,
    timed_out: bool,
}

impl Clock {
    fn is_over(&self, timeout: Duration, now: Instant) -> bool {
        self.since.checked_add(timeout).is_some_and(|end| now >= end)
    }
}

/// What becomes of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is tried again.
    Again,
    /// It is answered with this error.
    Answer(Errno),
}

#[derive(Debug)]
struct Kept {
    kind: Kind,
    layer: usize,
    state: KeptState,
}

#[derive(Debug, PartialEq, Eq)]
enum KeptState {
    Waiting,
    /// Its decision was not taken yet.
    Decided(Decision),
    Trying,
}

/// The machine.
#[derive(Debug)]
pub struct Retry {
    policy: Policy,
    outage: Option<Outage>,
    kept: BTreeMap<u64, Kept>,
    next: Option<Instant>,
    parked: bool,
    counts: Counts,
    /// When an outage began that a former process saw, until a request shows whether it lasts.
    inherited: Option<Moment>,
}

/// What happened since the start: a state can come and go between two looks, a number that rises cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Outages that began.
    pub outages: u64,
    /// Timeouts.
    pub timeouts: u64,
}

impl Retry {
    /// All is well.
    pub fn new(policy: Policy) -> Retry {
        Retry {
            policy,
            outage: None,
            kept: BTreeMap::new(),
            next: None,
            parked: false,
            counts: Counts::default(),
            inherited: None,
        }
    }

    /// Goes on with the outage of a former process, if the next request shows that it lasts.
    pub fn inherit(&mut self, since: Moment) {
        self.inherited = Some(since).filter(|_| self.outage.is_none());
    }

    /// Whether it is open if such an outage lasts.
    pub fn is_heir(&self) -> bool {
        self.inherited.is_some()
    }

    /// The outage, if there is one.
    pub fn outage(&self) -> Option<&Outage> {
        self.outage.as_ref()
    }

    /// How many requests of each kind are kept. Those that are to be answered wait for nothing any more.
    pub fn held(&self) -> PerKind<usize> {
        let is_answered = |kept: &&Kept| matches!(kept.state, KeptState::Decided(Decision::Answer(_)));
        let mut held = PerKind::default();
        for kept in self.kept.values().filter(|kept| !is_answered(kept)) {
            *held.of(kept.kind) += 1;
        }
        held
    }

    /// What happened since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether failures are answered ENOSPC.
    pub fn parked(&self) -> bool {
        self.parked
    }

    /// A request to a layer succeeded. Returns whether that changes anything.
    pub fn succeeded(&mut self, id: u64, layer: usize) -> bool {
        let was_kept = self.kept.remove(&id).is_some();
        let was_heir = self.inherited.take().is_some();
        let Some(outage) = &mut self.outage else { return was_heir };
        let clocks = outage.clocks.len();
        let kept = &self.kept;
        // Nobody may ever ask the others again: those of which nothing is kept do not outlast the success.
        outage.clocks.retain(|of, _| *of != layer && kept.values().any(|kept| kept.layer == *of));
        let changed = was_kept || was_heir || outage.clocks.len() != clocks;
        self.settle();
        changed
    }

    /// A request to a layer failed. The error if it is to be answered now; otherwise it is kept until [`Retry::decision`] has one.
    pub fn failed(
        &mut self,
        id: u64,
        layer: usize,
        kind: Kind,
        error: &io::Error,
        now: Moment,
    ) -> Result<(), Errno> {
        if !self.policy.retries(kind) {
            return Err(Errno::from(error));
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        let since = self.inherited.take().unwrap_or(now);
        let first = Outage { since, attempts: 0, kind, errno, layer, clocks: BTreeMap::new() };
        self.counts.outages += u64::from(self.outage.is_none());
        let outage = self.outage.get_or_insert(first);
        outage.attempts += 1;
        (outage.kind, outage.errno, outage.layer) = (kind, errno, layer);
        outage.clocks.entry(layer).or_insert(Clock { since: since.at, timed_out: false });
        self.expire(now.at);
        let clock = self.outage.as_ref().and_then(|outage| outage.clocks.get(&layer));
        let timed_out = clock.is_some_and(|clock| clock.timed_out);
        if self.parked || timed_out {
            self.kept.remove(&id);
            return Err(if self.parked { Errno::NoSpace } else { Errno::Io });
        }
        self.kept.insert(id, Kept { kind, layer, state: KeptState::Waiting });
        self.next.get_or_insert(now.at + self.policy.interval);
        Ok(())
    }

    /// Whether it is decided what becomes of a request that is kept.
    pub fn is_decided(&self, id: u64) -> bool {
        self.kept.get(&id).is_none_or(|kept| kept.state != KeptState::Waiting)
    }

    /// Takes the decision about a request.
    pub fn decision(&mut self, id: u64) -> Option<Decision> {
        let kept = self.kept.get_mut(&id)?;
        let KeptState::Decided(decision) = kept.state else { return None };
        kept.state = KeptState::Trying;
        if decision != Decision::Again {
            self.forget(id);
        }
        Some(decision)
    }

    /// A request's client is gone. Returns whether that changes anything.
    pub fn forget(&mut self, id: u64) -> bool {
        let known = self.kept.remove(&id).is_some();
        self.settle();
        known
    }

    /// When [`Retry::woken`] is due.
    pub fn wake_at(&self) -> Option<Instant> {
        self.next.into_iter().chain(self.deadline()).min()
    }

    /// Time has passed. Returns whether that changes anything.
    pub fn woken(&mut self, now: Instant) -> bool {
        let expired = self.expire(now);
        let due = self.next.is_some_and(|next| now >= next);
        if due {
            self.decide(Decision::Again, |_| true);
        }
        due || expired
    }

    /// Tries everything again now.
    pub fn try_now(&mut self) {
        self.decide(Decision::Again, |_| true);
    }

    /// Answers EIO to everything kept; what fails later is kept again.
    pub fn fail_now(&mut self) {
        self.decide(Decision::Answer(Errno::Io), |_| true);
    }

    /// Answers ENOSPC to everything kept and, until told otherwise, to what fails.
    pub fn park(&mut self, parked: bool) {
        self.parked = parked;
        if parked {
            self.decide(Decision::Answer(Errno::NoSpace), |_| true);
        }
    }

    /// Other times. A longer timeout also brings back what has timed out.
    pub fn set(&mut self, interval: Duration, timeout: Option<Duration>, now: Instant) {
        (self.policy.interval, self.policy.timeout) = (interval, timeout);
        self.next = self.next.map(|next| next.min(now + interval));
        for clock in self.outage.iter_mut().flat_map(|outage| outage.clocks.values_mut()) {
            clock.timed_out &= timeout.is_some_and(|timeout| clock.is_over(timeout, now));
        }
        self.expire(now);
    }

    /// The times that hold now.
    pub fn times(&self) -> (Duration, Option<Duration>) {
        (self.policy.interval, self.policy.timeout)
    }

    /// When the next timeout is over that was not acted upon.
    fn deadline(&self) -> Option<Instant> {
        let clocks = self.outage.as_ref()?.clocks.values();
        let since = clocks.filter(|clock| !clock.timed_out).map(|clock| clock.since).min()?;
        since.checked_add(self.policy.timeout?)
    }

    fn expire(&mut self, now: Instant) -> bool {
        let expired = self.deadline().is_some_and(|deadline| now >= deadline);
        if let Some((outage, timeout)) = self.outage.as_mut().zip(self.policy.timeout).filter(|_| expired) {
            let mut late = Vec::new();
            for (layer, clock) in &mut outage.clocks {
                if !clock.timed_out && clock.is_over(timeout, now) {
                    clock.timed_out = true;
                    late.push(*layer);
                    outage.layer = *layer;
                }
            }
            self.counts.timeouts += 1;
            self.decide(Decision::Answer(Errno::Io), |layer| late.contains(&layer));
        }
        expired
    }

    /// Decides what becomes of those that wait for a layer of these.
    fn decide(&mut self, decision: Decision, concerns: impl Fn(usize) -> bool) {
        let mut left = false;
        for kept in self.kept.values_mut().filter(|kept| kept.state == KeptState::Waiting) {
            if concerns(kept.layer) {
                kept.state = KeptState::Decided(decision);
            } else {
                left = true;
            }
        }
        self.next = self.next.filter(|_| left);
    }

    /// An outage is over when something succeeded and nothing is kept any more.
    fn settle(&mut self) {
        if self.kept.is_empty() {
            self.next = None;
            self.outage.take_if(|outage| outage.clocks.is_empty());
        }
    }
}
