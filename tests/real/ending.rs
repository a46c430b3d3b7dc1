//! The ways a VM ends, and the ways its owner does.

use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::guest::{BOOT, Guest};
use tests::qemu::QemuVersion;
use tests::vm::{Output, Vm, finished};

use tests::scene::{QUIET, Scene};
use tests::{on_both, on_one};

on_both! {
    killed => qemu_killed_from_outside,
}

on_one! { 10.0:
    deaf => a_guest_that_ignores_the_power_button,
    power => shutdown_reboot_reset,
}

on_one! { 7.2:
    signals => signals_of_run,
}

const DISK: &str = "[[disk]]\nid = \"sys\"\npath = \"sys.img\"\nserial = \"sys\"\n";

fn with_disk(version: QemuVersion, append: &str) -> Vm {
    let vm = Vm::new(version, append, 4, DISK);
    vm.raw("sys.img", 4, "SYS");
    vm
}

fn shutdown_reboot_reset(version: QemuVersion) {
    let mut scene = Scene::of(with_disk(version, QUIET));
    let hot = scene.vm.raw("hot.img", 4, "HOT");
    scene.attach(["--disk", &format!("path={hot},id=hot,serial=hot")], "disk", "serial=hot");
    let before = scene.seen.clone();
    let pid = scene.vm.qemu_pid();
    for verb in ["reboot", "reset"] {
        scene.guest.check("touch /tmp/was-here").expect("a script");
        scene.vm.ok(&[verb, "guest"]);
        scene.guest.wait_init(BOOT).expect("the guest starts again");
        scene.guest.wait_ready(BOOT).expect("the guest boots again");
        scene.guest.check("[ ! -e /tmp/was-here ]").expect("it is another boot");
        scene.sees(&format!("the same devices after a {verb}"), |seen| *seen == before);
        assert_eq!(scene.vm.qemu_pid(), pid, "QEMU stays");
        assert_eq!(scene.vm.status()["state"], "running");
    }
    scene.vm.ok(&["pause", "guest"]);
    let error = scene
        .guest
        .run_within("true", std::time::Duration::from_secs(2))
        .expect_err("the guest stands still");
    println!("{error}");
    scene.vm.ok(&["resume", "guest"]);
    scene.guest.check("true").expect("the guest goes on");
    let said = scene.vm.ok(&["shutdown", "guest"]);
    println!("{said}");
    scene.guest.wait_closed(BOOT).expect("the console closes");
    scene.vm.nothing_left();
    scene.vm.expect(5, &["status", "guest"]);
    // A paused start waits for its resume.
    scene.vm.ok(&["start", "--paused", &scene.vm.config().display().to_string()]);
    assert_eq!(scene.vm.status()["state"], "starting");
    scene.guest = scene.vm.console("con0");
    scene.vm.ok(&["resume", "guest"]);
    scene.guest.wait_init(BOOT).expect("the guest runs");
    scene.end();
}

fn a_guest_that_ignores_the_power_button(version: QemuVersion) {
    let mut scene = Scene::of(with_disk(version, "quiet qvirt.nopoweroff=1"));
    let late = scene.vm.expect(4, &["shutdown", "guest", "--timeout", "1s"]);
    assert!(late.stderr.contains("qvirt kill guest"), "{late}");
    scene.guest.check("true").expect("the guest runs on");
    scene.vm.ok(&["attach", "guest", "--nic", "user=true,id=net0"]);
    scene.sees("hot-plug goes on as well", |seen| seen.nics().len() == 1);
    scene.vm.ok(&["shutdown", "guest", "--timeout", "1s", "--then-kill"]);
    scene.guest.wait_closed(BOOT).expect("the console closes");
    scene.vm.nothing_left();
}

