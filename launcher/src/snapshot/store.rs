//! The file that [`Book`] stands in: read as a whole, changed under a lock, written so that it survives a power cut.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::{info, warn};

use super::book::{Book, FORMAT, Snapshot};
use super::files;
use crate::folders::{VmName, WriteError, write_durably};
use crate::image;

/// How long others may have the lock: each change is a small file.
const PATIENCE: Duration = Duration::from_secs(10);

/// The book cannot be read or changed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StoreError {
    #[error("cannot {step} {}: check the owner and mode of it and its folder", path.display())]
    Io { path: PathBuf, step: &'static str, source: io::Error },
    #[error("what is known of snapshots, {}, cannot be understood: mend it, or move it away and run `qvirt chain check`: {source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("what is known of snapshots, {}, has format {found}, this qvirt knows up to {FORMAT}: use the qvirt that wrote it", path.display())]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "what is known of snapshots cannot be written as TOML: this is a fault of qvirt, please report it"
    )]
    Print(#[from] Box<toml::ser::Error>),
    #[error("someone has held {} for {} s: see who with `fuser -v {}`", path.display(), PATIENCE.as_secs(), path.display())]
    Locked { path: PathBuf },
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Where the book lies.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The one in a user's state folder.
    pub fn new(state: &Path) -> Store {
        Store { folder: state.to_owned() }
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its file, for messages.
    pub fn path(&self) -> PathBuf {
        self.folder.join("snapshots.toml")
    }

    /// Reads the book; an empty one if there is none.
    ///
    /// # Errors
    /// It cannot be read or understood.
    pub fn read(&self) -> Result<Book, StoreError> {
        let path = self.path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Book::default()),
            Err(source) => return Err(StoreError::Io { path, step: "read", source }),
        };
        #[derive(serde::Deserialize)]
        struct Head {
            format: u32,
        }
        let parse = |source| StoreError::Parse { path: path.clone(), source: Box::new(source) };
        let head: Head = toml::from_str(&text).map_err(parse)?;
        if head.format > FORMAT {
            return Err(StoreError::Newer { path, found: head.format });
        }
        toml::from_str(&text).map_err(parse)
    }

    /// Changes the book; what fails changes nothing. Returns once it would survive a power cut.
    ///
    /// # Errors
    /// It cannot be read or written, or the change fails.
    pub fn change<T, E: From<StoreError>>(
        &self,
        change: impl FnOnce(&mut Book) -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = self.lock()?;
        let before = self.read()?;
        let mut book = before.clone();
        book.format = FORMAT;
        let outcome = change(&mut book)?;
        if (Book { format: before.format, ..book.clone() }) != before {
            let text = toml::to_string(&book).map_err(|error| StoreError::from(Box::new(error)))?;
            let words = "# Snapshots and chains of images, as qvirt keeps them: what a VM starts from. `qvirt chain check` mends it.\n";
            write_durably(&self.path(), format!("{words}{text}").as_bytes()).map_err(StoreError::from)?;
        }
        Ok(outcome)
    }

    /// The overlays of a snapshot are about to be made.
    ///
    /// # Errors
    /// As [`Store::change`].
    pub fn intend(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.change(|book| {
            book.intend(snapshot);
            Ok(())
        })
    }

    /// A snapshot is taken from now on: its overlays are the tops of their chains.
    ///
    /// # Errors
    /// As [`Store::change`], or a base cannot be looked at.
    pub fn add(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.change(|book| {
            book.add(snapshot).map_err(|(path, source)| StoreError::Io { path, step: "look at", source })
        })
    }

    /// A snapshot is not taken after all: its overlays are removed. Whoever dies meanwhile leaves nothing that the book does not know.
    ///
    /// # Errors
    /// As [`Store::change`].
    pub fn take_back(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.change::<_, StoreError>(|book| {
            if book.snapshot(&snapshot.vm, &snapshot.name).is_some_and(|known| known == snapshot) {
                book.take_back(snapshot);
                book.intend(snapshot);
            }
            Ok(())
        })?;
        self.sweep(&snapshot.vm)
    }

    /// Removes the overlays that a VM was about to make when its owner died, and learns from their headers on what those stand that were pulled. The
    /// caller has the VM's owner lock, and no snapshot under way.
    ///
    /// # Errors
    /// The book cannot be read or changed. A file that cannot be removed stays in the book.
    pub fn sweep(&self, vm: &VmName) -> Result<(), StoreError> {
        let book = self.read()?;
        let mut overlays = book.chains.iter().flat_map(|chain| &chain.overlays);
        let is_pulled = overlays.any(|overlay| overlay.pulling && overlay.vm == *vm);
        if !is_pulled && book.making.iter().all(|making| making.vm != *vm) {
            return Ok(());
        }
        self.change(|book| {
            learn_backings(book, vm);
            let known = book.clone();
            book.making.retain(|making| {
                if making.vm != *vm || known.overlay(&making.path).is_some() {
                    return making.vm != *vm;
                }
                match files::remove_unfinished(Path::new(&making.path), &making.backing) {
                    Ok(removed) => {
                        info!(%vm, path = making.path, removed, "an overlay that was not finished");
                        false
                    }
                    Err(error) => {
                        warn!(%vm, path = making.path, %error, "an overlay that was not finished cannot be removed");
                        true
                    }
                }
            });
            Ok(())
        })
    }

    /// An overlay was pulled, or not: its header says on what it stands, whichever VM's it was when it was made.
    ///
    /// # Errors
    /// As [`Store::change`].
    pub fn settle_pull(&self, path: &str) -> Result<(), StoreError> {
        self.change(|book| {
            if book.overlay(path).is_some_and(|overlay| overlay.pulling) {
                learn_backing(book, path);
            }
            Ok(())
        })
    }

    fn lock(&self) -> Result<Flock<File>, StoreError> {
        let path = self.folder.join(".snapshots.lock");
        let failed = |step| move |path: &Path, source| StoreError::Io { path: path.into(), step, source };
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open.map_err(|source| failed("open")(&path, source))?;
        let end = Instant::now() + PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((file, Errno::EAGAIN)) if Instant::now() < end => file,
                Err((_, Errno::EAGAIN)) => return Err(StoreError::Locked { path }),
                Err((_, error)) => return Err(failed("lock")(&path, error.into())),
            };
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Of overlays that were being pulled for a VM.
fn learn_backings(book: &mut Book, vm: &VmName) {
    let overlays = book.chains.iter().flat_map(|chain| &chain.overlays);
    let pulled: Vec<String> = overlays
        .filter(|overlay| overlay.pulling && overlay.vm == *vm)
        .map(|overlay| overlay.path.clone())
        .collect();
    pulled.iter().for_each(|path| learn_backing(book, path));
}

fn learn_backing(book: &mut Book, path: &str) {
    match image::backing_of(Path::new(path)) {
        Ok(Some((backing, _))) => book.pulled(path, &backing),
        // `qvirt chain check` says so.
        Ok(None) => warn!(path, "an overlay that stands on nothing"),
        Err(error) => warn!(path, %error, "an overlay whose header cannot be read"),
    }
}
