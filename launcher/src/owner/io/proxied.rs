//! Disks whose storage is tried by a proxy: what its states mean, and what it is told.
//!
//! Nothing depends on a single state: what a proxy is to do follows from how the disk is, each time anything is heard of either.
//!
//! While a proxy holds something, whatever drains freezes QEMU. So it is parked before: the device takes the requests back and the VM stands still, as
//! with the other engines. When it was seen to stand still the proxy holds again, before the VM goes on.

use std::time::Duration;

use devices::host::{HostNeed, IoProxy};
use devices::retry::{AtTimeout, Engine, Retry};
use devices::{DeviceId, Placed};
use qmp_client::{BlockIoError, IoAction};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::info;

use super::Owner;
use crate::host::io_proxy::own_timeout;
use crate::record::Stage;
use crate::suspend::line::{Line, News, State, Teller};
use crate::suspend::state::unix_ms;
use crate::suspend::{Change, DiskIo, Uptime, What};

/// How long QEMU waits for a proxy that has died.
const RECONNECT: Duration = Duration::from_secs(30);

/// A disk's proxy, as its owner knows it.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) line: Line,
    /// What it said last; nothing while there is none.
    pub(super) seen: Option<State>,
    /// Since when there is none.
    lost: Instant,
}

impl Proxy {
    pub(super) fn new(line: Line) -> Proxy {
        Proxy { line, seen: None, lost: Instant::now() }
    }

    /// Whether there is none, and QEMU waits for it: then nothing may drain.
    pub(super) fn is_missed(&self) -> bool {
        self.seen.is_none() && self.lost.elapsed() < RECONNECT
    }

    /// How many requests it holds.
    pub(super) fn held(&self) -> usize {
        self.seen.as_ref().map_or(0, State::held)
    }

    /// Gives back to the device what is held and what fails. Returns whether there is anything.
    pub(super) fn park(&mut self) -> bool {
        let Some(seen) = self.seen.as_mut().filter(|seen| seen.is_failing() && !seen.parked) else {
            return false;
        };
        self.line.teller().tell(json!({"command": "park"}));
        seen.parked = true;
        seen.held = Default::default();
        true
    }

    /// The device is gone: what QEMU still has of its requests ends. Gives the line, to end it.
    pub(super) fn dismiss(self) -> Line {
        self.line.teller().tell(json!({"command": "set", "timeout_ms": 1}));
        self.line
    }

    /// If it is parked: who can tell it to hold again.
    pub(super) fn parked(&self) -> Option<Teller> {
        self.seen.as_ref().is_some_and(|seen| seen.parked).then(|| self.line.teller())
    }
}

/// How a proxy is to retry.
pub(super) fn times(retry: &Retry) -> Value {
    json!({
        "command": "set", "interval_ms": retry.interval.as_millis(), "timeout_ms": own_timeout(retry).unwrap_or(0),
    })
}

/// The proxy that a device needs.
pub(super) fn plan(placed: &Placed) -> Option<&IoProxy> {
    placed.needs.iter().find_map(|need| if let HostNeed::IoProxy(plan) = need { Some(plan) } else { None })
}

/// What a state means for a disk. `before`: the last one of the same proxy.
fn follow(io: &mut DiskIo, before: Option<&State>, state: &State) -> Vec<Change> {
    let now = Uptime::now();
    let rose = |count: fn(&State) -> u64| before.is_some_and(|before| count(state) > count(before));
    let mut changes = Vec::new();
    // Of an outage that a former owner saw the attempts are counted.
    let is_new = before.map_or(io.outage.is_none(), |before| before.attempts != state.attempts);
    if (state.attempts.is_some() && is_new) || (rose(|state| state.outages) && io.outage.is_none()) {
        let what = What {
            operation: state.operation.clone().unwrap_or_default(),
            cause: state.error.clone().unwrap_or_default(),
            nospace: state.errno == Some(libc::ENOSPC),
            layer: state.layer.unwrap_or_default(),
        };
        let since = state.since_unix_ms.map_or(0, |since| unix_ms().saturating_sub(since));
        changes.push(match io.outage {
            None => io.began(what, now.before(Duration::from_millis(since)), now),
            Some(_) => io.failed(what, now),
        });
    }
    if state.timed_out || rose(|state| state.timeouts) {
        changes.extend(io.give_up());
    }
    if state.held() == 0 && state.attempts.is_none() && !state.is_faulty() && !state.heir {
        changes.extend(io.recovered(now));
    }
    changes
}

