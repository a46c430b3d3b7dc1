//! The beginning of a session: the peer's greeting and the negotiation of capabilities.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::error::{CloseReason, ConnectError};
use crate::event::Event;
use crate::message::{Band, Message, command_line};
use crate::wire::{LineReader, beginning, write_line};

/// What the peer said of itself when we connected.
#[derive(Debug, Clone)]
pub struct Greeting {
    /// QEMU's version; it decides nothing, ask for what you need.
    pub version: Version,
    /// The distributor's version, such as `Debian 1:10.0.2+ds-2`; often empty.
    pub package: String,
    /// What can be negotiated: `oob` or nothing.
    pub capabilities: Vec<String>,
    /// The whole greeting, so that a proxy can greet in QEMU's words.
    pub raw: Value,
}

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// Rises once a year.
    pub major: u32,
    /// Rises with each release of the year.
    pub minor: u32,
    /// Rises with each correction.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Greeting {
    fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Envelope {
            #[serde(rename = "QMP")]
            qmp: Parts,
        }
        #[derive(Deserialize)]
        struct Parts {
            version: Versions,
            #[serde(default)]
            capabilities: Vec<String>,
        }
        #[derive(Deserialize)]
        struct Versions {
            qemu: Version,
            #[serde(default)]
            package: String,
        }
        let raw: Value = serde_json::from_slice(line)?;
        let Envelope { qmp } = Envelope::deserialize(&raw)?;
        let Versions { qemu: version, package } = qmp.version;
        Ok(Self { version, package, capabilities: qmp.capabilities, raw })
    }
}

/// Waits for the greeting. Events that come first, as from a peer that has served others, are queued.
pub(crate) async fn greet(
    stream: &UnixStream,
    reader: &mut LineReader,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<Greeting, ConnectError> {
    loop {
        let line = next_line(stream, reader).await?;
        match Greeting::parse(&line) {
            Ok(greeting) => return Ok(greeting),
            Err(source) => match Message::parse(&line) {
                Ok(Message::Event(event)) => drop(events.send(event)),
                _ => return Err(ConnectError::NotQmp { beginning: beginning(&line), source }),
            },
        }
    }
}

/// Leaves the negotiation mode, with out-of-band execution or without, by the command of this `id`.
pub(crate) async fn negotiate(
    stream: &UnixStream,
    reader: &mut LineReader,
    events: &mpsc::UnboundedSender<Event>,
    (id, oob): (u64, bool),
) -> Result<(), ConnectError> {
    let enable: Option<&RawValue> =
        if oob { serde_json::from_str(r#"{"enable":["oob"]}"#).ok() } else { None };
    let command = command_line(Band::In, "qmp_capabilities", enable, id);
    write_line(stream, &command, &[])
        .await
        .map_err(|source| ConnectError::Closed(CloseReason::Write(source)))?;
    loop {
        let line = next_line(stream, reader).await?;
        match Message::parse(&line) {
            Ok(Message::Event(event)) => drop(events.send(event)),
            Ok(Message::Reply { id: Some(of), result: Ok(_) }) if of == id => return Ok(()),
            // No other command is under way, so an error without an id can only mean this one.
            Ok(Message::Reply { id: of, result: Err(error) }) if of.is_none_or(|of| of == id) => {
                return Err(ConnectError::Refused(error));
            }
            Ok(_) => tracing::warn!(line = beginning(&line), "ignored before the QMP session was negotiated"),
            Err(source) => {
                return Err(ConnectError::Closed(CloseReason::Garbage {
                    beginning: beginning(&line),
                    source,
                }));
            }
        }
    }
}

async fn next_line(stream: &UnixStream, reader: &mut LineReader) -> Result<Vec<u8>, ConnectError> {
    match reader.next(stream).await {
        Ok(Some(line)) => Ok(line.text),
        Ok(None) => Err(ConnectError::Closed(CloseReason::Eof)),
        Err(error) => Err(ConnectError::Closed(CloseReason::Read(error))),
    }
}
