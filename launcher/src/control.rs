//! The owner's control sockets. They speak QMP: a greeting, `qmp_capabilities`, QEMU's commands passed through as raw JSON, every event to
//! every client, and qvirt's own commands. An existing QMP client works against them unchanged.
//!
//! Each client is one task with its own id space; it takes one command at a time, as QMP does. Reading the status never waits for the
//! owner. A client that does not read is cut off after [`BACKLOG`] bytes. The second socket is read-only: queries and events.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use qmp_client::wire::{Line, LineReader, LineWriter, WireError};
use qmp_client::{Event, Qmp, QmpError};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::policy::{self, Verdict};
use crate::refuse::Asked;
use crate::request::{COMMANDS, Class, Failure, Request};
use crate::status::Status;

/// How much a client may leave unread, in bytes.
pub const BACKLOG: usize = 1 << 20;

/// Events that may be under way to a slow client; past that it is cut off.
pub const EVENTS: usize = 4096;

/// A request with the way back.
#[derive(Debug)]
pub struct Envelope {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes. Nobody may be there any more.
    pub reply: oneshot::Sender<Result<Value, Failure>>,
}

/// What clients have of the owner.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The connection to QEMU, for raw commands.
    pub qmp: Qmp,
    /// The status, at any time.
    pub status: watch::Receiver<Arc<Status>>,
    /// The owner's ear.
    pub requests: mpsc::Sender<Envelope>,
    /// Events, as lines.
    pub events: broadcast::Sender<Arc<[u8]>>,
}

/// A control socket that cannot be made.
#[derive(Debug, Error)]
#[error("control socket {}: {source}", path.display())]
pub struct ControlError {
    path: PathBuf,
    source: std::io::Error,
}

