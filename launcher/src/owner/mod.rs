//! The one task that owns a VM. Whatever can change belongs to it; others hold a request channel or a `watch` of the status.
//!
//! ```text
//!            requests        events of QEMU      finished jobs      timers     exit of QEMU
//!               |                 |                   |               |             |
//!               +-----------------+------- Owner::run +---------------+-------------+
//!                                              |
//!                     one job at a time (the workshop)    looks at the truth (any number)
//!                                              |
//!                              status (watch), events (broadcast)
//! ```
//!
//! Events are hints: after one, the owner asks QEMU. Work that changes the VM is done by one job at a time, which holds the
//! [`Workshop`] and so the journal; requests wait in a queue meanwhile, and the loop stays free. `plug` has attach and detach, `truth` what
//! QEMU is asked, `describe` the status, `end` the ways a VM stops.

mod describe;
mod end;
mod facts;
mod io;
mod media;
mod plug;
mod resize;
mod shrink;
mod snapshot;
mod truth;
mod usb;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use devices::{DeviceId, Layout};
use qmp_client::{Event, Events, KnownEvent, Qmp, Timestamp};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::control::{Envelope, event_line};
use crate::locks::OfdLock;
use crate::notify::Notifier;
use crate::process::{Exit, Process, keep_under_cap};
use crate::record::{Entry, Launch, Stage};
use crate::request::{Class, Failure, Request};
use crate::status::{Foreign, IoFault, Status, VmState};
use crate::work::Workshop;
use crate::work::merge::Shortening;

use describe::empty;
pub use end::Ending;
use end::Farewell;
use plug::{Departure, Job};
use shrink::{Merges, Shrink};
use truth::Truth;

/// A VM that runs, as a launch or an adoption hands it over.
#[derive(Debug)]
pub struct Born {
    /// The record of the launch.
    pub launch: Launch,
    /// QEMU's log.
    pub log: std::path::PathBuf,
    /// QEMU's process.
    pub process: Process,
    /// QEMU's events.
    pub events: Events,
    /// The connection, the journal, the host.
    pub shop: Workshop,
    /// Devices and seats.
    pub layout: Layout,
    /// Where each device is in its life.
    pub stages: BTreeMap<DeviceId, Stage>,
    /// A chain that a former owner began to make shorter.
    pub shortening: Option<Shortening>,
    /// I/O errors that a former owner saw.
    pub faults: BTreeMap<DeviceId, IoFault>,
    /// Held as long as this process owns the VM.
    pub owner_lock: OfdLock,
    /// Held as long as this process or QEMU lives; an adopting owner has none of its own.
    pub life: Option<OfdLock>,
}

/// What says that this process owns the VM. Whoever clears up behind it holds them until that is done.
#[derive(Debug)]
pub struct Locks {
    _owner: OfdLock,
    _life: Option<OfdLock>,
}

/// The way back to whoever asked.
type Reply = oneshot::Sender<Result<Value, Failure>>;

/// What a job or a look brings home.
#[derive(Debug)]
enum Finished {
    Work(Box<Workshop>, plug::Outcome),
    Look(Truth),
    Io(io::IoNews),
    Usage(crate::request::Detach, String, crate::host::usb::usage::Usage, Reply),
    Facts(Box<crate::request::Attach>, Result<devices::host::HostFacts, Failure>, Reply),
}

/// How often the log's size and pending departures are looked at.
const TICK: Duration = Duration::from_secs(2);

/// How long the journal may grow before it is written anew.
const JOURNAL_BYTES: u64 = 1 << 20;

