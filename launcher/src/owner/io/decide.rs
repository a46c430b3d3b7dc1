//! What is to be done about disks that retry, by how things are: who stopped the VM, who has recovered, who goes where.

use std::collections::BTreeMap;

use devices::DeviceId;
use devices::retry::Engine;
use tokio::time::Instant;
use tracing::{debug, info};

use super::disk::{Disk, Trying, Wish};
use super::hang::Probe;
use super::proxied::Proxy;
use super::{AGAIN, BEAT, EXPLAINED, Finished, IDLE, IoNews, Owner, Phase, QUIET, stops};
use crate::suspend::parking::Seat;
use crate::suspend::turn::{self, DiskLook, Look, Move, Turn};
use crate::suspend::{Uptime, What};

impl Owner {
    /// What is to be done, by how things are.
    pub(super) fn decide(&mut self, look: &Look) {
        self.follow_layout();
        // It may hang since the look began.
        if self.farewell.is_killing() || self.farewell.leave || self.io.hung().is_some() {
            return;
        }
        self.io.put_off = false;
        let now = Uptime::now();
        for (id, disk) in &mut self.io.disks {
            disk.end_drill(&mut self.io.leavings);
            let Some(seen) = look.disks.get(id) else { continue };
            disk.parked = Seat::of_node(&seen.node).is_some();
            if !disk.parked && !disk.is_drilled_on(&seen.node) && !self.io.leavings.contains(&seen.node) {
                (disk.top, disk.size_bytes) = (seen.node.clone(), seen.size_bytes);
            }
        }
        self.judge_native(look, now);
        let proxied: Vec<DeviceId> = self.io.disks.keys().cloned().collect();
        proxied.iter().for_each(|id| self.tend(id));
        let running = look.run == "running";
        debug!(?now, ?look, blamed = ?self.io.blamed, gave_back = self.io.gave_back, "deciding");
        if running {
            (self.io.stuck, self.io.judged) = (false, false);
            if std::mem::take(&mut self.io.interrupted) {
                self.io.keep();
            }
        } else if look.run == "io-error" {
            if !self.blame(look, now) {
                return;
            }
        } else if !self.is_ours(&look.run) {
            // Somebody paused it, or it has not begun: nothing fails meanwhile.
            self.io.not_before = Some(Instant::now() + AGAIN);
            return;
        }
        self.judge(look, now, running);
        self.unplug_due();
        self.ask_before_tries(now);
        self.begin_turn(look, now, running);
    }

    /// Whether a VM that neither runs nor has failed stands still for a reason of ours: a turn was interrupted; or it was reset while it stood still
    /// for an I/O error, which leaves it standing.
    fn is_ours(&self, run: &str) -> bool {
        match run {
            "paused" => self.io.interrupted,
            "prelaunch" => self.io.outages().next().is_some(),
            _ => false,
        }
    }

    /// Finds out which disks stopped the VM; `false` if it was none of ours.
    pub(super) fn blame(&mut self, look: &Look, now: Uptime) -> bool {
        let on_top = |id: &DeviceId, look: &Look| {
            look.disks.get(id).is_some_and(|seen| Seat::of_node(&seen.node).is_none())
        };
        let went_on = self.io.went_on;
        let named = std::mem::take(&mut self.io.blamed).into_iter();
        let mut failed: BTreeMap<DeviceId, What> = named
            .filter(|(id, (_, time))| *time >= went_on && on_top(id, look))
            .map(|(id, (what, _))| (id, what))
            .collect();
        // The places of a former owner gave back what they kept when it died.
        let orphaned =
            look.disks.iter().any(|(id, seen)| self.io.disks.contains_key(id) && self.is_stale(seen));
        let parked = look.disks.values().any(|seen| Seat::of_node(&seen.node).is_some());
        let refused = self.io.proxies().any(|proxy| proxy.parked().is_some());
        let gave_back = std::mem::take(&mut self.io.gave_back) || orphaned || refused;
        if std::mem::replace(&mut self.io.judged, true) && failed.is_empty() {
            return !self.io.stuck;
        }
        if failed.is_empty() && !(gave_back && self.io.explained < EXPLAINED) {
            // QEMU holds events back: those that are being tried are the first to suspect, then all that can stop it.
            let tried = |disk: &Disk| stops(disk) && disk.trying.is_some();
            let any_tried = self.io.disks.values().any(tried);
            let suspects =
                self.io.disks.iter().filter(|(id, disk)| {
                    on_top(id, look) && if any_tried { tried(disk) } else { stops(disk) }
                });
            failed = suspects.map(|(id, _)| (id.clone(), What::default())).collect();
        }
        if failed.is_empty() && self.io.disks.values().any(Disk::pauses_behind_proxy) {
            return true;
        }
        if failed.is_empty() {
            // What is parked may have been given back a moment too late to be told from what it stopped for.
            self.io.explained += 1;
            self.io.stuck = self.io.explained > EXPLAINED || !(gave_back || parked);
            if self.io.stuck {
                info!("the VM stands still for an error of a disk that does not retry");
            }
            return !self.io.stuck;
        }
        self.io.explained = 0;
        for (id, what) in failed {
            let Some(disk) = self.io.disks.get_mut(&id) else { continue };
            // What was not tried since has not failed anew.
            if disk.io.outage.is_some() && disk.trying.is_none() {
                continue;
            }
            (disk.trying, disk.was_reset) = (None, false);
            let change = disk.io.failed(what, now);
            self.io_changed(&id, change);
        }
        true
    }

