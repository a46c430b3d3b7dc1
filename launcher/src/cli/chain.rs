//! `qvirt chain check`: what is known of a VM's chains compared with the images, and mended.

use serde_json::json;

use super::snapshot::is_live;
use super::{Exit, Problem, print, target};
use crate::folders::Folders;
use crate::process::find_binary;
use crate::snapshot::Store;
use crate::snapshot::doctor::{Finding, disks, examine, mend};
use crate::snapshot::files::qemu_img;
use crate::snapshot::stopped::Held;

/// `qvirt chain check`
pub async fn check(name: &str, repair: bool, as_json: bool) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, name)?;
    let config = target::config(&folders, name)?;
    let store = Store::new(&folders.state);
    let disks = disks(&config.devices);
    let findings = examine(&store.read()?, &vm, &disks, &store.path());
    let can = findings.iter().any(|finding| finding.remedy.is_some());
    if repair && can {
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
    show(vm.as_str(), &findings, repair, as_json)?;
    let left = if repair { findings.iter().filter(|f| f.remedy.is_none()).count() } else { findings.len() };
    Ok(if left == 0 { Exit::Done } else { Exit::Failed })
}

fn show(vm: &str, findings: &[Finding], repair: bool, as_json: bool) -> Result<(), Problem> {
    if as_json {
        let finding = |finding: &Finding| {
            let remedy = finding.remedy.as_ref().map(crate::snapshot::doctor::Remedy::words);
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
