//! A stick that the guest uses when it is to leave, whose attach fails at each step, and whose owner and QEMU die.

use tests::guest::{Inventory, PatternWish};
use tests::lab::host::usb::{MIB, STICKS};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::vm::Vm;

use super::{
    CONTROLLERS, change, disk, driver, file, holder, ids, is_the_hosts, leases, let_go, port, refused, vm,
    write,
};
use crate::sweep::each_step_is_undone;

#[test]
fn a_stick_in_use_is_not_unplugged_and_outlives_owner_and_qemu() {
    inside(|| {
        let [red, ..] = STICKS;
        let channel = "[[channel]]\nid = \"qga\"\nguest_agent = true\n";
        let vm = vm(QemuVersion::V10_0, &format!("{channel}{CONTROLLERS}")).with_qemu_ga();
        let mut scene = step("boot", || Scene::of(vm));
        let before = scene.seen.clone();
        step("traffic is seen", || traffic(&mut scene, &before));
        step("what is open, written and idle is not", || idle(&mut scene));
        step("a mount is, by the guest's agent", || mounted(&mut scene));
        step("SIGKILL of the owner, then another one", || owner_dies(&mut scene, &before));
        step("each step of an attach fails, and is undone", || {
            let wish = format!("host={},id=stick", ids(&red));
            let state = || (driver(&red), holder(&scene.vm, &red), leases(&scene.vm), scene.vm.device_ids());
            let failed = each_step_is_undone(&scene.vm, ["--usb", &wish], state);
            assert_eq!(failed, ["record", "usb", "frontend", "verify", "settle"]);
        });
        step("SIGKILL of the owner and of QEMU", || {
            let qemu = scene.vm.qemu_pid();
            scene.vm.kill_owner();
            scene.vm.kill_process(qemu);
        });
        assert_eq!(driver(&red), None, "a killed QEMU gives nothing back");
        assert_eq!(leases(&scene.vm).len(), 1);
        print!("{}", scene.vm.ok(&["recover", "guest"]));
        is_the_hosts(&scene.vm, &red);
        scene.vm.nothing_left();
    });
}

/// Attaches the stick; gives the guest's name of its disk.
fn attach(scene: &mut Scene) -> String {
    let [red, ..] = STICKS;
    scene.attach(["--usb", &format!("host={},id=stick", ids(&red))], "usb", "serial=LABRED");
    disk(scene)
}

fn traffic(scene: &mut Scene, before: &Inventory) {
    let [red, ..] = STICKS;
    let name = attach(scene);
    scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
    scene.guest.wait_pattern(&name, "blocks", |report| report.verified > 5).expect("it goes on");
    let output = scene.vm.qvirt(&["detach", "guest", "stick"]);
    let words = ["stick: the guest uses USB disk 0781:5567 on ", " transfers in the last second", "--force"];
    refused(&output, 3, &words);
    assert_eq!(scene.vm.device("stick")["stage"], "present");
    let output = scene.vm.expect(0, &["detach", "guest", "stick", "--force", "--wait", "30s"]);
    assert!(!output.stderr.contains("warning"), "{output}");
    let _ = scene.guest.pattern_stop(&name);
    scene.sees("no stick", |seen| seen == before);
    is_the_hosts(&scene.vm, &red);
}

/// What is not yet on the stick may be lost, and the warning says so. Mostly it is; a guest's kernel may write it in the last moment, though.
fn idle(scene: &mut Scene) {
    let [red, ..] = STICKS;
    let zeros = vec![0; usize::try_from(MIB << 20).expect("small")];
    std::fs::write(file(&red), zeros).expect("written");
    let name = attach(scene);
    let script = format!("(exec 3<>{name}; printf LOST >&3; sleep 60) </dev/null >/dev/null 2>&1 & sleep 2");
    scene.guest.check(&script).expect("it holds the disk open");
    let output = scene.vm.expect(0, &["detach", "guest", "stick", "--wait", "30s"]);
    println!("{}", output.stderr.trim());
    let unknown = "whether it is mounted is not known (the guest's agent does not answer)";
    for words in ["what the guest had not yet written", unknown] {
        assert!(output.stderr.contains(words), "{output}");
    }
    scene.sees("no stick", |seen| seen.find("usb", "serial=LABRED").is_none());
    is_the_hosts(&scene.vm, &red);
    let bytes = std::fs::read(file(&red)).expect("the file behind it");
    let fate =
        if bytes.starts_with(b"LOST") { "came onto the stick still" } else { "never came onto the stick" };
    println!("what the guest's cache had {fate}");
}

/// By QEMU's own agent in the guest.
fn mounted(scene: &mut Scene) {
    let [red, ..] = STICKS;
    let name = attach(scene);
    let device = name.rsplit('/').next().expect("a name");
    // What udev writes in an ordinary guest: by it the agent knows bus and serial number.
    let known = format!(
        "mkdir -p /run/udev/data; printf 'E:ID_BUS=usb\\nE:ID_SERIAL=lab_red_LABRED-0:0\\n' >/run/udev/data/b$(cat /sys/class/block/{device}/dev)"
    );
    scene.guest.check(&format!("{known}; qga {name}")).expect("the agent starts, and the stick is mounted");
    let output = scene.vm.qvirt(&["detach", "guest", "stick"]);
    refused(&output, 3, &["mounted at /mnt, by the guest's agent"]);
    scene.guest.check("umount /mnt").expect("it is unmounted");
    let_go(&scene.vm, "stick");
    is_the_hosts(&scene.vm, &red);
}

