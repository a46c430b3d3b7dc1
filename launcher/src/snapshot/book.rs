//! What is known of chains and snapshots: plain data, as it stands in the file.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::DeviceId;
use devices::host::Format;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::folders::VmName;

/// Format of the file. A newer one is refused, older ones are read.
pub const FORMAT: u32 = 1;

/// The name of a snapshot: also a part of a file's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

/// Why a text is no name of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no name of a snapshot: write 1 to {max} ASCII letters, digits, `_`, `.` and `-`, a letter or digit first",
    max = SnapshotName::MAX_BYTES
)]
pub struct SnapshotNameError(String);

impl SnapshotName {
    /// The longest name.
    pub const MAX_BYTES: usize = 64;

    /// The name of a snapshot that was given none: the time, in seconds since 1970.
    pub fn of_time(unix_secs: u64) -> SnapshotName {
        SnapshotName(unix_secs.to_string())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotName {
    type Err = SnapshotNameError;

    fn from_str(text: &str) -> Result<SnapshotName, SnapshotNameError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !begins || text.len() > SnapshotName::MAX_BYTES || !text.chars().all(good) {
            return Err(SnapshotNameError(text.to_owned()));
        }
        Ok(SnapshotName(text.to_owned()))
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = SnapshotNameError;

    fn try_from(text: String) -> Result<SnapshotName, SnapshotNameError> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> String {
        name.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Book {
    /// [`FORMAT`] of whoever wrote it.
    pub format: u32,
    /// One for each image that has overlays.
    #[serde(default, rename = "chain", skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<Chain>,
    /// The snapshots, in the order in which they were made.
    #[serde(default, rename = "snapshot", skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Snapshot>,
    /// Overlays that are being made.
    #[serde(default, rename = "making", skip_serializing_if = "Vec::is_empty")]
    pub making: Vec<Making>,
}

/// An image that a config names, and what is on top of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// Canonical path of the base.
    pub base: String,
    /// Its format.
    pub format: Format,
    /// Its number in its file system.
    pub inode: u64,
    /// Its file system's number, as it was when the first overlay was made: it may be another one after a reboot.
    pub device: u64,
    /// Canonical path of the image that is written.
    pub top: String,
    /// Every overlay that qvirt made, those that revert left behind among them.
    #[serde(default, rename = "overlay", skip_serializing_if = "Vec::is_empty")]
    pub overlays: Vec<Overlay>,
}

/// A qcow2 image that qvirt made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// Canonical path.
    pub path: String,
    /// Canonical path of the image below.
    pub backing: String,
    /// The VM whose snapshot it was made for.
    pub vm: VmName,
    /// The snapshot that the image below is.
    pub snapshot: SnapshotName,
    /// Whether it goes as soon as nothing stands on it: it was a snapshot that is deleted, or was given up by a revert.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unwanted: bool,
    /// Whether it is about to stand on another image: its header knows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pulling: bool,
}

/// A snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The VM.
    pub vm: VmName,
    /// The name: one of its kind in the VM.
    pub name: SnapshotName,
    /// When, in seconds since 1970.
    pub created_unix_secs: u64,
    /// How the VM was: `running`, `paused`, `stopped`.
    pub state: String,
    /// Whether the guest's file systems were frozen meanwhile.
    #[serde(default)]
    pub quiesced: bool,
    /// What people wrote of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The snapshot that the disks came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotName>,
    /// Its disks.
    #[serde(rename = "disk")]
    pub disks: Vec<SnapshotDisk>,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDisk {
    /// The disk.
    pub id: DeviceId,
    /// Canonical path of its chain's base.
    pub base: String,
    /// Canonical path of the image that was frozen.
    pub image: String,
    /// Its format.
    pub format: Format,
    /// The overlay that has what was written since.
    pub overlay: String,
}

/// An overlay that is being made: whoever comes after a dead one removes it if no chain has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Making {
    /// The VM.
    pub vm: VmName,
    /// Its path.
    pub path: String,
    /// The image below.
    pub backing: String,
}

/// What an image is, by what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing<'a> {
    /// Nothing is known of it.
    Unknown,
    /// What is written is the top of its chain.
    Base(&'a Chain),
    /// It lies where a base was, and is another file.
    Replaced(&'a Chain),
    /// It is written by whoever has the chain.
    Top(&'a Chain),
    /// An overlay stands on it.
    Below(&'a Overlay),
    /// It was left behind by a revert.
    Abandoned(&'a Overlay),
}

impl Book {
    /// What the image of a canonical path is, by the numbers that `stat` gives of it.
    pub fn standing(&self, path: &str, (device, inode): (u64, u64)) -> Standing<'_> {
        for chain in &self.chains {
            if chain.base == path {
                return if chain.inode == inode { Standing::Base(chain) } else { Standing::Replaced(chain) };
            }
            if chain.top == path {
                return Standing::Top(chain);
            }
            // The same file by another name, a hard link, say.
            if (chain.device, chain.inode) == (device, inode) {
                return Standing::Base(chain);
            }
        }
        let overlays = || self.chains.iter().flat_map(|chain| &chain.overlays);
        if let Some(above) = overlays().find(|overlay| overlay.backing == path) {
            return Standing::Below(above);
        }
        overlays().find(|overlay| overlay.path == path).map_or(Standing::Unknown, Standing::Abandoned)
    }

    /// The chain whose top an image is.
    pub fn chain_of_top(&self, top: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.top == top)
    }

    /// The overlay of a path.
    pub fn overlay(&self, path: &str) -> Option<&Overlay> {
        self.chains.iter().flat_map(|chain| &chain.overlays).find(|overlay| overlay.path == path)
    }

    /// A VM's snapshots, the oldest first.
    pub fn of_vm<'a>(&'a self, vm: &'a VmName) -> impl Iterator<Item = &'a Snapshot> {
        self.snapshots.iter().filter(move |snapshot| snapshot.vm == *vm)
    }

    /// A VM's snapshot.
    pub fn snapshot(&self, vm: &VmName, name: &SnapshotName) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.vm == *vm && snapshot.name == *name)
    }

    /// The snapshot that the disks with these tops came from: the newest of those that they have.
    pub fn parent<'a>(&self, vm: &VmName, tops: impl Iterator<Item = &'a str>) -> Option<SnapshotName> {
        let names: Vec<&SnapshotName> =
            tops.filter_map(|top| self.overlay(top)).map(|overlay| &overlay.snapshot).collect();
        let newest = self.snapshots.iter().rev().find(|s| s.vm == *vm && names.contains(&&s.name));
        newest.map(|snapshot| snapshot.name.clone())
    }

