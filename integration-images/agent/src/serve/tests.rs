//! The protocol over a pair of sockets, with commands of this machine.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::Line;
use crate::protocol::{NOT_STARTED, Program, READY, Reply, Request, Wish};

/// The host's end of a line that is served.
struct Host(BufReader<UnixStream>);

impl Host {
    fn new() -> Host {
        let (host, agent) = UnixStream::pair().expect("a pair of sockets");
        host.set_read_timeout(Some(Duration::from_secs(30))).expect("a deadline");
        Line::socket(agent).expect("a line").serve_in_background().expect("a thread");
        let mut host = Host(BufReader::new(host));
        assert_eq!(host.line(), READY);
        host
    }

    fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("the agent listens");
    }

    fn ask(&mut self, tag: &str, wish: Wish) {
        self.say(&Request { tag: tag.to_owned(), wish }.line());
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the agent answers in time");
        line.trim_end().to_owned()
    }

    fn reply(&mut self, tag: &str) -> Reply {
        loop {
            let line = self.line();
            if let Some(reply) = Reply::parse(&line, tag) {
                return reply.expect("a whole line");
            }
        }
    }

    /// The rest of the output, and the exit status.
    fn end(&mut self, tag: &str) -> (String, i32) {
        let mut output = Vec::new();
        loop {
            match self.reply(tag) {
                Reply::Output(bytes) => output.extend(bytes),
                Reply::End(status) => return (String::from_utf8(output).expect("text"), status),
            }
        }
    }

    fn run(&mut self, script: &str) -> (String, i32) {
        self.ask("run", Wish::Script(script.to_owned()));
        self.end("run")
    }
}

#[test]
fn scripts_and_programs_run_and_tell_how_they_ended() {
    let mut host = Host::new();
    assert_eq!(host.run("echo out; echo err >&2; exit 7"), ("out\nerr\n".to_owned(), 7));
    assert_eq!(host.run("kill -TERM $$"), (String::new(), 143));
    assert_eq!(host.run("read -r line; echo \"<$line>\""), ("<>\n".to_owned(), 0));
    let long = "x".repeat(50_000);
    assert_eq!(host.run(&format!("printf %s {long}")), (long, 0));

    let program = |program: &str, args: &[&str]| {
        Wish::Program(Program {
            program: program.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: [("WORD".to_owned(), "a b".to_owned())].into(),
        })
    };
    host.ask("t", program("sh", &["-c", "echo \"$1 $WORD\"", "sh", "*"]));
    assert_eq!(host.end("t"), ("* a b\n".to_owned(), 0));
    host.ask("t", program("/no/such/program", &[]));
    let (output, status) = host.end("t");
    assert!(status == NOT_STARTED && output.contains("cannot start /no/such/program"), "{output}");
}

#[test]
fn torn_and_foreign_lines_are_passed_over_and_broken_ones_refused() {
    let mut host = Host::new();
    host.say("RUN half ZWNob\n[  1.0] kernel: RUN\n\r\n");
    let (output, status) = host.end("half");
    assert!(status == NOT_STARTED && output.contains("base64"), "{output}");
    host.say("RUN torn !!\nRUN whole ZWNo");
    let (output, status) = host.end("torn");
    assert!(status == NOT_STARTED && output.contains("base64"), "{output}");
    host.say("byBoaQ==\n");
    assert_eq!(host.end("whole"), ("hi\n".to_owned(), 0));
}

#[test]
fn output_comes_while_the_command_runs_and_half_a_line_does_not_wait_for_the_other() {
    let mut host = Host::new();
    let folder = tempfile::tempdir().expect("a folder");
    let go = folder.path().join("go");
    let wait = format!("until [ -e {} ]; do sleep 0.02; done", go.display());
    host.ask(
        "t",
        Wish::Script(format!("echo one; {wait}; rm {0}; printf half; {wait}; echo two", go.display())),
    );
    assert_eq!(host.reply("t"), Reply::Output(b"one\n".to_vec()));
    std::fs::write(&go, "").expect("a file");
    assert_eq!(host.reply("t"), Reply::Output(b"half".to_vec()));
    std::fs::write(&go, "").expect("a file");
    assert_eq!(host.end("t"), ("two\n".to_owned(), 0));
}

#[test]
fn several_run_at_once_and_each_is_killed_by_its_tag() {
    let mut host = Host::new();
    host.ask("a", Wish::Script("echo up; sleep 1000 & sleep 1000".to_owned()));
    assert_eq!(host.reply("a"), Reply::Output(b"up\n".to_vec()));
    // The same tag once more is a line that came twice.
    host.ask("a", Wish::Script("echo twice".to_owned()));
    host.ask("b", Wish::Script("echo b".to_owned()));
    assert_eq!(host.end("b"), ("b\n".to_owned(), 0));
    host.ask("nobody", Wish::Kill);
    host.ask("a", Wish::Kill);
    assert_eq!(host.end("a"), (String::new(), 137));
}

#[test]
fn lines_of_several_commands_are_never_mixed() {
    let mut host = Host::new();
    let tags = ["a", "b", "c"];
    for tag in tags {
        host.ask(
            tag,
            Wish::Script(format!("n=0; while [ $n -lt 200 ]; do echo {tag}-$n; n=$((n + 1)); done")),
        );
    }
    let (mut outputs, mut ended) = ([const { String::new() }; 3], 0);
    while ended < tags.len() {
        let line = host.line();
        let (place, reply) = tags
            .iter()
            .enumerate()
            .find_map(|(place, tag)| Some((place, Reply::parse(&line, tag)?)))
            .unwrap_or_else(|| panic!("whose line is {line:?}"));
        match reply.expect("a whole line") {
            Reply::Output(bytes) => outputs[place].push_str(&String::from_utf8(bytes).expect("text")),
            Reply::End(status) => ended += 1 + usize::from(status != 0) * 1000,
        }
    }
    for (tag, output) in tags.iter().zip(outputs) {
        let expected: String = (0..200).map(|n| format!("{tag}-{n}\n")).collect();
        assert_eq!(output, expected);
    }
}

#[test]
fn a_child_in_the_background_neither_delays_the_end_nor_dies_of_it() {
    let mut host = Host::new();
    let folder = tempfile::tempdir().expect("a folder");
    let (go, done) = (folder.path().join("go"), folder.path().join("done"));
    let job =
        format!("until [ -e {} ]; do sleep 0.02; done; echo late; echo x >{}", go.display(), done.display());
    let begin = Instant::now();
    assert_eq!(
        host.run(&format!("({job}) & echo early; yes x | head -c 20000 | wc -c")),
        ("early\n20000\n".to_owned(), 0)
    );
    std::fs::write(&go, "").expect("a file");
    while !done.exists() {
        assert!(begin.elapsed() < Duration::from_secs(30), "the child died when it wrote");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(host.run("echo next"), ("next\n".to_owned(), 0));
}

#[test]
fn a_host_that_leaves_does_not_end_a_command() {
    let mut host = Host::new();
    let folder = tempfile::tempdir().expect("a folder");
    let done = folder.path().join("done");
    let script = format!("echo up; sleep 0.2; head -c 300000 /dev/zero; echo x >{}", done.display());
    host.ask("t", Wish::Script(script));
    assert_eq!(host.reply("t"), Reply::Output(b"up\n".to_vec()));
    drop(host);
    let begin = Instant::now();
    while !done.exists() {
        assert!(begin.elapsed() < Duration::from_secs(30), "the command hangs without its host");
        std::thread::sleep(Duration::from_millis(10));
    }
}
