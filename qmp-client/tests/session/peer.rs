//! The fake peer: says exactly what a test wants, in the order it wants.

use std::future::Future;
use std::os::fd::OwnedFd;

use qmp_client::wire::{LineReader, write_line};
use qmp_client::{Events, Options, Qmp};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

pub const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2"}, "capabilities": ["oob"]}}"#;

pub struct Peer {
    pub stream: UnixStream,
    reader: LineReader,
}

/// A command as the peer got it.
pub struct Got {
    pub text: String,
    pub json: Value,
    pub fds: Vec<OwnedFd>,
}

impl Got {
    pub fn id(&self) -> &Value {
        &self.json["id"]
    }

    pub fn name(&self) -> &str {
        self.json["execute"].as_str().expect("a command in band")
    }
}

/// Both ends of a stream, nothing said yet.
pub fn pair() -> (UnixStream, Peer) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    (ours, Peer { stream: theirs, reader: LineReader::new() })
}

/// A negotiated session.
pub async fn session() -> (Qmp, Events, Peer) {
    session_with(Options::default()).await
}

pub async fn session_with(options: Options) -> (Qmp, Events, Peer) {
    let (ours, mut peer) = pair();
    let connected = tokio::spawn(Qmp::connect(ours, options));
    peer.say(GREETING).await;
    let got = peer.get().await;
    assert_eq!(got.name(), "qmp_capabilities");
    peer.answer(&got, json!({})).await;
    let (qmp, events) = connected.await.expect("no panic").expect("negotiated");
    (qmp, events, peer)
}

impl Peer {
    pub async fn say(&mut self, line: &str) {
        write_line(&self.stream, line.as_bytes(), &[]).await.expect("the session reads");
    }

    pub async fn answer(&mut self, to: &Got, returned: Value) {
        self.say(&json!({"return": returned, "id": to.id()}).to_string()).await;
    }

    pub async fn get(&mut self) -> Got {
        let line = self.reader.next(&self.stream).await.expect("readable").expect("a command");
        let text = String::from_utf8(line.text).expect("UTF-8");
        let json = serde_json::from_str(&text).expect("JSON");
        Got { text, json, fds: line.fds }
    }

    /// True if no command is here, and none comes while everything else has had its turn.
    pub async fn hears_nothing(&mut self) -> bool {
        settle().await;
        tokio::select! {
            biased;
            _ = self.reader.next(&self.stream) => false,
            () = settle() => true,
        }
    }
}

/// Lets every other task run until it waits.
pub async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Starts a call in a task of its own and lets it get as far as it can.
pub async fn start<T: Send + 'static>(call: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let task = tokio::spawn(call);
    settle().await;
    task
}
