//! What a disk does when its storage fails: QEMU's error policies, and I/O that is held and retried while the guest runs on.
//!
//! Owns table `on_error`, the choice of the engine that retries, and what each engine wants of the device. The engines themselves are not
//! here: `native` is QEMU's own, the others are the owner's work on this configuration.
//!
//! | engine | the device's policy where it retries | the layers' files |
//! |---|---|---|
//! | `native` | `retry`, with interval and timeout | opened by QEMU |
//! | `hold`, `pause` | `stop`: failed requests wait in the device | opened by QEMU |
//! | `proxy` | `enospc`: the proxy parks requests by answering ENOSPC, and reports by answering EIO | opened by the proxy, NBD to QEMU |

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::PciSeat;
use crate::capabilities::Capabilities;
use crate::disk::{DiskBus, DiskConfig};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::text::words;
use crate::units::Millis;

words! {
    /// What happens at a failed read or write.
    ErrorPolicy, "error policy" {
        /// Tells the guest. QEMU's default for reads.
        Report = "report",
        /// Goes on as if nothing had happened.
        Ignore = "ignore",
        /// Stops the VM when the host has no space left, tells the guest otherwise. QEMU's default for writes.
        Enospc = "enospc",
        /// Stops the VM.
        Stop = "stop",
        /// QEMU's default for the device.
        Auto = "auto",
        /// Holds the I/O and retries it, by an [`Engine`].
        Retry = "retry",
    }
}

words! {
    /// Who retries.
    Engine, "engine" {
        /// QEMU itself, where it can.
        Native = "native",
        /// The owner: the requests wait in a node of its own while the guest runs.
        Hold = "hold",
        /// A process between QEMU and the image.
        Proxy = "proxy",
        /// The owner: the VM is paused between two retries.
        Pause = "pause",
    }
}

words! {
    /// Who is to retry.
    EngineWish, "engine" {
        /// The first of `native`, `hold` and `proxy` that can do what is asked on this QEMU.
        Auto = "auto",
        /// [`Engine::Native`]
        Native = "native",
        /// [`Engine::Hold`]
        Hold = "hold",
        /// [`Engine::Proxy`]
        Proxy = "proxy",
        /// [`Engine::Pause`]
        Pause = "pause",
    }
}

words! {
    /// What happens when the time to retry is over.
    AtTimeout, "act at the timeout" {
        /// The guest is told of the error.
        Report = "report",
        /// The user is told, and the I/O goes on being held and retried.
        Hold = "hold",
        /// The VM is paused.
        Pause = "pause",
        /// The disk is unplugged.
        Unplug = "unplug",
    }
}

/// Table `on_error`. All but `read` and `write` are for a policy `retry`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnError {
    /// `rerror` of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<ErrorPolicy>,
    /// `werror` of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<ErrorPolicy>,
    /// Time between two retries. Default: 1 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Millis>,
    /// How long to retry. Default: `0ms`, for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Millis>,
    /// What happens then. Default: `report`; of engine `pause`: `pause`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_timeout: Option<AtTimeout>,
    /// Who retries. Default: `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineWish>,
}

/// What a disk does at an error, QEMU's defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// At a failed read.
    pub read: ErrorPolicy,
    /// At a failed write.
    pub write: ErrorPolicy,
}

/// How a disk retries, every default filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Who retries.
    pub engine: Engine,
    /// Whether failed reads are retried.
    pub read: bool,
    /// Whether failed writes and flushes are retried.
    pub write: bool,
    /// Time between two retries.
    pub interval: Millis,
    /// How long to retry; `None`: for ever.
    pub timeout: Option<Millis>,
    /// What happens then.
    pub at_timeout: AtTimeout,
}

const HOLD_SCSI_REPORT: &str = "a SCSI disk's held requests can only be failed by unplugging it: write engine = \"proxy\", or at_timeout = \
    \"hold\", \"pause\" or \"unplug\"";
const LOST_INTERRUPTS: &str = "this QEMU may lose the interrupt of a disk in an iothread when the VM is stopped, as this engine does at each \
    attempt, and the guest would wait for ever: write engine = \"proxy\", or take the disk out of the iothread";
const NO_UNPLUG: &str =
    "pcie.0 and conventional PCI buses take no hot-unplug: give the disk a root port, or another at_timeout";