    /// Which of the disks that are being tried have recovered. A disk that failed has requests waiting, so silence is no recovery, but for one that
    /// was reset with the guest.
    pub(super) fn judge(&mut self, look: &Look, now: Uptime, running: bool) {
        let mut recovered = Vec::new();
        for (id, disk) in &mut self.io.disks {
            let (Some(seen), Some(outage)) = (look.disks.get(id), &disk.io.outage) else { continue };
            let is_home = Seat::of_node(&seen.node).is_none();
            if running && is_home && disk.trying.is_none() && stops(disk) {
                // Somebody let the VM go on.
                disk.trying = Some(Trying { since: now, done: seen.done, look: Instant::now() + QUIET });
            }
            let Some(trying) = &mut disk.trying else { continue };
            let waited = now.since(trying.since);
            let is_quiet = disk.was_reset && outage.timed_out.is_none() && waited >= IDLE;
            if running && is_home && ((waited >= QUIET && seen.done > trying.done) || is_quiet) {
                disk.trying = None;
                recovered.extend(disk.io.recovered(now).map(|change| (id.clone(), change)));
            } else {
                trying.look = Instant::now() + if waited < QUIET { QUIET / 2 } else { QUIET * 2 };
            }
        }
        for (id, change) in recovered {
            self.io_changed(&id, change);
        }
    }

    pub(super) fn unplug_due(&mut self) {
        for id in std::mem::take(&mut self.io.unplug) {
            self.unplug_failed(&id);
        }
    }

    /// Unplugs a disk whose timeout says so: a SCSI disk's requests fail with it; of a virtio-blk disk they fail first, in its own device.
    pub(super) fn unplug_failed(&mut self, id: &DeviceId) {
        let (reply, _) = tokio::sync::oneshot::channel();
        self.detach(&crate::request::Detach { id: id.to_string(), wait_ms: 0, force: true }, None, reply);
    }

    /// Moves disks to where they belong, and lets the VM go on.
    pub(super) fn begin_turn(&mut self, look: &Look, now: Uptime, running: bool) {
        if self.io.proxies().any(Proxy::is_missed) {
            // QEMU would stand still until it is back, which is soon.
            (self.io.put_off, self.io.not_before) = (true, Some(Instant::now() + AGAIN));
            return;
        }
        let mut turn = Turn { stop: running, go: !self.io.wants_pause, ..Turn::default() };
        let mut tried = Vec::new();
        let mut silent = Vec::new();
        let ids: Vec<DeviceId> = self.io.disks.keys().cloned().collect();
        let is_blk: Vec<DeviceId> = ids.iter().filter(|id| self.is_blk(id)).cloned().collect();
        let iothreads: BTreeMap<DeviceId, DeviceId> =
            ids.iter().filter_map(|id| Some((id.clone(), self.scsi_iothread(id)?))).collect();
        let next = self.next_to_try(now);
        for id in ids {
            let (Some(seen), Some(disk)) = (look.disks.get(&id), self.io.disks.get_mut(&id)) else {
                continue;
            };
            // What pauses the VM waits for nobody else who does.
            let joins = disk.io.retry.engine == Engine::Pause && disk.io.is_due(now);
            let may_try = next.as_ref() == Some(&id) || next.is_some() && joins;
            let Wish { seat, tries, waits } = disk.wish(may_try, is_blk.contains(&id));
            turn.go &= !waits;
            if tries {
                tried.push((id.clone(), seen.done));
            }
            let size = disk.size_bytes;
            let (node, add) = match seat {
                Seat::Top => disk.top_now(),
                Seat::Park | Seat::Tiny => {
                    silent.push((id.clone(), seat));
                    let Some(parking) = self.io.parking() else {
                        self.io.not_before = Some(Instant::now() + AGAIN);
                        self.io.renew_nodes();
                        return;
                    };
                    parking.place(&id, seat, size)
                }
            };
            if node != seen.node {
                let iothread = iothreads.get(&id).cloned();
                turn.moves.push(Move { id, node, add, iothread });
            }
        }
        if running && turn.moves.is_empty() {
            return;
        }
        if !running && !turn.go && turn.moves.is_empty() {
            self.io.interrupted = false;
            return;
        }
        self.take_turn(turn, &tried, &silent, look);
    }

