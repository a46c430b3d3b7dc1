//! The PCIe side of a machine's config: how many root ports, or every one written out, and the rules for writing them.
//!
//! The root complex `pcie.0` takes no hot-plug and a root port cannot be hot-plugged itself, so ports for later are planned here,
//! before the start. Numbers follow one convention: the chassis is the controller's index (the root complex is index 0), ports count on
//! from the first, eight functions make a slot.

use serde::{Deserialize, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::address::{Function, PciSeat, Slot};
use crate::id::DeviceId;
use crate::spec::{DeviceSpec, Frontend, props};
use crate::text::words;
use crate::units::Size;

words! {
    /// A PCIe controller that can be written out.
    ControllerModel, "PCIe controller" {
        /// A hot-plug seat for one device.
        RootPort = "pcie-root-port",
        /// A bus of conventional PCI slots behind a root port.
        Bridge = "pcie-pci-bridge" | "pcie-to-pci-bridge",
    }
}

/// Table `[pcie]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcieConfig {
    /// Spare root ports beyond what the configured devices take. Default: 4. Not together with `controller`.
    pub root_ports: Option<u16>,
    /// 64-bit prefetchable window of each port, for devices with large BARs that come later.
    pub pref64_reserve: Option<Size>,
}

/// Table `[[pcie_controller]]`: one root port or bridge. What is left out is filled in by the convention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerConfig {
    /// What it is.
    pub model: ControllerModel,
    /// Position among the controllers; the first is 1, since the root complex is 0.
    pub index: Option<u16>,
    /// Id. Default: `rp` or `br` and the index.
    pub id: Option<DeviceId>,
    /// Chassis number of a root port: its index.
    pub chassis: Option<u16>,
    /// Port number of a root port: one more than the one before.
    pub port: Option<u16>,
    /// Slot of a root port on `pcie.0`.
    pub slot: Option<u16>,
    /// Function of a root port in its slot.
    pub function: Option<u16>,
    /// The root port that a bridge sits on. Default: the last one before it that is free.
    pub seat: Option<DeviceId>,
}

/// A rule for PCIe controllers, broken. The message is the rule, with both numbers.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PcieRule {
    /// Controllers are counted from 1 without gaps.
    #[error(
        "index {found} stands where {expected} is due: controllers are numbered from 1 in the order in which they are written"
    )]
    Index {
        /// What was due.
        expected: u16,
        /// What was there.
        found: u16,
    },
    /// The chassis is the index.
    #[error(
        "chassis {found} of the root port with index {index}: chassis numbers ascend and equal the index, so they skip bridges"
    )]
    Chassis {
        /// The controller's index.
        index: u16,
        /// What was there.
        found: u16,
    },
    /// Ports are consecutive.
    #[error(
        "port {found:#x} stands where {expected:#x} is due: port numbers of root ports ascend one by one, bridges do not count"
    )]
    Port {
        /// What was due.
        expected: u16,
        /// What was there.
        found: u16,
    },
    /// A function is 0 to 7.
    #[error("function {found}: a slot has functions 0 to 7")]
    Function {
        /// What was there.
        found: u16,
    },
    /// Slots fill up before the next begins.
    #[error(
        "slot {slot:#04x} function {function} stands where slot {expected_slot:#04x} function {expected_function} is due: \
             eight functions make a slot, and only when it is full the next slot begins"
    )]
    Place {
        /// Slot that was there.
        slot: u16,
        /// Function that was there.
        function: u16,
        /// Slot that was due.
        expected_slot: u16,
        /// Function that was due.
        expected_function: u16,
    },
    /// Slots on the root complex.
    #[error(
        "slot {found:#04x}: root ports use slots 0x01 to 0x1e of pcie.0; 0x00 is the host bridge and 0x1f the chipset"
    )]
    Slot {
        /// What was there.
        found: u16,
    },
    /// A bridge needs a port before it.
    #[error(
        "no free root port stands before the bridge with index {index}: a PCIe-to-PCI bridge sits on a root port"
    )]
    NoPort {
        /// The bridge's index.
        index: u16,
    },
    /// A bridge names a port that is not one.
    #[error("seat {found}: no root port of that id stands before this bridge, or another bridge sits on it")]
    Seat {
        /// What was there.
        found: DeviceId,
    },
    /// A bridge has no port numbers of its own, a port no seat.
    #[error("`{key}` does not belong to a {model}")]
    Key {
        /// The key.
        key: &'static str,
        /// The controller.
        model: ControllerModel,
    },
    /// Two controllers of one id.
    #[error("id {found} is taken by an earlier controller")]
    Id {
        /// The id.
        found: DeviceId,
    },
}

/// A root port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RootPort {
    /// Its id, and the name of the bus behind it.
    pub id: DeviceId,
    /// Unique in the machine.
    pub chassis: u8,
    /// Number in the port's link capabilities.
    pub port: u8,
    /// Slot on `pcie.0`.
    pub slot: Slot,
    /// Function in the slot.
    pub function: Function,
    /// Prefetchable window to reserve, if asked for.
    pub pref64_reserve: Option<Size>,
}

/// A PCIe-to-PCI bridge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bridge {
    /// Its id, and the name of the bus behind it.
    pub id: DeviceId,
    /// The root port that it sits on.
    pub seat: DeviceId,
}

impl RootPort {
    /// Spare root ports when the config does not say.
    pub const DEFAULT_SPARE: u16 = 4;

