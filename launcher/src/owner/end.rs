//! The ways a VM stops: asked by a person or a signal, killed, by itself; and the way an owner leaves one running.

use std::time::Duration;

use devices::Placed;
use devices::host::IoProxy;
use nix::sys::signal::Signal as Unix;
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Locks, Owner, Reply, Signal, exit_words, not_now};
use qmp_client::KnownEvent;

use crate::control::event_line;
use crate::host::io_proxy;
use crate::launch::{GRACE, HELD, held_words};
use crate::process::{Exit, last_lines};
use crate::record::{Launch, Stage};
use crate::request::{Class, Failure, Shutdown};
use crate::status::VmState;
use crate::work::Workshop;

/// How an owner ended.
#[derive(Debug)]
pub enum Ending {
    /// QEMU has ended. What is left on the host is to be cleared by whoever ran the owner.
    Stopped {
        /// How, for people.
        reason: String,
        /// Whether somebody asked for it, or the guest did it in good order.
        in_order: bool,
        /// The last lines of QEMU's log, where it was not.
        last_words: String,
        /// The journal and the host, to clear up with.
        shop: Option<Box<Workshop>>,
        /// The record.
        launch: Box<Launch>,
        /// To be held until all is cleared up.
        locks: Locks,
    },
    /// The VM runs on without an owner.
    Left {
        /// To be held until the control sockets are gone.
        locks: Locks,
    },
}

/// What is under way to an end.
#[derive(Debug, Default)]
pub(super) struct Farewell {
    /// What QEMU said why it shuts down.
    pub(super) cause: Option<String>,
    /// Whether this owner is to leave.
    pub(super) leave: bool,
    shutdown: Option<(Instant, bool)>,
    press_again: Option<Instant>,
    waiting: Vec<(Instant, Reply)>,
    kill_at: Option<Instant>,
    /// When a QEMU that was killed counts as held by the kernel.
    held_at: Option<Instant>,
    killed: Vec<Reply>,
    reboot: Option<(Instant, Reply)>,
    signals: u32,
    silent_since: Option<Instant>,
}

/// How often SIGKILL is sent again.
const KILL_AGAIN: Duration = Duration::from_secs(5);
/// How long a job at work may take to learn that QEMU has ended.
const LAST_JOB: Duration = Duration::from_secs(5);
/// A guest that boots does not see the power button.
const PRESS_AGAIN: Duration = Duration::from_secs(3);
/// How long `qvirt run` waits for the guest after SIGTERM.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(90);
/// How long QEMU's last events may be on their way when it has ended already.
const LAST_EVENTS: Duration = Duration::from_millis(500);
/// How long after the monitor's end QEMU may take to end itself.
const SILENCE: Duration = Duration::from_secs(5);

impl Farewell {
    pub(super) fn is_ending(&self) -> bool {
        self.is_killing() || self.shutdown.is_some()
    }

    pub(super) fn is_killing(&self) -> bool {
        self.held_at.is_some()
    }

    fn is_held(&self) -> bool {
        self.held_at.is_some_and(|held| held <= Instant::now())
    }

    pub(super) fn next_wake(&self) -> impl Iterator<Item = Instant> {
        // Once it is killed nobody is answered before it has ended, or is known to be held.
        let deadlines =
            self.waiting.iter().map(|(deadline, _)| *deadline).min().filter(|_| !self.is_killing());
        let held = self.held_at.filter(|held| *held > Instant::now());
        let silence = self.silent_since.map(|since| since + SILENCE);
        let reboot = self.reboot.as_ref().map(|(deadline, _)| *deadline);
        [self.shutdown.map(|s| s.0), self.press_again, deadlines, held, self.kill_at, silence, reboot]
            .into_iter()
            .flatten()
    }

    /// Whether the monitor has been closed for long.
    pub(super) fn since_silence(&mut self, now: Instant) -> bool {
        *self.silent_since.get_or_insert(now) + SILENCE <= now
    }
}

