//! Changing a stored VM file: devices added and removed as text, comments and order kept.

use devices::host::Format;
use devices::{DeviceConfig, DeviceId};
use serde::Serialize;
use thiserror::Error;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table};

/// A file that cannot be changed.
#[derive(Debug, Error)]
pub enum EditError {
    /// It is no TOML.
    #[error("the stored config is no TOML any more: {0}")]
    Parse(#[from] toml_edit::TomlError),
    /// The device cannot be written as TOML.
    #[error("the device cannot be written as TOML: {0}")]
    Write(#[from] toml_edit::ser::Error),
    /// A table is there under the name, and is no list of tables.
    #[error("`{0}` in the stored config is no [[{0}]]: write its devices that way to change them by command")]
    NoList(&'static str),
}

/// Appends a device behind the others of its kind.
pub fn add(text: &str, device: &DeviceConfig) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    let name = device.table();
    let item = document.entry(name).or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
    let list = item.as_array_of_tables_mut().ok_or(EditError::NoList(name))?;
    list.push(table(device)?);
    Ok(document.to_string())
}

/// Removes the device at a place of its kind's list; its own comments go with it.
pub fn remove(text: &str, table: &'static str, index: usize) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    let Some(item) = document.get_mut(table) else { return Ok(text.to_owned()) };
    let list = item.as_array_of_tables_mut().ok_or(EditError::NoList(table))?;
    list.remove(index);
    if list.is_empty() {
        document.remove(table);
    }
    Ok(document.to_string())
}

/// Gives the drive at a place of the list of disks another medium, or none.
pub fn set_medium(
    text: &str,
    index: usize,
    medium: Option<(&str, Option<Format>)>,
) -> Result<String, EditError> {
    let mut document: DocumentMut = text.parse()?;
    let disks = document.get_mut("disk").and_then(Item::as_array_of_tables_mut);
    let drive = disks.and_then(|disks| disks.get_mut(index)).ok_or(EditError::NoList("disk"))?;
    let format = medium.and_then(|(_, format)| format).map(|format| format.to_string());
    for (key, wanted) in [("path", medium.map(|(path, _)| path)), ("format", format.as_deref())] {
        match wanted {
            Some(wanted) => drop(drive.insert(key, toml_edit::value(wanted))),
            None => drop(drive.remove(key)),
        }
    }
    Ok(document.to_string())
}

/// The device as a table: short, with small tables inline.
fn table(device: &DeviceConfig) -> Result<Table, EditError> {
    fn of(config: &impl Serialize) -> Result<Table, EditError> {
        Ok(toml_edit::ser::to_document(config)?.as_table().clone())
    }
    let mut table = match device {
        DeviceConfig::Iothread(config) => of(config),
        DeviceConfig::ScsiController(config) => of(config),
        DeviceConfig::VirtioSerial(config) => of(config),
        DeviceConfig::Disk(config) => of(config),
        DeviceConfig::Nic(config) => of(config),
        DeviceConfig::Serial(config) => of(config),
        DeviceConfig::Channel(config) => of(config),
        DeviceConfig::Vdpa(config) => of(config),
        DeviceConfig::VhostScsi(config) => of(config),
        DeviceConfig::Vfio(config) => of(config),
        DeviceConfig::Vf(config) => of(config),
        DeviceConfig::UsbController(config) => of(config),
        DeviceConfig::Usb(config) => of(config),
    }?;
    for (_, item) in table.iter_mut() {
        if let Item::Table(inner) = item {
            *item = Item::Value(std::mem::take(inner).into_inline_table().into());
        }
    }
    table.set_position(None);
    table.decor_mut().set_prefix("\n");
    Ok(table)
}

/// Which device of a config is meant: by id or target label, as it would be called in the running VM.
pub fn find(devices: &[DeviceConfig], name: &str) -> Option<usize> {
    let is = |id: Option<&DeviceId>| id.is_some_and(|id| id.as_str() == name);
    let by_id = devices.iter().position(|d| is(d.id()));
    by_id.or_else(|| devices.iter().position(|d| label(d) == Some(name)))
}

fn label(device: &DeviceConfig) -> Option<&str> {
    match device {
        DeviceConfig::Disk(disk) => disk.target.as_ref().map(devices::id::Label::as_str),
        _ => None,
    }
}
