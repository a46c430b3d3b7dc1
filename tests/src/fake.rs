//! A fake QEMU for what a real one cannot be made to do: the program `fake-qemu`, how a test tells it to behave, and how a test looks
//! inside it.
//!
//! The fake takes the command line that qvirt prints, keeps a model of objects, nodes, netdevs, chardevs, descriptors and devices, and
//! speaks QMP on its monitors. It refuses what QEMU 10.0.2 refuses, in its words; the test `alike` holds both to the same script. It has no
//! guest: one is played by rules.
//!
//! Four variables of its environment: `QVIRT_FAKE` holds rules, `QVIRT_FAKE_VERSION` the version to play (`7.2`, else 10.0),
//! `QVIRT_FAKE_CONTROL` a path on which it listens for a [`Control`], `QVIRT_FAKE_DUMP` a file that gets its [`State`] at the end.
//!
//! # Rules
//!
//! Separated by `;` or newlines, each `SUBJECT: ACTION`. A rule that begins with `probe ` holds only in the run with `-M none` in which
//! qvirt asks what this QEMU can do; all others hold only in a real launch.
//!
//! | subject | action |
//! |---|---|
//! | `COMMAND[@ID][#N]`, `*` for any: calls of a command, of those about ID, the Nth of those (from the rule on, the first is 1) | `fail CLASS DESC`; `late MS`: its monitor answers nothing for so long, then executes; `hang`: never executed, its monitor is stuck; `mute`: executed, no reply; `tear MS`: the reply comes in two halves; `exit STATUS MOMENT`, `kill MOMENT`: dies `before` executing, `executed` before the reply, or `after` it; `event-before NAME [DATA]`, `event-after NAME [DATA]`: any event beside the reply; `eject ID`: a device leaves unasked |
//! | `event NAME[@ID][#N]` | `lose`, `twice`, `late MS` |
//! | `guest[@ID]` (a device; the last rule that fits holds) | `unplug remove` (the default, right after the reply), `unplug early` (before the reply), `unplug late MS`, `unplug refuse`, `unplug ignore [TIMES]`; `repeat refuse`: a second request is "already in the process of unplug"; `powerdown ignore` |
//! | `start` | `die STATUS MESSAGE`; `mute`: lives, and never greets |
//!
//! # Commands of its own
//!
//! On every monitor: `fake-state`, `fake-calls` (what it was told so far), `fake-behave {rules}`, `fake-forget` (rules and calls),
//! `fake-emit {event, data}`, `fake-eject {id}`, `fake-io-error {id, operation, action, nospace, reason}`,
//! `fake-io-done {id, count}` (requests of a disk, for its statistics).

mod argv;
mod backends;
mod commands;
mod control;
mod core;
mod devices;
mod machine;
mod monitor;
mod program;
mod qom;
mod rules;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use control::Control;
pub use program::main;

use crate::qemu::QemuVersion;

const RULES_VARIABLE: &str = "QVIRT_FAKE";
const VERSION_VARIABLE: &str = "QVIRT_FAKE_VERSION";
const RETRIES_VARIABLE: &str = "QVIRT_FAKE_RETRIES";
const CONTROL_VARIABLE: &str = "QVIRT_FAKE_CONTROL";
const DUMP_VARIABLE: &str = "QVIRT_FAKE_DUMP";
/// The name of the monitor that is a test's own: no rule holds there.
const CONTROL: &str = "control";

/// An error that QEMU answers.
#[derive(Debug)]
struct Failure {
    class: String,
    desc: String,
}

impl Failure {
    fn generic(desc: String) -> Failure {
        Failure { class: "GenericError".to_owned(), desc }
    }

    fn absent(id: &str) -> Failure {
        Failure { class: "DeviceNotFound".to_owned(), desc: format!("Device '{id}' not found") }
    }
}