/// `qvirt run` in the foreground, with its guest up.
fn running(vm: &Vm) -> (Child, Guest) {
    let owner = vm.command(&["run", &vm.config().display().to_string()]).spawn().expect("qvirt starts");
    vm.wait_for("the owner", || vm.qvirt(&["status", "guest"]).code == 0);
    let mut guest = vm.console("con0");
    guest.wait_ready(BOOT).expect("the guest boots");
    (owner, guest)
}

fn send(signal: Signal, owner: &Child) {
    let pid = i32::try_from(owner.id()).expect("a process id");
    kill(Pid::from_raw(pid), signal).expect("the owner is signalled");
}

fn ends_well(owner: Child) -> Output {
    let output = finished(owner);
    println!("qvirt run: {output}");
    assert_eq!(output.code, 0, "{output}");
    output
}

fn signals_of_run(version: QemuVersion) {
    let vm = with_disk(version, QUIET);
    // HUP leaves the VM; the next owner is asked to leave, the one after that gets TERM, which the guest hears.
    let (owner, mut guest) = running(&vm);
    let seen = guest.inventory().expect("an inventory");
    println!("== {version}\n{seen}");
    let qemu = vm.qemu_pid();
    let twice = vm.expect(3, &["start", &vm.config().display().to_string()]);
    assert!(twice.stderr.contains("with an owner"), "{twice}");
    send(Signal::SIGHUP, &owner);
    assert!(ends_well(owner).stdout.contains("qvirt run guest"));
    assert!(vm.ok(&["list"]).contains("without an owner"));
    let alone = vm.expect(1, &["status", "guest"]);
    assert!(alone.stderr.contains("qvirt start guest"), "{alone}");
    vm.start();
    assert_eq!(vm.qemu_pid(), qemu, "adopted");
    vm.ok(&["leave", "guest"]);
    vm.wait_for("the owner to leave", || vm.ok(&["list"]).contains("without an owner"));
    assert_eq!(guest.inventory().expect("the guest runs on"), seen);
    let owner = vm.command(&["run", &vm.config().display().to_string()]).spawn().expect("qvirt starts");
    vm.wait_for("the owner", || vm.qvirt(&["status", "guest"]).code == 0);
    send(Signal::SIGTERM, &owner);
    ends_well(owner);
    guest.wait_closed(BOOT).expect("the guest has shut down");
    vm.nothing_left();

    // INT as well; and a second signal does not wait for a guest that does not listen.
    let vm = with_disk(version, "quiet qvirt.nopoweroff=1");
    let (owner, mut guest) = running(&vm);
    send(Signal::SIGINT, &owner);
    std::thread::sleep(std::time::Duration::from_secs(1));
    guest.check("true").expect("the guest runs on");
    send(Signal::SIGTERM, &owner);
    ends_well(owner);
    guest.wait_closed(BOOT).expect("QEMU has ended");
    vm.nothing_left();
}

fn qemu_killed_from_outside(version: QemuVersion) {
    let vm = with_disk(version, QUIET);
    let (owner, _guest) = running(&vm);
    let qemu = vm.qemu_pid();
    vm.kill_process(qemu);
    let output = finished(owner);
    println!("qvirt run: {output}");
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("signal 9") || output.stderr.contains("SIGKILL"), "{output}");
    vm.nothing_left();
    vm.expect(5, &["status", "guest"]);

    // Both killed: what they left is undone by `recover`, or by the next start.
    for by_start in [false, true] {
        vm.start();
        let qemu = vm.qemu_pid();
        vm.kill_owner();
        vm.kill_process(qemu);
        assert!(vm.ok(&["list"]).contains("to be recovered"));
        assert!(vm.remains().len() >= 2, "a folder and a lease: {:?}", vm.remains());
        let dead = vm.expect(5, &["status", "guest"]);
        assert!(dead.stderr.contains("qvirt recover guest"), "{dead}");
        if by_start {
            vm.start();
            vm.end();
        } else {
            println!("{}", vm.ok(&["recover"]));
            vm.nothing_left();
        }
    }
    // Killed without an owner.
    vm.start();
    vm.kill_owner();
    vm.end();
}
