//! What people are told of disks that retry, and what they may ask for.

use std::time::Duration;

use devices::retry::{AtTimeout, Engine};
use devices::{DeviceConfig, DeviceId, Placed};
use serde_json::{Value, json};
use tracing::{debug, info, warn};

use super::disk::Drill;
use super::proxied::{Proxy, times};
use super::{Io, Owner, TELL};
use crate::owner::{Reply, not_now};
use crate::request::{Class, Drill as Wanted, Failure, IoSet};
use crate::status::{IoOutage, IoState, IoStatus};
use crate::suspend::state::unix_ms;
use crate::suspend::{Change, Outage, Uptime};

impl Io {
    /// Whether the storage of a disk is out of order.
    pub(in crate::owner) fn is_suspended(&self, id: &DeviceId) -> bool {
        self.status(id).is_some_and(|io| io.state != IoState::Ok)
    }

    /// Whether the storage of any disk is.
    pub(in crate::owner) fn any_suspended(&self) -> bool {
        self.disks.keys().any(|id| self.is_suspended(id))
    }

    /// How a disk is, for the status.
    pub(in crate::owner) fn status(&self, id: &DeviceId) -> Option<IoStatus> {
        let disk = self.disks.get(id)?;
        let held = match &disk.proxy {
            Some(proxy) => proxy.held(),
            None => self.parking.as_ref().map_or(0, |parking| parking.held(id)),
        };
        let state = match &disk.io.outage {
            _ if disk.hang.hangs() => IoState::Hung,
            None => IoState::Ok,
            Some(Outage { timed_out: Some(_), .. }) => IoState::TimedOut,
            Some(_) => IoState::Suspended,
        };
        let outage = disk.io.outage.clone().map(|outage| IoOutage {
            since_unix_ms: outage.since_unix_ms,
            attempts: outage.attempts,
            operation: outage.what.operation,
            cause: outage.what.cause,
            nospace: outage.what.nospace,
            at_timeout: outage.timed_out,
        });
        let node = format!("{id}-drill-");
        let drilled = disk.drill.is_some() || self.leavings.iter().any(|leaving| leaving.starts_with(&node));
        Some(IoStatus { state, held, outage, drilled, counters: disk.io.counters })
    }
}

impl Owner {
    /// Tries the storage of a disk now.
    pub(in crate::owner) fn retry_io(&mut self, name: &str, reply: Reply) {
        let Some((id, reply)) = self.suspended(name, reply) else { return };
        let Some(disk) = self.io.disks.get_mut(&id) else { return };
        if disk.io.retry.engine == Engine::Native {
            let why = format!("disk {id} is retried by QEMU itself");
            let _ = reply.send(Err(not_now(&why, "it does so at each interval, and cannot be told to")));
            return;
        }
        if disk.io.outage.as_ref().is_some_and(|outage| outage.timed_out == Some(AtTimeout::Pause)) {
            let next = format!("`qvirt resume {}` tries its storage", self.launch.vm);
            let _ = reply.send(Err(not_now(&format!("the timeout of disk {id} has paused the VM"), &next)));
            return;
        }
        if let Some(proxy) = &disk.proxy {
            proxy.line.teller().tell(json!({"command": "retry"}));
        }
        disk.io.hurry(Uptime::now());
        self.look_at_io();
        let _ = reply.send(Ok(json!({})));
    }

    /// Reports the error of a disk to the guest now, as at a timeout.
    pub(in crate::owner) fn fail_io(&mut self, name: &str, reply: Reply) {
        let Some((id, reply)) = self.suspended(name, reply) else { return };
        let is_blk = self.is_blk(&id);
        let Some(disk) = self.io.disks.get_mut(&id) else { return };
        let why = match disk.io.retry.engine {
            Engine::Hold if is_blk => None,
            Engine::Hold => Some(
                "a SCSI disk's held requests fail only with the disk: `qvirt io set` its at_timeout to unplug, or use engine = \"proxy\"",
            ),
            Engine::Pause => {
                Some("its requests wait in the paused device: `qvirt kill` the VM, or repair the storage")
            }
            Engine::Native => Some("QEMU itself retries: it reports at its timeout"),
            Engine::Proxy => None,
        };
        if let Some(why) = why {
            let _ = reply.send(Err(not_now(&format!("the error of disk {id} cannot be reported now"), why)));
            return;
        }
        match disk.io.give_up() {
            Some(change) => {
                disk.trying = None;
                self.io_changed(&id, change);
                self.tend(&id);
                self.look_at_io();
                let _ = reply.send(Ok(json!({})));
            }
            None => {
                // One layer of it has, and another may not have.
                let has_late = |proxy: &&Proxy| proxy.seen.as_ref().is_some_and(|seen| seen.timed_out);
                let waiting = disk.proxy.as_ref().filter(has_late).filter(|proxy| proxy.held() > 0);
                let _ = reply.send(match waiting {
                    Some(proxy) => {
                        proxy.line.teller().tell(json!({"command": "fail"}));
                        Ok(json!({}))
                    }
                    None => Err(not_now(&format!("disk {id} has timed out"), "the guest was told already")),
                });
            }
        }
    }

