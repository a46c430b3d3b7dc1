//! `qvirt blocks`: the disks of a VM that runs or not, with the images that they stand on.

use std::collections::BTreeMap;

use devices::DeviceConfig;
use devices::host::Layer;
use devices::units::Size;
use serde::Serialize;
use serde_json::Value;

use super::client::connect;
use super::snapshot::is_live;
use super::{Exit, Problem, print, target};
use crate::blueprint::Blueprint;
use crate::folders::Folders;
use crate::image::virtual_size;
use crate::snapshot::{Book, SnapshotName, Store};
use crate::status::IoState;
use crate::suspend::turn::id_in;

/// A disk, as it is printed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Block {
    id: String,
    target: Option<String>,
    /// The image that is written; an empty drive has none.
    source: Option<String>,
    format: Option<String>,
    size_bytes: Option<u64>,
    /// QEMU's word; none while the VM does not run, or its storage hangs.
    io_status: Option<String>,
    /// The snapshot that the source has the changes since.
    snapshot: Option<SnapshotName>,
    /// The images below the source, the uppermost first.
    backing: Vec<Layer>,
}

/// `qvirt blocks`
pub async fn blocks(name: &str, as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, name)?;
    let book = Store::new(&folders.state).read()?;
    let blocks = match is_live(&folders, &vm)? {
        true => live(&folders, &vm, &book).await?,
        false => stored(Blueprint::draw(target::config(&folders, name)?, &folders).await?, &book),
    };
    if as_json {
        print::json(&blocks)?;
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = blocks.iter().map(cells).collect();
    print::table(&["DISK", "TARGET", "FORMAT", "SIZE", "I/O", "SNAPSHOT", "SOURCE"], &rows)?;
    Ok(Exit::Done)
}

async fn live(folders: &Folders, vm: &crate::folders::VmName, book: &Book) -> Result<Vec<Block>, Problem> {
    let client = connect(folders, vm).await?;
    let status = client.status().await?;
    let hangs = status.devices.iter().any(|d| d.io.as_ref().is_some_and(|io| io.state == IoState::Hung));
    // QEMU would look at the image that does not answer.
    let seen = if hangs { Value::Null } else { client.call("query-block", Value::Null).await? };
    let io_status = |device: &Value| {
        Some((id_in(device["qdev"].as_str()?)?.to_string(), device["io-status"].as_str()?.to_owned()))
    };
    let mut seen: BTreeMap<String, String> =
        seen.as_array().into_iter().flatten().filter_map(io_status).collect();
    let disks = status.devices.into_iter().filter(|device| device.kind == "disk");
    let block = |device: crate::status::DeviceStatus| {
        let io_status = seen.remove(&device.id);
        Block { io_status, ..block(device.id, device.label, device.layers, device.size_bytes, book) }
    };
    Ok(disks.map(block).collect())
}

fn stored(blueprint: Blueprint, book: &Book) -> Vec<Block> {
    let disks = blueprint.layout.devices().iter().filter(|d| matches!(d.config, DeviceConfig::Disk(_)));
    let block = |device: &devices::Placed| {
        let layers = device.layers();
        let size_bytes = layers.first().and_then(|top| virtual_size(top).ok());
        block(device.id.to_string(), device.label().map(ToString::to_string), layers, size_bytes, book)
    };
    disks.map(block).collect()
}

fn block(
    id: String,
    target: Option<String>,
    layers: Vec<Layer>,
    size_bytes: Option<u64>,
    book: &Book,
) -> Block {
    let mut layers = layers.into_iter();
    let top = layers.next();
    let snapshot = top.as_ref().and_then(|top| book.overlay(&top.path)).map(|top| top.snapshot.clone());
    Block {
        id,
        target,
        format: top.as_ref().map(|top| top.format.to_string()),
        source: top.map(|top| top.path),
        size_bytes,
        io_status: None,
        snapshot,
        backing: layers.collect(),
    }
}

fn cells(block: &Block) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let below = block.backing.iter().map(|layer| format!(" <- {}", layer.path));
    let source = text(&block.source) + &below.collect::<String>();
    vec![
        block.id.clone(),
        text(&block.target),
        text(&block.format),
        block.size_bytes.map_or_else(|| "-".to_owned(), |bytes| Size::bytes(bytes).to_string()),
        text(&block.io_status),
        block.snapshot.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
        source,
    ]
}
