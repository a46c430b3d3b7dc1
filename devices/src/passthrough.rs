//! PCI functions of the host that a guest drives itself, by vfio-pci: any function (`[[vfio]]`), and a virtual function of a network card with its
//! profile (`[[vf]]`).

use serde::{Deserialize, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::address::{Address, Function, PciSeat};
use crate::bdf::HostBdf;
use crate::host::{HostFacts, HostFunction};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{Backend, DeviceSpec, Frontend, props};
use crate::units::Mac;
use crate::vf::{LinkState, Rate, VfSettings};

/// QEMU's driver.
pub(crate) const DRIVER: &str = "vfio-pci";

/// Table `[[vfio]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VfioConfig {
    /// Default: `vfio0`, `vfio1`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The host's function: `0000:04:10.1`.
    pub host: HostBdf,
    /// Whether it is bound to vfio-pci before the plug, and given back to the driver it had. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<bool>,
    /// Takes all of its IOMMU group, as one transaction.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub group: bool,
    /// A function on bus 0 of the host is a part of its chipset, as a rule, and is refused without this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_bus0: bool,
    /// Makes room for other functions in its slot of the root bus.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub multifunction: bool,
    /// What of its option ROM the guest sees: `on` (default), `off`, or the path of a file instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rom: Option<String>,
    /// Place in the boot order: its ROM boots by PXE or from an HBA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// PCI seat. Default: the first free root port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Table `[[vf]]`. One of `host` and `pf` says which.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VfConfig {
    /// Default: `vf0`, `vf1`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The virtual function: `0000:06:11.6`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostBdf>,
    /// A free one of this physical function: its interface or its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pf: Option<String>,
    /// Whether it is bound to vfio-pci before the plug, and given back to the driver it had. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<bool>,
    /// Default: derived from the names of VM and device, always the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Leaves it without an address, for the guest to choose.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub null_mac: bool,
    /// VLAN of all its frames: 1 to 4094; 0 takes away one that was set. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Priority of the VLAN: 0 to 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// Rate that it is promised. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_min: Option<Rate>,
    /// Rate that it is held to. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_max: Option<Rate>,
    /// Whether frames with a foreign source address are dropped. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoofchk: Option<bool>,
    /// Whether the card trusts the guest. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// How its link follows the physical function's. Default: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// As of `[[vfio]]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rom: Option<String>,
    /// Place in the boot order (PXE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// PCI seat. Default: the first free root port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Why a function of the host cannot be passed through.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum PassthroughError {
    #[error(
        "{host} is on bus 0, with the host's own chipset: write allow_bus0 = true if it really is to go to the guest"
    )]
    BusZero { host: HostBdf },
    #[error("the host has no PCI device {host}: `qvirt host pci` lists them")]
    NoDevice { host: HostBdf },
    #[error(
        "{host} is in no IOMMU group, so it cannot be given away: switch the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU), and on \
         Intel boot the kernel with intel_iommu=on"
    )]
    NoIommu { host: HostBdf },
    #[error("{host} is a bridge, which stays with the host: name a device behind it")]
    Bridge { host: HostBdf },
    #[error("{host} is given to {holder} already: name another")]
    Taken { host: HostBdf, holder: DeviceId },
    #[error(
        "{host} has {driver}, and managed = false leaves it so: bind it to vfio-pci first (`qvirt host bind {host}`), or leave `managed` out"
    )]
    NotBound { host: HostBdf, driver: String },
    #[error(
        "{host} shares IOMMU group {group} with {members}: take them from the host too (group = true gives the guest the whole group)"
    )]
    Shared { host: HostBdf, group: u32, members: String },
    #[error(
        "{host} is no virtual function: use [[vfio]] for it, or name one (`qvirt host pci --vfs` lists them)"
    )]
    NoVf { host: HostBdf },
    #[error(
        "there is no physical function {pf}: name its interface or its address (`qvirt host pci` lists them)"
    )]
    NoPf { pf: String },
    #[error("{pf} has no free virtual function, {why}: `qvirt host sriov {pf} --vfs N` makes them")]
    NoFreeVf { pf: String, why: String },
    #[error(
        "{host}: its physical function {pf} tells nothing of it: bring the interface of {pf} up, or pass it through by [[vfio]]"
    )]
    NoProfile { host: HostBdf, pf: HostBdf },
}

impl VfioConfig {
    /// A member of a group that is taken whole.
    pub(crate) fn of_group(host: HostBdf, id: DeviceId) -> VfioConfig {
        VfioConfig {
            id: Some(id),
            host,
            managed: None,
            group: false,
            allow_bus0: true,
            multifunction: false,
            rom: None,
            bootindex: None,
            seat: None,
        }
    }

    pub(crate) fn check(&self, id: &DeviceId) -> Result<(), Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        if self.multifunction && !matches!(self.seat, Some(PciSeat::Root(_, Function(0)))) {
            let next = "write the seat of its function 0, such as seat = \"pcie.0:05.0\"";
            return misplaced("multifunction", "a seat that is not function 0 of the root bus", next);
        }
        if self.group && self.managed == Some(false) {
            return misplaced(
                "group",
                "managed = false",
                "a group is taken by binding its members: leave `managed` out",
            );
        }
        check_rom(id, self.rom.as_deref(), self.bootindex)
    }

    pub(crate) fn lower(&self, id: &DeviceId, address: &Address, iommufd: bool) -> DeviceSpec {
        let rom = Rom { rom: self.rom.as_deref(), bootindex: self.bootindex };
        lower(id, address, self.host, rom, self.multifunction, iommufd)
    }
}

