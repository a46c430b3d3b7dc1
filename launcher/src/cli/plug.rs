//! `attach` and `detach`: on the running VM, on its stored config, or on both.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use devices::{DeviceConfig, Placed};
use serde_json::{Value, json};

use super::args::{Attach, Detach, DeviceChoice, Where};
use super::client::{Client, connect};
use super::{Exit, Problem, print, target};
use crate::adopt::Life;
use crate::blueprint::Blueprint;
use crate::config::{VmConfig, parse_flag, read_device};
use crate::edit;
use crate::folders::{Folders, VmName, write_durably};
use crate::request::{self, Attached, Detached};

/// `qvirt attach`
pub async fn attach(args: Attach) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let mut device = chosen(&args.device)?;
    let (live, stored) = places(&folders, &args.vm, args.place)?;
    if args.dry_run && !live {
        return Err(target::not_running(&folders, &args.vm));
    }
    let client = if live { Some(connect(&folders, &args.vm).await?) } else { None };
    // The config first: what it refuses, the running VM should not get either. It is written last.
    let edited = if stored { Some(added(&folders, &args.vm, &mut device).await?) } else { None };
    let mut reply = Value::Null;
    if let Some(client) = &client {
        let attached = attach_live(client, &args, &device).await?;
        if args.dry_run {
            for command in &attached.commands {
                println!("{command}");
            }
            return Ok(Exit::Done);
        }
        if !args.json {
            let label = attached.label.as_ref().map(|label| format!(" as {label}")).unwrap_or_default();
            let address =
                attached.address.as_ref().map(|address| format!(" on {address}")).unwrap_or_default();
            println!("{} is attached to {}{label}{address}", attached.id, args.vm);
        }
        reply = json!(attached);
    }
    if let Some(edited) = edited {
        write_durably(&folders.config_file(&args.vm), edited.as_bytes())?;
        if !args.json {
            let id = device.id().map(ToString::to_string).unwrap_or_default();
            println!("{id} is in the stored config of {}", args.vm);
        }
    }
    if args.json {
        print::json(&json!({"live": reply, "config": if stored { json!(device) } else { Value::Null }}))?;
    }
    Ok(Exit::Done)
}

