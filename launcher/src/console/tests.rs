//! Consoles between two pseudo terminals: one is the user's, one is QEMU's. What concerns a whole process (signals, who
//! holds the lock) runs in a child: this test program once more, told by an environment variable to play a console.

use std::{
    env,
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write, pipe},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio, exit},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    pty::openpty,
    sys::{
        signal::kill,
        termios::{LocalFlags, Termios, tcgetattr},
    },
    unistd::{Pid, ttyname},
};

use super::*;

/// A pseudo terminal: the master is the far side's, the slave stays open so that it can be looked at.
struct Pty {
    master: File,
    slave: OwnedFd,
    path: PathBuf,
}

impl Pty {
    fn new() -> Pty {
        let pty = openpty(None, None).expect("a pseudo terminal");
        for fd in [&pty.master, &pty.slave] {
            // Children get what they are given.
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
                .expect("a flag");
        }
        let path = ttyname(&pty.slave).expect("it has a name");
        Pty { master: pty.master.into(), slave: pty.slave, path }
    }

    fn mode(&self) -> Termios {
        tcgetattr(&self.slave).expect("a terminal")
    }

    fn is_raw(&self) -> bool {
        !self.mode().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn user(&self) -> User {
        User {
            input: self.slave.try_clone().expect("a copy"),
            output: self.slave.try_clone().expect("a copy"),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).expect("the far side writes");
    }

    /// Exactly as many bytes as expected, to be equal to them.
    fn expect(&mut self, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        self.master.read_exact(&mut got).expect("the far side reads");
        assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(bytes));
    }
}

/// A lock file's folder, QEMU's pseudo terminal and the user's.
struct Setting {
    folder: tempfile::TempDir,
    guest: Pty,
    user: Pty,
}

impl Setting {
    fn new() -> Setting {
        Setting {
            folder: tempfile::tempdir().expect("a temporary folder"),
            guest: Pty::new(),
            user: Pty::new(),
        }
    }

    fn lock(&self) -> PathBuf {
        self.folder.path().join("web.console")
    }

    fn open(&self) -> Console {
        Console::open(&self.guest.path, &self.lock(), false).expect("a free console")
    }

    /// Attaches in a thread, at the user's pseudo terminal, and waits until that is raw.
    fn attach(&self) -> JoinHandle<Leave> {
        let running = run(self.open(), self.user.user());
        wait_for("raw mode", || self.user.is_raw());
        running
    }
}

