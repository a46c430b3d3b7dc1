//! Where a disk with policy `retry` stands. Pure: the owner tells it what happened and when, and does what it says.
//!
//! ```text
//!            failed                    failed, and the timeout is reached
//!   ok ----------------> suspended ------------------------------------> timed out
//!   ^                    |  ^    |                                       |  ^    |
//!   |      recovered     |  +----+ failed: attempts + 1                  |  +----+ failed: attempts + 1
//!   +--------------------+                                               |
//!   +--------------------------------------------------------------------+ recovered
//! ```
//!
//! A disk has failed when QEMU stopped, or retried, for its sake, and each further failure is an attempt. It has recovered when requests went
//! through and none failed. The clock of an outage starts at its first failure and is kept in a file beside the journal, so an owner that comes in
//! the middle goes on with it.

use std::time::Duration;

use devices::retry::{AtTimeout, Engine, Retry};
use serde::{Deserialize, Serialize};

/// What failed, in QEMU's words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct What {
    /// `read` or `write`; empty if QEMU has not said.
    pub operation: String,
    /// The system's words.
    pub cause: String,
    /// Whether the host had no space left.
    pub nospace: bool,
    /// How far below the uppermost image the one is that failed; a proxy alone knows.
    #[serde(default)]
    pub layer: usize,
}

/// Time since the boot, which goes on over the owner's death.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Uptime(u64);

impl Uptime {
    /// Now.
    pub fn now() -> Uptime {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        Uptime(seconds * 1000 + u64::try_from(now.tv_nsec).unwrap_or_default() / 1_000_000)
    }

    /// How long ago `earlier` was.
    pub fn since(self, earlier: Uptime) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// Earlier by a time.
    pub fn before(self, time: Duration) -> Uptime {
        Uptime(self.0.saturating_sub(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Later by a time.
    pub fn after(self, time: Duration) -> Uptime {
        Uptime(self.0.saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// An outage of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// The first failure.
    pub since: Uptime,
    /// The same in milliseconds since 1970, for people.
    pub since_unix_ms: u64,
    /// How often the I/O was tried again, in vain.
    pub attempts: u64,
    /// The last failure.
    pub what: What,
    /// When to try next.
    pub next: Uptime,
    /// What was done at the timeout, if it was reached.
    pub timed_out: Option<AtTimeout>,
}

/// What happened to a disk so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Outages that began.
    pub suspensions: u64,
    /// Attempts that failed.
    pub retries: u64,
    /// Outages that ended.
    pub recoveries: u64,
    /// Outages that were longer than the timeout.
    pub timeouts: u64,
    /// Milliseconds in outages that ended.
    pub suspended_ms: u64,
    /// Times in which its storage did not answer.
    #[serde(default)]
    pub hangs: u64,
}

/// A disk that retries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIo {
    /// How it retries, changes at run time included.
    pub retry: Retry,
    /// The outage, while there is one.
    pub outage: Option<Outage>,
    /// Counted since the launch.
    pub counters: Counters,
}

/// A change that people are told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An outage began.
    Suspended(Outage),
    /// An attempt failed.
    Retried(Outage),
    /// The timeout is reached.
    TimedOut(Outage, AtTimeout),
    /// The outage is over.
    Recovered(Outage, Duration),
}

/// The longest time between two attempts that pause the VM for good in between: they back off up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl DiskIo {
    /// A disk without an outage.
    pub fn new(retry: Retry) -> DiskIo {
        DiskIo { retry, outage: None, counters: Counters::default() }
    }

    /// A request failed: the first one of an outage, or an attempt.
    pub fn failed(&mut self, what: What, now: Uptime) -> Change {
        let Some(mut outage) = self.outage.take() else { return self.began(what, now, now) };
        self.counters.retries += 1;
        outage.attempts += 1;
        if what != What::default() {
            outage.what = what;
        }
        outage.next = now.after(self.wait(outage.attempts));
        let change = if outage.timed_out.is_none() && self.is_late(&outage, now) {
            self.counters.timeouts += 1;
            outage.timed_out = Some(self.retry.at_timeout);
            Change::TimedOut(outage.clone(), self.retry.at_timeout)
        } else {
            Change::Retried(outage.clone())
        };
        self.outage = Some(outage);
        change
    }

    /// QEMU says late what failed.
    pub fn explain(&mut self, what: What) {
        if let Some(outage) = self.outage.as_mut().filter(|outage| outage.what == What::default()) {
            outage.what = what;
        }
    }

    /// An outage began, perhaps unseen.
    pub fn began(&mut self, what: What, since: Uptime, now: Uptime) -> Change {
        self.counters.suspensions += 1;
        let ago = u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX);
        let since_unix_ms = unix_ms().saturating_sub(ago);
        let next = now.after(self.wait(0));
        let outage = Outage { since, since_unix_ms, attempts: 0, what, next, timed_out: None };
        Change::Suspended(self.outage.insert(outage).clone())
    }

