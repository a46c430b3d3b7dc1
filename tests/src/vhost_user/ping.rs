//! A guest on real QEMU pings the backend through a NIC with two queue pairs.

use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use super::{ADDRESS, Backend, guest_words};
use crate::guest::{BOOT, Guest};
use crate::qemu::{QemuVersion, images};

/// Killed and reaped whatever happens.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ping(version: QemuVersion) {
    let folder = tempfile::tempdir().expect("a folder");
    let backend = Backend::start(folder.path());
    let console = UnixListener::bind(folder.path().join("console")).expect("a console");
    let images = images();
    let chardev = format!("socket,id=vu,path={}", backend.socket.display());
    let mut command = Command::new(images.qemu(version));
    command.args([
        "-machine",
        "q35,memory-backend=ram",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "256M",
    ]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
    command.args(["-chardev", &chardev, "-netdev", "vhost-user,id=net,chardev=vu,queues=2"]);
    command.args(["-device", "virtio-net-pci,netdev=net,mq=on,vectors=6,mac=52:54:00:00:00:05"]);
    command.args(["-chardev", "socket,id=console,path=console", "-device", "isa-serial,chardev=console"]);
    command.arg("-kernel").arg(images.kernel()).arg("-initrd").arg(images.initramfs());
    command
        .args(["-append", &format!("console=ttyS0 quiet {}", guest_words(version))])
        .current_dir(folder.path())
        .stdin(Stdio::null());
    let _qemu = Qemu(command.spawn().expect("QEMU starts"));
    let (stream, _) = console.accept().expect("QEMU connects its console");
    let mut guest = Guest::from_fd(stream.into()).expect("a console");
    guest.wait_ready(BOOT).expect("it boots");
    let setup = "nic=$(ls /sys/class/net | grep -v lo | head -n 1); ip addr add 10.77.0.2/24 dev $nic; ip link set $nic up";
    guest.check(setup).expect("an address");
    // Frames leave by the queue of the processor that sends them.
    for processor in 0..2 {
        let ping = format!("taskset -c {processor} ping -c 3 -W 5 {ADDRESS}");
        let said = guest.check(&ping).expect("pings are answered");
        println!("{version}, processor {processor}: {said}");
        assert!(said.contains("3 packets received"), "{version}: {said}");
    }
    guest.check("ls -d /sys/class/net/*/queues/tx-1").expect("a second queue");
}

#[test]
fn a_guest_of_qemu_10_0_pings_the_backend() {
    ping(QemuVersion::V10_0);
}

#[test]
fn a_guest_of_qemu_7_2_pings_the_backend() {
    ping(QemuVersion::V7_2);
}

#[test]
fn the_backend_takes_its_socket_along() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut backend = Backend::start(folder.path());
    let pid = nix::unistd::Pid::from_raw(backend.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our own child");
    assert!(backend.process.wait().expect("our own child").success());
    assert!(!backend.socket.exists());
}
