//! Attach and detach, as the owner sees them: plan, hand the work to a job, keep or drop what came of it.
//!
//! A device that was asked to leave has a [`Departure`]. It ends when QEMU says the device is gone (by event, or when asked), or when
//! somebody refuses; until then the seat is taken, also after the owner was replaced. While a client waits, the guest is asked again now
//! and then: a request made while it boots is lost.

use std::time::Duration;

use devices::host::HostFacts;
use devices::{DeviceConfig, DeviceId, Moment, Placed, plan};
use qmp_client::QmpError;
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{info, warn};

use super::media::Changed;
use super::shrink::{Shrink, Shrunk};
use super::snapshot::Taken;
use super::{Finished, Owner, Reply, not_now};
use crate::launch::images;
use crate::record::{Entry, Stage};
use crate::request::{
    Attach, Attached, BlockResize, Class, Detach, Detached, Failure, Media, SnapshotCreate,
};
use crate::status::VmState;
use crate::work::merge::Shortening;
use crate::work::{Asked, StepError, WorkError, Workshop, dry_run};
use crate::{quirks, users};

/// Work that waits for the workshop, or for what must be known first.
#[derive(Debug)]
pub(super) enum Job {
    /// Look at what a device to attach needs of the host; storage may hang, so not in the owner's task.
    Facts(Box<Attach>, Reply),
    /// Plan a device and make it.
    Attach(Box<Attach>, HostFacts, Reply),
    /// Change the medium of a drive.
    Media(Media, Reply),
    /// Take a snapshot.
    Snapshot(SnapshotCreate, Reply),
    /// Forget snapshots, and shorten chains.
    Shrink(Shrink, Reply),
    /// Give a disk another size.
    Resize(BlockResize, Reply),
    /// Go on with what a former owner began.
    Resume(Box<Shortening>),
    /// Ask a device to leave.
    Ask(DeviceId),
    /// Clear up behind a device that is gone.
    Clear(DeviceId),
}

/// What came of a job.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Devices were made, or not.
    Attached(Vec<Placed>, Result<(), WorkError>, Reply),
    /// A drive has another medium, or not.
    Media(Box<Changed>),
    /// A snapshot was taken, or not.
    Snapshot(Box<Taken>),
    /// Chains are shorter, or not.
    Shrunk(Box<Shrunk>),
    /// A disk has another size, or not.
    Resized(Result<Value, Failure>, Reply),
    /// A device was asked to leave.
    Asked(DeviceId, Result<Asked, StepError>),
    /// A device's remains are gone, or not yet.
    Cleared(DeviceId, Result<(), StepError>),
}

/// A device on its way out.
#[derive(Debug)]
pub(super) struct Departure {
    since: Instant,
    ask_again: Instant,
    /// Whether it was asked again with nobody waiting.
    reminded: bool,
    waiting: Vec<(Instant, Reply)>,
    /// Whether a job to clear up is queued or at work.
    pub(super) clearing: bool,
    /// What was last heard.
    heard: String,
    /// What may be lost with it.
    warning: Option<String>,
}

/// How long before the guest is asked again. ACPI takes it at once; native PCIe hot-plug needs more than five seconds and says so until then.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// How long before a guest is reminded once more of a device that nobody waits for. The first time comes after [`ASK_AGAIN`]: what a new owner
/// asks at once is no news to QEMU within a second of the former owner's asking, and that may have been lost.
const REMIND: Duration = Duration::from_secs(30);

impl Departure {
    pub(super) fn new() -> Departure {
        let now = Instant::now();
        let heard = "the guest has not answered yet".to_owned();
        Departure {
            since: now,
            ask_again: now + ASK_AGAIN,
            reminded: false,
            waiting: Vec::new(),
            clearing: false,
            heard,
            warning: None,
        }
    }
}

