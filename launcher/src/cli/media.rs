//! `qvirt media`: the medium of a CD-ROM drive, in the running VM, in its stored config, or in both.

use devices::DeviceConfig;
use serde_json::Value;

use super::args::{Media, MediaChange};
use super::client::connect;
use super::plug::{place_of, places};
use super::{Exit, Problem};
use crate::blueprint::Blueprint;
use crate::config::VmConfig;
use crate::edit;
use crate::folders::{Folders, VmName, write_durably};
use crate::request;

/// `qvirt media`
pub async fn media(args: Media) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let (file, format, force, place) = match args.change {
        MediaChange::Insert { file, format, force, place } => (Some(file), format, force, place),
        MediaChange::Eject { force, place } => (None, None, force, place),
    };
    let path = match file.map(std::path::absolute).transpose()? {
        Some(file) => Some(file.into_os_string().into_string().map_err(|name| {
            Problem::new(Exit::Usage, format!("image {}: its path is not UTF-8: rename it", name.display()))
        })?),
        None => None,
    };
    let wanted = request::Media { id: args.drive, path, format, force };
    let (live, stored) = places(&folders, &args.vm, place)?;
    let edited = if stored { Some(edited(&folders, &args.vm, &wanted).await?) } else { None };
    let what = wanted.path.as_ref().map_or_else(|| "is empty".to_owned(), |path| format!("has {path}"));
    if live {
        let client = connect(&folders, &args.vm).await?;
        let _: Value = client.ask("qvirt-media", &wanted).await?;
        println!("{} of {} {what}", wanted.id, args.vm);
    }
    if let Some(edited) = edited {
        write_durably(&folders.config_file(&args.vm), edited.as_bytes())?;
        println!("{} {what} in the stored config of {}", wanted.id, args.vm);
    }
    Ok(Exit::Done)
}

/// The stored config's text with the change, once the whole was found possible.
async fn edited(folders: &Folders, vm: &VmName, wanted: &request::Media) -> Result<String, Problem> {
    let path = folders.config_file(vm);
    let text = std::fs::read_to_string(&path)?;
    let (table, index) = place_of(folders, vm, &wanted.id).await?;
    let config = VmConfig::parse(&text, &path)?;
    let mut disks = config.devices.iter().filter(|device| device.table() == table);
    if !matches!(disks.nth(index), Some(DeviceConfig::Disk(disk)) if disk.is_cdrom()) {
        let message = format!(
            "device {} of {vm} is no CD-ROM drive: only a disk with device = \"cdrom\" takes a medium",
            wanted.id
        );
        return Err(Problem::new(Exit::Refused, message));
    }
    let medium = wanted.path.as_deref().map(|path| (path, wanted.format));
    let edited = edit::set_medium(&text, index, medium).map_err(|error| Problem::of(Exit::Usage, &error))?;
    let blueprint = Blueprint::draw(VmConfig::parse(&edited, &path)?, folders).await;
    blueprint.map_err(|error| Problem { exit: Exit::Refused as u8, ..error.into() })?;
    Ok(edited)
}
