//! Commands on VM files: check, define, undefine, show.

use std::path::Path;

use devices::Placed;
use devices::host::Format;
use devices::retry::Engine;
use devices::spec::Numbers;
use serde_json::json;

use super::args::{Check, Show};
use super::{Exit, Problem, print, target};
use crate::blueprint::Blueprint;
use crate::config::VmConfig;
use crate::folders::{Folders, VmName, write_durably};
use crate::incoming;
use crate::record::Launch;
use crate::status::Status;

/// `qvirt check`
pub async fn check(args: Check) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let blueprint = Blueprint::draw(target::config(&folders, &args.target)?, &folders).await?;
    if let Some(status) = args.against.filter(|_| args.incoming) {
        compare(&blueprint, &status)?;
    }
    if args.argv {
        print_argv(&blueprint.binary, &argv(&blueprint));
        return Ok(Exit::Done);
    }
    let seats = blueprint.layout.topology().counts();
    if args.json {
        let devices: Vec<_> = blueprint
            .layout
            .devices()
            .iter()
            .map(|d| json!({"id": d.id, "address": d.address, "config": d.config, "on_error": d.retry}))
            .collect();
        let value = json!({
            "name": blueprint.config.name, "qemu": blueprint.qemu.version, "machine": blueprint.machine.machine,
            "accel": blueprint.machine.accel, "accel-reason": blueprint.accel_reason, "devices": devices, "seats": seats,
            "argv": argv(&blueprint), "warnings": warnings(&blueprint),
        });
        print::json(&value)?;
        return Ok(Exit::Done);
    }
    println!(
        "{} is fine: {} on QEMU {}",
        blueprint.config.name, blueprint.machine.machine, blueprint.qemu.version
    );
    println!("accel: {}", blueprint.accel_reason);
    for device in blueprint.layout.devices() {
        let address = device.address.as_ref().map(|a| format!(" on {a}")).unwrap_or_default();
        let label = device.label().map(|label| format!(" ({label})")).unwrap_or_default();
        println!("{} {}{label}{address}", device.config.table(), device.id);
        if let Some(retry) = &device.retry {
            println!("on_error of {}: {retry}", device.id);
        }
    }
    for count in seats {
        println!("{}: {} of {} free", count.kind, count.free, count.total);
    }
    warnings(&blueprint).iter().for_each(|warning| eprintln!("warning: {warning}"));
    Ok(Exit::Done)
}

/// What is allowed and yet worth a word.
fn warnings(blueprint: &Blueprint) -> Vec<String> {
    let of = |device: &Placed| Some(format!("{}: {}", device.id, device.retry.as_ref()?.warning()?));
    let devices = blueprint.layout.devices();
    let devices = devices.iter().filter_map(of).chain(devices.iter().filter_map(unheld_reads));
    blueprint.tops().chain(devices).chain(blueprint.warnings.iter().cloned()).collect()
}

/// A proxy sees what qcow2 reads for a write of the guest as a read.
fn unheld_reads(device: &Placed) -> Option<String> {
    let retry = device.retry.as_ref().filter(|retry| retry.engine == Engine::Proxy && !retry.read)?;
    let is_qcow2 = device.layers().first().is_some_and(|top| top.format == Format::Qcow2);
    is_qcow2.then(|| {
        format!(
            "{}: on_error.write = \"retry\" by engine {} does not hold a write for which the qcow2 image has to be read and cannot: write read = \"retry\" too",
            device.id, retry.engine
        )
    })
}

/// Refuses a VM that is to be migrated into and would treat I/O errors in another way than its source.
fn compare(blueprint: &Blueprint, status: &Path) -> Result<(), Problem> {
    let next = "name a file that `qvirt status VM --json` printed at the source";
    let wrong = |reason: &dyn std::fmt::Display| {
        Problem::new(Exit::Usage, format!("status {}: {reason}; {next}", status.display()))
    };
    let text = std::fs::read(status).map_err(|error| wrong(&error))?;
    let source: Status = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
    let found = incoming::differences(&blueprint.layout, &source);
    if found.is_empty() {
        return Ok(());
    }
    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
    Err(Problem::new(
        Exit::Usage,
        format!("config {}: {}", blueprint.config.path.display(), found.join("\n")),
    ))
}

fn argv(blueprint: &Blueprint) -> Vec<String> {
    blueprint.argv(["qmp", "rescue"], &Numbers::new())
}

/// One option with its value a line.
fn print_argv(binary: &Path, argv: &[String]) {
    println!("{}", binary.display());
    let mut words = argv.iter().peekable();
    while let Some(word) = words.next() {
        match words.next_if(|next| !next.starts_with('-')) {
            Some(value) => println!("{word} {value}"),
            None => println!("{word}"),
        }
    }
}

/// `qvirt define`
pub async fn define(file: &Path) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let config = VmConfig::read(file)?;
    let name = config.name.clone();
    let text = std::fs::read_to_string(file)?;
    // Relative paths meant the file's folder; the stored file lies elsewhere.
    let stored = folders.config_file(&name);
    if let Some(path) = VmConfig::relative_path(&text, &stored)? {
        let message = format!(
            "config {}: path {path:?} is relative; a stored config needs absolute paths",
            file.display()
        );
        return Err(Problem::new(Exit::Usage, message));
    }
    Blueprint::draw(config, &folders).await?;
    folders.make()?;
    let replaced = stored.exists();
    write_durably(&stored, text.as_bytes())?;
    println!("{name} is {} as {}", if replaced { "stored anew" } else { "stored" }, stored.display());
    Ok(Exit::Done)
}

/// `qvirt undefine`
pub fn undefine(vm: &VmName) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    match std::fs::remove_file(folders.config_file(vm)) {
        Ok(()) => {
            println!("{vm} is forgotten");
            Ok(Exit::Done)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(target::unknown(&folders, vm)),
        Err(error) => Err(error.into()),
    }
}

/// `qvirt show`
pub async fn show(args: Show) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    if args.argv {
        let running = folders.vm(&args.vm)?.launch();
        if running.exists() {
            let launch = Launch::load(&running)?;
            print_argv(&launch.binary, &launch.argv);
            return Ok(Exit::Done);
        }
        let blueprint = Blueprint::draw(target::stored(&folders, &args.vm)?, &folders).await?;
        print_argv(&blueprint.binary, &argv(&blueprint));
        return Ok(Exit::Done);
    }
    target::stored(&folders, &args.vm)?;
    let text = std::fs::read_to_string(folders.config_file(&args.vm))?;
    if args.json {
        let table: toml::Table = toml::from_str(&text).map_err(|e| Problem::new(Exit::Usage, e))?;
        print::json(&table)?;
    } else {
        print!("{text}");
    }
    Ok(Exit::Done)
}