/// Attaches in a thread until something that happens inside.
fn run(console: Console, user: User) -> JoinHandle<Leave> {
    thread::spawn(move || {
        let (never, _writer) = pipe().expect("a pipe");
        console.attach(&user, &Until::Readable(never.into())).expect("no failure")
    })
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn left(running: JoinHandle<Leave>) -> Leave {
    wait_for("the console to be left", || running.is_finished());
    running.join().expect("no panic")
}

#[test]
fn bytes_go_both_ways_unchanged_and_escape_leaves() {
    let mut it = Setting::new();
    let before = it.user.mode();
    let running = it.attach();
    it.guest.send(b"login: \r\n\xff\0");
    let mut got = [0; 11];
    it.user.master.read_exact(&mut got).expect("shown");
    assert_eq!(&got, b"login: \r\n\xff\0");
    // ^C, ^Z, ^S and ^D are the guest's.
    it.user.send(b"root\r\x03\x1a\x13\x04\x1dnot this");
    it.guest.expect(b"root\r\x03\x1a\x13\x04");
    assert_eq!(left(running), Leave::Escape);
    assert_eq!(it.user.mode(), before);
    assert!(!it.lock().exists(), "the lock file is removed");
}

#[test]
fn bytes_from_before_the_attachment_are_shown() {
    let mut it = Setting::new();
    let console = it.open();
    it.guest.send(b"first bytes");
    let running = run(console, it.user.user());
    it.user.expect(b"first bytes");
    it.user.send(&[ESCAPE]);
    assert_eq!(left(running), Leave::Escape);
}

#[test]
fn the_end_of_the_vm_closes_and_restores() {
    let it = Setting::new();
    let before = it.user.mode();
    let running = it.attach();
    let Setting { guest, user, folder: _folder } = it;
    drop(guest.master);
    assert_eq!(left(running), Leave::Closed);
    assert_eq!(user.mode(), before);
}

#[test]
fn the_end_of_the_terminal_leaves() {
    let it = Setting::new();
    let running = it.attach();
    let Setting { user, guest: _guest, folder: _folder } = it;
    drop(user.master);
    assert!(matches!(left(running), Leave::InputClosed | Leave::OutputClosed));
}

/// A user that is two pipes, and the far sides.
fn piped() -> (User, PipeWriter, PipeReader) {
    let (input, keys) = pipe().expect("a pipe");
    let (screen, output) = pipe().expect("a pipe");
    (User { input: input.into(), output: output.into() }, keys, screen)
}

#[test]
fn piped_input_is_copied_whole_and_its_end_does_not_end_the_output() {
    let mut it = Setting::new();
    let (user, mut keys, mut screen) = piped();
    let running = run(it.open(), user);
    keys.write_all(b"a\x1db").expect("taken");
    it.guest.expect(b"a\x1db");
    drop(keys);
    it.guest.send(b"still here");
    let mut got = [0; 10];
    screen.read_exact(&mut got).expect("shown");
    assert_eq!(&got, b"still here");
    drop(it.guest.master);
    assert_eq!(left(running), Leave::Closed);
}

#[test]
fn much_output_arrives_whole_and_in_order() {
    let it = Setting::new();
    let (user, _keys, mut screen) = piped();
    let running = run(it.open(), user);
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut far, bytes) = (it.guest.master.try_clone().expect("a copy"), sent.clone());
    let writing = thread::spawn(move || far.write_all(&bytes).expect("the console reads"));
    let mut got = vec![0; sent.len()];
    screen.read_exact(&mut got).expect("shown");
    assert!(got == sent, "bytes were changed");
    writing.join().expect("all were taken");
    drop(screen);
    assert_eq!(left(running), Leave::OutputClosed);
}

#[test]
fn a_guest_that_does_not_read_cannot_hold_the_user() {
    let mut it = Setting::new();
    let running = it.attach();
    it.user.send(&[b'x'; 100_000]);
    it.user.send(&[ESCAPE]);
    assert_eq!(left(running), Leave::Escape);
    assert!(!it.user.is_raw());
}

#[test]
fn an_owner_ends_it_by_its_descriptor() {
    let it = Setting::new();
    let (console, user) = (it.open(), it.user.user());
    let (stop, stopper) = pipe().expect("a pipe");
    let running =
        thread::spawn(move || console.attach(&user, &Until::Readable(stop.into())).expect("no failure"));
    wait_for("raw mode", || it.user.is_raw());
    drop(stopper);
    assert_eq!(left(running), Leave::Asked);
    assert!(!it.user.is_raw());
}

#[test]
fn a_panic_restores_even_where_nothing_is_dropped() {
    let user = Pty::new();
    let slave = user.slave.try_clone().expect("a copy");
    let panicking = thread::spawn(move || {
        // As in a release build, where a panic aborts.
        std::mem::forget(Raw::enter(slave.as_fd()).expect("a terminal"));
        assert!(user_sees_raw(&slave), "raw before the panic");
        panic!("on purpose");
    });
    assert!(panicking.join().expect_err("it panicked").downcast_ref::<&str>() == Some(&"on purpose"));
    assert!(!user.is_raw());
}

fn user_sees_raw(terminal: &OwnedFd) -> bool {
    !tcgetattr(terminal).expect("a terminal").local_flags.contains(LocalFlags::ICANON)
}

#[test]
fn a_missing_console_is_named_and_lets_go_of_the_lock() {
    let it = Setting::new();
    let error =
        Console::open(Path::new("/dev/pts/none"), &it.lock(), false).expect_err("missing").to_string();
    assert!(error.contains("cannot open the console /dev/pts/none"), "{error}");
    assert!(!it.lock().exists());
    let nowhere = it.folder.path().join("none/web.console");
    let error = Console::open(&it.guest.path, &nowhere, false).expect_err("no folder").to_string();
    assert!(error.contains("cannot lock the console with"), "{error}");
}

const CHILD: &str = "QVIRT_TEST_CONSOLE";

