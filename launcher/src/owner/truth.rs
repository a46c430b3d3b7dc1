//! Asking QEMU how things are, and taking the answer for the truth: run state, devices that came or went, foreign ones, ptys, I/O status.

use std::collections::BTreeMap;

use devices::DeviceId;
use devices::address::{Address, Function, PciSeat, Slot};
use qmp_client::{BlockIoError, IoAction, Qmp, QmpError, Timestamp};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::plug::Job;
use super::{Finished, Owner};
use crate::record::Stage;
use crate::status::{Foreign, IoFault, VmState};
use crate::suspend::parking::Seat;
use crate::suspend::turn::id_in;

/// How many I/O errors wait to be matched at most: older QEMU sends thousands a second.
const UNMATCHED: usize = 64;

/// What QEMU said. A question that failed is left unanswered, and nothing is concluded from it.
#[derive(Debug, Default)]
pub(super) struct Truth {
    run: Option<String>,
    /// Every device with an id; of those that we do not know, PCI devices have the QOM path of their bus, and slot and function in one number.
    peripherals: Option<Vec<String>>,
    strangers: BTreeMap<String, Option<(String, u8)>>,
    ptys: Option<BTreeMap<String, String>>,
    /// Whether QEMU has USB devices of the host.
    usb: BTreeMap<DeviceId, bool>,
    /// By the device's id or QOM path.
    disks: BTreeMap<String, DiskTruth>,
}

/// A disk, as QEMU has it.
#[derive(Debug, Default)]
struct DiskTruth {
    io_status: Option<String>,
    /// The node it uses.
    node: Option<String>,
    size_bytes: Option<u64>,
}

/// Asks everything, and the places of devices that are not `known`. Never fails as a whole. While storage is `hung` nothing is asked for which QEMU
/// may look at an image.
pub(super) async fn look(qmp: Qmp, known: Vec<String>, usb: Vec<DeviceId>, hung: bool) -> Truth {
    let ask = async |command: &str, arguments: Value| match qmp.call(command, arguments).await {
        Ok(value) => Some(value),
        Err(QmpError::Closed(_)) => None,
        Err(error) => {
            warn!(command, %error, "QEMU did not say how things are");
            None
        }
    };
    let run = ask("query-status", Value::Null).await.and_then(|v| v["status"].as_str().map(str::to_owned));
    let mut truth = Truth { run, peripherals: crate::work::peripherals(&qmp).await.ok(), ..Truth::default() };
    let unknown =
        truth.peripherals.iter().flatten().filter(|id| !known.contains(id)).filter(|_| !known.is_empty());
    for id in unknown {
        let get = async |property: &str| {
            let arguments = json!({"path": format!("/machine/peripheral/{id}"), "property": property});
            qmp.call("qom-get", arguments).await.unwrap_or_default()
        };
        let (bus, addr) = (get("parent_bus").await, get("addr").await);
        let place = bus.as_str().zip(addr.as_u64().and_then(|addr| u8::try_from(addr).ok()));
        truth.strangers.insert(id.clone(), place.map(|(bus, addr)| (bus.to_owned(), addr)));
    }
    for id in usb {
        if let Ok(attached) = crate::work::usb_attached(&qmp, id.as_str()).await {
            truth.usb.insert(id, attached);
        }
    }
    let chardevs = ask("query-chardev", Value::Null).await;
    truth.ptys = chardevs.map(|list| {
        let ptys = list.as_array().cloned().unwrap_or_default();
        let pty = |c: &Value| {
            Some((c["label"].as_str()?.to_owned(), c["filename"].as_str()?.strip_prefix("pty:")?.to_owned()))
        };
        ptys.iter().filter_map(pty).collect()
    });
    let blocks = if hung { None } else { ask("query-block", Value::Null).await };
    for device in blocks.as_ref().and_then(Value::as_array).into_iter().flatten() {
        if let Some(path) = device["qdev"].as_str() {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let disk = DiskTruth {
                io_status: text(&device["io-status"]),
                node: text(&device["inserted"]["node-name"]),
                size_bytes: device["inserted"]["image"]["virtual-size"].as_u64(),
            };
            truth.disks.insert(path.to_owned(), disk);
        }
    }
    truth
}

impl Owner {
    /// Looks at the truth, beside whatever else happens; looks asked for meanwhile become one.
    pub(super) fn look(&mut self) {
        if self.looking {
            self.look_again = true;
            return;
        }
        self.looking = true;
        self.outdated = false;
        let (qmp, known, usb) = (self.qmp.clone(), self.known(), self.usb_ids());
        let hung = self.io.hung().is_some();
        self.jobs.spawn(async move { Finished::Look(look(qmp, known, usb, hung).await) });
    }

