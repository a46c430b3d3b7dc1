//! Disks that retry, as the owner sees them: what happened, what that means, and the next turn.
//!
//! ```text
//!   BLOCK_IO_ERROR, STOP, RESET, a disk is due, a turn is done ---> look ---> decide ---> turn ---> look ...
//! ```
//!
//! Events only say that it is time to look, and whom to blame. A failed request waits in its device, and the VM stands still (`io-error`): the disks
//! that failed are moved to a place that keeps requests, and the VM goes on. When a disk is due everything is given back, so that the VM stands
//! still again with its requests in the devices; the disk is moved to its own node, and the VM goes on. That either stops it again, or it does not.
//!
//! Nothing here waits: looks, turns and beats are jobs. While something is parked, whatever drains freezes QEMU until it is given back: the owner
//! does so when a disk stops the VM, before each turn of its own, and when QEMU does not answer a beat.

mod decide;
mod disk;
mod hang;
mod kept;
mod native;
mod proxied;
mod tell;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use devices::retry::{AtTimeout, Engine, Retry};
use devices::{DeviceId, Placed};
use qmp_client::{BlockIoError, IoAction, Qmp, QmpError, Timestamp};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Finished, Owner, Reply};
use crate::host::need::Host;
use crate::record::Stage;
use crate::suspend::hang::Detector;
use crate::suspend::line::{Line, News};
use crate::suspend::parking::Parking;
use crate::suspend::turn::{self, Look, micros};
use crate::suspend::{DiskIo, Outage, Uptime, What};
use disk::{Disk, retrying};
use hang::Probe;
use proxied::Proxy;

/// How long QEMU may take to answer a beat while something is parked.
const BEAT_PATIENCE: Duration = Duration::from_millis(700);
/// How often it is asked.
const BEAT: Duration = Duration::from_millis(300);
/// How long after a turn nothing may have failed for a disk to have recovered.
const QUIET: Duration = Duration::from_millis(100);
/// How long a disk that was reset with the guest may be without any request before it counts as recovered.
const IDLE: Duration = Duration::from_secs(2);
/// How long a disk is tried alone.
const ALONE: Duration = Duration::from_millis(300);
/// The shortest time from one look to the next one that nothing but time asks for.
const BREATH: Duration = Duration::from_millis(20);
/// How long to wait after QEMU refused something.
const AGAIN: Duration = Duration::from_millis(500);
/// How often people are told of failed attempts.
const TELL: Duration = Duration::from_secs(1);

/// What is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Looking,
    Turning,
}

/// What a job brings home.
#[derive(Debug)]
pub(super) enum IoNews {
    Looked(Result<Look, QmpError>),
    Turned(Result<Option<i64>, QmpError>),
    Beat(bool),
    /// Nodes of drills of a former owner that QEMU has no more.
    Removed(Vec<String>),
    Hang(hang::HangNews),
}

/// The owner's part for disks that retry.
pub(super) struct Io {
    disks: BTreeMap<DeviceId, Disk>,
    parking: Option<Parking>,
    socket: PathBuf,
    file: PathBuf,
    phase: Phase,
    look_again: bool,
    /// Disks that failed, with what and when (microseconds since 1970).
    blamed: BTreeMap<DeviceId, (What, i64)>,
    /// When the VM went on last by a turn.
    went_on: i64,
    /// Whether requests were given back before the VM stopped: it stopped for these.
    gave_back: bool,
    /// Stops in a row that were explained by that.
    explained: u32,
    /// A disk of another policy stopped the VM: it stands still until a person says otherwise.
    stuck: bool,
    /// Whether it is known why the VM stands still: a second look at the same stop finds nobody else to blame.
    judged: bool,
    /// Whether a turn is due that could not be begun.
    put_off: bool,
    /// Whoever is to be told, when the turn is done, that it is known whether the VM is to be paused.
    standstills: Vec<Reply>,
    /// Whether a turn of ours left the VM standing still.
    interrupted: bool,
    /// Whether somebody wants the VM to be paused.
    wants_pause: bool,
    beat: Option<Instant>,
    /// Nothing is tried before, for QEMU or the host refused something.
    not_before: Option<Instant>,
    /// How many places and drills former owners had.
    places: u32,
    drills: u32,
    /// Nodes that are to be removed when nobody stands on them.
    leavings: Vec<String>,
    /// The same, of devices that are gone.
    stand_ins: BTreeMap<DeviceId, Vec<String>>,
    /// Disks whose timeout says that they are to be unplugged.
    unplug: Vec<DeviceId>,
    /// Whether QEMU is being asked if disks hang.
    watching: bool,
    /// Whether the VM stood still at the last look, and no event had told so.
    saw_untold_stop: bool,
    /// Starts proxies.
    host: Arc<Host>,
    /// What proxies say, and where they say it.
    pub(super) news: mpsc::UnboundedReceiver<(DeviceId, News)>,
    teller: mpsc::UnboundedSender<(DeviceId, News)>,
}