    /// The overlays of a snapshot are about to be made.
    pub fn intend(&mut self, snapshot: &Snapshot) {
        let making = |disk: &SnapshotDisk| Making {
            vm: snapshot.vm.clone(),
            path: disk.overlay.clone(),
            backing: disk.image.clone(),
        };
        self.making.extend(snapshot.disks.iter().map(making));
    }

    /// A snapshot was taken: its overlays are the tops of their chains.
    ///
    /// # Errors
    /// A base cannot be looked at.
    pub fn add(&mut self, snapshot: &Snapshot) -> Result<(), (PathBuf, io::Error)> {
        for disk in &snapshot.disks {
            if !self.chains.iter().any(|chain| chain.base == disk.base) {
                let found = fs::metadata(&disk.base).map_err(|error| (PathBuf::from(&disk.base), error))?;
                self.chains.push(Chain {
                    base: disk.base.clone(),
                    format: disk.format,
                    inode: found.ino(),
                    device: found.dev(),
                    top: disk.base.clone(),
                    overlays: Vec::new(),
                });
            }
            for chain in self.chains.iter_mut().filter(|chain| chain.base == disk.base) {
                chain.top.clone_from(&disk.overlay);
                chain.overlays.push(Overlay {
                    path: disk.overlay.clone(),
                    backing: disk.image.clone(),
                    vm: snapshot.vm.clone(),
                    snapshot: snapshot.name.clone(),
                    unwanted: false,
                    pulling: false,
                });
            }
            self.making.retain(|making| making.path != disk.overlay);
        }
        self.snapshots.push(snapshot.clone());
        Ok(())
    }