    /// The disk that is due for longest. One at a time: who stops the VM then is known without an event.
    pub(super) fn next_to_try(&self, now: Uptime) -> Option<DeviceId> {
        if self.io.tried_alone(now) {
            return None;
        }
        let due = self
            .io
            .disks
            .iter()
            .filter(|(_, disk)| stops(disk) && disk.io.is_due(now) && disk.trying.is_none());
        let due = due.filter(|(_, disk)| disk.has_been_asked());
        due.min_by_key(|(_, disk)| disk.io.outage.as_ref().map(|outage| outage.next))
            .map(|(id, _)| id.clone())
    }

    pub(super) fn take_turn(
        &mut self,
        mut turn: Turn,
        tried: &[(DeviceId, u64)],
        silent: &[(DeviceId, Seat)],
        look: &Look,
    ) {
        self.io.give_back();
        self.io.gave_back = false;
        self.io.judged &= !turn.go;
        for step in &turn.moves {
            if let Some(disk) = self.io.disks.get_mut(&step.id) {
                // Known before the next look: who fails at once on its own node was not given back.
                disk.parked = Seat::of_node(&step.node).is_some();
            }
        }
        let now = Uptime::now();
        for (id, done) in tried {
            if let Some(disk) = self.io.disks.get_mut(id) {
                disk.trying = Some(Trying { since: now, done: *done, look: Instant::now() + QUIET });
                disk.probe = Probe::None;
            }
        }
        if let Some(parking) = &self.io.parking {
            turn.silent = silent.iter().filter_map(|(id, seat)| parking.park(id, *seat)).collect();
        }
        let moved = turn.moves.iter().filter_map(|step| look.disks.get(&step.id));
        turn.idle = moved.filter(|seen| self.is_stale(seen)).map(|seen| seen.node.clone()).collect();
        turn.idle.extend(self.io.leavings.iter().cloned());
        turn.parked = self.io.proxies().filter_map(Proxy::parked).collect();
        self.io.beat = Some(Instant::now() + BEAT);
        self.io.phase = Phase::Turning;
        // An owner that dies in the middle leaves the VM standing still.
        self.io.keep();
        let qmp = self.qmp.clone();
        debug!(?now, ?turn, "moving disks");
        self.jobs.spawn(async move { Finished::Io(IoNews::Turned(turn::take(&qmp, turn).await)) });
    }

    /// The iothread of a SCSI disk's controller: such a disk does its I/O there even while the VM stands still.
    pub(super) fn scsi_iothread(&self, id: &DeviceId) -> Option<DeviceId> {
        let property = |id: &str, name: &str| {
            let frontend = self.layout.device(id)?.spec.frontend.as_ref()?;
            frontend.0.get(name)?.as_str().map(str::to_owned)
        };
        let bus = property(id.as_str(), "bus").filter(|_| !self.is_blk(id))?;
        property(bus.strip_suffix(".0")?, "iothread")?.parse().ok()
    }

    /// Whether a disk stands on a node of a former owner's parking, which nobody serves any more.
    pub(super) fn is_stale(&self, seen: &DiskLook) -> bool {
        Seat::of_node(&seen.node).is_some()
            && self.io.parking.as_ref().is_none_or(|parking| !parking.serves(&seen.node))
    }

    pub(super) fn is_blk(&self, id: &DeviceId) -> bool {
        let placed = self.layout.device(id.as_str());
        let frontend = placed.and_then(|placed| placed.spec.frontend.as_ref());
        frontend.is_some_and(|frontend| frontend.driver().starts_with("virtio-blk"))
    }
}
