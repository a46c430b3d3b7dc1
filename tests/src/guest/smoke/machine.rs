//! A QEMU by hand, without qvirt.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qemu::{QemuVersion, images};

/// A QEMU of this test's own, killed and reaped whatever happens, in a folder that goes with it.
pub(super) struct Machine {
    qemu: Child,
    /// Holds the monitor's socket, and what a test puts there.
    pub(super) folder: TempDir,
    monitor: BufReader<UnixStream>,
    pub(super) events: Vec<Value>,
    pub(super) started: Instant,
}

impl Machine {
    /// Starts a q35 machine, stopped before its first instruction.
    pub(super) fn start(version: QemuVersion, append: &str, arguments: &[&str]) -> Machine {
        Machine::start_in(version, append, arguments, |_| {})
    }

    /// The same; `prepare` puts into its folder, where QEMU runs, what it needs there.
    pub(super) fn start_in(
        version: QemuVersion,
        append: &str,
        arguments: &[&str],
        prepare: impl FnOnce(&Path),
    ) -> Machine {
        let images = images();
        let folder = tempfile::tempdir().expect("a temporary folder");
        prepare(folder.path());
        let listener = UnixListener::bind(folder.path().join("qmp")).expect("a QMP listener");
        let started = Instant::now();
        let qemu = Command::new(images.qemu(version))
            .args([
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "256",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-S", "-qmp", "unix:qmp"])
            .arg("-kernel")
            .arg(images.kernel())
            .arg("-initrd")
            .arg(images.initramfs())
            .args(["-append", &format!("console=ttyS0 quiet {append}")])
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let mut qemu = Some(qemu);
        let monitor = accept(&listener, qemu.as_mut());
        monitor.set_read_timeout(Some(Duration::from_secs(60))).expect("a read timeout");
        let qemu = qemu.expect("it was put there above");
        let mut machine =
            Machine { qemu, folder, monitor: BufReader::new(monitor), events: Vec::new(), started };
        assert!(machine.read().get("QMP").is_some(), "QEMU greets first");
        machine.command("qmp_capabilities", json!({}));
        machine
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("QEMU answers within a minute");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP said {line:?}: {e}"))
    }

    pub(super) fn command(&mut self, name: &str, arguments: Value) -> Value {
        let line = json!({ "execute": name, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{line}").expect("QEMU takes the command");
        loop {
            let mut message = self.read();
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            match message.get_mut("return") {
                Some(value) => return value.take(),
                None => panic!("{name}: {message}"),
            }
        }
    }

    /// Waits for DEVICE_DELETED of that device; panics after the monitor's minute.
    pub(super) fn wait_deleted(&mut self, id: &str) {
        while !self.deleted(id) {
            let event = self.read();
            self.events.push(event);
        }
    }

    pub(super) fn deleted(&self, id: &str) -> bool {
        self.events.iter().any(|event| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id)
    }

    pub(super) fn wait_exit(&mut self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.qemu.try_wait().expect("the child is ours").is_none() {
            assert!(
                Instant::now() < until,
                "QEMU still runs a minute after the guest was asked to power off"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only for a process that has ended, which is what is wanted.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// The first connection, unless the QEMU that should make it ends or takes more than a minute; then it is killed.
fn accept(listener: &UnixListener, mut qemu: Option<&mut Child>) -> UnixStream {
    listener.set_nonblocking(true).expect("a non-blocking listener");
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).expect("a blocking stream");
            return stream;
        }
        let ended = qemu.as_mut().and_then(|qemu| qemu.try_wait().expect("the child is ours"));
        if ended.is_some() || Instant::now() > until {
            if let Some(qemu) = qemu {
                drop(qemu.kill());
                drop(qemu.wait());
            }
            panic!("QEMU did not connect to its socket within a minute, or ended: {ended:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pty console of QEMU's, by the id of its chardev.
pub(super) fn pty(machine: &mut Machine, id: &str) -> PathBuf {
    let chardevs = machine.command("query-chardev", json!({}));
    let all = chardevs.as_array().expect("a list of chardevs");
    let one = all.iter().find(|chardev| chardev["label"] == id).expect("the chardev is there");
    PathBuf::from(one["filename"].as_str().and_then(|name| name.strip_prefix("pty:")).expect("it is a pty"))
}

pub(super) const DEVICES: &[&str] = &[
    "-chardev",
    "pty,id=uart",
    "-serial",
    "chardev:uart",
    "-device",
    "pcie-root-port,id=rp1,chassis=1,addr=1.0",
    "-device",
    "pcie-root-port,id=rp2,chassis=2,addr=2.0",
    "-device",
    "pcie-root-port,id=rp3,chassis=3,addr=3.0",
    "-device",
    "pcie-root-port,id=rp4,chassis=4,addr=4.0",
    "-blockdev",
    "null-co,node-name=a,size=1048576,read-zeroes=on",
    "-device",
    "virtio-blk-pci,id=disk0,drive=a,bus=rp1,serial=first",
    "-device",
    "virtio-scsi-pci,id=scsi,bus=rp2",
    "-blockdev",
    "null-co,node-name=b,size=2097152,read-zeroes=on,read-only=on",
    "-device",
    "scsi-hd,drive=b,bus=scsi.0,scsi-id=3,serial=second,device_id=named",
    "-device",
    "scsi-cd,bus=scsi.0,scsi-id=4",
    "-netdev",
    "user,id=n",
    "-device",
    "virtio-net-pci,netdev=n,bus=rp3,mac=52:54:00:00:00:07",
    "-device",
    "virtio-serial-pci,id=vs,bus=rp4",
    "-chardev",
    "null,id=ga",
    "-device",
    "virtserialport,bus=vs.0,chardev=ga,name=org.qemu.guest_agent.0",
    "-chardev",
    "pty,id=hvc",
    "-device",
    "virtconsole,bus=vs.0,chardev=hvc",
];
