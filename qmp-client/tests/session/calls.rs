//! Commands: ids, order, patience, what passes through.

use std::time::Duration;

use qmp_client::{Options, QmpError, qapi};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::peer::{session, session_with, settle, start};

#[tokio::test]
async fn untyped_and_typed_calls_return_what_qemu_says() {
    let (qmp, _events, mut peer) = session().await;
    let caller = qmp.clone();
    let call = start(async move { caller.call("query-x", json!({"a": null})).await }).await;
    let got = peer.get().await;
    assert_eq!(got.text, r#"{"execute":"query-x","arguments":{"a":null},"id":2}"#);
    peer.answer(&got, json!([1, "two"])).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), json!([1, "two"]));

    let caller = qmp.clone();
    let call = start(async move { caller.run(qapi::qmp::query_status {}).await }).await;
    let got = peer.get().await;
    assert_eq!(got.text, r#"{"execute":"query-status","id":3}"#);
    peer.answer(&got, json!({"status": "running", "running": true, "singlestep": false, "novel": 1})).await;
    assert!(call.await.expect("no panic").expect("returned").running);
}

#[tokio::test]
async fn an_answer_of_another_type_is_an_error_that_shows_it() {
    let (qmp, _events, mut peer) = session().await;
    let call = start(async move { qmp.run(qapi::qmp::query_status {}).await }).await;
    let got = peer.get().await;
    peer.answer(&got, json!({"status": "asleep"})).await;
    let error = call.await.expect("no panic").expect_err("not understood");
    assert!(matches!(&error, QmpError::Decode { beginning, .. } if beginning.contains("asleep")), "{error}");
}

#[tokio::test]
async fn raw_json_is_untouched_in_both_directions() {
    let (qmp, _events, mut peer) = session().await;
    let sent = r#"{ "backing": null, "big": 18446744073709551616, "e": 1.0E+2, "z": 1, "a": "\u00e9" }"#;
    let raw: Box<RawValue> = serde_json::from_str(sent).expect("JSON");
    let call = start(async move { qmp.call_raw("x", Some(&raw)).await }).await;
    let got = peer.get().await;
    assert!(got.text.contains(sent), "{}", got.text);
    peer.say(&format!(r#"{{"return": {sent}, "id": {}}}"#, got.id())).await;
    assert_eq!(call.await.expect("no panic").expect("returned").get(), sent);
}

#[tokio::test]
async fn a_refusal_keeps_qemus_words_and_unknown_classes() {
    let (qmp, _events, mut peer) = session().await;
    let call = start(async move { qmp.call("x", Value::Null).await }).await;
    let got = peer.get().await;
    peer.say(&format!(
        r#"{{"id": {}, "error": {{"class": "Novel", "desc": "Device 'x' not found", "more": 1}}}}"#,
        got.id()
    ))
    .await;
    match call.await.expect("no panic") {
        Err(error @ QmpError::Refused(_)) => {
            assert_eq!(error.to_string(), "QEMU answered Novel: Device 'x' not found");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn many_in_flight_are_matched_by_id_in_any_order() {
    let (qmp, _events, mut peer) = session().await;
    let mut calls = Vec::new();
    for number in 0..20 {
        let qmp = qmp.clone();
        calls.push(start(async move { qmp.call("x", json!({ "n": number })).await }).await);
    }
    let mut got = Vec::new();
    for _ in 0..20 {
        got.push(peer.get().await);
    }
    let mut ids: Vec<_> = got.iter().map(|got| got.id().as_u64().expect("a number")).collect();
    ids.dedup();
    assert_eq!(ids.len(), 20);
    for got in got.iter().rev() {
        peer.answer(got, got.json["arguments"]["n"].clone()).await;
    }
    for (number, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.expect("no panic").expect("returned"), json!(number));
    }
}

#[tokio::test(start_paused = true)]
async fn a_timed_out_command_is_unknown_and_its_late_reply_harms_nobody() {
    let (qmp, _events, mut peer) = session().await;
    let hasty = qmp.with_deadline(Duration::from_secs(2));
    let error = hasty.call("blockdev-add", Value::Null).await.expect_err("no answer");
    assert!(matches!(&error, QmpError::TimedOut { command, after }
        if command == "blockdev-add" && *after == Duration::from_secs(2)));
    assert!(error.to_string().contains("unknown, not failed"), "{error}");

    let late = peer.get().await;
    let call = start(async move { qmp.call("query-x", Value::Null).await }).await;
    let got = peer.get().await;
    assert_ne!(got.id(), late.id());
    peer.answer(&late, json!("late")).await;
    peer.answer(&got, json!("mine")).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), "mine");
}

#[tokio::test]
async fn a_deadline_beyond_the_clock_is_none() {
    let (qmp, _events, mut peer) = session().await;
    let patient = qmp.with_deadline(Duration::MAX);
    let call = start(async move { patient.call("x", Value::Null).await }).await;
    let got = peer.get().await;
    peer.answer(&got, json!(1)).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), 1);
}