    /// The guest is to be told now, whatever the timeout; `None` without an outage, or if it was told already.
    pub fn give_up(&mut self) -> Option<Change> {
        let outage = self.outage.as_mut().filter(|outage| outage.timed_out.is_none())?;
        outage.timed_out = Some(AtTimeout::Report);
        self.counters.timeouts += 1;
        Some(Change::TimedOut(outage.clone(), AtTimeout::Report))
    }

    /// Retries otherwise from now on. A timeout that was reached is judged anew, at the next failure, if another one or another act is wanted.
    /// A shorter interval counts for the next attempt already.
    pub fn set(&mut self, retry: Retry, now: Uptime) {
        let is_other = (retry.timeout, retry.at_timeout) != (self.retry.timeout, self.retry.at_timeout);
        self.retry = retry;
        if let Some(attempts) = self.outage.as_ref().map(|outage| outage.attempts) {
            let soonest = now.after(self.wait(attempts));
            self.outage.iter_mut().for_each(|outage| outage.next = outage.next.min(soonest));
        }
        if is_other {
            self.outage.iter_mut().for_each(|outage| outage.timed_out = None);
        }
    }

    /// Requests went through, and none failed.
    pub fn recovered(&mut self, now: Uptime) -> Option<Change> {
        let outage = self.outage.take()?;
        let lasted = now.since(outage.since);
        self.counters.recoveries += 1;
        self.counters.suspended_ms += u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
        Some(Change::Recovered(outage, lasted))
    }

    /// Whether it is to be tried again now.
    pub fn is_due(&self, now: Uptime) -> bool {
        self.outage.as_ref().is_some_and(|outage| outage.next <= now)
    }

    /// Try as soon as possible.
    pub fn hurry(&mut self, now: Uptime) {
        if let Some(outage) = &mut self.outage {
            outage.next = now;
        }
    }

    /// QEMU's own retries have QEMU's own clock: it says when their time is over.
    fn is_late(&self, outage: &Outage, now: Uptime) -> bool {
        // A proxy reports by its own clock, and says so.
        let is_ours = match self.retry.engine {
            Engine::Native => false,
            Engine::Proxy => self.retry.at_timeout != AtTimeout::Report,
            Engine::Hold | Engine::Pause => true,
        };
        is_ours && self.retry.timeout.is_some_and(|timeout| now.since(outage.since) >= timeout.duration())
    }

    /// How long to wait for the next attempt. A VM that is paused between attempts is woken ever more seldom, at least at the interval.
    fn wait(&self, attempts: u64) -> Duration {
        let interval = self.retry.interval.duration();
        if self.retry.engine != Engine::Pause {
            return interval;
        }
        let doubled = interval.saturating_mul(1 << attempts.min(16));
        doubled.min(LONGEST_PAUSE).max(interval)
    }
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Uptime = Uptime(1_000_000);

    fn disk(engine: Engine, timeout: Option<&str>, at_timeout: AtTimeout) -> DiskIo {
        let millis = |text: &str| text.parse().expect("a time");
        let timeout = timeout.map(millis);
        DiskIo::new(Retry { engine, read: true, write: true, interval: millis("2s"), timeout, at_timeout })
    }

    fn what(cause: &str) -> What {
        What { operation: "write".to_owned(), cause: cause.to_owned(), ..What::default() }
    }

    fn at(seconds: u64) -> Uptime {
        ZERO.after(Duration::from_secs(seconds))
    }

    #[test]
    fn an_outage_shorter_than_the_timeout() {
        let mut disk = disk(Engine::Hold, Some("10s"), AtTimeout::Report);
        assert!(matches!(disk.failed(what("EIO"), at(0)), Change::Suspended(o) if o.attempts == 0));
        assert!(!disk.is_due(at(1)) && disk.is_due(at(2)));
        assert!(matches!(disk.failed(what("EIO"), at(2)), Change::Retried(o) if o.attempts == 1));
        assert!(!disk.is_due(at(3)));
        let recovered = disk.recovered(at(5));
        assert!(matches!(recovered, Some(Change::Recovered(_, lasted)) if lasted == Duration::from_secs(5)));
        assert_eq!(disk.outage, None);
        let counters =
            Counters { suspensions: 1, retries: 1, recoveries: 1, timeouts: 0, suspended_ms: 5000, hangs: 0 };
        assert_eq!(disk.counters, counters);
        assert_eq!(disk.recovered(at(6)), None, "once");
    }

