//! The guest and this harness, proved on QEMU by hand, without qvirt: a test that fails here blames neither qvirt nor its crates.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{BOOT, Guest, Unplug};
use crate::qemu::QemuVersion;

mod agent;
mod machine;

use machine::{DEVICES, Machine, pty};

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
    assert_eq!(seen.devices().disks.iter().map(|disk| disk.bytes).sum::<u64>(), 3 << 20);

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

    guest.unplug(Unplug::Answer).expect("the guest hears again");
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
fn a_line_that_closes_or_is_silent_is_an_error_with_the_last_lines() {
    let (mut other, ours) = UnixStream::pair().expect("a pair of sockets");
    let mut guest = Guest::from_fd(ours.into()).expect("a line");
    other.write_all(b"firmware\nkernel panic\n").expect("the line takes bytes");
    let error = guest.wait_ready(Duration::from_millis(300)).expect_err("there is no guest").to_string();
    assert!(error.contains("QVIRT-GUEST-READY") && error.contains("| kernel panic"), "{error}");
    drop(other);
    let error = guest.run("true").expect_err("there is no guest").to_string();
    assert!(error.contains("line"), "{error}");
}
