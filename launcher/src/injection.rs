//! A seam for tests: makes one step of a launch, an attach or a detach fail, so that its undo can be seen to work.
//!
//! `QVIRT_FAIL_STEP=attach:7` fails the seventh step of every attach of this process; unset, as it always is outside of tests, nothing
//! happens. The steps are counted where they are done, so a new step cannot be forgotten.

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
}

impl Steps {
    /// Steps of `launch`, `attach`, `detach` or `clear`.
    pub fn of(work: &'static str) -> Steps {
        let wish = std::env::var("QVIRT_FAIL_STEP").unwrap_or_default();
        let number = wish.split_once(':').filter(|(name, _)| *name == work).and_then(|(_, n)| n.parse().ok());
        Steps { work, done: 0, fail_at: number }
    }

    /// Begins the next step, or fails it.
    pub fn enter(&mut self, step: &'static str) -> Result<(), Injected> {
        self.done += 1;
        match self.fail_at {
            Some(number) if number == self.done => Err(Injected { work: self.work, number, step }),
            _ => Ok(()),
        }
    }
}
