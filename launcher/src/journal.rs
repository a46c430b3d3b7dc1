//! The journal: every change to the host, written down before it is made, so that it can be undone after any
//! death of the owner.
//!
//! Owns the file: a header line, then one JSON line for each entry. What an entry means belongs to its type
//! `E`. The file lies in the runtime folder, on a tmpfs that dies with the boot as the changes do, so nothing
//! is fsynced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::folders::{VmName, WriteError, remedy, write_volatile};
use crate::locks;
use crate::process::BootId;

/// The format that this qvirt writes, and the newest it reads.
const FORMAT: u32 = 1;

/// More than any journal holds: a stranger's file must not fill our memory.
const MAX_BYTES: u64 = 64 << 20;

/// What is wrong with a journal.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum JournalError {
    #[error("cannot {step} the journal {path:?}: check the owner and mode of it and its folder")]
    Io { path: PathBuf, step: &'static str, source: io::Error },
    #[error("cannot add to the journal {path:?}, so the change was not begun: {}", remedy(.source))]
    Append { path: PathBuf, source: io::Error },
    #[error("cannot start or compact the journal")]
    Write(#[from] WriteError),
    #[error(
        "the journal {path:?} has format {found} and this qvirt reads up to {FORMAT}: use the qvirt that wrote it, or a newer one"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "the journal {path:?} is of the VM {found:?}, not {expected:?}: its folder was moved, so move it back"
    )]
    OtherVm { path: PathBuf, found: String, expected: String },
    #[error(
        "line {line} of the journal {path:?} cannot be read: a newer qvirt may have written it; if not, undo by hand what it lists \
         and remove it"
    )]
    Line { path: PathBuf, line: usize, source: serde_json::Error },
    #[error("an entry for the journal {path:?} is not JSON: this is a fault of qvirt, please report it")]
    Entry { path: PathBuf, source: serde_json::Error },
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The file's format version.
    pub format: u32,
    /// The boot whose changes it lists.
    pub boot: BootId,
    /// The VM they were made for.
    pub vm: VmName,
}

/// An open journal; its owner is the only one who writes it.
#[derive(Debug)]
pub struct Journal<E> {
    path: PathBuf,
    header: Header,
    file: File,
    /// The length of all whole lines. The file is longer only if cutting off a failed append failed too.
    length_bytes: u64,
    entries: PhantomData<fn(E)>,
}

impl<E: Serialize + DeserializeOwned> Journal<E> {
    /// Opens the journal of `vm`, making it if there is none, and reads its entries. A torn last line (its
    /// change was not begun) and the entries of another boot (their changes died with it) are dropped from
    /// the file, with a warning in the log.
    ///
    /// # Errors
    /// It cannot be read or made, is of a newer format, of another VM, or damaged.
    pub fn open(path: &Path, vm: &VmName) -> Result<(Journal<E>, Vec<E>), JournalError> {
        let failed = |step| move |source| JournalError::Io { path: path.into(), step, source };
        let boot = BootId::current().map_err(failed("date"))?;
        let header = Header { format: FORMAT, boot, vm: vm.clone() };
        let entries = match read(path)? {
            Some(found) if found.header.vm != *vm => {
                let (found, expected) = (found.header.vm.to_string(), vm.to_string());
                return Err(JournalError::OtherVm { path: path.into(), found, expected });
            }
            Some(found) if found.header.boot == header.boot => {
                let file = OpenOptions::new().append(true).open(path).map_err(failed("open"))?;
                if found.torn {
                    warn!(%vm, ?path, "dropped an unfinished line of the journal: its change was not begun");
                    file.set_len(found.length_bytes).map_err(failed("cut"))?;
                }
                let length_bytes = found.length_bytes;
                return Ok((
                    Journal { path: path.into(), header, file, length_bytes, entries: PhantomData },
                    found.entries,
                ));
            }
            Some(found) => {
                let count = found.entries.len();
                warn!(%vm, ?path, count, "dropped the journal of another boot: its changes died with that boot");
                Vec::new()
            }
            None => Vec::new(),
        };
        let (file, length_bytes) = write_whole(path, &header, &entries)?;
        Ok((Journal { path: path.into(), header, file, length_bytes, entries: PhantomData }, entries))
    }

    /// Adds `entry`. Only when this has returned may the change be made.
    ///
    /// # Errors
    /// Nothing was added: the disk is full, most often.
    pub fn append(&mut self, entry: &E) -> Result<(), JournalError> {
        let line = to_line(&self.path, entry)?;
        let added = self.add(line.as_bytes());
        added.map_err(|source| JournalError::Append { path: self.path.clone(), source })
    }

