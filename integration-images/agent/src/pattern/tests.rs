//! Patterns on a plain file, and on a disk that fails, hangs and forgets when it is told to.

use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::process::{Wish, shape};
use super::run::{Disk, Opener, Pattern};
use super::verify::verify_file;
use super::{Operation, Report, Shape, Verdict};

const SHAPE: Shape = Shape { area: 64 << 10, block: 4096 };
/// What a device says that fails, and one that is gone.
const EIO: i32 = 5;
const ENXIO: i32 = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Well,
    Fails,
    /// Cannot even be opened.
    Gone,
    Hangs,
    /// Says that it writes, and does not.
    Forgets,
}

/// A disk in memory.
#[derive(Clone)]
struct Fake(Arc<Medium>);

struct Medium {
    state: Mutex<(Mood, Vec<u8>)>,
    changed: Condvar,
}

impl Fake {
    fn new() -> Fake {
        let state = Mutex::new((Mood::Well, vec![0; SHAPE.area as usize]));
        Fake(Arc::new(Medium { state, changed: Condvar::new() }))
    }

    fn is(&self, mood: Mood) {
        self.0.state.lock().expect("no panic").0 = mood;
        self.0.changed.notify_all();
    }

    fn access(&self, act: impl FnOnce(Mood, &mut [u8])) -> io::Result<()> {
        let Medium { state, changed } = &*self.0;
        let mut state = changed
            .wait_while(state.lock().expect("no panic"), |(mood, _)| *mood == Mood::Hangs)
            .expect("no panic");
        let (mood, bytes) = &mut *state;
        match mood {
            Mood::Fails | Mood::Gone => return Err(io::Error::from_raw_os_error(EIO)),
            _ => act(*mood, bytes),
        }
        Ok(())
    }

    fn start(&self, rate: Option<u32>) -> Pattern {
        let disk = self.clone();
        let opener: Opener = Box::new(move || match disk.0.state.lock().expect("no panic").0 {
            Mood::Gone => Err(io::Error::from_raw_os_error(ENXIO)),
            _ => Ok(Box::new(disk.clone())),
        });
        Pattern::start_with(opener, Path::new("fake"), SHAPE, rate.and_then(NonZero::new)).expect("a pattern")
    }
}

impl Disk for Fake {
    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.access(|mood, bytes| {
            if mood != Mood::Forgets {
                bytes[offset as usize..][..from.len()].copy_from_slice(from);
            }
        })
    }

    fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let length = into.len();
        self.access(|_, bytes| into.copy_from_slice(&bytes[offset as usize..][..length]))
    }
}

