//! The hardware lab: one emulated host with IOMMU, SR-IOV, USB, vDPA, vhost-scsi, failing disks, bridges and KVM, in which tests run as root.
//!
//! ```text
//!  L0  this machine: cargo test ── boots two per run ───┐
//!  L1  the lab host: the same test program, as root  <──┘  [`inside`] sends a test there, its output streams back
//!  L2  the guest that qvirt, run by that test, boots under the lab's KVM
//! ```
//!
//! A lab test is a plain test whose body is a closure given to [`inside`]. Run by cargo, it boots a lab host or takes one that no other test has, has the
//! same program run the same test there, and passes on what that printed; inside, the closure runs. So steps are Rust, and no
//! second copy of anything exists. What the lab has ready, by name, is in [`host`]; how it is made is `integration-images/README.md`.
//!
//! The lab host dies with the test program, however that ends; nothing of it stays but its console and what its QEMU said, in
//! `target/lab` until another run.

use std::any::type_name;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub mod host;
mod machine;
mod probe;
mod shell;

pub use machine::{Lab, LabError};
pub use shell::shell;

/// Set in the lab host: a test that sees it runs its steps.
const INSIDE: &str = "QVIRT_LAB";

/// Set for a soak; the tests in the lab see it too.
const ROUNDS: &str = "QVIRT_ROUNDS";

/// What a test in the lab prints while it has nothing else to say; nobody sees it.
const ALIVE: char = '\u{5}';

/// How long one test may take in the lab. Most take 30 s where L1 is emulated; this is for a machine with much else to do.
const TEST: Duration = Duration::from_secs(420);

/// How often a test is run at most where the emulated processor is at fault.
const TRIES: u32 = 3;

/// How many lab hosts are up at most, each with one test: an emulated one keeps one processor busy and may take 4 GiB.
const LABS: usize = 2;

/// The lab hosts: a test has one for itself, since its devices exist once.
static LABS_UP: Labs =
    Labs { state: Mutex::new(State { up: 0, idle: Vec::new() }), given_back: Condvar::new() };

/// What lab hosts there are.
struct Labs {
    state: Mutex<State>,
    given_back: Condvar,
}

struct State {
    /// How many are up or booting.
    up: usize,
    /// Those that no test has.
    idle: Vec<Lab>,
}

impl Labs {
    /// One that is up already, or `None`, with which the caller may boot one; waits until there is one or the other.
    fn take(&self) -> Option<Lab> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(lab) = state.idle.pop() {
                return Some(lab);
            }
            if state.up < LABS {
                state.up += 1;
                return None;
            }
            state = self.given_back.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A test's right to a lab host, which ends with the value; the next test gets the lab host too if it was put here.
struct Turn(Option<Lab>);

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = LABS_UP.state.lock().unwrap_or_else(PoisonError::into_inner);
        match self.0.take() {
            Some(lab) => state.idle.push(lab),
            None => state.up -= 1,
        }
        LABS_UP.given_back.notify_one();
    }
}

/// Runs a test's steps as root in the lab host.
///
/// # Panics
/// Where the steps do, with what they said; and if the lab host does not come up, dies, or the steps take longer than seven minutes.
pub fn inside<F: Fn()>(steps: F) {
    if std::env::var_os(INSIDE).is_some() {
        say_alive();
        return steps();
    }
    let test = test_name(type_name::<F>());
    let idle = LABS_UP.take();
    let mut turn = Turn(None);
    let begin = Instant::now();
    let mut lab = idle.unwrap_or_else(booted);
    let mut outcome = lab.run_test(test, TEST);
    for _ in 1..TRIES {
        let Err(e) = &outcome else { break };
        let Some(fault) = e.emulations_fault().filter(|_| lab.is_emulated()) else { break };
        println!("{e}\n{fault}: the test says nothing, and is run once more in another lab");
        lab = booted();
        outcome = lab.run_test(test, TEST);
    }
    match outcome {
        Ok(()) => {
            println!("{test} took {:.1?} in the lab", begin.elapsed());
            turn.0 = Some(lab);
        }
        // The next test gets a lab host that nobody left in a strange state.
        Err(e) => panic!("{test} failed in the lab after {:.1?}: {e}", begin.elapsed()),
    }
}

