//! The file that keeps what QEMU prints: rotated at launch, capped while it runs, quoted in errors.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What [`keep_under_cap`] allows.
pub const LOG_CAP_BYTES: u64 = 10 << 20;

/// Rotated logs that are kept: `.1` (the newest) to `.3`.
const KEPT: u32 = 3;

/// How much of the end is looked at for the last lines, and kept when a log is cut.
const TAIL_BYTES: u64 = 64 << 10;

/// Opens `log` for a new QEMU, after moving an old one that has anything in it to `log.1` and so on.
pub(super) fn open_rotated(log: &Path) -> io::Result<File> {
    if fs::metadata(log).is_ok_and(|found| found.len() > 0) {
        for kept in (0..KEPT).rev() {
            match fs::rename(rotated(log, kept), rotated(log, kept + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    // Appending is what makes it safe to cut the file under a running QEMU.
    OpenOptions::new().append(true).create(true).mode(0o600).open(log)
}

fn rotated(log: &Path, age: u32) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    if age > 0 {
        path.push(format!(".{age}"));
    }
    path.into()
}

/// Cuts a log of more than [`LOG_CAP_BYTES`] to its end, with a note in its place; returns whether it did.
/// Call it now and then while QEMU runs: it writes the file itself, so nothing else bounds it. What QEMU
/// prints during the cut may be lost.
///
/// # Errors
/// The file cannot be read or written.
pub fn keep_under_cap(log: &Path) -> io::Result<bool> {
    let mut file = OpenOptions::new().read(true).append(true).open(log)?;
    if file.metadata()?.len() <= LOG_CAP_BYTES {
        return Ok(false);
    }
    let tail = read_tail(&mut file)?;
    file.set_len(0)?;
    file.write_all(b"[qvirt: this log passed 10 MiB; only its end was kept]\n")?;
    file.write_all(&tail)?;
    Ok(true)
}

/// The last `count` lines of `log`, for people; empty if there is nothing to read.
pub fn last_lines(log: &Path, count: usize) -> String {
    let tail = File::open(log).and_then(|mut file| read_tail(&mut file)).unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The end of the file, from the beginning of a line.
fn read_tail(file: &mut File) -> io::Result<Vec<u8>> {
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    if start > 0 {
        let line = tail.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        tail.drain(..line);
    }
    Ok(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_old_logs_are_kept_and_empty_ones_do_not_count() {
        let temp = tempfile::tempdir().expect("a folder");
        let log = temp.path().join("qemu.log");
        for launch in 1..=6 {
            let mut file = open_rotated(&log).expect("opened");
            if launch != 3 {
                writeln!(file, "launch {launch}").expect("written");
            }
        }
        let text = |age| fs::read_to_string(rotated(&log, age)).unwrap_or_default();
        assert_eq!(
            [text(0), text(1), text(2), text(3), text(4)],
            ["launch 6\n", "launch 5\n", "launch 4\n", "launch 2\n", ""]
        );
    }

    #[test]
    fn the_last_lines_of_any_log() {
        let temp = tempfile::tempdir().expect("a folder");
        let log = temp.path().join("qemu.log");
        assert_eq!(last_lines(&log, 3), "");
        fs::write(&log, "one\ntwo\n\u{fc}three\nfour\n").expect("written");
        assert_eq!(last_lines(&log, 2), "\u{fc}three\nfour");
        assert_eq!(last_lines(&log, 9).lines().count(), 4);
        fs::write(&log, "x".repeat(100_000) + "\nlast").expect("written");
        assert_eq!(last_lines(&log, 9), "last", "half a line is not shown");
    }

    #[test]
    fn a_log_is_cut_under_its_writer() {
        let temp = tempfile::tempdir().expect("a folder");
        let log = temp.path().join("qemu.log");
        let mut qemu = open_rotated(&log).expect("opened");
        writeln!(qemu, "short").expect("written");
        assert!(!keep_under_cap(&log).expect("looked at"));
        let line = "a line that comes again and again\n";
        qemu.write_all(line.repeat(LOG_CAP_BYTES as usize / line.len() + 1).as_bytes()).expect("written");
        assert!(keep_under_cap(&log).expect("cut"));
        writeln!(qemu, "after the cut").expect("written");
        let text = fs::read_to_string(&log).expect("no hole of NUL bytes");
        assert!(text.starts_with("[qvirt: ") && text.ends_with("again\nafter the cut\n"));
        assert!(text.len() < 70_000);
    }
}
