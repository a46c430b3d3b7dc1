//! Layers of a disk that are to go into one below them: which snapshots that would destroy, and what else is in the way. By the book alone.

use devices::DeviceId;
use thiserror::Error;

use super::book::{Book, Chain, SnapshotName};
use super::tidy::Task;
use crate::folders::VmName;
use crate::request::BlockCommit;

/// Why layers cannot be committed.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CommitError {
    #[error(
        "disk {id}: qvirt made no layer of {top}, so there is nothing to commit: `qvirt blocks` shows its chain"
    )]
    NoLayer { id: DeviceId, top: String },
    #[error("disk {id}: {image} is no layer of it that qvirt made, nor the image below those: it has {}", .line.join(", "))]
    NotOfIt { id: DeviceId, image: String, line: Vec<String> },
    #[error("disk {id}: {top} does not stand above {base}: exchange --top and --base")]
    UpsideDown { id: DeviceId, top: String, base: String },
    #[error(
        "disk {id}: that would destroy what {} kept: `qvirt snapshot delete` them, or let --delete-snapshots do so",
        snapshots(.names)
    )]
    Snapshots { id: DeviceId, names: Vec<String> },
    #[error(
        "disk {id}: a start from {base}, which its config names, finds the disk by what stands on that image: pull no further than --base {base}, or commit \
         into it"
    )]
    TooFar { id: DeviceId, base: String },
    #[error("disk {id}: overlay {above} stands on {image} as well, for {}: delete what it is for first", snapshots(.names))]
    Branch { id: DeviceId, above: String, image: String, names: Vec<String> },
}

fn snapshots(names: &[String]) -> String {
    let word = if names.len() == 1 { "snapshot" } else { "snapshots" };
    format!("{word} {}", names.join(", "))
}

/// What is to be deleted for layers to be committed.
#[derive(Debug, PartialEq, Eq)]
pub struct Commit {
    /// The base of the disk's chain.
    pub base: String,
    /// Snapshots of the VM that are lost.
    pub names: Vec<SnapshotName>,
}

impl Book {
    /// Whether layers of a disk, which stands on `top`, can go into one below them.
    ///
    /// # Errors
    /// They cannot, or only if snapshots are deleted that nobody gave up.
    pub fn commit(
        &self,
        vm: &VmName,
        id: &DeviceId,
        top: &str,
        wish: &BlockCommit,
    ) -> Result<Commit, CommitError> {
        let no_layer = || CommitError::NoLayer { id: id.clone(), top: top.to_owned() };
        let chain = self.chain_of_top(top).ok_or_else(no_layer)?;
        let line = line(chain, &chain.top);
        let depth = |image: Option<&String>, default: usize| match image {
            None => Ok(default),
            Some(image) => line.iter().position(|layer| layer == image).ok_or_else(|| CommitError::NotOfIt {
                id: id.clone(),
                image: image.clone(),
                line: line.iter().map(ToString::to_string).collect(),
            }),
        };
        let (from, into) = (depth(wish.top.as_ref(), 0)?, depth(wish.base.as_ref(), line.len() - 1)?);
        if from >= into {
            let (top, base) = (line[from].to_owned(), line[into].to_owned());
            return Err(CommitError::UpsideDown { id: id.clone(), top, base });
        }
        let changed = &line[from + 1..=into];
        let lost =
            self.snapshots.iter().filter(|s| s.disks.iter().any(|d| changed.contains(&d.image.as_str())));
        let (own, others): (Vec<_>, Vec<_>) =
            lost.partition(|snapshot| snapshot.vm == *vm && wish.delete_snapshots);
        if !others.is_empty() {
            let name = |snapshot: &super::Snapshot| match snapshot.vm == *vm {
                true => snapshot.name.to_string(),
                false => format!("{} of VM {}", snapshot.name, snapshot.vm),
            };
            return Err(CommitError::Snapshots {
                id: id.clone(),
                names: others.into_iter().map(name).collect(),
            });
        }
        let names: Vec<SnapshotName> = own.iter().map(|snapshot| snapshot.name.clone()).collect();
        self.clone().leaves_none(vm, id, &names, chain, &line[from..into])?;
        Ok(Commit { base: chain.base.clone(), names })
    }

    /// The image on which the uppermost layer of a disk, `top`, is to stand when others were pulled into it; none if on nothing.
    ///
    /// # Errors
    /// Nobody would find the disk any more.
    pub fn pull(&self, id: &DeviceId, top: &str, base: Option<&str>) -> Result<Option<String>, CommitError> {
        let Some(chain) = self.chain_of_top(top) else { return Ok(base.map(str::to_owned)) };
        let base = base.unwrap_or(&chain.base);
        match line(chain, top).contains(&base) {
            true => Ok(Some(base.to_owned())),
            false => Err(CommitError::TooFar { id: id.clone(), base: chain.base.clone() }),
        }
    }

    /// Whether layers are gone once snapshots are forgotten and all is merged that can be.
    fn leaves_none(
        &mut self,
        vm: &VmName,
        id: &DeviceId,
        names: &[SnapshotName],
        chain: &Chain,
        layers: &[&str],
    ) -> Result<(), CommitError> {
        self.forget(vm, names);
        while let Some(task) = self.task(&chain.base) {
            match task {
                Task::Drop(overlay) => self.dropped(&overlay),
                Task::Merge(merge) => self.merged(&merge),
            }
        }
        let Some(left) = layers.iter().find_map(|layer| self.overlay(layer)) else { return Ok(()) };
        let mut others = self.chains.iter().flat_map(|chain| &chain.overlays);
        let Some(above) = others.find(|other| other.backing == left.backing && other.path != left.path)
        else {
            return Ok(());
        };
        let needs = |image: &str| line(chain, image).contains(&above.path.as_str());
        let names =
            self.snapshots.iter().filter(|snapshot| snapshot.disks.iter().any(|disk| needs(&disk.image)));
        Err(CommitError::Branch {
            id: id.clone(),
            above: above.path.clone(),
            image: left.backing.clone(),
            names: names.map(|snapshot| snapshot.name.to_string()).collect(),
        })
    }
}

/// The images that one shows, itself first.
fn line<'a>(chain: &'a Chain, image: &'a str) -> Vec<&'a str> {
    let mut line = vec![image];
    while let Some(overlay) =
        chain.overlays.iter().find(|overlay| Some(&overlay.path.as_str()) == line.last())
    {
        line.push(&overlay.backing);
    }
    line
}