/// A process that is a console, at the user's pseudo terminal; killed with its test.
struct Process {
    child: Child,
}

impl Process {
    /// Starts this program again as the one test `name`, which calls [`play_child`] first.
    fn start(it: &Setting, name: &str) -> Process {
        let (_, module) = module_path!().split_once("::").expect("a module of a crate");
        // Whoever runs the tests may ignore some of the signals, and children inherit that.
        let child = Command::new("env")
            .arg("--default-signal")
            .arg(env::current_exe().expect("this program"))
            .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
            .env(CHILD, format!("{}\n{}", it.guest.path.display(), it.lock().display()))
            .stdin(it.user.slave.try_clone().expect("a copy"))
            .stdout(it.user.slave.try_clone().expect("a copy"))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("this program runs");
        let process = Process { child };
        wait_for("the child's raw mode", || it.user.is_raw());
        process
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the child is there");
    }

    /// The last words, once it has ended by itself.
    fn words(&mut self) -> String {
        wait_for("the child's end", || self.child.try_wait().expect("our child").is_some());
        let mut words = String::new();
        self.child.stderr.take().expect("it is piped").read_to_string(&mut words).expect("text");
        words
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the child: be a console and end. In the test: nothing.
fn play_child() {
    let Ok(paths) = env::var(CHILD) else { return };
    let (pty, lock) = paths.split_once('\n').expect("two paths");
    let console = Console::open(Path::new(pty), Path::new(lock), false).expect("a free console");
    let leave =
        console.attach(&User::of_process().expect("standard streams"), &Until::Signals).expect("no failure");
    drop(console);
    eprintln!("{leave}");
    exit(0);
}

#[test]
fn signals_leave_and_restore() {
    play_child();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        let it = Setting::new();
        let before = it.user.mode();
        let mut process = Process::start(&it, "signals_leave_and_restore");
        process.signal(signal);
        assert!(process.words().contains(&format!("console left on {signal}")), "{signal}");
        assert_eq!(it.user.mode(), before, "{signal}");
        assert!(!it.lock().exists(), "{signal}");
    }
}

#[test]
fn continued_after_a_stop_it_is_raw_again() {
    play_child();
    let it = Setting::new();
    let before = it.user.mode();
    let mut process = Process::start(&it, "continued_after_a_stop_it_is_raw_again");
    process.signal(Signal::SIGSTOP);
    nix::sys::termios::tcsetattr(&it.user.slave, nix::sys::termios::SetArg::TCSANOW, &before)
        .expect("a shell's work");
    process.signal(Signal::SIGCONT);
    wait_for("raw mode", || it.user.is_raw());
    process.signal(Signal::SIGTERM);
    process.words();
    assert_eq!(it.user.mode(), before);
}

#[test]
fn a_second_console_is_told_who_has_it_and_may_take_it_over() {
    play_child();
    let it = Setting::new();
    let mut process = Process::start(&it, "a_second_console_is_told_who_has_it_and_may_take_it_over");
    let me = hold::user_name(nix::unistd::Uid::current().as_raw());

    let error = Console::open(&it.guest.path, &it.lock(), false).expect_err("it is held");
    let ConsoleError::Held { pid, user, since } = &error else { panic!("{error}") };
    assert_eq!((*pid, user), (process.pid(), &me));
    assert!(since.elapsed().is_ok_and(|age| age < Duration::from_secs(60)));
    assert!(error.to_string().contains("--force"), "{error}");
    assert!(it.user.is_raw(), "the holder is left alone");

    let console = Console::open(&it.guest.path, &it.lock(), true).expect("taken over");
    let words = process.words();
    assert!(words.contains(&format!("console taken over by {me} (pid {})", std::process::id())), "{words}");
    assert!(!it.user.is_raw(), "the holder's terminal is restored");
    assert!(it.lock().exists());
    drop(console);
    assert!(!it.lock().exists());
}

#[test]
fn a_holder_that_died_holds_nothing() {
    play_child();
    let it = Setting::new();
    let mut process = Process::start(&it, "a_holder_that_died_holds_nothing");
    process.child.kill().expect("our child");
    process.child.wait().expect("our child");
    assert!(it.lock().exists(), "SIGKILL leaves the file");
    drop(it.open());
    assert!(!it.lock().exists());
}
