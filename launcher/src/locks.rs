//! Open-file-description locks: who lives, told by the kernel.
//!
//! Owns taking and probing such locks. A VM has two (see [`crate::folders::VmFiles`]): `owner`, held by the
//! owner alone, and `life`, whose descriptor QEMU inherits, so that the lock lasts as long as either process.
//! Such a lock belongs to the open file, not to the process: it ends when the last descriptor of that open
//! file closes, and no unlock is ever called, because that would take it from the other process as well.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A lock file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} the lock file {path:?}: check the owner and mode of it and its folder")]
#[allow(missing_docs)]
pub struct LockError {
    pub path: PathBuf,
    pub step: &'static str,
    pub source: io::Error,
}

/// A held lock. Dropping it closes this process' descriptor and no more.
#[derive(Debug)]
pub struct OfdLock {
    file: File,
}

impl OfdLock {
    /// Takes the write lock of `path`, creating the file (mode 0600); `None` if another open file holds it.
    /// Never waits.
    ///
    /// # Errors
    /// The file cannot be opened or locked at all.
    pub fn try_acquire(path: &Path) -> Result<Option<OfdLock>, LockError> {
        let failed = |step| move |source| LockError { path: path.into(), step, source };
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(failed("open"))?;
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
                Err(error) => return Err(failed("lock")(error.into())),
            }
            // Whoever removed the runtime folder between our open and our lock left us a lock that nobody
            // else can see.
            let ours = file.metadata().map_err(failed("look at"))?;
            match fs::metadata(path) {
                Ok(now) if (now.dev(), now.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(OfdLock { file }));
                }
                _ => continue,
            }
        }
    }
}

impl AsFd for OfdLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether someone holds the lock of `path`, found out without taking it; a missing file is not held.
///
/// # Errors
/// The file exists and cannot be opened (another user's, for example) or asked.
pub fn probe(path: &Path) -> Result<bool, LockError> {
    let failed = |step| move |source| LockError { path: path.into(), step, source };
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("open")(error)),
    };
    let mut question = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut question)).map_err(|error| failed("probe")(error.into()))?;
    Ok(question.l_type != libc::F_UNLCK as libc::c_short)
}

/// Opens a file of a folder that may be a stranger's: not through a link, and without waiting for whoever would feed a FIFO.
///
/// # Errors
/// It cannot be opened, or is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    }
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // The kernel wants 0 here for open-file-description locks.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// A test beside this one that forks has our descriptors for the moment before its exec.
    fn free_soon(path: &Path) -> bool {
        let end = Instant::now() + Duration::from_secs(5);
        while probe(path).expect("probed") {
            if Instant::now() > end {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    #[test]
    fn one_holder_and_probing_takes_nothing() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("owner");
        assert!(!probe(&path).expect("a missing file is free"));
        assert!(!path.exists(), "probing creates nothing");

        let lock = OfdLock::try_acquire(&path).expect("usable").expect("free");
        assert!(probe(&path).expect("probed"));
        assert!(OfdLock::try_acquire(&path).expect("usable").is_none());
        drop(lock);
        assert!(free_soon(&path));
        assert!(OfdLock::try_acquire(&path).expect("usable").is_some());
    }

    #[test]
    fn a_child_that_inherits_the_descriptor_keeps_the_lock() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("life");
        let lock = OfdLock::try_acquire(&path).expect("usable").expect("free");
        // The descriptor as the child's stdout: inherited without a word about it, like QEMU's copy.
        let copy = lock.as_fd().try_clone_to_owned().expect("a copy");
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(copy).spawn().expect("cat");
        drop(lock);
        let held_by_child = probe(&path);
        drop(child.stdin.take());
        child.wait().expect("cat ends with its stdin");
        assert!(held_by_child.expect("probed"));
        assert!(free_soon(&path), "gone with the last process");
    }

    #[test]
    fn an_unusable_path_is_named() {
        let error = OfdLock::try_acquire(Path::new("/nonexistent/owner")).expect_err("no folder");
        assert!(error.to_string().contains("/nonexistent/owner"));
    }
}
