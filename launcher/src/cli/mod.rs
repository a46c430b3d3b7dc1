//! The command line: what each command is called, what it takes, what it prints, and its exit code.
//!
//! Commands on a running VM are clients of its control socket, like any other QMP client. `args` has the words, `run` owns a VM,
//! `live` asks owners, `stored` keeps configs, `host` asks this machine, `vdpa` its vDPA devices, `plug` does attach and detach on either, `proxy`
//! serves a disk's images, `snapshot` and `blocks` have the chains of images.

mod args;
mod block;
mod blocks;
mod chain;
mod client;
mod events;
mod host;
mod io;
mod jobs;
mod live;
mod media;
mod plug;
mod print;
mod progress;
mod proxy;
mod run;
mod snapshot;
mod stored;
mod target;
mod vdpa;

use std::process::ExitCode;

use clap::Parser;

use crate::request::{Class, chain};

/// Exit codes, stable: scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Tried, and failed.
    Failed = 1,
    /// The command line or a config is wrong.
    Usage = 2,
    /// Refused before anything was tried, or by the guest.
    Refused = 3,
    /// Not finished: pending, or timed out.
    Pending = 4,
    /// No such VM or device.
    Unknown = 5,
}

/// What a command ends with when it is not done.
#[derive(Debug)]
pub struct Problem {
    exit: u8,
    message: String,
}

impl Problem {
    fn new(exit: Exit, message: impl ToString) -> Problem {
        Problem { exit: exit as u8, message: message.to_string() }
    }

    /// An error with all its causes.
    fn of(exit: Exit, error: &dyn std::error::Error) -> Problem {
        Problem { exit: exit as u8, message: chain(error) }
    }

    /// With what went wrong because of it.
    fn and(mut self, error: &dyn std::error::Error) -> Problem {
        self.message = format!("{}; and {}", self.message, chain(error));
        self
    }
}

/// Errors that are a matter of exit code 1 wherever they come from.
macro_rules! failed {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Problem {
            fn from(error: $error) -> Problem { Problem::of(Exit::Failed, &error) }
        }
    )+};
}

failed!(
    std::io::Error,
    crate::folders::FoldersError,
    crate::folders::WriteError,
    crate::host::begun::BegunError,
    crate::injection::Injected,
    crate::locks::LockError,
    crate::control::ControlError,
    crate::console::ConsoleError,
    crate::proxy::ProxyError,
    crate::record::RecordError,
    crate::journal::JournalError,
    qmp_client::ConnectError,
    serde_json::Error,
);

impl From<crate::config::ConfigError> for Problem {
    fn from(error: crate::config::ConfigError) -> Problem {
        Problem::of(Exit::Usage, &error)
    }
}

