//! Storage that neither fails nor answers: when a disk hangs, and a look at its storage that may hang in its place.
//!
//! A disk hangs when requests of it are outstanding and none was done for a while. Where QEMU cannot tell whether any are, the storage itself is asked:
//! by a program of its own, since a thread that waits for it would keep this process, and with it its locks, from ending.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::Uptime;
use crate::image::read_storage;

/// How long nothing may be done before a disk hangs.
pub const LIMIT: Duration = Duration::from_secs(5);

/// What a look tells of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Rises with every request that was done, or has failed.
    pub progress: u64,
    /// For how long at least a request has been outstanding, if one is.
    pub busy_for: Option<Duration>,
    /// How long it may take.
    pub limit: Duration,
}

/// A change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It hangs.
    Began,
    /// It does not any more, after that time.
    Ended(Duration),
}

/// What is known of a disk from one look to the next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detector {
    /// As last seen.
    progress: Option<u64>,
    /// Since when requests are outstanding and none was done.
    since: Option<Uptime>,
    hangs: bool,
}

impl Detector {
    /// One that hung when it was last seen.
    pub fn of_hung(now: Uptime) -> Detector {
        Detector { since: Some(now), hangs: true, ..Detector::default() }
    }

    /// Whether it hangs.
    pub fn hangs(&self) -> bool {
        self.hangs
    }

    /// Whether nothing was done since the last look: only then it matters whether anything is outstanding.
    pub fn is_still(&self, progress: u64) -> bool {
        // Of one that hung under a former owner nothing is known but that.
        self.progress.map_or(self.hangs, |before| before == progress)
    }

    /// A look.
    pub fn sees(&mut self, sight: Sight, now: Uptime) -> Option<Turn> {
        let moved = !self.is_still(sight.progress);
        self.progress = Some(sight.progress);
        let Some(busy_for) = sight.busy_for.filter(|_| !moved) else {
            let since = self.since.take();
            return std::mem::take(&mut self.hangs).then(|| Turn::Ended(now.since(since.unwrap_or(now))));
        };
        let since = *self.since.get_or_insert(now.before(busy_for));
        if self.hangs || now.since(since) <= sight.limit {
            return None;
        }
        self.hangs = true;
        Some(Turn::Began)
    }

    /// The VM stands still: nothing is to be expected of a disk.
    pub fn rests(&mut self) {
        if !self.hangs {
            self.since = None;
        }
    }
}

/// What the storage of a disk answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was read, or could not be asked, which says nothing.
    Fine,
    /// It failed, in the system's words.
    Failed(String),
}

/// Reads the beginning of a file or block device, by a program of its own; waits for as long as that takes.
pub async fn probe(image: &str) -> Answer {
    // By this name even where the program's file was replaced since.
    let mut command = Command::new("/proc/self/exe");
    command.args(["io-probe", "--"]).arg(image).env_clear().current_dir("/").kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    match command.output().await {
        Ok(output) if output.status.code() == Some(1) => {
            let words = String::from_utf8_lossy(&output.stderr);
            // The system's words alone, as QEMU has them.
            let words = words.trim().trim_start_matches("qvirt: ");
            Answer::Failed(words.split(" (os error").next().unwrap_or_default().to_owned())
        }
        // One that could not be run has not asked the storage.
        _ => Answer::Fine,
    }
}

/// What the program does: `Ok(false)` if there is no such file, or none for us.
///
/// # Errors
/// The storage's.
pub fn read_beginning(image: &Path) -> std::io::Result<bool> {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    match read_storage(image) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), NotFound | PermissionDenied) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Uptime {
        Uptime::default().after(Duration::from_secs(1000 + seconds))
    }

    fn sight(progress: u64, is_busy: bool) -> Sight {
        Sight { progress, busy_for: is_busy.then_some(Duration::ZERO), limit: LIMIT }
    }

    #[test]
    fn a_disk_that_does_nothing_for_long_hangs_until_it_does_something() {
        let mut disk = Detector::default();
        assert_eq!(disk.sees(sight(9, true), at(0)), None, "the first look");
        assert_eq!(disk.sees(sight(9, true), at(2)), None);
        assert_eq!(disk.sees(sight(9, true), at(7)), None, "not longer than the limit");
        assert_eq!(disk.sees(sight(9, true), at(8)), Some(Turn::Began));
        assert_eq!(disk.sees(sight(9, true), at(60)), None, "once");
        assert!(disk.hangs());
        assert_eq!(disk.sees(sight(10, true), at(62)), Some(Turn::Ended(Duration::from_secs(60))));
        assert!(!disk.hangs());
        assert_eq!(disk.sees(sight(10, true), at(64)), None, "its clock begins anew");
    }

    #[test]
    fn one_that_is_idle_or_slow_does_not() {
        let mut disk = Detector::default();
        for second in 0..60 {
            assert_eq!(disk.sees(sight(9, false), at(second)), None, "idle");
        }
        for second in 60..120 {
            assert_eq!(disk.sees(sight(second, true), at(second)), None, "slow");
        }
        disk.sees(sight(119, true), at(120));
        disk.rests();
        assert_eq!(disk.sees(sight(119, true), at(300)), None, "the VM stood still in between");
        assert_eq!(disk.sees(sight(119, true), at(306)), Some(Turn::Began));
        disk.rests();
        assert!(disk.hangs());
        assert_eq!(
            disk.sees(sight(119, false), at(310)),
            Some(Turn::Ended(Duration::from_secs(10))),
            "reset"
        );
    }

    #[test]
    fn one_whose_request_is_known_to_be_old_does_at_once() {
        let mut disk = Detector::default();
        let old = Sight { busy_for: Some(LIMIT + Duration::from_millis(1)), ..sight(0, true) };
        assert_eq!(disk.sees(old, at(0)), None, "the first look");
        assert_eq!(disk.sees(old, at(1)), Some(Turn::Began));
        assert!(matches!(disk.sees(sight(0, false), at(9)), Some(Turn::Ended(lasted)) if lasted > LIMIT));
    }

    #[test]
    fn an_owner_that_comes_in_the_middle_knows() {
        let mut disk = Detector::of_hung(at(0));
        assert!(disk.is_still(9));
        assert_eq!(disk.sees(sight(9, true), at(2)), None);
        assert!(disk.hangs());
        assert_eq!(disk.sees(sight(10, true), at(4)), Some(Turn::Ended(Duration::from_secs(4))));
        let mut disk = Detector::of_hung(at(0));
        assert!(matches!(disk.sees(sight(9, false), at(2)), Some(Turn::Ended(_))), "it answers by now");
    }

    #[test]
    fn the_beginning_of_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("image");
        assert!(matches!(read_beginning(&file), Ok(false)), "none");
        std::fs::write(&file, "short").expect("written");
        assert!(matches!(read_beginning(&file), Ok(true)));
        assert_eq!(
            read_beginning(folder.path()).expect_err("a folder").to_string(),
            "Is a directory (os error 21)"
        );
    }
}