/// Tells the other side, as long as the test runs, that the lab host has not stopped.
fn say_alive() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(5));
            print!("{ALIVE}");
            // Nobody reads it any more: the test is over.
            let _ = std::io::stdout().flush();
        }
    });
}

fn booted() -> Lab {
    Lab::boot().unwrap_or_else(|e| panic!("{e}"))
}

/// `disks::fails` of the closure `lab::disks::fails::{{closure}}`: as the test runner names the test.
fn test_name(closure: &'static str) -> &'static str {
    let path = closure.split_once("::").map_or(closure, |(_crate, path)| path);
    path.strip_suffix("::{{closure}}").unwrap_or(path)
}

/// How often a device comes and goes in a row: ten times; three where the lab's processor is emulated, whose KVM gets lost about once in some hundred
/// plugs, unless `QVIRT_ROUNDS` is set, as `make soak` sets it.
pub fn rounds() -> u32 {
    if is_emulated() && std::env::var_os(ROUNDS).is_none() { 3 } else { 10 }
}

/// Whether this runs in a lab whose processor is emulated: each exit of a guest costs half a millisecond there.
pub fn is_emulated() -> bool {
    let processor = || std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    std::env::var_os(INSIDE).is_some() && processor().contains("QEMU TCG CPU")
}

/// How long a test waits for what takes `usually` at most: four times as long in an emulated lab, which is slow, and slower on a busy machine.
pub fn patience(usually: Duration) -> Duration {
    if is_emulated() { usually * 4 } else { usually }
}

/// Where the VMs of all tests in the lab keep what their QEMUs answered when they were asked what they can do: asking takes seconds there.
pub fn answers_of_qemu() -> Option<PathBuf> {
    std::env::var_os(INSIDE)?;
    let folder = PathBuf::from("/run/lab/answers");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder)
}

/// Runs one step of a test, and prints what it was and how long it took.
pub fn step<T>(what: &str, run: impl FnOnce() -> T) -> T {
    println!("-- {what}");
    let begin = Instant::now();
    let value = run();
    println!("-- {what}: {:.1} s", begin.elapsed().as_secs_f32());
    value
}

/// What the program `lab` does with its arguments: `shell` and `run` on this machine, `prepare`, `list` and `logs` in the lab host.
pub fn main(arguments: &[&str]) -> ExitCode {
    let done = match arguments {
        ["shell"] => shell().map_err(|e| e.to_string()),
        ["run", command @ ..] if !command.is_empty() => {
            match Lab::boot().and_then(|mut lab| lab.run(command, &mut |text| print!("{text}"), (TEST, TEST))) {
                Ok(0) => Ok(()),
                Ok(status) => Err(format!("{} ended with exit status {status}", command[0])),
                Err(e) => Err(e.to_string()),
            }
        }
        ["prepare"] => host::prepare().map_err(|e| e.to_string()),
        ["logs"] => {
            host::print_logs();
            Ok(())
        }
        ["list"] => host::list().map(|names| print!("{names}")).map_err(|e| e.to_string()),
        _ => Err("usage: lab shell | lab run PROGRAM [ARGUMENT]... (on this machine) | lab prepare | lab list | lab logs (in the lab host)".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("lab: {reason}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::type_name_of_val;

    use super::test_name;

    #[test]
    fn a_closure_tells_the_name_of_its_test() {
        let name = test_name(type_name_of_val(&|| ()));
        assert_eq!(name, "lab::tests::a_closure_tells_the_name_of_its_test");
        assert_eq!(Some(name), std::thread::current().name().filter(|name| *name != "main").or(Some(name)));
    }
}
