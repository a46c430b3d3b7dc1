//! What is wrong with the chains of a VM's disks: the book compared with the headers of the images. Changes nothing by itself; blocks.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use devices::host::Format;
use devices::{DeviceConfig, DeviceId};

use super::book::{Book, Chain, Overlay, Snapshot, SnapshotDisk, SnapshotName};
use super::store::{Store, StoreError};
use super::tidy::{self, TidyError};
use crate::folders::VmName;
use crate::image;
use crate::injection::Steps;

/// Something that is not as it should be.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What, for people.
    pub words: String,
    /// What would mend it; none if a person has to.
    pub remedy: Option<Remedy>,
}

/// What can be done about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Remedy {
    /// Remove the overlays that were not finished.
    Sweep,
    /// Merge and remove what is of no use any more.
    Tidy(String),
    /// Take an overlay that is gone, and that nothing needs, out of the book.
    Strike(String),
    /// Take a chain that the book does not know into it, with snapshots named after the files.
    Enter(Box<(Chain, Vec<Snapshot>)>),
    /// Have QEMU close a node that no disk uses; while the VM runs, unlike all others.
    Close(String),
}

impl Remedy {
    /// What it does, for people.
    pub fn words(&self) -> String {
        match self {
            Remedy::Sweep => "remove what was not finished".to_owned(),
            Remedy::Tidy(_) => "merge and remove it".to_owned(),
            Remedy::Strike(path) => format!("forget {path}"),
            Remedy::Close(_) => "have QEMU close it".to_owned(),
            Remedy::Enter(entered) => {
                let names: Vec<&str> = entered.1.iter().map(|snapshot| snapshot.name.as_str()).collect();
                format!("start from {}, with snapshots {}", entered.0.top, names.join(", "))
            }
        }
    }
}

