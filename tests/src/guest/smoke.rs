//! The guest and this harness, proved on QEMU by hand, without qvirt: a test that fails here blames neither qvirt nor its crates.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{BOOT, Guest};
use crate::qemu::{QemuVersion, images};

/// A QEMU of this test's own, killed and reaped whatever happens, in a folder that goes with it.
struct Machine {
    qemu: Child,
    /// Holds the monitor's socket.
    _folder: TempDir,
    monitor: BufReader<UnixStream>,
    events: Vec<Value>,
    started: Instant,
}

impl Machine {
    /// Starts a q35 machine, stopped before its first instruction.
    fn start(version: QemuVersion, append: &str, arguments: &[&str]) -> Machine {
        let images = images();
        let folder = tempfile::tempdir().expect("a temporary folder");
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
            Machine { qemu, _folder: folder, monitor: BufReader::new(monitor), events: Vec::new(), started };
        assert!(machine.read().get("QMP").is_some(), "QEMU greets first");
        machine.command("qmp_capabilities", json!({}));
        machine
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("QEMU answers within a minute");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP said {line:?}: {e}"))
    }

    fn command(&mut self, name: &str, arguments: Value) -> Value {
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
    fn wait_deleted(&mut self, id: &str) {
        while !self.deleted(id) {
            let event = self.read();
            self.events.push(event);
        }
    }

    fn deleted(&self, id: &str) -> bool {
        self.events.iter().any(|event| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id)
    }

    fn wait_exit(&mut self) {
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
fn pty(machine: &mut Machine, id: &str) -> PathBuf {
    let chardevs = machine.command("query-chardev", json!({}));
    let all = chardevs.as_array().expect("a list of chardevs");
    let one = all.iter().find(|chardev| chardev["label"] == id).expect("the chardev is there");
    PathBuf::from(one["filename"].as_str().and_then(|name| name.strip_prefix("pty:")).expect("it is a pty"))
}

const DEVICES: &[&str] = &[
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

fn boots_and_powers_off(version: QemuVersion) {
    let mut machine = Machine::start(version, "", DEVICES);
    let console = pty(&mut machine, "uart");
    let mut guest = Guest::attach(&console).expect("the console opens");
    machine.command("cont", json!({}));
    guest.wait_init(BOOT).expect("the guest starts");
    let init = machine.started.elapsed();
    guest.wait_ready(BOOT).expect("the guest boots");
    println!("{version}: first line after {init:?}, ready after {:?}", machine.started.elapsed());

    let seen = guest.inventory().expect("an inventory");
    println!("{seen}");
    let disk = "disk vda 1048576 serial=first ro=0 queues=1 cache=back discard=1 block=512 at=0000:01:00.0";
    assert_eq!(seen.find("disk", "vda"), Some(disk));
    let disk = seen.find("disk", "serial=second").expect("the SCSI disk");
    assert!(disk.contains(" ro=1 ") && disk.ends_with(" at=0000:02:00.0 hctl=0:0:3:0 id=named"), "{disk}");
    assert_eq!(seen.of("cdrom"), ["cdrom sr0 media=none hctl=0:0:4:0 at=0000:02:00.0"]);
    assert_eq!(seen.nics(), ["nic eth0 52:54:00:00:00:07 queues=1 mtu=1500 at=0000:03:00.0"]);
    assert_eq!(seen.of("channel"), ["channel org.qemu.guest_agent.0"]);
    assert_eq!(seen.of("console").len(), 1);
    assert_eq!(seen.of("serial"), ["serial ttyS0"]);
    assert_eq!((seen.of("memory"), seen.of("cpus")), (vec!["memory 262144"], vec!["cpus 1"]));
    assert_eq!(seen.of("pci").iter().filter(|line| line.contains(" virtio_")).count(), 4);

    let output = guest.run("echo out; echo err >&2; exit 7").expect("a script");
    assert_eq!((output.status, output.stdout.as_str()), (7, "out\nerr\n"));
    let long = "x".repeat(20_000);
    assert_eq!(
        guest.check(&format!("echo {long} | wc -c")).expect("a script longer than a tty's line").trim(),
        "20001"
    );

    machine.command("system_powerdown", json!({}));
    guest.wait_closed(Duration::from_secs(60)).expect("QEMU closes the console");
    machine.wait_exit();
}

#[test]
fn guest_boots_and_powers_off_on_qemu_7_2() {
    boots_and_powers_off(QemuVersion::V7_2);
}

#[test]
fn guest_boots_and_powers_off_on_qemu_10_0() {
    boots_and_powers_off(QemuVersion::V10_0);
}

/// The guest leaves an unplug unanswered for as long as it is deaf, and does it when it hears again.
fn ignores_unplug(version: QemuVersion, arguments: &[&str]) {
    let mut machine = Machine::start(version, "qvirt.nohotplug=1", &[DEVICES, arguments].concat());
    let console = pty(&mut machine, "uart");
    let mut guest = Guest::attach(&console).expect("the console opens");
    machine.command("cont", json!({}));
    guest.wait_ready(BOOT).expect("the guest boots");

    machine.command("device_del", json!({ "id": "disk0" }));
    std::thread::sleep(Duration::from_secs(8));
    let seen = guest.inventory().expect("an inventory");
    machine.command("query-status", json!({}));
    assert!(!machine.deleted("disk0"), "the guest was to ignore the request: {:?}", machine.events);
    assert!(seen.find("disk", "serial=first").is_some(), "{seen}");

    guest.check("hotplug on").expect("the guest hears again");
    machine.wait_deleted("disk0");
    let later = guest
        .wait_inventory("unplug", |seen| seen.find("disk", "serial=first").is_none())
        .expect("the disk goes");
    println!("{version} {arguments:?}\n{}", seen.diff(&later));
}

#[test]
fn guest_can_ignore_acpi_unplug() {
    ignores_unplug(QemuVersion::V7_2, &[]);
}

#[test]
fn guest_can_ignore_native_pcie_unplug() {
    ignores_unplug(QemuVersion::V10_0, &["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);
}

#[test]
fn guest_speaks_on_a_virtio_console_and_waits_when_asked_to() {
    let mut machine =
        Machine::start(QemuVersion::V10_0, "qvirt.console=hvc0 qvirt.delay=2 qvirt.nopoweroff=1", DEVICES);
    let console = pty(&mut machine, "hvc");
    let mut guest = Guest::attach(&console).expect("the console opens");
    machine.command("cont", json!({}));
    guest.wait_init(BOOT).expect("the guest starts");
    let init = Instant::now();
    guest.wait_ready(BOOT).expect("the guest boots");
    assert!(
        init.elapsed() >= Duration::from_millis(1900),
        "the drivers came {:?} after the first line",
        init.elapsed()
    );
    assert!(guest.transcript().starts_with(b"QVIRT-GUEST-INIT"), "no byte is missed");

    machine.command("system_powerdown", json!({}));
    let error = guest.wait_closed(Duration::from_secs(3)).expect_err("this guest ignores its power button");
    assert!(error.to_string().contains("QVIRT-GUEST-READY"), "{error}");
    assert!(guest.inventory().expect("it still answers").find("disk", "vda").is_some());
}

#[test]
fn a_console_that_closes_or_is_silent_is_an_error_with_the_last_lines() {
    let (mut other, ours) = UnixStream::pair().expect("a pair of sockets");
    let mut guest = Guest::from_fd(ours.into()).expect("a console");
    other.write_all(b"firmware\nkernel panic\n").expect("the console takes bytes");
    let error = guest.wait_ready(Duration::from_millis(300)).expect_err("there is no guest").to_string();
    assert!(error.contains("QVIRT-GUEST-READY") && error.contains("| kernel panic"), "{error}");
    drop(other);
    let error = guest.run("true").expect_err("there is no guest").to_string();
    assert!(error.contains("console"), "{error}");
}
