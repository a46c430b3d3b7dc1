//! Reading `/sys`. What is not there any more is not known, and no error.

use std::fs;
use std::path::{Path, PathBuf};

/// Where a host's devices are looked up: `/sys`, or a tree like it.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Sysfs {
        Sysfs { root: "/sys".into() }
    }
}

impl Sysfs {
    /// One below another folder.
    pub fn below(root: &Path) -> Sysfs {
        Sysfs { root: root.to_owned() }
    }

    /// A path in it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }
}

/// The text of a file, trimmed; none if there is nothing in it.
pub fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// The last part of what a link points to.
pub fn link(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// Names in a folder, sorted; none if it does not exist.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Serialises a number as four hexadecimal digits.
pub fn hex4<S: serde::Serializer>(number: &u16, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{number:04x}"))
}
