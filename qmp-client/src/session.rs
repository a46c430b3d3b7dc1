//! The task that owns a negotiated session: the socket, the lines on their way, the commands in flight.
//!
//! It begins every line at once or behind others, finishes every line it began, hands each reply to its
//! caller and each event to the queue. Deadlines are the callers': a command whose caller is gone stays in
//! flight here until its reply comes, so its id is known and its turn is not given to another.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::value::RawValue;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use crate::error::{CloseReason, QemuError};
use crate::event::Event;
use crate::message::Message;
use crate::wire::{Line, LineReader, LineWriter, beginning};

pub(crate) type Answer = Result<Box<RawValue>, QemuError>;

/// A command that is ready to be sent.
#[derive(Debug)]
pub(crate) struct Request {
    /// Never used before.
    pub(crate) id: u64,
    pub(crate) line: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) in_flight: InFlight,
}

/// What is kept of a command until its reply.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) answer: oneshot::Sender<Answer>,
    /// Its right to be in flight, given back by dropping.
    pub(crate) _turn: [Option<OwnedSemaphorePermit>; 2],
}

pub(crate) struct Session {
    pub(crate) stream: UnixStream,
    pub(crate) reader: LineReader,
    pub(crate) writer: LineWriter,
    pub(crate) requests: mpsc::UnboundedReceiver<Request>,
    pub(crate) in_flight: HashMap<u64, InFlight>,
    pub(crate) events: mpsc::UnboundedSender<Event>,
    pub(crate) closed: watch::Sender<Option<Arc<CloseReason>>>,
}

impl Session {
    /// Serves until the stream ends or nobody is left to serve.
    pub(crate) async fn run(mut self) {
        if let Some(reason) = self.serve().await {
            tracing::debug!(reason = &reason as &dyn std::error::Error, "QMP session closed");
            // Before the callers in flight learn, by their dropped channels, that there is a cause to look
            // for.
            self.closed.send_replace(Some(Arc::new(reason)));
        }
    }

    async fn serve(&mut self) -> Option<CloseReason> {
        let mut callers = true;
        loop {
            // Sending comes first, so that a flood of events cannot keep commands from QEMU; there is never
            // more to send than callers wait for.
            tokio::select! {
                biased;
                sent = self.writer.flush(&self.stream), if !self.writer.is_empty() => {
                    if let Err(error) = sent {
                        return Some(self.last_words(error));
                    }
                }
                request = self.requests.recv(), if callers => match request {
                    Some(request) => self.begin(request),
                    None => callers = false,
                },
                line = self.reader.next(&self.stream) => match line {
                    Ok(Some(line)) => {
                        if let Err(reason) = self.dispatch(&line) {
                            return Some(reason);
                        }
                    }
                    Ok(None) => return Some(CloseReason::Eof),
                    Err(error) => return Some(CloseReason::Read(error)),
                },
                () = self.events.closed(), if !callers && self.writer.is_empty() => return None,
            }
        }
    }

    fn begin(&mut self, Request { id, line, fds, in_flight }: Request) {
        tracing::trace!(line = beginning(&line), fds = fds.len(), "to QEMU");
        self.in_flight.insert(id, in_flight);
        self.writer.push(line, fds);
    }

    fn dispatch(&mut self, line: &Line) -> Result<(), CloseReason> {
        tracing::trace!(line = beginning(&line.text), "from QEMU");
        let message = Message::parse(&line.text)
            .map_err(|source| CloseReason::Garbage { beginning: beginning(&line.text), source })?;
        match message {
            // An error means that nobody reads events.
            Message::Event(event) => drop(self.events.send(event)),
            Message::Reply { id, result } => match id.and_then(|id| self.in_flight.remove(&id)) {
                Some(command) => {
                    if command.answer.send(result.map(RawValue::to_owned)).is_err() {
                        tracing::trace!(id, "a late reply came and was dropped");
                    }
                }
                None => tracing::warn!(line = beginning(&line.text), "a reply to no command of ours"),
            },
            Message::Unknown => tracing::warn!(line = beginning(&line.text), "neither a reply nor an event"),
        }
        Ok(())
    }

    /// Writing failed, usually since the peer is gone; what it said before (the reply to `quit`, say) still
    /// counts.
    fn last_words(&mut self, error: io::Error) -> CloseReason {
        loop {
            match self.reader.next_arrived(&self.stream) {
                Ok(Some(line)) => {
                    if let Err(reason) = self.dispatch(&line) {
                        return reason;
                    }
                }
                Ok(None) => return CloseReason::Eof,
                Err(_) => return CloseReason::Write(error),
            }
        }
    }
}