/// Binds a control socket with a file mode, replacing what a dead owner left.
pub fn bind(path: &Path, mode: u32) -> Result<UnixListener, ControlError> {
    let failed = |source| ControlError { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Serves clients until the owner ends; returns when each of them has got what was on its way to it.
pub async fn serve(listener: UnixListener, shared: Shared, read_only: bool) {
    let mut number = 0;
    let mut clients = JoinSet::new();
    let mut owner = shared.status.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut owner) => break,
            Some(_) = clients.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: it passes, and spinning would not help it.
                warn!(%error, "a control client could not be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        number += 1;
        let peer = stream.peer_cred().ok().map(|c| (c.pid(), c.uid()));
        debug!(client = number, ?peer, read_only, "control client");
        let client = Client {
            number,
            read_only,
            stream,
            negotiated: false,
            descriptors: BTreeMap::new(),
            shared: shared.clone(),
        };
        clients.spawn(client.run());
    }
    while clients.join_next().await.is_some() {}
}

/// Returns when the owner is gone.
async fn ended(status: &mut watch::Receiver<Arc<Status>>) {
    while status.changed().await.is_ok() {}
}

/// A command as it came.
#[derive(Debug, Deserialize)]
struct Incoming {
    execute: Option<String>,
    #[serde(rename = "exec-oob")]
    oob: Option<String>,
    arguments: Option<Box<RawValue>>,
    /// Any value, `null` too, comes back with the answer.
    #[serde(default, deserialize_with = "present")]
    id: Option<Box<RawValue>>,
}

fn present<'de, D: Deserializer<'de>>(source: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::deserialize(source).map(Some)
}

type Answer = Pin<Box<dyn Future<Output = Vec<u8>> + Send>>;

struct Client {
    number: u64,
    read_only: bool,
    stream: UnixStream,
    negotiated: bool,
    /// This client's `getfd` names and what QEMU knows them by: names are per monitor, and ours is shared.
    descriptors: BTreeMap<String, String>,
    shared: Shared,
}

impl Client {
    async fn run(mut self) {
        let mut reader = LineReader::of_objects();
        let mut writer = LineWriter::new();
        let mut events = self.shared.events.subscribe();
        let mut answer: Option<Answer> = None;
        let mut owner = self.shared.status.clone();
        // A reply of many MiB is the client's own wish, and no sign that it does not read.
        let mut large_reply = false;
        writer.push(greeting(&self.shared.qmp), Vec::new());
        let cause = loop {
            tokio::select! {
                biased;
                sent = writer.flush(&self.stream), if !writer.is_empty() => {
                    if sent.is_err() { break "it is gone"; }
                    large_reply = false;
                }
                text = async { answer.as_mut().expect("only polled while there is one").await }, if answer.is_some() => {
                    answer = None;
                    large_reply = text.len() > BACKLOG;
                    writer.push(text, Vec::new());
                }
                event = events.recv() => match event {
                    Ok(_) if writer.backlog() > BACKLOG && !large_reply => {
                        break "it does not read: more than 1 MiB is waiting";
                    }
                    Ok(line) if self.negotiated => writer.push(line.to_vec(), Vec::new()),
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => break "it does not read: too many events are waiting",
                    Err(broadcast::error::RecvError::Closed) => break "the owner ends",
                },
                () = ended(&mut owner) => break "the owner ends",
                line = reader.next(&self.stream), if answer.is_none() && writer.is_empty() => match line {
                    Ok(Some(line)) => answer = Some(self.command(line)),
                    // The kernel resets a connection whose client left without reading all.
                    Ok(None) | Err(WireError::Io(_)) => break "it is gone",
                    Err(error) => {
                        debug!(client = self.number, %error, "control client");
                        break "it sent what cannot be read";
                    }
                },
            }
        };
        // What is on its way is still delivered, if the client takes it now.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(100), writer.flush(&self.stream)).await;
        match cause {
            "it is gone" | "the owner ends" => debug!(client = self.number, "control client left: {cause}"),
            _ => warn!(client = self.number, "control client was cut off: {cause}"),
        }
        for name in self.descriptors.values() {
            let _ = self.shared.qmp.call("closefd", json!({"fdname": name})).await;
        }
    }

    /// Begins to answer a command.
    fn command(&mut self, line: Line) -> Answer {
        let incoming: Incoming = match serde_json::from_slice(&line.text) {
            Ok(incoming) => incoming,
            Err(error) => {
                return ready(failure(
                    None,
                    &Failure::new(Class::Generic, format!("JSON parse error: {error}")),
                ));
            }
        };
        let id = incoming.id;
        let refuse = |class, desc: &str| ready(failure(id.as_deref(), &Failure::new(class, desc)));
        let Some(name) = incoming.execute else {
            let desc = if incoming.oob.is_some() {
                "out-of-band execution is not offered here"
            } else {
                "QMP input lacks member 'execute'"
            };
            return refuse(Class::Generic, desc);
        };
        if name == "qmp_capabilities" {
            if self.negotiated {
                return refuse(
                    Class::CommandNotFound,
                    "Capabilities negotiation is already complete, command ignored",
                );
            }
            // The greeting offers none, so whoever enables one would wait for what does not come.
            let wished: Value =
                incoming.arguments.and_then(|a| serde_json::from_str(a.get()).ok()).unwrap_or_default();
            if let Some(wish) = wished["enable"].as_array().and_then(|wishes| wishes.first()) {
                return refuse(
                    Class::Generic,
                    &format!("capability {wish} is not offered here: leave it out of `enable`"),
                );
            }
            self.negotiated = true;
            return ready(success(id.as_deref(), "{}"));
        }
        if !self.negotiated {
            return refuse(
                Class::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            );
        }
        if self.read_only && !policy::is_query(&name) && name != "qvirt-status" {
            return refuse(Class::Refused, "this is the read-only socket: queries and events only");
        }
        if name == "qvirt-status" {
            let status = serde_json::to_string(&**self.shared.status.borrow()).unwrap_or_default();
            return ready(success(id.as_deref(), &status));
        }
        self.dispatch(name, incoming.arguments, id, line.fds)
    }

    fn dispatch(
        &mut self,
        name: String,
        arguments: Option<Box<RawValue>>,
        id: Option<Box<RawValue>>,
        fds: Vec<OwnedFd>,
    ) -> Answer {
        let parsed = || {
            arguments
                .as_ref()
                .and_then(|a| serde_json::from_str::<Value>(a.get()).ok())
                .unwrap_or(Value::Null)
        };
        let shared = self.shared.clone();
        if name.starts_with("qvirt-")
            && let Some(request) = Request::parse(&name, parsed())
        {
            let refusal = request.as_ref().ok().and_then(|r| shared.status.borrow().refuse(Asked::Ours(r)));
            return own(shared.requests, refusal.map_or(request, Err), id);
        }
        let verdict = policy::judge(
            &name,
            &if policy::is_query(&name) { Value::Null } else { parsed() },
            &shared.status.borrow(),
        );
        let verdict = match verdict {
            Ok(verdict) => verdict,
            Err(reason) => return ready(failure(id.as_deref(), &reason)),
        };
        if name == "system_reset" {
            return own(shared.requests, Ok(Request::Reset), id);
        }
        let arguments = match self.with_own_descriptors(&name, &parsed) {
            Some(changed) => serde_json::value::to_raw_value(&changed).ok(),
            None => arguments,
        };
        let standstill = match name.as_str() {
            "stop" => Some(true),
            "cont" => Some(false),
            _ => None,
        };
        Box::pin(async move {
            if let Some(wanted) = standstill {
                let _ = ask(&shared.requests, Ok(Request::Standstill(wanted))).await;
            }
            let reply = pass(&shared.qmp, &name, arguments.as_deref(), fds).await;
            if verdict == Verdict::Change {
                let (sender, _) = oneshot::channel();
                let _ = shared.requests.send(Envelope { request: Request::Reconcile, reply: sender }).await;
            }
            match reply {
                Ok(value) if name == "query-commands" => {
                    success(id.as_deref(), &with_own_commands(value.get()))
                }
                Ok(value) => success(id.as_deref(), value.get()),
                Err(QmpError::Refused(error)) => error_line(id.as_deref(), &error.class, &error.desc),
                Err(error @ (QmpError::TimedOut { .. } | QmpError::NotSent { .. })) => {
                    failure(id.as_deref(), &Failure::of(Class::Pending, &error))
                }
                Err(error) => failure(id.as_deref(), &Failure::of(Class::Generic, &error)),
            }
        })
    }

    /// The arguments with this client's descriptor names replaced by those that QEMU knows; `None` if there is nothing to replace.
    fn with_own_descriptors(&mut self, name: &str, arguments: &dyn Fn() -> Value) -> Option<Value> {
        let number = self.number;
        match name {
            "getfd" | "closefd" => {
                let mut changed = arguments();
                let own = changed["fdname"].as_str()?.to_owned();
                let known = format!("client{number}-{own}");
                changed["fdname"] = known.clone().into();
                if name == "getfd" {
                    self.descriptors.insert(own, known)
                } else {
                    self.descriptors.remove(&own)
                };
                Some(changed)
            }
            "netdev_add" if !self.descriptors.is_empty() => {
                let mut changed = arguments();
                for key in ["fd", "fds", "vhostfd", "vhostfds"] {
                    let Some(list) = changed[key].as_str() else { continue };
                    // A netdev takes the descriptor, and with it the name.
                    let names: Vec<String> = list
                        .split(':')
                        .map(|own| self.descriptors.remove(own).unwrap_or_else(|| own.to_owned()))
                        .collect();
                    changed[key] = names.join(":").into();
                }
                Some(changed)
            }
            _ => None,
        }
    }
}

/// Answers a command by asking the owner.
fn own(
    requests: mpsc::Sender<Envelope>,
    request: Result<Request, Failure>,
    id: Option<Box<RawValue>>,
) -> Answer {
    Box::pin(async move {
        match ask(&requests, request).await {
            Ok(value) => success(id.as_deref(), &value.to_string()),
            Err(reason) => failure(id.as_deref(), &reason),
        }
    })
}

/// Asks the owner; that it ended meanwhile is an answer too.
async fn ask(requests: &mpsc::Sender<Envelope>, request: Result<Request, Failure>) -> Result<Value, Failure> {
    let (reply, answer) = oneshot::channel();
    let ended = || {
        Failure::new(
            Class::Generic,
            "the owner of this VM ended before it answered: ask again when `qvirt run` has adopted it",
        )
    };
    requests.send(Envelope { request: request?, reply }).await.map_err(|_| ended())?;
    answer.await.unwrap_or_else(|_| Err(ended()))
}

async fn pass(
    qmp: &Qmp,
    name: &str,
    arguments: Option<&RawValue>,
    fds: Vec<OwnedFd>,
) -> Result<Box<RawValue>, QmpError> {
    if fds.is_empty() {
        qmp.call_raw(name, arguments).await
    } else {
        qmp.call_raw_with_fds(name, arguments, fds).await
    }
}

/// An event as a line.
pub fn event_line(event: &Event) -> Arc<[u8]> {
    serde_json::to_vec(event).unwrap_or_default().into()
}

fn greeting(qmp: &Qmp) -> Vec<u8> {
    // In QEMU's words, but for out-of-band execution, which has the rescue socket.
    let mut greeting = qmp.greeting().raw.clone();
    greeting["QMP"]["capabilities"] = json!([]);
    greeting.to_string().into_bytes()
}

fn with_own_commands(reply: &str) -> String {
    let mut commands: Vec<Value> = serde_json::from_str(reply).unwrap_or_default();
    commands.extend(COMMANDS.iter().map(|name| json!({"name": name})));
    Value::from(commands).to_string()
}

fn ready(line: Vec<u8>) -> Answer {
    Box::pin(std::future::ready(line))
}

fn success(id: Option<&RawValue>, value: &str) -> Vec<u8> {
    let id = id.map(|id| format!(", \"id\": {}", id.get())).unwrap_or_default();
    format!("{{\"return\": {value}{id}}}").into_bytes()
}

fn failure(id: Option<&RawValue>, reason: &Failure) -> Vec<u8> {
    error_line(id, reason.class.name(), &reason.desc)
}

fn error_line(id: Option<&RawValue>, class: &str, desc: &str) -> Vec<u8> {
    let id = id.map(|id| format!(", \"id\": {}", id.get())).unwrap_or_default();
    format!("{{\"error\": {}{id}}}", json!({"class": class, "desc": desc})).into_bytes()
}
