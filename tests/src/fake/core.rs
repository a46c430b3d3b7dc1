//! The fake as a whole: its machine, its rules, its clients. Runs one command at a time, and delivers what comes of it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::machine::{Machine, Props, text};
use super::rules::{Death, Delivery, Guest, Moment, Rules, Twist};
use super::{Effect, Failure};

/// What is written to a client.
pub(super) enum Chunk {
    Bytes(Vec<u8>),
    Pause(Duration),
    /// Answered when all before it is written.
    Flush(Sender<()>),
}

/// A client with a session.
pub(super) struct Client {
    pub(super) out: Sender<Chunk>,
    /// Events are for those who have negotiated.
    pub(super) negotiated: bool,
}

/// All of the fake. Reached through [`lock`].
pub(super) struct Core {
    pub(super) machine: Machine,
    pub(super) rules: Rules,
    pub(super) clients: BTreeMap<u64, Client>,
    pub(super) next_client: u64,
    /// Every command that was executed or refused, but those of the fake itself.
    calls: Vec<Value>,
    pub(super) dump: Option<PathBuf>,
    me: Weak<Mutex<Core>>,
}

/// One command as it came.
pub(super) struct Request<'a> {
    pub(super) monitor: &'a str,
    pub(super) client: u64,
    pub(super) id: Option<Value>,
    pub(super) name: &'a str,
    pub(super) arguments: Props,
    pub(super) fd: Option<OwnedFd>,
}

/// A command's result: what comes before the reply, the reply, and what comes after.
pub(super) struct Outcome {
    pub(super) before: Vec<Effect>,
    pub(super) reply: Value,
    pub(super) after: Vec<Effect>,
}