    /// What QEMU has of ours: whatever else it has is foreign.
    pub(super) fn known(&self) -> Vec<String> {
        let ports = self.layout.topology().ports().iter().map(|p| p.id.to_string());
        let bridges = self.layout.topology().bridges().iter().map(|b| b.id.to_string());
        let devices = self.layout.devices().iter().map(|d| d.id.to_string());
        let companions = self.layout.devices().iter().flat_map(|d| &d.spec.companions);
        let companions = companions.map(|companion| companion.id().to_owned());
        ports.chain(bridges).chain(devices).chain(companions).collect()
    }

    pub(super) fn on_truth(&mut self, mut truth: Truth) {
        self.looking = false;
        if self.outdated {
            // QEMU may have been asked before it had a device of ours, which is then neither gone nor foreign.
            truth.peripherals = None;
            self.look_again = true;
        }
        self.learn(truth);
        if std::mem::take(&mut self.look_again) {
            self.look();
        }
    }

    /// Takes the answer for the truth.
    pub(super) fn learn(&mut self, truth: Truth) {
        if let Some(run) = &truth.run {
            let run = VmState::of_query(run);
            if run != self.run {
                debug!(was = %self.run, is = %run, "run state");
                self.announce("QVIRT_STATE", serde_json::to_value(&run).unwrap_or_default());
                self.run = run;
                self.go_on_rebooting();
                self.dismiss_unused();
            }
        }
        self.ptys.extend(truth.ptys.into_iter().flatten());
        self.usb.learn(truth.usb);
        self.tell_usb();
        for (path, disk) in &truth.disks {
            let Some(id) = id_in(path) else { continue };
            let Some(node) = &disk.node else {
                // An empty drive.
                self.sizes.remove(&id);
                continue;
            };
            self.nodes.insert(node.clone(), id.clone());
            // A place that requests are parked in says nothing of the disk.
            if let Some(bytes) = disk.size_bytes.filter(|_| Seat::of_node(node).is_none()) {
                self.sizes.insert(id, bytes);
            }
        }
        for (error, time) in std::mem::take(&mut self.unmatched) {
            if !self.fault(&error, time) {
                warn!(?error, "an I/O error of a device that qvirt does not know");
            }
        }
        for (path, disk) in truth.disks {
            if let Some(fault) = id_in(&path).and_then(|id| self.faults.get_mut(&id)) {
                fault.io_status = disk.io_status;
            }
        }
        if let Some(peripherals) = truth.peripherals {
            self.reconcile(&peripherals, &truth.strangers);
        }
    }

    /// Compares QEMU's devices with ours. While a job is at work the devices it works on are its business.
    fn reconcile(&mut self, peripherals: &[String], strangers: &BTreeMap<String, Option<(String, u8)>>) {
        let ours: Vec<(DeviceId, Stage, bool)> = self
            .layout
            .devices()
            .iter()
            .map(|d| {
                (
                    d.id.clone(),
                    self.stages.get(&d.id).copied().unwrap_or(Stage::Present),
                    d.spec.frontend.is_some(),
                )
            })
            .collect();
        for (id, stage, has_frontend) in ours {
            let there = !has_frontend || peripherals.iter().any(|p| p == id.as_str());
            if !there && stage != Stage::Arriving && self.shop.is_some() {
                self.deleted(&id);
            }
        }
        if strangers.is_empty() && self.foreign.is_empty() {
            return;
        }
        let place =
            |place: &Option<(String, u8)>| place.as_ref().and_then(|(bus, addr)| self.seat_of(bus, *addr));
        let seats: Vec<(String, Option<Address>)> =
            strangers.iter().map(|(name, at)| (name.clone(), place(at))).collect();
        let shown = |(name, address): &(String, Option<Address>)| Foreign {
            name: name.clone(),
            address: address.as_ref().map(Address::to_string),
        };
        let foreign = seats.iter().map(shown).collect();
        let seats: Vec<(Address, String)> =
            seats.into_iter().filter_map(|(name, address)| Some((address?, name))).collect();
        self.layout.topology_mut().set_foreign(seats);
        self.foreign = foreign;
    }

