//! The machine under a clock of its own.

use super::*;

/// A machine and a clock, in milliseconds.
struct Scene {
    retry: Retry,
    start: Instant,
    now: u64,
}

fn scene(timeout: u64) -> Scene {
    let timeout = (timeout > 0).then(|| Duration::from_millis(timeout));
    let policy = Policy { interval: Duration::from_millis(100), timeout, reads: true, writes: true };
    Scene { retry: Retry::new(policy), start: Instant::now(), now: 0 }
}

impl Scene {
    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn fail(&mut self, id: u64) -> Result<(), Errno> {
        self.fail_in(0, id)
    }

    fn fail_in(&mut self, layer: usize, id: u64) -> Result<(), Errno> {
        let now = Moment { at: self.at(self.now), unix_ms: self.now };
        self.retry.failed(id, layer, Kind::Write, &io::Error::from_raw_os_error(libc::EIO), now)
    }

    /// Moves the clock to when the machine wants to be woken; when that is.
    fn wake(&mut self) -> Option<u64> {
        let at = self.retry.wake_at()?;
        self.now = (at - self.start).as_millis() as u64;
        assert!(self.retry.woken(at), "woken for nothing");
        Some(self.now)
    }

    fn outage(&self) -> &Outage {
        self.retry.outage().expect("an outage")
    }
}

#[test]
fn what_failed_is_tried_every_interval_until_it_succeeds() {
    let mut scene = scene(0);
    assert!(!scene.retry.succeeded(0, 0), "nothing new");
    assert_eq!(scene.fail(1), Ok(()));
    scene.now = 30;
    assert_eq!(scene.fail(2), Ok(()));
    for round in 1..50 {
        assert!(!scene.retry.is_decided(1));
        assert_eq!(scene.wake(), Some(100 * round), "one tick for all");
        for id in [1, 2] {
            assert_eq!(scene.retry.decision(id), Some(Decision::Again));
            assert_eq!(scene.retry.decision(id), None, "once");
            assert_eq!(scene.fail(id), Ok(()));
        }
    }
    assert_eq!((scene.outage().attempts, scene.outage().since.unix_ms), (100, 0));
    assert_eq!(scene.retry.held(), PerKind { read: 0, write: 2, flush: 0 });
    scene.wake();
    assert!(scene.retry.succeeded(1, 0));
    assert!(scene.retry.outage().is_some(), "the other one is still kept");
    assert!(scene.retry.succeeded(2, 0));
    assert!(scene.retry.outage().is_none());
    assert_eq!(scene.retry.wake_at(), None);
}

#[test]
fn at_the_timeout_everything_is_reported_until_something_succeeds() {
    let mut scene = scene(250);
    assert_eq!(scene.fail(1), Ok(()));
    for tick in [100, 200] {
        assert_eq!(scene.wake(), Some(tick));
        assert_eq!(scene.retry.decision(1), Some(Decision::Again));
        assert_eq!(scene.fail(1), Ok(()));
    }
    assert_eq!(scene.wake(), Some(250), "not later than it was said");
    assert_eq!(scene.retry.held(), PerKind::default(), "what is to be answered does not wait");
    assert_eq!(scene.retry.decision(1), Some(Decision::Answer(Errno::Io)));
    assert!(scene.outage().timed_out());
    assert_eq!(scene.retry.wake_at(), None);
    scene.now = 900;
    assert_eq!(scene.fail(2), Err(Errno::Io));
    assert!(scene.retry.succeeded(3, 0));
    assert!(scene.retry.outage().is_none());
    assert_eq!(scene.fail(4), Ok(()), "another outage");
    assert_eq!(scene.retry.counts(), Counts { outages: 2, timeouts: 1 });
    assert_eq!(scene.wake(), Some(1000));
}

#[test]
fn an_attempt_that_takes_long_is_answered_when_it_fails() {
    let mut scene = scene(250);
    assert_eq!(scene.fail(1), Ok(()));
    scene.wake();
    assert_eq!(scene.retry.decision(1), Some(Decision::Again));
    assert_eq!(scene.wake(), Some(250), "its own attempt lasts; others would be answered");
    assert_eq!(scene.retry.held().write, 1);
    scene.now = 5000;
    assert_eq!(scene.fail(1), Err(Errno::Io));
    assert_eq!(scene.retry.held().write, 0);
}

#[test]
fn any_success_restarts_the_clock_and_hurries_nobody() {
    let mut scene = scene(250);
    assert_eq!(scene.fail(1), Ok(()));
    for round in 1..20 {
        assert_eq!(scene.wake(), Some(100 * round), "a bad sector among good ones never times out");
        assert_eq!(scene.retry.decision(1), Some(Decision::Again));
        assert_eq!(scene.fail(1), Ok(()));
        assert!(scene.retry.succeeded(1000 + round, 0));
    }
    assert_eq!(scene.outage().since.unix_ms, 0, "for people it is one");
}