impl Owner {
    /// Begins the next piece of work, if nobody is at work.
    pub(super) fn start_next(&mut self) {
        // What waits may drain, and QEMU would freeze while the storage of a disk hangs.
        while self.shop.is_some() && !self.farewell.leave && self.io.hung().is_none() {
            let Some(job) = self.queue.pop_front() else { return };
            match job {
                Job::Facts(attach, reply) => self.gather_facts(attach, reply),
                Job::Attach(attach, facts, reply) => self.attach(*attach, &facts, reply),
                Job::Media(media, reply) => self.begin_media(media, reply),
                Job::Snapshot(wish, reply) => self.begin_snapshot(wish, reply),
                Job::Shrink(wish, reply) => self.begin_shrink(wish, reply),
                Job::Resize(wish, reply) => self.resize(wish, reply),
                Job::Resume(shortening) => self.resume(*shortening),
                Job::Ask(id) => self.work(id, |mut shop, placed| async move {
                    let asked = shop.detach(&placed).await;
                    (shop, Outcome::Asked(placed.id, asked))
                }),
                Job::Clear(id) => {
                    let (stand_ins, line) = self.stand_ins(&id);
                    // The last writes still go through its proxy, which is not to be started anew from then on.
                    let let_go = async move {
                        if let Some(line) = line {
                            line.end().await;
                        }
                    };
                    self.work(id, |mut shop, placed| async move {
                        let cleared = shop.clear(&placed, stand_ins, let_go).await;
                        (shop, Outcome::Cleared(placed.id, cleared))
                    });
                }
            }
        }
    }

    /// Hands the workshop to a job for a device that still is one of ours.
    fn work<F>(&mut self, id: DeviceId, job: impl FnOnce(Box<Workshop>, Placed) -> F)
    where
        F: Future<Output = (Box<Workshop>, Outcome)> + Send + 'static,
    {
        let Some(placed) = self.layout.device(id.as_str()).cloned() else { return };
        let Some(shop) = self.shop.take() else { return };
        let job = job(shop, placed);
        self.jobs.spawn(async move {
            let (shop, outcome) = job.await;
            Finished::Work(shop, outcome)
        });
    }

    fn attach(&mut self, attach: Attach, facts: &HostFacts, reply: Reply) {
        if self.farewell.is_ending() {
            let _ = reply
                .send(Err(not_now("the VM is shutting down", "attach to its config with --config instead")));
            return;
        }
        if let Some(id) = attach.device.id().filter(|id| self.departures.contains_key(id)) {
            let refusal = devices::Refusal::Busy { id: id.clone(), state: "leaving" };
            let _ = reply.send(Err(Failure::of(Class::Refused, &refusal)));
            return;
        }
        let planned = match plan(&attach.device, &self.layout, facts, &self.launch.qemu, Moment::Hot) {
            Ok(planned) => planned,
            Err(refusal) => {
                let _ = reply.send(Err(Failure::of(Class::Refused, &refusal)));
                return;
            }
        };
        if attach.dry_run {
            let commands = dry_run(&planned.parts);
            let _ = reply.send(Ok(attached(&planned.parts, commands)));
            return;
        }
        let Some(mut shop) = self.shop.take() else { return };
        self.layout = planned.layout;
        self.outdated = true;
        self.stages.extend(planned.parts.iter().map(|part| (part.id.clone(), Stage::Arriving)));
        self.jobs.spawn(async move {
            let outcome = shop.attach(&planned.parts).await;
            Finished::Work(shop, Outcome::Attached(planned.parts, outcome, reply))
        });
    }

