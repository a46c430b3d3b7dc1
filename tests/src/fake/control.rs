//! A test's line into a running fake.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::State;

/// How long an answer may take: the fake is busy only with a rule's own waits, and those do not hold up this socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// A session with a fake, blocking. Its methods panic when the fake does not answer: that is a bug of the test.
#[derive(Debug)]
pub struct Control {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Control {
    /// Connects to `QVIRT_FAKE_CONTROL`'s path or to any other free monitor of a fake, and waits for both to exist.
    pub fn connect(socket: &Path) -> Control {
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => panic!("{}: {error}", socket.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout above zero");
        let mut control = Control { stream: BufReader::new(stream), events: Vec::new() };
        control.line().expect("the fake greets");
        control.ask("qmp_capabilities", json!({}));
        control
    }

    fn line(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }

    /// Any command: its reply with `return` or `error`. Events that come meanwhile are kept.
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        let message = json!({"execute": name, "arguments": arguments});
        let sent = self.stream.get_mut().write_all(format!("{message}\n").as_bytes());
        sent.and_then(|()| {
            loop {
                let line = self.line()?;
                if line.get("event").is_none() {
                    return Ok(line);
                }
                self.events.push(line);
            }
        })
        .unwrap_or_else(|error| panic!("the fake does not answer {name}: {error}"))
    }

    /// A command that must succeed: its result.
    fn ask(&mut self, name: &str, arguments: Value) -> Value {
        let mut reply = self.command(name, arguments);
        assert!(reply.get("return").is_some(), "{name}: {reply}");
        reply["return"].take()
    }

    /// What it has now.
    pub fn state(&mut self) -> State {
        serde_json::from_value(self.ask("fake-state", json!({}))).expect("a state")
    }

    /// Every command it was sent on its other monitors, as `{monitor, execute, arguments}`, oldest first.
    pub fn calls(&mut self) -> Vec<Value> {
        serde_json::from_value(self.ask("fake-calls", json!({}))).expect("a list")
    }

    /// Adds rules; they count calls from now on.
    pub fn behave(&mut self, rules: &str) {
        self.ask("fake-behave", json!({"rules": rules}));
    }

    /// Drops all rules and the list of calls.
    pub fn forget(&mut self) {
        self.ask("fake-forget", json!({}));
    }

    /// Sends any event to everybody.
    pub fn emit(&mut self, event: &str, data: Value) {
        self.ask("fake-emit", json!({"event": event, "data": data}));
    }

    /// A device leaves unasked.
    pub fn eject(&mut self, id: &str) {
        self.ask("fake-eject", json!({"id": id}));
    }

    /// A disk fails: BLOCK_IO_ERROR with this action, any word; the VM stops if it is `stop`.
    pub fn io_error(&mut self, id: &str, operation: &str, action: &str) {
        self.ask("fake-io-error", json!({"id": id, "operation": operation, "action": action}));
    }

    /// A disk has done this many more requests.
    pub fn io_done(&mut self, id: &str, count: u64) {
        self.ask("fake-io-done", json!({"id": id, "count": count}));
    }

    /// The events that came since the last call, without their timestamps; those that come within `patience` of now too.
    pub fn events(&mut self, patience: Duration) -> Vec<Value> {
        // What came before is read by a command; what comes later has the time given.
        std::thread::sleep(patience);
        self.ask("query-status", json!({}));
        let mut events = std::mem::take(&mut self.events);
        events.iter_mut().filter_map(Value::as_object_mut).for_each(|event| drop(event.remove("timestamp")));
        events
    }
}
