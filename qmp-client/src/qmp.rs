//! The caller's side of a session: connecting, commands, patience.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use qapi::qmp::QmpCommand;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{CloseReason, ConnectError, QmpError};
use crate::event::Events;
use crate::greeting::{Greeting, greet, negotiate};
use crate::message::{Band, command_line};
use crate::session::{Answer, InFlight, Request, Session};
use crate::wire::{LineReader, LineWriter, MAX_FDS, MAX_LINE, beginning};

/// The id of `qmp_capabilities`; those of all other commands are above.
const FIRST_ID: u64 = 1;

/// With out-of-band execution negotiated and 8 in-band commands waiting, QEMU stops reading its monitor, the
/// out-of-band ones included.
const MAX_IN_BAND: usize = 7;

/// How a session is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// The time for greeting and negotiation together.
    pub greeting_deadline: Duration,
    /// The time for each command, from the call to the reply; [`Qmp::with_deadline`] gives another.
    pub command_deadline: Duration,
    /// Negotiate out-of-band execution where the peer offers it. At most 7 in-band commands are then in
    /// flight, others wait for their turn.
    pub oob: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            greeting_deadline: Duration::from_secs(10),
            command_deadline: Duration::from_secs(60),
            oob: false,
        }
    }
}

/// A negotiated QMP session. Cheap to clone; all clones are the same session.
///
/// Every command is cancel-safe: a dropped future leaves the session whole. The command itself may have been
/// sent, and QEMU does not take it back.
#[derive(Debug, Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
    deadline: Duration,
}

#[derive(Debug)]
struct Shared {
    greeting: Greeting,
    requests: mpsc::UnboundedSender<Request>,
    closed: watch::Receiver<Option<Arc<CloseReason>>>,
    last_id: AtomicU64,
    /// QEMU keeps only the last descriptors that came until it dispatches a command, so a second command with
    /// descriptors could take the place of the first one's.
    fds_turn: Arc<Semaphore>,
    /// There when out-of-band execution was negotiated.
    in_band_turn: Option<Arc<Semaphore>>,
}

impl Qmp {
    /// Waits for the greeting on `stream` and negotiates. Must be called within a tokio runtime, where it
    /// leaves one task behind, which ends with the stream, or when the last `Qmp` and the `Events` are
    /// dropped and the runtime has run it once more.
    ///
    /// # Errors
    /// [`ConnectError`]; the stream is closed then, as when the future is dropped.
    pub async fn connect(stream: UnixStream, options: Options) -> Result<(Qmp, Events), ConnectError> {
        let after = options.greeting_deadline;
        let deadline = Instant::now().checked_add(after).unwrap_or_else(far_future);
        let peer = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
        let mut reader = LineReader::new();
        let (events, event_queue) = mpsc::unbounded_channel();

        let greeting = timeout_at(deadline, greet(&stream, &mut reader, &events))
            .await
            .map_err(|_| ConnectError::NoGreeting { after, peer })??;
        let oob = options.oob && greeting.capabilities.iter().any(|capability| capability == "oob");
        timeout_at(deadline, negotiate(&stream, &mut reader, &events, (FIRST_ID, oob)))
            .await
            .map_err(|_| ConnectError::NotNegotiated { after, peer })??;

        let (requests, request_queue) = mpsc::unbounded_channel();
        let (closed_sender, closed) = watch::channel(None);
        let session = Session {
            stream,
            reader,
            writer: LineWriter::new(),
            requests: request_queue,
            in_flight: HashMap::new(),
            events,
            closed: closed_sender,
        };
        tokio::spawn(session.run());
        let shared = Shared {
            greeting,
            requests,
            closed,
            last_id: AtomicU64::new(FIRST_ID),
            fds_turn: Arc::new(Semaphore::new(1)),
            in_band_turn: oob.then(|| Arc::new(Semaphore::new(MAX_IN_BAND))),
        };
        let qmp = Qmp { shared: Arc::new(shared), deadline: options.command_deadline };
        Ok((qmp, Events { queue: event_queue }))
    }

    /// What the peer said when we connected.
    pub fn greeting(&self) -> &Greeting {
        &self.shared.greeting
    }

    /// The same session with another patience per command: `device_add` of a vfio device takes seconds per 10
    /// GiB of guest memory, `quit` waits for a flush.
    pub fn with_deadline(&self, deadline: Duration) -> Qmp {
        Qmp { shared: Arc::clone(&self.shared), deadline }
    }

    /// Runs a command of [`qapi::qmp`]. For values that a user gave as JSON, use [`call`](Qmp::call).
    ///
    /// # Errors
    /// [`QmpError`]; [`QmpError::Decode`] when this QEMU's answer does not fit the type.
    pub async fn run<C: QmpCommand>(&self, command: C) -> Result<C::Ok, QmpError> {
        let arguments = encode(C::NAME, &command)?;
        drop(command);
        decode(C::NAME, &self.request(Band::In, C::NAME, Some(&arguments), Vec::new()).await?)
    }