/// The core, whole even if a thread panicked while it held it: the fake then dies loudly in the test that used it.
pub(super) fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a rule or a call is about: the id among the arguments.
fn subject(arguments: &Props) -> String {
    let keys = ["id", "node-name", "fdname", "fdset-id", "device", "path"];
    let value = keys.iter().find_map(|key| arguments.get(*key));
    value.map_or_else(String::new, |value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// Executes one request, as the rules have it. Runs in its monitor's thread and may block that for long.
pub(super) fn handle(core: &Mutex<Core>, mut request: Request<'_>) {
    let own = request.name.starts_with("fake-") || request.monitor == super::CONTROL;
    let twists = if own {
        Vec::new()
    } else {
        let mut core = lock(core);
        core.calls.push(
            json!({"monitor": request.monitor, "execute": request.name, "arguments": request.arguments}),
        );
        core.rules.command(request.name, &subject(&request.arguments))
    };
    for twist in &twists {
        match twist {
            Twist::Late(ms) => std::thread::sleep(Duration::from_millis(*ms)),
            Twist::Hang => loop {
                std::thread::park();
            },
            Twist::Die(death, Moment::Before) => lock(core).die(*death),
            _ => {}
        }
    }
    let mut core = lock(core);
    let failure = twists.iter().find_map(|twist| match twist {
        Twist::Fail { class, desc } => Some(Failure { class: class.clone(), desc: desc.clone() }),
        _ => None,
    });
    let fd = request.fd.take();
    let outcome = failure.map_or_else(|| core.execute(&request, fd), Err);
    let (before, reply, after) = match outcome {
        Ok(Outcome { before, reply, after }) => (before, json!({"return": reply}), after),
        Err(Failure { class, desc }) => (vec![], json!({"error": {"class": class, "desc": desc}}), vec![]),
    };
    before.into_iter().for_each(|effect| core.perform(effect));
    core.twist(&twists, Moment::Executed);
    if !twists.contains(&Twist::Mute) {
        let tear = twists.iter().find_map(|twist| if let Twist::Tear(ms) = twist { Some(*ms) } else { None });
        core.reply(&request, reply, tear);
    }
    core.twist(&twists, Moment::After);
    after.into_iter().for_each(|effect| core.perform(effect));
}

impl Core {
    pub(super) fn new(machine: Machine, rules: Rules) -> Arc<Mutex<Core>> {
        Arc::new_cyclic(|me| {
            let clients = BTreeMap::new();
            let (calls, dump, next_client) = (Vec::new(), None, 0);
            Mutex::new(Core { machine, rules, clients, next_client, calls, dump, me: me.clone() })
        })
    }

    /// Events and deaths that the rules put before or after the reply.
    fn twist(&mut self, twists: &[Twist], now: Moment) {
        for twist in twists {
            match twist {
                Twist::Event { name, data, before } if *before == (now == Moment::Executed) => {
                    self.perform(Effect::event(name, data.clone()));
                }
                Twist::Eject(id) if now == Moment::After => self.perform(Effect::Remove(id.clone())),
                Twist::Die(death, moment) if *moment == now => self.die(*death),
                _ => {}
            }
        }
    }

    fn reply(&mut self, request: &Request<'_>, mut reply: Value, tear: Option<u64>) {
        if let (Some(id), Some(members)) = (&request.id, reply.as_object_mut()) {
            members.insert("id".to_owned(), id.clone());
        }
        let Some(client) = self.clients.get(&request.client) else { return };
        let mut line = reply.to_string().into_bytes();
        line.extend(b"\r\n");
        // A client that has gone needs no reply.
        let send = |chunk| drop(client.out.send(chunk));
        if let Some(ms) = tear {
            let rest = line.split_off(line.len() / 2);
            send(Chunk::Bytes(line));
            send(Chunk::Pause(Duration::from_millis(ms)));
            send(Chunk::Bytes(rest));
        } else {
            send(Chunk::Bytes(line));
        }
    }

    fn broadcast(&mut self, name: &str, data: &Value) {
        self.broadcast_of(SystemTime::now(), name, data);
    }

    /// An event of that moment: one that comes late says when it happened.
    fn broadcast_of(&mut self, moment: SystemTime, name: &str, data: &Value) {
        let now = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()}, "event": name,
        });
        if !data.is_null() {
            event["data"] = data.clone();
        }
        let line = format!("{event}\r\n").into_bytes();
        for client in self.clients.values().filter(|client| client.negotiated) {
            // A client that has gone needs no events.
            let _ = client.out.send(Chunk::Bytes(line.clone()));
        }
    }

    /// Makes an effect true, in so far as the rules let it.
    pub(super) fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Event(name, data) => {
                let id = data.as_object().map(subject).unwrap_or_default();
                match self.rules.event(&name, &id) {
                    Some(Delivery::Lose) => {}
                    Some(Delivery::Late(ms)) => {
                        let moment = SystemTime::now();
                        self.later(ms, move |core| core.broadcast_of(moment, &name, &data));
                    }
                    Some(Delivery::Twice) => {
                        self.broadcast(&name, &data);
                        self.broadcast(&name, &data);
                    }
                    None => self.broadcast(&name, &data),
                }
            }
            Effect::AskGuest(id) => {
                let guest = self.rules.unplug(&id);
                self.machine.answer(&id, &guest).into_iter().for_each(|effect| self.perform(effect));
            }
            Effect::Remove(id) => {
                self.machine.remove(&id).into_iter().for_each(|effect| self.perform(effect))
            }
            Effect::Later(ms, effects) => {
                self.later(ms, move |core| effects.into_iter().for_each(|effect| core.perform(effect)));
            }
            Effect::End => self.die(Death::Exit(0)),
        }
    }

    fn later(&self, ms: u64, act: impl FnOnce(&mut Core) + Send + 'static) {
        let Some(core) = self.me.upgrade() else { return };
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(ms));
            act(&mut lock(&core));
        });
    }

    /// Ends the process, after what was written has gone out.
    pub(super) fn die(&mut self, death: Death) {
        let (out, flushed) = channel();
        for client in self.clients.values() {
            // A client that has gone has nothing to flush.
            let _ = client.out.send(Chunk::Flush(out.clone()));
        }
        drop(out);
        let patience = Duration::from_secs(1);
        while flushed.recv_timeout(patience).is_ok() {}
        if let Some(dump) = &self.dump
            && let Err(error) = std::fs::write(dump, json!(self.machine.state()).to_string())
        {
            eprintln!("fake-qemu: {}: {error}", dump.display());
        }
        match death {
            Death::Exit(status) => std::process::exit(status),
            Death::Kill => {
                // It cannot fail: the process is our own.
                let _ = kill(Pid::this(), Signal::SIGKILL);
                loop {
                    std::thread::park();
                }
            }
        }
    }

    /// What ends the machine: SHUTDOWN, then the end.
    pub(super) fn shutdown(guest: bool, reason: &str) -> [Effect; 2] {
        [Effect::event("SHUTDOWN", json!({"guest": guest, "reason": reason})), Effect::End]
    }

    /// A device that leaves before the reply of its `device_del` does so here.
    pub(super) fn unplug(&mut self, id: &str) -> Result<Outcome, Failure> {
        let refuse_repeats = self.rules.refuses_repeats(id);
        let mut outcome = Outcome { before: Vec::new(), reply: json!({}), after: Vec::new() };
        for effect in self.machine.unplug(id, refuse_repeats)? {
            let Effect::AskGuest(id) = effect else { continue };
            let guest = self.rules.unplug(&id);
            let effects = self.machine.answer(&id, &guest);
            if guest == Guest::Early { outcome.before.extend(effects) } else { outcome.after.extend(effects) }
        }
        Ok(outcome)
    }

    /// The fake's own commands.
    pub(super) fn own(&mut self, name: &str, arguments: &Props) -> Result<Outcome, Failure> {
        let mut outcome = Outcome { before: Vec::new(), reply: json!({}), after: Vec::new() };
        let id = text(arguments, "id");
        match name {
            "fake-state" => outcome.reply = json!(self.machine.state()),
            "fake-calls" => outcome.reply = json!(self.calls),
            "fake-behave" => self.rules.add(text(arguments, "rules"), false).map_err(Failure::generic)?,
            "fake-forget" => {
                self.rules.clear();
                self.calls.clear();
            }
            "fake-emit" => {
                let data = arguments.get("data").cloned().unwrap_or_default();
                outcome.before.push(Effect::event(text(arguments, "event"), data));
            }
            "fake-eject" if self.machine.devices.iter().any(|device| device.id == id) => {
                outcome.before.push(Effect::Remove(id.to_owned()));
            }
            "fake-eject" => return Err(Failure::absent(id)),
            "fake-io-done" => self.machine.io_done(arguments)?,
            "fake-io-error" => outcome.before = self.machine.io_error(arguments)?,
            _ => {
                let desc = format!("The command {name} has not been found");
                return Err(Failure { class: "CommandNotFound".to_owned(), desc });
            }
        }
        Ok(outcome)
    }
}