const PAUSE_OTHERWISE: &str = "the VM is paused from the first error on and stays so: write at_timeout = \"pause\", or engine = \"auto\"";

impl OnError {
    /// The policies, QEMU's defaults filled in.
    pub fn policies(&self) -> Policies {
        let or = |policy: Option<ErrorPolicy>, default| match policy {
            None | Some(ErrorPolicy::Auto) => default,
            Some(policy) => policy,
        };
        Policies { read: or(self.read, ErrorPolicy::Report), write: or(self.write, ErrorPolicy::Enospc) }
    }

    /// How long to retry, if not for ever.
    fn timeout(&self) -> Option<Millis> {
        self.timeout.filter(|timeout| timeout.as_millis() > 0)
    }

    fn at_timeout(&self, engine: Engine) -> AtTimeout {
        let default = if engine == Engine::Pause { AtTimeout::Pause } else { AtTimeout::Report };
        self.at_timeout.unwrap_or(default)
    }

    /// Whether a direction that does not retry is asked to stop the VM.
    fn stops(&self) -> bool {
        [self.read, self.write].iter().any(|p| matches!(p, Some(ErrorPolicy::Stop | ErrorPolicy::Enospc)))
    }
}

impl Retry {
    /// Time between two retries when none is given, as in the QEMU that retries by itself.
    pub const INTERVAL: Millis = Millis::new(1000);

    /// Shortest time between two retries of every engine but `native`.
    pub const SHORTEST: Millis = Millis::new(100);

    /// The longest time: QEMU takes a signed 64-bit number of milliseconds.
    pub const LONGEST: Millis = Millis::new(i64::MAX as u64);

    /// What the device itself is told to do where it retries.
    fn policy(&self) -> ErrorPolicy {
        match self.engine {
            Engine::Native => ErrorPolicy::Retry,
            Engine::Hold | Engine::Pause => ErrorPolicy::Stop,
            // The proxy's answer decides: ENOSPC leaves the request in the device, every other error goes to the guest.
            Engine::Proxy => ErrorPolicy::Enospc,
        }
    }

    /// Whether a running disk may retry so from now on; otherwise why not. `act`: what was asked for at the timeout.
    pub fn check_change(&self, disk: &DiskConfig, act: Option<AtTimeout>) -> Result<(), &'static str> {
        if self.interval < Retry::SHORTEST {
            return Err("the interval is 100ms at least");
        }
        if self.timeout.is_none() {
            return match act {
                Some(_) => {
                    Err("it retries for ever, so an at_timeout would be without effect: give a timeout too")
                }
                None => Ok(()),
            };
        }
        if self.at_timeout == AtTimeout::Unplug && !disk.is_unpluggable() {
            return Err(NO_UNPLUG);
        }
        let is_blk = disk.bus() == DiskBus::VirtioBlk;
        match (self.engine, self.at_timeout) {
            (Engine::Hold, AtTimeout::Report) if !is_blk => Err(HOLD_SCSI_REPORT),
            (Engine::Pause, at_timeout) if at_timeout != AtTimeout::Pause => Err(PAUSE_OTHERWISE),
            _ => Ok(()),
        }
    }

    /// What is allowed and yet worth a word.
    pub fn warning(&self) -> Option<&'static str> {
        let busy = self.engine == Engine::Native && self.interval.as_millis() == 0;
        busy.then_some(
            "on_error.interval = 0ms: QEMU retries without a pause and takes a whole processor while the storage fails; write \
             interval = \"1s\"",
        )
    }
}

/// One line for people: what is retried by whom, how often, and what happens at the timeout.
impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.read, self.write) {
            (true, true) => "reads and writes",
            (true, false) => "reads",
            _ => "writes",
        };
        let Retry { engine, interval, .. } = self;
        let paused = if *engine == Engine::Pause { ", the VM paused" } else { "" };
        write!(f, "engine {engine} retries {what} every {interval}{paused}, ")?;
        let Some(timeout) = self.timeout else { return f.write_str("for ever") };
        let then = match (self.at_timeout, self.engine) {
            // Nothing can fail a held flush of virtio-blk: see the table of engines.
            (AtTimeout::Report, Engine::Hold) => "the guest gets the error; its flushes wait for the repair",
            (AtTimeout::Report, _) => "the guest gets the error",
            (AtTimeout::Hold, _) => "the user is told and the I/O stays held",
            (AtTimeout::Pause, Engine::Pause) => "the VM stays paused",
            (AtTimeout::Pause, _) => "the VM is paused",
            (AtTimeout::Unplug, _) => "the disk is unplugged",
        };
        write!(f, "for {timeout}, then {then}")
    }
}