impl Owner {
    /// Asks the guest to shut down, by the power button.
    pub(super) fn shut_down(&mut self, shutdown: &Shutdown, reply: Reply) {
        let Some(reply) = self.can_hear(reply) else { return };
        let deadline = Instant::now() + Duration::from_millis(shutdown.timeout_ms);
        self.farewell.waiting.push((deadline, reply));
        self.press(deadline, shutdown.then_kill);
    }

    /// Gives the reply back if the guest can be asked, and refuses otherwise.
    fn can_hear(&self, reply: Reply) -> Option<Reply> {
        if !matches!(self.run, VmState::Paused(_) | VmState::Starting) {
            return Some(reply);
        }
        let next = format!("`qvirt resume {vm}` first, or `qvirt kill {vm}`", vm = self.launch.vm);
        let _ =
            reply.send(Err(not_now(&format!("the VM is {}, so the guest cannot be asked", self.run), &next)));
        None
    }

    /// Restarts the guest in good order: the power button, and when the guest has shut down, a reset instead of QEMU's end.
    pub(super) fn reboot(&mut self, shutdown: &Shutdown, reply: Reply) {
        let Some(reply) = self.can_hear(reply) else { return };
        if self.farewell.is_ending() || self.farewell.reboot.is_some() {
            let _ = reply.send(Err(not_now("the VM is shutting down already", "wait for that to end")));
            return;
        }
        let deadline = Instant::now() + Duration::from_millis(shutdown.timeout_ms);
        self.farewell.reboot = Some((deadline, reply));
        let qmp = self.qmp.clone();
        tokio::spawn(async move {
            let stay = qmp.call("set-action", json!({"shutdown": "pause"})).await;
            let pressed = match stay {
                Ok(_) => qmp.call("system_powerdown", Value::Null).await,
                error => error,
            };
            pressed.map(drop).unwrap_or_else(|error| warn!(%error, "the guest could not be asked to reboot"));
        });
    }

    /// Resets the guest, as the reset button does. It drains every disk, so what is held is given back first: it ends with the reset.
    pub(super) fn reset(&mut self, reply: Reply) {
        self.io.give_back();
        let qmp = self.qmp.clone();
        tokio::spawn(async move {
            let reset = qmp.call("system_reset", Value::Null).await;
            let _ = reply.send(reset.map_err(|error| Failure::of(Class::Generic, &error)));
        });
    }

    /// The guest has shut down in the course of a reboot: reset, and go on.
    pub(super) fn go_on_rebooting(&mut self) {
        if self.run != VmState::Paused(crate::status::PauseReason::Shutdown) {
            return;
        }
        let Some((_, reply)) = self.farewell.reboot.take() else { return };
        self.farewell.cause = None;
        let qmp = self.qmp.clone();
        tokio::spawn(async move {
            let outcome = async {
                qmp.call("set-action", json!({"shutdown": "poweroff"})).await?;
                qmp.call("system_reset", Value::Null).await?;
                qmp.call("cont", Value::Null).await
            };
            let outcome = outcome.await.map(|_| json!({"outcome": "rebooted"}));
            let _ = reply.send(outcome.map_err(|error| Failure::of(Class::Generic, &error)));
        });
    }

    fn press(&mut self, deadline: Instant, then_kill: bool) {
        let then_kill = then_kill || self.farewell.shutdown.is_some_and(|(_, kill)| kill);
        self.farewell.shutdown = Some((deadline, then_kill));
        self.farewell.press_again = Some(Instant::now() + PRESS_AGAIN);
        let qmp = self.qmp.clone();
        tokio::spawn(async move {
            if let Err(error) = qmp.call("system_powerdown", Value::Null).await {
                warn!(%error, "the power button could not be pressed");
            }
        });
    }

