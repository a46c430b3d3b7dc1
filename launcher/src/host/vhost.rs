//! vhost-net: the kernel moves a NIC's packets, without QEMU in between.
//!
//! Owns opening its node, once for each queue. Closing the descriptors is the inverse.

use std::{
    fs::OpenOptions,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Why vhost-net could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The driver is not there.
    #[error("{} does not exist: load the driver (`modprobe vhost_net`), or set `vhost = false`", node.display())]
    Missing {
        /// The driver's node.
        node: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Not allowed.
    #[error("no permission to open {}: run as root, give your group access to it (often `kvm`), or set `vhost = false`", node.display())]
    Permission {
        /// The driver's node.
        node: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot open {} for queue {queue}: set `vhost = false` to do without it", node.display())]
    Open {
        /// The driver's node.
        node: PathBuf,
        /// Which queue, counted from 1.
        queue: u16,
        /// The system's error.
        source: io::Error,
    },
}

/// Opens `/dev/vhost-net` once for each of `queues` queues; the descriptors are closed on exec.
pub fn open_vhost_net(queues: u16) -> Result<Vec<OwnedFd>, VhostError> {
    open_node(Path::new("/dev/vhost-net"), queues)
}

fn open_node(node: &Path, queues: u16) -> Result<Vec<OwnedFd>, VhostError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_CLOEXEC);
    (1..=queues)
        .map(|queue| {
            let file = options.open(node).map_err(|source| {
                let node = node.to_owned();
                match source.kind() {
                    io::ErrorKind::NotFound => VhostError::Missing { node, source },
                    io::ErrorKind::PermissionDenied => VhostError::Permission { node, source },
                    // The node may exist, made by udev ahead of the driver, and say ENXIO or ENODEV.
                    _ => match source.raw_os_error() {
                        Some(libc::ENXIO | libc::ENODEV) => VhostError::Missing { node, source },
                        _ => VhostError::Open { node, queue, source },
                    },
                }
            })?;
            Ok(file.into())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_descriptor_for_each_queue() {
        let fds = open_node(Path::new("/dev/null"), 3).expect("any node opens");
        assert_eq!(fds.len(), 3);
    }

    #[test]
    fn a_missing_driver_is_said_with_its_remedy() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let error = open_node(&folder.path().join("vhost-net"), 1).expect_err("missing").to_string();
        assert!(error.contains("modprobe vhost_net"), "{error}");
    }
}
