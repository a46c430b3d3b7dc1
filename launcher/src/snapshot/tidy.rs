//! Chains without layers that nobody wants any more: what is to be done, by the book alone, and how it is done where no QEMU has the images open.
//!
//! Two things only: a layer that is no snapshot's state is merged with the only one that stands on it, and an overlay that nobody wants and nothing stands on
//! goes. Each is done in an order in which whoever dies leaves a chain that shows the same disk, and the next one does it again.

use std::path::Path;
use std::process::{Command, Stdio};

use devices::host::{Format, Layer};
use thiserror::Error;

use super::book::{Book, Chain, Overlay, SnapshotName};
use super::store::{Store, StoreError};
use crate::folders::VmName;
use crate::image::{self, ImageError};
use crate::injection::{Injected, Steps};

/// Names of the steps of a deletion.
pub const STEPS: &[&str] = &["forget", "commit", "rebase", "book", "drop"];

/// What cannot be tidied.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum TidyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(
        "{image}: its header names {found:?} below it, and {expected} is known to be there: `qvirt chain check` says what to do"
    )]
    Astray { image: String, expected: String, found: Option<String> },
    #[error("{image}: qemu-img {what} failed, and the disk is as it was: {words}")]
    QemuImg { image: String, what: &'static str, words: String },
    #[error(transparent)]
    Injected(#[from] Injected),
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// An overlay that nobody wants goes.
    Drop(Overlay),
    /// What a layer has goes into the one below it.
    Merge(Merge),
}

/// A layer that goes into the one below.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Merge {
    /// The overlay that goes.
    pub from: String,
    /// The image below, which has all of it then.
    pub into: String,
    /// Its format.
    pub format: Format,
    /// Overlays that stand on the one that goes.
    pub above: Vec<String>,
    /// The chain as it is before.
    pub chain: Chain,
}

impl Book {
    /// Forgets snapshots of a VM; what came from them comes from what they came from.
    pub fn forget(&mut self, vm: &VmName, names: &[SnapshotName]) {
        for name in names {
            let Some(gone) = self.snapshot(vm, name).cloned() else { continue };
            self.snapshots.retain(|snapshot| *snapshot != gone);
            for child in self.snapshots.iter_mut().filter(|child| child.vm == *vm) {
                if child.parent.as_ref() == Some(name) {
                    child.parent.clone_from(&gone.parent);
                }
            }
            let images: Vec<&str> = gone.disks.iter().map(|disk| disk.image.as_str()).collect();
            let frozen = self.chains.iter_mut().flat_map(|chain| &mut chain.overlays);
            frozen
                .filter(|image| images.contains(&image.path.as_str()))
                .for_each(|image| image.unwanted = true);
        }
    }

    /// A snapshot and all that came from it, itself first.
    pub fn with_children(&self, vm: &VmName, name: &SnapshotName) -> Vec<SnapshotName> {
        let mut names = vec![name.clone()];
        let mut next = 0;
        while let Some(parent) = names.get(next).cloned() {
            let children = self.of_vm(vm).filter(|snapshot| snapshot.parent.as_ref() == Some(&parent));
            names.extend(children.map(|child| child.name.clone()));
            next += 1;
        }
        names
    }

    fn is_state(&self, path: &str) -> bool {
        self.snapshots.iter().flat_map(|snapshot| &snapshot.disks).any(|disk| disk.image == path)
    }

    /// What is to be done next to a chain.
    pub fn task(&self, base: &str) -> Option<Task> {
        let chain = self.chains.iter().find(|chain| chain.base == base)?;
        let above = |path: &str| chain.overlays.iter().filter(move |o| o.backing == path).collect::<Vec<_>>();
        let is_free = |path: &str| chain.top != path && !self.is_state(path);
        let is_unwanted =
            |overlay: &Overlay| overlay.unwanted || self.snapshot(&overlay.vm, &overlay.snapshot).is_none();
        let mut overlays = chain.overlays.iter();
        if let Some(gone) = overlays.find(|o| is_free(&o.path) && above(&o.path).is_empty() && is_unwanted(o))
        {
            return Some(Task::Drop(gone.clone()));
        }
        let overlays = chain.overlays.iter().map(|overlay| (overlay.path.as_str(), Format::Qcow2));
        let mut images = std::iter::once((chain.base.as_str(), chain.format)).chain(overlays);
        images.find_map(|(into, format)| match above(into)[..] {
            [only] if is_free(into) => Some(Task::Merge(Merge {
                from: only.path.clone(),
                into: into.to_owned(),
                format,
                above: above(&only.path).into_iter().map(|overlay| overlay.path.clone()).collect(),
                chain: chain.clone(),
            })),
            _ => None,
        })
    }