    /// One write(2) for the whole line: a reader sees all of it or, after a crash, a torn end.
    fn add(&mut self, line: &[u8]) -> io::Result<()> {
        if self.file.metadata()?.size() != self.length_bytes {
            self.file.set_len(self.length_bytes)?;
        }
        let outcome = loop {
            match self.file.write(line) {
                Ok(written) if written == line.len() => break Ok(()),
                Ok(_) => break Err(io::ErrorKind::StorageFull.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        match outcome {
            Ok(()) => self.length_bytes += line.len() as u64,
            // If this fails as well, the next append begins with it, and a reader drops the torn line.
            Err(_) => drop(self.file.set_len(self.length_bytes)),
        }
        outcome
    }

    /// How long the file is.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Replaces all entries, as one step for whoever reads the file.
    ///
    /// # Errors
    /// The file is as it was.
    pub fn rewrite(&mut self, entries: &[E]) -> Result<(), JournalError> {
        (self.file, self.length_bytes) = write_whole(&self.path, &self.header, entries)?;
        Ok(())
    }

    /// Removes the file: everything is undone.
    ///
    /// # Errors
    /// It is there and cannot be removed.
    pub fn remove(self) -> Result<(), JournalError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Io { path: self.path, step: "remove", source })
            }
            _ => Ok(()),
        }
    }
}

/// The header and entries of the journal `path` without changing anything; `None` if there is none. A torn
/// last line and the entries of another boot are left out.
///
/// # Errors
/// It cannot be read, is of a newer format, or damaged.
pub fn read_only<E: DeserializeOwned>(path: &Path) -> Result<Option<(Header, Vec<E>)>, JournalError> {
    let boot =
        BootId::current().map_err(|source| JournalError::Io { path: path.into(), step: "date", source })?;
    let found = read(path)?;
    Ok(found.map(|found| {
        let entries = if found.header.boot == boot { found.entries } else { Vec::new() };
        (found.header, entries)
    }))
}

/// Whether the journal `path` has something to undo. A missing one has not.
///
/// # Errors
/// As [`read_only`].
pub fn has_entries(path: &Path) -> Result<bool, JournalError> {
    Ok(read_only::<IgnoredAny>(path)?.is_some_and(|(_, entries)| !entries.is_empty()))
}

struct Found<E> {
    header: Header,
    entries: Vec<E>,
    length_bytes: u64,
    torn: bool,
}

/// `None` if there is no file, or not even a whole header: then nothing was ever done under it.
fn read<E: DeserializeOwned>(path: &Path) -> Result<Option<Found<E>>, JournalError> {
    let mut bytes = Vec::new();
    let read = locks::open_regular(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(JournalError::Io { path: path.into(), step: "read", source }),
    }
    let Some(end) = bytes.iter().rposition(|byte| *byte == b'\n') else { return Ok(None) };
    let whole = &bytes[..end];
    let failed = |line| move |source| JournalError::Line { path: path.into(), line: line + 1, source };
    let mut lines = whole.split(|byte| *byte == b'\n').enumerate();
    let (_, first) = lines.next().expect("split gives at least one piece");
    // The format first: a newer header may not even parse.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    match serde_json::from_slice::<Format>(first).map_err(failed(0))?.format {
        ..=FORMAT => {}
        found => return Err(JournalError::Newer { path: path.into(), found }),
    }
    let header = serde_json::from_slice(first).map_err(failed(0))?;
    let entries = lines.map(|(number, line)| serde_json::from_slice(line).map_err(failed(number)));
    let entries = entries.collect::<Result<_, _>>()?;
    Ok(Some(Found { header, entries, length_bytes: end as u64 + 1, torn: end + 1 < bytes.len() }))
}

/// A new file in the place of the old one, open for appending, and its length.
fn write_whole<E: Serialize>(
    path: &Path,
    header: &Header,
    entries: &[E],
) -> Result<(File, u64), JournalError> {
    let mut text = to_line(path, header)?;
    for entry in entries {
        text.push_str(&to_line(path, entry)?);
    }
    write_volatile(path, text.as_bytes())?;
    let file = OpenOptions::new().append(true).open(path);
    let file = file.map_err(|source| JournalError::Io { path: path.into(), step: "open", source })?;
    Ok((file, text.len() as u64))
}