/// They may be on storage of their own.
#[test]
fn each_layer_has_a_clock_of_its_own() {
    let mut scene = scene(250);
    assert_eq!(scene.fail_in(1, 1), Ok(()));
    for round in 1..=2 {
        assert_eq!(scene.wake(), Some(100 * round));
        assert_eq!(scene.retry.decision(1), Some(Decision::Again));
        assert!(!scene.retry.succeeded(1000 + round, 0), "the top works, which is no news");
        assert_eq!(scene.fail_in(1, 1), Ok(()));
    }
    scene.now = 240;
    assert_eq!(scene.fail_in(0, 2), Ok(()), "it begins to fail as well");
    assert_eq!(scene.wake(), Some(250), "the lower one's time is over");
    assert_eq!(scene.retry.decision(1), Some(Decision::Answer(Errno::Io)));
    assert_eq!(scene.retry.decision(2), None, "the top's is not");
    assert_eq!((scene.retry.held().write, scene.retry.counts().timeouts), (1, 1));
    assert_eq!(scene.wake(), Some(300), "it is tried at its interval");
    assert_eq!(scene.retry.decision(2), Some(Decision::Again));
    assert_eq!((scene.fail_in(0, 2), scene.fail_in(1, 3)), (Ok(()), Err(Errno::Io)), "each for itself");
    assert!(scene.outage().timed_out());
    scene.retry.try_now();
    assert_eq!(scene.retry.decision(2), Some(Decision::Again));
    assert!(scene.retry.succeeded(2, 0));
    assert!(
        scene.retry.outage().is_none(),
        "whether the lower one fails still is seen when it is asked again"
    );
}

#[test]
fn a_kind_that_is_not_retried_is_answered_with_its_own_error() {
    let mut scene = scene(0);
    scene.retry.policy.reads = false;
    let full = io::Error::from_raw_os_error(libc::ENOSPC);
    for parked in [false, true] {
        scene.retry.park(parked);
        assert_eq!(scene.retry.failed(1, 0, Kind::Read, &full, Moment::now()), Err(Errno::NoSpace));
        let broken = io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(scene.retry.failed(1, 0, Kind::Read, &broken, Moment::now()), Err(Errno::Io));
    }
    assert!(scene.retry.outage().is_none());
    scene.retry.park(false);
    assert_eq!(scene.retry.failed(2, 0, Kind::Flush, &full, Moment::now()), Ok(()), "a flush is as a write");
}

#[test]
fn parking_gives_everything_back() {
    let mut scene = scene(0);
    assert_eq!(scene.fail(1), Ok(()));
    assert_eq!(scene.fail(2), Ok(()));
    scene.wake();
    assert_eq!(scene.retry.decision(2), Some(Decision::Again));
    assert_eq!(scene.fail(2), Ok(()));
    scene.retry.park(true);
    assert_eq!(scene.retry.decision(1), Some(Decision::Again), "decided before");
    assert_eq!(scene.fail(1), Err(Errno::NoSpace));
    assert_eq!(scene.retry.decision(2), Some(Decision::Answer(Errno::NoSpace)));
    assert_eq!(scene.fail(3), Err(Errno::NoSpace));
    assert_eq!(scene.retry.wake_at(), None);
    scene.retry.park(false);
    assert_eq!(scene.fail(3), Ok(()));
}

#[test]
fn people_may_hurry_fail_and_change_their_mind() {
    let mut scene = scene(250);
    assert_eq!(scene.fail(1), Ok(()));
    scene.retry.try_now();
    assert_eq!(scene.retry.decision(1), Some(Decision::Again));
    assert_eq!(scene.fail(1), Ok(()));
    scene.retry.fail_now();
    assert_eq!(scene.retry.decision(1), Some(Decision::Answer(Errno::Io)));
    assert_eq!(scene.fail(2), Ok(()), "the outage goes on, and so does its clock");
    scene.now = 250;
    scene.retry.woken(scene.at(250));
    assert_eq!(scene.retry.decision(2), Some(Decision::Answer(Errno::Io)));
    scene.now = 300;
    scene.retry.set(Duration::from_millis(10), Some(Duration::from_millis(240)), scene.at(300));
    assert_eq!(scene.fail(3), Err(Errno::Io), "over all the same");
    assert_eq!(scene.retry.counts().timeouts, 1, "and not once more");
    scene.retry.set(Duration::from_millis(10), Some(Duration::from_secs(1)), scene.at(300));
    assert_eq!(scene.fail(3), Ok(()), "a longer timeout brings it back");
    assert_eq!(scene.wake(), Some(310));
    scene.retry.decision(3);
    assert_eq!(scene.fail(3), Ok(()));
    scene.retry.set(Duration::from_secs(9), None, scene.at(310));
    assert_eq!(scene.wake(), Some(320), "what was due stays due");
}

#[test]
fn a_request_whose_client_is_gone_is_forgotten() {
    let mut scene = scene(0);
    assert_eq!(scene.fail(1), Ok(()));
    assert!(scene.retry.forget(1));
    assert!(!scene.retry.forget(1));
    assert!(scene.retry.is_decided(1));
    assert_eq!(scene.retry.decision(1), None);
    assert_eq!(scene.retry.wake_at(), None, "nothing to wake for");
    assert!(scene.retry.outage().is_some(), "nothing succeeded");
}

#[test]
fn an_outage_that_is_inherited_keeps_its_clock() {
    let mut scene = scene(1000);
    let former = Moment { at: scene.at(0), unix_ms: 0 };
    scene.now = 700;
    scene.retry.inherit(former);
    assert!(scene.retry.is_heir() && scene.retry.outage().is_none() && scene.retry.wake_at().is_none());
    assert_eq!(scene.fail(1), Ok(()));
    assert!(!scene.retry.is_heir());
    assert_eq!(scene.outage().since.unix_ms, 0);
    assert_eq!(scene.wake(), Some(800), "the next attempt");
    assert_eq!(scene.retry.decision(1), Some(Decision::Again));
    scene.now = 1000;
    assert_eq!(scene.fail(1), Err(Errno::Io), "1000 ms after the first failure of all");

    scene = self::scene(1000);
    scene.retry.inherit(former);
    assert!(scene.retry.succeeded(1, 0), "it is over, and that is news");
    assert!(!scene.retry.is_heir() && scene.retry.outage().is_none());
    assert_eq!(scene.fail(2), Ok(()));
    scene.retry.inherit(former);
    assert!(!scene.retry.is_heir(), "it has one of its own");
}