/// A stop that is explained by what was given back, so often in a row, is not explained by it.
const EXPLAINED: u32 = 3;

impl Io {
    pub(super) fn new(host: Arc<Host>) -> Io {
        let (teller, news) = mpsc::unbounded_channel();
        Io {
            disks: BTreeMap::new(),
            parking: None,
            socket: host.run_dir.join("park.sock"),
            file: host.run_dir.join("io.json"),
            host,
            news,
            teller,
            phase: Phase::Idle,
            look_again: false,
            blamed: BTreeMap::new(),
            went_on: 0,
            gave_back: false,
            explained: 0,
            stuck: false,
            judged: false,
            put_off: false,
            standstills: Vec::new(),
            interrupted: false,
            wants_pause: false,
            beat: None,
            not_before: None,
            places: 0,
            drills: 0,
            leavings: Vec::new(),
            stand_ins: BTreeMap::new(),
            unplug: Vec::new(),
            watching: false,
            saw_untold_stop: false,
        }
    }

    fn parking(&mut self) -> Option<&mut Parking> {
        if self.parking.is_none() {
            match Parking::open(&self.socket, self.places) {
                Ok(parking) => self.parking = Some(parking),
                Err(error) => warn!(%error, "I/O cannot be held: the VM stays paused"),
            }
        }
        self.parking.as_mut()
    }

    /// Gives back to the devices all that is parked or held. Whatever drains may be done then.
    pub(super) fn give_back(&mut self) {
        for proxy in self.disks.values_mut().filter_map(|disk| disk.proxy.as_mut()) {
            self.gave_back |= proxy.park();
        }
        if let Some(parking) = &self.parking {
            self.gave_back |= parking.give_back();
        }
    }

    /// Which of the nodes that stand in for others QEMU has is not known: the next turn makes new ones. A drill ends.
    fn renew_nodes(&mut self) {
        for (id, disk) in &mut self.disks {
            self.leavings
                .extend(disk.drill.take_if(|drill| drill.node.is_some()).and_then(|drill| drill.node));
            self.leavings.extend(self.parking.iter_mut().flat_map(|parking| parking.forget(id)));
        }
    }

    fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        self.disks.values().filter_map(|disk| disk.proxy.as_ref())
    }

    /// Outages that are ours to end: of QEMU's own retries the VM's run state tells nothing.
    fn outages(&self) -> impl Iterator<Item = &Outage> {
        let ours = self.disks.values().filter(|disk| disk.io.retry.engine != Engine::Native);
        ours.filter_map(|disk| disk.io.outage.as_ref())
    }

    /// The next moment at which something is to be done.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let look =
            self.next_look(Instant::now()).map(|look| self.not_before.map_or(look, |time| time.max(look)));
        look.into_iter().chain(self.next_beat()).min()
    }

    /// When QEMU is to be asked for a sign of life: only while something could freeze it.
    fn next_beat(&self) -> Option<Instant> {
        let silent =
            self.parking.as_ref().is_some_and(Parking::is_silent) || self.proxies().any(|p| p.held() > 0);
        silent.then_some(self.beat.unwrap_or_else(Instant::now))
    }

    /// When the disks are to be looked at next. While one is tried alone, the others wait.
    fn next_look(&self, now: Instant) -> Option<Instant> {
        if self.phase != Phase::Idle || self.stuck {
            return None;
        }
        if self.put_off {
            return Some(now);
        }
        let alone = self.tried_alone(Uptime::now());
        let disks = self.disks.values().filter(|disk| !alone || disk.trying.is_some());
        disks.filter_map(|disk| disk.next_look(now)).min()
    }

    /// Whether a disk has just been moved to its own node again, and is left alone for a moment to fail or not.
    fn tried_alone(&self, now: Uptime) -> bool {
        let is_tried =
            |disk: &Disk| disk.trying.as_ref().is_some_and(|trying| now.since(trying.since) < ALONE);
        self.disks.values().any(is_tried)
    }

    /// How a disk retries by now.
    pub(super) fn retry(&self, id: &DeviceId) -> Option<Retry> {
        self.disks.get(id).map(|disk| disk.io.retry.clone())
    }
}

impl Owner {
    /// Disks that came since.
    pub(super) fn follow_layout(&mut self) {
        self.follow(&[Stage::Present]);
    }