    /// Asks a device to leave.
    pub(super) fn detach(&mut self, detach: &Detach, warning: Option<String>, reply: Reply) {
        let placed = match self.layout.expect_device(&detach.id) {
            Ok(placed) => placed.clone(),
            Err(refusal) => {
                let _ = reply.send(Err(Failure::of(Class::DeviceNotFound, &refusal)));
                return;
            }
        };
        let deadline = Instant::now() + Duration::from_millis(detach.wait_ms);
        if let Some(departure) = self.departures.get_mut(&placed.id) {
            departure.waiting.push((deadline, reply));
            departure.ask_again = Instant::now();
            return;
        }
        if self.stages.get(&placed.id) == Some(&Stage::Arriving) {
            let refusal = devices::Refusal::Busy { id: placed.id, state: "being plugged in" };
            let _ = reply.send(Err(Failure::of(Class::Refused, &refusal)));
            return;
        }
        if let Err(refusal) = self.layout.can_leave(&placed) {
            let _ = reply.send(Err(Failure::of(Class::Refused, &refusal)));
            return;
        }
        // What came with it leaves with it, and nobody waits for that.
        let present = |other: &&Placed| !self.departures.contains_key(&other.id);
        let companions: Vec<Placed> = self.layout.companions(&placed).filter(present).cloned().collect();
        companions.iter().for_each(|other| self.depart(other, Departure::new()));
        let mut departure = Departure::new();
        departure.waiting.push((deadline, reply));
        departure.warning = warning;
        self.depart(&placed, departure);
    }

    fn depart(&mut self, placed: &Placed, mut departure: Departure) {
        let id = placed.id.clone();
        self.layout.topology_mut().leaving(&id);
        self.stages.insert(id.clone(), Stage::Leaving);
        let has_frontend = placed.spec.frontend.is_some();
        departure.clearing = !has_frontend;
        self.departures.insert(id.clone(), departure);
        self.tend(&id);
        self.queue.push_back(if has_frontend { Job::Ask(id) } else { Job::Clear(id) });
    }

    /// Takes the workshop back, and what came of the work.
    pub(super) fn on_outcome(&mut self, mut shop: Box<Workshop>, outcome: Outcome) {
        // What happened while the job was at work comes after what it wrote itself.
        self.unnoted.drain(..).for_each(|entry| shop.note(&entry));
        self.shop = Some(shop);
        match outcome {
            Outcome::Attached(parts, Ok(()), reply) => self.arrived(&parts, reply),
            Outcome::Attached(parts, Err(error), reply) => self.not_arrived(&parts, &error, reply),
            Outcome::Media(changed) => self.on_changed(*changed),
            Outcome::Snapshot(taken) => self.on_taken(*taken),
            Outcome::Shrunk(shrunk) => self.on_shrunk(*shrunk),
            Outcome::Resized(outcome, reply) => {
                self.look();
                let _ = reply.send(outcome);
            }
            Outcome::Asked(id, asked) => self.on_asked(&id, asked),
            Outcome::Cleared(id, Ok(())) => self.gone(&id),
            Outcome::Cleared(id, Err(error)) => {
                let error = crate::request::chain(&error);
                warn!(device = %id, error, "could not clear up behind the device; trying again");
                if let Some(departure) = self.departures.get_mut(&id) {
                    departure.clearing = false;
                    departure.heard =
                        format!("the guest let go of it, but QEMU or the host did not: {error}");
                }
            }
        }
    }

    fn arrived(&mut self, parts: &[Placed], reply: Reply) {
        // A console's pty and a disk's capacity are known only now.
        let mut ask =
            parts.iter().any(|part| matches!(part.config, DeviceConfig::Serial(_) | DeviceConfig::Disk(_)));
        self.outdated = true;
        for part in parts {
            info!(device = %part.id, address = ?part.address.as_ref().map(ToString::to_string), "attached");
            self.stages.insert(part.id.clone(), Stage::Present);
            self.announce(
                "QVIRT_DEVICE_ATTACHED",
                json!({"device": part.id.as_str(), "kind": part.config.table()}),
            );
            // The guest may have thrown it out meanwhile.
            ask |= self.early.remove(&part.id);
        }
        self.follow_layout();
        if ask {
            self.look();
        }
        let _ = reply.send(Ok(attached(parts, Vec::new())));
    }