/// The owner.
pub struct Owner {
    launch: Launch,
    log: std::path::PathBuf,
    process: Process,
    qmp: Qmp,
    events: Events,
    shop: Option<Box<Workshop>>,
    queue: VecDeque<Job>,
    /// Whether the job at work makes chains shorter.
    is_shrinking: bool,
    jobs: JoinSet<Finished>,
    layout: Layout,
    stages: BTreeMap<DeviceId, Stage>,
    departures: BTreeMap<DeviceId, Departure>,
    /// Devices of which DEVICE_DELETED came while they were still being made.
    early: BTreeSet<DeviceId>,
    ptys: BTreeMap<String, String>,
    faults: BTreeMap<DeviceId, IoFault>,
    /// Devices whose faults the journal does not know yet.
    unwritten: BTreeSet<DeviceId>,
    /// What the journal is to learn when the job at work is done.
    unnoted: Vec<Entry>,
    /// Capacities of disks in bytes, as last seen.
    sizes: BTreeMap<DeviceId, u64>,
    /// Which device uses a node, as last seen.
    nodes: BTreeMap<String, DeviceId>,
    /// I/O errors of nodes that were not seen yet, with their times.
    unmatched: Vec<(qmp_client::BlockIoError, Timestamp)>,
    /// Disks that retry.
    io: io::Io,
    notifier: Option<Notifier>,
    /// USB devices of the host.
    usb: usb::Usb,
    foreign: Vec<Foreign>,
    run: VmState,
    looking: bool,
    look_again: bool,
    /// Whether a device of ours came since QEMU was last asked.
    outdated: bool,
    farewell: Farewell,
    generation: u64,
    status: watch::Sender<Arc<Status>>,
    broadcast: broadcast::Sender<Arc<[u8]>>,
    requests: mpsc::Receiver<Envelope>,
    locks: Locks,
}

/// What others get of an owner.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The status.
    pub status: watch::Receiver<Arc<Status>>,
    /// Where requests go.
    pub requests: mpsc::Sender<Envelope>,
    /// Where events come from.
    pub events: broadcast::Sender<Arc<[u8]>>,
    /// The connection to QEMU.
    pub qmp: Qmp,
}

/// A signal that `qvirt run` got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// TERM or INT: shut the guest down; the second one kills.
    End,
    /// HUP: leave the VM without an owner.
    Leave,
}

impl Owner {
    /// An owner, not yet running. It has asked QEMU how things are.
    pub async fn new(born: Born) -> (Owner, Handle) {
        let (events, _) = broadcast::channel(crate::control::EVENTS);
        let (sender, requests) = mpsc::channel(64);
        let (status, watch) = watch::channel(Arc::new(empty(&born)));
        let qmp = born.shop.qmp.clone();
        let departures = born
            .stages
            .iter()
            .filter(|(_, s)| **s == Stage::Leaving)
            .map(|(id, _)| (id.clone(), Departure::new()))
            .collect();
        let io = io::Io::new(Arc::clone(&born.shop.host));
        let notify = born.launch.notify.clone();
        let mut owner = Owner {
            io,
            notifier: notify.map(|notify| Notifier::new(notify, born.launch.vm.clone())),
            log: born.log,
            process: born.process,
            qmp: qmp.clone(),
            events: born.events,
            shop: Some(Box::new(born.shop)),
            queue: VecDeque::new(),
            is_shrinking: false,
            jobs: JoinSet::new(),
            layout: born.layout,
            stages: born.stages,
            departures,
            early: BTreeSet::new(),
            ptys: BTreeMap::new(),
            faults: born.faults,
            unwritten: BTreeSet::new(),
            unnoted: Vec::new(),
            sizes: BTreeMap::new(),
            nodes: BTreeMap::new(),
            unmatched: Vec::new(),
            usb: usb::Usb::default(),
            foreign: Vec::new(),
            run: VmState::Starting,
            looking: false,
            look_again: false,
            outdated: false,
            farewell: Farewell::default(),
            generation: 0,
            status,
            broadcast: events.clone(),
            requests,
            launch: born.launch,
            locks: Locks { _owner: born.owner_lock, _life: born.life },
        };
        owner.begin_io();
        let truth = truth::look(qmp.clone(), owner.known(), owner.usb_ids(), owner.io.hung().is_some()).await;
        owner.learn(truth);
        // The former owner may have died before it asked them, or between their end and the end of what they stood on.
        owner
            .queue
            .extend(owner.departures.iter().filter(|(_, d)| !d.clearing).map(|(id, _)| Job::Ask(id.clone())));
        owner.queue.extend(born.shortening.map(|shortening| Job::Resume(Box::new(shortening))));
        // An attach that was interrupted may have left a controller that nobody uses.
        owner.dismiss_unused();
        owner.publish();
        (owner, Handle { status: watch, requests: sender, events, qmp })
    }

