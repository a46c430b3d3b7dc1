//! Overlays as files: whether there is room for them, made by `qemu-img`, removed again. Blocks; to be called from a worker.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use devices::host::{Format, Layer};
use devices::units::Size;
use thiserror::Error;

use crate::image;
use crate::process::find_binary;

/// An overlay that cannot be made.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum OverlayError {
    #[error("overlay {} exists already: take another name, or give the disk another file with --disk ID=FILE", path.display())]
    Exists { path: PathBuf },
    #[error("overlay {}: {source}; check its folder, and the rights on it", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("overlay {}: qemu-img failed: {words}", path.display())]
    QemuImg { path: PathBuf, words: String },
    #[error(
        "no room: {what} may take {needed} on the file system of {}, which has {free} left: free some, or take the risk with --sparse",
        folder.display()
    )]
    NoRoom { what: String, needed: Size, free: Size, folder: PathBuf },
}

/// An overlay to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewOverlay {
    /// Its path.
    pub path: PathBuf,
    /// The image below, by its canonical path.
    pub backing: String,
    /// That one's format.
    pub format: Format,
    /// The size that the guest sees.
    pub size_bytes: u64,
}

/// The `qemu-img` of a QEMU: beside it, or on the search path.
pub fn qemu_img(qemu: &Path) -> PathBuf {
    let beside = qemu.with_file_name("qemu-img");
    if beside.exists() {
        beside
    } else {
        find_binary(Path::new("qemu-img")).unwrap_or_else(|_| "qemu-img".into())
    }
}

/// The most that a qcow2 image of a size becomes: its data, and tables that take a little more than a thousandth of it.
fn worst_case(size_bytes: u64) -> u64 {
    size_bytes.saturating_add(size_bytes >> 9).saturating_add(1 << 20)
}

/// Whether the overlays fit even if the guest writes all of its disks anew.
///
/// # Errors
/// They do not, or a folder cannot be looked at.
pub fn check_room(overlays: &[NewOverlay]) -> Result<(), OverlayError> {
    let mut needed: BTreeMap<u64, (u64, PathBuf, Vec<String>)> = BTreeMap::new();
    for overlay in overlays {
        let folder = overlay.path.parent().unwrap_or(Path::new("/"));
        let failed = |source| OverlayError::Io { path: overlay.path.clone(), source };
        let device = fs::metadata(folder).map_err(failed)?.dev();
        let (bytes, _, names) = needed.entry(device).or_insert_with(|| (0, folder.to_owned(), Vec::new()));
        *bytes = bytes.saturating_add(worst_case(overlay.size_bytes));
        names.push(overlay.path.display().to_string());
    }
    needed.into_values().try_for_each(|(bytes, folder, names)| has_room(folder, bytes, names.join(", ")))
}

/// Whether the uppermost of some layers can take all that the others have.
///
/// # Errors
/// It cannot, or its folder cannot be looked at.
pub fn check_pull_room(layers: &[Layer]) -> Result<(), OverlayError> {
    let Some((top, below)) = layers.split_first() else { return Ok(()) };
    let bytes = below.iter().filter_map(|layer| allocated_bytes(Path::new(&layer.path))).sum();
    let folder = Path::new(&top.path).parent().unwrap_or(Path::new("/"));
    has_room(folder.to_owned(), bytes, top.path.clone())
}

fn has_room(folder: PathBuf, bytes: u64, what: String) -> Result<(), OverlayError> {
    let stat = rustix::fs::statvfs(&folder)
        .map_err(|error| OverlayError::Io { path: folder.clone(), source: error.into() })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    let round = |bytes: u64, up: u64| Size::bytes(((bytes + up) >> 20) << 20);
    let (needed, free) = (round(bytes, (1 << 20) - 1), round(free, 0));
    Err(OverlayError::NoRoom { what, needed, free, folder })
}

/// Makes an overlay, empty, and returns once it would survive a power cut. A file that is there is left alone.
///
/// # Errors
/// Nothing is left of it then, if that can be had.
pub fn make(overlay: &NewOverlay, qemu_img: &Path) -> Result<(), OverlayError> {
    let path = &overlay.path;
    let failed = |source| OverlayError::Io { path: path.clone(), source };
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        // Whoever may use the image below may use its overlay.
        Ok(file) => {
            let below = fs::metadata(&overlay.backing).map(|below| below.permissions());
            if let Err(source) = below.and_then(|mode| file.set_permissions(mode)) {
                let _ = fs::remove_file(path);
                return Err(failed(source));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(OverlayError::Exists { path: path.clone() });
        }
        Err(error) => return Err(failed(error)),
    }
    let made = fill(overlay, qemu_img).and_then(|()| {
        let folder = path.parent().unwrap_or(Path::new("/"));
        [path.as_path(), folder]
            .into_iter()
            .try_for_each(|path| File::open(path).and_then(|file| file.sync_all()).map_err(failed))
    });
    if made.is_err() {
        let _ = fs::remove_file(path);
    }
    made
}

fn fill(overlay: &NewOverlay, qemu_img: &Path) -> Result<(), OverlayError> {
    let path = &overlay.path;
    let mut command = Command::new(qemu_img);
    // The image below may be in use: it is not opened, its size and format are known.
    command.args(["create", "-q", "-u", "-f", "qcow2", "-b", &overlay.backing, "-F", overlay.format.word()]);
    command.arg("--").arg(path).arg(overlay.size_bytes.to_string()).stdin(Stdio::null());
    let output = command.output().map_err(|source| OverlayError::QemuImg {
        path: path.clone(),
        words: format!("{} cannot be run: {source}; install it beside QEMU", qemu_img.display()),
    })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(OverlayError::QemuImg { path: path.clone(), words });
    }
    Ok(())
}

/// Removes an overlay; that there is none is no error.
///
/// # Errors
/// It is there, and stays.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what somebody who died was about to make. Only what looks like it: an empty file, or an overlay of that image. Says whether it did.
///
/// # Errors
/// It is there, and cannot be looked at or removed.
pub fn remove_unfinished(path: &Path, backing: &str) -> io::Result<bool> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found?,
    };
    let is_ours = found.is_file()
        && (found.len() == 0
            || image::backing_of(path).is_ok_and(|below| below.is_some_and(|(below, _)| below == backing)));
    if is_ours {
        remove(path)?;
    }
    Ok(is_ours)
}

/// The bytes that a file takes on its storage.
pub fn allocated_bytes(path: &Path) -> Option<u64> {
    Some(fs::metadata(path).ok()?.blocks() * 512)
}
