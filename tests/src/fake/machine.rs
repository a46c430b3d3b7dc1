//! The fake's machine: its run state, what it has, and what its guest does. The parts are in `backends.rs`, `devices.rs` and `qom.rs`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde_json::{Map, Value, json};

use super::backends::{Chardev, Node};
use super::devices::Device;
use super::rules::Guest;
use super::schema::Recorded;
use super::{Effect, Failure, State};

/// Members of a QEMU object.
pub(super) type Props = Map<String, Value>;

/// One member as text; empty where there is none.
pub(super) fn text<'a>(props: &'a Props, key: &str) -> &'a str {
    props.get(key).and_then(Value::as_str).unwrap_or("")
}

/// Everything that a command can change.
pub(super) struct Machine {
    pub(super) qemu: Recorded,
    pub(super) name: Option<String>,
    pub(super) uuid: String,
    /// QEMU's word for its run state.
    pub(super) run: String,
    pub(super) objects: BTreeMap<String, Props>,
    /// Newest last.
    pub(super) nodes: Vec<Node>,
    pub(super) netdevs: BTreeMap<String, Props>,
    pub(super) chardevs: BTreeMap<String, Chardev>,
    /// By monitor and name.
    pub(super) fds: BTreeMap<(String, String), OwnedFd>,
    pub(super) fdsets: BTreeMap<u64, Vec<(OwnedFd, Option<String>)>>,
    pub(super) devices: Vec<Device>,
    /// Counts the nodes that QEMU names itself.
    pub(super) unnamed: u32,
}

impl Machine {
    pub(super) fn new(qemu: Recorded) -> Machine {
        Machine {
            qemu,
            name: None,
            uuid: "00000000-0000-0000-0000-000000000000".to_owned(),
            run: "prelaunch".to_owned(),
            objects: BTreeMap::new(),
            nodes: Vec::new(),
            netdevs: BTreeMap::new(),
            chardevs: BTreeMap::new(),
            fds: BTreeMap::new(),
            fdsets: BTreeMap::new(),
            devices: Vec::new(),
            unnamed: 0,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.run == "running"
    }

    /// What a test compares.
    pub(super) fn state(&self) -> State {
        State {
            nodes: self.nodes.iter().map(|node| node.name.clone()).collect(),
            netdevs: self.netdevs.keys().cloned().collect(),
            chardevs: self.chardevs.keys().cloned().collect(),
            objects: self.objects.keys().cloned().collect(),
            fds: self.fds.keys().map(|(monitor, name)| format!("{monitor}:{name}")).collect(),
            fdsets: self.fdsets.keys().copied().collect(),
            devices: self.devices.iter().map(|device| device.id.clone()).collect(),
        }
    }

    /// `cont`.
    pub(super) fn cont(&mut self) -> Vec<Effect> {
        if self.is_running() {
            return Vec::new();
        }
        self.run = "running".to_owned();
        for device in &mut self.devices {
            device.io_status = "ok";
        }
        // Requests that came while it did not run are seen by the guest now.
        let asked = self.devices.iter().filter(|device| device.leaving).map(|device| device.id.clone());
        let asked: Vec<Effect> = asked.map(Effect::AskGuest).collect();
        [vec![Effect::event("RESUME", Value::Null)], asked].concat()
    }

    /// `stop`, and what else stops it.
    pub(super) fn stop(&mut self, reason: &str) -> Vec<Effect> {
        if !self.is_running() {
            return Vec::new();
        }
        self.run = reason.to_owned();
        vec![Effect::event("STOP", Value::Null)]
    }

    /// `system_reset`: also finishes the unplugs that the guest has not answered, as QEMU's ACPI does.
    pub(super) fn reset(&mut self) -> Vec<Effect> {
        let leaving = self.devices.iter().filter(|device| device.leaving).map(|device| device.id.clone());
        let leaving: Vec<String> = leaving.collect();
        let data = json!({"guest": false, "reason": "host-qmp-system-reset"});
        let mut effects = vec![Effect::event("RESET", data)];
        effects.extend(leaving.iter().flat_map(|id| self.remove(id)));
        effects
    }

    /// `device_del`: marks the device, and asks the guest if one would hear it.
    pub(super) fn unplug(&mut self, id: &str, refuse_repeats: bool) -> Result<Vec<Effect>, Failure> {
        let device = self.devices.iter_mut().find(|device| device.id == id);
        let device = device.ok_or_else(|| Failure::absent(id))?;
        if !device.hotpluggable() {
            return Err(Failure::generic(format!("Bus '{}' does not support hotplugging", device.bus)));
        }
        if device.leaving && refuse_repeats {
            return Err(Failure::generic(format!("Device {id} is already in the process of unplug")));
        }
        device.leaving = true;
        // Only PCI needs the guest's consent.
        let asks = device.slot.is_none() || self.is_running();
        Ok(if asks { vec![Effect::AskGuest(id.to_owned())] } else { Vec::new() })
    }

    /// The guest's answer to an unplug.
    pub(super) fn answer(&mut self, id: &str, guest: &Guest) -> Vec<Effect> {
        let Some(device) = self.devices.iter_mut().find(|device| device.id == id) else { return Vec::new() };
        match guest {
            Guest::Remove | Guest::Early => self.remove(id),
            Guest::Late(ms) => vec![Effect::Later(*ms, vec![Effect::Remove(id.to_owned())])],
            Guest::Refuse => {
                device.leaving = false;
                let data = json!({"device": id, "path": format!("/machine/peripheral/{id}")});
                vec![Effect::event("DEVICE_UNPLUG_GUEST_ERROR", data)]
            }
            _ => Vec::new(),
        }
    }

    /// Device `id` has done `count` more requests. Errors: there is none.
    pub(super) fn io_done(&mut self, arguments: &Props) -> Result<(), Failure> {
        let id = text(arguments, "id");
        let device = self.devices.iter_mut().find(|device| device.id == id);
        let device = device.ok_or_else(|| Failure::absent(id))?;
        device.done += arguments.get("count").and_then(Value::as_u64).unwrap_or(1);
        Ok(())
    }

    /// A disk error of device `id`. Errors: there is none, or it has no disk.
    pub(super) fn io_error(&mut self, arguments: &Props) -> Result<Vec<Effect>, Failure> {
        let id = text(arguments, "id");
        let device = self.devices.iter_mut().find(|device| device.id == id);
        let device = device.ok_or_else(|| Failure::absent(id))?;
        let nospace = arguments.get("nospace") == Some(&Value::Bool(true));
        let word = |key: &str, usual: &str| {
            let given = text(arguments, key);
            if given.is_empty() { usual.to_owned() } else { given.to_owned() }
        };
        let action = word("action", "report");
        let mut data = json!({
            "device": "", "node-name": text(&device.props, "drive"), "qom-path": device.block_path(),
            "operation": word("operation", "read"), "action": action, "nospace": nospace,
            "reason": word("reason", if nospace { "No space left on device" } else { "Input/output error" }),
        });
        if let Some(members) = data.as_object_mut() {
            if self.qemu.retries() || !self.qemu.strict() {
                members.remove("qom-path");
            }
            if self.qemu.retries() {
                members.remove("nospace");
            }
        }
        if !matches!(action.as_str(), "report" | "retry") {
            device.io_status = if nospace { "nospace" } else { "failed" };
        }
        let mut effects = vec![Effect::event("BLOCK_IO_ERROR", data)];
        if action == "stop" {
            effects.extend(self.stop("io-error"));
        }
        Ok(effects)
    }
}