    /// Disks in one of these stages.
    fn follow(&mut self, stages: &[Stage]) {
        let disks = &mut self.io.disks;
        for placed in self.layout.devices() {
            let is_wanted = self.stages.get(&placed.id).is_some_and(|stage| stages.contains(stage));
            if disks.contains_key(&placed.id) || !is_wanted {
                continue;
            }
            if let Some((retry, top)) = retrying(placed) {
                let (id, host, news) = (&placed.id, &self.io.host, &self.io.teller);
                let proxy = proxied::plan(placed)
                    .cloned()
                    .map(|plan| Proxy::new(Line::open(id.clone(), plan, Arc::clone(host), news.clone())));
                let disk = Disk {
                    io: DiskIo::new(retry),
                    top,
                    size_bytes: 0,
                    trying: None,
                    told: None,
                    drill: None,
                    parked: false,
                    done: 0,
                    hang: Detector::default(),
                    probe: Probe::default(),
                    native: None,
                    settled: 0,
                    proxy,
                    was_reset: false,
                };
                disks.insert(placed.id.clone(), disk);
            }
        }
    }

    /// A disk stands on another node of its own: a snapshot was taken.
    pub(super) fn moved_to(&mut self, placed: &Placed) {
        if let Some((disk, top)) = self.io.disks.get_mut(&placed.id).zip(placed.top_node()) {
            top.clone_into(&mut disk.top);
        }
    }

    /// A disk is gone: gives the nodes that stood in for its own, and the line to its proxy. The nodes are given again until
    /// [`Owner::forget_stand_ins`], since QEMU may use them a moment longer than the device.
    pub(super) fn stand_ins(&mut self, id: &DeviceId) -> (Vec<String>, Option<Line>) {
        let gone = self.io.disks.remove(id);
        if gone.is_some() {
            // Another disk of its name begins anew.
            self.io.keep();
        }
        let (drill, proxy) = gone.map_or((None, None), |disk| (disk.drill, disk.proxy));
        let drill = drill.filter(|drill| drill.add.is_none());
        let parked = self.io.parking.as_mut().map(|parking| parking.forget(id)).unwrap_or_default();
        let stand_ins = self.io.stand_ins.entry(id.clone()).or_default();
        stand_ins.extend(parked.into_iter().chain(drill.and_then(|drill| drill.node)));
        (stand_ins.clone(), proxy.map(Proxy::dismiss))
    }

    /// QEMU has none of them any more.
    pub(super) fn forget_stand_ins(&mut self, id: &DeviceId) {
        self.io.stand_ins.remove(id);
    }

    /// A disk failed. Only what QEMU stopped or retries for is ours; a late event of what is settled already is not.
    pub(super) fn io_failed(&mut self, id: &DeviceId, error: &BlockIoError, timestamp: Timestamp) {
        if !self.io.disks.contains_key(id) {
            self.follow_layout();
        }
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let what = What {
            operation: error.operation.to_string(),
            cause: error.reason.clone(),
            nospace: error.nospace,
            layer: 0,
        };
        let time = micros(timestamp);
        let is_ok = disk.io.outage.is_none();
        match (&error.action, disk.io.retry.engine) {
            (IoAction::Stop, Engine::Hold | Engine::Pause) if time >= self.io.went_on => {
                self.io.blamed.insert(id.clone(), (what.clone(), time));
                self.io.give_back();
                if self.io.hung().is_some() && is_ok {
                    // There will be no look until the other disk's storage answers, and QEMU itself waits for that.
                    self.fails_for_the_first_time(id, what);
                }
                self.look_at_io();
            }
            // Late: what failed is known, but not why.
            (IoAction::Stop, Engine::Hold | Engine::Pause) => disk.io.explain(what),
            (_, Engine::Native) => self.natively_failed(id, error, timestamp),
            _ => {}
        }
    }

    fn fails_for_the_first_time(&mut self, id: &DeviceId, what: What) {
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let change = disk.io.failed(what, Uptime::now());
        self.io_changed(id, change);
    }

    /// The guest was reset, and with it its disks: requests that waited are gone.
    pub(super) fn io_reset(&mut self) {
        let failed = self.io.disks.values_mut().filter(|disk| disk.io.outage.is_some());
        failed.for_each(|disk| disk.was_reset = true);
        self.io_stopped();
    }

    /// The VM stands still.
    pub(super) fn io_stopped(&mut self) {
        self.io.saw_untold_stop = false;
        if self.io.disks.values().any(|disk| disk.io.retry.engine != Engine::Native) {
            // It drains now: nothing may keep it waiting. What was given back before explains the stop, what is given back now does not.
            let given = self.io.disks.values().any(|disk| disk.parked)
                && self.io.parking.as_ref().is_some_and(|parking| !parking.is_silent());
            let explained = self.io.gave_back || given;
            self.io.give_back();
            self.io.gave_back = explained;
            self.look_at_io();
        }
    }

