//! One line to a host: a serial console, a virtio-serial port, or, in a test, a socket.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::command;
use crate::protocol::{Lines, NOT_STARTED, NoRequest, READY, Reply, Request, Wish};

/// A host that comes back to a port, or to a console, gives no sign that could be awaited.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Where replies of several commands go, each line of them whole; and which commands run.
pub struct Line {
    file: File,
    /// Whoever holds it may write.
    writing: Mutex<()>,
    running: Mutex<HashMap<String, Pid>>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Whether somebody listens cannot be known.
    Console,
    /// The kernel knows whether the host has connected it.
    Port,
}

/// What reading gave.
#[derive(PartialEq, Eq)]
enum Received {
    Bytes(Vec<u8>),
    /// The host is there and has said nothing.
    Nothing,
    /// There is no host.
    Closed,
}

impl Line {
    /// Opens a terminal, and sets it to raw mode: a line is longer than the 4095 bytes that a terminal takes otherwise, and no byte is a signal.
    pub fn console(path: &Path) -> io::Result<Line> {
        let line = Line::open(path, Kind::Console)?;
        let mut mode = tcgetattr(&line.file)?;
        mode.make_raw();
        tcsetattr(&line.file, OptionalActions::Now, &mode)?;
        Ok(line)
    }

    /// Opens a virtio-serial port.
    pub fn port(path: &Path) -> io::Result<Line> {
        Line::open(path, Kind::Port)
    }

    fn open(path: &Path, kind: Kind) -> io::Result<Line> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
        Ok(Line { file, writing: Mutex::default(), running: Mutex::default(), kind })
    }

    /// A socket whose other end a test has.
    #[cfg(test)]
    pub(super) fn socket(socket: std::os::unix::net::UnixStream) -> io::Result<Line> {
        socket.set_nonblocking(true)?;
        let file = File::from(std::os::fd::OwnedFd::from(socket));
        Ok(Line { file, writing: Mutex::default(), running: Mutex::default(), kind: Kind::Port })
    }

    /// Serves it in a thread of its own, which ends when the device is gone.
    pub fn serve_in_background(self) -> io::Result<JoinHandle<()>> {
        let line = Arc::new(self);
        std::thread::Builder::new().name("line".into()).spawn(move || line.serve())
    }

    fn serve(self: &Arc<Line>) {
        let (mut connected, mut lines) = (false, Lines::default());
        loop {
            let received = match self.read() {
                Ok(received) => received,
                // A terminal whose other end is gone; it comes back.
                Err(e)
                    if self.kind == Kind::Console && e.raw_os_error() == Some(Errno::IO.raw_os_error()) =>
                {
                    Received::Closed
                }
                // The device was unplugged.
                Err(_) => return,
            };
            if received == Received::Closed {
                connected &= self.kind == Kind::Console;
                std::thread::sleep(ASK_AGAIN);
                continue;
            }
            if !connected {
                (connected, lines) = (true, Lines::default());
                // A peer that left again will be greeted when it comes back.
                let _ = self.send(&format!("{READY}\n"));
            }
            match received {
                Received::Bytes(bytes) => lines.push(&bytes).iter().for_each(|line| self.obey(line)),
                // What is wrong with the device, the next reading tells.
                _ => drop(self.poll(PollFlags::IN)),
            }
        }
    }

    fn read(&self) -> io::Result<Received> {
        let mut chunk = vec![0; 4096];
        match (&self.file).read(&mut chunk) {
            Ok(0) => Ok(Received::Closed),
            Ok(count) => {
                chunk.truncate(count);
                Ok(Received::Bytes(chunk))
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(Received::Nothing)
            }
            Err(e) => Err(e),
        }
    }

    /// Waits for that, or for the end of the peer or the device.
    fn poll(&self, events: PollFlags) -> io::Result<PollFlags> {
        let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), events)];
        match poll(&mut fds, None) {
            Ok(_) => Ok(fds[0].revents()),
            Err(Errno::INTR) => Ok(PollFlags::empty()),
            Err(e) => Err(e.into()),
        }
    }

    /// Writes whole lines. A host that does not read makes this wait, one that is gone makes it fail.
    fn send(&self, text: &str) -> io::Result<()> {
        let _turn = locked(&self.writing);
        let mut bytes = text.as_bytes();
        while !bytes.is_empty() {
            match (&self.file).write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let seen = self.poll(PollFlags::OUT)?;
                    if self.kind == Kind::Port && seen.contains(PollFlags::HUP) {
                        return Err(ErrorKind::BrokenPipe.into());
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Tells something of a command. A host that is gone does not hear it, and the command goes on: nobody is left to be told.
    pub(super) fn reply(&self, tag: &str, reply: &Reply) {
        let _ = self.send(&reply.line(tag));
    }

    fn obey(self: &Arc<Line>, text: &str) {
        match Request::parse(text) {
            Ok(Request { tag, wish: Wish::Kill }) => self.kill(&tag),
            Ok(Request { tag, wish: Wish::Script(script) }) => self.start(tag, command::script(&script)),
            Ok(Request { tag, wish: Wish::Program(program) }) => self.start(tag, command::program(&program)),
            Err(NoRequest::Broken { tag, reason }) => self.refuse(&tag, &reason),
            Err(NoRequest::Foreign) => {}
        }
    }

    fn start(self: &Arc<Line>, tag: String, command: std::process::Command) {
        // A tag in use is a line that came twice.
        if locked(&self.running).contains_key(&tag) {
            return;
        }
        if let Err(reason) = command::start(self, &tag, command) {
            self.refuse(&tag, &reason);
        }
    }

    fn refuse(&self, tag: &str, reason: &str) {
        self.reply(tag, &Reply::Output(format!("agent: {reason}\n").into_bytes()));
        self.reply(tag, &Reply::End(NOT_STARTED));
    }

    /// The process group of a command has its first process's number, which nobody else can get before the command is forgotten.
    pub(super) fn remember(&self, tag: &str, pid: Pid) {
        locked(&self.running).insert(tag.to_owned(), pid);
    }

    /// To be called before its process is reaped.
    pub(super) fn forget(&self, tag: &str) {
        locked(&self.running).remove(tag);
    }

    fn kill(&self, tag: &str) {
        let running = locked(&self.running);
        if let Some(pid) = running.get(tag) {
            // It can have ended, but is not reaped yet.
            let _ = kill_process_group(*pid, Signal::KILL);
        }
    }
}

/// What these locks guard is never half-way changed, whoever panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
