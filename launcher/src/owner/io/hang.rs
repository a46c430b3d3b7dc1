//! Disks whose storage hangs: seen on the owner's tick, and from then on nothing is done that drains, which would freeze QEMU for as long.

use std::collections::BTreeMap;
use std::time::Duration;

use devices::retry::Engine;
use devices::{DeviceId, Placed};
use qmp_client::{Qmp, QmpError};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::disk::Disk;
use super::{Finished, Io, IoNews, Owner, Phase};
use crate::owner::not_now;
use crate::request::Failure;
use crate::status::VmState;
use crate::suspend::hang::{Answer, LIMIT, Sight, Turn, probe};
use crate::suspend::parking::Seat;
use crate::suspend::turn::id_in;
use crate::suspend::{Uptime, What};

/// A probe of a disk's storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Probe {
    /// Nobody has asked.
    #[default]
    None,
    /// Asked, and not answered yet.
    Asked,
    /// It worked: the disk itself may be tried.
    Passed,
}

/// What a look at all disks tells.
#[derive(Debug, Default)]
pub(in crate::owner) struct Seen {
    /// Of each, requests done, the node, and whether any are outstanding, if QEMU knows.
    disks: BTreeMap<DeviceId, (u64, String, Option<bool>)>,
    /// Whether the VM stands still for an error.
    is_stopped: bool,
}

/// What a job brings home.
#[derive(Debug)]
pub(in crate::owner) enum HangNews {
    Seen(Result<Seen, QmpError>),
    Answered(DeviceId, Answer),
}

impl Disk {
    /// What counts as progress: an attempt that fails is an answer, too. A proxy knows each request for itself: that others are done is none for one that
    /// is not.
    fn progress(&self) -> u64 {
        if self.io.retry.engine == Engine::Proxy {
            return 0;
        }
        let counters = self.io.counters;
        self.done + counters.suspensions + counters.retries
    }

    /// How long the oldest request of its proxy has been at the storage, where what is kept is not. `None` while there is no proxy that could tell.
    fn proxy_waits(&self) -> Option<Duration> {
        Some(self.proxy.as_ref()?.seen.as_ref()?.waits())
    }

    /// QEMU's own attempts come at their interval: in between, their requests wait and do not hang.
    fn limit(&self) -> Duration {
        let is_native = self.io.retry.engine == Engine::Native && self.io.outage.is_some();
        if is_native { LIMIT + self.io.retry.interval.duration() } else { LIMIT }
    }
}

impl Io {
    /// A disk whose storage hangs.
    pub(in crate::owner) fn hung(&self) -> Option<&DeviceId> {
        self.disks.iter().find(|(_, disk)| disk.hang.hangs()).map(|(id, _)| id)
    }

    /// Why nothing may be done that drains.
    pub(in crate::owner) fn hang_refusal(&self, what: &str) -> Option<Failure> {
        let why =
            format!("{what} while the storage of disk {} hangs: QEMU would freeze with it", self.hung()?);
        Some(not_now(&why, "repair the storage, or `qvirt kill` the VM"))
    }
}

