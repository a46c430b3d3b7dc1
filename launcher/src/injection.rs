//! A seam for tests: makes one step of a launch, an attach, a detach or a clearing up fail, so that its undo can be seen to work, or ends the
//! process there, so that adoption can.
//!
//! `QVIRT_FAIL_STEP=attach:7` fails the seventh step of every attach of this process. `QVIRT_DIE_STEP=attach:7` kills this process with SIGKILL
//! when that step begins, with no chance to undo or to say anything. Unset, as both always are outside of tests, nothing happens. The steps
//! are counted where they are done, so a new step cannot be forgotten.

use nix::sys::signal::{Signal, raise};
use thiserror::Error;

/// The failure that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("failed on purpose at {work} step {number} ({step}): QVIRT_FAIL_STEP is set")]
pub struct Injected {
    work: &'static str,
    number: u32,
    step: &'static str,
}

/// Counts the steps of one piece of work.
#[derive(Debug)]
pub struct Steps {
    work: &'static str,
    done: u32,
    fail_at: Option<u32>,
    die_at: Option<u32>,
}

impl Steps {
    /// Steps of `launch`, `attach`, `media`, `snapshot`, `detach`, `clear`, or `host`, a command that changes it.
    pub fn of(work: &'static str) -> Steps {
        let wish = |variable: &str| {
            let wish = std::env::var(variable).ok()?;
            let (name, number) = wish.split_once(':')?;
            number.parse().ok().filter(|_| name == work)
        };
        Steps { work, done: 0, fail_at: wish("QVIRT_FAIL_STEP"), die_at: wish("QVIRT_DIE_STEP") }
    }

    /// Begins the next step, or fails it.
    pub fn enter(&mut self, step: &'static str) -> Result<(), Injected> {
        self.done += 1;
        if self.die_at == Some(self.done) {
            // Nothing comes after it: SIGKILL cannot be refused.
            let _ = raise(Signal::SIGKILL);
        }
        match self.fail_at {
            Some(number) if number == self.done => Err(Injected { work: self.work, number, step }),
            _ => Ok(()),
        }
    }
}
