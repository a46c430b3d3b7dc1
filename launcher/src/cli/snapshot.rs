//! `qvirt snapshot`: taken by the owner of a VM that runs, or here of one that does not; listed from what is known of snapshots.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;

use devices::units::Size;
use serde_json::{Value, json};

use super::args::{Snapshot as Words, SnapshotCreate, Start};
use super::client::connect;
use super::progress::follow;
use super::{Exit, Problem, print, target};
use crate::adopt::Life;
use crate::folders::{Folders, VmName};
use crate::request::{self, SnapshotFile};
use crate::snapshot::files::allocated_bytes;
use crate::snapshot::stopped::{StoppedError, StoppedVm};
use crate::snapshot::{Book, Snapshot, SnapshotName, Store};

/// `qvirt snapshot`
pub async fn snapshot(words: Words) -> Result<Exit, Problem> {
    match words {
        Words::Create(create) => self::create(create).await,
        Words::Revert { vm, name, running, discard, sparse } => {
            revert(&vm, &name, running, (discard, sparse)).await
        }
        Words::Delete { vm, name, children, speed, json } => {
            delete(&vm, &name, (children, speed), json).await
        }
        Words::List { vm, tree, json } => list(&vm, tree, json),
        Words::Show { vm, name, json } => show(&vm, &name, json),
    }
}

impl From<StoppedError> for Problem {
    fn from(error: StoppedError) -> Problem {
        use crate::host::need::NeedError;
        use crate::lease::LeaseError;
        use StoppedError as E;
        let exit = match error {
            E::Blueprint(error) => return (*error).into(),
            E::Remains(error) => return (*error).into(),
            E::Taken { .. } => Exit::Pending,
            E::Choose(_) | E::Commit(_) | E::Overlay(_) | E::NoGuest { .. } | E::Refusal(_) => Exit::Refused,
            E::Need { source: NeedError::Lease(LeaseError::Held { .. }), .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<crate::snapshot::StoreError> for Problem {
    fn from(error: crate::snapshot::StoreError) -> Problem {
        Problem::of(Exit::Failed, &error)
    }
}

/// Whether a VM runs and has an owner who can be asked; that it does not run at all is the other answer.
pub(super) fn is_live(folders: &Folders, vm: &VmName) -> Result<bool, Problem> {
    match target::life_of(folders, vm)? {
        Life::Owned => Ok(true),
        Life::None | Life::Remains => Ok(false),
        Life::Orphan | Life::Between => Err(target::not_running(folders, vm)),
    }
}

async fn create(args: SnapshotCreate) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, &args.vm)?;
    let wish = request::SnapshotCreate {
        name: args.name,
        disks: args.disk.iter().map(|text| file_of(text)).collect::<Result<_, _>>()?,
        exclude: args.exclude,
        quiesce: args.quiesce,
        sparse: args.sparse,
        description: args.description,
    };
    let (name, disks) = if is_live(&folders, &vm)? {
        let taken: Value = connect(&folders, &vm).await?.ask("qvirt-snapshot-create", &wish).await?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let disks = taken["disks"].as_array().into_iter().flatten();
        (text(&taken["name"]), disks.map(|d| (text(&d["id"]), text(&d["overlay"]))).collect::<Vec<_>>())
    } else {
        let held = StoppedVm::hold(&folders, target::config(&folders, &args.vm)?).await?;
        let taken = held.take_snapshot(&wish)?;
        let disks = taken.disks.iter().map(|disk| (disk.id.to_string(), disk.overlay.clone()));
        (taken.name.to_string(), disks.collect())
    };
    println!("{vm} has snapshot {name}");
    for (id, overlay) in disks {
        println!("{id} writes to {overlay} from now on");
    }
    Ok(Exit::Done)
}

async fn revert(
    target: &str,
    name: &SnapshotName,
    running: bool,
    (discard, sparse): (bool, bool),
) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, target)?;
    let config = target::config(&folders, target)?;
    let book = Store::new(&folders.state).read()?;
    let Some(snapshot) = book.snapshot(&vm, name) else { return Err(no_snapshot(&book, &vm, name)) };
    if is_live(&folders, &vm)? {
        if !running {
            let message = format!(
                "VM {vm} runs, and its disks cannot be put back under it: shut it down first, or let --running end it and start it again"
            );
            return Err(Problem::new(Exit::Refused, message));
        }
        super::live::kill(&vm).await?;
    }
    let held = StoppedVm::hold(&folders, config).await?;
    let overlays = held.revert(snapshot, discard, sparse)?;
    drop(held);
    println!("{vm} is back at snapshot {name}");
    for (disk, overlay) in snapshot.disks.iter().zip(overlays) {
        println!("{} writes to {overlay} from now on", disk.id);
    }
    if running {
        return super::run::start(Start { target: target.to_owned(), paused: false }).await;
    }
    Ok(Exit::Done)
}