    /// Lets the guest go, and notes that the launch is finished. In this order: an owner that dies in between is followed by one that does
    /// it again.
    pub async fn go(&mut self) -> Result<(), qmp_client::QmpError> {
        if !self.launch.paused {
            self.qmp.call("cont", Value::Null).await?;
            self.run = VmState::Running;
        }
        if let Some(shop) = &mut self.shop {
            shop.note(&crate::record::Entry::Live);
        }
        // Beside the guest's first moments, and not before them.
        self.look();
        self.publish();
        Ok(())
    }

    /// Owns the VM until it ends, or until this owner is told to leave. `signals` are what this process gets.
    pub async fn run(mut self, mut signals: mpsc::Receiver<Signal>) -> Ending {
        let mut tick = tokio::time::interval(TICK);
        let mut talking = true;
        loop {
            let wake = self.next_wake();
            tokio::select! {
                biased;
                exit = self.process.exited() => return self.ended(exit).await,
                event = self.events.next(), if talking => match event {
                    Some(event) => self.on_event(&event),
                    None => talking = false,
                },
                Some(done) = self.jobs.join_next() => match done {
                    Ok(Finished::Work(shop, outcome)) => self.on_outcome(shop, outcome),
                    Ok(Finished::Look(truth)) => self.on_truth(truth),
                    Ok(Finished::Io(news)) => self.on_io(news),
                    Ok(Finished::Facts(attach, facts, reply)) => self.on_facts(attach, facts, reply),
                    Ok(Finished::Usage(detach, name, usage, reply)) => self.on_usage(&detach, &name, &usage, reply),
                    Err(error) => {
                        warn!(%error, "a job was lost, and with it the journal: leaving the VM; `qvirt run` adopts it");
                        return self.left();
                    }
                },
                Some((id, news)) = self.io.news.recv() => self.on_proxy(&id, news),
                () = until(wake) => self.on_time(),
                _ = tick.tick() => self.on_tick(),
                Some(signal) = signals.recv() => self.on_signal(signal),
                Some(envelope) = self.requests.recv() => self.on_request(envelope),
            }
            if self.farewell.leave && self.shop.is_some() {
                // What waits has not begun: whoever asked learns that the owner ended.
                return self.left();
            }
            let is_abandoned = !talking && !self.farewell.is_killing() && self.process.try_exited().is_none();
            if is_abandoned && self.farewell.since_silence(Instant::now()) {
                warn!("QEMU closed its monitor and lives on: leaving it; `qvirt run` adopts it");
                return self.left();
            }
            self.start_next();
            self.publish();
        }
    }

    fn on_request(&mut self, envelope: Envelope) {
        let Envelope { request, reply } = envelope;
        let drains = match request {
            Request::Attach(_) | Request::Detach(_) => Some("nothing is attached or detached"),
            Request::Media(_) => Some("no medium is changed"),
            Request::SnapshotCreate(_) => Some("no snapshot is taken"),
            Request::SnapshotDelete(_) => Some("no snapshot is deleted"),
            Request::BlockCommit(_) => Some("nothing is committed"),
            Request::BlockPull(_) => Some("nothing is pulled"),
            Request::BlockResize(_) => Some("no disk gets another size"),
            _ => None,
        };
        if let Some(refusal) = drains.and_then(|what| self.io.hang_refusal(what)) {
            let _ = reply.send(Err(refusal));
            return;
        }
        match request {
            Request::Attach(attach) => self.queue.push_back(Job::Facts(attach, reply)),
            Request::Devices => {
                let devices = self
                    .layout
                    .devices()
                    .iter()
                    .map(|d| json!({"id": d.id, "address": d.address, "config": d.config}));
                let _ = reply.send(Ok(devices.collect()));
            }
            Request::Media(media) => self.media(media, reply),
            Request::SnapshotCreate(wish) => self.snapshot(wish, reply),
            Request::SnapshotDelete(wish) => self.shrink(Shrink::Merge(Merges::Delete(wish)), reply),
            Request::BlockCommit(wish) => self.shrink(Shrink::Merge(Merges::Commit(wish)), reply),
            Request::BlockPull(wish) => self.shrink(Shrink::Pull(wish), reply),
            Request::BlockResize(wish) => self.queue.push_back(Job::Resize(wish, reply)),
            Request::Detach(detach) => self.detach_unused(detach, reply),
            Request::Shutdown(shutdown) => self.shut_down(&shutdown, reply),
            Request::Reboot(shutdown) => self.reboot(&shutdown, reply),
            Request::Reset => self.reset(reply),
            Request::IoRetry(disk) => self.retry_io(&disk.id, reply),
            Request::IoFail(disk) => self.fail_io(&disk.id, reply),
            Request::IoSet(set) => self.set_io(&set, reply),
            Request::Drill(drill) => self.drill(&drill, reply),
            Request::Standstill(wanted) => {
                self.io.want_pause(wanted, reply);
            }
            Request::Kill => self.kill(Some(reply)),
            Request::Leave => {
                self.farewell.leave = true;
                let _ = reply.send(Ok(json!({})));
            }
            Request::Reconcile => {
                self.look();
                let _ = reply.send(Ok(json!({})));
            }
        }
    }

