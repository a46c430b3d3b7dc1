//! The fake as a process: its start, its environment, its signals.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::argv::{CommandLine, Monitor};
use super::backends::{Chardev, backend_of};
use super::core::{Core, lock};
use super::machine::{Machine, Props, text};
use super::rules::{Rules, Start};
use super::schema::Recorded;
use super::{
    CONTROL, CONTROL_VARIABLE, DUMP_VARIABLE, Failure, RETRIES_VARIABLE, RULES_VARIABLE, VERSION_VARIABLE,
};

/// Runs the fake with this process's command line and environment. Never returns.
pub fn main() {
    let ending = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    let Err(why) = start(&ending) else {
        loop {
            // All work is done by other threads, and one of them ends the process.
            std::thread::park();
        }
    };
    eprintln!("fake-qemu: {why}");
    std::process::exit(1);
}

fn start(ending: &SigSet) -> Result<(), String> {
    ending.thread_block().map_err(|error| format!("cannot block signals: {error}"))?;
    let line = CommandLine::parse(std::env::args().skip(1))?;
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let mut rules = Rules::default();
    rules.add(&variable(RULES_VARIABLE).unwrap_or_default(), line.probing)?;
    let start = rules.start().cloned();
    if let Some(Start::Die { status, message }) = start {
        eprintln!("{message}");
        std::process::exit(status);
    }
    let recorded = Recorded::of(&variable(VERSION_VARIABLE).unwrap_or_default());
    let retries = variable(RETRIES_VARIABLE).is_some();
    let mut machine = Machine::new(if retries { recorded.with_retry() } else { recorded });
    build(&mut machine, &line)?;
    let core = Core::new(machine, rules);
    lock(&core).dump = variable(DUMP_VARIABLE).filter(|_| !line.probing).map(Into::into);
    if let Some(path) = variable(CONTROL_VARIABLE).filter(|_| !line.probing) {
        // An earlier fake of the same test may have left it.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(|error| format!("{path}: {error}"))?;
        let core = core.clone();
        std::thread::spawn(move || super::monitor::listen(CONTROL, &listener, &core));
    }
    if start != Some(Start::Mute) {
        line.monitors.into_iter().for_each(|monitor| run_monitor(monitor, &core));
    }
    wait_for_signal(*ending, core);
    Ok(())
}

/// Makes what the command line asks for. Errors: the option, and QEMU's words.
fn build(machine: &mut Machine, line: &CommandLine) -> Result<(), String> {
    machine.name = line.name.clone();
    machine.uuid = line.uuid.clone().unwrap_or_else(|| machine.uuid.clone());
    let said = |option: &str, props: &Props, failure: Failure| {
        let json = serde_json::Value::Object(props.clone());
        format!("-{option} {json}: {}", failure.desc)
    };
    for props in &line.objects {
        machine.object_add(props).map_err(|failure| said("object", props, failure))?;
    }
    for props in &line.chardevs {
        let id = text(props, "id");
        if let Some(monitor) = line.monitors.iter().find(|monitor| monitor.chardev == id) {
            let filename = format!("unix:{}", if monitor.listens { ",server=on" } else { "" });
            let chardev = Chardev::of_monitor(filename);
            machine.chardevs.insert(id.to_owned(), chardev);
            continue;
        }
        let made =
            machine.chardev_add(id, &backend_of(props)).map_err(|failure| said("chardev", props, failure))?;
        if let Some(pty) = made["pty"].as_str() {
            println!("char device redirected to {pty} (label {id})");
        }
    }
    for props in &line.blockdevs {
        machine.qemu.check("blockdev-add", props).map_err(|failure| said("blockdev", props, failure))?;
        machine.blockdev_add(props).map_err(|failure| said("blockdev", props, failure))?;
    }
    for props in &line.netdevs {
        machine.netdev_add("", props).map_err(|failure| said("netdev", props, failure))?;
    }
    for props in &line.devices {
        machine.device_add(props, false).map_err(|failure| said("device", props, failure))?;
    }
    if !line.stopped && !line.probing {
        machine.run = "running".to_owned();
    }
    Ok(())
}

#[allow(unsafe_code)]
fn inherited(fd: i32) -> OwnedFd {
    // SAFETY: whoever started us opened this descriptor for us and named it on our command line; we take each number once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn run_monitor(monitor: Monitor, core: &Arc<Mutex<Core>>) {
    let core = core.clone();
    let fd = inherited(monitor.fd);
    std::thread::spawn(move || {
        if monitor.listens {
            let listener = UnixListener::from(fd);
            // A listener made for an asynchronous runtime does not block.
            if listener.set_nonblocking(false).is_ok() {
                super::monitor::listen(&monitor.chardev, &listener, &core);
            }
        } else {
            let stream = UnixStream::from(fd);
            if stream.set_nonblocking(false).is_ok() {
                super::monitor::serve(&monitor.chardev, &stream, &core);
            }
        }
    });
}

fn wait_for_signal(ending: SigSet, core: Arc<Mutex<Core>>) {
    std::thread::spawn(move || {
        // It fails only for a set with signals that cannot be waited for.
        while ending.wait().is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut core = lock(&core);
        Core::shutdown(false, "host-signal").into_iter().for_each(|effect| core.perform(effect));
    });
}