/// What comes of a command beside its reply.
#[derive(Clone, Debug)]
enum Effect {
    Event(String, Value),
    /// The guest is asked to let go of a device.
    AskGuest(String),
    /// A device is gone.
    Remove(String),
    /// These, in this order, after so many milliseconds.
    Later(u64, Vec<Effect>),
    /// The process ends.
    End,
}

impl Effect {
    fn event(name: &str, data: Value) -> Effect {
        Effect::Event(name.to_owned(), data)
    }
}

/// What the fake has: the names of everything. Two of them are compared before and after.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Block nodes.
    pub nodes: BTreeSet<String>,
    /// Netdevs.
    pub netdevs: BTreeSet<String>,
    /// Character devices, those of the monitors among them.
    pub chardevs: BTreeSet<String>,
    /// Objects.
    pub objects: BTreeSet<String>,
    /// Names of `getfd`, as `MONITOR:NAME`.
    pub fds: BTreeSet<String>,
    /// Descriptor sets.
    pub fdsets: BTreeSet<u64>,
    /// Devices.
    pub devices: BTreeSet<String>,
}

impl State {
    /// The state in a file that a fake wrote at its end. Panics when there is none.
    pub fn dumped(file: &Path) -> State {
        let text = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
    }
}

/// How a fake is to behave, as the environment of whoever starts it.
#[derive(Clone, Debug, Default)]
pub struct Fake {
    rules: Vec<String>,
    version: Option<QemuVersion>,
    retries: bool,
    control: Option<PathBuf>,
    dump: Option<PathBuf>,
}

impl Fake {
    /// The program, for `qemu = "..."` of a VM file. Panics, saying what to run, when it is not built.
    pub fn binary() -> PathBuf {
        program_beside_the_test("fake-qemu")
    }

    /// A fake that behaves well.
    pub fn new() -> Fake {
        Fake::default()
    }

    /// Adds rules. Panics on a text that is none.
    #[must_use]
    pub fn rule(mut self, text: &str) -> Fake {
        for probing in [false, true] {
            rules::Rules::default().add(text, probing).unwrap_or_else(|why| panic!("{why}"));
        }
        self.rules.push(text.to_owned());
        self
    }

    /// Fails the `nth` call of a command with GenericError.
    #[must_use]
    pub fn fail(self, command: &str, nth: usize, desc: &str) -> Fake {
        self.rule(&format!("{command}#{nth}: fail GenericError {desc}"))
    }

    /// Plays this version of QEMU.
    #[must_use]
    pub fn version(mut self, version: QemuVersion) -> Fake {
        self.version = Some(version);
        self
    }

    /// Says that it retries failed I/O by itself, as openEuler's QEMU does; the test sends the events.
    #[must_use]
    pub fn retries(mut self) -> Fake {
        self.retries = true;
        self
    }

    /// Listens on this path for a [`Control`].
    #[must_use]
    pub fn control(mut self, socket: &Path) -> Fake {
        self.control = Some(socket.to_owned());
        self
    }

    /// Writes its [`State`] to this file at its end, however it comes, but for a SIGKILL from outside.
    #[must_use]
    pub fn dump(mut self, file: &Path) -> Fake {
        self.dump = Some(file.to_owned());
        self
    }

    /// The environment variables: for `Command::envs` of qvirt, or of the fake itself.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut variables = vec![(RULES_VARIABLE, self.rules.join("\n"))];
        variables.extend(self.version.map(|version| (VERSION_VARIABLE, version.name().to_owned())));
        variables.extend(self.retries.then(|| (RETRIES_VARIABLE, "1".to_owned())));
        variables.extend(self.control.as_ref().map(|socket| (CONTROL_VARIABLE, path(socket))));
        variables.extend(self.dump.as_ref().map(|file| (DUMP_VARIABLE, path(file))));
        variables
    }
}

/// A program of this package, built with the test that runs: in the folder of its cargo profile. Panics, saying what to run, when missing.
pub(crate) fn program_beside_the_test(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    let found = test.ancestors().skip(1).take(3).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("there is no {name} in the folders above {}: run `cargo build -p tests`", test.display())
    })
}
