//! What host and agent say to each other: lines of text, on a serial console or a virtio-serial port, each line on its own.
//!
//! ```text
//! host   RUN <tag> <base64 of a shell script>             /bin/sh runs it
//! host   EXEC <tag> <base64 of {"program", "args", "env"}>  the same for a program, without a shell
//! host   KILL <tag>                                       SIGKILL to the process group of that command
//! agent  OUT <tag> <base64>                               a piece of its output, standard error included, as soon as it comes
//! agent  END <tag> <exit status>                          128 and the signal's number if a signal ended it
//! ```
//!
//! A tag is a word of the host's choice. Several commands may run at once. Lines that are none of these are passed over: the kernel too
//! writes on a console, and a host that died may leave half a line, which the next host ends with an empty one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base64::{decode, encode};

/// What init says first on the console: it works, and nothing else was done yet.
pub const INIT: &str = "QVIRT-GUEST-INIT";
/// What the agent says on a console when it starts, and on a port when it sees that a peer came: commands are read from now on. A peer that
/// comes at once when another has left is not seen to come.
pub const READY: &str = "QVIRT-GUEST-READY";
/// The exit status of a command that could not be started, as shells have it; its output says why.
pub const NOT_STARTED: i32 = 127;

/// A program to be run without a shell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its path, or a name to be looked for in the agent's `PATH`; `agent` is the agent itself.
    pub program: String,
    /// Its arguments, the name not among them.
    #[serde(default)]
    pub args: Vec<String>,
    /// Variables beside those that it inherits from the agent.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// What the host wants of the command with a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Run this shell script.
    Script(String),
    /// Run this program.
    Program(Program),
    /// Kill it.
    Kill,
}

/// A line of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The host's name for the command.
    pub tag: String,
    /// What is to be done.
    pub wish: Wish,
}

/// A line that is no request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoRequest {
    /// It was not meant for the agent.
    Foreign,
    /// It begins like a request, and the rest is damaged.
    Broken {
        /// The command it asked for.
        tag: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Request {
    /// The line, its end included.
    pub fn line(&self) -> String {
        let tag = &self.tag;
        match &self.wish {
            Wish::Script(script) => format!("RUN {tag} {}\n", encode(script.as_bytes())),
            Wish::Program(program) => {
                // A struct of strings has a JSON form.
                let json = serde_json::json!(program).to_string();
                format!("EXEC {tag} {}\n", encode(json.as_bytes()))
            }
            Wish::Kill => format!("KILL {tag}\n"),
        }
    }

    /// Reads a line without its end.
    pub fn parse(line: &str) -> Result<Request, NoRequest> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let wish = match words[..] {
            ["RUN", tag, script] => text(tag, script).map(Wish::Script),
            // A script of no bytes.
            ["RUN", _] => Ok(Wish::Script(String::new())),
            ["EXEC", tag, program] => text(tag, program).and_then(|json| {
                serde_json::from_str(&json)
                    .map(Wish::Program)
                    .map_err(|e| broken(tag, format!("not a program: {e}")))
            }),
            ["KILL", _] => Ok(Wish::Kill),
            _ => Err(NoRequest::Foreign),
        };
        wish.map(|wish| Request { tag: words[1].to_owned(), wish })
    }
}

fn broken(tag: &str, reason: String) -> NoRequest {
    NoRequest::Broken { tag: tag.to_owned(), reason }
}

fn text(tag: &str, word: &str) -> Result<String, NoRequest> {
    let bytes = decode(word.as_bytes()).ok_or_else(|| broken(tag, "the text is not base64".to_owned()))?;
    String::from_utf8(bytes).map_err(|_| broken(tag, "the text is not UTF-8".to_owned()))
}

/// A line of the agent about one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It wrote this.
    Output(Vec<u8>),
    /// It ended with this status.
    End(i32),
}

