//! Overlays of running disks: a disk as it will be with one layer more, and the commands that put the layer there.
//!
//! The nodes that there are stay as they are, and under the overlay; only the device stands on another one then.

use serde_json::{Value, json};

use super::check::check_spec;
use super::{Layout, Placed};
use crate::capabilities::Capabilities;
use crate::device::DeviceConfig;
use crate::disk::DiskConfig;
use crate::host::{Access, Format, HostNeed, IoProxy, Layer};
use crate::id::{DeviceId, Generation};
use crate::refusal::Refusal;
use crate::spec::{Backend, Call};

impl Placed {
    /// The proxy in front of a disk's images.
    pub fn io_proxy(&self) -> Option<&IoProxy> {
        self.needs.iter().find_map(|need| match need {
            HostNeed::IoProxy(proxy) => Some(proxy),
            _ => None,
        })
    }

    /// The layers of a disk's image, top first; nothing for what has no image.
    pub fn layers(&self) -> Vec<Layer> {
        let nodes = self.spec.backends.iter().filter_map(|backend| match backend {
            Backend::Blockdev(props) => Some(props),
            _ => None,
        });
        let nodes: Vec<_> = nodes.collect();
        // Two nodes a layer, the bottom first: the file, then the format.
        let images = self.needs.iter().filter_map(|need| match need {
            HostNeed::Image { path, .. } => Some(path),
            _ => None,
        });
        let proxied = self.io_proxy();
        let layer = |(path, pair): (&String, &[&crate::spec::Props])| {
            let driver = |props: &crate::spec::Props| {
                props.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let is_device = |proxy: &IoProxy| proxy.is_block_device(path);
            let block_device = driver(pair[0]) == "host_device" || proxied.is_some_and(is_device);
            let format = driver(pair[1]).parse().unwrap_or(Format::Raw);
            Layer { path: path.clone(), format, block_device }
        };
        images.zip(nodes.rchunks_exact(2)).map(layer).collect()
    }

    /// The node that a disk stands on when nothing holds its requests.
    pub fn top_node(&self) -> Option<&str> {
        self.spec.frontend.as_ref()?.0.get("drive")?.as_str()
    }

    /// The commands that make the nodes of an overlay, which stand by themselves until [`take_snapshot`].
    pub fn overlay_nodes(&self) -> Vec<Call> {
        let top = self.spec.backends.len().saturating_sub(2);
        let mut calls: Vec<Call> = self.spec.backends[top..].iter().map(Backend::add).collect();
        if let Some(format) = calls.last_mut() {
            format.arguments["backing"] = Value::Null;
        }
        calls
    }

    /// The commands that delete them again.
    pub fn overlay_nodes_undone(&self) -> Vec<Call> {
        self.spec.backends.iter().rev().take(2).map(Backend::del).collect()
    }

    fn writable_disk(&self) -> Result<&DiskConfig, Refusal> {
        let refuse = |value: &str, rule: &str| {
            let (id, key) = (self.id.clone(), "snapshot");
            Err(Refusal::Value { id, key, value: value.to_owned(), rule: rule.to_owned() })
        };
        let top = self.layers().into_iter().next();
        match (&self.config, top) {
            (DeviceConfig::Disk(disk), _) if disk.is_cdrom() => {
                refuse("of a CD-ROM drive", "it is only read, so there is nothing to keep: leave it out")
            }
            (DeviceConfig::Disk(disk), _) if disk.is_read_only() => {
                refuse("of a read-only disk", "it is only read, so there is nothing to keep: leave it out")
            }
            (DeviceConfig::Disk(_), Some(top)) if top.block_device => refuse(
                &format!("of block device {}", top.path),
                "snapshots are of raw and qcow2 files only, block devices are not supported: leave it out with --exclude",
            ),
            (DeviceConfig::Disk(disk), Some(_)) => Ok(disk),
            (other, _) => refuse(
                &format!("of a {}", other.table()),
                "only disks have snapshots: name one by its id or target label",
            ),
        }
    }
}

impl Layout {
    /// The disk of an id or target label, if its image can have an overlay.
    pub fn can_have_overlay(&self, name: &str) -> Result<&Placed, Refusal> {
        let placed = self.expect_device(name)?;
        placed.writable_disk().map(|_| placed)
    }

    /// The disk with `path`, a qcow2 image, as its new top.
    pub fn with_overlay(&self, name: &str, path: &str, qemu: &Capabilities) -> Result<Placed, Refusal> {
        let old = self.can_have_overlay(name)?;
        let disk = old.writable_disk()?;
        if old.io_proxy().is_some() {
            return Err(Refusal::Value {
                id: old.id.clone(),
                key: "snapshot",
                value: "while its images are behind an io-proxy".to_owned(),
                rule: "a proxy serves the images that it was started with, and the overlay would be outside of it: stop the VM first, use on_error.engine = \"hold\", or leave it \
                       out with --exclude"
                    .to_owned(),
            });
        }
        let below = old.top_node().unwrap_or_default().to_owned();
        let last = self.generations.get(&old.id).copied().unwrap_or_default();
        let layer = Layer { path: path.to_owned(), format: Format::Qcow2, block_device: false };
        let mut new = old.clone();
        new.spec.backends.extend(disk.overlay(
            &old.id,
            &layer,
            Generation(last.0.saturating_add(1)),
            below,
            old.retry.as_ref(),
        ));
        if let Some(frontend) = &mut new.spec.frontend {
            let top = old.id.format_node(Generation(last.0.saturating_add(1)));
            frontend.0.insert("drive".to_owned(), top.into());
        }
        for need in &mut new.needs {
            if let HostNeed::Image { access, .. } = need {
                *access = Access::Read;
            }
        }
        new.needs.insert(0, HostNeed::Image { path: path.to_owned(), access: Access::Write });
        check_spec(&new.spec, qemu)?;
        Ok(new)
    }
}

/// The command that puts overlays on top of disks, all at one instant or none. `disks` are the disks as they are and as they will be.
pub fn take_snapshot<'a>(disks: impl IntoIterator<Item = (&'a Placed, &'a Placed)>) -> Call {
    let action = |(old, new): (&Placed, &Placed)| {
        json!({
            "type": "blockdev-snapshot",
            "data": {"node": old.top_node(), "overlay": new.top_node()},
        })
    };
    let actions: Vec<Value> = disks.into_iter().map(action).collect();
    Call::new("transaction", json!({"actions": actions}))
}

/// Whether an overlay is in use, by its element of `query-named-block-nodes`; not of a flat one, in which every depth is 0.
pub fn is_on_top(node: &Value) -> bool {
    node["backing_file_depth"].as_u64().is_some_and(|depth| depth > 0)
}

/// Ids of the disks that take part in a snapshot if none is named: all that can be written.
pub fn writable_disks(layout: &Layout) -> impl Iterator<Item = &DeviceId> {
    let writable =
        |placed: &&Placed| matches!(&placed.config, DeviceConfig::Disk(disk) if !disk.is_read_only());
    layout.devices().iter().filter(writable).map(|placed| &placed.id)
}
