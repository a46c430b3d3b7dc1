//! From a wish to a snapshot: which disks take part, and where their overlays lie. Blocks; to be called from a worker.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::layout::writable_disks;
use devices::{DeviceId, Layout, Placed, Refusal};
use thiserror::Error;

use super::book::{Book, Snapshot, SnapshotDisk, SnapshotName};
use super::files::OverlayError;
use crate::folders::VmName;
use crate::request::SnapshotCreate;

/// QEMU's limit on the path of a backing file.
const MAX_BACKING: usize = 1023;

/// A snapshot that cannot be taken.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ChooseError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(
        "snapshot {name} of VM {vm} exists already: take another name, or delete it with `qvirt snapshot delete {vm} {name}`"
    )]
    Exists { vm: VmName, name: SnapshotName },
    #[error("VM {vm} has no disk that is written, so there is nothing to take a snapshot of")]
    NoDisk { vm: VmName },
    #[error("disk {id} is named twice: name each disk once")]
    Twice { id: DeviceId },
    #[error("disk {id} is named and excluded: leave one of the two out")]
    Both { id: DeviceId },
    #[error("overlays of two disks would be {path}: give one of them another file with --disk ID=FILE")]
    SamePath { path: String },
    #[error("{path}: {reason}")]
    Path { path: String, reason: String },
}

/// The snapshot that a wish means, of a VM as it is. Changes nothing.
///
/// # Errors
/// The first thing that speaks against it.
pub fn snapshot(
    layout: &Layout,
    wish: &SnapshotCreate,
    (vm, state): (&VmName, &str),
    book: &Book,
) -> Result<Snapshot, ChooseError> {
    let created_unix_secs = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = wish.name.clone().unwrap_or_else(|| SnapshotName::of_time(created_unix_secs));
    if book.snapshot(vm, &name).is_some() {
        return Err(ChooseError::Exists { vm: vm.clone(), name });
    }
    let mut disks: Vec<SnapshotDisk> = Vec::new();
    for (placed, file) in chosen(layout, wish)? {
        let disk = disk(placed, file, &name, book)?;
        if disks.iter().any(|other| other.overlay == disk.overlay) {
            return Err(ChooseError::SamePath { path: disk.overlay });
        }
        disks.push(disk);
    }
    if disks.is_empty() {
        return Err(ChooseError::NoDisk { vm: vm.clone() });
    }
    Ok(Snapshot {
        parent: book.parent(vm, disks.iter().map(|disk| disk.image.as_str())),
        vm: vm.clone(),
        name,
        created_unix_secs,
        state: state.to_owned(),
        quiesced: wish.quiesce,
        description: wish.description.clone().unwrap_or_default(),
        disks,
    })
}

/// The disks that take part, with the files that were asked for.
fn chosen<'a>(
    layout: &'a Layout,
    wish: &'a SnapshotCreate,
) -> Result<Vec<(&'a Placed, Option<&'a str>)>, ChooseError> {
    let excluded: Result<BTreeSet<&DeviceId>, Refusal> =
        wish.exclude.iter().map(|name| layout.expect_device(name).map(|placed| &placed.id)).collect();
    let excluded = excluded?;
    if wish.disks.is_empty() {
        let all = writable_disks(layout).filter(|id| !excluded.contains(id));
        let all: Result<Vec<_>, Refusal> =
            all.map(|id| Ok((layout.can_have_overlay(id.as_str())?, None))).collect();
        return Ok(all?);
    }
    let mut named: Vec<(&Placed, Option<&str>)> = Vec::new();
    for disk in &wish.disks {
        let placed = layout.can_have_overlay(&disk.id)?;
        if named.iter().any(|(other, _)| other.id == placed.id) {
            return Err(ChooseError::Twice { id: placed.id.clone() });
        }
        if excluded.contains(&placed.id) {
            return Err(ChooseError::Both { id: placed.id.clone() });
        }
        named.push((placed, disk.file.as_deref()));
    }
    Ok(named)
}

fn disk(
    placed: &Placed,
    file: Option<&str>,
    name: &SnapshotName,
    book: &Book,
) -> Result<SnapshotDisk, ChooseError> {
    let layers = placed.layers();
    let top = layers.first().expect("only a disk with an image can have an overlay");
    let image = canonical(Path::new(&top.path))?;
    let chain = book.chain_of_top(&image);
    let base = chain.map_or_else(|| image.clone(), |chain| chain.base.clone());
    let overlay = match file {
        Some(file) => below_its_folder(Path::new(file))?,
        None => beside(Path::new(&base), name),
    };
    if overlay.symlink_metadata().is_ok() {
        return Err(OverlayError::Exists { path: overlay }.into());
    }
    let overlay = overlay.to_string_lossy().into_owned();
    for path in [&image, &overlay] {
        if path.len() > MAX_BACKING || path.chars().any(|c| c.is_control() || c == '\u{fffd}') {
            let reason = format!(
                "a path in an image's header has at most {MAX_BACKING} bytes of UTF-8 without control characters: rename the file"
            );
            return Err(ChooseError::Path { path: path.clone(), reason });
        }
    }
    Ok(SnapshotDisk { id: placed.id.clone(), base, image, format: top.format, overlay })
}

/// `/srv/web.qcow2` and snapshot `one`: `/srv/web.one.qcow2`.
fn beside(base: &Path, name: &SnapshotName) -> PathBuf {
    let stem = base.file_stem().unwrap_or_default().to_string_lossy();
    base.with_file_name(format!("{stem}.{name}.qcow2"))
}

/// Another overlay for the same snapshot: `/srv/web.one-2.qcow2`, or the first number that is free.
pub fn beside_again(base: &Path, name: &SnapshotName) -> String {
    let stem = base.file_stem().unwrap_or_default().to_string_lossy();
    let numbered = |number| base.with_file_name(format!("{stem}.{name}-{number}.qcow2"));
    let free = (2_u32..).map(numbered).find(|path| path.symlink_metadata().is_err());
    free.expect("numbers do not run out").to_string_lossy().into_owned()
}

/// The path by way of its folder's real one: what it leads to must not change with a link.
fn below_its_folder(path: &Path) -> Result<PathBuf, ChooseError> {
    let wrong =
        |reason: &str| ChooseError::Path { path: path.display().to_string(), reason: reason.to_owned() };
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if path.is_absolute() => Ok(Path::new(&canonical(folder)?).join(name)),
        _ => Err(wrong("write the absolute path of a file")),
    }
}

fn canonical(path: &Path) -> Result<String, ChooseError> {
    let real = fs::canonicalize(path).map_err(|error| ChooseError::Path {
        path: path.display().to_string(),
        reason: format!("{error}; check it, and the rights on it"),
    })?;
    Ok(real.to_string_lossy().into_owned())
}