    /// Runs any command. With `Value::Null` or an empty object no `arguments` are sent.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn call(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.call_with_fds(name, arguments, Vec::new()).await
    }

    /// As [`call`](Qmp::call), with JSON that is not touched in either direction: numbers, `null` members and
    /// order stay as they are.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn call_raw(
        &self,
        name: &str,
        arguments: Option<&RawValue>,
    ) -> Result<Box<RawValue>, QmpError> {
        self.request(Band::In, name, arguments, Vec::new()).await
    }

    /// As [`call`](Qmp::call), with descriptors (`getfd`, `add-fd`), which go in the same `sendmsg` and are
    /// then closed on this side. One such command is in flight at a time, else QEMU may mix up their
    /// descriptors; it waits for the one before, even if that one's caller gave up.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn call_with_fds(
        &self,
        name: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let arguments = encode(name, &arguments)?;
        decode(name, &self.request(Band::In, name, Some(&arguments), fds).await?)
    }

    /// [`call_raw`](Qmp::call_raw) and [`call_with_fds`](Qmp::call_with_fds) together.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn call_raw_with_fds(
        &self,
        name: &str,
        arguments: Option<&RawValue>,
        fds: Vec<OwnedFd>,
    ) -> Result<Box<RawValue>, QmpError> {
        self.request(Band::In, name, arguments, fds).await
    }

    /// Runs a command out of band: QEMU does it while in-band ones are at work. Few commands allow it.
    ///
    /// # Errors [`QmpError::NoOob`] when it was not negotiated (see [`Options::oob`]), else as for
    /// [`call`](Qmp::call).
    pub async fn call_oob(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        if self.shared.in_band_turn.is_none() {
            return Err(QmpError::NoOob { command: name.into() });
        }
        let arguments = encode(name, &arguments)?;
        decode(name, &self.request(Band::Out, name, Some(&arguments), Vec::new()).await?)
    }

    /// Waits for the end of the session and says its first cause.
    pub async fn closed(&self) -> Arc<CloseReason> {
        // An error means that the task is gone without a cause; `close_reason` knows what that is.
        let _ = self.shared.closed.clone().wait_for(Option::is_some).await;
        self.close_reason()
    }

    /// True once the session is over.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.borrow().is_some() || self.shared.requests.is_closed()
    }

    async fn request(
        &self,
        band: Band,
        name: &str,
        arguments: Option<&RawValue>,
        fds: Vec<OwnedFd>,
    ) -> Result<Box<RawValue>, QmpError> {
        let id = self.shared.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let line = command_line(band, name, arguments, id);
        if line.len() > MAX_LINE {
            return Err(QmpError::TooLong { command: name.into(), bytes: line.len() });
        }
        if fds.len() > MAX_FDS {
            return Err(QmpError::TooManyFds { command: name.into(), count: fds.len() });
        }
        let mut sent = false;
        let answer = timeout(self.deadline, async {
            let turn = self.turn(band, !fds.is_empty()).await;
            let (answer, answered) = oneshot::channel::<Answer>();
            let request = Request { id, line, fds, in_flight: InFlight { answer, _turn: turn } };
            self.shared.requests.send(request).ok()?;
            sent = true;
            answered.await.ok()
        });
        match answer.await {
            Ok(Some(answer)) => Ok(answer?),
            Ok(None) => Err(QmpError::Closed(self.close_reason())),
            Err(_) if sent => Err(QmpError::TimedOut { command: name.into(), after: self.deadline }),
            Err(_) => Err(QmpError::NotSent { command: name.into(), after: self.deadline }),
        }
    }

    /// Waits until one more such command may be in flight. The order (descriptors, then band) is the same for
    /// all, so nobody waits in a circle.
    async fn turn(&self, band: Band, fds: bool) -> [Option<OwnedSemaphorePermit>; 2] {
        let fds_turn = Some(&self.shared.fds_turn).filter(|_| fds);
        let band_turn = self.shared.in_band_turn.as_ref().filter(|_| band == Band::In);
        [acquire(fds_turn).await, acquire(band_turn).await]
    }

    fn close_reason(&self) -> Arc<CloseReason> {
        self.shared.closed.borrow().clone().unwrap_or_else(|| Arc::new(CloseReason::Abandoned))
    }
}

async fn acquire(turn: Option<&Arc<Semaphore>>) -> Option<OwnedSemaphorePermit> {
    // The semaphores are never closed: at the end of the session the permits come back and sending fails.
    Arc::clone(turn?).acquire_owned().await.ok()
}

fn encode<T: Serialize>(command: &str, arguments: &T) -> Result<Box<RawValue>, QmpError> {
    to_raw_value(arguments).map_err(|source| QmpError::Encode { command: command.into(), source })
}

fn decode<T: DeserializeOwned>(command: &str, returned: &RawValue) -> Result<T, QmpError> {
    serde_json::from_str(returned.get()).map_err(|source| QmpError::Decode {
        command: command.into(),
        beginning: beginning(returned.get().as_bytes()),
        source,
    })
}

/// For deadlines beyond what the clock can say.
fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(86_400 * 365)
}
