//! Whether a VM that another one is to migrate into treats I/O errors as its source does: an outage must not mean more, or something
//! else, on the other side. The engines may differ, because the QEMUs may.

use devices::retry::{Policies, Retry};
use devices::units::Millis;
use devices::{Layout, Placed};
use thiserror::Error;

use crate::status::{DeviceStatus, Status};

/// Something that is not as it is at the source.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Difference {
    /// A setting.
    #[error(
        "disk {disk}: on_error.{key} is \"{here}\" in this config and \"{there}\" at the source: set {key} = \"{there}\" here, or \
         change the source"
    )]
    Setting {
        /// The disk, with its label.
        disk: String,
        /// The key.
        key: &'static str,
        /// The value in the config that was checked.
        here: String,
        /// The value at the source.
        there: String,
    },
    /// A disk that the source does not have.
    #[error(
        "disk {disk}: the source has none of this target and none of this id: take it out of this config, or name it as the source does"
    )]
    OnlyHere {
        /// The disk, with its label.
        disk: String,
    },
    /// A disk that the source alone has.
    #[error(
        "disk {disk}: the source has it and this config does not: write it into this config, or detach it at the source"
    )]
    OnlyThere {
        /// The disk, with its label.
        disk: String,
    },
    /// A source that says nothing of its policies.
    #[error(
        "disk {disk}: the source's status does not tell its on_error: take the status with this version of qvirt"
    )]
    Untold {
        /// The disk, with its label.
        disk: String,
    },
}

/// All that differs between the disks of a planned machine and those of its source.
pub fn differences(layout: &Layout, source: &Status) -> Vec<Difference> {
    let mut theirs: Vec<&DeviceStatus> = source.devices.iter().filter(|d| d.kind == "disk").collect();
    let mut found = Vec::new();
    for placed in layout.devices() {
        let Some(policies) = placed.policies() else { continue };
        let disk = name(placed.id.as_str(), placed.label().map(|label| label.as_str()));
        let Some(at) = position(&theirs, placed) else {
            found.push(Difference::OnlyHere { disk });
            continue;
        };
        let there = theirs.swap_remove(at);
        let Some(their_policies) = &there.policies else {
            found.push(Difference::Untold { disk });
            continue;
        };
        let here = settings(&policies, placed.retry.as_ref());
        let there = settings(their_policies, there.on_error.as_ref());
        // What the source has no use for is not told: another key, which makes it so, differs and is.
        let differing = here.into_iter().zip(there).filter_map(|((key, here), (_, there))| {
            let (here, there) = (here.unwrap_or_else(|| "none".to_owned()), there?);
            (here != there).then(|| Difference::Setting { disk: disk.clone(), key, here, there })
        });
        found.extend(differing);
    }
    let only_there = |d: &DeviceStatus| Difference::OnlyThere { disk: name(&d.id, d.label.as_deref()) };
    found.extend(theirs.into_iter().map(only_there));
    found
}

/// The disk of the same target, or of the same id.
fn position(disks: &[&DeviceStatus], placed: &Placed) -> Option<usize> {
    let label = placed.label().map(|label| label.as_str());
    let by_label = disks.iter().position(|d| label.is_some() && d.label.as_deref() == label);
    by_label.or_else(|| disks.iter().position(|d| d.id == placed.id.as_str()))
}

/// Every key with its value, as one would write it; `None` where it is without effect.
fn settings(policies: &Policies, retry: Option<&Retry>) -> [(&'static str, Option<String>); 5] {
    let timeout = |retry: &Retry| retry.timeout.unwrap_or(Millis::new(0)).to_string();
    let act = |retry: &Retry| retry.timeout.map(|_| retry.at_timeout.to_string());
    [
        ("read", Some(policies.read.to_string())),
        ("write", Some(policies.write.to_string())),
        ("interval", retry.map(|retry| retry.interval.to_string())),
        ("timeout", retry.map(timeout)),
        ("at_timeout", retry.and_then(act)),
    ]
}

fn name(id: &str, label: Option<&str>) -> String {
    label.map_or_else(|| id.to_owned(), |label| format!("{id} ({label})"))
}