    /// Ends QEMU: SIGTERM, so that it flushes, then SIGKILL; SIGKILL at once where a flush would wait for storage that is out of order.
    pub(super) fn kill(&mut self, reply: Option<Reply>) {
        self.farewell.killed.extend(reply);
        if self.farewell.is_killing() {
            if self.farewell.is_held() {
                self.tell_held();
            }
            return;
        }
        let now = Instant::now();
        self.farewell.held_at = Some(now + HELD);
        if self.io.any_suspended() {
            self.io.give_back();
            self.farewell.kill_at = Some(now);
        } else {
            self.farewell.kill_at = Some(now + GRACE);
            self.signal(Unix::SIGTERM);
        }
    }

    /// Tells everyone who waits for the end that the kernel holds QEMU.
    fn tell_held(&mut self) {
        let words = self.held_words().unwrap_or_default();
        let waiting = self.farewell.waiting.drain(..).map(|(_, reply)| reply);
        for reply in waiting.chain(self.farewell.killed.drain(..)) {
            let _ = reply.send(Err(Failure::new(Class::Pending, &words)));
        }
    }

    /// What is to be said of a QEMU that was killed and does not go.
    pub(super) fn held_words(&self) -> Option<String> {
        let any = self.io.any_suspended();
        let blamed = |disk: &&Placed| !any || self.io.is_suspended(&disk.id);
        let disks = self.layout.devices().iter().filter(blamed);
        let images = disks.filter_map(|disk| disk.config.image());
        self.farewell.is_held().then(|| held_words(&self.launch.vm, images))
    }

    fn signal(&self, signal: Unix) {
        if let Err(error) = self.process.signal(signal) {
            warn!(%error, "QEMU could not be signalled");
        }
    }

