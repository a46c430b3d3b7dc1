//! The targets of the kernel's vhost-scsi: which there are (configfs), and opening its node. Makes no target and changes none.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use devices::DeviceConfig;
use devices::host::{HostFacts, ScsiGroup, ScsiTargets};
use thiserror::Error;

use super::sysfs::{Sysfs, names, text};

const NODE: &str = "/dev/vhost-scsi";

/// Why the node could not be opened.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ScsiTargetError {
    #[error("{NODE} does not exist: load the driver (`modprobe vhost_scsi`)")]
    Missing(#[source] io::Error),
    #[error("no permission to open {NODE}: run as root, or give your group access to it by a udev rule")]
    Permission(#[source] io::Error),
    #[error("cannot open {NODE}")]
    Open(#[source] io::Error),
}

/// Adds what planning must know of the targets; nothing where no device wants one.
pub fn learn<'a>(facts: &mut HostFacts, wanted: impl IntoIterator<Item = &'a DeviceConfig>) {
    if wanted.into_iter().any(|device| matches!(device, DeviceConfig::VhostScsi(_))) {
        let targets = targets(&Sysfs::default());
        facts.scsi = Some(ScsiTargets { driver: Path::new(NODE).exists(), targets });
    }
}

/// The targets with their port groups; `None` where configfs is not there or may not be read.
fn targets(sysfs: &Sysfs) -> Option<BTreeMap<String, Vec<ScsiGroup>>> {
    let root = sysfs.path("kernel/config/target");
    if std::fs::read_dir(&root).is_err() {
        return None;
    }
    let fabric = root.join("vhost");
    // A fabric's folder has attributes beside its targets.
    let targets =
        names(&fabric).into_iter().filter(|name| name != "discovery_auth" && fabric.join(name).is_dir());
    let group = |target: &str, name: &str| {
        let number = name.strip_prefix("tpgt_")?.parse().ok()?;
        Some(ScsiGroup { number, nexus: text(&fabric.join(target).join(name).join("nexus")).is_some() })
    };
    let groups = |target: &str| {
        let mut groups: Vec<ScsiGroup> =
            names(&fabric.join(target)).iter().filter_map(|name| group(target, name)).collect();
        groups.sort_by_key(|group| group.number);
        groups
    };
    Some(targets.map(|target| (target.clone(), groups(&target))).collect())
}

/// Opens the node for QEMU. Closing it is the inverse.
///
/// # Errors
/// It is not there, or not ours to open.
pub fn open() -> Result<OwnedFd, ScsiTargetError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(NODE);
    opened.map(OwnedFd::from).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => ScsiTargetError::Missing(source),
        Some(libc::EACCES | libc::EPERM) => ScsiTargetError::Permission(source),
        _ => ScsiTargetError::Open(source),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn targets_are_listed_with_their_groups() {
        let temp = tempfile::tempdir().expect("a folder");
        let sysfs = Sysfs::below(temp.path());
        assert_eq!(targets(&sysfs), None, "no configfs");
        let fabric = temp.path().join("kernel/config/target/vhost");
        fs::create_dir_all(fabric.join("discovery_auth")).expect("made");
        fs::write(fabric.join("version"), "1").expect("written");
        for group in ["tpgt_10", "tpgt_1"] {
            fs::create_dir_all(fabric.join("naa.5001405bd4e8dead").join(group)).expect("made");
        }
        fs::write(fabric.join("naa.5001405bd4e8dead/tpgt_1/nexus"), "naa.1\n").expect("written");
        fs::create_dir_all(fabric.join("naa.5001405bd4e8beef")).expect("made");
        let found = targets(&sysfs).expect("there is configfs");
        let groups = vec![ScsiGroup { number: 1, nexus: true }, ScsiGroup { number: 10, nexus: false }];
        let expected =
            [("naa.5001405bd4e8beef".to_owned(), Vec::new()), ("naa.5001405bd4e8dead".to_owned(), groups)];
        assert_eq!(found, expected.into());
    }
}
