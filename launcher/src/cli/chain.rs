//! `qvirt chain check`: what is known of a VM's chains compared with the images, and with what QEMU has open, and mended.

use serde_json::json;

use super::client::{Client, connect};
use super::snapshot::is_live;
use super::{Exit, Problem, print, target};
use crate::adopt::Life;
use crate::folders::Folders;
use crate::process::find_binary;
use crate::snapshot::doctor::{Finding, NamedDisk, Remedy, disks, examine, mend};
use crate::snapshot::files::qemu_img;
use crate::snapshot::stopped::Held;
use crate::snapshot::{Store, nodes};
use crate::status::{DeviceStatus, Status};

/// `qvirt chain check`
pub async fn check(name: &str, repair: bool, as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, name)?;
    let config = target::config(&folders, name)?;
    let store = Store::new(&folders.state);
    let mut disks = disks(&config.devices);
    let client = match target::life_of(&folders, &vm)? {
        Life::Owned => Some(connect(&folders, &vm).await?),
        _ => None,
    };
    let mut of_nodes = Vec::new();
    if let Some(client) = &client {
        let status = client.status().await?;
        add_plugged(&mut disks, &status.devices);
        of_nodes = open_images(client, &status).await?;
    }
    let mut findings = examine(&store.read()?, &vm, &disks, &store.path());
    if repair && findings.iter().any(|finding| finding.remedy.is_some()) {
        if is_live(&folders, &vm)? {
            let message =
                format!("VM {vm} runs, and its chains are mended only while it does not: shut it down first");
            return Err(Problem::new(Exit::Refused, message));
        }
        let held = Held::take(&folders, &vm)?;
        let qemu_img = qemu_img(&find_binary(&config.qemu).unwrap_or_default());
        for remedy in findings.iter().filter_map(|finding| finding.remedy.as_ref()) {
            mend(remedy, &store, &vm, &qemu_img).map_err(|error| Problem::of(Exit::Failed, &error))?;
        }
        drop(held);
    }
    if let Some(client) = client.filter(|_| repair) {
        close(&client, &of_nodes).await?;
    }
    findings.extend(of_nodes);
    show(vm.as_str(), &findings, repair, as_json)?;
    let left = if repair { findings.iter().filter(|f| f.remedy.is_none()).count() } else { findings.len() };
    Ok(if left == 0 { Exit::Done } else { Exit::Failed })
}

/// Disks that were plugged in, of which the config knows nothing.
fn add_plugged(disks: &mut Vec<NamedDisk>, devices: &[DeviceStatus]) {
    let plugged = |device: &DeviceStatus| {
        let (id, base) = (device.id.parse().ok()?, device.layers.last().filter(|_| device.kind == "disk")?);
        Some(NamedDisk { id, path: base.path.clone().into(), format: base.format })
    };
    for disk in devices.iter().filter_map(plugged) {
        if disks.iter().all(|known| known.path != disk.path && known.id != disk.id) {
            disks.push(disk);
        }
    }
}

/// What is wrong with the images that QEMU has open.
async fn open_images(client: &Client, status: &Status) -> Result<Vec<Finding>, Problem> {
    if let Some(disk) = status.devices.iter().find(|device| device.is_suspended()) {
        // QEMU would look at the images, and wait for those that do not answer.
        let words =
            format!("the storage of {} is out of order, so what QEMU has open was not looked at", disk.id);
        return Ok(vec![Finding { words, remedy: None }]);
    }
    let nodes = client.call("query-named-block-nodes", json!({"flat": true})).await?;
    Ok(nodes::examine(&nodes, &status.devices)?)
}

async fn close(client: &Client, findings: &[Finding]) -> Result<(), Problem> {
    for finding in findings {
        if let Some(Remedy::Close(node)) = &finding.remedy {
            client.call("blockdev-del", json!({"node-name": node})).await?;
        }
    }
    Ok(())
}

fn show(vm: &str, findings: &[Finding], repair: bool, as_json: bool) -> Result<(), Problem> {
    if as_json {
        let finding = |finding: &Finding| {
            let remedy = finding.remedy.as_ref().map(Remedy::words);
            json!({"finding": finding.words, "mended": repair && remedy.is_some(), "remedy": remedy})
        };
        print::json(&findings.iter().map(finding).collect::<Vec<_>>())?;
        return Ok(());
    }
    if findings.is_empty() {
        println!("the chains of {vm} are as they should be");
    }
    for finding in findings {
        match &finding.remedy {
            Some(remedy) if repair => println!("{}: done: {}", finding.words, remedy.words()),
            Some(remedy) => println!("{}: --repair would {}", finding.words, remedy.words()),
            None => println!("{}", finding.words),
        }
    }
    Ok(())
}