async fn delete(
    target: &str,
    name: &SnapshotName,
    (children, speed): (bool, Option<Size>),
    as_json: bool,
) -> Result<Exit, Problem> {
    let folders = Folders::find()?;
    let vm = target::vm(&folders, target)?;
    let book = Store::new(&folders.state).read()?;
    if book.snapshot(&vm, name).is_none() {
        return Err(no_snapshot(&book, &vm, name));
    }
    let names = if children { book.with_children(&vm, name) } else { vec![name.clone()] };
    if is_live(&folders, &vm)? {
        let wish = request::SnapshotDelete { name: name.clone(), children, speed };
        follow(&folders, &vm, "qvirt-snapshot-delete", &wish, as_json).await?;
    } else {
        let held = StoppedVm::hold(&folders, target::config(&folders, target)?).await?;
        held.delete(&names)?;
    }
    if as_json {
        println!("{}", json!({"deleted": names}));
        return Ok(Exit::Done);
    }
    say_deleted(&vm, &names);
    Ok(Exit::Done)
}

pub(super) fn say_deleted(vm: &VmName, names: &[impl Display]) {
    names.iter().for_each(|name| println!("snapshot {name} of {vm} is deleted"));
}

/// `ID` or `ID=FILE`, the file made absolute.
fn file_of(text: &str) -> Result<SnapshotFile, Problem> {
    let Some((id, file)) = text.split_once('=') else {
        return Ok(SnapshotFile { id: text.to_owned(), file: None });
    };
    let path = std::path::absolute(file)
        .map_err(|error| Problem::new(Exit::Usage, format!("--disk {text}: {error}: write ID=FILE")))?;
    let file = path.into_os_string().into_string();
    let file =
        file.map_err(|_| Problem::new(Exit::Usage, format!("--disk {text}: its path is not UTF-8")))?;
    Ok(SnapshotFile { id: id.to_owned(), file: Some(file) })
}

/// The snapshots of a VM; whether there is such a VM matters only if there are none.
fn known(vm: &VmName) -> Result<Book, Problem> {
    let folders = Folders::find()?;
    let book = Store::new(&folders.state).read()?;
    if book.of_vm(vm).next().is_none() && !folders.config_file(vm).exists() && !folders.vm(vm)?.dir().exists()
    {
        return Err(target::unknown(&folders, vm));
    }
    Ok(book)
}

fn list(vm: &VmName, as_tree: bool, as_json: bool) -> Result<Exit, Problem> {
    let book = known(vm)?;
    let snapshots: Vec<&Snapshot> = book.of_vm(vm).collect();
    if as_json {
        let all: Vec<Value> = snapshots.iter().map(|snapshot| value(&book, snapshot)).collect();
        print::json(&all)?;
    } else if as_tree {
        let names: BTreeSet<&SnapshotName> = snapshots.iter().map(|snapshot| &snapshot.name).collect();
        let is_root = |s: &&&Snapshot| s.parent.as_ref().is_none_or(|parent| !names.contains(parent));
        snapshots.iter().filter(is_root).for_each(|root| branch(&snapshots, root, 0));
    } else {
        let cells = |snapshot: &&Snapshot| {
            let disks: Vec<&str> = snapshot.disks.iter().map(|disk| disk.id.as_str()).collect();
            vec![
                snapshot.name.to_string(),
                utc(snapshot.created_unix_secs),
                state(snapshot),
                disks.join(","),
                snapshot.parent.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
                size(snapshot.disks.iter().map(|disk| disk.image.as_str())),
            ]
        };
        let rows: Vec<Vec<String>> = snapshots.iter().map(cells).collect();
        print::table(&["NAME", "CREATED", "STATE", "DISKS", "PARENT", "ON DISK"], &rows)?;
    }
    Ok(Exit::Done)
}

