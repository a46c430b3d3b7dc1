//! The console from the first byte, one holder at a time, and the terminal as it was afterwards.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::{OpenptyResult, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use tests::guest::{BOOT, Guest};
use tests::qemu::QemuVersion;
use tests::vm::{Vm, finished};

use tests::on_one;

on_one! { 10.0:
    first_byte => from_the_first_byte,
}

/// A program on a terminal of its own, which a test reads and types on as if it were a guest's line.
struct Terminal {
    line: Guest,
    /// The same line, for keys that are no script.
    keys: File,
    /// Kept open, so that the terminal's mode can be read when the program has left it.
    screen: OwnedFd,
    before: Termios,
    program: Option<Child>,
}

impl Terminal {
    fn run(mut command: Command) -> Terminal {
        let OpenptyResult { master, slave } = openpty(None, None).expect("a pseudo terminal");
        let before = tcgetattr(&slave).expect("its mode");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let program =
            command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn().expect("qvirt starts");
        let keys = File::from(master.try_clone().expect("a descriptor"));
        let line = Guest::from_fd(master).expect("the terminal is read");
        Terminal { line, keys, screen: slave, before, program: Some(program) }
    }

    fn mode(&self) -> Termios {
        tcgetattr(&self.screen).expect("its mode")
    }

    /// Types `^]`.
    fn leave(&mut self) {
        self.keys.write_all(&[0x1d]).expect("the terminal takes a key");
    }

    fn wait_restored(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        while self.mode() != self.before {
            assert!(Instant::now() < until, "the terminal is {:?}, and was {:?}", self.mode(), self.before);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(mut self) -> tests::vm::Output {
        let program = self.program.take().expect("it is taken once");
        let output = finished(program);
        self.wait_restored();
        output
    }
}

fn from_the_first_byte(version: QemuVersion) {
    // A kernel that speaks, so that there is something to miss.
    let vm = Vm::new(version, "earlyprintk=ttyS0", 2, "");
    let config = vm.config().display().to_string();
    let mut first = Terminal::run(vm.command(&["run", "--console", &config]));
    first.line.wait_init(BOOT).expect("the guest's first line");
    assert_ne!(first.mode(), first.before, "the terminal is raw");
    first.line.wait_ready(BOOT).expect("the guest boots");
    // The guest's own log of the line, written by QEMU, is what was to be seen.
    let logged = std::fs::read(vm.path("console.log")).expect("the log is read");
    let seen = first.line.transcript();
    let shown = String::from_utf8_lossy(&seen[..seen.len().min(300)]).into_owned();
    println!("== {version}: the first of {} bytes\n{shown}", seen.len());
    let until = seen.len().min(logged.len());
    assert!(until > 1000, "the kernel was to speak: {shown}");
    assert!(seen[..until] == logged[..until], "the terminal shows other bytes than the guest wrote");
    assert_eq!(first.line.check("echo typed").expect("the guest hears what is typed"), "typed\n");

    // One holder at a time; who it is, is said.
    let refused = vm.expect(3, &["console", "guest"]);
    let holder = vm.owner_pid().to_string();
    assert!(refused.stderr.contains(&holder), "the holder {holder} is named: {refused}");
    let mut second = Terminal::run(vm.command(&["console", "guest", "--force"]));
    assert_eq!(second.line.check("echo taken").expect("the console was taken over"), "taken\n");
    first.wait_restored();
    second.leave();
    let output = second.end();
    assert_eq!(output.code, 0, "{output}");
    assert!(output.stderr.contains("^]"), "{output}");

    // Left by a signal, the terminal is restored as well.
    let mut third = Terminal::run(vm.command(&["console", "guest", "con0"]));
    assert_eq!(third.line.check("echo third").expect("the console is free again"), "third\n");
    let pid =
        third.program.as_ref().map(Child::id).and_then(|pid| i32::try_from(pid).ok()).expect("a process");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
        .expect("it is signalled");
    third.end();
    vm.expect(5, &["console", "guest", "com9"]);

    // The one who ran the VM still owns it, and ends with it.
    vm.ok(&["kill", "guest"]);
    let output = first.end();
    assert_eq!(output.code, 0, "{output}");
    vm.nothing_left();
}
