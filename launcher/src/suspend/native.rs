//! The end of an outage in which QEMU itself retries: it says so at each attempt that fails, and nothing when one succeeds. Pure.
//!
//! So silence is all there is to go by. Shorter silence is enough where requests were done meanwhile; where the guest does nothing, silence that two
//! attempts would have broken must do. Once QEMU has reported the error to the guest nothing waits any more, and silence then proves nothing at all:
//! only a request that was done does.

use std::time::Duration;

use super::Uptime;

/// How much later than its time an attempt may be seen.
const SLACK: Duration = Duration::from_millis(500);
/// How much silence it takes beyond two intervals if nothing was done.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often to count an attempt, and to look, at the most: with an interval of 0 QEMU tries thousands of times a second.
const LEAST: Duration = Duration::from_millis(250);

/// A watch on the silence of a disk whose outage lasts.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    last: Uptime,
    counted: Uptime,
    /// How many requests were done soon after the last failure.
    done: Option<u64>,
}

impl Watch {
    /// One that begins with a failure, or with an owner that does not know of any.
    pub fn new(now: Uptime) -> Watch {
        Watch { last: now, counted: now, done: None }
    }

    /// A request failed again. Returns whether that is another attempt: all requests of a disk that wait are tried at about the same time.
    pub fn failed(&mut self, at: Uptime, interval: Duration) -> bool {
        // Events that were on their way for long do not make the silence longer than it is.
        self.last = self.last.max(at);
        self.done = None;
        let is_another = at.since(self.counted) >= Watch::step(interval);
        if is_another {
            self.counted = at;
        }
        is_another
    }

    /// Whether the outage is over; `done` is how many requests were done by now, and `reported` whether the guest was told of the error.
    pub fn is_over(&mut self, done: u64, reported: bool, interval: Duration, now: Uptime) -> bool {
        let has_moved = done != *self.done.get_or_insert(done);
        let silence = now.since(self.last);
        let is_long = !reported && silence >= interval.saturating_mul(2) + PATIENCE;
        is_long || has_moved && silence >= interval + SLACK
    }

    /// How long to wait before the next look.
    pub fn step(interval: Duration) -> Duration {
        (interval / 2).max(LEAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(ms: u64) -> Uptime {
        Uptime::default().after(Duration::from_millis(1_000_000 + ms))
    }

    #[test]
    fn silence_in_which_requests_were_done_is_enough() {
        let mut watch = Watch::new(at(0));
        assert!(!watch.is_over(7, false, SECOND, at(500)));
        assert!(watch.failed(at(1000), SECOND));
        assert!(!watch.is_over(7, false, SECOND, at(1500)), "nothing was done");
        assert!(!watch.is_over(9, false, SECOND, at(2400)), "the next attempt may still be on its way");
        assert!(watch.is_over(9, false, SECOND, at(2500)));
    }

    #[test]
    fn a_bad_sector_among_good_ones_never_recovers() {
        let mut watch = Watch::new(at(0));
        for attempt in 1..100 {
            assert!(watch.failed(at(attempt * 1000), SECOND));
            assert!(!watch.is_over(attempt * 10, false, SECOND, at(attempt * 1000 + 10)));
            assert!(!watch.is_over(attempt * 10 + 9, false, SECOND, at(attempt * 1000 + 900)));
        }
    }

    #[test]
    fn an_idle_guest_takes_the_silence_of_two_attempts() {
        let mut watch = Watch::new(at(0));
        assert!(!watch.is_over(7, false, SECOND, at(2900)));
        assert!(watch.is_over(7, false, SECOND, at(3000)));
        let mut watch = Watch::new(at(0));
        assert!(!watch.is_over(7, true, SECOND, at(60_000)), "the guest has its error: nothing is tried");
        assert!(watch.is_over(8, true, SECOND, at(60_001)));
    }

    #[test]
    fn a_late_event_does_not_shorten_what_is_known_and_a_lost_one_is_waited_for() {
        let mut watch = Watch::new(at(0));
        watch.failed(at(2000), SECOND);
        watch.failed(at(1000), SECOND);
        assert!(!watch.is_over(7, false, SECOND, at(4900)));
        // The event of 3000 was lost: what came at 4000 counts.
        watch.failed(at(4000), SECOND);
        assert!(!watch.is_over(7, false, SECOND, at(5100)));
    }

    #[test]
    fn attempts_of_several_requests_are_one_and_a_busy_loop_is_counted_now_and_then() {
        let mut watch = Watch::new(at(0));
        assert!(!watch.failed(at(3), SECOND), "the same failure");
        let counted = [1000, 1001, 1002, 2000, 2004].map(|ms| watch.failed(at(ms), SECOND));
        assert_eq!(counted, [true, false, false, true, false]);
        let mut watch = Watch::new(at(0));
        let counted = (1..=1000).filter(|ms| watch.failed(at(*ms), Duration::ZERO)).count();
        assert_eq!(counted, 4);
    }
}
