//! Disks that QEMU itself retries. Nothing is sent to QEMU for these but questions: whatever drains may lose a request that is being tried.

use std::time::Duration;

use devices::DeviceId;
use devices::retry::Engine;
use qmp_client::{BlockIoError, IoAction, IoOperation, Timestamp};
use tokio::time::Instant;

use super::Owner;
use super::disk::Disk;
use crate::suspend::native::Watch;
use crate::suspend::turn::{Look, micros};
use crate::suspend::{Change, Uptime, What};

/// What is seen of a disk that QEMU retries.
#[derive(Debug)]
pub(super) struct Native {
    watch: Watch,
    pub(super) look: Instant,
}

impl Native {
    fn new(at: Uptime, interval: Duration) -> Native {
        Native { watch: Watch::new(at), look: Instant::now() + Watch::step(interval) }
    }
}

impl Disk {
    /// An event of QEMU's own retries: what to tell of it. There may be thousands a second.
    fn natively_failed(&mut self, error: &BlockIoError, at: Uptime) -> Vec<Change> {
        let is_report = error.action == IoAction::Report;
        let retry = &self.io.retry;
        // That a direction without retries reports its error is no timeout.
        let tries = if error.operation == IoOperation::Read { retry.read } else { retry.write };
        let is_retry = matches!(&error.action, IoAction::Other(word) if word == "retry");
        if !(is_retry || is_report && tries) {
            return Vec::new();
        }
        let interval = retry.interval.duration();
        let began = self.io.outage.is_none();
        let native = match &mut self.native {
            Some(native) if !began => native,
            none => none.insert(Native::new(at, interval)),
        };
        let mut changes = Vec::new();
        if native.watch.failed(at, interval) || began {
            let cause = error.reason.clone();
            let what =
                What { operation: error.operation.to_string(), cause, nospace: error.nospace, layer: 0 };
            changes.push(self.io.failed(what, at));
        }
        if is_report {
            changes.extend(self.io.give_up());
        }
        changes
    }

    /// Whether QEMU's retries have gone through by now.
    fn has_natively_recovered(&mut self, done: u64, now: Uptime) -> bool {
        let Some(outage) = &self.io.outage else { return false };
        let interval = self.io.retry.interval.duration();
        let native = self.native.get_or_insert_with(|| Native::new(now, interval));
        native.look = Instant::now() + Watch::step(interval);
        native.watch.is_over(done, outage.timed_out.is_some(), interval, now)
    }
}

impl Owner {
    /// A disk failed that QEMU retries.
    pub(super) fn natively_failed(&mut self, id: &DeviceId, error: &BlockIoError, timestamp: Timestamp) {
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let time = micros(timestamp);
        if time <= disk.settled {
            return;
        }
        let age = micros(Timestamp::now()).saturating_sub(time);
        let at = Uptime::now().before(Duration::from_micros(u64::try_from(age).unwrap_or_default()));
        for change in disk.natively_failed(error, at) {
            self.io_changed(id, change);
        }
    }

    /// Which of the disks that QEMU retries have recovered. The VM may stand still: QEMU retries even so.
    pub(super) fn judge_native(&mut self, look: &Look, now: Uptime) {
        let mut recovered = Vec::new();
        let native = self.io.disks.iter_mut().filter(|(_, disk)| disk.io.retry.engine == Engine::Native);
        for (id, disk) in native {
            let Some(seen) = look.disks.get(id) else { continue };
            if disk.has_natively_recovered(seen.done, now) {
                disk.native = None;
                disk.settled = micros(Timestamp::now());
                recovered.extend(disk.io.recovered(now).map(|change| (id.clone(), change)));
            }
        }
        for (id, change) in recovered {
            self.io_changed(&id, change);
        }
    }
}
