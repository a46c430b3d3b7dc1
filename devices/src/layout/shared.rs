//! What devices of one machine share or must not share: iothreads, boot indices, labels, MAC addresses.

use std::collections::BTreeSet;

use super::{Layout, Placed};
use crate::device::DeviceConfig;
use crate::disk::DiskConfig;
use crate::host::HostNeed;
use crate::id::{DeviceId, Label};
use crate::refusal::Refusal;
use crate::topology::Seat;
use crate::units::Mac;
use crate::usb::{UsbConfig, UsbRule};

impl Layout {
    /// Whether an iothread does the I/O of a disk: its own, or that of its controller.
    pub(super) fn is_threaded(&self, config: &DeviceConfig) -> bool {
        let DeviceConfig::Disk(disk) = config else { return false };
        let Seat::Scsi { controller, target, unit } = disk.seat() else { return disk.iothread.is_some() };
        let lun = self.topology.lun(controller, target, unit);
        let controller = lun.ok().and_then(|lun| self.topology.scsi_controller(lun.controller));
        let placed = controller.and_then(|id| self.device(id.as_str()));
        placed.is_some_and(|placed| placed.config.iothread().is_some())
    }

    /// What must be unique in the machine, and what must be there.
    pub(super) fn check_shared(&self, id: &DeviceId, config: &DeviceConfig) -> Result<(), Refusal> {
        if let Some(iothread) = config.iothread() {
            let known = self
                .devices
                .iter()
                .any(|d| d.id == *iothread && matches!(d.config, DeviceConfig::Iothread(_)));
            if !known {
                return Err(Refusal::NoIothread { id: id.clone(), iothread: iothread.clone() });
            }
        }
        if let Some(index) = config.bootindex()
            && let Some(holder) = self.devices.iter().find(|d| d.config.bootindex() == Some(index))
        {
            return Err(Refusal::BootIndexTaken { id: id.clone(), index, holder: holder.id.clone() });
        }
        Ok(())
    }

    /// A USB device of the host is given once.
    pub(super) fn check_usb(
        &self,
        id: &DeviceId,
        needs: &[HostNeed],
        config: &DeviceConfig,
    ) -> Result<(), Refusal> {
        let DeviceConfig::Usb(UsbConfig { host: Some(selector), .. }) = config else { return Ok(()) };
        let wanted =
            needs.iter().find_map(|need| if let HostNeed::Usb(usb) = need { Some(usb) } else { None });
        let same = |placed: &&Placed| {
            placed.usb().zip(wanted).is_some_and(|(a, b)| (a.bus, &a.port) == (b.bus, &b.port))
        };
        match self.devices.iter().find(same) {
            Some(holder) => {
                let source = UsbRule::Given { selector: selector.clone(), holder: holder.id.clone() };
                Err(Refusal::Usb { id: id.clone(), source })
            }
            None => Ok(()),
        }
    }

    /// Fills in what a device has by default and another device must not have: label, MAC address.
    pub(super) fn assign(&self, id: &DeviceId, config: &mut DeviceConfig) -> Result<(), Refusal> {
        match config {
            DeviceConfig::Disk(disk) => disk.target = Some(self.label(id, disk)?),
            DeviceConfig::Nic(nic) => nic.mac = Some(self.mac(id, nic.mac)?),
            DeviceConfig::Vdpa(vdpa) if vdpa.is_nic() => vdpa.mac = Some(self.mac(id, vdpa.mac)?),
            DeviceConfig::Vf(vf) if !vf.null_mac => vf.mac = Some(self.mac(id, vf.mac)?),
            _ => {}
        }
        Ok(())
    }

    /// The address that was asked for, or the one that is derived, if no other device has it.
    fn mac(&self, id: &DeviceId, wanted: Option<Mac>) -> Result<Mac, Refusal> {
        let mac = wanted.unwrap_or_else(|| Mac::derived(&self.vm, id.as_str()));
        match self.devices.iter().find(|d| d.mac() == Some(mac)) {
            Some(holder) => {
                Err(Refusal::MacTaken { id: id.clone(), mac: mac.to_string(), holder: holder.id.clone() })
            }
            None => Ok(mac),
        }
    }

    fn label(&self, id: &DeviceId, disk: &DiskConfig) -> Result<Label, Refusal> {
        let holder = |label: &Label| self.devices.iter().find(|d| d.label() == Some(label));
        match &disk.target {
            Some(label) => match holder(label) {
                Some(other) => Err(Refusal::LabelTaken {
                    id: id.clone(),
                    label: label.clone(),
                    holder: other.id.clone(),
                }),
                None => Ok(label.clone()),
            },
            None => self.free_label(id, disk, &BTreeSet::new()),
        }
    }

    /// The first label that no device has and nobody asks for.
    fn free_label(
        &self,
        id: &DeviceId,
        disk: &DiskConfig,
        asked: &BTreeSet<Label>,
    ) -> Result<Label, Refusal> {
        let prefix = disk.label_prefix();
        let held: BTreeSet<&Label> = self.devices.iter().filter_map(Placed::label).chain(asked).collect();
        let mut labels = (0..Label::COUNT).filter_map(|n| Label::numbered(prefix, n));
        labels.find(|label| !held.contains(label)).ok_or_else(|| Refusal::NoLabel { id: id.clone(), prefix })
    }

    /// Gives each disk its label, in the config's order; those that were asked for are nobody else's.
    pub(super) fn labelled(
        &self,
        mut configs: Vec<DeviceConfig>,
    ) -> Result<Vec<DeviceConfig>, (usize, Refusal)> {
        let label = |config: &DeviceConfig| match config {
            DeviceConfig::Disk(disk) => disk.target.clone(),
            _ => None,
        };
        let mut asked: BTreeSet<Label> = configs.iter().filter_map(label).collect();
        for (index, config) in configs.iter_mut().enumerate() {
            if let DeviceConfig::Disk(disk) = config
                && let (None, Some(id)) = (&disk.target, &disk.id)
            {
                let free = self.free_label(id, disk, &asked).map_err(|refusal| (index, refusal))?;
                asked.insert(free.clone());
                disk.target = Some(free);
            }
        }
        Ok(configs)
    }
}
