//! What a system's first process owes to it: to reap every orphan. It does nothing else, so that nobody reaps what others wait for.

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, getpid, wait};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::tcdrain;

/// Returns in a process that is not the system's first one: at once, or in a child that does the work while the first one reaps.
pub(super) fn split() -> Result<(), String> {
    if !getpid().is_init() {
        return Ok(());
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let program =
        std::env::current_exe().map_err(|e| format!("cannot find the program of process 1: {e}"))?;
    let worker = Command::new(program)
        .arg0(&arguments[0])
        .args(&arguments[1..])
        .spawn()
        .map_err(|e| format!("cannot start the agent's second process: {e}"))?;
    let worker = i32::try_from(worker.id()).ok().and_then(Pid::from_raw);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == worker => give_up(status),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(format!("process 1 cannot wait for its children: {e}")),
        }
    }
}

/// A guest without its agent is of no use, and one that is gone is noticed at once.
fn give_up(status: WaitStatus) -> ! {
    eprintln!(
        "agent: the serving process ended ({status:?}), so this machine is switched off: its message is above, if it left one"
    );
    // The words must be out before the machine is off.
    let _ = tcdrain(std::io::stderr());
    // What else could be done, should this fail? The end of process 1 makes the kernel panic, which is as loud.
    let _ = reboot(RebootCommand::PowerOff);
    std::process::exit(1)
}
