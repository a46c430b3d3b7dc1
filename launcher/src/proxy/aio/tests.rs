//! Real files, of the file system that temporary files are on.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const BLOCK: usize = 4096;

/// A file of sixteen blocks of sevens; nothing of it is in the page cache, where the kernel would have to look first.
fn file() -> (tempfile::NamedTempFile, File) {
    let named = tempfile::NamedTempFile::new().expect("a file");
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(named.path())
        .expect("it opens");
    file.write_all_at(&Bytes::from(&[7; 16 * BLOCK][..]), 0).expect("written");
    file.sync_all().expect("its blocks are there");
    (named, file)
}

/// A call, with somebody to answer it.
async fn call(aio: &Aio, file: &File, direction: Direction, offset: usize, data: Bytes) -> (Bytes, Outcome) {
    tokio::select! {
        ended = aio.run() => panic!("{ended:?}"),
        called = tokio::time::timeout(PATIENCE, aio.call(file, direction, offset as u64, data, ())) => called.expect("in time"),
    }
}

#[tokio::test]
async fn what_is_written_is_read_back_and_what_lies_beyond_the_end_is_for_a_thread() {
    let (named, file) = file();
    let aio = Aio::new().expect("the kernel has it");
    let written = Bytes::from(&[9; 2 * BLOCK][..]);
    let (_, outcome) = call(&aio, &file, Direction::Write, BLOCK, written).await;
    assert!(matches!(outcome, Some(Ok(()))), "{outcome:?}");
    let expected = [vec![7; BLOCK], vec![9; 2 * BLOCK], vec![7; 13 * BLOCK]].concat();
    assert_eq!(std::fs::read(named.path()).expect("read"), expected);
    let (read, outcome) = call(&aio, &file, Direction::Read, 0, Bytes::leftover(16 * BLOCK)).await;
    assert!(matches!(outcome, Some(Ok(()))), "{outcome:?}");
    assert_eq!(*read, *expected);
    for (direction, offset) in [(Direction::Read, 15), (Direction::Read, 99), (Direction::Write, 99)] {
        let (_, outcome) =
            call(&aio, &file, direction, offset * BLOCK, Bytes::from(&[1; 2 * BLOCK][..])).await;
        assert!(outcome.is_none(), "{direction:?} at {offset}: {outcome:?}");
    }
    let (_, outcome) = call(&aio, &file, Direction::Read, 0, Bytes::leftover(BLOCK)).await;
    assert!(outcome.is_some(), "the others may still go this way");
}

#[tokio::test]
async fn a_file_that_has_no_such_way_is_not_tried_again() {
    let (_named, file) = file();
    let aio = Aio::new().expect("the kernel has it");
    let (_, outcome) = call(&aio, &file, Direction::Read, 1, Bytes::leftover(BLOCK)).await;
    assert!(outcome.is_none(), "no direct I/O begins at byte 1: {outcome:?}");
    assert!(!aio.refused.load(Ordering::Relaxed), "which says nothing about others");
    let sysfs = File::open("/sys/devices/system/cpu/online").expect("there is a processor");
    let (_, outcome) = call(&aio, &sysfs, Direction::Read, 0, Bytes::leftover(BLOCK)).await;
    assert!(outcome.is_none() && aio.refused.load(Ordering::Relaxed), "{outcome:?}");
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_keeps_its_memory_and_its_guard_until_it_ends() {
    let (_named, file) = file();
    let aio = Aio::new().expect("the kernel has it");
    let guard = Arc::new(());
    let mut waiting = Box::pin(aio.call(&file, Direction::Read, 0, Bytes::leftover(BLOCK), guard.clone()));
    // Nobody answers calls here, so it is begun and no more.
    assert!(tokio::time::timeout(Duration::ZERO, &mut waiting).await.is_err());
    drop(waiting);
    assert_eq!(Arc::strong_count(&guard), 2);
    let ended = async {
        while Arc::strong_count(&guard) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        ended = aio.run() => panic!("{ended:?}"),
        ended = tokio::time::timeout(PATIENCE, ended) => ended.expect("in time"),
    }
}

#[tokio::test]
async fn its_end_is_that_of_its_calls() {
    let (_named, file) = file();
    let aio = Aio::new().expect("the kernel has it");
    let guard = Arc::new(());
    for _ in 0..16 {
        let call = aio.call(&file, Direction::Read, 0, Bytes::leftover(16 * BLOCK), guard.clone());
        assert!(tokio::time::timeout(Duration::ZERO, call).await.is_err());
    }
    drop(aio);
    assert_eq!(Arc::strong_count(&guard), 1);
}