    /// Disks are as they were at a snapshot: these overlays, on its images, are the tops of their chains. What was the top stays, unless it is given up.
    pub fn revert(&mut self, snapshot: &Snapshot, overlays: &[String], discard: bool) {
        for (disk, path) in snapshot.disks.iter().zip(overlays) {
            for chain in self.chains.iter_mut().filter(|chain| chain.base == disk.base) {
                let former = chain.overlays.iter_mut().find(|overlay| overlay.path == chain.top);
                former.into_iter().for_each(|former| former.unwanted |= discard);
                chain.top.clone_from(path);
                chain.overlays.push(Overlay {
                    path: path.clone(),
                    backing: disk.image.clone(),
                    vm: snapshot.vm.clone(),
                    snapshot: snapshot.name.clone(),
                    unwanted: false,
                    pulling: false,
                });
            }
            self.making.retain(|making| making.path != *path);
        }
    }

    /// An overlay is about to stand on another image, whose data it gets.
    pub fn pulling(&mut self, path: &str) {
        let overlays = self.chains.iter_mut().flat_map(|chain| &mut chain.overlays);
        overlays.filter(|overlay| overlay.path == path).for_each(|overlay| overlay.pulling = true);
    }

    /// It stands on what it stood on.
    pub fn not_pulled(&mut self, path: &str) {
        let overlays = self.chains.iter_mut().flat_map(|chain| &mut chain.overlays);
        overlays.filter(|overlay| overlay.path == path).for_each(|overlay| overlay.pulling = false);
    }

    /// It stands on that image now.
    pub fn pulled(&mut self, path: &str, backing: &str) {
        let overlays = self.chains.iter_mut().flat_map(|chain| &mut chain.overlays);
        for overlay in overlays.filter(|overlay| overlay.path == path) {
            (overlay.backing, overlay.pulling) = (backing.to_owned(), false);
        }
    }

    /// A snapshot was not taken after all.
    pub fn take_back(&mut self, snapshot: &Snapshot) {
        for disk in &snapshot.disks {
            for chain in self.chains.iter_mut().filter(|chain| chain.base == disk.base) {
                chain.overlays.retain(|overlay| overlay.path != disk.overlay);
                if chain.top == disk.overlay {
                    chain.top.clone_from(&disk.image);
                }
            }
        }
        self.chains.retain(|chain| !chain.overlays.is_empty());
        self.snapshots.retain(|known| known.vm != snapshot.vm || known.name != snapshot.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(base: &str, image: &str, overlay: &str, name: &str) -> Snapshot {
        Snapshot {
            vm: "web".parse().expect("a name"),
            name: name.parse().expect("a name"),
            created_unix_secs: 1,
            state: "running".into(),
            quiesced: false,
            description: String::new(),
            parent: None,
            disks: vec![SnapshotDisk {
                id: "sys".parse().expect("an id"),
                base: base.into(),
                image: image.into(),
                format: Format::Raw,
                overlay: overlay.into(),
            }],
        }
    }

    #[test]
    fn names_are_parts_of_file_names() {
        for good in ["a", "before-2.0", "1582605802"] {
            assert!(good.parse::<SnapshotName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "a/b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_chain_grows_and_is_taken_back() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = |name: &str| temp.path().join(name).display().to_string();
        let [base, first, second] = ["a.img", "a.one.qcow2", "a.two.qcow2"].map(path);
        fs::write(&base, "x").expect("written");
        let found = fs::metadata(&base).expect("there");
        let numbers = (found.dev(), found.ino());
        let mut book = Book::default();
        assert_eq!(book.standing(&base, numbers), Standing::Unknown);
        let one = snapshot(&base, &base, &first, "one");
        book.add(&one).expect("the base is there");
        let before = book.clone();
        let two = snapshot(&base, &first, &second, "two");
        book.add(&two).expect("the base is there");
        assert!(matches!(book.standing(&base, numbers), Standing::Base(chain) if chain.top == second));
        assert!(matches!(book.standing(&path("link"), numbers), Standing::Base(_)), "by another name");
        assert!(matches!(book.standing(&base, (0, 0)), Standing::Replaced(_)));
        assert!(
            matches!(book.standing(&first, (0, 0)), Standing::Below(above) if above.snapshot.as_str() == "two")
        );
        assert!(matches!(book.standing(&second, (0, 0)), Standing::Top(_)));
        assert_eq!(book.parent(&two.vm, [second.as_str()].into_iter()), Some(two.name.clone()));
        let text = toml::to_string(&book).expect("toml");
        assert_eq!(toml::from_str::<Book>(&text).expect("read back"), book, "{text}");
        book.take_back(&two);
        assert_eq!(book, before);
        book.take_back(&one);
        assert_eq!(book, Book::default());
    }
}
