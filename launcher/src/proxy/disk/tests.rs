//! What a connection's end and its successor's beginning do to requests.

use std::time::Duration;

use tokio::time::timeout;

use super::super::storage::Options;
use super::*;
use crate::nbd::Bytes;

const PATIENCE: Duration = Duration::from_secs(10);

fn disk() -> (Disk, tempfile::NamedTempFile) {
    disk_with(false)
}

fn disk_with(direct: bool) -> (Disk, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let options = Options {
        path: file.path().to_owned(),
        read_only: false,
        direct,
        unmap: false,
        write_through: false,
        size: 1 << 20,
    };
    let storage = Storage::open(options).expect("it opens");
    let policy = Policy { interval: Duration::from_secs(3600), timeout: None, reads: true, writes: true };
    (Disk::new(storage, 1 << 20, policy), file)
}

/// Lets everything that is ready run; whether that ended the future.
async fn ends_now(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    tokio::select! {
        biased;
        () = future => true,
        () = tokio::task::yield_now() => false,
    }
}

#[tokio::test]
async fn a_new_connection_waits_for_the_calls_of_the_old_one() {
    let (disk, _file) = disk();
    let old = [0, 1].map(|_| Running::new(disk.state.clone(), disk.next.fetch_add(1, Ordering::Relaxed)));
    let mut connected = Box::pin(disk.connected());
    assert!(!ends_now(&mut connected).await);
    let _young = Running::new(disk.state.clone(), disk.next.fetch_add(1, Ordering::Relaxed));
    for call in old {
        assert!(!ends_now(&mut connected).await);
        drop(call);
    }
    timeout(PATIENCE, connected).await.expect("served in time, whatever the young one does");
    timeout(PATIENCE, disk.handle(Request::Flush)).await.expect("in time").expect("flushed");
    assert_eq!(disk.watch().borrow().running().0, 1);
}

#[tokio::test]
async fn a_request_that_is_kept_goes_with_its_connection() {
    let (disk, _file) = disk();
    disk.change(|state| state.drill.write = true);
    let mut states = disk.watch();
    let request = Request::Write { offset: 0, data: Bytes::from(&[1; 512][..]), fua: false };
    // What is seen there keeps the state from changing, so it is let go of at once.
    let mut kept = async || states.wait_for(|state| state.retry.held().write == 1).await.map(drop);
    tokio::select! {
        answered = disk.handle(request.clone()) => panic!("{answered:?}"),
        kept = timeout(PATIENCE, kept()) => kept.expect("in time").expect("the disk is ours"),
    }
    assert_eq!(disk.watch().borrow().retry.held().write, 0);

    // One whose client stays is tried again when people say so.
    let (answered, ()) = tokio::join!(timeout(PATIENCE, disk.handle(request)), async {
        timeout(PATIENCE, kept()).await.expect("in time").expect("the disk is ours");
        disk.change(|state| {
            state.drill.write = false;
            state.retry.try_now();
        });
    });
    assert_eq!(answered.expect("in time"), Ok(Reply::Done));
    assert!(disk.watch().borrow().retry.outage().is_none());
}

#[tokio::test]
async fn a_direct_read_needs_no_thread() {
    let (disk, _file) = disk_with(true);
    let (offset, length) = (4096, 8192);
    let data = Bytes::from(&[1; 8192][..]);
    let work = async {
        disk.handle(Request::Write { offset, data: data.clone(), fua: true })
            .await
            .expect("written by a thread");
        let _all_threads = disk.threads.acquire_many(THREADS as u32).await.expect("nobody closes it");
        assert_eq!(disk.handle(Request::Read { offset, length }).await, Ok(Reply::Data(data)));
    };
    tokio::select! {
        () = disk.run() => panic!("it runs for ever"),
        done = timeout(PATIENCE, work) => done.expect("in time"),
    }
    assert_eq!(disk.watch().borrow().running().0, 0);
}