async fn attach_live(client: &Client, args: &Attach, device: &DeviceConfig) -> Result<Attached, Problem> {
    let until = args.wait.map(|wait| Instant::now() + wait);
    let request = request::Attach { device: device.clone(), dry_run: args.dry_run };
    loop {
        // Somebody who replaces a device waits for the former one to leave.
        let leaving = match (until, device.id()) {
            (Some(until), Some(id)) if Instant::now() < until => client
                .status()
                .await?
                .device(id.as_str())
                .is_some_and(|d| d.stage == crate::record::Stage::Leaving),
            _ => false,
        };
        if !leaving {
            return client.ask("qvirt-attach", &request).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `qvirt detach`
pub async fn detach(args: Detach) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let (live, stored) = places(&folders, &args.vm, args.place)?;
    let client = if live { Some(connect(&folders, &args.vm).await?) } else { None };
    let wanted = wanted(&args.device)?;
    let name = match &wanted {
        Wanted::Name(name) => name.clone(),
        Wanted::Device(device) => name_of(&folders, &args.vm, client.as_ref(), device).await?,
    };
    let edited = if stored { Some(removed(&folders, &args.vm, &name).await?) } else { None };
    let mut exit = Exit::Done;
    let mut reply = Value::Null;
    if let Some(client) = &client {
        let wait_ms = u64::try_from(args.wait.as_millis()).unwrap_or(u64::MAX);
        let request = request::Detach { id: name.clone(), wait_ms, force: args.force };
        let outcome: Detached = client.ask_for(args.wait, "qvirt-detach", request).await?;
        exit = match &outcome {
            Detached::Removed { .. } => Exit::Done,
            Detached::Refused { .. } => Exit::Refused,
            Detached::Pending { .. } => Exit::Pending,
        };
        if !args.json {
            say(&args.vm, &outcome);
        }
        reply = json!(outcome);
    }
    // A device that stays in the running VM stays in its config; one that is pending leaves both.
    if let Some(edited) = edited.filter(|_| exit != Exit::Refused) {
        write_durably(&folders.config_file(&args.vm), edited.as_bytes())?;
        if !args.json {
            println!("{name} is out of the stored config of {}", args.vm);
        }
    }
    if args.json {
        print::json(&json!({"live": reply, "config": stored && exit != Exit::Refused}))?;
    }
    Ok(exit)
}

fn say(vm: &VmName, outcome: &Detached) {
    match outcome {
        Detached::Removed { id, warning } => {
            println!("{id} is detached from {vm}");
            warning.iter().for_each(|warning| eprintln!("warning: {warning}"));
        }
        Detached::Refused { id, reason } => eprintln!("qvirt: {id} stays in {vm}: {reason}"),
        Detached::Pending { id, reason } => {
            eprintln!(
                "qvirt: {id} is leaving {vm}, not gone yet: {reason}; it is finished when the guest lets go, `qvirt devices {vm}` shows it"
            );
        }
    }
}

/// Whether the running VM and the stored config are meant.
pub(super) fn places(folders: &Folders, vm: &VmName, place: Where) -> Result<(bool, bool), Problem> {
    let runs = matches!(target::life_of(folders, vm)?, Life::Owned | Life::Orphan | Life::Between);
    let is_stored = folders.config_file(vm).exists();
    if !runs && !is_stored {
        return Err(target::not_running(folders, vm));
    }
    let (live, stored) = if place.live || place.config { (place.live, place.config) } else { (runs, !runs) };
    if live && !runs {
        return Err(target::not_running(folders, vm));
    }
    if stored && !is_stored {
        let message =
            format!("VM {vm} has no stored config: `qvirt define FILE` stores one, or leave --config out");
        return Err(Problem::new(Exit::Unknown, message));
    }
    Ok((live, stored))
}

fn chosen(choice: &DeviceChoice) -> Result<DeviceConfig, Problem> {
    let flags = [
        ("disk", &choice.disk),
        ("nic", &choice.nic),
        ("serial", &choice.serial),
        ("channel", &choice.channel),
        ("usb", &choice.usb),
        ("iothread", &choice.iothread),
        ("scsi_controller", &choice.scsi_controller),
        ("vdpa", &choice.vdpa),
        ("vhost_scsi", &choice.vhost_scsi),
        ("vfio", &choice.vfio),
        ("vf", &choice.vf),
    ];
    let folder = std::env::current_dir()?;
    match (&choice.file, flags.into_iter().find_map(|(table, text)| Some((table, text.as_ref()?)))) {
        (Some(file), _) => Ok(read_device(file)?),
        (None, Some((table, text))) => Ok(parse_flag(table, text, &folder)?),
        (None, None) => {
            Err(Problem::new(Exit::Usage, "name a device file, or a device by a flag such as --disk"))
        }
    }
}

/// The stored config's text with the device in it, and the device with its id, once the whole was found possible.
async fn added(folders: &Folders, vm: &VmName, device: &mut DeviceConfig) -> Result<String, Problem> {
    let path = folders.config_file(vm);
    let text = std::fs::read_to_string(&path)?;
    // Planned once as it is, to learn the id that it gets: the running VM is to know it by the same one.
    let with = |device: &DeviceConfig| -> Result<(String, VmConfig), Problem> {
        let edited = edit::add(&text, device).map_err(|error| Problem::of(Exit::Usage, &error))?;
        let config = VmConfig::parse(&edited, &path)?;
        Ok((edited, config))
    };
    let (_, config) = with(device)?;
    let table = device.table();
    let blueprint = Blueprint::draw(config, folders)
        .await
        .map_err(|error| Problem { exit: Exit::Refused as u8, ..error.into() })?;
    if device.id().is_none() {
        // The new device is the last of its kind in the file, and so of those that were placed because they stand there.
        let mut placed =
            blueprint.layout.devices().iter().filter(|d| d.config.table() == table && !d.on_demand);
        if let Some(new) = placed.next_back() {
            device.set_id(new.id.clone());
        }
    }
    Ok(with(device)?.0)
}

/// The devices of the stored config, with the ids and labels that they have when it runs.
async fn planned(folders: &Folders, vm: &VmName) -> Result<Vec<Placed>, Problem> {
    let blueprint = Blueprint::draw(target::stored(folders, vm)?, folders).await?;
    // What was made for other devices' sake does not stand in the file.
    Ok(blueprint.layout.devices().iter().filter(|d| !d.on_demand).cloned().collect())
}

async fn removed(folders: &Folders, vm: &VmName, name: &str) -> Result<String, Problem> {
    let (table, place) = place_of(folders, vm, name).await?;
    let text = std::fs::read_to_string(folders.config_file(vm))?;
    edit::remove(&text, table, place).map_err(|error| Problem::of(Exit::Usage, &error))
}

/// Where a device stands in the stored config: its table, and its place among those of that table.
pub(super) async fn place_of(
    folders: &Folders,
    vm: &VmName,
    name: &str,
) -> Result<(&'static str, usize), Problem> {
    let config = target::stored(folders, vm)?;
    // By the ids in the file; where that does not tell, by those that the devices get. The former works when an image is gone, too.
    if let Some(index) = edit::find(&config.devices, name) {
        let table = config.devices[index].table();
        return Ok((table, config.devices[..index].iter().filter(|d| d.table() == table).count()));
    }
    let devices = planned(folders, vm).await?;
    let is = |d: &&Placed| d.id.as_str() == name || d.label().is_some_and(|label| label.as_str() == name);
    let Some(found) = devices.iter().find(is) else {
        let known: Vec<&str> = devices.iter().map(|d| d.id.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(Problem::new(
            Exit::Unknown,
            format!("the stored config of {vm} has no device {name}: it has {known}"),
        ));
    };
    let table = found.config.table();
    let same = devices.iter().filter(|d| d.config.table() == table);
    Ok((table, same.take_while(|d| d.id != found.id).count()))
}

enum Wanted {
    Name(String),
    Device(Box<DeviceConfig>),
}

fn wanted(word: &str) -> Result<Wanted, Problem> {
    if word.contains('/') || word.ends_with(".toml") {
        return Ok(Wanted::Device(Box::new(read_device(&PathBuf::from(word))?)));
    }
    Ok(Wanted::Name(word.to_owned()))
}

/// The device that a file describes: by its id, or the one that agrees with every key the file gives.
async fn name_of(
    folders: &Folders,
    vm: &VmName,
    client: Option<&Client>,
    device: &DeviceConfig,
) -> Result<String, Problem> {
    if let Some(id) = device.id() {
        return Ok(id.to_string());
    }
    let wanted = serde_json::to_value(device)?;
    let candidates: Vec<(String, Value)> = match client {
        Some(client) => {
            let devices: Vec<Value> = client.ask("qvirt-devices", Value::Null).await?;
            let pair = |d: &Value| Some((d["id"].as_str()?.to_owned(), d["config"].clone()));
            devices.iter().filter_map(pair).collect()
        }
        None => {
            let devices = planned(folders, vm).await?;
            devices
                .iter()
                .filter_map(|d| Some((d.id.to_string(), serde_json::to_value(&d.config).ok()?)))
                .collect()
        }
    };
    let fitting: Vec<&String> =
        candidates.iter().filter(|(_, config)| agrees(config, &wanted)).map(|(id, _)| id).collect();
    match fitting.as_slice() {
        [id] => Ok((*id).clone()),
        [] => Err(Problem::new(
            Exit::Unknown,
            format!("no device of {vm} agrees with the file: `qvirt devices {vm}` lists them"),
        )),
        several => {
            let ids: Vec<&str> = several.iter().map(|id| id.as_str()).collect();
            Err(Problem::new(
                Exit::Usage,
                format!(
                    "several devices of {vm} agree with the file ({}): name one by its id",
                    ids.join(", ")
                ),
            ))
        }
    }
}

/// Whether `config` has every value of `wanted`.
fn agrees(config: &Value, wanted: &Value) -> bool {
    match (config, wanted) {
        (Value::Object(config), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| config.get(key).is_some_and(|found| agrees(found, value)))
        }
        (config, wanted) => config == wanted,
    }
}