    /// The VM goes on. Of a disk whose timeout paused it nobody but the person who resumed it would know how it goes.
    pub(super) fn io_resumed(&mut self) {
        self.io.judged = false;
        if self.io.outages().any(|outage| outage.timed_out == Some(AtTimeout::Pause)) {
            self.look_at_io();
        }
    }

    /// Looks how disks are, beside whatever else happens; looks asked for meanwhile become one.
    pub(super) fn look_at_io(&mut self) {
        if self.io.hung().is_some() {
            // No look, no decision, no turn: all of that may freeze QEMU.
            self.io.not_before = Some(Instant::now() + AGAIN);
            return;
        }
        if self.io.phase != Phase::Idle {
            self.io.look_again = true;
            return;
        }
        self.io.phase = Phase::Looking;
        let qmp = self.qmp.clone();
        self.jobs.spawn(async move { Finished::Io(IoNews::Looked(turn::look(&qmp).await)) });
    }

    /// What a job of these brought home.
    pub(super) fn on_io(&mut self, news: IoNews) {
        match news {
            IoNews::Beat(true) => {
                self.io.beat = Some(Instant::now() + BEAT);
                self.io.explained = 0;
            }
            IoNews::Beat(false) => {
                warn!("QEMU does not answer while I/O is held: something drains; giving the I/O back");
                self.io.give_back();
                self.look_at_io();
            }
            IoNews::Removed(nodes) => {
                self.io.leavings.retain(|node| !nodes.contains(node));
                self.io.keep();
            }
            IoNews::Hang(news) => self.on_hang_news(news),
            IoNews::Looked(Ok(look)) => {
                self.io.phase = Phase::Idle;
                self.io.not_before = Some(Instant::now() + BREATH);
                self.decide(&look);
                if self.io.phase == Phase::Idle && !self.io.put_off {
                    self.unpark();
                }
            }
            IoNews::Looked(Err(error)) => {
                self.io.phase = Phase::Idle;
                self.io.not_before = Some(Instant::now() + AGAIN);
                debug!(%error, "QEMU did not say how its disks are");
            }
            IoNews::Turned(outcome) => {
                self.io.phase = Phase::Idle;
                match outcome {
                    Ok(went_on) => {
                        self.io.interrupted = false;
                        // None was added since: a turn is what makes them.
                        self.io.leavings.clear();
                        self.io.went_on = went_on.unwrap_or(self.io.went_on);
                        let settled = self.io.went_on;
                        self.io.blamed.retain(|_, (_, time)| *time >= settled);
                    }
                    Err(error) => {
                        warn!(%error, "a disk could not be moved: trying again");
                        (self.io.interrupted, self.io.judged) = (true, true);
                        self.io.not_before = Some(Instant::now() + AGAIN);
                        self.io.give_back();
                        self.io.renew_nodes();
                    }
                }
                self.io.keep();
                for reply in self.io.standstills.drain(..) {
                    // Whoever asked may have gone.
                    let _ = reply.send(Ok(json!({})));
                }
                self.look();
            }
        }
        if self.io.phase == Phase::Idle && std::mem::take(&mut self.io.look_again) {
            self.look_at_io();
        }
    }

    /// Deadlines of disks, and of the beat.
    pub(super) fn on_io_time(&mut self, now: Instant) {
        if self.io.next_beat().is_some_and(|beat| beat <= Instant::now()) {
            self.io.beat = Some(now + BEAT + BEAT_PATIENCE);
            let qmp = self.qmp.clone();
            self.jobs.spawn(async move { Finished::Io(IoNews::Beat(answers(&qmp).await)) });
        }
        // A moment that has come is later than `now` by what passed since.
        let later = Instant::now();
        let may = self.io.not_before.is_none_or(|time| time <= now);
        if may && self.io.next_look(later).is_some_and(|look| look <= later) {
            self.io.not_before = None;
            self.look_at_io();
        }
    }
}

/// Whether a failure of a disk stops the VM.
fn stops(disk: &Disk) -> bool {
    matches!(disk.io.retry.engine, Engine::Hold | Engine::Pause)
}

async fn answers(qmp: &Qmp) -> bool {
    let asked = qmp.call("query-status", Value::Null);
    // That the monitor is closed is not for us to mend.
    tokio::time::timeout(BEAT_PATIENCE, asked).await.is_ok()
}
