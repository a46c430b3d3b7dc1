//! What QEMU says that it has: devices, and behind a USB device that of the host.

use devices::Placed;
use qmp_client::Qmp;
use serde_json::{Value, json};

use super::{StepError, Workshop, aside};
use crate::host::usb::taken;
use crate::record::{Entry, Memory};

impl Workshop {
    /// QEMU makes the device also when it cannot have that of the host. It takes those only while the VM runs, so a paused one has it later.
    pub(super) async fn verify_usb(&self, device: &Placed) -> Result<(), StepError> {
        let Some(usb) = device.usb() else { return Ok(()) };
        let status = self.qmp.call("query-status", Value::Null).await;
        let status = status.map_err(|source| StepError::Qmp { command: "query-status", source })?;
        if status["running"] != true || usb_attached(&self.qmp, device.id.as_str()).await? {
            return Ok(());
        }
        let (usb, qemu) = (usb.clone(), self.qemu_pid());
        aside(move || Err(taken::not_taken(&usb, qemu).into())).await
    }

    /// The process of QEMU, as the journal knows it.
    fn qemu_pid(&self) -> Option<u32> {
        let entries = crate::journal::read_only::<Entry>(&self.host.run_dir.join("journal")).ok()??.1;
        Memory::of(entries).identity.map(|identity| identity.pid)
    }
}

/// Whether a USB device of QEMU is plugged in: one of the host is not while the host does not have it, or does not give it.
pub async fn usb_attached(qmp: &Qmp, id: &str) -> Result<bool, StepError> {
    let arguments = json!({"path": format!("/machine/peripheral/{id}"), "property": "attached"});
    let reply = qmp.call("qom-get", arguments).await;
    let reply = reply.map_err(|source| StepError::Qmp { command: "qom-get", source })?;
    Ok(reply.as_bool().unwrap_or(false))
}

/// Ids of all devices that were given one.
pub async fn peripherals(qmp: &Qmp) -> Result<Vec<String>, StepError> {
    let reply = qmp.call("qom-list", json!({"path": "/machine/peripheral"})).await;
    let reply = reply.map_err(|source| StepError::Qmp { command: "qom-list", source })?;
    let children = reply
        .as_array()
        .into_iter()
        .flatten()
        .filter(|p| p["type"].as_str().is_some_and(|t| t.starts_with("child<")));
    Ok(children.filter_map(|p| p["name"].as_str()).map(str::to_owned).collect())
}