impl Owner {
    /// What came of a line.
    pub(in crate::owner) fn on_proxy(&mut self, id: &DeviceId, news: News) {
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let Some(proxy) = &mut disk.proxy else { return };
        let News::State(mut state) = news else {
            (proxy.seen, proxy.lost) = (None, Instant::now());
            return;
        };
        if proxy.seen.is_none() {
            info!(device = %id, "its io-proxy serves");
            proxy.line.teller().tell(times(&disk.io.retry));
            // It is newer than the outage, or it would have counted it.
            if let Some(outage) = disk.io.outage.as_ref().filter(|_| state.outages == 0) {
                proxy.line.teller().tell(json!({"command": "since", "unix_ms": outage.since_unix_ms}));
                state.heir = true;
            }
        }
        let before = proxy.seen.replace(state.clone());
        let changes = follow(&mut disk.io, before.as_ref(), &state);
        for change in changes {
            self.io_changed(id, change);
        }
        self.tend(id);
        self.unplug_due();
        // What waited for it, and what it said while nobody looked.
        if before.is_none() || state.parked {
            self.look_at_io();
        }
    }

    /// Tells a proxy what follows from how its disk is.
    pub(in crate::owner) fn tend(&mut self, id: &DeviceId) {
        let leaves = self.stages.get(id) == Some(&Stage::Leaving);
        let Some(disk) = self.io.disks.get_mut(id) else { return };
        let Some(proxy) = &mut disk.proxy else { return };
        let Some(seen) = &mut proxy.seen else { return };
        if seen.is_faulty() && disk.drill.is_none() {
            let off =
                json!({"command": "fault", "reads": true, "writes": true, "flushes": true, "on": false});
            proxy.line.teller().tell(off);
            seen.fault = Default::default();
        }
        if seen.held() == 0 {
            return;
        }
        match disk.io.outage.as_ref().and_then(|outage| outage.timed_out) {
            // The guest cannot let go of a disk whose requests wait.
            _ if leaves => proxy.line.teller().tell(json!({"command": "fail"})),
            // A proxy that has timed out has answered what was late, and what it keeps is not: that is another layer's.
            Some(AtTimeout::Report) if seen.timed_out => {}
            Some(AtTimeout::Report | AtTimeout::Unplug) => {
                proxy.line.teller().tell(json!({"command": "fail"}));
            }
            Some(AtTimeout::Pause) => self.io.gave_back |= proxy.park(),
            Some(AtTimeout::Hold) | None => {}
        }
    }

    /// Lets the proxies that are parked hold again.
    pub(super) fn unpark(&mut self) {
        for proxy in self.io.disks.values_mut().filter_map(|disk| disk.proxy.as_mut()) {
            if let Some(teller) = proxy.parked() {
                teller.tell(json!({"command": "unpark"}));
                proxy.seen.iter_mut().for_each(|seen| seen.parked = false);
            }
        }
    }

    /// Whether an error is no failure of the storage: a proxy answers so, to what it retries, only when it is parked.
    pub(in crate::owner) fn is_parking(&self, id: &DeviceId, error: &BlockIoError) -> bool {
        let Some(retry) = self.io.retry(id).filter(|retry| retry.engine == Engine::Proxy) else {
            return false;
        };
        let is_read = error.operation.to_string() == "read";
        error.action == IoAction::Stop && if is_read { retry.read } else { retry.write }
    }

    /// Hangs up on all proxies, whose VM is dead; what has to end before the host is cleared up.
    pub(in crate::owner) fn hang_up(&mut self) -> Vec<JoinHandle<()>> {
        let disks = std::mem::take(&mut self.io.disks).into_values();
        disks.filter_map(|disk| Some(disk.proxy?.line.hang_up())).collect()
    }
}