    /// The seat that QEMU's path of a bus and the property `addr` mean: a number when read, though it is written as a text.
    fn seat_of(&self, bus: &str, addr: u8) -> Option<Address> {
        let bus = bus.rsplit('/').next()?;
        let (slot, function) = (Slot(addr >> 3), Function(addr & 7));
        let is = |id: &DeviceId| id.as_str() == bus;
        let topology = self.layout.topology();
        if let Some(port) = topology.ports().iter().find(|p| is(&p.id)) {
            return Some(Address::Pci(PciSeat::Port(port.id.clone())));
        }
        if let Some(bridge) = topology.bridges().iter().find(|b| is(&b.id)) {
            return Some(Address::Pci(PciSeat::Bridge(bridge.id.clone(), slot, function)));
        }
        (bus == "pcie.0").then_some(Address::Pci(PciSeat::Root(slot, function)))
    }

    /// An I/O error: matched to its device at once, or after QEMU was asked which device uses the node.
    pub(super) fn on_io_error(&mut self, error: BlockIoError, time: Timestamp) {
        if error.node_name.as_deref().and_then(Seat::of_node).is_some() {
            // What was parked was given back: that is no failure of the storage.
            return;
        }
        // Of these there may be thousands a second, and they change nothing that QEMU could be asked.
        let is_retry = matches!(&error.action, IoAction::Other(word) if word == "retry");
        let is_known = self.fault(&error, time);
        if is_known && is_retry {
            return;
        }
        if !is_known && self.unmatched.len() < UNMATCHED {
            self.unmatched.push((error, time));
        }
        self.look();
    }

    /// Keeps an I/O error in mind, by the device it belongs to; `false` if that is not known.
    fn fault(&mut self, error: &BlockIoError, time: Timestamp) -> bool {
        let by_path = error.qom_path.as_deref().and_then(id_in);
        let by_name = error.node_name.as_deref().and_then(DeviceId::of_node).map(|(id, _)| id);
        let by_use = error.node_name.as_ref().and_then(|node| self.nodes.get(node).cloned());
        let by_device = error.device.parse().ok();
        let candidates = [by_path, by_use, by_name, by_device];
        let placed = candidates.iter().flatten().find_map(|id: &DeviceId| self.layout.device(id.as_str()));
        let Some(placed) = placed else { return false };
        let id = placed.id.clone();
        if self.is_parking(&id, error) {
            return true;
        }
        let (former, seconds) = (self.faults.get(&id), time.seconds);
        let fault = IoFault {
            node: error.node_name.clone().unwrap_or_default(),
            operation: error.operation.to_string(),
            action: error.action.to_string(),
            cause: error.reason.clone(),
            nospace: error.nospace,
            since_unix_secs: former.map_or(seconds, |f| f.since_unix_secs),
            last_unix_secs: seconds,
            events: former.map_or(0, |f| f.events) + 1,
            io_status: former.and_then(|f| f.io_status.clone()),
        };
        if former.is_none() {
            let label = placed.label().map(ToString::to_string);
            self.announce("QVIRT_IO_ERROR", json!({
                "device": id.as_str(), "label": label, "operation": fault.operation, "action": fault.action, "cause": fault.cause,
                "nospace": fault.nospace,
            }));
        }
        let is_first = former.is_none();
        self.faults.insert(id.clone(), fault);
        self.io_failed(&id, error, time);
        self.unwritten.insert(id);
        if is_first {
            self.write_faults();
        }
        true
    }

    /// Journals faults: the first of a device at once, further ones now and then, since there may be thousands a second.
    pub(super) fn write_faults(&mut self) {
        let Some(shop) = &mut self.shop else { return };
        for id in std::mem::take(&mut self.unwritten) {
            if let Some(fault) = self.faults.get(&id) {
                shop.note(&crate::record::Entry::Fault { id, fault: Box::new(fault.clone()) });
            }
        }
    }

    /// QEMU says, or was seen, not to have a device any more.
    pub(super) fn deleted(&mut self, id: &DeviceId) {
        match self.stages.get(id) {
            None => {}
            Some(Stage::Arriving) => drop(self.early.insert(id.clone())),
            Some(Stage::Present) => {
                warn!(device = %id, "the device left without being asked to");
                self.stages.insert(id.clone(), Stage::Leaving);
                self.departures.insert(id.clone(), super::plug::Departure::new());
                self.queue_clear(id);
            }
            Some(Stage::Leaving) => self.queue_clear(id),
        }
    }

    fn queue_clear(&mut self, id: &DeviceId) {
        let queued = self.queue.iter().any(|job| matches!(job, Job::Clear(other) if other == id));
        let departure = self.departures.entry(id.clone()).or_insert_with(super::plug::Departure::new);
        if !queued && !departure.clearing {
            departure.clearing = true;
            self.queue.push_back(Job::Clear(id.clone()));
        }
    }
}
