//! `qvirt events`: follows VMs through their read-only sockets, across restarts of their owners.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use qmp_client::{Event, Options, Qmp};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::live::read_only;
use super::{Exit, Problem, target};
use crate::adopt::Life;
use crate::folders::{Folders, VmName};

/// How often a VM without an owner, and the list of VMs, is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Follows until the reader goes away or a signal comes.
pub async fn follow(vms: &[VmName], as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    for vm in vms {
        if target::life_of(&folders, vm)? == Life::None && !folders.config_file(vm).exists() {
            return Err(target::unknown(&folders, vm));
        }
    }
    let (sender, mut events) = mpsc::channel::<(VmName, Event)>(64);
    let mut followed = BTreeSet::new();
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            Some((vm, event)) = events.recv() => print(&vm, &event, as_json)?,
            _ = tick.tick() => {
                let wanted = if vms.is_empty() { folders.with_runtime()? } else { vms.to_vec() };
                for vm in wanted {
                    if followed.insert(vm.clone()) {
                        tokio::spawn(follow_one(folders.clone(), vm, sender.clone()));
                    }
                }
            }
        }
    }
}

/// Follows one VM: connects, forwards, and connects again when the owner is gone.
async fn follow_one(folders: Folders, vm: VmName, sender: mpsc::Sender<(VmName, Event)>) {
    let mut connected_before = false;
    loop {
        if let Some(stream) = read_only(&folders, &vm).await
            && let Ok((qmp, mut events)) = Qmp::connect(stream, Options::default()).await
        {
            let word = if connected_before { "QVIRT_OWNER_BACK" } else { "QVIRT_FOLLOWING" };
            connected_before = true;
            let mut next = Some(own(word, qmp.call("qvirt-status", Value::Null).await.unwrap_or_default()));
            while let Some(event) = next {
                if sender.send((vm.clone(), event)).await.is_err() {
                    return;
                }
                next = events.next().await;
            }
            if sender.send((vm.clone(), own("QVIRT_OWNER_GONE", Value::Null))).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// An event of this program's own: what it sees of the owner.
fn own(name: &str, status: Value) -> Event {
    let data = match &status["state"] {
        Value::Null => Value::Null,
        state => json!({"state": state, "reason": status["reason"]}),
    };
    Event { timestamp: qmp_client::Timestamp::now(), name: name.to_owned(), data }
}

fn print(vm: &VmName, event: &Event, as_json: bool) -> Result<(), Problem> {
    let mut out = std::io::stdout().lock();
    if as_json {
        let mut line = serde_json::to_value(event)?;
        line["vm"] = vm.as_str().into();
        writeln!(out, "{line}")?;
    } else {
        let seconds = event.timestamp.seconds;
        let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let millis = event.timestamp.microseconds / 1000;
        let members = event.data.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
        let data = members.map(|(key, value)| match value {
            Value::String(text) => format!(" {key}={text}"),
            value => format!(" {key}={value}"),
        });
        writeln!(
            out,
            "{hours:02}:{minutes:02}:{seconds:02}.{millis:03}Z {vm} {}{}",
            event.name,
            data.collect::<String>()
        )?;
    }
    Ok(out.flush()?)
}