    fn not_arrived(&mut self, parts: &[Placed], error: &WorkError, reply: Reply) {
        for part in parts {
            if error.leaving.contains(&part.id) {
                self.layout.topology_mut().leaving(&part.id);
                self.stages.insert(part.id.clone(), Stage::Leaving);
                self.departures.insert(part.id.clone(), Departure::new());
                if self.early.remove(&part.id) {
                    self.deleted(&part.id);
                }
            } else {
                self.forget(&part.id);
            }
        }
        let mut failure = if is_open(&error.source) {
            Failure::of(Class::Pending, error)
        } else if is_refusal(&error.source) {
            Failure::new(Class::Refused, format!("{}: {}", error.id, crate::request::chain(&error.source)))
        } else {
            Failure::of(Class::Generic, error)
        };
        if quirks::is_locked(&failure.desc) {
            let images: Vec<String> = images(parts).map(str::to_owned).collect();
            // Looking at the open files of all processes takes long where storage hangs.
            tokio::task::spawn_blocking(move || {
                failure.desc =
                    format!("{}; {}", failure.desc, users::explain(images.iter().map(String::as_str)));
                reply.send(Err(failure))
            });
        } else {
            let _ = reply.send(Err(failure));
        }
        self.look();
    }

    fn on_asked(&mut self, id: &DeviceId, asked: Result<Asked, StepError>) {
        match asked {
            Ok(Asked::Waiting) => {}
            Ok(Asked::Busy(heard)) => {
                if let Some(departure) = self.departures.get_mut(id) {
                    departure.heard = heard;
                }
            }
            Ok(Asked::Gone) => self.deleted(id),
            Ok(Asked::Refused(reason)) => self.stays(id, reason),
            Err(error) => self.stays(id, crate::request::chain(&error)),
        }
    }

    /// The guest or QEMU refused: the device is as it was.
    pub(super) fn stays(&mut self, id: &DeviceId, reason: String) {
        let Some(departure) = self.departures.remove(id) else { return };
        warn!(device = %id, reason, "the device stays");
        self.layout.topology_mut().stays(id);
        self.stages.insert(id.clone(), Stage::Present);
        self.note(Entry::Stage { id: id.clone(), stage: Stage::Present });
        self.announce("QVIRT_DEVICE_STAYS", json!({"device": id.as_str(), "reason": reason}));
        let refused = Detached::Refused { id: id.to_string(), reason };
        answer_all(departure, &refused);
    }

    /// Journals what has happened, now or when the job at work has brought the journal home.
    fn note(&mut self, entry: Entry) {
        match &mut self.shop {
            Some(shop) => shop.note(&entry),
            None => self.unnoted.push(entry),
        }
    }

    fn gone(&mut self, id: &DeviceId) {
        info!(device = %id, "detached");
        let departure = self.departures.remove(id);
        self.forget(id);
        self.announce("QVIRT_DEVICE_DETACHED", json!({"device": id.as_str()}));
        if let Some(mut departure) = departure {
            let warning = departure.warning.take();
            answer_all(departure, &Detached::Removed { id: id.to_string(), warning });
        }
        self.dismiss_unused();
    }

    /// A controller that was made for other devices leaves with the last of them. Only a guest that runs can let go of it: otherwise it
    /// stays, and serves the next device.
    pub(super) fn dismiss_unused(&mut self) {
        if self.run != VmState::Running {
            return;
        }
        let unused = |d: &&Placed| {
            d.on_demand && self.stages.get(&d.id) == Some(&Stage::Present) && self.layout.can_leave(d).is_ok()
        };
        let unused: Vec<DeviceId> =
            self.layout.devices().iter().filter(unused).map(|d| d.id.clone()).collect();
        for id in unused {
            self.layout.topology_mut().leaving(&id);
            self.stages.insert(id.clone(), Stage::Leaving);
            self.departures.insert(id.clone(), Departure::new());
            self.queue.push_back(Job::Ask(id));
        }
    }