impl From<crate::blueprint::BlueprintError> for Problem {
    fn from(error: crate::blueprint::BlueprintError) -> Problem {
        use crate::blueprint::BlueprintError as E;
        let exit = match &error {
            E::Config(_) | E::Machine { .. } => Exit::Usage,
            E::Accel { .. } => Exit::Refused,
            E::Folders(_) | E::Probe(_) | E::Binary(_) | E::Pci(_) | E::Usb(_) | E::Lease(_) => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<crate::launch::LaunchError> for Problem {
    fn from(error: crate::launch::LaunchError) -> Problem {
        use crate::launch::Cause;
        let held = match &error.cause {
            Cause::Owned { .. } | Cause::Alive { .. } => true,
            Cause::Need { source, .. } => source.is_refusal(),
            _ => false,
        };
        // The causes are part of its text already.
        Problem::new(if held { Exit::Refused } else { Exit::Failed }, &error)
    }
}

impl From<crate::adopt::AdoptError> for Problem {
    fn from(error: crate::adopt::AdoptError) -> Problem {
        use crate::adopt::AdoptError as E;
        let exit = match error {
            E::Owned { .. } | E::Orphan { .. } => Exit::Refused,
            E::Held { .. } => Exit::Pending,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<qmp_client::QmpError> for Problem {
    fn from(error: qmp_client::QmpError) -> Problem {
        use qmp_client::QmpError as E;
        match &error {
            E::Refused(reason) => {
                Problem { exit: Class::exit_code(&reason.class), message: reason.desc.clone() }
            }
            E::TimedOut { .. } | E::NotSent { .. } => Problem::of(Exit::Pending, &error),
            _ => Problem::of(Exit::Failed, &error),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = match args::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Done };
            let _ = error.print();
            return ExitCode::from(code as u8);
        }
    };
    log_to_stderr();
    use args::Command as C;
    if !matches!(arguments.command, C::Run(_) | C::Console { .. } | C::IoProxy(_)) {
        end_quietly_on_a_closed_pipe();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(dispatch(arguments));
            // A thread that waits for hung storage is not waited for.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(problem) => {
            eprintln!("qvirt: {}", problem.message);
            ExitCode::from(problem.exit)
        }
    }
}

/// As every other tool does; Rust's runtime ignores SIGPIPE. Not for an owner or a proxy, whose clients
/// come and go, and not for a console, which has a terminal to restore.
#[allow(unsafe_code)]
fn end_quietly_on_a_closed_pipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler of ours runs; the default action ends the process.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

/// Logs of level `info` and above to stderr, or as `QVIRT_LOG` says (`debug`, `warn,qmp_client=trace`, ...).
fn log_to_stderr() {
    use tracing_subscriber::prelude::*;
    let wish = std::env::var("QVIRT_LOG").unwrap_or_default();
    let targets: tracing_subscriber::filter::Targets = wish.parse().unwrap_or_default();
    let targets = if wish.is_empty() { targets.with_default(tracing::Level::WARN) } else { targets };
    let layer =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time().with_target(false);
    tracing_subscriber::registry().with(layer.with_filter(targets)).init();
}

async fn dispatch(arguments: args::Arguments) -> Result<Exit, Problem> {
    use args::Command as C;
    match arguments.command {
        C::Check(check) => stored::check(check).await,
        C::Run(run) => run::run(run).await,
        C::Start(start) => run::start(start).await,
        C::Define { file } => stored::define(&file).await,
        C::Undefine { vm } => stored::undefine(&vm),
        C::Show(show) => stored::show(show).await,
        C::List { all, json } => live::list(all, json).await,
        C::Status { vm, json } => live::status(&vm, json).await,
        C::Devices { vm, json } => live::devices(&vm, json).await,
        C::Shutdown(shutdown) => live::shutdown(shutdown).await,
        C::Reboot { vm } => live::reboot(&vm).await,
        C::Reset { vm } => live::simple(&vm, "system_reset").await,
        C::Pause { vm } => live::simple(&vm, "stop").await,
        C::Resume { vm } => live::simple(&vm, "cont").await,
        C::Kill { vm } => live::kill(&vm).await,
        C::Leave { vm } => live::leave(&vm).await,
        C::Attach(attach) => plug::attach(attach).await,
        C::Detach(detach) => plug::detach(detach).await,
        C::Media(media) => media::media(media).await,
        C::Blocks { vm, json } => blocks::blocks(&vm, json).await,
        C::Block(block) => block::block(block).await,
        C::Jobs { vm, json } => jobs::jobs(&vm, json).await,
        C::Job { what, vm, job } => jobs::change(what, &vm, &job).await,
        C::Chain(args::Chain::Check { vm, repair, json }) => chain::check(&vm, repair, json).await,
        C::Snapshot(command) => snapshot::snapshot(command).await,
        C::Io(command) => io::io(command).await,
        C::IoProbe { image } => io::probe(&image),
        C::Drill(drill) => io::drill(drill).await,
        C::Host(command) => host::host(command).await,
        C::Console { vm, device, force } => live::console(&vm, device.as_deref(), force).await,
        C::Events { vms, json } => events::follow(&vms, json).await,
        C::Qmp { vm, command, arguments } => live::qmp(&vm, &command, arguments.as_deref()).await,
        C::ExamineImages => Ok(crate::examine::answer_all().map(|()| Exit::Done)?),
        C::Recover { vm, json } => live::recover(vm.as_ref(), json).await,
        C::IoProxy(arguments) => proxy::run(arguments).await,
    }
}
