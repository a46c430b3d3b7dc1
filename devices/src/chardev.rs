//! Character devices: the one backend that takes no JSON on the command line, so it is spelled twice, here and nowhere else.

use serde_json::{Value, json};

use crate::keyval::escaped;
use crate::spec::Call;

/// Where a character device's bytes go.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Stream {
    /// A new pseudo terminal of the host.
    Pty,
    /// A unix socket that QEMU listens on; nobody need be connected.
    UnixListen(String),
    /// A unix socket that another process listens on.
    UnixConnect(String),
}

/// One character device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Chardev {
    /// QEMU's id of it.
    pub id: String,
    /// Where its bytes go.
    pub stream: Stream,
    /// A file that every byte the guest writes is appended to.
    pub log: Option<String>,
}

impl Chardev {
    /// As the value of `-chardev`.
    pub(crate) fn option(&self) -> String {
        let id = escaped(&self.id);
        let stream = match &self.stream {
            Stream::Pty => format!("pty,id={id}"),
            Stream::UnixListen(path) => format!("socket,id={id},path={},server=on,wait=off", escaped(path)),
            Stream::UnixConnect(path) => format!("socket,id={id},path={},server=off", escaped(path)),
        };
        match &self.log {
            Some(log) => format!("{stream},logfile={},logappend=on", escaped(log)),
            None => stream,
        }
    }

    /// As `chardev-add`.
    pub(crate) fn add(&self) -> Call {
        let unix = |path: &str| json!({"type": "unix", "data": {"path": path}});
        let (kind, mut data) = match &self.stream {
            Stream::Pty => ("pty", json!({})),
            Stream::UnixListen(path) => {
                ("socket", json!({"addr": unix(path), "server": true, "wait": false}))
            }
            Stream::UnixConnect(path) => ("socket", json!({"addr": unix(path), "server": false})),
        };
        if let Some(log) = &self.log {
            data["logfile"] = Value::from(log.as_str());
            data["logappend"] = Value::from(true);
        }
        Call::new("chardev-add", json!({"id": self.id, "backend": {"type": kind, "data": data}}))
    }
}
