//! A VM of a test: a `QVIRT_ROOT` of its own, a VM file in it, and the real `qvirt` program run on both. It ends what it started, also
//! when the test panics, and can tell whether anything is left.
//!
//! It knows nothing of what a test is about; the guest behind the console is [`crate::guest`]'s.

use std::fmt;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::Guest;
use crate::lab::patience;
use crate::qemu::{QemuVersion, images, qvirt_binary};

/// How long a command may take before the test gives it up.
const PATIENCE: Duration = Duration::from_secs(150);
/// How long processes may take to end.
const ENDING: Duration = Duration::from_secs(15);

/// Memory that other processes share, as VDUSE and vhost-user want it: for [`Vm::with_memory`].
pub const SHARED: &str = "{ size = \"256MiB\", shared = true }";

/// The table of a channel to the guest's agent. It spares a guest whose every byte on a serial port is dear, as in the lab.
pub const AGENT_CHANNEL: &str = "[[channel]]\nid = \"agent\"\nname = \"org.qvirt.agent\"\n\n";

/// What spares a test guest time, on its kernel's command line: a Linux guest of q35 asks each of 256 buses for devices, which is half its accesses to ports and
/// a quarter of its boot in the lab; the rest are checks and mitigations that a guest without secrets does not need.
const SPARE: &str =
    "pci=lastbus=0 mitigations=off nokaslr audit=0 cryptomgr.notests no_timer_check random.trust_cpu=on";

/// What a program left.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit code; 128 and the signal's number if a signal ended it, as shells have it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}\nstdout: {}\nstderr: {}", self.code, self.stdout, self.stderr)
    }
}

/// A VM with folders of its own.
#[derive(Debug)]
pub struct Vm {
    folder: TempDir,
    version: QemuVersion,
}

impl Vm {
    /// A VM that boots the test guest on that QEMU, with two processors, but one where the lab emulates them. `append` are further words of the kernel's command line, `tables` the TOML tables after
    /// the head; `root_ports` the spare ports. Nothing is started.
    pub fn new(version: QemuVersion, append: &str, root_ports: u16, tables: &str) -> Vm {
        Vm::with_memory(version, append, root_ports, "\"256MiB\"", tables)
    }

    /// The same with other memory.
    pub fn with_memory(
        version: QemuVersion,
        append: &str,
        root_ports: u16,
        memory: &str,
        tables: &str,
    ) -> Vm {
        let images = images();
        let folder = tempfile::Builder::new().prefix("qvirt-").tempdir().expect("a temporary folder");
        let vm = Vm { folder, version };
        let vcpus = if crate::lab::is_emulated() { 1 } else { 2 };
        if let Some(answers) = crate::lab::answers_of_qemu() {
            std::fs::create_dir_all(vm.root()).expect("the folder is made");
            std::os::unix::fs::symlink(answers, vm.root().join("cache")).expect("the link is made");
        }
        let config = format!(
            "# The machine of a test.\nname = \"guest\"\nmemory = {memory}\nvcpus = {vcpus}\nqemu = {qemu:?}\n\n[kernel]\npath = {kernel:?}\n\
             initrd = {initrd:?}\nappend = \"console=ttyS0 {SPARE} {append}\"\n\n[pcie]\nroot_ports = {root_ports}  # spare ones\n\n\
             [[serial]]\nid = \"con0\"\nlog = \"console.log\"\n\n{tables}",
            qemu = images.qemu(version),
            kernel = images.kernel(),
            initrd = images.initramfs(),
        );
        std::fs::write(vm.config(), config).expect("the VM file is written");
        vm
    }

    /// Gives its guest `qemu-ga`, QEMU's own agent, which `qga` starts there. It is not started yet.
    pub fn with_qemu_ga(self) -> Vm {
        let images = images();
        let parts =
            [images.initramfs(), images.guest_agent()].map(|part| std::fs::read(part).expect("it was made"));
        let initramfs = self.path("initramfs.cpio");
        std::fs::write(&initramfs, parts.concat()).expect("it is written");
        let config = std::fs::read_to_string(self.config()).expect("the VM file");
        let [from, to] = [&images.initramfs(), &initramfs].map(|path| format!("initrd = {path:?}"));
        assert!(config.contains(&from), "{config}");
        std::fs::write(self.config(), config.replace(&from, &to)).expect("the VM file is written");
        self
    }