    /// As QEMU's object. Only function 0 says `multifunction`. `io-reserve=0`: the 64 KiB of I/O space is enough for some 14 ports, and
    /// modern virtio and vfio devices need none.
    pub fn lower(&self) -> DeviceSpec {
        let frontend = props(json!({
            "driver": "pcie-root-port",
            "id": self.id.as_str(),
            "bus": "pcie.0",
            "addr": PciSeat::Root(self.slot, self.function).addr(),
            "chassis": self.chassis,
            "port": self.port,
            "multifunction": (self.function.0 == 0).then_some(true),
            "io-reserve": 0,
            "pref64-reserve": self.pref64_reserve.map(Size::as_bytes),
        }));
        DeviceSpec {
            id: self.id.clone(),
            backends: Vec::new(),
            frontend: Some(Frontend(frontend)),
            companions: Vec::new(),
        }
    }
}

impl Bridge {
    /// As QEMU's object.
    pub fn lower(&self) -> DeviceSpec {
        let frontend = props(json!({
            "driver": "pcie-pci-bridge",
            "id": self.id.as_str(),
            "bus": self.seat.as_str(),
            "addr": "00.0",
        }));
        DeviceSpec {
            id: self.id.clone(),
            backends: Vec::new(),
            frontend: Some(Frontend(frontend)),
            companions: Vec::new(),
        }
    }
}

/// Controllers written out, checked against every rule and filled in. An error names the position of the controller at fault.
pub fn written_out(
    controllers: &[ControllerConfig],
    pref64: Option<Size>,
) -> Result<(Vec<RootPort>, Vec<Bridge>), (usize, PcieRule)> {
    let (mut ports, mut bridges) = (Vec::<RootPort>::new(), Vec::<Bridge>::new());
    for (position, config) in controllers.iter().enumerate() {
        let index = u16::try_from(position + 1).unwrap_or(u16::MAX);
        let taken = |id: &DeviceId| ports.iter().any(|p| p.id == *id) || bridges.iter().any(|b| b.id == *id);
        let at = |rule| (position, rule);
        if let Some(found) = config.index.filter(|i| *i != index) {
            return Err(at(PcieRule::Index { expected: index, found }));
        }
        if let Some(found) = config.id.clone().filter(|id| taken(id)) {
            return Err(at(PcieRule::Id { found }));
        }
        match config.model {
            ControllerModel::RootPort => {
                ports.push(root_port(config, index, ports.last(), pref64).map_err(at)?)
            }
            ControllerModel::Bridge => bridges.push(bridge(config, index, &ports, &bridges).map_err(at)?),
        }
    }
    Ok((ports, bridges))
}

fn root_port(
    config: &ControllerConfig,
    index: u16,
    last: Option<&RootPort>,
    pref64: Option<Size>,
) -> Result<RootPort, PcieRule> {
    if config.seat.is_some() {
        return Err(PcieRule::Key { key: "seat", model: config.model });
    }
    let chassis = config.chassis.unwrap_or(index);
    let chassis = u8::try_from(chassis)
        .ok()
        .filter(|_| chassis == index)
        .ok_or(PcieRule::Chassis { index, found: chassis })?;
    if let Some(found) = config.function.filter(|f| *f > 7) {
        return Err(PcieRule::Function { found });
    }
    let due = last.map_or((config.slot.unwrap_or(1), 0), |l| match l.function.0 {
        7 => (u16::from(l.slot.0) + 1, 0),
        function => (u16::from(l.slot.0), u16::from(function) + 1),
    });
    let (slot, function) = (config.slot.unwrap_or(due.0), config.function.unwrap_or(due.1));
    if !(0x01..=0x1e).contains(&slot) {
        return Err(PcieRule::Slot { found: slot });
    }
    if (slot, function) != due {
        return Err(PcieRule::Place { slot, function, expected_slot: due.0, expected_function: due.1 });
    }
    let expected = last.map_or(config.port.unwrap_or(slot << 3 | function), |l| u16::from(l.port) + 1);
    let port = config.port.unwrap_or(expected);
    let port = u8::try_from(port)
        .ok()
        .filter(|_| port == expected)
        .ok_or(PcieRule::Port { expected, found: port })?;
    Ok(RootPort {
        id: config.id.clone().unwrap_or_else(|| DeviceId::numbered("rp", index.into())),
        chassis,
        port,
        // Both were checked against their ranges above.
        slot: Slot(slot as u8),
        function: Function(function as u8),
        pref64_reserve: pref64,
    })
}

fn bridge(
    config: &ControllerConfig,
    index: u16,
    ports: &[RootPort],
    bridges: &[Bridge],
) -> Result<Bridge, PcieRule> {
    let own = [
        ("chassis", config.chassis),
        ("port", config.port),
        ("slot", config.slot),
        ("function", config.function),
    ];
    if let Some((key, _)) = own.iter().find(|(_, value)| value.is_some()) {
        return Err(PcieRule::Key { key, model: config.model });
    }
    let free = |port: &&RootPort| bridges.iter().all(|b| b.seat != port.id);
    let seat = match &config.seat {
        Some(seat) => {
            ports.iter().filter(free).find(|p| p.id == *seat).ok_or(PcieRule::Seat { found: seat.clone() })?
        }
        None => ports.iter().rev().find(free).ok_or(PcieRule::NoPort { index })?,
    };
    let id = config.id.clone().unwrap_or_else(|| DeviceId::numbered("br", index.into()));
    Ok(Bridge { id, seat: seat.id.clone() })
}