impl VfConfig {
    pub(crate) fn check(&self, id: &DeviceId) -> Result<(), Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        match self {
            Self { host: None, pf: None, .. } => {
                let next =
                    "write the address of a virtual function, or pf = \"eth0\" for a free one of that card";
                return Err(Refusal::Missing { id: id.clone(), key: "host", next });
            }
            Self { host: Some(_), pf: Some(_), .. } => return misplaced("pf", "`host`", "write one of them"),
            Self { null_mac: true, mac: Some(_), .. } => {
                return misplaced("null_mac", "`mac`", "write one of them");
            }
            _ => {}
        }
        if let Err((key, value, rule)) = self.settings().check() {
            return Err(Refusal::Value { id: id.clone(), key, value, rule: rule.to_owned() });
        }
        check_rom(id, self.rom.as_deref(), self.bootindex)
    }

    /// What of its profile is to be set. The address was filled in when it was planned.
    pub(crate) fn settings(&self) -> VfSettings {
        VfSettings {
            mac: if self.null_mac { Some(None) } else { self.mac.map(Some) },
            vlan: self.vlan,
            qos: self.qos,
            rate_min: self.rate_min,
            rate_max: self.rate_max,
            spoofchk: self.spoofchk,
            trust: self.trust,
            link_state: self.link_state,
        }
    }

    pub(crate) fn lower(&self, id: &DeviceId, address: &Address, host: HostBdf, iommufd: bool) -> DeviceSpec {
        let rom = Rom { rom: self.rom.as_deref(), bootindex: self.bootindex };
        lower(id, address, host, rom, false, iommufd)
    }
}

/// The file of an option ROM, if that is what a `rom` key names.
pub(crate) fn rom_file(rom: &mut Option<String>) -> Option<&mut String> {
    rom.as_mut().filter(|rom| !matches!(rom.as_str(), "on" | "off"))
}

fn check_rom(id: &DeviceId, rom: Option<&str>, bootindex: Option<u32>) -> Result<(), Refusal> {
    match rom {
        Some("off") if bootindex.is_some() => Err(Refusal::Misplaced {
            id: id.clone(),
            key: "bootindex",
            with: "rom = \"off\"",
            next: "it is the ROM that boots: leave `rom` out",
        }),
        Some("") => Err(Refusal::Value {
            id: id.clone(),
            key: "rom",
            value: "\"\"".to_owned(),
            rule: "write \"on\", \"off\", or the path of a ROM file".to_owned(),
        }),
        _ => Ok(()),
    }
}

struct Rom<'a> {
    rom: Option<&'a str>,
    bootindex: Option<u32>,
}

fn lower(
    id: &DeviceId,
    address: &Address,
    host: HostBdf,
    rom: Rom<'_>,
    multifunction: bool,
    iommufd: bool,
) -> DeviceSpec {
    let Address::Pci(seat) = address else { unreachable!("a passthrough claims a PCI seat and gets one") };
    let object = format!("{id}-iommufd");
    let backends = match iommufd {
        true => vec![Backend::Object(props(json!({"qom-type": "iommufd", "id": object})))],
        false => Vec::new(),
    };
    let frontend = props(json!({
        "driver": DRIVER,
        "id": id.as_str(),
        "bus": seat.bus(),
        "addr": seat.addr(),
        "host": host.to_string(),
        "multifunction": multifunction.then_some(true),
        "iommufd": iommufd.then_some(object),
        "bootindex": rom.bootindex,
        "rombar": (rom.rom == Some("off")).then_some(0),
        "romfile": rom.rom.filter(|rom| !matches!(*rom, "on" | "off")),
    }));
    DeviceSpec { id: id.clone(), backends, frontend: Some(Frontend(frontend)), companions: Vec::new() }
}

/// Vendor and devices of the accelerators that the kernel offers by its uacce class, PF and VF of each: HPRE, SEC, ZIP.
const HUAWEI: u16 = 0x19e5;
const ACCELERATORS: [u16; 6] = [0xa258, 0xa259, 0xa255, 0xa256, 0xa250, 0xa251];

impl HostFunction {
    /// Whether it is an accelerator that takes no hot-plug.
    pub fn is_accelerator(&self) -> bool {
        self.uacce || self.vendor == HUAWEI && ACCELERATORS.contains(&self.device)
    }

    /// Whether a VFIO driver has it.
    pub fn is_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }

    /// The driver that is in the way of the other members of its group.
    pub fn in_the_way(&self) -> Option<&str> {
        self.driver.as_deref().filter(|driver| !self.bridge && is_of_the_host(driver))
    }
}

/// `vfio-pci`, or a vendor's own, such as `mlx5_vfio_pci`.
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Whether a driver holds its device for the host, and so is in the way of all members of the IOMMU group.
pub fn is_of_the_host(driver: &str) -> bool {
    !is_vfio(driver) && !["pci-stub", "pcieport"].contains(&driver)
}

impl HostFacts {
    /// The physical function of that interface or address.
    pub(crate) fn pf(&self, name: &str) -> Option<HostBdf> {
        let is_it = |(bdf, function): &(&HostBdf, &HostFunction)| {
            function.vfs_max.is_some()
                && (function.netdevs.iter().any(|netdev| netdev == name) || name.parse() == Ok(**bdf))
        };
        self.pci.iter().find(is_it).map(|(bdf, _)| *bdf)
    }
}
