//! `qvirt io` and `qvirt drill`: disks whose storage fails, and disks that are made to fail.

use std::time::{Duration, Instant};

use devices::retry::AtTimeout;

use super::args::{Drill, Io};
use super::client::{Client, connect};
use super::{Exit, Problem, print};
use crate::folders::{Folders, VmName};
use crate::request;
use crate::status::{DeviceStatus, IoState, IoStatus};
use crate::suspend::hang::read_beginning;

/// `qvirt io`
pub async fn io(command: Io) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    match command {
        Io::Status { vm, json } => return status(&folders, &vm, json).await,
        Io::Retry { vm, disk } => {
            connect(&folders, &vm).await?.call("qvirt-io-retry", request::DiskName { id: disk }).await?
        }
        Io::Fail { vm, disk } => {
            connect(&folders, &vm).await?.call("qvirt-io-fail", request::DiskName { id: disk }).await?
        }
        Io::Set { vm, disk, interval, timeout, at_timeout } => {
            let set = request::IoSet { id: disk, interval, timeout, at_timeout };
            connect(&folders, &vm).await?.call("qvirt-io-set", set).await?
        }
    };
    Ok(Exit::Done)
}

/// `qvirt io-probe`
pub fn probe(image: &std::path::Path) -> Result<Exit, Problem> {
    // One that is not there says nothing of its storage.
    Ok(if read_beginning(image)? { Exit::Done } else { Exit::Refused })
}

async fn status(folders: &Folders, vm: &VmName, json: bool) -> Result<Exit, Problem> {
    let status = connect(folders, vm).await?.status().await?;
    let disks: Vec<&DeviceStatus> = status.devices.iter().filter(|device| device.io.is_some()).collect();
    if json {
        print::json(&disks)?
    } else {
        print::io(&disks)?
    }
    Ok(Exit::Done)
}

/// How often a drill is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// `qvirt drill`: makes a disk fail, and tells what its policy did until its I/O goes on.
pub async fn drill(drill: Drill) -> Result<Exit, Problem> {
    let client = connect(&Folders::find()?, &drill.vm).await?;
    let all = !(drill.reads || drill.writes || drill.flushes);
    let wanted = request::Drill {
        id: drill.disk.clone(),
        fail_for_ms: u64::try_from(drill.fail_for.as_millis()).unwrap_or(u64::MAX),
        reads: drill.reads || all,
        writes: drill.writes || all,
        flushes: drill.flushes || drill.writes || all,
    };
    let before = disk(&client, &drill.disk).await?;
    client.call("qvirt-drill", wanted).await?;
    let begin = Instant::now();
    let say = |text: &str| println!("{:6.1}s  {text}", begin.elapsed().as_secs_f32());
    say(&format!("{}: its storage fails for {:?}", drill.disk, drill.fail_for));
    let mut last = IoState::Ok;
    // What was done at the timeout.
    let mut act = None;
    // After the outage a disk is tried at its interval; whatever takes longer than twice that is worth an error.
    let interval = before.on_error.as_ref().map_or(Duration::ZERO, |retry| retry.interval.duration());
    let deadline = drill.fail_for + interval * 2 + PATIENCE;
    loop {
        let status = client.status().await?;
        let Some(now) = status.device(&drill.disk) else {
            // Between two looks it may have timed out and gone.
            if act != Some(AtTimeout::Unplug) && !unplugs_after(&before, begin.elapsed()) {
                return Err(gone(&drill.disk));
            }
            say("the disk was unplugged, as its at_timeout says: `qvirt attach` gives it back");
            return Ok(Exit::Done);
        };
        let Some(io) = now.io.as_ref() else {
            // It is leaving.
            if begin.elapsed() > deadline {
                return Err(gone(&drill.disk));
            }
            tokio::time::sleep(LOOK).await;
            continue;
        };
        if io.state != last {
            say(&print::io_words(io));
            last = io.state;
        }
        act = act.or_else(|| io.outage.as_ref()?.at_timeout);
        if !io.drilled && io.state == IoState::TimedOut && act == Some(AtTimeout::Pause) {
            say("the VM is paused, as its at_timeout says: `qvirt resume` tries the disk again");
            return Ok(Exit::Done);
        }
        if !io.drilled && io.state == IoState::Ok && act != Some(AtTimeout::Unplug) {
            say(&recovery_words(&before, io));
            return Ok(Exit::Done);
        }
        if begin.elapsed() > deadline {
            let text = format!(
                "disk {} has not recovered {:?} after the drill: {}",
                drill.disk,
                deadline - drill.fail_for,
                print::io_words(io)
            );
            return Err(Problem::new(Exit::Pending, text));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is said of a disk that works again, by how it was before and is now.
fn recovery_words(before: &DeviceStatus, now: &IoStatus) -> String {
    let counted = |f: fn(&crate::suspend::Counters) -> u64| {
        f(&now.counters) - before.io.as_ref().map_or(0, |io| f(&io.counters))
    };
    match (counted(|c| c.suspensions), counted(|c| c.retries)) {
        (0, _) => "it works again; nobody used it meanwhile, so nothing was seen".to_owned(),
        (_, 1) => "it works again, after 1 attempt".to_owned(),
        (_, retries) => format!("it works again, after {retries} attempts"),
    }
}

/// Whether a disk is to be unplugged by its timeout when its storage has failed for that long.
fn unplugs_after(disk: &DeviceStatus, time: Duration) -> bool {
    let retry = disk.on_error.as_ref().filter(|retry| retry.at_timeout == AtTimeout::Unplug);
    retry.and_then(|retry| retry.timeout).is_some_and(|timeout| time >= timeout.duration())
}

/// How long a disk may take to recover beyond its interval.
const PATIENCE: Duration = Duration::from_secs(10);

async fn disk(client: &Client, name: &str) -> Result<DeviceStatus, Problem> {
    client.status().await?.device(name).cloned().ok_or_else(|| gone(name))
}

fn gone(name: &str) -> Problem {
    Problem::new(Exit::Unknown, format!("there is no disk {name} that retries"))
}
