//! What a command is about: a VM by its name, or a VM file by its path.

use std::path::Path;

use super::{Exit, Problem};
use crate::adopt::{Life, life};
use crate::config::VmConfig;
use crate::folders::{Folders, VmName};

/// A VM file, or the stored file of a VM. A word with a slash, or ending in `.toml`, is a file.
pub fn config(folders: &Folders, target: &str) -> Result<VmConfig, Problem> {
    if is_file(target) {
        return Ok(VmConfig::read(Path::new(target))?);
    }
    stored(folders, &name(target)?)
}

/// The VM that a word names, by itself or by its file.
pub fn vm(folders: &Folders, target: &str) -> Result<VmName, Problem> {
    if is_file(target) { Ok(config(folders, target)?.name) } else { name(target) }
}

fn is_file(target: &str) -> bool {
    target.contains('/') || target.ends_with(".toml")
}

fn name(target: &str) -> Result<VmName, Problem> {
    target.parse().map_err(|error| Problem::of(Exit::Usage, &error as &crate::folders::VmNameError))
}

/// The stored config of a VM.
pub fn stored(folders: &Folders, vm: &VmName) -> Result<VmConfig, Problem> {
    let path = folders.config_file(vm);
    if !path.exists() {
        return Err(unknown(folders, vm));
    }
    let config = VmConfig::read(&path)?;
    if config.name != *vm {
        let message = format!(
            "config {}: name is {:?}, and the file is that of {vm}: they must agree",
            path.display(),
            config.name.as_str()
        );
        return Err(Problem::new(Exit::Usage, message));
    }
    Ok(config)
}

/// There is no such VM, and what there is; or it runs, and is not stored.
pub fn unknown(folders: &Folders, vm: &VmName) -> Problem {
    if folders.vm(vm).is_ok_and(|files| files.dir().exists()) {
        return Problem::new(
            Exit::Unknown,
            format!("VM {vm} has no stored config: `qvirt define FILE` stores one"),
        );
    }
    let mut known = folders.defined().unwrap_or_default();
    known.extend(folders.with_runtime().unwrap_or_default());
    known.sort();
    known.dedup();
    let known: Vec<&str> = known.iter().map(VmName::as_str).collect();
    let known =
        if known.is_empty() { "none; `qvirt define FILE` stores one".to_owned() } else { known.join(", ") };
    Problem::new(Exit::Unknown, format!("there is no VM {vm}: known are {known}"))
}

/// How a VM lives.
pub fn life_of(folders: &Folders, vm: &VmName) -> Result<Life, Problem> {
    Ok(life(&folders.vm(vm)?)?)
}

/// That a VM is not running, in words that say what to do.
pub fn not_running(folders: &Folders, vm: &VmName) -> Problem {
    match life_of(folders, vm) {
        Ok(Life::Orphan) => Problem::new(
            Exit::Failed,
            format!("VM {vm} is running without an owner: `qvirt start {vm}` adopts it"),
        ),
        Ok(Life::Remains) => Problem::new(
            Exit::Unknown,
            format!("VM {vm} is dead and left something: `qvirt recover {vm}` clears up"),
        ),
        Ok(Life::Between | Life::Owned) => {
            Problem::new(Exit::Pending, format!("VM {vm} is just starting or ending: try again"))
        }
        _ if folders.config_file(vm).exists() => {
            Problem::new(Exit::Unknown, format!("VM {vm} is not running: `qvirt start {vm}` starts it"))
        }
        _ => unknown(folders, vm),
    }
}
