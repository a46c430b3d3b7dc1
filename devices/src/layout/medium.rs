//! Another medium in a CD-ROM drive: the drive as it will be then.

use super::check::{check, check_spec, needs};
use super::{Layout, Placed};
use crate::capabilities::Capabilities;
use crate::device::DeviceConfig;
use crate::host::{Format, HostFacts};
use crate::refusal::Refusal;

/// What is put into a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMedium {
    /// Absolute path of the image.
    pub path: String,
    /// Its format, if it is given.
    pub format: Option<Format>,
}

impl Layout {
    /// The drive of an id or target label with that medium in it, or with none. Its nodes have the next generations; its seat and all else stay.
    pub fn with_medium(
        &self,
        name: &str,
        medium: Option<NewMedium>,
        host: &HostFacts,
        qemu: &Capabilities,
    ) -> Result<Placed, Refusal> {
        let drive = self.expect_device(name)?.clone();
        let id = drive.id.clone();
        let mut disk = match &drive.config {
            DeviceConfig::Disk(disk) if disk.is_cdrom() => disk.clone(),
            other => {
                let rule = "only a CD-ROM drive, a disk with device = \"cdrom\", takes a medium".to_owned();
                return Err(Refusal::Value {
                    id,
                    key: "medium",
                    value: format!("of a {}", other.table()),
                    rule,
                });
            }
        };
        (disk.path, disk.format) = match medium {
            Some(medium) => (Some(medium.path), medium.format),
            None => (None, None),
        };
        let config = DeviceConfig::Disk(disk);
        let storage = check(&id, &config, (self.shared_memory, false), host, qemu)?;
        let spec = self.lower(&id, &config, drive.address.as_ref(), &storage, host);
        check_spec(&spec, qemu)?;
        let needs = needs(&self.vm, &id, &config, &storage, host);
        Ok(Placed { config, spec, needs, ..drive })
    }

    /// Nodes of another medium or of an overlay were made: nothing else gets their names.
    pub fn note_nodes(&mut self, disk: &Placed) {
        self.note_generation(disk);
    }

    /// Takes a device for what it is now; it has the place of the former one of its id.
    pub fn replace(&mut self, placed: Placed) {
        if let Some(former) = self.devices.iter_mut().find(|device| device.id == placed.id) {
            *former = placed;
        }
    }
}
