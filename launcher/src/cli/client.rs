//! A connection to an owner's control socket.

use std::time::Duration;

use qmp_client::{Options, Qmp, QmpError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{Exit, Problem, target};
use crate::adopt::Life;
use crate::folders::{Folders, VmName};
use crate::status::Status;

/// An owner, connected.
pub struct Client {
    qmp: Qmp,
    vm: VmName,
}

/// How long an owner may take for a command that waits for nothing: it may have another one at work.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connects to the owner of a VM.
pub async fn connect(folders: &Folders, vm: &VmName) -> Result<Client, Problem> {
    let path = folders.vm(vm)?.control();
    let Ok(stream) = UnixStream::connect(&path).await else { return Err(target::not_running(folders, vm)) };
    // Dropping the other half closes the queue of events, which nobody reads here.
    match Qmp::connect(stream, Options { command_deadline: PATIENCE, ..Options::default() }).await {
        Ok((qmp, _)) => Ok(Client { qmp, vm: vm.clone() }),
        Err(_) if target::life_of(folders, vm)? != Life::Owned => Err(target::not_running(folders, vm)),
        Err(error) => Err(error.into()),
    }
}

impl Client {
    /// The status.
    pub async fn status(&self) -> Result<Status, Problem> {
        self.ask("qvirt-status", Value::Null).await
    }

    /// A command with a typed reply.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<T, Problem> {
        Ok(serde_json::from_value(self.call(command, arguments).await?)?)
    }

    /// A command.
    pub async fn call(&self, command: &str, arguments: impl Serialize) -> Result<Value, Problem> {
        let arguments = serde_json::to_value(arguments)?;
        self.qmp.call(command, arguments).await.map_err(|error| self.problem(error))
    }

    fn problem(&self, error: QmpError) -> Problem {
        let vm = &self.vm;
        match error {
            QmpError::Closed(_) => Problem::new(
                Exit::Pending,
                format!(
                    "the owner of VM {vm} ended before it answered, so the outcome is open: `qvirt list` tells whether the VM runs, `qvirt start {vm}` adopts it"
                ),
            ),
            error => error.into(),
        }
    }

    /// A command that itself waits for so long.
    pub async fn ask_for<T: DeserializeOwned>(
        &self,
        wait: Duration,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<T, Problem> {
        let qmp = self.qmp.with_deadline(wait + PATIENCE);
        let reply =
            qmp.call(command, serde_json::to_value(arguments)?).await.map_err(|error| self.problem(error))?;
        Ok(serde_json::from_value(reply)?)
    }
}