impl DiskConfig {
    /// How it retries on this QEMU; `None` where neither direction does. `threaded`: whether an iothread does its I/O. Errors: what cannot be
    /// honoured, or would be without effect.
    pub fn retry(
        &self,
        id: &DeviceId,
        threaded: bool,
        qemu: &Capabilities,
    ) -> Result<Option<Retry>, Refusal> {
        let errors = self.on_error.unwrap_or_default();
        let (read, write) =
            (errors.read == Some(ErrorPolicy::Retry), errors.write == Some(ErrorPolicy::Retry));
        self.check_effect(id, &errors, read || write)?;
        if !read && !write {
            return Ok(None);
        }
        let engine = self.engine(id, threaded, &errors, qemu)?;
        let interval = errors.interval.unwrap_or(Retry::INTERVAL);
        if engine != Engine::Native && interval < Retry::SHORTEST {
            let rule = format!(
                "engine {engine} retries every {} at most: write that or more; only engine native can retry faster",
                Retry::SHORTEST
            );
            return Err(value(id, "on_error.interval", interval, rule));
        }
        for (key, time) in [("on_error.interval", Some(interval)), ("on_error.timeout", errors.timeout)] {
            if let Some(time) = time.filter(|time| *time > Retry::LONGEST) {
                return Err(value(id, key, time, format!("write {} or less", Retry::LONGEST)));
            }
        }
        let (timeout, at_timeout) = (errors.timeout(), errors.at_timeout(engine));
        Ok(Some(Retry { engine, read, write, interval, timeout, at_timeout }))
    }