    fn on_event(&mut self, event: &Event) {
        let _ = self.broadcast.send(event_line(event));
        match event.view() {
            KnownEvent::DeviceDeleted(gone) => {
                if let Some(id) = gone.device.and_then(|id| id.parse().ok()) {
                    match self.stages.get(&id) {
                        // Nobody asked it to leave: the event may be late and mean a former device of that id.
                        Some(Stage::Present) => self.look(),
                        _ => self.deleted(&id),
                    }
                }
                if !self.foreign.is_empty() {
                    self.look();
                }
            }
            KnownEvent::DeviceUnplugGuestError(refusal) => {
                if let Some(id) = refusal.device.and_then(|id| id.parse().ok()) {
                    self.stays(&id, "the guest refused to let go of it".to_owned());
                }
            }
            KnownEvent::BlockIoError(error) => self.on_io_error(error, event.timestamp),
            KnownEvent::Shutdown(shutdown) => self.farewell.cause = Some(shutdown.reason.to_string()),
            KnownEvent::Stop => {
                self.io_stopped();
                self.look();
            }
            KnownEvent::Reset(_) => {
                self.io_reset();
                self.look();
            }
            KnownEvent::Resume => {
                self.io_resumed();
                self.look();
            }
            KnownEvent::GuestPanicked(_) => self.look(),
            _ => {}
        }
    }

    /// An event of our own, to every client and to the program of `notify`.
    fn announce(&self, name: &str, data: Value) {
        let event = Event { timestamp: Timestamp::now(), name: name.to_owned(), data };
        let _ = self.broadcast.send(event_line(&event));
        if let Some(notifier) = &self.notifier {
            notifier.tell(&event);
        }
    }

    fn on_tick(&mut self) {
        if let Err(error) = keep_under_cap(&self.log) {
            warn!(log = ?self.log, %error, "QEMU's log could not be kept under its cap");
        }
        self.write_faults();
        self.watch_storage();
        self.watch_usb();
        self.shorten_journal();
        self.remind();
        if !self.departures.is_empty() {
            self.look();
        }
    }

    fn shorten_journal(&mut self) {
        if let Some(shop) = &mut self.shop
            && shop.journal.length_bytes() > JOURNAL_BYTES
        {
            shop.shorten_journal();
        }
    }

    fn publish(&mut self) {
        let mut next = self.describe();
        next.generation = self.generation;
        self.status.send_if_modified(|current| {
            if **current == next {
                return false;
            }
            self.generation += 1;
            next.generation = self.generation;
            *current = Arc::new(next);
            true
        });
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("vm", &self.launch.vm).field("run", &self.run).finish_non_exhaustive()
    }
}

/// Why a request cannot be served while the VM is as it is.
fn not_now(why: &str, next: &str) -> Failure {
    Failure::new(Class::Refused, format!("{why}: {next}"))
}

fn exit_words(exit: &Exit) -> String {
    info!(%exit, "QEMU has ended");
    exit.to_string()
}