    /// The QEMU it runs on.
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// The VM file.
    pub fn config(&self) -> PathBuf {
        self.path("guest.toml")
    }

    /// `QVIRT_ROOT`.
    pub fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// A file of the VM's folder; relative paths of the VM file mean the same.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A raw image: `text`, then zeros up to `mib` MiB. Returns its path as text, for a command line.
    pub fn raw(&self, name: &str, mib: u64, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the image is written");
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the image opens");
        file.set_len(mib << 20).expect("the image grows");
        path.display().to_string()
    }

    /// A qcow2 image, of a size in MiB or on top of another one of that format. Returns its path as text.
    pub fn qcow2(&self, name: &str, base: Result<u64, (&str, &str)>) -> String {
        let path = self.path(name).display().to_string();
        let mut command = Command::new(images().qemu_img(self.version));
        command.args(["create", "-q", "-f", "qcow2"]);
        match base {
            Ok(mib) => command.arg(&path).arg(format!("{mib}M")),
            Err((backing, format)) => command.args(["-b", backing, "-F", format]).arg(&path),
        };
        let output =
            finished(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("qemu-img starts"));
        assert_eq!(output.code, 0, "qemu-img create {path}: {output}");
        path
    }

    /// The `qvirt` program with this VM's folders and these arguments; the word `guest` is the VM's name.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(qvirt_binary());
        command
            .args(arguments)
            .env("QVIRT_ROOT", self.root())
            .env_remove("QVIRT_LOG")
            .current_dir(self.folder.path());
        // For a person who looks for a fault; the owner's log is printed with every failure.
        if let Some(level) = std::env::var_os("QVIRT_TEST_LOG") {
            command.env("QVIRT_LOG", level);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs `qvirt` and waits for its end.
    pub fn qvirt(&self, arguments: &[&str]) -> Output {
        self.qvirt_with(&[], arguments)
    }

    /// The same with more variables in its environment.
    pub fn qvirt_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        let child = self.command(arguments).envs(variables.iter().copied()).spawn().expect("qvirt starts");
        finished(child)
    }

    /// Runs `qvirt`, which must end with that exit code.
    pub fn expect(&self, code: i32, arguments: &[&str]) -> Output {
        let output = self.qvirt(arguments);
        assert_eq!(output.code, code, "qvirt {}: {output}", arguments.join(" "));
        output
    }