    /// Settings that QEMU or qvirt would take and never use.
    fn check_effect(&self, id: &DeviceId, errors: &OnError, retries: bool) -> Result<(), Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        let times = errors.interval.is_some() || errors.timeout.is_some();
        if retries && self.is_cdrom() {
            return misplaced(
                "on_error",
                "a CD-ROM that retries",
                "only disks hold I/O and retry it; write read = \"report\" or \"stop\"",
            );
        }
        if errors.write.is_some() && self.is_read_only() {
            return misplaced("on_error.write", "a disk that the guest only reads", "leave it out");
        }
        if errors.read == Some(ErrorPolicy::Enospc) {
            let rule = "a read never runs out of space, so this would be \"report\": write that, or \"stop\" or \"retry\"";
            return Err(value(id, "on_error.read", ErrorPolicy::Enospc, rule));
        }
        if !retries && (times || errors.at_timeout.is_some() || errors.engine.is_some()) {
            return misplaced(
                "on_error: interval, timeout, at_timeout, engine",
                "an error policy that does not retry",
                "write read = \"retry\" or write = \"retry\", or leave them out",
            );
        }
        if errors.at_timeout.is_some() && errors.timeout().is_none() {
            return misplaced(
                "on_error.at_timeout",
                "retrying for ever",
                "write timeout = \"10s\", say, or leave it out",
            );
        }
        if errors.at_timeout == Some(AtTimeout::Unplug) && !self.is_unpluggable() {
            return Err(value(id, "on_error.at_timeout", AtTimeout::Unplug, NO_UNPLUG));
        }
        Ok(())
    }

    fn is_unpluggable(&self) -> bool {
        !matches!(self.seat, Some(PciSeat::Root(..) | PciSeat::Bridge(..)))
    }

    /// The engine that was asked for, if it can do what is asked of it, or the best one that can.
    fn engine(
        &self,
        id: &DeviceId,
        threaded: bool,
        errors: &OnError,
        qemu: &Capabilities,
    ) -> Result<Engine, Refusal> {
        let by_itself = qemu.io_error_actions.contains("retry") && qemu.has(self.driver(), "retry_interval");
        let obstacle = |engine| match engine {
            Engine::Hold | Engine::Pause if threaded && loses_interrupts(qemu) => Some(LOST_INTERRUPTS),
            engine => self.obstacle(engine, errors),
        };
        let auto = || {
            let there = |engine: Engine| engine != Engine::Native || by_itself;
            let able = |engine: &Engine| there(*engine) && obstacle(*engine).is_none();
            [Engine::Native, Engine::Hold].into_iter().find(able).unwrap_or(Engine::Proxy)
        };
        let engine = match errors.engine.unwrap_or(EngineWish::Auto) {
            EngineWish::Auto => auto(),
            EngineWish::Native => Engine::Native,
            EngineWish::Hold => Engine::Hold,
            EngineWish::Proxy => Engine::Proxy,
            EngineWish::Pause => Engine::Pause,
        };
        if engine == Engine::Native && !by_itself {
            let rule = format!(
                "this QEMU ({}) does not retry by itself: write \"auto\", which takes {} here, or name another binary with `qemu`",
                qemu.version,
                auto()
            );
            return Err(value(id, "on_error.engine", engine, rule));
        }
        if let Some(rule) = obstacle(engine) {
            return Err(value(id, "on_error.engine", engine, rule));
        }
        // Both hold the I/O in an NBD node of this QEMU.
        if matches!(engine, Engine::Hold | Engine::Proxy) && !qemu.block_drivers.contains("nbd") {
            let (id, name, version) = (id.clone(), "nbd".to_owned(), qemu.version.clone());
            return Err(Refusal::NotInQemu { id, kind: "block driver", name, version });
        }
        Ok(engine)
    }

    /// Why an engine cannot do what is asked on any QEMU, and what to write instead.
    fn obstacle(&self, engine: Engine, errors: &OnError) -> Option<&'static str> {
        let at_timeout = errors.timeout().map(|_| errors.at_timeout(engine));
        match engine {
            Engine::Native if !matches!(at_timeout, None | Some(AtTimeout::Report)) => Some(
                "QEMU itself reports at the timeout, it can do nothing else: write at_timeout = \"report\", or engine = \"auto\"",
            ),
            Engine::Hold if self.bus() == DiskBus::VirtioScsi && at_timeout == Some(AtTimeout::Report) => {
                Some(HOLD_SCSI_REPORT)
            }
            Engine::Pause if !matches!(at_timeout, None | Some(AtTimeout::Pause)) => Some(PAUSE_OTHERWISE),
            Engine::Hold | Engine::Pause if errors.stops() => Some(
                "the other direction's stop could not be told apart from one to retry: write \"retry\" for both read and write, or \
                 engine = \"proxy\"",
            ),
            Engine::Native | Engine::Hold | Engine::Proxy | Engine::Pause => None,
        }
    }

    /// `rerror`, `werror`, `retry_interval` and `retry_timeout` of the device.
    pub(crate) fn error_properties(&self, retry: Option<&Retry>) -> serde_json::Value {
        let errors = self.on_error.unwrap_or_default();
        let word = |policy: Option<ErrorPolicy>| match (policy?, retry) {
            (ErrorPolicy::Retry, Some(retry)) => Some(retry.policy().word()),
            (policy, _) => Some(policy.word()),
        };
        let native = retry.filter(|retry| retry.engine == Engine::Native);
        serde_json::json!({
            "rerror": word(errors.read),
            "werror": word(errors.write),
            // Both, always: what QEMU defaults to is nothing that a launch should depend on.
            "retry_interval": native.map(|retry| retry.interval.as_millis()),
            "retry_timeout": native.map(|retry| retry.timeout.map_or(0, Millis::as_millis)),
        })
    }
}

/// Whether a stop of the VM may lose the last interrupt of a disk in an iothread. QEMU has batched these since 8.2, and may send one after the
/// stop has closed the line that it goes by; measured on 10.0.2, where a hundred `cont` and `stop` in quick succession lose one. Nothing tells of
/// it, so the sign is a command of the block layer that is as old. To go when a QEMU without the fault is found.
fn loses_interrupts(qemu: &Capabilities) -> bool {
    qemu.commands.contains("block-job-change")
}

fn value(id: &DeviceId, key: &'static str, value: impl fmt::Display, rule: impl Into<String>) -> Refusal {
    Refusal::Value { id: id.clone(), key, value: format!("\"{value}\""), rule: rule.into() }
}

#[cfg(test)]
mod tests;