#[tokio::test]
async fn dropped_callers_harm_nobody() {
    let (qmp, _events, mut peer) = session().await;
    // More than the socket holds, so that some line is cut off in the middle when its caller goes.
    let padding = "x".repeat(100_000);
    for _ in 0..20 {
        let (qmp, padding) = (qmp.clone(), padding.clone());
        start(async move { qmp.call("dropped", json!({ "padding": padding })).await }).await.abort();
    }
    let call = start(async move { qmp.call("kept", Value::Null).await }).await;
    for _ in 0..20 {
        let got = peer.get().await;
        assert_eq!(got.json["arguments"]["padding"].as_str().map(str::len), Some(100_000));
        peer.answer(&got, json!({})).await;
    }
    let got = peer.get().await;
    assert_eq!(got.name(), "kept");
    peer.answer(&got, json!(7)).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), 7);
}

#[tokio::test]
async fn replies_to_nobody_leave_the_session_whole() {
    let (qmp, _events, mut peer) = session().await;
    let call = start(async move { qmp.call("x", Value::Null).await }).await;
    let got = peer.get().await;
    for stray in [
        r#"{"return": 1, "id": 999}"#,
        r#"{"return": 1, "id": "2"}"#,
        r#"{"return": 1}"#,
        r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
        r#"{"novel": true}"#,
    ] {
        peer.say(stray).await;
    }
    peer.answer(&got, json!(2)).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), 2);
}

#[tokio::test]
async fn a_reply_of_sixteen_mib_arrives() {
    let (qmp, _events, mut peer) = session().await;
    let call = start(async move { qmp.call("query-big", Value::Null).await }).await;
    let got = peer.get().await;
    let big = "y".repeat(qmp_client::wire::MAX_LINE - 100);
    peer.answer(&got, json!(big)).await;
    assert_eq!(call.await.expect("no panic").expect("returned").as_str().map(str::len), Some(big.len()));
}

#[tokio::test]
async fn a_command_that_is_too_long_is_not_sent() {
    let (qmp, _events, mut peer) = session().await;
    let error = qmp.call("x", json!("z".repeat(16 << 20))).await.expect_err("too long");
    assert!(matches!(error, QmpError::TooLong { bytes, .. } if bytes > 16 << 20), "{error}");
    assert!(peer.hears_nothing().await);
}

#[tokio::test(start_paused = true)]
async fn with_oob_fewer_than_eight_are_in_flight_in_band() {
    let (qmp, _events, mut peer) = session_with(Options { oob: true, ..Options::default() }).await;
    let mut calls = Vec::new();
    for _ in 0..9 {
        let qmp = qmp.clone();
        calls.push(start(async move { qmp.call("slow", Value::Null).await }).await);
    }
    let mut got = Vec::new();
    for _ in 0..7 {
        got.push(peer.get().await);
    }
    assert!(peer.hears_nothing().await);

    // Out of band there is no queue.
    let caller = qmp.clone();
    let rescue = start(async move { caller.call_oob("migrate-pause", Value::Null).await }).await;
    let oob = peer.get().await;
    assert!(oob.text.starts_with(r#"{"exec-oob":"migrate-pause","id":"#), "{}", oob.text);
    peer.answer(&oob, json!({})).await;
    rescue.await.expect("no panic").expect("returned");

    // A caller that gives up does not make room, a reply does.
    calls.remove(0).abort();
    assert!(peer.hears_nothing().await);
    let queued = qmp.with_deadline(Duration::from_secs(1)).call("queued", Value::Null).await;
    assert!(matches!(queued, Err(QmpError::NotSent { .. })), "{queued:?}");
    peer.answer(&got[0], json!({})).await;
    assert_eq!(peer.get().await.name(), "slow");
    assert!(peer.hears_nothing().await);
}

#[tokio::test]
async fn oob_needs_to_be_negotiated() {
    let (qmp, _events, mut peer) = session().await;
    let error = qmp.call_oob("migrate-pause", Value::Null).await.expect_err("not negotiated");
    assert!(matches!(error, QmpError::NoOob { .. }), "{error}");
    settle().await;
    assert!(peer.hears_nothing().await);
}
