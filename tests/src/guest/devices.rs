//! The guest's devices, by the agent: what there is, whether requests to unplug are heard, and patterns on disks.

use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::{DEVICES, Guest, GuestError, Inventory, PatternReport, PatternVerdict, PatternWish, Unplug};

impl Guest {
    /// The devices that the guest sees now.
    pub fn inventory(&mut self) -> Result<Inventory, GuestError> {
        let text = self.check_agent(&["inventory"])?;
        Ok(Inventory::of_guest(self.read_json(&text)?))
    }

    /// Asks for the inventory until `done` likes it, at most [`DEVICES`]; `what` names what is awaited, for the error.
    pub fn wait_inventory(
        &mut self,
        what: &str,
        done: impl Fn(&Inventory) -> bool,
    ) -> Result<Inventory, GuestError> {
        let until = Instant::now() + DEVICES;
        loop {
            let inventory = self.inventory()?;
            if done(&inventory) {
                return Ok(inventory);
            }
            if Instant::now() > until {
                let reason = format!("the guest sees\n{inventory}waited {DEVICES:?} in vain for {what}");
                return Err(self.line.failure(reason));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Makes the guest ignore requests to plug and unplug, or answer them, those first that came meanwhile.
    pub fn unplug(&mut self, unplug: Unplug) -> Result<(), GuestError> {
        self.check_agent(&["unplug", unplug.word()]).map(drop)
    }

    /// Starts to write and verify a disk of the guest without end: `device` is `/dev/vda`.
    pub fn pattern_start(&mut self, device: &str, wish: PatternWish) -> Result<(), GuestError> {
        let options = wish.words();
        let options = options.iter().map(String::as_str);
        let words: Vec<&str> = ["pattern", "start", device].into_iter().chain(options).collect();
        self.check_agent(&words).map(drop)
    }

    /// What the pattern on that disk did up to now; an operation that hangs does not delay the answer.
    pub fn pattern_report(&mut self, device: &str) -> Result<PatternReport, GuestError> {
        let text = self.check_agent(&["pattern", "report", device])?;
        self.read_json(&text)
    }

    /// Asks the pattern for its report until `done` likes it, at most [`DEVICES`]; `what` names what is awaited, for the error.
    pub fn wait_pattern(
        &mut self,
        device: &str,
        what: &str,
        done: impl Fn(&PatternReport) -> bool,
    ) -> Result<PatternReport, GuestError> {
        let until = Instant::now() + DEVICES;
        loop {
            let report = self.pattern_report(device)?;
            if done(&report) {
                return Ok(report);
            }
            if Instant::now() > until {
                let reason = format!("the guest reports {report:#?}; waited {DEVICES:?} in vain for {what}");
                return Err(self.line.failure(reason));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends the pattern on that disk and gives its last report; an operation that hangs is waited for two seconds.
    pub fn pattern_stop(&mut self, device: &str) -> Result<PatternReport, GuestError> {
        let text = self.check_agent(&["pattern", "stop", device])?;
        self.read_json(&text)
    }

    /// Looks at what a pattern left on that disk.
    pub fn pattern_verify(&mut self, device: &str) -> Result<PatternVerdict, GuestError> {
        // It fails for a disk that is not as it must be, and tells all the same.
        let output = self.agent(&["pattern", "verify", device])?;
        self.read_json(&output.stdout)
    }

    fn read_json<T: DeserializeOwned>(&self, text: &str) -> Result<T, GuestError> {
        serde_json::from_str(text)
            .map_err(|e| self.line.failure(format!("the agent said {text:?}, no report: {e}")))
    }
}