/// A disk of a config that is written.
#[derive(Clone, Debug)]
pub struct NamedDisk {
    /// Its id; a number stands for one that the config does not give.
    pub id: DeviceId,
    /// The image that the config names.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// The disks of a config whose chains are looked at.
pub fn disks(devices: &[DeviceConfig]) -> Vec<NamedDisk> {
    let disks = devices.iter().filter_map(|device| match device {
        DeviceConfig::Disk(disk) if !disk.is_read_only() => Some(disk),
        _ => None,
    });
    let named = |(number, disk): (usize, &devices::disk::DiskConfig)| {
        let id = disk.id.clone().or_else(|| format!("disk{number}").parse().ok())?;
        Some(NamedDisk { id, path: disk.path.as_ref()?.into(), format: disk.format() })
    };
    disks.enumerate().filter_map(named).collect()
}

/// Looks at the chains of a VM's disks.
pub fn examine(book: &Book, vm: &VmName, disks: &[NamedDisk], store: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    if book.making.iter().any(|making| making.vm == *vm) {
        let words = "an overlay was not finished, or not removed".to_owned();
        findings.push(Finding { words, remedy: Some(Remedy::Sweep) });
    }
    for disk in disks {
        let Ok(base) = fs::canonicalize(&disk.path) else {
            let words = format!("{}: image {} cannot be found", disk.id, disk.path.display());
            findings.push(Finding { words, remedy: None });
            continue;
        };
        let base = base.to_string_lossy().into_owned();
        match book.chains.iter().find(|chain| chain.base == base || chain.top == base) {
            Some(chain) => of_chain(book, chain, &disk.id, store, &mut findings),
            None => of_unknown(book, vm, disk, &base, &mut findings),
        }
    }
    findings
}

fn of_chain(book: &Book, chain: &Chain, id: &DeviceId, store: &Path, findings: &mut Vec<Finding>) {
    let mut find = |words: String, remedy| findings.push(Finding { words: format!("{id}: {words}"), remedy });
    if fs::metadata(&chain.base).is_ok_and(|found| found.ino() != chain.inode) {
        find(
            format!(
                "{} is another file than the one that its overlays were made on: put that one back; or, to give them up, take the chain out of {} and \
                 remove its overlays",
                chain.base,
                store.display()
            ),
            None,
        );
        return;
    }
    let mut is_broken = false;
    for overlay in &chain.overlays {
        let path = Path::new(&overlay.path);
        let is_state = book.snapshots.iter().flat_map(|s| &s.disks).any(|disk| disk.image == overlay.path);
        let is_below = chain.overlays.iter().any(|above| above.backing == overlay.path);
        if !path.exists() {
            let is_needed = chain.top == overlay.path || is_state || is_below;
            is_broken |= is_needed;
            let remedy = (!is_needed).then(|| Remedy::Strike(overlay.path.clone()));
            find(format!("overlay {} is gone", overlay.path), remedy);
            continue;
        }
        if let Some(fault) = header_fault(book, chain, overlay) {
            is_broken = true;
            find(fault, None);
        }
    }
    if !is_broken && book.task(&chain.base).is_some() {
        let words = format!("the chain on {} has a layer that is of no use any more", chain.base);
        find(words, Some(Remedy::Tidy(chain.base.clone())));
    }
}

/// What is wrong with what an overlay's header says of the image below it.
fn header_fault(book: &Book, chain: &Chain, overlay: &Overlay) -> Option<String> {
    let path = &overlay.path;
    match image::backing_of(Path::new(path)) {
        Ok(Some((below, format))) if below == overlay.backing => {
            let made_on = if below == chain.base { chain.format } else { Format::Qcow2 };
            (format != made_on).then(|| {
                format!(
                    "the header of {path} says that {below} is {format}, and it is {made_on}: mend it with `qemu-img rebase -u -b {below} -F {made_on} \
                     {path}`"
                )
            })
        }
        // It is being pulled, or was: the next start looks.
        Ok(Some(_)) if overlay.pulling => None,
        // A merge ended between its headers and the book.
        Ok(Some((below, _))) if merges_into(book, &chain.base, &overlay.backing, &below) => None,
        Ok(below) => {
            let below = below.map_or_else(|| "nothing".to_owned(), |(below, _)| below);
            Some(format!(
                "the header of {path} names {below} below it, and it was made on {}",
                overlay.backing
            ))
        }
        Err(error) => Some(crate::request::chain(&error)),
    }
}

/// Whether the book's next task for a chain is that merge.
fn merges_into(book: &Book, base: &str, from: &str, into: &str) -> bool {
    matches!(book.task(base), Some(tidy::Task::Merge(merge)) if merge.from == from && merge.into == into)
}

/// Overlays of an image that the book knows nothing of: it was lost, most likely.
fn of_unknown(book: &Book, vm: &VmName, disk: &NamedDisk, base: &str, findings: &mut Vec<Finding>) {
    let mut overlays: Vec<Overlay> = Vec::new();
    let mut below = vec![base.to_owned()];
    while let Some(image) = below.pop() {
        for path in overlays_on(Path::new(base), &image) {
            let name = name_of(Path::new(base), &path);
            below.push(path.clone());
            overlays.push(Overlay {
                path,
                backing: image.clone(),
                vm: vm.clone(),
                snapshot: name,
                unwanted: false,
                pulling: false,
            });
        }
    }
    let backings: BTreeSet<&str> = overlays.iter().map(|overlay| overlay.backing.as_str()).collect();
    let leaves: Vec<&str> =
        overlays.iter().map(|o| o.path.as_str()).filter(|path| !backings.contains(path)).collect();
    let mut find =
        |words: String, remedy| findings.push(Finding { words: format!("{}: {words}", disk.id), remedy });
    match leaves[..] {
        [] => {}
        [top] => {
            let words = format!("image {base} has overlays that are not known, the uppermost of them {top}");
            let entered = rebuilt(book, vm, disk, base, top, overlays.clone());
            find(words, entered.map(|entered| Remedy::Enter(Box::new(entered))));
        }
        _ => find(
            format!(
                "image {base} has overlays that are not known, in branches: name the one to start from in the config: {}",
                leaves.join(", ")
            ),
            None,
        ),
    }
}

/// The overlays on an image that lie beside its base.
fn overlays_on(base: &Path, image: &str) -> Vec<String> {
    let files = base.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let paths = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "qcow2"));
    let stands = |path: &PathBuf| {
        path.is_file()
            && image::backing_of(path).is_ok_and(|below| below.is_some_and(|(below, _)| below == image))
    };
    let mut found: Vec<String> =
        paths.filter(stands).map(|path| path.to_string_lossy().into_owned()).collect();
    found.sort();
    found
}

