//! Devices of the host that go to one device of one guest: which are taken in this machine, and what of theirs becomes the config's.

use super::{Layout, Placed};
use crate::device::DeviceConfig;
use crate::disk::Storage;
use crate::host::HostNeed;
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{Backend, Fdset};
use crate::units::Mac;
use crate::vdpa::VdpaError;
use crate::vhost_scsi::VhostScsiError;

/// A vDPA NIC has the host device's own address, if none is asked for.
pub(super) fn adopt_mac(config: &mut DeviceConfig, storage: &Storage) {
    if let DeviceConfig::Vdpa(vdpa) = config
        && vdpa.is_nic()
        && vdpa.mac.is_none()
    {
        vdpa.mac = storage.vdpa.as_ref().and_then(|device| device.mac);
    }
}

impl Layout {
    /// Whether another device of this machine has the same one of the host.
    pub(super) fn check_host_devices(
        &self,
        id: &DeviceId,
        config: &DeviceConfig,
        storage: &Storage,
    ) -> Result<(), Refusal> {
        let has = |wanted: &dyn Fn(&HostNeed) -> bool| {
            self.devices.iter().find(|device| device.needs.iter().any(wanted)).map(|device| device.id.clone())
        };
        let id = id.clone();
        match (config, &storage.vdpa) {
            (DeviceConfig::Vdpa(_), Some(device)) => {
                let name = device.name.clone();
                match has(&|need| matches!(need, HostNeed::Vdpa { name: other, .. } if *other == name)) {
                    Some(holder) => Err(Refusal::Vdpa { id, source: VdpaError::Taken { name, holder } }),
                    None => Ok(()),
                }
            }
            (DeviceConfig::VhostScsi(scsi), _) => {
                let wwpn = scsi.wwpn.clone();
                match has(
                    &|need| matches!(need, HostNeed::VhostScsi { wwpn: other, .. } if *other == wwpn.as_str()),
                ) {
                    Some(holder) => {
                        Err(Refusal::VhostScsi { id, source: VhostScsiError::Taken { wwpn, holder } })
                    }
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// The lowest number of a descriptor set that no device has.
    pub(super) fn free_fdset(&self) -> u32 {
        let has = |number: u32| {
            let of = |device: &Placed| {
                let mut backends = device.spec.backends.iter();
                backends.any(|backend| matches!(backend, Backend::Fdset(set) if set.number == number))
            };
            self.devices.iter().any(of)
        };
        (Fdset::FIRST..).find(|number| !has(*number)).expect("numbers do not run out")
    }
}

/// The address that the guest sees of it, if the machine must have it once.
pub(super) fn mac(config: &DeviceConfig) -> Option<Mac> {
    match config {
        DeviceConfig::Nic(nic) => nic.mac,
        DeviceConfig::Vdpa(vdpa) => vdpa.mac,
        _ => None,
    }
}