    /// Changes how a disk retries from now on.
    pub(in crate::owner) fn set_io(&mut self, set: &IoSet, reply: Reply) {
        let Some((id, reply)) = self.retrying_disk(&set.id, reply) else { return };
        let vm = self.launch.vm.clone();
        let Some(DeviceConfig::Disk(config)) =
            self.layout.device(id.as_str()).map(|placed| placed.config.clone())
        else {
            return;
        };
        let Some(disk) = self.io.disks.get_mut(&id) else { return };
        let retry = &disk.io.retry;
        if retry.engine == Engine::Native {
            let why = format!(
                "QEMU itself retries for disk {id}, and its device takes interval and timeout only when it is made: \
                 change the config, then restart VM {vm} or detach and attach the disk"
            );
            let _ = reply.send(Err(Failure::new(Class::Refused, why)));
            return;
        }
        let mut wanted = retry.clone();
        wanted.interval = set.interval.unwrap_or(wanted.interval);
        wanted.timeout = set.timeout.map_or(wanted.timeout, |time| (time.as_millis() > 0).then_some(time));
        wanted.at_timeout = set.at_timeout.unwrap_or(wanted.at_timeout);
        if let Err(why) = wanted.check_change(&config, set.at_timeout) {
            let _ = reply.send(Err(Failure::new(Class::Refused, format!("disk {id}: {why}"))));
            return;
        }
        disk.io.set(wanted, Uptime::now());
        if let Some(proxy) = &disk.proxy {
            proxy.line.teller().tell(times(&disk.io.retry));
            // Its clock may say otherwise by now.
            disk.io.outage.iter_mut().for_each(|outage| outage.timed_out = None);
        }
        let retry = &disk.io.retry;
        info!(device = %id, %retry, "retries otherwise from now on");
        self.io.keep();
        let _ = reply.send(Ok(json!({})));
    }

    /// Makes a disk fail for a while, by a node of QEMU's that returns errors.
    pub(in crate::owner) fn drill(&mut self, wanted: &Wanted, reply: Reply) {
        let Some((id, reply)) = self.retrying_disk(&wanted.id, reply) else { return };
        let number = self.io.drills + 1;
        let is_shrinking = self.is_shrinking;
        let Some(disk) = self.io.disks.get_mut(&id) else { return };
        let refusal = match () {
            // QEMU lets no other node write beside a job that does.
            () if is_shrinking => {
                Some("layers are being merged or pulled: `qvirt jobs` shows how far that is")
            }
            () if disk.drill.is_some() => Some("a drill of it is under way: wait for its end"),
            () if disk.proxy.as_ref().is_some_and(|proxy| proxy.seen.is_none()) => {
                Some("its io-proxy is being started: try again in a moment")
            }
            () if disk.io.outage.is_some() => {
                Some("its storage fails already: a drill is for one that works")
            }
            () => None,
        };
        if let Some(why) = refusal {
            let _ = reply.send(Err(not_now(&format!("no drill of disk {id} now"), why)));
            return;
        }
        self.io.drills = number;
        let until = Uptime::now().after(Duration::from_millis(wanted.fail_for_ms));
        disk.drill = Some(match &disk.proxy {
            Some(proxy) => {
                let Wanted { reads, writes, flushes, .. } = wanted;
                proxy.line.teller().tell(json!({
                    "command": "fault", "reads": reads, "writes": writes, "flushes": flushes, "on": true,
                }));
                Drill { node: None, add: None, until }
            }
            None => failing_node(&id, number, &disk.top, wanted, until),
        });
        warn!(device = %id, milliseconds = wanted.fail_for_ms, "a drill: its storage fails on purpose");
        self.io.keep();
        self.look_at_io();
        let _ = reply.send(Ok(json!({})));
    }

    /// The disk of a name, if it retries; otherwise the reply is used up.
    fn retrying_disk(&mut self, name: &str, reply: Reply) -> Option<(DeviceId, Reply)> {
        self.follow_layout();
        let id = match self.layout.expect_device(name) {
            Ok(placed) => placed.id.clone(),
            Err(refusal) => {
                let _ = reply.send(Err(Failure::of(Class::DeviceNotFound, &refusal)));
                return None;
            }
        };
        if self.io.disks.contains_key(&id) {
            return Some((id, reply));
        }
        let next = "write on_error = { read = \"retry\", write = \"retry\" } for it";
        let _ = reply.send(Err(not_now(&format!("device {id} is no disk that retries"), next)));
        None
    }