    pub(super) fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::Leave => self.farewell.leave = true,
            Signal::End => {
                self.farewell.signals += 1;
                let cannot_hear = matches!(self.run, VmState::Paused(_) | VmState::Starting);
                if self.farewell.signals > 1 || cannot_hear {
                    info!("ending QEMU");
                    self.kill(None);
                } else {
                    info!("shutting the guest down; a second signal kills it");
                    self.press(Instant::now() + SIGNAL_PATIENCE, true);
                }
            }
        }
    }

    /// Deadlines of shutdown and kill.
    pub(super) fn on_farewell_time(&mut self, now: Instant) {
        let due = |deadline: Option<Instant>| deadline.is_some_and(|d| d <= now);
        if let Some((deadline, then_kill)) = self.farewell.shutdown
            && deadline <= now
        {
            self.farewell.shutdown = None;
            self.farewell.press_again = None;
            if then_kill {
                self.kill(None);
            }
        }
        if due(self.farewell.press_again)
            && let Some((deadline, then_kill)) = self.farewell.shutdown
        {
            self.press(deadline, then_kill);
        }
        if due(self.farewell.kill_at) {
            // Again and again: a task in uninterruptible I/O ends when the I/O does.
            self.farewell.kill_at = Some(now + KILL_AGAIN);
            self.signal(Unix::SIGKILL);
        }
        if self.farewell.is_held() {
            self.tell_held();
        }
        if let Some((_, reply)) = self.farewell.reboot.take_if(|(deadline, _)| *deadline <= now) {
            let qmp = self.qmp.clone();
            tokio::spawn(
                async move { qmp.call("set-action", json!({"shutdown": "poweroff"})).await.map(drop) },
            );
            let desc = format!(
                "the guest has not shut down to reboot: `qvirt reset {}` resets it at once",
                self.launch.vm
            );
            let _ = reply.send(Err(Failure::new(Class::Pending, desc)));
        }
        if self.farewell.is_killing() {
            return;
        }
        let vm = self.launch.vm.to_string();
        for (_, reply) in self.farewell.waiting.extract_if(.., |(deadline, _)| *deadline <= now) {
            let desc = format!("the guest has not shut down yet: wait longer, or `qvirt kill {vm}`");
            let _ = reply.send(Err(Failure::new(Class::Pending, desc)));
        }
    }

    /// Ends a VM whose launch could not be finished.
    pub async fn abort(self) -> Ending {
        crate::launch::end(&self.process).await;
        let exit = self.process.exited().await;
        self.ended(exit).await
    }

    /// QEMU has ended.
    pub(super) async fn ended(mut self, exit: Exit) -> Ending {
        // The last events are still in the pipe.
        let last = async {
            while let Some(event) = self.events.next().await {
                let _ = self.broadcast.send(event_line(&event));
                if let KnownEvent::Shutdown(shutdown) = event.view() {
                    self.farewell.cause = Some(shutdown.reason.to_string());
                }
            }
        };
        let _ = tokio::time::timeout(LAST_EVENTS, last).await;
        let cause = self.farewell.cause.take();
        let asked = self.farewell.is_ending() || self.farewell.signals > 0;
        // Of an adopted QEMU the exit status is not ours to know; it says why it shuts down if it does so by itself.
        let in_order = asked || (cause.is_some() && (exit.success() || exit == Exit::Gone));
        let reason = match &cause {
            Some(cause) if exit.success() || exit == Exit::Gone => cause.clone(),
            Some(cause) => format!("{cause}; QEMU {}", exit_words(&exit)),
            None => format!("QEMU {}", exit_words(&exit)),
        };
        self.run = VmState::Stopped(reason.clone());
        self.publish();
        self.announce("QVIRT_STOPPED", json!({"reason": reason, "in-order": in_order}));
        let lines = self.hang_up();
        self.tell_stopped(&reason).await;
        for line in lines {
            let _ = line.await;
        }
        // A job at work learns from the closed connection, and brings the workshop home.
        let shop = self.shop_when_home().await;
        let last_words = if in_order { String::new() } else { last_lines(&self.log, 10) };
        Ending::Stopped {
            reason,
            in_order,
            last_words,
            shop,
            launch: Box::new(self.launch),
            locks: self.locks,
        }
    }

    /// Tells everyone who waits for the end. What a QEMU that was killed had given to io-proxies may still be on its way to their storage.
    async fn tell_stopped(&mut self, reason: &str) {
        let proxies = self.layout.devices().iter().filter_map(Placed::io_proxy).cloned().collect();
        let held = match self.farewell.held_at {
            Some(held_at) => {
                let until = held_at.into_std().max(std::time::Instant::now() + io_proxy::KILLED);
                let killing = tokio::task::spawn_blocking(move || io_proxy::kill(proxies, until));
                killing.await.unwrap_or_default()
            }
            None => Vec::new(),
        };
        let words = held_words(&self.launch.vm, held.iter().flat_map(IoProxy::images));
        let reboot = self.farewell.reboot.take();
        let waiting = self.farewell.waiting.drain(..).chain(reboot).map(|(_, reply)| reply);
        for reply in waiting.chain(self.farewell.killed.drain(..)) {
            let _ = reply.send(match held.as_slice() {
                [] => Ok(json!({"outcome": "stopped", "reason": reason})),
                _ => Err(Failure::new(Class::Pending, &words)),
            });
        }
    }

    async fn shop_when_home(&mut self) -> Option<Box<Workshop>> {
        let wait = async {
            while self.shop.is_none() {
                match self.jobs.join_next().await {
                    Some(Ok(super::Finished::Work(shop, outcome))) => self.on_outcome(shop, outcome),
                    Some(_) => {}
                    None => return,
                }
            }
        };
        let _ = tokio::time::timeout(LAST_JOB, wait).await;
        self.shop.take()
    }

    /// This owner leaves; the VM runs on.
    pub(super) fn left(self) -> Ending {
        let pending = self.stages.values().filter(|stage| **stage == Stage::Leaving).count();
        info!(vm = %self.launch.vm, pending, "leaving the VM without an owner; `qvirt run` adopts it");
        Ending::Left { locks: self.locks }
    }
}
