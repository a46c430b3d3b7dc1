//! A connection to an owner's control socket.

use std::time::Duration;

use qmp_client::{Events, Options, Qmp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{Problem, target};
use crate::folders::{Folders, VmName};
use crate::status::Status;

/// An owner, connected.
pub struct Client {
    qmp: Qmp,
    // Dropping it closes the queue of events, which nobody reads here.
    _events: Option<Events>,
}

/// How long an owner may take for a command that waits for nothing: it may have another one at work.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connects to the owner of a VM.
pub async fn connect(folders: &Folders, vm: &VmName) -> Result<Client, Problem> {
    let path = folders.vm(vm)?.control();
    let Ok(stream) = UnixStream::connect(&path).await else { return Err(target::not_running(folders, vm)) };
    let (qmp, _) = Qmp::connect(stream, Options { command_deadline: PATIENCE, ..Options::default() }).await?;
    Ok(Client { qmp, _events: None })
}

impl Client {
    /// The status.
    pub async fn status(&self) -> Result<Status, Problem> {
        self.ask("qvirt-status", Value::Null).await
    }

    /// A command with a typed reply.
    pub async fn ask<T: DeserializeOwned>(&self, command: &str, arguments: impl Serialize) -> Result<T, Problem> {
        Ok(serde_json::from_value(self.call(command, arguments).await?)?)
    }

    /// A command.
    pub async fn call(&self, command: &str, arguments: impl Serialize) -> Result<Value, Problem> {
        Ok(self.qmp.call(command, serde_json::to_value(arguments)?).await?)
    }

    /// A command that itself waits for so long.
    pub async fn ask_for<T: DeserializeOwned>(&self, wait: Duration, command: &str, arguments: impl Serialize) -> Result<T, Problem> {
        let qmp = self.qmp.with_deadline(wait + PATIENCE);
        Ok(serde_json::from_value(qmp.call(command, serde_json::to_value(arguments)?).await?)?)
    }
}
