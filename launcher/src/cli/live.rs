//! Commands on running VMs: each asks the owner.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::args::Shutdown;
use super::client::connect;
use super::{Exit, Problem, print, target};
use crate::adopt::{Life, end_qemu, kill_orphan, life};
use crate::console::{Console, Until, User};
use crate::folders::{Folders, VmName};
use crate::host::begun::undo_of_the_dead;
use crate::request;
use crate::status::Status;

/// How long `reboot` waits for the guest to go down.
const REBOOT: Duration = Duration::from_secs(60);

/// `qvirt list`
pub async fn list(all: bool, json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let mut rows = Vec::new();
    let mut running = folders.with_runtime()?;
    for vm in &running {
        rows.push(print::Row {
            name: vm.to_string(),
            stored: folders.config_file(vm).exists(),
            ..row(&folders, vm).await
        });
    }
    if all {
        running.sort();
        let stored = folders.defined()?.into_iter().filter(|vm| running.binary_search(vm).is_err());
        rows.extend(stored.map(|vm| print::Row {
            name: vm.to_string(),
            state: "not running".to_owned(),
            stored: true,
            status: None,
        }));
    }
    print::list(&rows, json)?;
    Ok(Exit::Done)
}

async fn row(folders: &Folders, vm: &VmName) -> print::Row {
    let status = match connect(folders, vm).await {
        Ok(client) => client.status().await.ok(),
        Err(_) => None,
    };
    let state = match (&status, folders.vm(vm).ok().and_then(|files| life(&files).ok())) {
        (Some(status), _) => print::state(status),
        (None, Some(Life::Orphan)) => "running without an owner".to_owned(),
        (None, Some(Life::Remains)) => "dead, to be recovered".to_owned(),
        (None, _) => "starting or ending".to_owned(),
    };
    print::Row { name: String::new(), state, stored: false, status }
}

/// `qvirt status`
pub async fn status(vm: &VmName, json: bool) -> Result<Exit, Problem> {
    let status = connect(&Folders::find()?, vm).await?.status().await?;
    if json {
        print::json(&status)?
    } else {
        print::status(&status)?
    }
    Ok(Exit::Done)
}

/// `qvirt devices`
pub async fn devices(vm: &VmName, json: bool) -> Result<Exit, Problem> {
    let status: Status = connect(&Folders::find()?, vm).await?.status().await?;
    if json {
        print::json(
            &json!({"devices": status.devices, "foreign": status.foreign, "seats": status.seats, "warnings": status.warnings}),
        )?;
    } else {
        print::devices(&status)?;
    }
    Ok(Exit::Done)
}

/// A command without arguments, whose reply says nothing.
pub async fn simple(vm: &VmName, command: &str) -> Result<Exit, Problem> {
    connect(&Folders::find()?, vm).await?.call(command, Value::Null).await?;
    Ok(Exit::Done)
}

/// `qvirt shutdown`
pub async fn shutdown(args: Shutdown) -> Result<Exit, Problem> {
    let timeout_ms = u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX);
    let request = request::Shutdown { timeout_ms, then_kill: args.then_kill };
    let client = connect(&Folders::find()?, &args.vm).await?;
    let reply: Value = client.ask_for(args.timeout, "qvirt-shutdown", request).await?;
    settled(&Folders::find()?, &args.vm).await?;
    println!("{} has stopped: {}", args.vm, reply["reason"].as_str().unwrap_or("done"));
    Ok(Exit::Done)
}

/// `qvirt reboot`
pub async fn reboot(vm: &VmName) -> Result<Exit, Problem> {
    let client = connect(&Folders::find()?, vm).await?;
    let request = request::Shutdown {
        timeout_ms: u64::try_from(REBOOT.as_millis()).unwrap_or(u64::MAX),
        then_kill: false,
    };
    client.ask_for::<Value>(REBOOT, "qvirt-reboot", request).await?;
    Ok(Exit::Done)
}

/// `qvirt kill`: through the owner, or without one.
pub async fn kill(vm: &VmName) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    match target::life_of(&folders, vm)? {
        Life::Orphan => kill_orphan(&folders, vm).await?,
        _ => {
            let through_owner = async { connect(&folders, vm).await?.call("qvirt-kill", Value::Null).await };
            match tokio::time::timeout(OWNER, through_owner).await {
                Ok(killed) => drop(killed?),
                // An owner that does not answer does not keep its VM alive.
                Err(_) => end_qemu(&folders, vm).await?,
            }
        }
    }
    settled(&folders, vm).await?;
    println!("{vm} was killed");
    Ok(Exit::Done)
}

