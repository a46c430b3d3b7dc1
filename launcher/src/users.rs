//! Who has a file open: for telling people which process stands in their way.
//!
//! QEMU's locks on images are open-file-description locks, which `/proc/locks` lists without a pid, so the open files of each process
//! are looked at. Processes of other users are seen by root only, and those of other hosts by nobody here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Pids of the processes that have a file open, but for this one.
pub fn of(path: &Path) -> Vec<u32> {
    let Ok(wanted) = fs::metadata(path) else { return Vec::new() };
    let is_open = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        // Following the link asks about the open file itself, also when it was renamed or removed.
        descriptors.into_iter().any(|fd| {
            fs::metadata(fd.path()).is_ok_and(|f| (f.dev(), f.ino()) == (wanted.dev(), wanted.ino()))
        })
    };
    pids().filter(|pid| *pid != std::process::id()).filter(is_open).collect()
}

/// The open files of all processes, by the names that they were opened by. Asks no file system, which could hang.
pub fn open_files() -> impl Iterator<Item = (u32, PathBuf)> {
    pids().flat_map(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.filter_map(move |fd| Some((pid, fs::read_link(fd.path()).ok()?)))
    })
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process in words, with its name.
pub fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({})", name.trim_end())
}

/// Who has these images open, and what to do, as a sentence.
pub fn explain<'a>(images: impl Iterator<Item = &'a str>) -> String {
    let about = |image: &str| {
        let users: Vec<String> = of(Path::new(image)).into_iter().map(name).collect();
        (!users.is_empty()).then(|| format!("{image} is open in {}", users.join(", ")))
    };
    let known: Vec<String> = images.filter_map(about).collect();
    match known.as_slice() {
        [] => "who uses the image cannot be seen from here: a process of another user or another host"
            .to_owned(),
        known => format!("{}: end what uses it, or wait for it", known.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_that_has_a_file_open_is_named() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("image");
        let file = fs::File::create(&path).expect("made");
        assert_eq!(of(&path), [0; 0], "this process does not count");
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(file).spawn().expect("cat");
        let (users, words) = (of(&path), explain([path.to_str().expect("UTF-8")].into_iter()));
        let pid = child.id();
        drop(child.stdin.take());
        child.wait().expect("cat ends with its stdin");
        assert_eq!(users, [pid]);
        assert_eq!(
            words,
            format!("{} is open in process {pid} (cat): end what uses it, or wait for it", path.display())
        );
        assert!(explain(["/nonexistent"].into_iter()).contains("cannot be seen"));
    }
}