impl Owner {
    /// Looks whether disks hang, beside whatever else happens.
    pub(in crate::owner) fn watch_storage(&mut self) {
        self.follow_layout();
        if self.run != VmState::Running {
            self.io.disks.values_mut().for_each(|disk| disk.hang.rests());
            let hung = self.io.disks.iter().filter(|(_, disk)| disk.hang.hangs());
            for id in hung.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
                // Its requests wait in the device now, whatever its storage does: only that itself can tell, or a proxy.
                if !self.judge_by_proxy(&id) && !self.ask_storage(&id) {
                    self.judge_hang(&id, None);
                }
            }
            return;
        }
        if self.io.disks.is_empty() || self.io.watching {
            return;
        }
        self.io.watching = true;
        let asked = self.io.disks.iter().map(|(id, disk)| (id.clone(), (disk.done, self.queues(id))));
        let (qmp, asked) = (self.qmp.clone(), asked.collect());
        self.jobs.spawn(async move { Finished::Io(IoNews::Hang(HangNews::Seen(see(&qmp, asked).await))) });
    }

    /// Path of the virtio device that has a disk's queues, if this QEMU tells of queues.
    fn queues(&self, id: &DeviceId) -> Option<String> {
        let commands = &self.launch.qemu.commands;
        let tells =
            ["x-query-virtio-status", "x-query-virtio-queue-status"].map(|name| commands.contains(name));
        let frontend = self.layout.device(id.as_str())?.spec.frontend.as_ref()?;
        let device =
            if self.is_blk(id) { id.as_str() } else { frontend.0.get("bus")?.as_str()?.split('.').next()? };
        (tells == [true, true]).then(|| format!("/machine/peripheral/{device}/virtio-backend"))
    }

    pub(super) fn on_hang_news(&mut self, news: HangNews) {
        match news {
            HangNews::Seen(Ok(seen)) => {
                self.io.watching = false;
                self.saw_run(seen.is_stopped);
                seen.disks.into_iter().for_each(|(id, seen)| self.saw(&id, seen));
            }
            HangNews::Seen(Err(error)) => {
                self.io.watching = false;
                debug!(%error, "QEMU did not say whether disks hang");
            }
            HangNews::Answered(id, answer) => self.answered(&id, answer),
        }
    }

    /// A stop that is still there at the next look, and that no event has told of meanwhile: the event is lost, and not just on its way.
    fn saw_run(&mut self, is_stopped: bool) {
        let is_untold = is_stopped && self.run == VmState::Running && self.io.phase == Phase::Idle;
        if std::mem::replace(&mut self.io.saw_untold_stop, is_untold) && is_untold {
            self.io_stopped();
            self.look();
        }
    }

    fn saw(&mut self, id: &DeviceId, (done, node, has_requests): (u64, String, Option<bool>)) {
        let is_blk = self.is_blk(id);
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        disk.done = done;
        if self.judge_by_proxy(id) {
            return;
        }
        let Some(disk) = self.io.disks.get(id) else { return };
        let is_home = Seat::of_node(&node).is_none();
        let is_suspect = is_home && disk.hang.is_still(disk.progress()) && has_requests != Some(false);
        // The queues of a SCSI disk are those of all disks of its controller: its own storage has to be asked.
        let waits = is_suspect && is_blk && has_requests == Some(true);
        if is_suspect && !waits {
            self.ask_storage(id);
        }
        let Some(disk) = self.io.disks.get(id) else { return };
        let is_busy = disk.probe == Probe::Asked || waits;
        self.judge_hang(id, is_busy.then_some(Duration::ZERO));
    }

    /// Whether a disk has a proxy, which alone can judge: it knows its requests. While there is none to ask, what was known stands.
    fn judge_by_proxy(&mut self, id: &DeviceId) -> bool {
        let Some(disk) = self.io.disks.get(id) else { return true };
        let (has_proxy, waits) = (disk.io.retry.engine == Engine::Proxy, disk.proxy_waits());
        if let Some(age) = waits {
            self.judge_hang(id, Some(age).filter(|age| *age > LIMIT));
        }
        has_proxy
    }

    /// `busy_for`: for how long at least a request has been outstanding, if one is.
    fn judge_hang(&mut self, id: &DeviceId, busy_for: Option<Duration>) {
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let sight = Sight { progress: disk.progress(), busy_for, limit: disk.limit() };
        match disk.hang.sees(sight, Uptime::now()) {
            None => return,
            Some(Turn::Began) => {
                disk.io.counters.hangs += 1;
                warn!(device = %id, "its storage hangs: requests are outstanding, and none is done");
                self.announce("QVIRT_IO_HUNG", self.about_hang(id, json!({})));
            }
            Some(Turn::Ended(lasted)) => {
                warn!(device = %id, seconds = lasted.as_secs_f32(), "its storage answers again");
                let lasted = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
                self.announce("QVIRT_IO_ANSWERS", self.about_hang(id, json!({"lasted-ms": lasted})));
                self.look_at_io();
                self.look();
            }
        }
        self.io.keep();
    }

    fn about_hang(&self, id: &DeviceId, more: Value) -> Value {
        let placed = self.layout.device(id.as_str());
        let mut data = json!({
            "device": id.as_str(), "label": placed.and_then(Placed::label).map(ToString::to_string),
            "path": placed.and_then(Placed::backing), "engine": self.io.retry(id).map(|retry| retry.engine),
        });
        if let (Some(data), Value::Object(more)) = (data.as_object_mut(), more) {
            data.extend(more);
        }
        data
    }

    /// Asks the storage of a disk whether it works, at most once at a time. `false` if it has no file to ask.
    pub(super) fn ask_storage(&mut self, id: &DeviceId) -> bool {
        let image = self.layout.device(id.as_str()).and_then(|placed| placed.backing());
        let (Some(disk), Some(image)) = (self.io.disks.get_mut(id), image) else { return false };
        if disk.probe != Probe::Asked {
            disk.probe = Probe::Asked;
            let id = id.clone();
            self.jobs.spawn(async move {
                let answer = probe(&image).await;
                Finished::Io(IoNews::Hang(HangNews::Answered(id, answer)))
            });
        }
        true
    }

    /// The storage of a disk has answered, at last or at once.
    fn answered(&mut self, id: &DeviceId, answer: Answer) {
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        disk.probe = Probe::None;
        let is_waited_for = disk.parked && disk.io.is_due(Uptime::now());
        self.judge_hang(id, None);
        let Some(disk) = self.io.disks.get_mut(id).filter(|_| is_waited_for) else { return };
        match answer {
            Answer::Fine => disk.probe = Probe::Passed,
            Answer::Failed(cause) => {
                let operation = disk.io.outage.as_ref().map(|outage| outage.what.operation.clone());
                let what = What { operation: operation.unwrap_or_default(), cause, ..What::default() };
                let change = disk.io.failed(what, Uptime::now());
                self.io_changed(id, change);
            }
        }
        self.look_at_io();
    }

    /// Which of the parked disks that are due may be tried: their storage is asked first, which spares the guest a pause if that fails.
    pub(super) fn ask_before_tries(&mut self, now: Uptime) {
        let due = self.io.disks.iter().filter(|(_, disk)| disk.parked && disk.io.is_due(now));
        let due: Vec<DeviceId> =
            due.filter(|(_, disk)| disk.probe == Probe::None).map(|(id, _)| id.clone()).collect();
        for id in due {
            if !self.ask_storage(&id)
                && let Some(disk) = self.io.disks.get_mut(&id)
            {
                disk.probe = Probe::Passed;
            }
        }
    }
}

