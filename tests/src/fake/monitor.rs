//! One monitor of the fake: one client at a time, a second waits unheard, as with QEMU. Owns the sockets and the framing.

use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use super::core::{Chunk, Client, Core, Request, handle, lock};
use super::machine::Props;

/// Serves a listener for ever.
pub(super) fn listen(name: &str, listener: &UnixListener, core: &Arc<Mutex<Core>>) {
    while let Ok((stream, _)) = listener.accept() {
        serve(name, &stream, core);
    }
}

/// Serves one client until it goes.
pub(super) fn serve(name: &str, stream: &UnixStream, core: &Arc<Mutex<Core>>) {
    let Ok(writing) = stream.try_clone() else { return };
    let (out, chunks) = channel();
    let writer = std::thread::spawn(move || write(writing, &chunks));
    let number = {
        let mut core = lock(core);
        let version = &core.machine.qemu.version;
        let greeting = json!({"QMP": {"version": version, "capabilities": ["oob"]}});
        // Its receiver lives in the writer until this function ends.
        let _ = out.send(Chunk::Bytes(format!("{greeting}\r\n").into_bytes()));
        core.next_client += 1;
        let number = core.next_client;
        core.clients.insert(number, Client { out, negotiated: false });
        number
    };
    let mut session = Session { name, core, number, fds: Vec::new(), pending: Vec::new() };
    while session.read(stream) {}
    lock(core).clients.remove(&number);
    // The last sender has gone, so the writer ends.
    let _ = writer.join();
}

fn write(mut stream: UnixStream, chunks: &Receiver<Chunk>) {
    for chunk in chunks {
        match chunk {
            // A client that does not take it any more is found gone by the reader.
            Chunk::Bytes(bytes) => drop(stream.write_all(&bytes)),
            Chunk::Pause(time) => std::thread::sleep(time),
            // Whoever waits may have stopped waiting.
            Chunk::Flush(done) => drop(done.send(())),
        }
    }
}

struct Session<'a> {
    name: &'a str,
    core: &'a Arc<Mutex<Core>>,
    number: u64,
    /// The last set of descriptors that came: a later set replaces it, as in QEMU.
    fds: Vec<OwnedFd>,
    pending: Vec<u8>,
}

#[allow(unsafe_code)]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Session<'_> {
    /// Reads once and answers what is complete; `false` when the client has gone.
    fn read(&mut self, stream: &UnixStream) -> bool {
        let mut bytes = [0; 65536];
        let mut space = nix::cmsg_space!([RawFd; 16]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let count = match recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Ok(message) => {
                for control in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(fds) = control {
                        self.fds = fds.into_iter().map(owned).collect();
                    }
                }
                message.bytes
            }
            Err(nix::Error::EINTR) => return true,
            Err(_) => 0,
        };
        self.pending.extend(&bytes[..count]);
        self.answer_complete();
        count > 0
    }

    fn answer_complete(&mut self) {
        loop {
            let mut values = serde_json::Deserializer::from_slice(&self.pending).into_iter::<Value>();
            let value = values.next();
            let used = values.byte_offset();
            match value {
                None => return self.pending.clear(),
                Some(Err(error)) if error.is_eof() => return,
                Some(Err(_)) => {
                    self.pending.clear();
                    return self.refuse(None, "GenericError", "JSON parse error, invalid keyword");
                }
                Some(Ok(value)) => {
                    self.pending.drain(..used);
                    self.answer(value);
                }
            }
        }
    }

    fn send(&self, value: &Value) {
        if let Some(client) = lock(self.core).clients.get(&self.number) {
            // A client that has gone needs no reply.
            let _ = client.out.send(Chunk::Bytes(format!("{value}\r\n").into_bytes()));
        }
    }

    fn refuse(&self, id: Option<&Value>, class: &str, desc: &str) {
        let mut reply = json!({"error": {"class": class, "desc": desc}});
        if let Some(id) = id {
            reply["id"] = id.clone();
        }
        self.send(&reply);
    }

    fn answer(&mut self, message: Value) {
        let Value::Object(mut members) = message else {
            return self.refuse(None, "GenericError", "QMP input must be a JSON object");
        };
        let id = members.remove("id");
        let generic = |desc: &str| self.refuse(id.as_ref(), "GenericError", desc);
        let known = |key: &&String| matches!(key.as_str(), "execute" | "exec-oob" | "arguments");
        if let Some(key) = members.keys().find(|key| !known(key)) {
            return generic(&format!("QMP input member '{key}' is unexpected"));
        }
        let name = match members.remove("execute").or_else(|| members.remove("exec-oob")) {
            Some(Value::String(name)) => name,
            Some(_) => return generic("QMP input member 'execute' must be a string"),
            None => return generic("QMP input lacks member 'execute'"),
        };
        let arguments = match members.remove("arguments") {
            None => Props::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return generic("QMP input member 'arguments' must be an object"),
        };
        if self.negotiates(&name, id.as_ref()) {
            return;
        }
        let takes_fd = matches!(name.as_str(), "getfd" | "add-fd");
        let fd = takes_fd.then(|| std::mem::take(&mut self.fds).into_iter().next()).flatten();
        handle(
            self.core,
            Request { monitor: self.name, client: self.number, id, name: &name, arguments, fd },
        );
    }

    /// The part of the session before commands; `true` if it has answered.
    fn negotiates(&mut self, name: &str, id: Option<&Value>) -> bool {
        let mut core = lock(self.core);
        let Some(client) = core.clients.get_mut(&self.number) else { return true };
        let negotiated = client.negotiated;
        client.negotiated |= name == "qmp_capabilities";
        drop(core);
        let refuse = |desc| self.refuse(id, "CommandNotFound", desc);
        match (name, negotiated) {
            ("qmp_capabilities", true) => {
                refuse("Capabilities negotiation is already complete, command ignored");
            }
            ("qmp_capabilities", false) => {
                let mut reply = json!({"return": {}});
                if let Some(id) = id {
                    reply["id"] = id.clone();
                }
                self.send(&reply);
            }
            (_, true) => return false,
            (_, false) => refuse("Expecting capabilities negotiation with 'qmp_capabilities'"),
        }
        true
    }
}
