//! The lab host as a process of this machine: its command line, its boot, its end.
//!
//! QEMU is started by a thread that lives as long as the test program does, and so that the kernel kills it when that thread ends: neither a panic
//! nor a SIGKILL of the tests leaves one behind. The agent's line is QEMU's standard input and output: there is no socket to find or to remove.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent::protocol::INIT;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;

use super::probe::{LAB_QEMU, Parts, Processor, parts};
use super::{ALIVE, INSIDE, ROUNDS};
use crate::guest::{Guest, GuestError};
use crate::qemu::{QemuVersion, images, profile_folder};

/// How long the lab host may take to boot and to make its devices ready, if `QVIRT_LAB_BOOT` does not say (in seconds). Measured: see the README of
/// `integration-images`.
const BOOT: Duration = Duration::from_secs(240);
/// How long a boot may take to the first word of its init: it takes 6 to 20 s. Where its processor is emulated and the machine is busy, one in twenty
/// to fifty stalls there for good: the first processor gets no interrupt any more while the kernel reads its disk. Seen with QEMU 10.0.2 and
/// Linux 6.12.95 on 2026-11-22.
const TO_INIT: Duration = Duration::from_secs(60);
/// In every error that tells of a wait that came to nothing.
const IN_VAIN: &str = "in vain";
/// How often it is booted at most; the last time it may take as long as it likes.
const BOOTS: u32 = 3;
/// Before the reason for which the lab host's init gives up.
const FAILED: &str = "QVIRT-LAB-FAILED ";
/// What QEMU says, beside the console's file.
const QEMU_LOG: &str = "qemu";
/// How long the logs of a failed test may take to come.
const LOGS: Duration = Duration::from_secs(30);
/// How long a test in the lab may print nothing, not even [`ALIVE`]: the lab host stands still then.
const SILENCE: Duration = Duration::from_secs(90);
/// How many of the console's last lines an error shows.
const TAIL: usize = 30;
/// How many lines of a panic an error repeats.
const PANIC: usize = 80;

/// Why there is no lab host, or what went wrong in it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LabError {
    #[error("the lab needs {}, which is missing: run `make images` in the checkout", .0.display())]
    Missing(PathBuf),
    #[error("{} has no device {device}, {what}: the lab host needs the QEMU of bookworm-backports or a newer one; \
             run `make images`, or name another QEMU in {LAB_QEMU} (the QEMU under test inside the lab may be any)", qemu.display())]
    NoDevice { qemu: PathBuf, device: &'static str, what: &'static str },
    #[error("the lab cannot show its host the folder {:?}, for the blank in its name: move the checkout", .0.display())]
    Blank(PathBuf),
    #[error("{} does not run: {said}", qemu.display())]
    Broken { qemu: PathBuf, said: String },
    #[error("{} could not be run: {source}", program.display())]
    Spawn { program: PathBuf, source: io::Error },
    #[error("{} could not be made: {source}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("the lab host did not come up: {reason}\nthe last lines of its console ({}):\n{tail}", console.display())]
    Boot { reason: String, console: PathBuf, tail: String },
    // What went wrong comes last, where it is read first.
    #[error("the last lines of the lab's console ({}):\n{tail}\n{reason}", console.display())]
    Test { reason: String, console: PathBuf, tail: String },
}

impl LabError {
    /// What an emulated processor is known to do to a test that is none of the test's fault; `None`: nothing of that kind.
    ///
    /// Beside [`LabError::is_lost_world_switch`] it loses interrupts, of the lab host (see [`TO_INIT`]) as of its guests: a guest then waits for ever for
    /// a device that is there. Seen as a plugged device that was never found, once in some hundred and fifty tests, and only on a busy machine. A fault
    /// of qvirt that makes a guest wait shows each time.
    pub(super) fn emulations_fault(&self) -> Option<&'static str> {
        let LabError::Test { reason, .. } = self else { return None };
        if self.is_lost_world_switch() {
            Some("the emulated processor lost the lab's KVM")
        } else if self.console_has(&["Kernel panic", "softlockup"]) {
            Some("a processor of the lab waited for the other one in vain")
        } else if reason.contains(IN_VAIN) {
            Some(
                "a guest or the lab waited in vain, as it does when the emulated processor loses an interrupt",
            )
        } else {
            None
        }
    }

    /// Whether the lab host's kernel died of the one thing that is known to kill it where its processor is emulated: right after a guest's exit, while
    /// registers are still the guest's, its KVM gets an interrupt that it has forbidden, and the fault that follows recurs until the stack is
    /// full. Seen with QEMU 10.0.2 and Linux 6.12.95 on 2026-11-22 in one of some thirty guests, and the more often the more exits there are.
    fn is_lost_world_switch(&self) -> bool {
        self.console_has(&["Kernel panic", "svm_vcpu_run"])
    }

    fn console_has(&self, words: &[&str]) -> bool {
        let LabError::Test { console, .. } = self else { return false };
        std::fs::read(console).is_ok_and(|text| {
            let text = String::from_utf8_lossy(&text);
            words.iter().all(|words| text.contains(words))
        })
    }
}