fn owner_dies(scene: &mut Scene, before: &Inventory) {
    let [red, ..] = STICKS;
    attach(scene);
    scene.vm.kill_owner();
    scene.vm.start();
    assert_eq!(holder(&scene.vm, &red), "VM guest");
    write(scene, &red, "by the successor");
    println!("$ qvirt detach guest stick --force");
    scene.vm.ok(&["detach", "guest", "stick", "--force", "--wait", "30s"]);
    scene.sees("no stick", |seen| seen == before);
    is_the_hosts(&scene.vm, &red);
}

fn qemu_dies(vm: &Vm) {
    let [red, ..] = STICKS;
    vm.start();
    vm.ok(&["attach", "guest", "--usb", &format!("host={},id=stick", ids(&red))]);
    // QEMU takes it from its driver at once, and for itself when the guest asks for it.
    assert_ne!(driver(&red).as_deref(), Some("usb-storage"), "it is QEMU's");
    vm.kill_process(vm.qemu_pid());
    is_the_hosts(vm, &red);
    vm.wait_for("its owner to end", || vm.remains().is_empty());
}

/// Whoever names a port gets what is plugged in there later; the host has that again, too.
fn qemu_dies_with_another_make(vm: &Vm) {
    let [red, ..] = STICKS;
    vm.start();
    vm.ok(&["attach", "guest", "--usb", &format!("host={},id=stick", port(&red))]);
    red.unplug().expect("it is pulled");
    change("idProduct", "0x5599");
    red.plug().expect("it is plugged in");
    vm.wait_for("QEMU to take it", || driver(&red).as_deref() != Some("usb-storage"));
    vm.wait_for("word of it", || vm.device("stick")["usb"]["product"] == "5599");
    vm.kill_process(vm.qemu_pid());
    is_the_hosts(vm, &red);
    vm.wait_for("its owner to end", || vm.remains().is_empty());
    red.unplug().expect("it is pulled");
    change("idProduct", &format!("{:#06x}", red.product));
    red.plug().expect("it is plugged in again");
}

/// Attaches the stick, and detaches it if that is the work, by an owner that dies at that step; gives QEMU's pid.
fn owner_that_dies(vm: &Vm, work: &str) -> i32 {
    let [red, ..] = STICKS;
    let file = vm.config().display().to_string();
    let started = vm.qvirt_with(&[("QVIRT_DIE_STEP", work)], &["start", &file]);
    assert_eq!(started.code, 0, "{started}");
    let qemu = vm.qemu_pid();
    let mut output = vm.qvirt(&["attach", "guest", "--usb", &format!("host={},id=stick", ids(&red))]);
    if !work.starts_with("attach") {
        assert_eq!(output.code, 0, "{output}");
        output = vm.qvirt(&["detach", "guest", "stick", "--force"]);
    }
    assert_ne!(output.code, 0, "the owner was to die: {output}");
    qemu
}

/// The next owner finds QEMU as it was left, and ends what was begun.
fn dies_alone(vm: &Vm, work: &str) {
    let [red, ..] = STICKS;
    let qemu = owner_that_dies(vm, work);
    vm.start();
    assert_eq!(vm.qemu_pid(), qemu, "it was adopted");
    let stage = || vm.device("stick")["stage"].clone();
    vm.wait_for("the end of what was begun", || stage() != "leaving");
    println!("{work}: the successor finds it {}", stage());
    if stage() == "present" {
        assert_eq!(holder(vm, &red), "VM guest");
        vm.ok(&["detach", "guest", "stick", "--force"]);
    }
    is_the_hosts(vm, &red);
    vm.kill_owner();
}

/// `recover` gives back what the dead left.
fn dies_with_qemu(vm: &Vm, work: &str) {
    let [red, ..] = STICKS;
    let qemu = owner_that_dies(vm, work);
    vm.kill_process(qemu);
    print!("{work}: {}", vm.ok(&["recover", "guest"]));
    is_the_hosts(vm, &red);
    vm.nothing_left();
}

/// A VM with USB whose firmware finds nothing to boot: guest enough, since QEMU asks no guest to let go of a USB device.
fn without_a_guest() -> Vm {
    let vm = Vm::new(QemuVersion::V7_2, "", 1, "");
    let qemu = tests::qemu::images().qemu(vm.version());
    let text = format!("name = \"guest\"\nmemory = \"64MiB\"\nqemu = {qemu:?}\n{CONTROLLERS}");
    std::fs::write(vm.config(), text).expect("the VM file is written");
    vm
}

/// The owner dies at each of these steps, alone and with QEMU; the host has the stick again each time.
fn deaths(steps: &[&str]) {
    let vm = without_a_guest();
    for work in steps {
        step(&format!("{work}, the owner alone"), || dies_alone(&vm, work));
    }
    vm.start();
    vm.end();
    for work in steps {
        step(&format!("{work}, with QEMU"), || dies_with_qemu(&vm, work));
    }
}

#[test]
fn an_owner_dies_at_work_and_qemu_with_it_and_qemu_alone() {
    inside(|| {
        deaths(&["attach:4", "clear:1"]);
        step("QEMU alone", || qemu_dies(&without_a_guest()));
        step("with another make on the port that was named", || {
            qemu_dies_with_another_make(&without_a_guest())
        });
    });
}

mod soak {
    use super::*;

    #[test]
    fn the_owner_dies_at_each_step_alone_and_with_qemu() {
        let steps = [
            "attach:1", "attach:2", "attach:3", "attach:4", "attach:5", "detach:1", "detach:2", "clear:1",
            "clear:2",
        ];
        inside(|| deaths(&steps));
    }
}