/// The snapshot that an overlay's file is named after.
fn name_of(base: &Path, overlay: &str) -> SnapshotName {
    let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let own = stem(Path::new(overlay));
    let name = own.strip_prefix(&format!("{}.", stem(base))).unwrap_or(&own).to_owned();
    name.parse().unwrap_or_else(|_| SnapshotName::of_time(seconds(overlay)))
}

/// When a file was last written, in seconds since 1970.
fn seconds(path: &str) -> u64 {
    let written = fs::metadata(path).and_then(|found| found.modified()).ok();
    written.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_secs()
}

fn rebuilt(
    book: &Book,
    vm: &VmName,
    disk: &NamedDisk,
    base: &str,
    top: &str,
    overlays: Vec<Overlay>,
) -> Option<(Chain, Vec<Snapshot>)> {
    let found = fs::metadata(base).ok()?;
    let mut snapshots: Vec<Snapshot> = Vec::new();
    for overlay in &overlays {
        let format = if overlay.backing == base { disk.format } else { Format::Qcow2 };
        let disk = SnapshotDisk {
            id: disk.id.clone(),
            base: base.to_owned(),
            image: overlay.backing.clone(),
            format,
            overlay: overlay.path.clone(),
        };
        if snapshots.iter().any(|known| known.name == overlay.snapshot) {
            return None;
        }
        snapshots.push(Snapshot {
            vm: vm.clone(),
            name: overlay.snapshot.clone(),
            created_unix_secs: seconds(&overlay.backing),
            state: "unknown".to_owned(),
            quiesced: false,
            description: String::new(),
            parent: snapshots.last().map(|parent| parent.name.clone()),
            disks: vec![disk],
        });
    }
    // Another disk of the same snapshot may be known, or entered, already.
    snapshots.retain(|new| {
        book.snapshot(vm, &new.name).is_none_or(|known| known.disks.iter().all(|d| d.base != base))
    });
    let chain = Chain {
        base: base.to_owned(),
        format: disk.format,
        inode: found.ino(),
        device: found.dev(),
        top: top.to_owned(),
        overlays,
    };
    Some((chain, snapshots))
}

/// Does it. The caller holds the VM, which does not run.
///
/// # Errors
/// What was done is done.
pub fn mend(remedy: &Remedy, store: &Store, vm: &VmName, qemu_img: &Path) -> Result<(), TidyError> {
    match remedy {
        Remedy::Sweep => Ok(store.sweep(vm)?),
        Remedy::Tidy(base) => {
            tidy::tidy(store, std::slice::from_ref(base), vm, qemu_img, &mut Steps::of("tidy"))
        }
        Remedy::Strike(path) => Ok(store.change::<_, StoreError>(|book| {
            book.chains.iter_mut().for_each(|chain| chain.overlays.retain(|overlay| overlay.path != *path));
            book.chains.retain(|chain| !chain.overlays.is_empty());
            Ok(())
        })?),
        Remedy::Enter(entered) => Ok(store.change::<_, StoreError>(|book| {
            book.enter(&entered.0, &entered.1);
            Ok(())
        })?),
        // The VM does not run: QEMU's nodes are gone with it.
        Remedy::Close(_) => Ok(()),
    }
}

impl Book {
    /// Takes a chain in, and the disks of its snapshots into those of the same name.
    fn enter(&mut self, chain: &Chain, snapshots: &[Snapshot]) {
        self.chains.push(chain.clone());
        for new in snapshots {
            match self.snapshots.iter_mut().find(|known| known.vm == new.vm && known.name == new.name) {
                Some(known) => known.disks.extend(new.disks.iter().cloned()),
                None => self.snapshots.push(new.clone()),
            }
        }
    }
}
