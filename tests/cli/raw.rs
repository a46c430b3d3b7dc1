//! A client that sends and sees bytes: no library stands between a test and the control socket.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tests::vm::Vm;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to a socket of a VM's owner.
pub struct Raw(BufReader<UnixStream>);

impl Raw {
    /// Connects; nothing is read or sent.
    pub fn connect(vm: &Vm, socket: &str) -> Raw {
        let path = vm.root().join("run/guest").join(socket);
        let stream = UnixStream::connect(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout above zero");
        Raw(BufReader::new(stream))
    }

    /// Connects to the control socket and negotiates.
    pub fn open(vm: &Vm) -> Raw {
        Raw::open_at(vm, "control.sock")
    }

    /// Connects to a socket and negotiates.
    pub fn open_at(vm: &Vm, socket: &str) -> Raw {
        let mut raw = Raw::connect(vm, socket);
        raw.line();
        assert_eq!(raw.ask(&json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        raw
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("the owner reads");
    }

    /// Sends a message together with a descriptor.
    pub fn send_with(&mut self, message: &Value, fd: BorrowedFd<'_>) {
        let text = format!("{message}\n");
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg::<()>(self.0.get_ref().as_raw_fd(), &parts, &control, MsgFlags::empty(), None);
        assert_eq!(sent.expect("the owner reads"), text.len());
    }

    /// The next line, without its end; empty when the owner has closed.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            // It closed before it had read all that was sent.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => String::new(),
            read => {
                read.expect("the owner writes lines in time");
                line.trim_end().to_owned()
            }
        }
    }

    /// The next line that is no event.
    pub fn reply(&mut self) -> Value {
        loop {
            let line = self.line();
            let value: Value =
                serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            if value.get("event").is_none() {
                return value;
            }
        }
    }

    /// The next event of that name, others passed over.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let line = self.line();
            let value: Value =
                serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            if value["event"] == name {
                return value;
            }
        }
    }

    /// Sends a message and gives the reply.
    pub fn ask(&mut self, message: &Value) -> Value {
        self.send(format!("{message}\n").as_bytes());
        self.reply()
    }

    /// Sends a message with a descriptor and gives the reply.
    pub fn ask_with(&mut self, message: &Value, fd: BorrowedFd<'_>) -> Value {
        self.send_with(message, fd);
        self.reply()
    }

    /// Closes the writing side: the owner sees the end of what was sent.
    pub fn finish(&mut self) {
        self.0.get_ref().shutdown(std::net::Shutdown::Write).expect("it is connected");
    }
}