/// A lab host that is up, its devices ready. Dropping it ends it.
pub struct Lab {
    processor: Processor,
    agent: Guest,
    process: Process,
}

impl Lab {
    /// Boots a lab host and waits until its devices are ready.
    ///
    /// # Errors
    /// A part is missing, the QEMU lacks the lab's hardware, or the host does not come up: with the last lines of its console.
    pub fn boot() -> Result<Lab, LabError> {
        let parts = parts()?;
        let begin = Instant::now();
        let (process, line) = Process::start_unstalled(&parts, || {
            let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC);
            let (ours, theirs) = pair.map_err(|e| spawn_error(&parts.qemu, e.into()))?;
            Ok((Line::Agent(theirs), ours))
        })?;
        let agent = Guest::from_fd(line).and_then(|mut agent| {
            // The line takes bytes before anybody reads them: the answer comes when the lab is ready.
            agent.run_within("true", boot_deadline())?;
            Ok(agent)
        });
        let agent = agent.map_err(|e| process.boot_error(&e))?;
        println!("the lab host ({:?} processor) is ready after {:.1?}", parts.processor, begin.elapsed());
        Ok(Lab { processor: parts.processor, agent, process })
    }

    /// Whether TCG is its processor.
    pub(super) fn is_emulated(&self) -> bool {
        self.processor == Processor::Emulated
    }

    /// Has the lab host run one test of this very program, and passes on what it prints.
    pub(super) fn run_test(&mut self, test: &str, deadline: Duration) -> Result<(), LabError> {
        let program =
            std::env::current_exe().map_err(|source| spawn_error(Path::new("this program"), source))?;
        let command = [&program.display().to_string(), test, "--exact", "--nocapture", "--test-threads=1"];
        let mut printed = String::new();
        let mut show = |text: &str| {
            let text = text.replace(ALIVE, "");
            print!("{text}");
            printed.push_str(&text);
        };
        let reason = match self.run(&command, &mut show, (deadline, SILENCE)) {
            // A filter that finds no test succeeds as well.
            Ok(0) if printed.contains("test result: ok. 1 passed") => return Ok(()),
            Ok(0) => format!("the lab ran no test of the name {test}"),
            Ok(status) => format!("its steps ended with exit status {status}:\n{}", panic_in(&printed)),
            Err(LabError::Test { reason, .. }) => reason,
            Err(e) => return Err(e),
        };
        self.show_logs();
        Err(self.process.test_error(reason))
    }

    /// Prints what the lab host still knows of a failed test: it goes with it.
    fn show_logs(&mut self) {
        let lab = profile_folder().join("lab").display().to_string();
        let mut show = |text: &str| print!("{text}");
        if let Err(e) = self.run(&[&lab, "logs"], &mut show, (LOGS, LOGS)) {
            println!("the lab's logs could not be had: {e}");
        }
    }

    /// Runs a program as root in the lab host; gives its exit status. The deadlines are those of [`Guest::run_streaming`].
    pub(super) fn run(
        &mut self,
        command: &[&str],
        on_output: &mut dyn FnMut(&str),
        deadlines: (Duration, Duration),
    ) -> Result<i32, LabError> {
        let (program, arguments) = command.split_first().expect("a command has a program");
        let show = |piece: &[u8]| on_output(&String::from_utf8_lossy(piece));
        let rounds = std::env::var(ROUNDS).ok();
        let mut variables = vec![(INSIDE, "1")];
        variables.extend(rounds.as_deref().map(|rounds| (ROUNDS, rounds)));
        let status = self.agent.run_streaming(program, arguments, &variables, show, deadlines);
        status.map_err(|e| LabError::Test {
            reason: e.reason().to_owned(),
            console: self.process.console.clone(),
            tail: self.process.tail(),
        })
    }
}

/// How a test that ran in the lab panicked first: where, and with which words.
fn panic_in(printed: &str) -> String {
    let mut lines = printed.lines().skip_while(|line| !line.contains("panicked at "));
    let place = lines.next();
    let words = lines.take_while(|line| !line.starts_with("note: run with")).take(PANIC);
    place.into_iter().chain(words).map(|line| format!("  > {line}\n")).collect()
}

/// What QEMU's standard input and output are.
pub(super) enum Line {
    /// The line to the agent.
    Agent(OwnedFd),
    /// A person's terminal: a shell in the lab.
    Terminal { rows: u16, columns: u16 },
}

/// QEMU, the thread that started it, and its console's file.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    waiter: Option<JoinHandle<i32>>,
    console: PathBuf,
}

