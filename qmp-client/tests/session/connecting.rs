//! Greeting and negotiation.

use std::time::Duration;

use qmp_client::{CloseReason, ConnectError, Options, Qmp};
use serde_json::json;
use tokio::time::Instant;

use crate::peer::{GREETING, Peer, pair, session, session_with};

async fn refusal(ours: tokio::net::UnixStream) -> ConnectError {
    Qmp::connect(ours, Options::default()).await.expect_err("no session")
}

#[tokio::test]
async fn the_greeting_is_kept_whole() {
    let (qmp, _events, _peer) = session().await;
    let greeting = qmp.greeting();
    assert_eq!(greeting.version.to_string(), "10.0.2");
    assert_eq!(greeting.package, "Debian 1:10.0.2");
    assert_eq!(greeting.capabilities, ["oob"]);
    assert_eq!(greeting.raw, serde_json::from_str::<serde_json::Value>(GREETING).expect("JSON"));
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up_and_named() {
    let (ours, _peer) = pair();
    let start = Instant::now();
    let error = refusal(ours).await;
    assert_eq!(start.elapsed().as_secs(), 10);
    let us = std::process::id().cast_signed();
    assert!(matches!(error, ConnectError::NoGreeting { peer: Some(pid), .. } if pid == us), "{error}");
    let text = error.to_string();
    assert!(text.contains("another client may hold") && text.contains("this process's listener"), "{text}");
    let error = ConnectError::NoGreeting { after: Duration::from_secs(10), peer: Some(1) };
    assert!(error.to_string().contains("from process 1:"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_deadline_covers_the_negotiation_too() {
    let (ours, mut peer) = pair();
    let options = Options { greeting_deadline: Duration::from_secs(3), ..Options::default() };
    let connected = tokio::spawn(Qmp::connect(ours, options));
    tokio::time::sleep(Duration::from_secs(2)).await;
    peer.say(GREETING).await;
    let start = Instant::now();
    let error = connected.await.expect("no panic").expect_err("no session");
    assert!(matches!(error, ConnectError::NotNegotiated { .. }), "{error}");
    assert_eq!(start.elapsed().as_secs(), 1);
}

#[tokio::test]
async fn events_amid_the_negotiation_are_kept() {
    let (ours, mut peer) = pair();
    let connected = tokio::spawn(Qmp::connect(ours, Options::default()));
    peer.say(r#"{"event":"EARLY"}"#).await;
    peer.say(GREETING).await;
    let got = peer.get().await;
    peer.say(r#"{"timestamp":{"seconds":5,"microseconds":6},"event":"STOP"}"#).await;
    peer.say(r#"{"return":{},"id":999}"#).await;
    peer.answer(&got, json!({})).await;
    let (_qmp, mut events) = connected.await.expect("no panic").expect("negotiated");
    assert_eq!(events.try_next().expect("queued").name, "EARLY");
    let stop = events.try_next().expect("queued");
    assert_eq!((stop.name.as_str(), stop.timestamp.seconds), ("STOP", 5));
    assert!(events.try_next().is_none());
}

#[tokio::test]
async fn oob_is_enabled_only_where_wanted_and_offered() {
    for (wanted, offered, enabled) in [(false, true, false), (true, false, false), (true, true, true)] {
        let (ours, mut peer) = pair();
        let connected = tokio::spawn(Qmp::connect(ours, Options { oob: wanted, ..Options::default() }));
        peer.say(&if offered { GREETING.to_owned() } else { GREETING.replace(r#""oob""#, "") }).await;
        let got = peer.get().await;
        let expected = if enabled {
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}"#
        } else {
            r#"{"execute":"qmp_capabilities","id":1}"#
        };
        assert_eq!(got.text, expected);
        peer.answer(&got, json!({})).await;
        connected.await.expect("no panic").expect("negotiated");
    }
}

#[tokio::test]
async fn whoever_is_no_qmp_is_shown() {
    for first in ["SSH-2.0-OpenSSH_9.2", r#"{"hello": 1}"#, r#"{"QMP": {"version": 1}}"#] {
        let (ours, mut peer) = pair();
        peer.say(first).await;
        let error = refusal(ours).await;
        assert!(matches!(&error, ConnectError::NotQmp { beginning, .. } if beginning == first), "{error}");
    }
}

#[tokio::test]
async fn a_refused_or_broken_negotiation_says_why() {
    async fn answered(with: &str) -> ConnectError {
        let (ours, mut peer) = pair();
        peer.say(GREETING).await;
        peer.say(with).await;
        refusal(ours).await
    }
    for id in [r#","id":1"#, ""] {
        let error = answered(&format!(r#"{{"error":{{"class":"GenericError","desc":"no"}}{id}}}"#)).await;
        assert!(matches!(&error, ConnectError::Refused(qemu) if qemu.desc == "no"), "{error}");
    }
    let error = answered("nonsense").await;
    assert!(matches!(error, ConnectError::Closed(CloseReason::Garbage { .. })), "{error}");
}

#[tokio::test]
async fn a_peer_that_leaves_is_an_error() {
    let (ours, Peer { stream, .. }) = pair();
    drop(stream);
    let error = refusal(ours).await;
    assert!(matches!(error, ConnectError::Closed(CloseReason::Eof)), "{error}");
}

#[tokio::test]
async fn the_stream_closes_with_the_last_handle() {
    let (qmp, events, peer) = session_with(Options::default()).await;
    let clone = qmp.clone();
    drop((qmp, clone));
    crate::peer::settle().await;
    assert!(!events_ended(&peer).await, "events are still wanted");
    drop(events);
    assert!(events_ended(&peer).await);
}

/// Whether the session's end of the stream is closed.
async fn events_ended(peer: &Peer) -> bool {
    crate::peer::settle().await;
    matches!(peer.stream.try_read(&mut [0]), Ok(0))
}
