//! The status: what the owner knows of its VM, as others get to see it.

use devices::{DeviceConfig, Placed};

use super::{Born, Owner};
use crate::launch::images;
use crate::record::{Launch, Stage};
use crate::status::{DeviceStatus, LOW_WATER, Status, VmState};

impl Owner {
    /// The status of this moment, out of what is known; asks nobody.
    pub(super) fn describe(&self) -> Status {
        let devices = self.layout.devices().iter().map(|placed| DeviceStatus {
            id: placed.id.to_string(),
            kind: placed.config.table().to_owned(),
            label: placed.label().map(ToString::to_string),
            address: placed.address.as_ref().map(ToString::to_string),
            driver: placed.spec.frontend.as_ref().map(|f| f.driver().to_owned()),
            backing: placed.backing(),
            images: images(std::slice::from_ref(placed)).map(str::to_owned).collect(),
            size_bytes: self.sizes.get(&placed.id).copied(),
            size_stale: self.io.is_suspended(&placed.id),
            stage: self.stages.get(&placed.id).copied().unwrap_or(Stage::Present),
            pty: self.ptys.get(&placed.id.chardev()).cloned(),
            on_demand: placed.on_demand,
            layers: placed.layers(),
            fault: self.faults.get(&placed.id).cloned(),
            policies: placed.policies(),
            on_error: self.io.retry(&placed.id).or_else(|| placed.retry.clone()),
            io: self.io.status(&placed.id),
            usb: self.usb.status(placed),
        });
        let free = self.layout.topology().free_ports().count();
        let mut warnings: Vec<String> =
            self.held_words().into_iter().chain(self.launch.warnings.iter().cloned()).collect();
        warnings.extend(self.usb.warnings(self.layout.devices()));
        if free <= LOW_WATER {
            let ports = self.layout.topology().ports().len();
            warnings.push(format!(
                "{free} of {ports} root ports free: set a larger [pcie] root_ports before the next start"
            ));
        }
        Status {
            devices: devices.collect(),
            run: self.run.clone(),
            boot_disk: self.boot_disk(),
            foreign: self.foreign.clone(),
            warnings,
            ..self.head()
        }
    }

    /// The disk that a reset boots from: the first by boot index, or the first in the config.
    fn boot_disk(&self) -> Option<String> {
        let disks = || self.layout.devices().iter().filter(|d| matches!(d.config, DeviceConfig::Disk(_)));
        let is_hard = |d: &&Placed| matches!(&d.config, DeviceConfig::Disk(disk) if !disk.is_cdrom());
        let by_index =
            disks().filter(|d| d.config.bootindex().is_some()).min_by_key(|d| d.config.bootindex());
        let first = by_index.or_else(|| disks().find(is_hard));
        first.filter(|_| self.launch.machine.kernel.is_none()).map(|disk| disk.id.to_string())
    }

    fn head(&self) -> Status {
        let counts = self.layout.topology().counts();
        Status {
            seats: counts.into_iter().map(Into::into).collect(),
            pid: self.process.pid(),
            ..head(&self.launch)
        }
    }
}

/// The parts of a status that a launch alone tells.
fn head(launch: &Launch) -> Status {
    Status {
        generation: 0,
        vm: launch.vm.to_string(),
        uuid: launch.machine.uuid.clone(),
        run: VmState::Starting,
        pid: 0,
        owner_pid: std::process::id(),
        qemu: launch.qemu.version.clone(),
        accel: launch.accel_reason.clone(),
        since_unix_secs: launch.since_unix_secs,
        boot_disk: None,
        devices: Vec::new(),
        foreign: Vec::new(),
        seats: Vec::new(),
        warnings: Vec::new(),
    }
}

/// The status before anything is known.
pub(super) fn empty(born: &Born) -> Status {
    head(&born.launch)
}