    /// An overlay was dropped: its file is to be removed.
    pub fn dropped(&mut self, gone: &Overlay) {
        self.chains.iter_mut().for_each(|chain| chain.overlays.retain(|overlay| overlay.path != gone.path));
        self.chains.retain(|chain| !chain.overlays.is_empty());
        self.making.push(super::book::Making {
            vm: gone.vm.clone(),
            path: gone.path.clone(),
            backing: gone.backing.clone(),
        });
    }

    /// A layer was merged into the one below: its file is to be removed.
    pub fn merged(&mut self, merge: &Merge) {
        let Some(gone) = self.overlay(&merge.from).cloned() else { return };
        for chain in &mut self.chains {
            if chain.top == merge.from {
                chain.top.clone_from(&merge.into);
            }
            for overlay in &mut chain.overlays {
                if overlay.backing == merge.from {
                    overlay.backing.clone_from(&merge.into);
                }
                // It is now what the other one was.
                if overlay.path == merge.into {
                    overlay.unwanted = gone.unwanted;
                }
            }
        }
        for disk in self.snapshots.iter_mut().flat_map(|snapshot| &mut snapshot.disks) {
            if disk.image == merge.from {
                (disk.image, disk.format) = (merge.into.clone(), merge.format);
            }
            if disk.overlay == merge.from {
                disk.overlay.clone_from(&merge.into);
            }
        }
        self.dropped(&gone);
    }

    /// A layer that is written, and so no snapshot's state, was not merged after all.
    pub fn not_merged(&mut self, merge: &Merge) {
        self.making.retain(|making| making.path != merge.from);
        self.chains.retain(|chain| chain.base != merge.chain.base);
        self.chains.push(merge.chain.clone());
    }
}

/// Does all that is to be done to some chains, whose images no QEMU has open.
///
/// # Errors
/// What was done is done; the rest is done by whoever does it again.
pub fn tidy(
    store: &Store,
    bases: &[String],
    vm: &VmName,
    qemu_img: &Path,
    steps: &mut Steps,
) -> Result<(), TidyError> {
    for base in bases {
        while let Some(task) = store.read()?.task(base) {
            one(store, task, vm, qemu_img, steps)?;
        }
    }
    Ok(())
}

/// Does one thing.
///
/// # Errors
/// It can be done again.
pub fn one(
    store: &Store,
    task: Task,
    vm: &VmName,
    qemu_img: &Path,
    steps: &mut Steps,
) -> Result<(), TidyError> {
    match task {
        Task::Drop(overlay) => {
            steps.enter("drop")?;
            store.change::<_, StoreError>(|book| {
                book.dropped(&overlay);
                Ok(())
            })?;
        }
        Task::Merge(merge) => {
            merge_files(&merge, qemu_img, steps)?;
            steps.enter("book")?;
            store.change::<_, StoreError>(|book| {
                book.merged(&merge);
                Ok(())
            })?;
        }
    }
    Ok(store.sweep(vm)?)
}

/// Puts all of a layer into the one below it, and those above onto that one.
fn merge_files(merge: &Merge, qemu_img: &Path, steps: &mut Steps) -> Result<(), TidyError> {
    let below = image::backing_of(Path::new(&merge.from))?.map(|(path, _)| path);
    if below.as_ref() != Some(&merge.into) {
        return Err(TidyError::Astray {
            image: merge.from.clone(),
            expected: merge.into.clone(),
            found: below,
        });
    }
    steps.enter("commit")?;
    run(qemu_img, "commit", &["commit", "-q", "-d", "-f", "qcow2", &merge.from], &merge.from)?;
    for above in &merge.above {
        steps.enter("rebase")?;
        let format = merge.format.word();
        let words = ["rebase", "-q", "-u", "-f", "qcow2", "-b", &merge.into, "-F", format, above];
        run(qemu_img, "rebase", &words, above)?;
    }
    merge.above.iter().chain([&merge.into]).try_for_each(|path| flush(path))
}

/// Puts all that is between an overlay and an image below, or nothing, into that overlay.
pub(super) fn pull_files(top: &str, below: Option<&Layer>, qemu_img: &Path) -> Result<(), TidyError> {
    let (below, format) = below.map_or(("", Format::Raw), |layer| (layer.path.as_str(), layer.format));
    let mut words = vec!["rebase", "-q", "-f", "qcow2", "-b", below];
    if !below.is_empty() {
        words.extend(["-F", format.word()]);
    }
    words.push(top);
    run(qemu_img, "rebase", &words, top)?;
    flush(top)
}

/// The book is flushed, and what it says must be so after a power cut.
///
/// # Errors
/// The image cannot be opened or flushed.
pub fn flush(path: &str) -> Result<(), TidyError> {
    let flushed = std::fs::File::open(path).and_then(|file| file.sync_all());
    Ok(flushed.map_err(|source| ImageError::Read { path: path.into(), source })?)
}

