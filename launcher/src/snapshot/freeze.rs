//! Quiet file systems in the guest while a snapshot is taken, by the guest agent of QEMU (`qemu-ga`) on its channel.
//!
//! Whoever freezes thaws, whatever comes in between; and whoever adopts a VM whose owner died in between thaws as well.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::host::HostNeed;
use devices::{DeviceConfig, Layout, Placed};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the agent may take to say that it is there, or to thaw.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the guest may take to write what its file systems hold back.
const FREEZE: Duration = Duration::from_secs(30);

/// The guest's file systems could not be frozen or thawed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum FreezeError {
    #[error(
        "the VM has no channel to a guest agent: write [[channel]] guest_agent = true into its config, or leave --quiesce out"
    )]
    NoChannel,
    #[error("the channel of the guest agent, {}: {source}", path.display())]
    Channel { path: PathBuf, source: io::Error },
    #[error(
        "the guest agent does not answer {command}: start qemu-ga in the guest (package qemu-guest-agent), or leave --quiesce out"
    )]
    Silent { command: &'static str },
    #[error("the guest agent refused {command}: {words}")]
    Refused { command: &'static str, words: String },
}

/// The socket of a VM's guest agent.
pub fn channel(layout: &Layout) -> Result<PathBuf, FreezeError> {
    let is_agent =
        |placed: &&Placed| matches!(&placed.config, DeviceConfig::Channel(channel) if channel.guest_agent);
    let agent = layout.devices().iter().find(is_agent).ok_or(FreezeError::NoChannel)?;
    let socket = agent.needs.iter().find_map(|need| match need {
        HostNeed::Socket { path } => Some(PathBuf::from(path)),
        _ => None,
    });
    socket.ok_or(FreezeError::NoChannel)
}

/// A line to an agent. It takes one peer at a time.
#[derive(Debug)]
pub struct Agent {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Agent {
    /// Connects, and waits until the agent answers this peer and not a former one.
    ///
    /// # Errors
    /// There is no agent.
    pub async fn connect(path: &Path) -> Result<Agent, FreezeError> {
        let failed = |source| FreezeError::Channel { path: path.to_owned(), source };
        let connecting = async {
            let stream = UnixStream::connect(path).await.map_err(failed)?;
            let mut agent = Agent { stream: BufReader::new(stream), path: path.to_owned() };
            let id = u64::from(std::process::id()) << 20
                | u64::try_from(qmp_client::Timestamp::now().microseconds).unwrap_or_default();
            // This byte makes the agent forget half a line of a former peer.
            agent.stream.get_mut().write_all(b"\xff").await.map_err(failed)?;
            agent.send("guest-sync", json!({"id": id})).await?;
            while agent.answer().await?["return"] != json!(id) {}
            Ok(agent)
        };
        timeout(ANSWER, connecting).await.map_err(|_| FreezeError::Silent { command: "guest-sync" })?
    }

    /// Freezes; gives the number of file systems. After an error some may be frozen.
    ///
    /// # Errors
    /// The guest refused, or did not answer.
    pub async fn freeze(&mut self) -> Result<u64, FreezeError> {
        self.command("guest-fsfreeze-freeze", FREEZE).await
    }

    /// Thaws.
    ///
    /// # Errors
    /// The guest refused, or did not answer.
    pub async fn thaw(&mut self) -> Result<u64, FreezeError> {
        self.command("guest-fsfreeze-thaw", ANSWER).await
    }

    /// The file systems that are mounted in the guest, each with its disks.
    ///
    /// # Errors
    /// The guest refused, or did not answer.
    pub async fn file_systems(&mut self) -> Result<Value, FreezeError> {
        self.exchange("guest-get-fsinfo", ANSWER).await
    }

    async fn command(&mut self, command: &'static str, patience: Duration) -> Result<u64, FreezeError> {
        Ok(self.exchange(command, patience).await?.as_u64().unwrap_or_default())
    }

    async fn exchange(&mut self, command: &'static str, patience: Duration) -> Result<Value, FreezeError> {
        let call = async {
            self.send(command, json!({})).await?;
            let mut reply = self.answer().await?;
            match reply["error"]["desc"].as_str() {
                Some(words) => Err(FreezeError::Refused { command, words: words.to_owned() }),
                None => Ok(reply["return"].take()),
            }
        };
        timeout(patience, call).await.map_err(|_| FreezeError::Silent { command })?
    }

    async fn send(&mut self, command: &str, arguments: Value) -> Result<(), FreezeError> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
        sent.map_err(|source| FreezeError::Channel { path: self.path.clone(), source })
    }

    /// The next line that is an object.
    async fn answer(&mut self) -> Result<Value, FreezeError> {
        let failed = |source| FreezeError::Channel { path: self.path.clone(), source };
        loop {
            let mut line = Vec::new();
            if self.stream.read_until(b'\n', &mut line).await.map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Ok(reply @ Value::Object(_)) = serde_json::from_slice(line.trim_ascii()) {
                return Ok(reply);
            }
        }
    }
}

/// Thaws by a line of its own.
///
/// # Errors
/// The agent cannot be reached, or refused.
pub async fn thaw(path: &Path) -> Result<(), FreezeError> {
    Agent::connect(path).await?.thaw().await.map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    use super::*;

    /// An agent that answers each line with what `answer` says of its command; nothing where that is empty.
    fn agent(path: &Path, answer: impl Fn(&str, &Value) -> String + Send + 'static) {
        let listener = UnixListener::bind(path).expect("a socket");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut stream = BufReader::new(stream);
                assert_eq!(stream.read_u8().await.expect("a byte"), 0xff);
                let mut line = String::new();
                while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                    let said: Value = serde_json::from_str(&line).expect("JSON");
                    let words = answer(said["execute"].as_str().expect("a command"), &said["arguments"]);
                    stream.get_mut().write_all(words.as_bytes()).await.expect("written");
                    line.clear();
                }
            }
        });
    }

    #[tokio::test]
    async fn a_peer_takes_its_own_answers_only() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("agent");
        agent(&path, |command, arguments| match command {
            // What a former peer was to get, and what the agent says of the byte that is no JSON.
            "guest-sync" => format!(
                "{{\"return\":1}}\n{{\"error\":{{\"desc\":\"JSON\"}}}}\n{{\"return\":{}}}\n",
                arguments["id"]
            ),
            "guest-fsfreeze-freeze" => "{\"return\":2}\n".to_owned(),
            _ => "{\"error\":{\"class\":\"GenericError\",\"desc\":\"not now\"}}\n".to_owned(),
        });
        let mut agent = Agent::connect(&path).await.expect("it answers");
        assert_eq!(agent.freeze().await.expect("frozen"), 2);
        let error = agent.thaw().await.expect_err("refused").to_string();
        assert_eq!(error, "the guest agent refused guest-fsfreeze-thaw: not now");
    }

    #[tokio::test]
    async fn an_agent_that_is_silent_is_not_waited_for() {
        let temp = tempfile::tempdir().expect("a folder");
        let path = temp.path().join("agent");
        agent(&path, |_, _| String::new());
        let error = Agent::connect(&path).await.expect_err("nobody there").to_string();
        assert!(error.contains("does not answer guest-sync"), "{error}");
    }
}