    fn forget(&mut self, id: &DeviceId) {
        if let Some(placed) = self.layout.device(id.as_str()) {
            self.ptys.remove(&placed.id.chardev());
        }
        self.layout.remove(id);
        self.stages.remove(id);
        self.faults.remove(id);
        self.forget_stand_ins(id);
        self.sizes.remove(id);
        self.usb.forget(id);
        self.early.remove(id);
    }

    /// Asks again, now and then, for devices that nobody waits for any more: what was asked of a guest that booted is lost.
    pub(super) fn remind(&mut self) {
        if self.run != VmState::Running {
            return;
        }
        let now = Instant::now();
        let forgotten = |d: &Departure| {
            !d.clearing
                && d.waiting.is_empty()
                && d.ask_again + if d.reminded { REMIND } else { Duration::ZERO } <= now
        };
        let ids: Vec<DeviceId> =
            self.departures.iter().filter(|(_, d)| forgotten(d)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(departure) = self.departures.get_mut(&id) {
                departure.ask_again = now;
                departure.reminded = true;
            }
            self.queue.push_back(Job::Ask(id));
        }
    }

    /// The next moment at which something must be done although nothing happens.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let waits = self
            .departures
            .values()
            .flat_map(|d| d.waiting.iter().map(|(deadline, _)| *deadline).chain(self.asks(d)));
        waits.chain(self.farewell.next_wake()).chain(self.io.next_wake()).min()
    }

    /// When a departure is to be asked for again: only while somebody waits.
    fn asks(&self, departure: &Departure) -> Option<Instant> {
        (!departure.waiting.is_empty() && !departure.clearing && self.shop.is_some())
            .then_some(departure.ask_again)
    }

    /// Answers those who waited long enough, asks again for those who wait.
    pub(super) fn on_time(&mut self) {
        let now = Instant::now();
        let mut again = Vec::new();
        for (id, departure) in &mut self.departures {
            if !departure.clearing && !departure.waiting.is_empty() && departure.ask_again <= now {
                departure.ask_again = now + ASK_AGAIN;
                again.push(id.clone());
            }
            let late: Vec<_> = departure.waiting.extract_if(.., |(deadline, _)| *deadline <= now).collect();
            for (_, reply) in late {
                let reason = format!("{} ({} s)", departure.heard, departure.since.elapsed().as_secs());
                let _ = reply.send(Ok(json!(Detached::Pending { id: id.to_string(), reason })));
            }
        }
        for id in again {
            if !self.queue.iter().any(|job| matches!(job, Job::Ask(other) if *other == id)) {
                self.queue.push_back(Job::Ask(id));
            }
        }
        self.on_farewell_time(now);
        self.on_io_time(now);
    }
}

fn answer_all(departure: Departure, outcome: &Detached) {
    for (_, reply) in departure.waiting {
        let _ = reply.send(Ok(json!(outcome)));
    }
}

fn attached(parts: &[Placed], commands: Vec<Value>) -> Value {
    let (controllers, devices): (Vec<&Placed>, Vec<&Placed>) = parts.iter().partition(|part| part.on_demand);
    let Some(device) = devices.first() else { return Value::Null };
    json!(Attached {
        id: device.id.to_string(),
        label: device.label().map(ToString::to_string),
        address: device.address.as_ref().map(ToString::to_string),
        controllers: controllers.iter().map(|c| c.id.to_string()).collect(),
        device: device.config.clone(),
        commands,
    })
}

/// Whether a step failed for want of an answer.
pub(super) fn is_open(error: &StepError) -> bool {
    matches!(error, StepError::Qmp { source: QmpError::TimedOut { .. }, .. })
}

/// Whether a step failed because somebody else has the thing: nothing was tried on the VM then.
pub(super) fn is_refusal(error: &StepError) -> bool {
    matches!(error, StepError::Host(error) if error.is_refusal())
}