fn run(qemu_img: &Path, what: &'static str, words: &[&str], image: &str) -> Result<(), TidyError> {
    let failed = |words: String| TidyError::QemuImg { image: image.to_owned(), what, words };
    let output = Command::new(qemu_img).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::book::{Chain, Snapshot, SnapshotDisk};

    fn name(text: &str) -> SnapshotName {
        text.parse().expect("a name")
    }

    fn vm() -> VmName {
        "web".parse().expect("a name")
    }

    fn overlay(path: &str, backing: &str, snapshot: &str) -> Overlay {
        let snapshot = name(snapshot);
        Overlay {
            path: path.into(),
            backing: backing.into(),
            vm: vm(),
            snapshot,
            unwanted: false,
            pulling: false,
        }
    }

    fn snapshot(text: &str, image: &str, overlay: &str, parent: Option<&str>) -> Snapshot {
        let id = "sys".parse().expect("an id");
        let format = if image == "B" { Format::Raw } else { Format::Qcow2 };
        Snapshot {
            vm: vm(),
            name: name(text),
            created_unix_secs: 1,
            state: "running".into(),
            quiesced: false,
            description: String::new(),
            parent: parent.map(name),
            disks: vec![SnapshotDisk {
                id,
                base: "B".into(),
                image: image.into(),
                format,
                overlay: overlay.into(),
            }],
        }
    }

    /// Snapshots 1 to 3 one after the other: `B <- 1 <- 2 <- 3`, the last one written.
    fn three() -> Book {
        let overlays = vec![overlay("1", "B", "s1"), overlay("2", "1", "s2"), overlay("3", "2", "s3")];
        let chain =
            Chain { base: "B".into(), format: Format::Raw, inode: 1, device: 1, top: "3".into(), overlays };
        let snapshots = vec![
            snapshot("s1", "B", "1", None),
            snapshot("s2", "1", "2", Some("s1")),
            snapshot("s3", "2", "3", Some("s2")),
        ];
        Book { format: 1, chains: vec![chain], snapshots, making: Vec::new() }
    }

    /// Does all tasks, as if files followed; tells them.
    fn done(book: &mut Book) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(task) = book.task("B") {
            match task {
                Task::Drop(overlay) => {
                    told.push(format!("drop {}", overlay.path));
                    book.dropped(&overlay);
                }
                Task::Merge(merge) => {
                    told.push(format!("{} into {}", merge.from, merge.into));
                    book.merged(&merge);
                }
            }
            assert!(told.len() < 20, "without end: {told:?}");
        }
        told
    }

    fn images(book: &Book) -> Vec<(&str, &str)> {
        book.snapshots.iter().map(|s| (s.name.as_str(), s.disks[0].image.as_str())).collect()
    }

    #[test]
    fn the_oldest_the_middle_and_the_newest() {
        let mut book = three();
        assert_eq!(book.task("B"), None, "every layer is a state, or written");
        book.forget(&vm(), &[name("s2")]);
        assert_eq!(done(&mut book), ["2 into 1"]);
        assert_eq!(images(&book), [("s1", "B"), ("s3", "1")]);
        assert_eq!(book.snapshots[1].parent, Some(name("s1")));

        let mut book = three();
        book.forget(&vm(), &[name("s1")]);
        assert_eq!(done(&mut book), ["1 into B"]);
        assert_eq!(images(&book), [("s2", "B"), ("s3", "2")]);
        assert_eq!(book.snapshots[0].disks[0].format, Format::Raw);

        let mut book = three();
        book.forget(&vm(), &[name("s3")]);
        assert_eq!(done(&mut book), ["3 into 2"]);
        assert_eq!((images(&book), book.chains[0].top.as_str()), (vec![("s1", "B"), ("s2", "1")], "2"));

        let all = book.with_children(&vm(), &name("s1"));
        book.forget(&vm(), &all);
        assert_eq!(done(&mut book), ["1 into B", "2 into B"]);
        assert!(book.chains.is_empty() && book.snapshots.is_empty());
        assert_eq!(book.making.len(), 3, "files that are to go");
    }

    /// A revert to s1: `B <- 1 <- 2 <- 3` and `B <- 4`, the last one written.
    #[test]
    fn branches_that_a_revert_left() {
        let mut book = three();
        book.chains[0].overlays.push(overlay("4", "B", "s1"));
        book.chains[0].top = "4".into();
        assert_eq!(book.task("B"), None, "what was left stays");
        // Two stand on the state of s1, so it stays, without a name.
        book.forget(&vm(), &[name("s1")]);
        assert_eq!(done(&mut book), [""; 0]);
        // The branch goes from its end.
        book.forget(&vm(), &[name("s3")]);
        assert_eq!(done(&mut book), ["drop 3", "drop 2"]);
        book.forget(&vm(), &[name("s2")]);
        assert_eq!(done(&mut book), ["drop 1", "4 into B"]);
        assert!(book.chains.is_empty());
    }
}
