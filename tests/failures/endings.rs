//! A QEMU that does not go when it is killed: stopped, or held by the kernel.
//!
//! No test can have a process wait uninterruptibly for storage; but one whose thread is traced is as little gone, until the tracer has seen
//! that thread's end.

use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tests::qemu::QemuVersion;
use tests::vm::{Output, Vm};

use crate::stage::Stage;

/// What a command that promises two seconds may take on a loaded machine.
const PROMISED: Duration = Duration::from_secs(4);

/// A VM with a disk, running.
fn vm() -> (Stage, String) {
    let stage = Stage::real(QemuVersion::V10_0, "[[disk]]\nid = \"a\"\npath = \"a.img\"\n");
    let image = stage.vm.raw("a.img", 4, "a");
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    (stage, image)
}

/// A process that is not gone before this one lets it go.
struct Held(Pid);

impl Held {
    /// Holds a thread that is not the first one.
    fn of(process: i32) -> Held {
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("it lives").flatten();
        let mut numbers = threads.filter_map(|thread| thread.file_name().to_str()?.parse::<i32>().ok());
        let thread = Pid::from_raw(numbers.find(|number| *number != process).expect("a second thread"));
        ptrace::seize(thread, ptrace::Options::empty()).expect("a process of ours can be traced");
        Held(thread)
    }

    fn let_go(self) {
        let ended = waitpid(self.0, Some(WaitPidFlag::__WALL)).expect("it is traced by this thread");
        assert_eq!(ended.pid(), Some(self.0));
    }
}

/// `qvirt kill`, which must be back in time.
fn killed(vm: &Vm) -> Output {
    let begin = Instant::now();
    let output = vm.qvirt(&["kill", "guest"]);
    assert!(begin.elapsed() < PROMISED, "{:?}: {output}", begin.elapsed());
    output
}

fn is_held(output: &Output, image: &str) {
    let words = format!("qvirt: VM guest: killed, still held by the kernel in I/O on {image}: it ends when");
    assert!(output.code == 4 && output.stderr.starts_with(&words), "{output}");
}

#[test]
fn a_qemu_that_is_held_keeps_its_owner_and_leases() {
    let (stage, image) = vm();
    let held = Held::of(stage.vm.qemu_pid());
    is_held(&killed(&stage.vm), &image);
    is_held(&killed(&stage.vm), &image);
    let warnings = stage.vm.status()["warnings"].clone();
    let told =
        |warning: &Value| warning.as_str().is_some_and(|text| text.contains("still held by the kernel"));
    assert!(warnings.as_array().is_some_and(|warnings| warnings.iter().any(told)), "{warnings}");
    assert_eq!(stage.vm.leases().len(), 1, "the image is still in use");
    held.let_go();
    stage.vm.nothing_left();
}

#[test]
fn a_qemu_that_is_held_and_has_no_owner() {
    let (stage, image) = vm();
    let held = Held::of(stage.vm.qemu_pid());
    stage.vm.kill_owner();
    is_held(&killed(&stage.vm), &image);
    assert_eq!(stage.vm.leases().len(), 1, "the image is still in use");
    held.let_go();
    stage.vm.ok(&["recover", "guest"]);
    stage.vm.nothing_left();
}

#[test]
fn a_qemu_that_does_not_hear_a_signal_is_killed_in_time() {
    for owned in [true, false] {
        let (stage, _) = vm();
        let qemu = stage.vm.qemu_pid();
        if !owned {
            stage.vm.kill_owner();
        }
        kill(Pid::from_raw(qemu), Signal::SIGSTOP).expect("it is ours");
        let output = killed(&stage.vm);
        assert_eq!((output.code, output.stdout.as_str()), (0, "guest was killed\n"), "{output}");
        stage.vm.nothing_left();
    }
}