    /// Runs `qvirt`, which must succeed; gives its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        self.expect(0, arguments).stdout
    }

    /// Runs `qvirt qmp guest COMMAND ARGUMENTS`, which must succeed; gives the reply.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Value {
        let text = self.ok(&["qmp", "guest", command, &arguments.to_string()]);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{command} replied {text:?}: {e}"))
    }

    /// Sends QEMU a command behind its owner's back, by the monitor for rescue.
    pub fn rescue(&self, command: &str, arguments: Value) -> Value {
        let socket = self.root().join("run/guest/rescue.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let stream = tokio::net::UnixStream::connect(&socket).await.expect("QEMU listens");
            let (qmp, _events) =
                qmp_client::Qmp::connect(stream, qmp_client::Options::default()).await.expect("a session");
            qmp.call(command, arguments).await.unwrap_or_else(|error| panic!("{command}: {error}"))
        })
    }

    /// Launches the VM from its file, or adopts it, in the background.
    pub fn start(&self) {
        self.ok(&["start", &self.config().display().to_string()]);
    }

    /// `qvirt status --json`
    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ok(&["status", "guest", "--json"])).expect("the status is JSON")
    }

    /// A device of the status, by its id; `Null` if there is none.
    pub fn device(&self, id: &str) -> Value {
        let status = self.status();
        let found = status["devices"].as_array().into_iter().flatten().find(|d| d["id"] == id);
        found.cloned().unwrap_or(Value::Null)
    }

    /// Ids of the devices, sorted.
    pub fn device_ids(&self) -> Vec<String> {
        let status = self.status();
        let devices = status["devices"].as_array().into_iter().flatten();
        let mut ids: Vec<String> = devices.filter_map(|d| d["id"].as_str()).map(str::to_owned).collect();
        ids.sort();
        ids
    }

    /// The guest, on the console of that device.
    pub fn console(&self, id: &str) -> Guest {
        let device = self.device(id);
        let pty = device["pty"].as_str().unwrap_or_else(|| panic!("{id} has no pty: {device}"));
        Guest::attach(Path::new(pty)).expect("the console opens")
    }

    /// The guest, on its agent's channel if the VM has [`AGENT_CHANNEL`], else on the console `con0`.
    pub fn guest(&self) -> Guest {
        let channel = self.root().join("run/guest/channel-agent.sock");
        match channel.exists() {
            true => Guest::attach(&channel).expect("the channel opens"),
            false => self.console("con0"),
        }
    }

    /// The owner's process.
    pub fn owner_pid(&self) -> i32 {
        pid_in(&self.status(), "owner_pid")
    }

    /// QEMU's process.
    pub fn qemu_pid(&self) -> i32 {
        pid_in(&self.status(), "pid")
    }

    /// What the owner that was started last has logged.
    pub fn owner_log(&self) -> String {
        std::fs::read_to_string(self.root().join("lib/guest/owner.log")).unwrap_or_default()
    }

    /// The last lines that the guest wrote to its console.
    fn console_tail(&self) -> String {
        let bytes = std::fs::read(self.path("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        crate::last_lines(&text, 20).map(|line| format!("  | {line}\n")).collect()
    }

    /// What QEMU that was started last has written; an owner that was there at its end has logged it too.
    pub fn qemu_log(&self) -> String {
        std::fs::read_to_string(self.root().join("lib/guest/qemu.log")).unwrap_or_default()
    }

    /// Kills the owner with SIGKILL and waits until it is gone.
    pub fn kill_owner(&self) {
        let pid = self.owner_pid();
        self.kill_process(pid);
    }

    /// Kills a process that this VM started, and waits until it is gone.
    pub fn kill_process(&self, pid: i32) {
        assert!(self.processes().contains(&pid), "process {pid} is none of this VM's");
        // It may end by itself just now.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        // A process loses its memory, and with it its environment, before its files and locks; and its first thread before the others.
        let ended = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => {
                let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
                threads < 2
                    && stat
                        .rsplit(')')
                        .next()
                        .is_some_and(|rest| rest.starts_with(" Z") || rest.starts_with(" X"))
            }
            Err(_) => true,
        };
        self.wait_for(&format!("the end of process {pid}"), ended);
    }

    /// Waits until `done`, fifteen seconds at most, or what an emulated lab makes of them.
    pub fn wait_for(&self, what: &str, done: impl Fn() -> bool) {
        let (begin, patience) = (Instant::now(), patience(ENDING));
        while !done() {
            assert!(begin.elapsed() < patience, "waited {patience:?} in vain for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Live processes with this VM's folders in their environment or arguments: owners, clients, QEMU.
    pub fn processes(&self) -> Vec<i32> {
        let root = self.root().display().to_string().into_bytes();
        let mentions = |pid: i32, file: &str| {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            bytes.windows(root.len()).any(|window| window == root)
        };
        // A zombie has neither.
        let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| mentions(*pid, "environ") || mentions(*pid, "cmdline")).collect()
    }

    /// The live processes that serve images of this VM, each with the arguments it was started with.
    pub fn proxies(&self) -> Vec<(i32, String)> {
        let words = |pid: i32| {
            let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let words = String::from_utf8_lossy(&bytes).replace('\0', " ");
            words.split(' ').any(|word| word == "io-proxy").then_some((pid, words))
        };
        self.processes().into_iter().filter_map(words).collect()
    }

    /// Names of the files in the lease folder, but for its lock.
    pub fn leases(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root().join("leases")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name != ".lock").collect()
    }

    /// What is left of the VM on the host: processes, runtime files, leases.
    pub fn remains(&self) -> Vec<String> {
        let files = |folder: &str| {
            let entries = std::fs::read_dir(self.root().join(folder)).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path().display().to_string())
                .filter(|path| !path.ends_with("/.lock"))
                .collect::<Vec<_>>()
        };
        let processes = self.processes().into_iter().map(|pid| format!("process {pid}"));
        processes.chain(files("run")).chain(files("leases")).collect()
    }

    /// Asserts that nothing is left of the VM, after the moment that an owner takes to clear up.
    pub fn nothing_left(&self) {
        let until = Instant::now() + patience(ENDING);
        while !self.remains().is_empty() {
            assert!(Instant::now() < until, "left behind: {:#?}", self.remains());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the VM by `qvirt kill` and asserts that nothing is left.
    pub fn end(&self) {
        let output = self.qvirt(&["kill", "guest"]);
        // In an emulated host QEMU takes longer to end than a kill waits.
        assert!([0, 4].contains(&output.code), "{output}");
        self.nothing_left();
    }
}

/// QEMU's TCG aborts now and then while a guest maps its PCI devices, with no hot-plug at all: seen with 10.0.2 on 2026-11-22, once in some
/// hundred boots on a loaded machine. It waits for a lock with a TLB entry in hand that is stale afterwards. To go when the QEMUs under test
/// do not have it any more.
const TCG_ASSERTION: &str = "iotlb_to_section: Assertion `section_index < d->map.sections_nb' failed";

/// The same in QEMU 7.2, which does not look before it follows the entry: seen on 2026-11-28, once in some four hundred boots. Only where the guest had
/// not come far enough to say a word; what makes QEMU crash for another reason does so twice.
const TCG_CRASH: &str = "QEMU killed by signal 11 (SIGSEGV)";

thread_local! {
    static TCG_BUG: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether a QEMU of this thread's test died of that bug since the last call: then the test says nothing about qvirt.
pub fn tcg_bug_was_hit() -> bool {
    TCG_BUG.replace(false)
}

impl Drop for Vm {
    fn drop(&mut self) {
        let left = self.remains();
        for pid in self.processes() {
            // What ends by itself meanwhile need not be killed.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let until = Instant::now() + ENDING;
        while !self.processes().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        if std::thread::panicking() {
            let (owner, qemu, guest) = (self.owner_log(), self.qemu_log(), self.console_tail());
            eprintln!(
                "the owner's log:\n{owner}\nQEMU's log:\n{qemu}\nthe last lines of the guest's console:\n{guest}"
            );
            let at_boot = owner.contains(TCG_CRASH) && !guest.contains("QVIRT-GUEST");
            let asserted = [owner, qemu].iter().any(|log| log.contains(TCG_ASSERTION));
            TCG_BUG.set(TCG_BUG.get() || asserted || at_boot);
        } else {
            assert!(left.is_empty(), "the test ended and left: {left:#?}");
        }
    }
}

fn pid_in(status: &Value, key: &str) -> i32 {
    let pid = status[key].as_i64().and_then(|pid| i32::try_from(pid).ok());
    pid.unwrap_or_else(|| panic!("the status has no {key}: {status}"))
}

/// Waits for a program whose output is piped; kills it and panics after a while.
pub fn finished(mut child: Child) -> Output {
    fn reader(pipe: Option<impl Read + AsFd + Send + 'static>) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read until an error is the output.
            let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let until = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().expect("the child is ours") {
            Some(status) => break status,
            None if Instant::now() > until => {
                // It is ours and not reaped, so the number is its own.
                let _ = child.kill();
                let _ = child.wait();
                panic!("process {} did not end within {PATIENCE:?}", child.id());
            }
            None => std::thread::sleep(Duration::from_millis(3)),
        }
    };
    let signal = std::os::unix::process::ExitStatusExt::signal(&status).map_or(0, |signal| 128 + signal);
    let text = |reader: std::thread::JoinHandle<String>| reader.join().expect("a reader does not panic");
    Output { code: status.code().unwrap_or(signal), stdout: text(stdout), stderr: text(stderr) }
}