impl Process {
    /// Starts QEMU on a line, and on a new one if the lab host stalls in its boot; gives the other end of the line too.
    pub(super) fn start_unstalled<T>(
        parts: &Parts,
        mut line: impl FnMut() -> Result<(Line, T), LabError>,
    ) -> Result<(Process, T), LabError> {
        for _ in 1..BOOTS {
            let (ours, theirs) = line()?;
            let process = Process::start(parts, ours)?;
            if process.reaches_init() {
                return Ok((process, theirs));
            }
            eprintln!("the lab host stalled in its boot: booting another; {}", process.console.display());
        }
        let (ours, theirs) = line()?;
        Ok((Process::start(parts, ours)?, theirs))
    }

    /// Whether the kernel has come as far as its first process, or QEMU has ended, which others explain; `false` if it takes too long.
    fn reaches_init(&self) -> bool {
        let until = Instant::now() + TO_INIT.min(boot_deadline());
        let is_there =
            || std::fs::read(&self.console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(INIT));
        let is_over = || self.waiter.as_ref().is_none_or(JoinHandle::is_finished);
        while Instant::now() < until {
            if is_there() || is_over() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    }

    fn start(parts: &Parts, line: Line) -> Result<Process, LabError> {
        // A program may boot several, and each one's words may be what somebody looks for.
        static STARTED: AtomicU32 = AtomicU32::new(1);
        let console = run_folder()?.join(format!("console-{}.log", STARTED.fetch_add(1, Ordering::Relaxed)));
        let mut command = command(parts, &console, &line);
        let log = console.with_extension(QEMU_LOG);
        command.stderr(std::fs::File::create(&log).map_err(|source| LabError::Make { path: log, source })?);
        match line {
            Line::Agent(fd) => {
                let twin = fd.try_clone().map_err(|source| spawn_error(&parts.qemu, source))?;
                command.stdin(Stdio::from(fd)).stdout(Stdio::from(twin));
            }
            Line::Terminal { .. } => {}
        }
        let (sender, started) = channel();
        // The kernel's promise to kill a child "with its parent" means the thread that started it: this one stays until QEMU ends.
        let waiter = std::thread::Builder::new().name("lab host".into()).spawn(move || {
            let child = command.spawn();
            drop(command);
            let mut child: Child = match child {
                Ok(child) => {
                    let _ = sender.send(Ok(child.id()));
                    child
                }
                Err(source) => {
                    let _ = sender.send(Err(source));
                    return -1;
                }
            };
            child.wait().ok().and_then(|status| status.code()).unwrap_or(-1)
        });
        let waiter = waiter.map_err(|source| spawn_error(&parts.qemu, source))?;
        let pid = started.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that starts it died")));
        let pid = pid.map_err(|source| spawn_error(&parts.qemu, source))?;
        Ok(Process { pid: Pid::from_raw(pid.cast_signed()), waiter: Some(waiter), console })
    }

    /// Waits until QEMU ends by itself, as it does when the shell in the lab ends.
    pub(super) fn wait_for_end(mut self) -> Result<(), LabError> {
        let code = self.waiter.take().and_then(|waiter| waiter.join().ok()).unwrap_or(-1);
        let reason = match (code, self.failure()) {
            (0, None) => return Ok(()),
            (_, Some(reason)) => reason,
            (code, None) => format!("its QEMU ended with exit status {code}: {}", self.said()),
        };
        Err(LabError::Boot { reason, console: self.console.clone(), tail: self.tail() })
    }

    fn boot_error(&self, error: &GuestError) -> LabError {
        // What the host's init found wrong, or QEMU, says more than that the line closed.
        let (reason, qemu) = (self.failure(), self.said());
        let reason = reason.unwrap_or_else(|| [error.reason(), &qemu].join("\n").trim_end().to_owned());
        LabError::Boot { reason, console: self.console.clone(), tail: self.tail() }
    }

    fn test_error(&self, reason: String) -> LabError {
        let reason = format!("what its QEMU said:\n{}\n{reason}", self.said());
        LabError::Test { reason, console: self.console.clone(), tail: self.tail() }
    }

    /// The reason that the lab host's init or its `lab prepare` gave for giving up.
    fn failure(&self) -> Option<String> {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().find_map(|line| Some(line.split_once(FAILED)?.1.trim().to_owned()))
    }

    /// What QEMU itself complained of.
    fn said(&self) -> String {
        std::fs::read_to_string(self.console.with_extension(QEMU_LOG)).unwrap_or_default()
    }

    /// The last lines of the console: the kernel's and init's.
    fn tail(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        crate::last_lines(&text, TAIL).map(|line| format!("  | {line}\n")).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter.take() else { return };
        if !waiter.is_finished() {
            // The thread has not reaped it yet or is about to: the number is still its own but for that moment.
            let _ = kill(self.pid, Signal::SIGKILL);
        }
        let _ = waiter.join();
    }
}

fn spawn_error(program: &Path, source: io::Error) -> LabError {
    LabError::Spawn { program: program.to_owned(), source }
}

fn boot_deadline() -> Duration {
    let seconds = std::env::var("QVIRT_LAB_BOOT").ok().and_then(|seconds| seconds.parse().ok());
    seconds.map_or(BOOT, Duration::from_secs)
}

/// `target/lab/PID`: for the console of this program's lab hosts. Those of programs that are gone are removed.
fn run_folder() -> Result<PathBuf, LabError> {
    let all = images().folder().with_file_name("lab");
    let error = |folder: &Path| {
        let path = folder.to_owned();
        move |source| LabError::Make { path, source }
    };
    std::fs::create_dir_all(&all).map_err(error(&all))?;
    for entry in std::fs::read_dir(&all).map_err(error(&all))?.flatten() {
        if !Path::new("/proc").join(entry.file_name()).exists() {
            // Another run may have removed it meanwhile.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let own = all.join(std::process::id().to_string());
    std::fs::create_dir_all(&own).map_err(error(&own))?;
    Ok(own)
}

/// The lab host's command line: the machine, the hardware that tests know by name, and the folders that it shows at their own places.
fn command(parts: &Parts, console: &Path, line: &Line) -> Command {
    // It sets what is to happen to QEMU when its parent ends, then becomes QEMU.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(&parts.qemu);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-smp",
        parts.processor.count(),
        "-m",
        "4096",
    ]);
    command.args(["-M", "q35,kernel-irqchip=split,i8042=off"]);
    match parts.processor {
        Processor::Hardware => command.args(["-accel", "kvm", "-cpu", "host"]),
        Processor::Emulated => {
            command.args(["-accel", "tcg,thread=multi", "-cpu", "max,vendor=AuthenticAMD,+svm"])
        }
    };
    command.args(["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]);
    command.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs);
    command.arg("-drive").arg(with_file("if=none,id=root,format=raw,snapshot=on,file=", &parts.root));
    command.args(["-device", "virtio-blk-pci,id=root-disk,drive=root,serial=lab-root"]);
    command
        .arg("-chardev")
        .arg(with_file("file,id=console,path=", console))
        .args(["-serial", "chardev:console"]);
    command.args(["-chardev", "stdio,id=line,signal=off", "-device", "virtio-serial-pci"]);
    command.args(["-device", "virtio-rng-pci"]);
    super::host::pci::add_hardware(&mut command);
    for (number, folder) in parts.shares.iter().enumerate() {
        let share = format!("local,id=share{number},security_model=none,readonly=on,multidevs=remap,path=");
        command.arg("-fsdev").arg(with_file(&share, folder));
        command.args(["-device", &format!("virtio-9p-pci,fsdev=share{number},mount_tag=share{number}")]);
    }
    command.arg("-append").arg(kernel_words(parts, line));
    match line {
        Line::Agent(_) => command.args(["-device", "virtserialport,chardev=line,name=org.qvirt.agent"]),
        Line::Terminal { .. } => command.args(["-device", "virtconsole,chardev=line"]),
    };
    command
}

/// `prefix` and a path, whose commas are doubled for QEMU's option parser.
fn with_file(prefix: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = prefix.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        bytes.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
    }
    OsString::from_vec(bytes)
}

/// What the kernel and `integration-images/lab/init` are told.
fn kernel_words(parts: &Parts, line: &Line) -> String {
    // The second line is speed; the timer check panics where a busy machine lets the emulated timer wait. A processor that waits for the other one's
    // answer in vain ends the lab after 40 s, where the test's own deadline would be minutes.
    let mut words = String::from(
        "console=ttyS0 quiet loglevel=4 panic=-1 softlockup_panic=1 watchdog_thresh=20 intel_iommu=on iommu=pt \
         mitigations=off tsc=reliable no_timer_check nokaslr audit=0 cryptomgr.notests random.trust_cpu=on",
    );
    for (number, folder) in parts.shares.iter().enumerate() {
        words.push_str(&format!(" lab.share=share{number}:{}", folder.display()));
    }
    let (programs, qemu) = (profile_folder(), images().qemu(QemuVersion::V10_0));
    words.push_str(&format!(" lab.prepare={}/lab lab.path={}", programs.display(), programs.display()));
    if let Some(folder) = qemu.parent() {
        words.push_str(&format!(" lab.path={}", folder.display()));
    }
    match line {
        Line::Agent(_) => words.push_str(" lab.console=ttyS0"),
        Line::Terminal { rows, columns } => {
            words.push_str(&format!(" lab.console=hvc0 lab.shell=1 lab.rows={rows} lab.cols={columns}"));
        }
    }
    words
}