fn wait(pattern: &Pattern, what: &str, done: impl Fn(&Report) -> bool) -> Report {
    let begin = Instant::now();
    loop {
        let report = pattern.report();
        if done(&report) {
            return report;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "no {what}: {report:#?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn stop(pattern: Pattern) -> Report {
    pattern.stop(Duration::from_secs(30))
}

#[test]
fn a_disk_that_is_well_has_nothing_to_tell() {
    let pattern = Fake::new().start(None);
    wait(&pattern, "third generation", |report| report.generation >= 3);
    let report = stop(pattern);
    assert!(report.writes >= 32 && report.reads >= 24 && report.verified == report.reads, "{report:#?}");
    assert_eq!((report.error_count, report.mismatch_count, report.outage_count), (0, 0, 0));
    assert!(report.working && report.outstanding.is_none(), "{report:#?}");
    let json = serde_json::to_string(&report).expect("JSON");
    assert_eq!(serde_json::from_str::<Report>(&json).expect("the same"), report);
}

#[test]
fn it_goes_on_after_errors_and_tells_when_the_disk_works_again() {
    let disk = Fake::new();
    let pattern = disk.start(None);
    wait(&pattern, "write", |report| report.writes > 0);
    disk.is(Mood::Fails);
    wait(&pattern, "errors", |report| report.error_count >= 2 && !report.working);
    disk.is(Mood::Gone);
    wait(&pattern, "failed opening", |report| {
        report.errors.iter().any(|error| error.operation == Operation::Open)
    });
    let failed = pattern.report();
    disk.is(Mood::Well);
    let report = wait(&pattern, "end of the outage", |report| report.working);
    stop(pattern);

    let outage = &report.outages[0];
    assert_eq!((report.outage_count, outage.errors), (1, report.error_count));
    let ended = outage.ended_us.expect("it ended");
    assert!(
        outage.began_us < failed.now_us && ended >= failed.now_us && report.longest_pause_us > 10_000,
        "{report:#?}"
    );
    assert!(report.longest_pause_at_us == ended && failed.outages[0].ended_us.is_none());
    assert_eq!((report.errors[0].errno, report.mismatch_count), (Some(EIO), 0));
    let opening = report.errors.iter().find(|error| error.operation == Operation::Open);
    assert_eq!(opening.and_then(|error| error.errno), Some(ENXIO));
}

#[test]
fn a_report_does_not_wait_for_a_disk_that_hangs() {
    let disk = Fake::new();
    let pattern = disk.start(None);
    wait(&pattern, "write", |report| report.writes > 0);
    disk.is(Mood::Hangs);
    let hangs = |report: &Report| {
        report.outstanding.as_ref().is_some_and(|operation| report.now_us > operation.since_us + 50_000)
    };
    let report = wait(&pattern, "outstanding operation", hangs);
    assert!(report.working && report.error_count == 0, "{report:#?}");
    disk.is(Mood::Well);
    let later = wait(&pattern, "going on", |later| later.writes > report.writes + 1);
    assert!(later.longest_pause_us >= 50_000 && later.longest_pause_at_us >= report.now_us, "{later:#?}");

    disk.is(Mood::Hangs);
    wait(&pattern, "outstanding operation", hangs);
    let last = pattern.stop(Duration::from_millis(20));
    assert!(last.outstanding.is_some(), "{last:#?}");
    disk.is(Mood::Well);
}

#[test]
fn a_write_that_is_not_there_is_found() {
    let disk = Fake::new();
    let pattern = disk.start(None);
    wait(&pattern, "second generation", |report| report.generation >= 2);
    disk.is(Mood::Forgets);
    let report = wait(&pattern, "mismatch", |report| report.mismatch_count > 0);
    let mismatch = &report.mismatches[0];
    let expected = mismatch.expected.expect("a number");
    assert!(mismatch.found.contains(&format!("generation {} ", expected - 1)), "{mismatch:?}");
    assert_eq!(mismatch.offset % 4096, 0);
    stop(pattern);
}

#[test]
fn what_changes_behind_its_back_is_found_before_it_is_written_again() {
    let disk = Fake::new();
    // So slow that the blocks ahead stay as they are.
    let pattern = disk.start(Some(200));
    wait(&pattern, "second generation", |report| report.generation >= 2);
    let mut behind = vec![0xff; SHAPE.area as usize];
    std::mem::swap(&mut disk.0.state.lock().expect("no panic").1, &mut behind);
    let report = wait(&pattern, "mismatch", |report| report.mismatch_count > 0);
    assert!(report.mismatches[0].found.contains("no pattern"), "{report:#?}");
    let report = stop(pattern);
    assert!(report.now_us / 5000 + 1 >= report.writes, "the rate is not kept: {report:#?}");
    // What the rate makes it wait is no pause.
    assert!(report.longest_pause_us < 1_000_000, "{report:#?}");
}

/// A file that a pattern wrote until its third generation, on a block of which the test lays its hand.
fn written() -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    file.as_file().set_len(SHAPE.area).expect("it grows");
    let path = file.path().to_owned();
    // Without O_DIRECT, which not every file system has.
    let open =
        move || Ok(Box::new(std::fs::File::options().read(true).write(true).open(&path)?) as Box<dyn Disk>);
    let pattern = Pattern::start_with(Box::new(open), file.path(), SHAPE, None).expect("a pattern");
    wait(&pattern, "third generation", |report| report.generation >= 3);
    stop(pattern);
    file
}

fn verdict(file: &NamedTempFile) -> Option<Verdict> {
    verify_file(file.as_file(), "disk").expect("it can be read")
}

#[test]
fn what_a_pattern_left_is_consistent_until_somebody_touches_it() {
    let file = written();
    let good = verdict(&file).expect("a pattern");
    assert!(
        good.is_consistent() && good.verified == 16 && good.shape == SHAPE && good.generation >= 3,
        "{good:#?}"
    );

    let mut block = vec![0; 4096];
    file.as_file().read_exact_at(&mut block, 4096).expect("a block");
    file.as_file().write_all_at(&block, 8192).expect("it is written where it does not belong");
    file.as_file().write_all_at(b"x", 3 * 4096 + 2000).expect("a byte");
    file.as_file().write_all_at(&[0; 4096], 5 * 4096).expect("zeros");
    let bad = verdict(&file).expect("a pattern");
    assert_eq!((bad.verified, bad.mismatch_count, bad.stale, bad.unwritten), (13, 2, 1, 0), "{bad:#?}");
    let found: Vec<_> = bad.mismatches.iter().map(|one| (one.offset, one.found.as_str())).collect();
    assert!(found[0].0 == 8192 && found[0].1.contains("block at 4096"), "{found:?}");
    assert_eq!(found[1], (3 * 4096, "a damaged block"));
    assert!(!bad.is_consistent());
}

#[test]
fn a_disk_that_was_put_back_in_time_is_stale() {
    let file = written();
    let mut old = vec![0; 4096];
    file.as_file().read_exact_at(&mut old, 0).expect("a block");
    let before = verdict(&file).expect("a pattern").generation;
    // A later run, which the last block does not see.
    let again = written();
    let mut image = std::fs::read(again.path()).expect("a file");
    image[..4096].copy_from_slice(&old);
    std::fs::write(file.path(), &image).expect("a file");
    let verdict = verdict(&file).expect("a pattern");
    assert_eq!(
        (verdict.verified, verdict.stale, verdict.mismatch_count),
        (15, 1, 0),
        "{before} {verdict:#?}"
    );
}

#[test]
fn no_pattern_is_no_verdict_and_impossible_shapes_are_refused() {
    let file = NamedTempFile::new().expect("a file");
    assert_eq!(verdict(&file), None);
    file.as_file().set_len(3 << 20).expect("it grows");
    assert_eq!(verdict(&file), None);

    let all = Wish::default();
    assert_eq!(shape(1 << 20, all), Ok(Shape { area: 1 << 20, block: 4096 }));
    assert_eq!(shape(1 << 40, all), Ok(Shape { area: 16 << 20, block: 4096 }));
    assert_eq!(shape(10_000, Wish { block: Some(512), ..all }), Ok(Shape { area: 9728, block: 512 }));
    for (size, wish) in [
        (0, all),
        (4096, all),
        (1 << 20, Wish { block: Some(100), ..all }),
        (1 << 20, Wish { block: Some(0), ..all }),
        (1 << 20, Wish { mib: Some(2), ..all }),
    ] {
        assert!(shape(size, wish).is_err(), "{size} {wish:?}");
    }
}