fn to_line(path: &Path, value: &impl Serialize) -> Result<String, JournalError> {
    // JSON escapes a newline in any text, so a value is always one line.
    let mut line =
        serde_json::to_string(value).map_err(|source| JournalError::Entry { path: path.into(), source })?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::process::Command;

    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Step {
        Tap(String),
        Bind { device: String },
    }

    fn tap(name: &str) -> Step {
        Step::Tap(name.into())
    }

    fn vm() -> VmName {
        "web".parse().expect("a good name")
    }

    fn open(path: &Path) -> (Journal<Step>, Vec<Step>) {
        Journal::open(path, &vm()).expect("opens")
    }

    #[test]
    fn what_is_appended_is_read_back_and_can_be_compacted() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("journal");
        assert!(!has_entries(&path).expect("missing"));
        let (mut journal, entries) = open(&path);
        assert!(entries.is_empty() && !has_entries(&path).expect("only a header"));
        let bind = Step::Bind { device: "a\nb".into() };
        journal.append(&tap("tap0")).expect("added");
        journal.append(&bind).expect("added");
        assert!(has_entries(&path).expect("read"));
        drop(journal);

        let (mut journal, entries) = open(&path);
        assert_eq!(entries, [tap("tap0"), bind.clone()]);
        journal.rewrite(std::slice::from_ref(&bind)).expect("rewritten");
        journal.append(&tap("tap1")).expect("added to the new file");
        let (header, entries) = read_only::<Step>(&path).expect("read").expect("there");
        assert_eq!((header.vm, header.format), (vm(), 1));
        assert_eq!(entries, [bind, tap("tap1")]);
        journal.remove().expect("removed");
        assert!(read_only::<Step>(&path).expect("missing").is_none());
        assert_eq!(fs::read_dir(temp.path()).expect("read").count(), 0);
    }

    #[test]
    fn a_torn_line_is_dropped_at_every_length() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("journal");
        let (mut journal, _) = open(&path);
        journal.append(&tap("tap0")).expect("added");
        let first = journal.length_bytes;
        journal.append(&tap("tap1")).expect("added");
        let text = fs::read(&path).expect("read");
        for cut in first..text.len() as u64 {
            fs::write(&path, &text[..cut as usize]).expect("written");
            assert_eq!(
                read_only::<Step>(&path).expect("read").expect("there").1,
                [tap("tap0")],
                "cut at {cut}"
            );
            let (mut journal, entries) = open(&path);
            assert_eq!(entries, [tap("tap0")]);
            journal.append(&tap("tap2")).expect("added");
            assert_eq!(open(&path).1, [tap("tap0"), tap("tap2")], "cut at {cut}");
        }
        // Killed before the header was whole: nothing was ever done under it.
        fs::write(&path, &text[..10]).expect("written");
        assert!(open(&path).1.is_empty());
    }

    #[test]
    fn another_boot_another_vm_and_a_newer_format() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("journal");
        fs::write(&path, "{\"format\":1,\"boot\":\"b\",\"vm\":\"web\"}\n{\"tap\":\"tap0\"}\n")
            .expect("written");
        assert!(!has_entries(&path).expect("of another boot"));
        assert!(open(&path).1.is_empty());
        let header = read_only::<Step>(&path).expect("read").expect("there").0;
        assert_eq!(header.boot, BootId::current().expect("proc"), "the file begins anew");

        let error =
            Journal::<Step>::open(&path, &"db".parse().expect("a good name")).expect_err("not its journal");
        assert!(matches!(error, JournalError::OtherVm { .. }));
        fs::write(&path, "{\"format\":2,\"what\":[]}\n").expect("written");
        let error = Journal::<Step>::open(&path, &vm()).expect_err("newer").to_string();
        assert!(error.contains("format 2"), "{error}");
    }

    #[test]
    fn damage_is_named_by_its_line_and_nothing_is_thrown_away() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("journal");
        let (mut journal, _) = open(&path);
        journal.append(&tap("tap0")).expect("added");
        let damaged = fs::read_to_string(&path).expect("read") + "what is this\n{\"tap\":\"tap1\"}\n";
        fs::write(&path, &damaged).expect("written");
        let error = Journal::<Step>::open(&path, &vm()).expect_err("damaged");
        assert!(matches!(error, JournalError::Line { line: 3, .. }), "{error:?}");
        assert_eq!(fs::read_to_string(&path).expect("read"), damaged);
    }

    /// The limit on a file's size makes the kernel refuse exactly as a full disk does: first a short write,
    /// then an error. It holds for a process, so this test runs itself again as a child with the limit set.
    #[test]
    fn a_full_disk_leaves_whole_lines_only() {
        const JOURNAL: &str = "QVIRT_TEST_FULL_JOURNAL";
        if let Some(path) = env::var_os(JOURNAL) {
            return fill(Path::new(&path));
        }
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("journal");
        let name = std::thread::current().name().expect("the test's own name").to_owned();
        // One block of the limit has 512 or 1024 bytes, by shell.
        let limited = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$@\"", "sh"])
            .arg(env::current_exe().expect("this program"))
            .args(["--exact", &name, "--nocapture"])
            .env(JOURNAL, &path)
            .output()
            .expect("sh");
        let text =
            String::from_utf8_lossy(&limited.stdout).into_owned() + &String::from_utf8_lossy(&limited.stderr);
        assert!(limited.status.success() && text.contains("filled after"), "{text}");
        let (mut journal, entries) = open(&path);
        assert!(entries.len() > 2 && entries.iter().all(|entry| *entry == tap("0123456789")));
        journal.append(&tap("with room again")).expect("added");
        assert_eq!(open(&path).1.len(), entries.len() + 1);
    }

    fn fill(path: &Path) {
        let (mut journal, _) = open(path);
        let mut count = 0;
        let error = loop {
            match journal.append(&tap("0123456789")) {
                Ok(()) => count += 1,
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("the disk is full") || error.contains("file size limit"), "{error}");
        let length_bytes = fs::metadata(path).expect("there").len();
        assert_eq!(length_bytes, journal.length_bytes, "no piece of a line is left");
        assert!(journal.append(&tap("0123456789")).is_err(), "still full");
        assert_eq!(open(path).1.len(), count);
        let many = vec![tap("0123456789"); count + 2];
        assert!(matches!(journal.rewrite(&many), Err(JournalError::Write(_))));
        assert_eq!(open(path).1.len(), count, "compacting failed and changed nothing");
        println!("filled after {count} entries");
    }
}
