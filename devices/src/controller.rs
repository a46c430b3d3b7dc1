//! What other devices stand on: virtio-scsi and virtio-serial controllers, made when a device needs one or written out, and iothreads.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::address::{Address, PciSeat};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{Backend, DeviceSpec, Frontend, props};

/// Table `[[scsi_controller]]`: a virtio-scsi controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScsiControllerConfig {
    /// Default: `scsi0`, `scsi1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The iothread that does the I/O of its disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iothread: Option<DeviceId>,
    /// Request queues. Default: QEMU's, one a virtual CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// PCI seat. Default: the first free root port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Table `[[virtio_serial]]`: a virtio-serial controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioSerialConfig {
    /// Default: `vser0`, `vser1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// PCI seat. Default: the first free root port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

/// Table `[[iothread]]`: a thread of QEMU for the I/O of disks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IothreadConfig {
    /// Default: `io0`, `io1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
}

impl ScsiControllerConfig {
    pub(crate) fn check(&self, id: &DeviceId) -> Result<(), Refusal> {
        match self.queues.filter(|q| !(1..=1024).contains(q)) {
            Some(queues) => {
                let (value, rule) = (queues.to_string(), "write 1 to 1024".to_owned());
                Err(Refusal::Value { id: id.clone(), key: "queues", value, rule })
            }
            None => Ok(()),
        }
    }

    pub(crate) fn lower(&self, id: &DeviceId, address: &Address) -> DeviceSpec {
        pci(
            id,
            address,
            json!({
                "driver": "virtio-scsi-pci",
                "id": id.as_str(),
                "iothread": self.iothread.as_ref().map(DeviceId::as_str),
                "num_queues": self.queues,
            }),
        )
    }
}

impl VirtioSerialConfig {
    pub(crate) fn lower(&self, id: &DeviceId, address: &Address) -> DeviceSpec {
        pci(id, address, json!({"driver": "virtio-serial-pci", "id": id.as_str()}))
    }
}

impl IothreadConfig {
    pub(crate) fn lower(&self, id: &DeviceId) -> DeviceSpec {
        let object = props(json!({"qom-type": "iothread", "id": id.as_str()}));
        DeviceSpec {
            id: id.clone(),
            backends: vec![Backend::Object(object)],
            frontend: None,
            companions: Vec::new(),
        }
    }
}

fn pci(id: &DeviceId, address: &Address, mut members: serde_json::Value) -> DeviceSpec {
    let Address::Pci(seat) = address else { unreachable!("a controller claims a PCI seat and gets one") };
    members["bus"] = seat.bus().into();
    members["addr"] = seat.addr().into();
    DeviceSpec {
        id: id.clone(),
        backends: Vec::new(),
        frontend: Some(Frontend(props(members))),
        companions: Vec::new(),
    }
}
