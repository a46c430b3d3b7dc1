//! The images that a running QEMU has open, compared with those that its disks stand on. Asks nobody; the caller has QEMU's answer.

use std::collections::BTreeSet;
use std::path::Path;

use devices::DeviceId;
use serde::Deserialize;
use serde_json::Value;

use super::doctor::{Finding, Remedy};
use crate::status::DeviceStatus;

/// A node of `query-named-block-nodes`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Node {
    #[serde(rename = "node-name")]
    name: String,
    drv: String,
    file: String,
}

impl Node {
    /// Whether it has a file of this host open: formats and filters above it repeat the file's name.
    fn is_of_file(&self) -> bool {
        matches!(self.drv.as_str(), "file" | "host_device" | "host_cdrom")
    }
}

/// Compares the nodes with the devices. What is under way in these moments shows as well: a finding of a VM at work is to be looked at twice.
///
/// # Errors
/// The answer is none of QEMU's.
pub fn examine(nodes: &Value, devices: &[DeviceStatus]) -> Result<Vec<Finding>, serde_json::Error> {
    let nodes: Vec<Node> = serde_json::from_value(nodes.clone())?;
    let mut nodes: Vec<Node> = nodes.into_iter().filter(Node::is_of_file).collect();
    nodes.sort_by(|a, b| a.file.cmp(&b.file));
    let lacking = devices.iter().flat_map(|device| without_nodes(device, &nodes));
    let known: BTreeSet<&str> =
        devices.iter().flat_map(|device| &device.layers).map(|layer| layer.path.as_str()).collect();
    Ok(lacking.chain(nodes.iter().filter_map(|node| of_node(node, devices, &known))).collect())
}

/// The images of a disk that QEMU does not have open.
fn without_nodes(device: &DeviceStatus, nodes: &[Node]) -> Vec<Finding> {
    let is_own = |node: &&Node| DeviceId::of_node(&node.name).is_some_and(|(id, _)| id.as_str() == device.id);
    let open: BTreeSet<&str> = nodes.iter().filter(is_own).map(|node| node.file.as_str()).collect();
    // A disk whose images another process has open, its proxy or its daemon, has none in QEMU.
    let lacking =
        device.layers.iter().filter(|layer| !open.is_empty() && !open.contains(layer.path.as_str()));
    let finding = |layer: &devices::host::Layer| Finding {
        words: format!(
            "{}: image {} belongs to its chain, and QEMU does not have it open",
            device.id, layer.path
        ),
        remedy: None,
    };
    lacking.map(finding).collect()
}

fn of_node(node: &Node, devices: &[DeviceStatus], known: &BTreeSet<&str>) -> Option<Finding> {
    let owner = DeviceId::of_node(&node.name).map(|(id, _)| id);
    let owner = owner.and_then(|id| devices.iter().find(|device| device.id == id.as_str()));
    match owner {
        _ if known.contains(node.file.as_str()) => {
            let is_gone = !Path::new(&node.file).exists();
            let id = owner.map_or("QEMU", |device| &device.id);
            is_gone.then(|| Finding {
                words: format!(
                    "{id}: image {} is gone, and QEMU still has it open (node {}): what it holds is lost when the VM ends, so copy it inside the guest, or \
                     take it from /proc/PID/fd of QEMU",
                    node.file, node.name
                ),
                remedy: None,
            })
        }
        // The firmware's, and what QEMU had to name itself.
        None if node.name.starts_with("pflash.") || node.name.starts_with('#') => None,
        owner => {
            let whose =
                owner.map_or("of no disk".to_owned(), |device| format!("not of the chain of {}", device.id));
            Some(Finding {
                words: format!("QEMU has image {} open (node {}), which is {whose}", node.file, node.name),
                remedy: owner.is_none().then(|| Remedy::Close(node.name.clone())),
            })
        }
    }
}
