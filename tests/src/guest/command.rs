//! Commands in the guest: shell scripts and programs, one after the other or several at once.

use std::time::Duration;

use agent::protocol::{Program, Reply, Request, Wish};

use super::line::Deadline;
use super::{Guest, GuestError, SCRIPT, find};

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// Standard output and standard error, in the order written.
    pub stdout: String,
}

/// A command under way in the guest. Dropping it leaves it alone.
#[derive(Debug)]
#[must_use = "`finish` tells how it ends"]
pub struct Running {
    tag: String,
    /// The command, for errors.
    what: String,
    /// Where in the transcript its next reply is looked for.
    cursor: usize,
}

impl Guest {
    /// Runs a shell script in the guest and waits for its end, at most [`SCRIPT`].
    pub fn run(&mut self, script: &str) -> Result<Output, GuestError> {
        self.run_within(script, SCRIPT)
    }

    /// Runs a shell script with a deadline of its own, at which it is killed.
    pub fn run_within(&mut self, script: &str, deadline: Duration) -> Result<Output, GuestError> {
        let running = self.begin(script)?;
        self.finish(running, deadline)
    }

    /// Runs a script that must succeed, and gives its output.
    pub fn check(&mut self, script: &str) -> Result<String, GuestError> {
        let output = self.run(script)?;
        self.succeeded(output, &format!("the script {script:?}"))
    }

    /// Runs the agent itself as a program, which must succeed; gives its output.
    pub(super) fn check_agent(&mut self, words: &[&str]) -> Result<String, GuestError> {
        let output = self.agent(words)?;
        self.succeeded(output, &format!("agent {}", words.join(" ")))
    }

    /// Runs the agent itself as a program.
    pub(super) fn agent(&mut self, words: &[&str]) -> Result<Output, GuestError> {
        let args = words.iter().map(|word| (*word).to_owned()).collect();
        let program = Program { program: "agent".to_owned(), args, ..Program::default() };
        let running = self.begin_program(program)?;
        self.finish(running, SCRIPT)
    }

    fn succeeded(&self, output: Output, what: &str) -> Result<String, GuestError> {
        match output {
            Output { status: 0, stdout } => Ok(stdout),
            Output { status, stdout } => {
                Err(self.line.failure(format!("{what} ended with {status} and said {stdout:?}")))
            }
        }
    }

    /// Runs a program without a shell; `on_output` gets its output as it comes, in pieces. Gives the exit status; at the deadline, or if no output comes for
    /// as long as `silence`, the program is killed.
    pub fn run_streaming(
        &mut self,
        program: &str,
        args: &[&str],
        env: &[(&str, &str)],
        mut on_output: impl FnMut(&[u8]),
        (deadline, silence): (Duration, Duration),
    ) -> Result<i32, GuestError> {
        let program = Program {
            program: program.to_owned(),
            args: args.iter().map(|word| (*word).to_owned()).collect(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        let running = self.begin_program(program)?;
        self.attend(running, &mut on_output, (deadline, silence))
    }

    /// Begins a shell script and does not wait for it; others may run meanwhile.
    pub fn begin(&mut self, script: &str) -> Result<Running, GuestError> {
        let what = format!("the end of the script {script:?}");
        self.request(Wish::Script(script.to_owned()), what)
    }

    /// Begins a program without a shell and does not wait for it. The name `agent` is the agent's own, wherever it lies.
    pub fn begin_program(&mut self, program: Program) -> Result<Running, GuestError> {
        let what = format!("the end of {} {}", program.program, program.args.join(" "));
        self.request(Wish::Program(program), what)
    }

    /// Waits for the end of what was begun; at the deadline it is killed.
    pub fn finish(&mut self, running: Running, deadline: Duration) -> Result<Output, GuestError> {
        let mut output = Vec::new();
        let status =
            self.attend(running, &mut |piece| output.extend_from_slice(piece), (deadline, deadline))?;
        Ok(Output { status, stdout: String::from_utf8_lossy(&output).into_owned() })
    }

    /// Waits until what was begun has written that word.
    pub fn wait_output(
        &mut self,
        running: &mut Running,
        word: &str,
        deadline: Duration,
    ) -> Result<String, GuestError> {
        let (until, mut output) = (Deadline::after(deadline), Vec::new());
        while find(&output, word.as_bytes()).is_none() {
            match self.reply(running, until)? {
                Reply::Output(piece) => output.extend(piece),
                Reply::End(status) => {
                    let said = String::from_utf8_lossy(&output);
                    let reason =
                        format!("{} came with {status} before {word:?}; it said {said:?}", running.what);
                    return Err(self.line.failure(reason));
                }
            }
        }
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Kills what was begun; it is finished after that.
    pub fn kill(&mut self, running: &Running) -> Result<(), GuestError> {
        self.send(&running.tag, Wish::Kill)
    }

    fn request(&mut self, wish: Wish, what: String) -> Result<Running, GuestError> {
        self.tags += 1;
        let tag = format!("t{}", self.tags);
        let cursor = self.line.length();
        self.send(&tag, wish)?;
        Ok(Running { tag, what, cursor })
    }

    fn send(&self, tag: &str, wish: Wish) -> Result<(), GuestError> {
        let request = Request { tag: tag.to_owned(), wish };
        // The empty line ends whatever a program that died half-way may have left in the guest's line.
        self.line.send(format!("\n{}", request.line()).as_bytes(), Deadline::after(SCRIPT))
    }

    fn attend(
        &mut self,
        mut running: Running,
        on_output: &mut dyn FnMut(&[u8]),
        (deadline, silence): (Duration, Duration),
    ) -> Result<i32, GuestError> {
        let until = Deadline::after(deadline);
        loop {
            match self.reply(&mut running, until.or_after(silence)) {
                Ok(Reply::Output(piece)) => on_output(&piece),
                Ok(Reply::End(status)) => {
                    self.cursor = self.cursor.max(running.cursor);
                    return Ok(status);
                }
                Err(error) => {
                    // Nobody will wait for it any more. If this fails too, the first error says more.
                    let _ = self.kill(&running);
                    return Err(error);
                }
            }
        }
    }

    fn reply(&self, running: &mut Running, until: Deadline) -> Result<Reply, GuestError> {
        let Running { tag, what, cursor } = running;
        let reply = self.line.wait(cursor, what, until, |seen| {
            let mut taken = 0;
            while let Some(length) = find(&seen[taken..], b"\n") {
                let line = String::from_utf8_lossy(&seen[taken..taken + length]).into_owned();
                taken += length + 1;
                if let Some(reply) = Reply::parse(&line, tag) {
                    return (Some(reply), taken);
                }
            }
            (None, taken)
        })?;
        reply.map_err(|damage| self.line.failure(format!("before {what} came {damage}")))
    }
}

/// A line of the guest as a person reads it: what a command wrote is not in base64 there.
pub(super) fn readable(line: &str) -> String {
    let mut words = line.split(' ');
    match (words.next(), words.next()) {
        (Some("OUT"), Some(tag)) => match Reply::parse(line, tag) {
            Some(Ok(Reply::Output(bytes))) => {
                format!("{tag}: {}", String::from_utf8_lossy(&bytes).trim_end())
            }
            _ => line.to_owned(),
        },
        _ => line.to_owned(),
    }
}
