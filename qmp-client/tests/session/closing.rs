//! The end of a session and what callers learn of it.

use std::error::Error;
use std::sync::Arc;

use qmp_client::wire::{MAX_LINE, WireError};
use qmp_client::{CloseReason, Options, Qmp, QmpError};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::peer::{GREETING, pair, session, settle, start};

fn reason_of<T: std::fmt::Debug>(result: Result<T, QmpError>) -> Arc<CloseReason> {
    match result {
        Err(QmpError::Closed(reason)) => reason,
        other => panic!("not closed: {other:?}"),
    }
}

#[tokio::test]
async fn every_caller_learns_the_same_first_cause() {
    let (qmp, mut events, mut peer) = session().await;
    let mut calls = Vec::new();
    for _ in 0..3 {
        let qmp = qmp.clone();
        calls.push(start(async move { qmp.call("x", Value::Null).await }).await);
    }
    let with_fds = [std::io::pipe().expect("a pipe").0, std::io::pipe().expect("a pipe").0];
    for fd in with_fds {
        let qmp = qmp.clone();
        calls
            .push(start(async move { qmp.call_with_fds("getfd", Value::Null, vec![fd.into()]).await }).await);
    }
    let watcher = qmp.clone();
    let watch = start(async move { watcher.closed().await }).await;
    assert!(!qmp.is_closed());
    peer.say(r#"{"event":"SHUTDOWN"}"#).await;
    peer.say("Segmentation fault").await;
    drop(peer);
    let first = qmp.closed().await;
    assert!(matches!(&*first, CloseReason::Garbage { beginning, .. } if beginning == "Segmentation fault"));
    for call in calls {
        assert!(Arc::ptr_eq(&first, &reason_of(call.await.expect("no panic"))));
    }
    assert!(Arc::ptr_eq(&first, &watch.await.expect("no panic")));
    assert!(Arc::ptr_eq(&first, &reason_of(qmp.call("later", Value::Null).await)));
    assert!(qmp.is_closed());
    assert_eq!(events.next().await.expect("what came before the end").name, "SHUTDOWN");
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn the_end_of_the_stream_is_told_from_a_torn_line() {
    let (qmp, _events, peer) = session().await;
    drop(peer);
    assert!(matches!(&*qmp.closed().await, CloseReason::Eof));

    let (qmp, _events, mut peer) = session().await;
    peer.stream.write_all(br#"{"return": {"#).await.expect("room");
    drop(peer);
    let reason = qmp.closed().await;
    assert!(matches!(&*reason, CloseReason::Read(WireError::Torn { .. })), "{reason}");
    assert!(reason.source().expect("a cause").to_string().contains("return"));
}

#[tokio::test]
async fn a_line_without_end_names_the_limit() {
    let (qmp, _events, mut peer) = session().await;
    let flood = tokio::spawn(async move {
        let piece = vec![b'x'; 1 << 20];
        while peer.stream.write_all(&piece).await.is_ok() {}
    });
    let reason = qmp.closed().await;
    assert!(matches!(&*reason, CloseReason::Read(WireError::TooLong { limit: MAX_LINE })), "{reason}");
    assert!(reason.source().expect("a cause").to_string().contains("16777216"));
    flood.await.expect("ends with the session");
}

#[tokio::test]
async fn long_garbage_is_shown_by_its_beginning() {
    let (qmp, _events, mut peer) = session().await;
    peer.say(&format!("qemu: fatal: {}", "x".repeat(1000))).await;
    let text = qmp.closed().await.to_string();
    assert!(text.contains("qemu: fatal") && text.len() < 250, "{text}");
}

#[tokio::test]
async fn last_words_before_a_broken_pipe_count() {
    let (qmp, mut events, mut peer) = session().await;
    let (quitter, other) = (qmp.clone(), qmp.clone());
    let quit = start(async move { quitter.call("quit", Value::Null).await }).await;
    let got = peer.get().await;
    // Sent now, while the session's task has not yet had a turn to read.
    peer.say(r#"{"event":"SHUTDOWN"}"#).await;
    peer.answer(&got, json!("bye")).await;
    drop(peer);
    let late = other.call("query-x", Value::Null).await;
    assert_eq!(quit.await.expect("no panic").expect("returned"), "bye");
    assert_eq!(events.next().await.expect("an event").name, "SHUTDOWN");
    assert!(matches!(*reason_of(late), CloseReason::Eof));
}

#[test]
fn a_session_whose_runtime_is_gone_says_so() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let first = runtime();
    let (qmp, peer) = first.block_on(async {
        let (ours, mut peer) = pair();
        let connected = tokio::spawn(Qmp::connect(ours, Options::default()));
        peer.say(GREETING).await;
        let got = peer.get().await;
        peer.answer(&got, json!({})).await;
        let (qmp, _) = connected.await.expect("no panic").expect("negotiated");
        settle().await;
        (qmp, peer)
    });
    drop(peer);
    drop(first);
    runtime().block_on(async {
        assert!(qmp.is_closed());
        assert!(matches!(*qmp.closed().await, CloseReason::Abandoned));
        assert!(matches!(*reason_of(qmp.call("x", Value::Null).await), CloseReason::Abandoned));
    });
}
