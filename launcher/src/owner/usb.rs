//! The host's USB devices that the VM has: whether they are still plugged into the host, whether QEMU has them, and whether the guest uses a disk
//! that is to leave. QEMU follows them by itself when they come back on their port; this only tells.

use std::collections::BTreeMap;

use devices::usb::UsbNeed;
use devices::{DeviceId, Placed};
use serde_json::json;
use tracing::{info, warn};

use super::{Finished, Owner, Reply};
use crate::host::sysfs::Sysfs;
use crate::host::usb::facts::Plugged;
use crate::host::usb::usage::Usage;
use crate::record::Stage;
use crate::request::{Class, Detach, Failure};
use crate::snapshot::freeze;
use crate::status::{UsbState, UsbStatus, VmState};

/// What is known of the host's USB devices that the VM has.
#[derive(Debug, Default)]
pub(super) struct Usb {
    /// What is plugged into their ports.
    plugged: BTreeMap<DeviceId, Option<Plugged>>,
    /// Whether QEMU has them.
    attached: BTreeMap<DeviceId, bool>,
    /// What was last said of them.
    said: BTreeMap<DeviceId, UsbState>,
}

impl Usb {
    fn state(&self, placed: &Placed, need: &UsbNeed) -> (UsbState, Option<Plugged>) {
        // What was not looked at yet was there a moment ago.
        let Some(plugged) = self.plugged.get(&placed.id).copied() else { return (UsbState::Attached, None) };
        let is_same = |plugged: &Plugged| (plugged.vendor, plugged.product) == (need.vendor, need.product);
        let state = match &plugged {
            None => UsbState::Gone,
            Some(other) if !is_same(other) && !need.by_port => UsbState::Other,
            Some(_) if self.attached.get(&placed.id) == Some(&false) => UsbState::Waiting,
            Some(_) => UsbState::Attached,
        };
        (state, plugged)
    }

    /// The status of a device, if it is one of the host's.
    pub(super) fn status(&self, placed: &Placed) -> Option<UsbStatus> {
        let need = placed.usb()?;
        let (state, plugged) = self.state(placed, need);
        Some(UsbStatus {
            state,
            bus: need.bus,
            port: need.port.to_string(),
            device: plugged.map(|plugged| plugged.device),
            vendor: format!("{:04x}", plugged.map_or(need.vendor, |plugged| plugged.vendor)),
            product: format!("{:04x}", plugged.map_or(need.product, |plugged| plugged.product)),
            serial: need.serial.clone(),
            storage: need.storage,
        })
    }

    /// What needs a person's attention.
    pub(super) fn warnings(&self, devices: &[Placed]) -> Vec<String> {
        let word = |placed: &Placed| {
            let need = placed.usb()?;
            let (id, name) = (&placed.id, need.name());
            Some(match self.state(placed, need).0 {
                UsbState::Attached => return None,
                UsbState::Gone => format!(
                    "{id}: USB device {name} is gone from the host: plugged into that port again, it is the guest's again"
                ),
                UsbState::Other => format!(
                    "{id}: another USB device is plugged in instead of {name}: it stays with the host; plug the former one in again, or \
                     `qvirt detach`"
                ),
                UsbState::Waiting => {
                    format!(
                        "{id}: USB device {name} is plugged into the host, and QEMU has not taken it: a VM that is paused gets it when it \
                         runs; else QEMU's log may say why"
                    )
                }
            })
        };
        devices.iter().filter_map(word).collect()
    }

    /// Whether it is not plugged into the host any more.
    pub(super) fn is_gone(&self, id: &DeviceId) -> bool {
        self.plugged.get(id) == Some(&None)
    }

    pub(super) fn forget(&mut self, id: &DeviceId) {
        self.plugged.remove(id);
        self.attached.remove(id);
        self.said.remove(id);
    }

    pub(super) fn learn(&mut self, attached: BTreeMap<DeviceId, bool>) {
        self.attached.extend(attached);
    }
}

impl Owner {
    /// Ids of the host's USB devices.
    pub(super) fn usb_ids(&self) -> Vec<DeviceId> {
        let devices = self.layout.devices().iter().filter(|placed| placed.usb().is_some());
        devices.map(|placed| placed.id.clone()).collect()
    }

    /// Looks at the ports of the host's USB devices, and asks QEMU where something has changed or is open.
    pub(super) fn watch_usb(&mut self) {
        let sysfs = Sysfs::default();
        let mut ask = false;
        for placed in self.layout.devices() {
            let Some(need) = placed.usb() else { continue };
            let plugged = sysfs.usb_plugged(need.bus, &need.port);
            let before = self.usb.plugged.insert(placed.id.clone(), plugged);
            ask |= before.is_some_and(|before| before != plugged);
            ask |= self.usb.state(placed, need).0 == UsbState::Waiting;
        }
        if ask {
            self.look();
        }
    }

    /// Tells of what has changed, once QEMU was asked. It takes no device while the VM does not run, and that is no news.
    pub(super) fn tell_usb(&mut self) {
        if self.run != VmState::Running {
            return;
        }
        let mut told = Vec::new();
        for placed in self.layout.devices() {
            let Some(need) = placed.usb() else { continue };
            let (state, _) = self.usb.state(placed, need);
            let before = self.usb.said.insert(placed.id.clone(), state);
            if before.unwrap_or(UsbState::Attached) != state {
                told.push((placed.id.clone(), need.name(), state));
            }
        }
        for (id, name, state) in told {
            match state {
                UsbState::Attached => info!(device = %id, name, "the USB device is the guest's again"),
                state => warn!(device = %id, name, %state, "the USB device has left the guest"),
            }
            self.announce("QVIRT_USB", json!({"device": id.as_str(), "host": name, "state": state}));
        }
    }

    /// Asks a device to leave, a USB disk of the host after a look whether the guest uses it.
    pub(super) fn detach_unused(&mut self, detach: Detach, reply: Reply) {
        let is_disk = |placed: &&Placed| {
            placed.usb().is_some_and(|usb| usb.storage)
                && self.stages.get(&placed.id) == Some(&Stage::Present)
                && !self.usb.is_gone(&placed.id)
        };
        let disk = self.layout.device(&detach.id).filter(is_disk);
        let Some(need) = disk.and_then(Placed::usb).filter(|_| !detach.force).cloned() else {
            return self.detach(&detach, None, reply);
        };
        let agent = freeze::channel(&self.layout).ok();
        self.jobs.spawn(async move {
            let usage = Usage::look(&need, agent).await;
            Finished::Usage(detach, need.name(), usage, reply)
        });
    }

    /// The guest's use of a disk was looked at.
    pub(super) fn on_usage(&mut self, detach: &Detach, name: &str, usage: &Usage, reply: Reply) {
        let id = &detach.id;
        if usage.is_use() {
            let desc = format!(
                "{id}: the guest uses USB disk {name} ({usage}): unmount it there, or say --force, which may damage its files"
            );
            return drop(reply.send(Err(Failure::new(Class::Refused, desc))));
        }
        let warning = format!(
            "{id}: what the guest had not yet written to USB disk {name} is lost; all that could be seen: {usage}"
        );
        self.detach(detach, Some(warning), reply);
    }
}
