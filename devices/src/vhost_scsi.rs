//! vhost-scsi: a SCSI controller that the host's kernel serves, with the LUNs of one of its targets. QEMU sees none of the I/O.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::address::{Address, PciSeat};
use crate::host::{HostNeed, ScsiTargets};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{DeviceSpec, Frontend, props};
use crate::text::{TextError, by_text};

/// The name of a target: what the kernel's vhost-scsi takes for one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wwpn(String);

impl Wwpn {
    /// Longest name, in bytes (`TRANSPORT_IQN_LEN`, with its end).
    const MAX: usize = 223;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Wwpn {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| Err(TextError::new("vhost-scsi target", text, rule));
        let is_hex = |digits: &str| digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let shape = match text.split_once('.') {
            Some(("naa", digits)) => is_hex(digits),
            Some(("fc" | "iqn", rest)) => !rest.is_empty(),
            _ => false,
        };
        if !shape || text.len() > Self::MAX {
            return fail(
                "write `naa.` and 16 hex digits, or a name that begins with `fc.` or `iqn.`, as under /sys/kernel/config/target/vhost",
            );
        }
        if text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
            return fail("it has no `/`, no blanks and no control characters");
        }
        Ok(Wwpn(text.to_owned()))
    }
}

impl fmt::Display for Wwpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

by_text!(Wwpn);

/// Table `[[vhost_scsi]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostScsiConfig {
    /// Default: `vscsi0`, `vscsi1`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The target.
    pub wwpn: Wwpn,
    /// The port group whose first LUN is booted: the firmware finds it by this number. With `bootindex`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_tpgt: Option<u32>,
    /// Request queues. Default: QEMU's, one a virtual CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Place in the boot order; 0 first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// PCI seat. Default: the first free root port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Why a target of the host cannot be given to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum VhostScsiError {
    #[error("the host has no /dev/vhost-scsi: load the driver (`modprobe vhost_scsi`)")]
    NoModule,
    #[error(
        "the host has no vhost-scsi target {wwpn}: it has {known}; targets are made under /sys/kernel/config/target/vhost (`targetcli` does so)"
    )]
    NoTarget { wwpn: Wwpn, known: String },
    #[error(
        "vhost-scsi target {wwpn} has no port group {wanted} to boot from: it has {known}; write one of them as boot_tpgt"
    )]
    NoGroup { wwpn: Wwpn, wanted: u32, known: String },
    #[error(
        "vhost-scsi target {wwpn} has no port group with a nexus, so the guest would see no LUN: write the initiator's name into tpgt_N/nexus under \
         /sys/kernel/config/target/vhost/{wwpn}"
    )]
    NoNexus { wwpn: Wwpn },
    #[error(
        "vhost-scsi target {wwpn} goes to {holder} of this VM: one target goes to one controller; name another"
    )]
    Taken { wwpn: Wwpn, holder: DeviceId },
}

impl VhostScsiConfig {
    /// What can be said against it.
    pub(crate) fn check(&self, id: &DeviceId, host: Option<&ScsiTargets>) -> Result<(), Refusal> {
        if self.bootindex.is_some() && self.boot_tpgt.is_none() {
            let next = "the firmware finds the LUN by its port group: write boot_tpgt = 1, or the N of the target's tpgt_N";
            return Err(Refusal::Missing { id: id.clone(), key: "boot_tpgt", next });
        }
        if self.boot_tpgt.is_some() && self.bootindex.is_none() {
            let next = "it says what is booted: write bootindex beside it";
            return Err(Refusal::Misplaced {
                id: id.clone(),
                key: "boot_tpgt",
                with: "a target without `bootindex`",
                next,
            });
        }
        let value = |key, value: String, rule: &str| {
            Err(Refusal::Value { id: id.clone(), key, value, rule: rule.to_owned() })
        };
        // The number is the SCSI target of the boot path, of which virtio-scsi has 256.
        if let Some(group) = self.boot_tpgt.filter(|group| *group > 255) {
            return value("boot_tpgt", group.to_string(), "the firmware finds groups 0 to 255");
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=1024).contains(queues)) {
            return value("queues", queues.to_string(), "write 1 to 1024");
        }
        let found = host.map_or(Ok(()), |host| self.exists(host));
        found.map_err(|source| Refusal::VhostScsi { id: id.clone(), source })
    }

    fn exists(&self, host: &ScsiTargets) -> Result<(), VhostScsiError> {
        if !host.driver {
            return Err(VhostScsiError::NoModule);
        }
        // Where they cannot be listed the kernel will say what is wrong.
        let Some(targets) = &host.targets else { return Ok(()) };
        let wwpn = self.wwpn.clone();
        let Some(groups) = targets.get(wwpn.as_str()) else {
            let known: Vec<&str> = targets.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(VhostScsiError::NoTarget { wwpn, known });
        };
        if let Some(wanted) =
            self.boot_tpgt.filter(|wanted| !groups.iter().any(|group| group.number == *wanted))
        {
            let known: Vec<String> = groups.iter().map(|group| group.number.to_string()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(VhostScsiError::NoGroup { wwpn, wanted, known });
        }
        match groups.iter().any(|group| group.nexus) {
            true => Ok(()),
            false => Err(VhostScsiError::NoNexus { wwpn }),
        }
    }

    fn descriptor(id: &DeviceId) -> String {
        id.descriptor("vhost", 0)
    }

    /// What it needs of the host.
    pub(crate) fn needs(&self, id: &DeviceId) -> Vec<HostNeed> {
        vec![HostNeed::VhostScsi { wwpn: self.wwpn.to_string(), descriptor: Self::descriptor(id) }]
    }

    /// The controller as QEMU's object.
    pub(crate) fn lower(&self, id: &DeviceId, address: &Address) -> DeviceSpec {
        let Address::Pci(seat) = address else { unreachable!("a controller claims a PCI seat and gets one") };
        let frontend = props(json!({
            "driver": "vhost-scsi-pci",
            "id": id.as_str(),
            "bus": seat.bus(),
            "addr": seat.addr(),
            "wwpn": self.wwpn.as_str(),
            "vhostfd": Self::descriptor(id),
            "boot_tpgt": self.boot_tpgt,
            "num_queues": self.queues,
            "bootindex": self.bootindex,
        }));
        DeviceSpec {
            id: id.clone(),
            backends: Vec::new(),
            frontend: Some(Frontend(frontend)),
            companions: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named_as_the_kernel_names_them() {
        for good in ["naa.5001405bd4e8dead", "fc.2100001b32000000", "iqn.2003-01.org.example:t,1"] {
            assert_eq!(good.parse::<Wwpn>().map(|found| found.to_string()).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "naa.",
            "naa.5001405bd4e8dea",
            "naa.5001405bd4e8deag",
            "5001405bd4e8dead",
            "iqn.",
            "iqn.a b",
            "fc.a/b",
            "eui.1",
        ] {
            assert!(bad.parse::<Wwpn>().is_err(), "{bad}");
        }
        assert!(format!("iqn.{}", "a".repeat(220)).parse::<Wwpn>().is_err());
    }
}