    /// The same, if it is suspended as well.
    fn suspended(&mut self, name: &str, reply: Reply) -> Option<(DeviceId, Reply)> {
        let (id, reply) = self.retrying_disk(name, reply)?;
        if self.io.disks.get(&id).is_some_and(|disk| disk.io.outage.is_some()) {
            return Some((id, reply));
        }
        let next = format!("`qvirt io status {}` shows it", self.launch.vm);
        let _ = reply.send(Err(not_now(&format!("the I/O of disk {id} is not suspended"), &next)));
        None
    }

    /// Tells people, and the next owner.
    pub(super) fn io_changed(&mut self, id: &DeviceId, change: Change) {
        let now = Uptime::now();
        let placed = self.layout.device(id.as_str());
        let (top, layers) =
            (placed.and_then(Placed::backing), placed.map(Placed::layers).unwrap_or_default());
        let label = placed.and_then(Placed::label).map(ToString::to_string);
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let is_news =
            !matches!(change, Change::Retried(_)) || disk.told.is_none_or(|told| now.since(told) >= TELL);
        if !is_news {
            return;
        }
        disk.told = Some(now);
        let (name, outage, more) = match &change {
            Change::Suspended(outage) => ("QVIRT_IO_SUSPENDED", outage, json!({})),
            Change::Retried(outage) => ("QVIRT_IO_RETRY", outage, json!({})),
            Change::TimedOut(outage, action) => ("QVIRT_IO_TIMED_OUT", outage, json!({"action": action})),
            Change::Recovered(outage, lasted) => (
                "QVIRT_IO_RECOVERED",
                outage,
                json!({"lasted-ms": u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX)}),
            ),
        };
        let below = layers.get(outage.what.layer).filter(|_| outage.what.layer > 0);
        // The uppermost one as the config has it.
        let path = below.map(|layer| layer.path.clone()).or(top);
        let mut data = json!({
            "device": id.as_str(), "label": label, "path": path, "engine": disk.io.retry.engine, "operation": outage.what.operation,
            "cause": outage.what.cause, "nospace": outage.what.nospace, "since-unix-ms": outage.since_unix_ms,
            "for-ms": unix_ms().saturating_sub(outage.since_unix_ms), "attempts": outage.attempts,
        });
        if let (Some(data), Value::Object(more)) = (data.as_object_mut(), more) {
            data.extend(more);
        }
        if let Change::TimedOut(_, AtTimeout::Unplug) = change {
            self.io.unplug.push(id.clone());
        }
        log(id, &change);
        self.announce(name, data);
        self.io.keep();
    }
}

/// What a drill makes of a request.
const EIO: i32 = 5;

/// A node over a disk's own that returns errors.
fn failing_node(id: &DeviceId, number: u32, top: &str, wanted: &Wanted, until: Uptime) -> Drill {
    let node = format!("{id}-drill-{number}");
    let kinds = [("read", wanted.reads), ("write", wanted.writes), ("flush", wanted.flushes)];
    let rules = kinds
        .iter()
        .filter(|(_, wanted)| *wanted)
        .map(|(kind, _)| json!({"event": "none", "iotype": kind, "errno": EIO, "once": false}));
    let add = json!({
        "driver": "blkdebug", "node-name": node, "image": top, "inject-error": rules.collect::<Vec<_>>(),
    });
    Drill { node: Some(node), add: Some(add), until }
}

/// A word of an event of QEMU's, which may have held it back.
fn known(word: &str) -> Option<&str> {
    (!word.is_empty()).then_some(word)
}

/// All at one level: who reads that the I/O is held is to read that it goes on.
fn log(id: &DeviceId, change: &Change) {
    let device = id.as_str();
    match change {
        Change::Suspended(o) => {
            let (operation, cause) = (known(&o.what.operation), known(&o.what.cause));
            warn!(device, operation, cause, "its storage fails: its I/O is held");
        }
        // Nothing has changed.
        Change::Retried(o) => debug!(device, attempts = o.attempts, "its storage still fails"),
        Change::TimedOut(o, action) => {
            warn!(device, attempts = o.attempts, %action, "its storage failed for longer than the timeout");
        }
        Change::Recovered(o, lasted) => {
            let seconds = lasted.as_secs_f32();
            warn!(device, attempts = o.attempts, seconds, "its storage works again: its I/O goes on");
        }
    }
}