/// A snapshot, and those that came from it, further in.
fn branch(snapshots: &[&Snapshot], snapshot: &Snapshot, depth: usize) {
    println!("{}{}", "  ".repeat(depth), snapshot.name);
    for child in snapshots.iter().filter(|child| child.parent.as_ref() == Some(&snapshot.name)) {
        branch(snapshots, child, depth + 1);
    }
}

fn show(vm: &VmName, name: &SnapshotName, as_json: bool) -> Result<Exit, Problem> {
    let book = known(vm)?;
    let Some(snapshot) = book.snapshot(vm, name) else { return Err(no_snapshot(&book, vm, name)) };
    if as_json {
        print::json(&value(&book, snapshot))?;
        return Ok(Exit::Done);
    }
    println!("name:        {}", snapshot.name);
    println!("vm:          {}", snapshot.vm);
    println!("created:     {}", utc(snapshot.created_unix_secs));
    println!("state:       {}", state(snapshot));
    println!("parent:      {}", snapshot.parent.as_ref().map_or("-", SnapshotName::as_str));
    if !snapshot.description.is_empty() {
        println!("description: {}", snapshot.description);
    }
    for disk in &snapshot.disks {
        println!(
            "disk {}: {} ({}), {} on disk",
            disk.id,
            disk.image,
            disk.format,
            size([disk.image.as_str()])
        );
        println!(
            "disk {}: written to {} since, {} on disk",
            disk.id,
            disk.overlay,
            size([disk.overlay.as_str()])
        );
    }
    Ok(Exit::Done)
}

/// There is no such snapshot, and what there is.
pub(super) fn no_snapshot(book: &Book, vm: &VmName, name: &SnapshotName) -> Problem {
    let names: Vec<&str> = book.of_vm(vm).map(|snapshot| snapshot.name.as_str()).collect();
    let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Problem::new(Exit::Unknown, format!("VM {vm} has no snapshot {name}: it has {names}"))
}

/// For programs: as it is known, with sizes.
fn value(book: &Book, snapshot: &Snapshot) -> Value {
    let disk = |disk: &crate::snapshot::book::SnapshotDisk| {
        json!({
            "id": disk.id, "base": disk.base, "image": disk.image, "format": disk.format, "overlay": disk.overlay,
            "image-bytes": allocated_bytes(Path::new(&disk.image)),
            "overlay-bytes": allocated_bytes(Path::new(&disk.overlay)),
            "is-current": book.chain_of_top(&disk.overlay).is_some(),
        })
    };
    json!({
        "vm": snapshot.vm, "name": snapshot.name, "created-unix-secs": snapshot.created_unix_secs, "state": snapshot.state,
        "quiesced": snapshot.quiesced, "description": snapshot.description, "parent": snapshot.parent,
        "disks": snapshot.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

fn state(snapshot: &Snapshot) -> String {
    format!("{}{}", snapshot.state, if snapshot.quiesced { ", quiesced" } else { "" })
}

/// What files take on their storage; a question mark where one is gone.
fn size<'a>(paths: impl IntoIterator<Item = &'a str>) -> String {
    let mut sum = 0_u64;
    for path in paths {
        let Some(bytes) = allocated_bytes(Path::new(path)) else { return "?".to_owned() };
        sum = sum.saturating_add(bytes);
    }
    Size::bytes(sum).to_string()
}

/// A time for people, to the second.
fn utc(unix_secs: u64) -> String {
    let (days, seconds) = (unix_secs / 86_400, unix_secs % 86_400);
    // Days since 1 March of year 0: leap days come at the end of a year then.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_for_people() {
        // By `date -u -d @SECONDS`.
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(1_582_605_802), "2020-02-25 04:43:22 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(4_107_542_399), "2100-02-28 23:59:59 UTC");
    }
}
