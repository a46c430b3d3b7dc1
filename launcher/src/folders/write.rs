//! Replacing a file as a whole: whoever reads it sees the old bytes or the new ones.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file that could not be replaced; the old one is as it was.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path:?} ({step}), so it is as it was: {}", remedy(.source))]
#[allow(missing_docs)]
pub struct WriteError {
    pub path: PathBuf,
    pub step: &'static str,
    pub source: io::Error,
}

/// What the name of a file begins with that is being written: one that stays belongs to a process that was killed.
pub(crate) const UNFINISHED: &str = ".new-";

/// What to do about a failed write.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full, free some space and try again"
        }
        io::ErrorKind::FileTooLarge => "the file size limit is reached, raise it (`ulimit -f`) and try again",
        io::ErrorKind::ReadOnlyFilesystem => {
            "the file system is read-only, remount it read-write and try again"
        }
        _ => "check the folder's owner and mode and try again",
    }
}

/// Replaces `path` by `bytes` (mode 0600, or that of the file it replaces), and returns once it would survive
/// a power cut.
///
/// # Errors
/// A step failed; `path` still has its old content.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    replace(path, bytes, true)
}

/// Replaces `path` by `bytes` as one step for whoever reads it, without waiting for the disk: for files that
/// die with the boot.
///
/// # Errors
/// As [`write_durably`].
pub fn write_volatile(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    replace(path, bytes, false)
}

fn replace(path: &Path, bytes: &[u8], durably: bool) -> Result<(), WriteError> {
    let failed = |step| move |source| WriteError { path: path.into(), step, source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary =
        tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder).map_err(failed("new file"))?;
    temporary.write_all(bytes).map_err(failed("write"))?;
    if let Ok(old) = fs::metadata(path) {
        temporary.as_file().set_permissions(old.permissions()).map_err(failed("mode"))?;
    }
    if durably {
        temporary.as_file().sync_all().map_err(failed("fsync"))?;
    }
    temporary.persist(path).map_err(|error| failed("rename")(error.error))?;
    if durably {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("fsync of the folder"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("web.toml");
        write_durably(&path, b"one").expect("written");
        assert_eq!(fs::metadata(&path).expect("exists").mode() & 0o777, 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("ours");
        write_volatile(&path, b"two").expect("written");
        assert_eq!(fs::read(&path).expect("read"), b"two");
        assert_eq!(fs::metadata(&path).expect("exists").mode() & 0o777, 0o640, "the mode stays");
        assert_eq!(fs::read_dir(temp.path()).expect("read").count(), 1);

        // A folder in the way makes the rename fail: the last step, so everything before it is cleaned up.
        fs::create_dir(temp.path().join("taken")).expect("made");
        let error = write_volatile(&temp.path().join("taken"), b"x").expect_err("a folder");
        assert_eq!(error.step, "rename");
        assert_eq!(fs::read_dir(temp.path()).expect("read").count(), 2);
        let missing = write_volatile(Path::new("/nonexistent/x"), b"x").expect_err("no folder").to_string();
        assert!(missing.contains("/nonexistent/x"), "{missing}");
    }
}