/// Asks QEMU: statistics of all disks, and the queues of those that have done nothing since. Drains nothing.
async fn see(qmp: &Qmp, asked: BTreeMap<DeviceId, (u64, Option<String>)>) -> Result<Seen, QmpError> {
    let mut seen = Seen::default();
    for device in qmp.call("query-blockstats", Value::Null).await?.as_array().into_iter().flatten() {
        let Some(id) = device["qdev"].as_str().and_then(id_in) else { continue };
        let Some((before, queues)) = asked.get(&id) else { continue };
        let done = crate::suspend::turn::done(&device["stats"]);
        let has_requests = match queues {
            _ if done != *before => None,
            Some(path) => has_requests(qmp, path).await?,
            None => None,
        };
        let node = device["node-name"].as_str().unwrap_or_default().to_owned();
        seen.disks.insert(id, (done, node, has_requests));
    }
    // Last: what it says is to be news.
    seen.is_stopped = qmp.call("query-status", Value::Null).await?["status"] == "io-error";
    Ok(seen)
}

/// Whether any queue of a device has requests that are not done; `None` if QEMU does not say.
async fn has_requests(qmp: &Qmp, path: &str) -> Result<Option<bool>, QmpError> {
    let ask = async |command: &str, arguments: Value| match qmp.call(command, arguments).await {
        Err(QmpError::Refused(_)) => Ok(Value::Null),
        answer => answer,
    };
    let Some(queues) = ask("x-query-virtio-status", json!({"path": path})).await?["num-vqs"].as_u64() else {
        return Ok(None);
    };
    for queue in 0..queues {
        let status = ask("x-query-virtio-queue-status", json!({"path": path, "queue": queue})).await?;
        if status["inuse"].as_u64().is_some_and(|requests| requests > 0) {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}
