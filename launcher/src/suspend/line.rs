//! The line to a disk's proxy: brings its states, takes commands, and starts another proxy when the process has died.
//!
//! ```text
//!   connect ──▶ states, commands and answers ──▶ lost: told so ──▶ started again (or waited for) ──▶ connect ...
//! ```
//!
//! A line ends when nobody has commands for it any more, and never between the start of a proxy and its readiness: whoever waits for its end may then
//! end the proxy.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use devices::DeviceId;
use devices::host::{HostNeed, IoProxy};
use qmp_client::wire::{LineReader, LineWriter};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::host::need::Host;

/// How long a proxy may take to obey.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait before a proxy that could not be started is started again.
const AGAIN: Duration = Duration::from_secs(1);

/// Something of each kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub struct PerKind<T> {
    pub read: T,
    pub write: T,
    pub flush: T,
}

/// What a proxy says of itself; [`crate::proxy`] has the meaning of each word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub struct State {
    pub held: PerKind<usize>,
    pub since_unix_ms: Option<u64>,
    pub attempts: Option<u64>,
    pub operation: Option<String>,
    pub errno: Option<i32>,
    pub error: Option<String>,
    pub timed_out: bool,
    pub parked: bool,
    pub outages: u64,
    pub timeouts: u64,
    pub fault: PerKind<bool>,
    #[serde(default)]
    pub layer: Option<usize>,
    #[serde(default)]
    pub oldest_outstanding_ms: Option<u64>,
    #[serde(default)]
    pub heir: bool,
}

impl State {
    /// How many requests wait.
    pub fn held(&self) -> usize {
        self.held.read + self.held.write + self.held.flush
    }

    /// How long the oldest call at the storage has taken.
    pub fn waits(&self) -> Duration {
        self.oldest_outstanding_ms.map_or(Duration::ZERO, Duration::from_millis)
    }

    /// Whether a drill is under way.
    pub fn is_faulty(&self) -> bool {
        self.fault.read || self.fault.write || self.fault.flush
    }

    /// Whether requests wait, or may come back failed at any moment.
    pub fn is_failing(&self) -> bool {
        self.held() > 0 || (self.attempts.is_some() && !self.timed_out)
    }
}

/// What comes of a line.
#[derive(Clone, Debug)]
pub enum News {
    /// The proxy's state, as it is since the last command.
    State(State),
    /// The proxy has died.
    Lost,
}

#[derive(Debug)]
struct Command {
    text: Value,
    done: Option<oneshot::Sender<()>>,
}

/// For whoever has commands for a proxy.
#[derive(Clone, Debug)]
pub struct Teller(mpsc::UnboundedSender<Command>);

impl Teller {
    /// Sends a command. A proxy that is dead does not get it.
    pub fn tell(&self, text: Value) {
        let _ = self.0.send(Command { text, done: None });
    }

    /// The same, and waits a moment for the proxy to have obeyed.
    pub async fn ask(&self, text: Value) {
        let (done, is_done) = oneshot::channel();
        let _ = self.0.send(Command { text, done: Some(done) });
        let _ = tokio::time::timeout(PATIENCE, is_done).await;
    }
}

/// A line that is kept up.
#[derive(Debug)]
pub struct Line {
    teller: Teller,
    task: JoinHandle<()>,
}

impl Line {
    /// Keeps up the line to a disk's proxy. `host` starts another one if it has died.
    pub fn open(
        id: DeviceId,
        plan: IoProxy,
        host: Arc<Host>,
        news: mpsc::UnboundedSender<(DeviceId, News)>,
    ) -> Line {
        let (sender, commands) = mpsc::unbounded_channel();
        let control = PathBuf::from(&plan.control);
        let need = HostNeed::IoProxy(plan);
        let task = tokio::spawn(Keeper { id, control, need, host, news, commands }.keep());
        Line { teller: Teller(sender), task }
    }

    /// For whoever has commands.
    pub fn teller(&self) -> Teller {
        self.teller.clone()
    }

    /// Ends the line, when a proxy that is just being started is ready or has failed.
    pub async fn end(self) {
        let _ = self.hang_up().await;
    }

    /// The same, to be awaited later. No other proxy is started from now on.
    pub fn hang_up(self) -> JoinHandle<()> {
        drop(self.teller);
        self.task
    }
}

struct Keeper {
    id: DeviceId,
    control: PathBuf,
    need: HostNeed,
    host: Arc<Host>,
    news: mpsc::UnboundedSender<(DeviceId, News)>,
    commands: mpsc::UnboundedReceiver<Command>,
}

impl Keeper {
    async fn keep(mut self) {
        while !self.commands.is_closed() {
            if let Ok(stream) = UnixStream::connect(&self.control).await {
                // What was meant for a former proxy.
                while self.commands.try_recv().is_ok() {}
                if self.talk(&stream).await.is_some() || self.commands.is_closed() {
                    return;
                }
                warn!(device = %self.id, "its io-proxy has died: starting another one");
                self.tell(News::Lost);
            }
            self.start().await;
        }
    }

    fn tell(&self, news: News) {
        // An owner that is gone needs no news.
        let _ = self.news.send((self.id.clone(), news));
    }

    /// Starts a proxy, or waits for the one that is starting.
    async fn start(&mut self) {
        let (host, id, need) = (Arc::clone(&self.host), self.id.clone(), self.need.clone());
        let error = match tokio::task::spawn_blocking(move || host.meet(&id, &need)).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => crate::request::chain(&error),
            Err(error) => error.to_string(),
        };
        warn!(device = %self.id, error, "its io-proxy could not be started: trying again");
        let nobody = async { while self.commands.recv().await.is_some() {} };
        let _ = tokio::time::timeout(AGAIN, nobody).await;
    }

    /// Talks until the proxy is lost; gives something if nobody has commands any more.
    async fn talk(&mut self, stream: &UnixStream) -> Option<()> {
        let (mut reader, mut writer) = (LineReader::of_objects(), LineWriter::new());
        let mut asked: VecDeque<Option<oneshot::Sender<()>>> = VecDeque::new();
        loop {
            let idle = writer.is_empty();
            tokio::select! {
                sent = writer.flush(stream), if !idle => sent.ok()?,
                line = reader.next(stream) => {
                    let line = line.ok()??;
                    let said: Value = serde_json::from_slice(&line.text).unwrap_or_default();
                    let is_event = said.get("event").is_some();
                    if !is_event && let Some(done) = asked.pop_front().flatten() {
                        // Whoever asked may have stopped waiting.
                        let _ = done.send(());
                    }
                    if !is_event && let Some(error) = said["error"].as_str() {
                        warn!(device = %self.id, error, "its io-proxy does not obey");
                    }
                    // A state from before a command says what was.
                    let state = if is_event { &said } else { &said["return"] };
                    if asked.is_empty() && let Ok(state) = State::deserialize(state) {
                        self.tell(News::State(state));
                    }
                }
                command = self.commands.recv() => {
                    let Some(Command { text, done }) = command else { return Some(()) };
                    // It need not change anything, and then no state would come by itself.
                    for (text, done) in [(text, done), (json!({"command": "state"}), None)] {
                        writer.push(text.to_string().into_bytes(), Vec::new());
                        asked.push_back(done);
                    }
                }
            }
        }
    }
}