    #[test]
    fn the_timeout_is_looked_at_when_an_attempt_fails_and_told_once() {
        let mut disk = disk(Engine::Hold, Some("3s"), AtTimeout::Hold);
        disk.failed(what("EIO"), at(0));
        assert!(matches!(disk.failed(what("EIO"), at(2)), Change::Retried(_)));
        assert!(
            matches!(disk.failed(what("ENOLINK"), at(4)), Change::TimedOut(o, AtTimeout::Hold) if o.what.cause == "ENOLINK")
        );
        assert!(matches!(disk.failed(what("EIO"), at(6)), Change::Retried(o) if o.attempts == 3));
        assert!(disk.recovered(at(7)).is_some());
        // The next outage has a clock of its own.
        assert!(matches!(disk.failed(what("EIO"), at(100)), Change::Suspended(_)));
        assert!(matches!(disk.failed(what("EIO"), at(102)), Change::Retried(_)));
    }

    #[test]
    fn a_failure_that_qemu_did_not_explain_keeps_the_last_words() {
        let mut disk = disk(Engine::Hold, None, AtTimeout::Report);
        disk.failed(what("EIO"), at(0));
        disk.failed(What::default(), at(100_000));
        let outage = disk.outage.as_ref().expect("an outage");
        assert_eq!((outage.what.cause.as_str(), outage.timed_out), ("EIO", None), "no timeout, no end");
    }

    #[test]
    fn a_vm_that_is_paused_is_woken_ever_more_seldom() {
        let mut disk = disk(Engine::Pause, None, AtTimeout::Pause);
        let mut now = ZERO;
        let mut waits = Vec::new();
        for _ in 0..7 {
            disk.failed(what("EIO"), now);
            let next = disk.outage.as_ref().expect("an outage").next;
            waits.push(next.since(now).as_secs());
            now = next;
        }
        assert_eq!(waits, [2, 4, 8, 16, 30, 30, 30]);
        disk.hurry(now);
        assert!(disk.is_due(now));
    }

    #[test]
    fn giving_up_is_a_timeout_before_its_time() {
        let mut disk = disk(Engine::Hold, None, AtTimeout::Report);
        assert_eq!(disk.give_up(), None);
        disk.failed(what("EIO"), at(0));
        assert!(matches!(disk.give_up(), Some(Change::TimedOut(_, AtTimeout::Report))));
        assert_eq!(disk.give_up(), None, "told already");
    }

    #[test]
    fn who_wants_another_act_at_the_timeout_gets_it_at_the_next_failure() {
        let mut disk = disk(Engine::Hold, Some("3s"), AtTimeout::Report);
        disk.failed(what("EIO"), at(0));
        assert!(matches!(disk.failed(what("EIO"), at(4)), Change::TimedOut(_, AtTimeout::Report)));
        disk.set(disk.retry.clone(), at(5));
        assert!(matches!(disk.failed(what("EIO"), at(6)), Change::Retried(_)), "told already");
        disk.set(Retry { at_timeout: AtTimeout::Unplug, ..disk.retry.clone() }, at(7));
        assert!(matches!(disk.failed(what("EIO"), at(8)), Change::TimedOut(_, AtTimeout::Unplug)));
        disk.set(Retry { timeout: None, ..disk.retry.clone() }, at(9));
        assert!(matches!(disk.failed(what("EIO"), at(10)), Change::Retried(o) if o.timed_out.is_none()));
    }

    #[test]
    fn a_shorter_interval_counts_at_once_and_a_longer_one_from_the_next_attempt_on() {
        for engine in [Engine::Hold, Engine::Pause] {
            let mut disk = disk(engine, None, AtTimeout::Pause);
            let interval =
                |time: &str| Retry { interval: time.parse().expect("a time"), ..disk.retry.clone() };
            let (hour, second) = (interval("1h"), interval("1s"));
            disk.set(hour.clone(), at(0));
            disk.failed(what("EIO"), at(0));
            assert!(!disk.is_due(at(3599)));
            disk.set(second, at(10));
            assert!(!disk.is_due(at(10)) && disk.is_due(at(11)), "{engine}");
            disk.set(hour, at(10));
            assert!(disk.is_due(at(11)), "what was due stays due");
        }
    }

    #[test]
    fn an_outage_outlives_its_owner() {
        let mut disk = disk(Engine::Hold, Some("10s"), AtTimeout::Report);
        disk.failed(what("EIO"), at(0));
        let text = serde_json::to_string(&disk).expect("JSON");
        let mut other: DiskIo = serde_json::from_str(&text).expect("the same");
        assert_eq!(other, disk);
        assert!(matches!(other.failed(what("EIO"), at(11)), Change::TimedOut(..)), "the first owner's clock");
    }
}
