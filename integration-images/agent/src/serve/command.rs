//! One command: started in a process group of its own, its output carried to the line as it comes, its end told.

use std::io::{self, PipeReader, Read, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::line::Line;
use crate::protocol::{NOT_STARTED, Program, Reply};

/// The most bytes in one line.
const PIECE: usize = 4096;
/// How long half a line may wait for its other half.
const PATIENCE: Duration = Duration::from_millis(100);

pub(super) fn script(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script);
    command
}

/// The name `agent` is this program's own, wherever it lies.
pub(super) fn program(program: &Program) -> Command {
    let mut command = match program.program.as_str() {
        name @ "agent" => {
            let mut command = Command::new("/proc/self/exe");
            command.arg0(name);
            command
        }
        name => Command::new(name),
    };
    command.args(&program.args).envs(&program.env);
    command
}

/// Starts the command and a thread that attends to it; the error says why it could not be started.
pub(super) fn start(line: &Arc<Line>, tag: &str, mut command: Command) -> Result<(), String> {
    let name = command.get_program().display().to_string();
    let failed = |e: &dyn std::fmt::Display| format!("cannot start {name}: {e}");
    let (output, input) = pipe().map_err(|e| failed(&e))?;
    let error = input.try_clone().map_err(|e| failed(&e))?;
    command.stdin(Stdio::null()).stdout(input).stderr(error).process_group(0);
    let child = command.spawn().map_err(|e| failed(&e))?;
    // It holds the writing end, whose last closing is the end of the output.
    drop(command);
    let pid = Pid::from_child(&child);
    line.remember(tag, pid);
    attend(line, tag, child, output).map_err(|e| {
        line.forget(tag);
        // Nobody would hear of its end.
        let _ = kill_process_group(pid, Signal::KILL);
        failed(&e)
    })
}

fn attend(line: &Arc<Line>, tag: &str, child: Child, output: PipeReader) -> io::Result<()> {
    let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let job = Job { line: line.clone(), tag: tag.to_owned(), child, output, ended, begun: Vec::new() };
    std::thread::Builder::new().name(tag.to_owned()).spawn(move || job.attend()).map(drop)
}

struct Job {
    line: Arc<Line>,
    tag: String,
    child: Child,
    output: PipeReader,
    /// Readable when the command has ended.
    ended: OwnedFd,
    /// Output that is not sent yet.
    begun: Vec<u8>,
}

impl Job {
    fn attend(mut self) {
        let mut open = true;
        while !self.wait(open) {
            open = self.take(PIECE) > 0;
        }
        // What was written by now is in the pipe; what its children in the background still write is not waited for.
        let mut left = ioctl_fionread(&self.output).map_or(0, |left| usize::try_from(left).unwrap_or(0));
        while left > 0 {
            match self.take(left.min(PIECE)) {
                0 => break,
                count => left -= count,
            }
        }
        self.flush();
        self.line.forget(&self.tag);
        let status =
            self.child.wait().map(|status| status.code().unwrap_or(128 + status.signal().unwrap_or(0)));
        self.line.reply(&self.tag, &Reply::End(status.unwrap_or(NOT_STARTED)));
        // Its children in the background must not die of a pipe without a reader.
        let _ = io::copy(&mut self.output, &mut io::sink());
    }

    /// Waits until there is output, if that is still open, or until the command has ended, which is told. Half a line that nothing
    /// follows is sent meanwhile.
    fn wait(&mut self, open: bool) -> bool {
        loop {
            let mut fds = vec![PollFd::from_borrowed_fd(self.ended.as_fd(), PollFlags::IN)];
            if open {
                fds.push(PollFd::from_borrowed_fd(self.output.as_fd(), PollFlags::IN));
            }
            let timeout = if self.begun.is_empty() { None } else { PATIENCE.try_into().ok() };
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => self.flush(),
                Ok(_) => return !fds[0].revents().is_empty(),
                Err(Errno::INTR) => {}
                // Out of memory: there is no better answer than to try again.
                Err(_) => std::thread::sleep(PATIENCE),
            }
        }
    }

    /// Reads what there is, at most that many bytes, and tells how many came: none at the end of the output.
    fn take(&mut self, most: usize) -> usize {
        let mut piece = vec![0; most.min(PIECE - self.begun.len())];
        let count = self.output.read(&mut piece).unwrap_or(0);
        self.begun.extend_from_slice(&piece[..count]);
        if self.begun.len() >= PIECE || piece[..count].contains(&b'\n') {
            self.flush();
        }
        count
    }

    fn flush(&mut self) {
        if !self.begun.is_empty() {
            let piece = std::mem::take(&mut self.begun);
            self.line.reply(&self.tag, &Reply::Output(piece));
        }
    }
}