/// How long an owner may take to say what became of QEMU: it knows within two seconds.
const OWNER: Duration = Duration::from_secs(5);

/// Waits until the owner has cleared up and is gone: what was said to be over is over.
pub async fn settled(folders: &Folders, vm: &VmName) -> Result<(), Problem> {
    for _ in 0..500 {
        if matches!(target::life_of(folders, vm)?, Life::None | Life::Orphan | Life::Remains) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// `qvirt leave`
pub async fn leave(vm: &VmName) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    connect(&folders, vm).await?.call("qvirt-leave", Value::Null).await?;
    settled(&folders, vm).await?;
    Ok(Exit::Done)
}

/// `qvirt console`
pub async fn console(vm: &VmName, device: Option<&str>, force: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let status = connect(&folders, vm).await?.status().await?;
    let consoles: Vec<_> = status.devices.iter().filter(|d| d.pty.is_some()).collect();
    let chosen = match device {
        Some(name) => consoles.iter().find(|d| d.id == name),
        None => consoles.first(),
    };
    let Some((id, pty)) = chosen.and_then(|d| Some((d.id.clone(), d.pty.clone()?))) else {
        let known: Vec<&str> = consoles.iter().map(|d| d.id.as_str()).collect();
        let known = if known.is_empty() {
            "none; write [[serial]] into its config".to_owned()
        } else {
            known.join(", ")
        };
        let wanted =
            device.map_or_else(|| "serial console".to_owned(), |name| format!("serial console {name}"));
        return Err(Problem::new(
            Exit::Unknown,
            format!("VM {vm} has no {wanted}: its consoles are {known}"),
        ));
    };
    let console =
        Console::open(pty.as_ref(), &folders.vm(vm)?.console_lock(&id), force).map_err(|error| {
            let held = matches!(error, crate::console::ConsoleError::Held { .. });
            Problem::of(if held { Exit::Refused } else { Exit::Failed }, &error)
        })?;
    let user = User::of_process()?;
    eprintln!("Connected to {id} of {vm}; ^] leaves.");
    let left = console.attach(&user, &Until::Signals)?;
    drop(console);
    eprintln!("\n{left}");
    Ok(Exit::Done)
}

/// `qvirt qmp`
pub async fn qmp(vm: &VmName, command: &str, arguments: Option<&str>) -> Result<Exit, Problem> {
    let arguments = match arguments.map(serde_json::from_str::<Value>) {
        None => Value::Null,
        Some(Ok(arguments @ Value::Object(_))) => arguments,
        Some(Ok(_)) => {
            return Err(Problem::new(Exit::Usage, "the arguments are a JSON object: '{\"name\": value}'"));
        }
        Some(Err(error)) => {
            return Err(Problem::new(Exit::Usage, format!("the arguments are no JSON: {error}")));
        }
    };
    let reply = connect(&Folders::find()?, vm).await?.call(command, arguments).await?;
    print::json(&reply)?;
    Ok(Exit::Done)
}

/// `qvirt recover`
pub async fn recover(vm: Option<&VmName>, json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let (mut report, mut failed) = (Vec::new(), None);
    if let Some(vm) = vm {
        if target::life_of(&folders, vm)? == Life::None && !folders.config_file(vm).exists() {
            return Err(target::unknown(&folders, vm));
        }
        let devices = crate::adopt::recover(&folders, vm)?;
        report.push(json!({"vm": vm, "devices": devices}));
    } else {
        for vm in folders.with_runtime()? {
            if target::life_of(&folders, &vm)? == Life::Remains {
                let devices = crate::adopt::recover(&folders, &vm)?;
                report.push(json!({"vm": vm, "devices": devices}));
            }
        }
        let (undone, error) = undo_of_the_dead(&folders);
        report.extend(undone.iter().map(|change| json!({"undone": change.to_string()})));
        failed = error;
    }
    if json {
        print::json(&report)?;
    } else {
        for entry in &report {
            if let Some(change) = entry["undone"].as_str() {
                println!("a command on this host died at work; undone: {change}");
                continue;
            }
            let devices: Vec<&str> =
                entry["devices"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            println!(
                "{}: cleared up{}",
                entry["vm"].as_str().unwrap_or(""),
                match devices.as_slice() {
                    [] => String::new(),
                    devices => format!(" behind {}", devices.join(", ")),
                }
            );
        }
    }
    failed.map_or(Ok(Exit::Done), |error| Err(error.into()))
}

/// Connects to the read-only socket of an owner, if there is one.
pub async fn read_only(folders: &Folders, vm: &VmName) -> Option<UnixStream> {
    UnixStream::connect(folders.vm(vm).ok()?.control_ro()).await.ok()
}