impl Reply {
    /// The line, its end included.
    pub fn line(&self, tag: &str) -> String {
        match self {
            Reply::Output(bytes) => format!("OUT {tag} {}\n", encode(bytes)),
            Reply::End(status) => format!("END {tag} {status}\n"),
        }
    }

    /// Reads a line without its end: `None` if it is not about that command, an error if it is and is damaged. Half a line of somebody else
    /// may stand before it.
    pub fn parse(line: &str, tag: &str) -> Option<Result<Reply, String>> {
        let after = |word: &str| {
            let start = format!("{word} {tag} ");
            line.find(&start).map(|at| line[at + start.len()..].trim_ascii())
        };
        let damaged = |what: &str| format!("a damaged {what}: {line:?}");
        if let Some(text) = after("OUT") {
            return Some(
                decode(text.as_bytes()).map(Reply::Output).ok_or_else(|| damaged("piece of output")),
            );
        }
        after("END").map(|status| status.parse().map(Reply::End).map_err(|_| damaged("exit status")))
    }
}

/// Cuts bytes, as they come, into lines.
#[derive(Debug, Default)]
pub struct Lines {
    begun: Vec<u8>,
}

/// More bytes than any line of the protocol has. What has no end by then is not a line.
const LONGEST: usize = 1 << 20;

impl Lines {
    /// The lines that these bytes end, without their ends.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                lines.push(String::from_utf8_lossy(&self.begun).trim_end().to_owned());
                self.begun.clear();
            } else if self.begun.len() > LONGEST {
                self.begun.clear();
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, NoRequest, Program, Reply, Request, Wish};

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let program = Program {
            program: "dd".to_owned(),
            args: vec!["if=/dev/zero".to_owned(), "a b".to_owned()],
            env: [("A".to_owned(), "1".to_owned())].into(),
        };
        for wish in [
            Wish::Script("echo \"ä\n\"".to_owned()),
            Wish::Script(String::new()),
            Wish::Program(program),
            Wish::Kill,
        ] {
            let request = Request { tag: "t1".to_owned(), wish };
            assert_eq!(Request::parse(request.line().trim_end_matches('\n')), Ok(request));
        }
    }

    #[test]
    fn foreign_and_broken_lines_are_told_apart() {
        for line in ["", "RUN", "[    1.0] RUN away", "END t1 0", "KILL", "RUN a b c"] {
            assert_eq!(Request::parse(line), Err(NoRequest::Foreign), "{line}");
        }
        for (line, word) in [("RUN t1 !!", "base64"), ("EXEC t1 e30=", "program"), ("RUN t1 /w==", "UTF-8")] {
            match Request::parse(line) {
                Err(NoRequest::Broken { tag, reason }) => {
                    assert!(tag == "t1" && reason.contains(word), "{reason}")
                }
                other => panic!("{line}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_reply_is_found_behind_half_a_line_and_only_by_its_tag() {
        let line = Reply::Output(b"hello".to_vec()).line("t1");
        assert_eq!(Reply::parse(line.trim_end(), "t1"), Some(Ok(Reply::Output(b"hello".to_vec()))));
        assert_eq!(Reply::parse("[ 1.0] kernelEND t1 137", "t1"), Some(Ok(Reply::End(137))));
        assert_eq!(Reply::parse("END t12 0", "t1"), None);
        assert!(matches!(Reply::parse("OUT t1 a[  1.2] kernel", "t1"), Some(Err(_))));
        assert!(matches!(Reply::parse("END t1 0[ 1.2]", "t1"), Some(Err(_))));
    }

    #[test]
    fn lines_are_cut_wherever_the_bytes_were() {
        let mut lines = Lines::default();
        assert!(lines.push(b"RUN t").is_empty());
        assert_eq!(lines.push(b"1 eA==\r\n\nKI"), ["RUN t1 eA==", ""]);
        assert_eq!(lines.push(b"LL t1\n"), ["KILL t1"]);
        assert!(lines.push(&vec![0; 2 << 20]).is_empty() && lines.begun.is_empty());
    }
}
