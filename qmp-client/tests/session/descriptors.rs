//! Descriptors that go with commands.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Duration;

use qmp_client::QmpError;
use serde_json::{Value, json};

use crate::peer::{session, settle, start};

/// A pipe's reading end that gives `text`.
fn says(text: &str) -> OwnedFd {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    std::io::Write::write_all(&mut writer, text.as_bytes()).expect("room in the pipe");
    reader.into()
}

fn said(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).expect("readable");
    text
}

#[tokio::test]
async fn a_descriptor_comes_with_its_command_and_is_closed_here() {
    let (qmp, _events, mut peer) = session().await;
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let call =
        start(async move { qmp.call_with_fds("getfd", json!({"fdname": "f"}), vec![writer.into()]).await })
            .await;
    let mut got = peer.get().await;
    assert_eq!((got.name(), got.fds.len()), ("getfd", 1));
    drop(got.fds.pop());
    // Ends only when no writing end is left, ours included.
    assert_eq!(reader.read(&mut [0]).expect("the end"), 0);
    peer.answer(&got, json!({})).await;
    call.await.expect("no panic").expect("returned");
}

#[tokio::test(start_paused = true)]
async fn one_command_with_descriptors_is_in_flight_at_a_time() {
    let (qmp, _events, mut peer) = session().await;
    let mut calls = Vec::new();
    for number in 0..4 {
        let qmp = qmp.clone();
        let fds = vec![says(&format!("file {number}"))];
        calls
            .push(start(async move { qmp.call_with_fds("add-fd", json!({ "n": number }), fds).await }).await);
    }
    let first = peer.get().await;
    assert!(peer.hears_nothing().await);

    // Commands without are not held up.
    let caller = qmp.clone();
    let query = start(async move { caller.call("query-x", Value::Null).await }).await;
    let got = peer.get().await;
    assert_eq!(got.name(), "query-x");
    peer.answer(&got, json!({})).await;
    query.await.expect("no panic").expect("returned");

    // A caller that gives up keeps its turn until its reply; one that waits in vain is told that nothing was
    // sent.
    calls.remove(0).abort();
    assert!(peer.hears_nothing().await);
    let waited =
        qmp.with_deadline(Duration::from_secs(1)).call_with_fds("add-fd", Value::Null, vec![says("")]).await;
    assert!(matches!(waited, Err(QmpError::NotSent { .. })), "{waited:?}");

    let mut got = first;
    for number in 0..4 {
        assert_eq!(got.json["arguments"]["n"], number);
        assert_eq!(said(got.fds.pop().expect("its descriptor")), format!("file {number}"));
        peer.answer(&got, json!(number)).await;
        if number < 3 {
            got = peer.get().await;
        }
    }
    for (number, call) in (1..).zip(calls) {
        assert_eq!(call.await.expect("no panic").expect("returned"), json!(number));
    }
    settle().await;
    assert!(peer.hears_nothing().await);
}

#[tokio::test]
async fn too_many_descriptors_are_refused_before_they_harm_the_session() {
    let (qmp, _events, mut peer) = session().await;
    let fds = (0..254).map(|_| says("")).collect();
    let error = qmp.call_with_fds("add-fd", Value::Null, fds).await.expect_err("too many");
    assert!(matches!(error, QmpError::TooManyFds { count: 254, .. }), "{error}");
    assert!(peer.hears_nothing().await);
    assert!(!qmp.is_closed());
}
