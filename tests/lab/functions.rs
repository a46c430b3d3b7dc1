//! Functions of the host in guests: virtual functions with their profiles, whole IOMMU groups, their drivers before and after, whatever dies.

use serde_json::Value;
use tests::lab::host::pci::{FREE_PF, Function, SHARED, USED_PF};
use tests::lab::{inside, rounds, step};
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::vm::{AGENT_CHANNEL, Vm};

use crate::sweep::each_step_is_undone;

const MAC: &str = "52:54:00:1a:b0:31";

/// The guest loads drivers of real hardware.
const HARDWARE: &str = "quiet qvirt.hardware=1";

fn guest(version: QemuVersion, tables: &str) -> Scene {
    Scene::of(Vm::new(version, HARDWARE, 8, &format!("{AGENT_CHANNEL}{tables}")))
}

/// All that must be as before: drivers, overrides and profiles of a card's virtual functions.
fn state_of(vm: &Vm, pf: &Function) -> Value {
    let mut state: Value =
        serde_json::from_str(&vm.ok(&["host", "sriov", &pf.to_string(), "--json"])).expect("JSON");
    for (vf, seen) in pf.vfs().iter().zip(state["vfs"].as_array_mut().into_iter().flatten()) {
        let word = std::fs::read_to_string(vf.path().join("driver_override")).expect("sysfs");
        seen["override"] = word.trim().into();
    }
    state
}

fn profile(vm: &Vm, pf: &Function, index: usize) -> Value {
    state_of(vm, pf)["vfs"][index]["profile"].clone()
}

/// The guest has the function and an interface on it. Which address it has there tells nothing: its driver waits a thousandth of a second for the
/// card's answer, which takes longer where all is emulated, and then takes one by chance.
fn saw_function(scene: &mut Scene, vf: &Function) {
    let model = vf.model().expect("it is there");
    scene.sees("the function and its interface", |seen| {
        seen.of("pci").iter().any(|line| line.contains(&model)) && seen.nics().len() == 1
    });
}

#[test]
fn a_virtual_function_comes_with_its_profile_and_goes_without_a_trace() {
    inside(|| {
        let pf = FREE_PF.function().expect("the lab's card");
        let netdev = pf.netdev().expect("it has an interface");
        let mut scene = step("boot", || guest(QemuVersion::V10_0, ""));
        let (before, first) = (state_of(&scene.vm, &pf), scene.seen.clone());
        let vf = format!("pf={netdev},id=vf0,mac={MAC},spoofchk=off,trust=on,rate_max=100Mbit");
        step("attach", || print!("{}", scene.vm.ok(&["attach", "guest", "--vf", &vf])));
        saw_function(&mut scene, &pf.vfs()[0]);
        let set = profile(&scene.vm, &pf, 0);
        assert_eq!(
            (&set["mac"], &set["spoofchk"], &set["trust"], &set["rate_max"]),
            (&MAC.into(), &false.into(), &true.into(), &"100Mbit".into()),
            "{set}"
        );
        assert_eq!(pf.vfs()[0].driver().as_deref(), Some("vfio-pci"));
        let held = state_of(&scene.vm, &pf)["vfs"][0]["held_by"].to_string();
        assert!(held.contains("VM guest as vf0"), "{held}");
        step("detach", || scene.detach("vf0", &first));
        assert_eq!(state_of(&scene.vm, &pf), before, "driver and profile are as before");
        step("again and again", || {
            for round in 0..rounds() {
                scene.vm.ok(&["attach", "guest", "--vf", &vf]);
                saw_function(&mut scene, &pf.vfs()[0]);
                scene.vm.ok(&["detach", "guest", "vf0", "--wait", "30s"]);
                assert_eq!(state_of(&scene.vm, &pf), before, "round {round}");
            }
        });
        scene.end();
    });
}

#[test]
fn a_virtual_function_of_the_host_is_taken_cold_and_given_back_at_the_end() {
    inside(|| {
        let pf = USED_PF.function().expect("the lab's card");
        let vf = pf.vfs().into_iter().next().expect("it has virtual functions");
        let table = format!("[[vf]]\nid = \"vf0\"\nhost = \"{vf}\"\nmac = \"{MAC}\"\nvlan = 5\nqos = 2\n");
        let vm = Vm::new(QemuVersion::V7_2, HARDWARE, 2, &format!("{AGENT_CHANNEL}{table}"));
        let before = state_of(&vm, &pf);
        assert_eq!(vf.driver().as_deref(), Some("igbvf"));
        let mut scene = step("boot", || Scene::of(vm));
        saw_function(&mut scene, &vf);
        let set = profile(&scene.vm, &pf, 0);
        assert_eq!((&set["mac"], &set["vlan"], &set["qos"]), (&MAC.into(), &5.into(), &2.into()), "{set}");
        assert!(may_lock(scene.vm.qemu_pid()) >= (256 << 20) + (1 << 30), "guest memory and a gigabyte");
        another_vm_is_refused(&scene.vm, &format!("[[vf]]\nhost = \"{vf}\"\n"), "vf0");
        step("a VM of somebody whose leases are apart wants it", || {
            let other = Vm::new(QemuVersion::V10_0, HARDWARE, 2, &format!("[[vfio]]\nhost = \"{vf}\"\n"));
            let file = other.config().display().to_string();
            // Their folders are apart, as those of different hosts are: the kernel's own exclusivity speaks.
            let output = other.qvirt(&["start", &file]);
            assert!(output.code != 0 && output.stderr.contains("/dev/vfio/"), "{output}");
            assert_eq!(vf.driver().as_deref(), Some("vfio-pci"), "it stays where it is");
        });
        for words in [["host", "sriov"], ["host", "unbind"], ["host", "vf"]] {
            let (pf, vf) = (pf.to_string(), vf.to_string());
            let more: &[&str] = match words[1] {
                "sriov" => &[&pf, "--vfs", "0"],
                "unbind" => &[&vf],
                _ => &[&pf, "0", "--vlan", "9"],
            };
            let output = scene.vm.qvirt(&[&words[..], more].concat());
            assert!(
                output.code == 3 && output.stderr.contains("used by VM guest as vf0"),
                "{words:?}: {output}"
            );
        }
        step("shutdown", || scene.end());
        let vm = Vm::new(QemuVersion::V10_0, HARDWARE, 1, "");
        assert_eq!(state_of(&vm, &pf), before, "igbvf has it again, with its profile");
    });
}

/// Another VM of the same user is refused what a device of the first one has, and told by whom.
fn another_vm_is_refused(vm: &Vm, table: &str, id: &str) {
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    let head = text.replace("name = \"guest\"", "name = \"other\"");
    let head = head.split_once("[[serial]]").expect("a console").0;
    let file = vm.path("other.toml");
    std::fs::write(&file, format!("{head}{table}")).expect("written");
    let output = vm.qvirt(&["start", "--paused", &file.display().to_string()]);
    print!("{}", output.stderr);
    assert!(output.code == 3 && output.stderr.contains(&format!("device {id} of VM guest")), "{output}");
}

/// How many bytes a process may lock in memory.
fn may_lock(pid: i32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
    let line = limits.lines().find(|line| line.starts_with("Max locked memory")).expect("a line");
    let soft = line.split_whitespace().nth(3).expect("a limit");
    if soft == "unlimited" { u64::MAX } else { soft.parse().expect("a number") }
}

/// Which drivers the members of the shared group have.
fn drivers() -> Vec<Option<String>> {
    SHARED.functions().iter().map(Function::driver).collect()
}

#[test]
fn a_shared_group_goes_as_a_whole_or_not_at_all() {
    inside(|| {
        let members = SHARED.functions();
        let before = drivers();
        let mut scene = step("boot", || guest(QemuVersion::V10_0, ""));
        let first = scene.seen.clone();
        let one = format!("host={},id=one", members[0]);
        let output = scene.vm.qvirt(&["attach", "guest", "--vfio", &one]);
        let offender = format!("{}, which e1000e holds", members[1]);
        assert!(output.code == 3 && output.stderr.contains(&offender), "{output}");
        assert_eq!(drivers(), before, "nothing was touched");
        step("the whole group", || {
            print!("{}", scene.vm.ok(&["attach", "guest", "--vfio", &format!("{one},group=true")]))
        });
        scene.sees("two NICs", |seen| {
            seen.of("pci").iter().filter(|line| line.contains("8086:10d3")).count() == 2
        });
        assert_eq!(drivers(), vec![Some("vfio-pci".to_owned()); 2]);
        let output = scene.vm.qvirt(&["detach", "guest", "vfio0"]);
        assert!(output.code == 3 && output.stderr.contains("vfio0 is used by one"), "{output}");
        let group = format!("[[vfio]]\nhost = \"{}\"\ngroup = true\n", members[0]);
        another_vm_is_refused(&scene.vm, &group, "one");
        assert_eq!(drivers(), vec![Some("vfio-pci".to_owned()); 2], "nothing was taken from the first VM");
        step("detach", || scene.vm.ok(&["detach", "guest", "one", "--wait", "60s"]));
        scene.sees("no NIC", |seen| *seen == first);
        scene.vm.wait_for("the group to be the host's again", || drivers() == before);
        scene.end();
        assert_eq!(drivers(), before, "the VM's end gives the group back too");
    });
}

fn each_death(dies: &str, works: &[&str]) {
    let (vm, pf, before, device) = victim();
    for work in works {
        let mut died = 0;
        while dies_at(&vm, work, died + 1, dies, &device) {
            died += 1;
            assert_eq!(state_of(&vm, &pf), before, "{work} step {died}, {dies} died");
        }
        println!("{work}: {dies} died at {died} steps");
        assert!(died >= 2, "{work} has more than {died} steps");
        vm.nothing_left();
        assert_eq!(state_of(&vm, &pf), before);
    }
}

#[test]
fn qemu_dies_and_its_owner_gives_the_function_back() {
    inside(|| {
        let (vm, pf, before, device) = victim();
        vm.ok(&["start", &vm.config().display().to_string(), "--paused"]);
        vm.ok(&["attach", "guest", "--vf", &device]);
        assert_ne!(state_of(&vm, &pf), before);
        vm.kill_process(vm.qemu_pid());
        vm.wait_for("its owner to give the function back", || state_of(&vm, &pf) == before);
        vm.wait_for("its owner to end", || vm.remains().is_empty());
    });
}

/// A VM without a guest, a card with a virtual function that the host uses, how that is, and the device that takes it.
fn victim() -> (Vm, Function, Value, String) {
    let pf = USED_PF.function().expect("the lab's card");
    let vf = pf.vfs().into_iter().next().expect("it has virtual functions");
    let vm = Vm::new(QemuVersion::V10_0, HARDWARE, 2, AGENT_CHANNEL);
    let before = state_of(&vm, &pf);
    (vm, pf, before, format!("host={vf},id=vf0,mac={MAC},vlan=7"))
}

/// Attaches a device, and detaches it, by an owner that dies at that step of that work. Whether it died. QEMU dies with it, and `recover` clears up, or
/// lives, and the next owner does; nothing is left of the device then.
fn dies_at(vm: &Vm, work: &str, number: u32, dies: &str, device: &str) -> bool {
    let (file, step) = (vm.config().display().to_string(), format!("{work}:{number}"));
    let started = vm.qvirt_with(&[("QVIRT_DIE_STEP", &step)], &["start", &file, "--paused"]);
    assert_eq!(started.code, 0, "{started}");
    let (owner, qemu) = (vm.owner_pid(), vm.qemu_pid());
    let gone = || !std::path::Path::new(&format!("/proc/{owner}")).exists();
    vm.qvirt(&["attach", "guest", "--vf", device]);
    detach(vm, gone);
    if !gone() {
        vm.qvirt(&["kill", "guest"]);
        return false;
    }
    if dies == "owner" {
        vm.start();
        detach(vm, || false);
        vm.wait_for("the device to be gone", || !vm.device_ids().contains(&"vf0".to_owned()));
        vm.qvirt(&["kill", "guest"]);
    } else {
        vm.kill_process(qemu);
        vm.ok(&["recover", "guest"]);
    }
    true
}

/// Detaches the device, unless the owner is gone. A guest that never ran lets nothing go by itself; QEMU takes what was asked for out at a reset.
fn detach(vm: &Vm, gone: impl Fn() -> bool) {
    if !gone() {
        vm.qvirt(&["detach", "guest", "vf0", "--wait", "1s"]);
    }
    if !gone() {
        vm.rescue("system_reset", Value::Null);
        vm.qvirt(&["detach", "guest", "vf0", "--wait", "20s"]);
    }
}

#[test]
fn the_host_is_made_ready_by_commands() {
    inside(|| {
        let pf = FREE_PF.function().expect("the lab's card");
        let vm = Vm::new(QemuVersion::V10_0, HARDWARE, 1, "");
        let before = state_of(&vm, &pf);
        let (name, first, second) = (pf.to_string(), pf.vfs()[0].to_string(), pf.vfs()[1].to_string());
        let ran = |words: &[&str]| {
            let output = vm.ok(words);
            print!("$ qvirt {}\n{output}", words.join(" "));
            output
        };
        step("bind and unbind", || {
            let said = ran(&["host", "bind", &first, &second, "--dry-run"]);
            assert!(said.contains("would go from - to vfio-pci"), "{said}");
            assert_eq!(state_of(&vm, &pf), before, "nothing was done");
            ran(&["host", "bind", &first, &second]);
            assert_eq!(pf.vfs()[1].driver().as_deref(), Some("vfio-pci"));
            ran(&["host", "unbind", &first, &second]);
            assert_eq!(state_of(&vm, &pf), before);
            let again = vm.qvirt(&["host", "unbind", &first]);
            assert!(
                again.code == 3 && again.stderr.contains("is not bound to vfio-pci: it has no driver"),
                "{again}"
            );
            assert_eq!(vm.remains(), [""; 0], "a refusal leaves nothing behind");
            let none = vm.qvirt(&["host", "bind", &first, "0000:77:00.0"]);
            assert!(none.code == 5 && none.stderr.contains("no PCI device 0000:77:00.0"), "{none}");
            assert_eq!(state_of(&vm, &pf), before, "all, or none");
            let held = USED_PF.function().expect("another card").vfs()[1].clone();
            ran(&["host", "bind", &held.to_string()]);
            ran(&["host", "unbind", &held.to_string()]);
            assert_eq!(held.driver().as_deref(), Some("igbvf"), "the driver that it had");
        });
        step("a profile", || {
            ran(&[
                "host",
                "vf",
                &name,
                "1",
                "--mac",
                MAC,
                "--vlan",
                "12",
                "--qos",
                "3",
                "--trust",
                "on",
                "--dry-run",
            ]);
            assert_eq!(state_of(&vm, &pf), before, "nothing was done");
            ran(&["host", "vf", &name, "1", "--mac", MAC, "--vlan", "12", "--qos", "3", "--trust", "on"]);
            let set = profile(&vm, &pf, 1);
            assert_eq!(
                (&set["mac"], &set["vlan"], &set["qos"], &set["trust"]),
                (&MAC.into(), &12.into(), &3.into(), &true.into())
            );
            for (words, code, text) in [
                (&["7", "--vlan", "1"][..], 5, "has no virtual function 7"),
                (&["1", "--vlan", "4095"], 2, "--vlan 4095: a VLAN is 1 to 4094"),
                (&["1", "--mac", "00:00:00:00:00:00"], 2, "all zero is no address"),
                (&["1"], 2, "say what to change"),
                // igb has none.
                (&["1", "--link-state", "disable"], 1, "set the link state of virtual function 1"),
            ] {
                let output = vm.qvirt(&[&["host", "vf", &name], words].concat());
                assert!(output.code == code && output.stderr.contains(text), "{words:?}: {output}");
            }
            assert_eq!(profile(&vm, &pf, 1), set, "what was refused changed nothing");
            ran(&["host", "vf", &name, "1", "--null-mac", "--vlan", "0", "--trust", "off"]);
            assert_eq!(state_of(&vm, &pf), before);
        });
        step("how many", || {
            let output = vm.qvirt(&["host", "sriov", &name, "--vfs", "8"]);
            assert!(output.code == 2 && output.stderr.contains("7 virtual functions at most"), "{output}");
            ran(&["host", "sriov", &name, "--vfs", "2", "--dry-run"]);
            assert_eq!(pf.vfs().len(), 4);
            ran(&["host", "sriov", &name, "--vfs", "2"]);
            assert_eq!(pf.vfs().len(), 2);
            ran(&["host", "sriov", &pf.netdev().expect("an interface"), "--vfs", "4"]);
            assert_eq!(pf.vfs().len(), 4);
            let output = vm.qvirt(&["host", "sriov", "eth99"]);
            assert!(output.code == 5 && output.stderr.contains("no physical function eth99"), "{output}");
        });
    });
}

/// Runs a command that changes the host, each of its steps failing and each of them the last of a command that dies there. All is as before then, at
/// once and after `recover`. Gives the number of its steps; with them done it has run.
fn each_step_of_a_command_is_undone(vm: &Vm, words: &[&str], state: impl Fn() -> Value) -> u32 {
    let before = state();
    for number in 1.. {
        let step = format!("host:{number}");
        let failed = vm.qvirt_with(&[("QVIRT_FAIL_STEP", &step)], words);
        if !failed.stderr.contains("failed on purpose") {
            println!("$ qvirt {}: {} steps\n{failed}", words.join(" "), number - 1);
            return number - 1;
        }
        assert_eq!(state(), before, "{words:?} failed at step {number}: {failed}");
        assert_eq!(vm.remains(), [""; 0], "{words:?} failed at step {number}");
        vm.qvirt_with(&[("QVIRT_DIE_STEP", &step)], words);
        let said = vm.ok(&["recover"]);
        assert!(said.contains("a command on this host died at work; undone: "), "step {number}: {said}");
        assert_eq!(state(), before, "{words:?} died at step {number}: {said}");
        assert_eq!(vm.remains(), [""; 0], "{words:?} died at step {number}");
    }
    unreachable!("there are not so many numbers")
}

#[test]
fn commands_that_fail_or_die_at_work_leave_the_host_as_it_was() {
    inside(|| {
        let pf = FREE_PF.function().expect("the lab's card");
        let vm = Vm::new(QemuVersion::V10_0, HARDWARE, 1, "");
        let (name, first, second) = (pf.to_string(), pf.vfs()[0].to_string(), pf.vfs()[1].to_string());
        let state = || state_of(&vm, &pf);
        let before = state();
        let used = USED_PF.function().expect("another card");
        let held = used.vfs()[1].to_string();
        step("bind", || {
            let words = ["host", "bind", &held, &first];
            let drivers = || serde_json::json!([state(), state_of(&vm, &used)]);
            assert_eq!(each_step_of_a_command_is_undone(&vm, &words, drivers), 3);
            vm.ok(&["host", "unbind", &held, &first]);
        });
        step("the next command undoes it too", || {
            vm.qvirt_with(&[("QVIRT_DIE_STEP", "host:2")], &["host", "bind", &first, &second]);
            assert_eq!(pf.vfs()[0].driver().as_deref(), Some("vfio-pci"), "the first one was bound");
            let output = vm.expect(0, &["host", "bind", &second]);
            let word = format!("died at work; undone: {first} on its way to vfio-pci");
            assert!(output.stderr.contains(&word), "{output}");
            assert_eq!(pf.vfs()[0].driver(), None);
            vm.ok(&["host", "unbind", &second]);
            assert_eq!(state(), before);
        });
        step("what a VM has by then stays", || {
            vm.qvirt_with(&[("QVIRT_DIE_STEP", "host:2")], &["host", "bind", &first, &second]);
            vm.ok(&["start", &vm.config().display().to_string(), "--paused"]);
            vm.ok(&["attach", "guest", "--vfio", &format!("host={first},id=mine")]);
            let said = vm.ok(&["recover"]);
            assert!(!said.contains(&first) && said.contains(&second), "{said}");
            assert_eq!(pf.vfs()[0].driver().as_deref(), Some("vfio-pci"), "the VM has it");
            vm.ok(&["kill", "guest"]);
            vm.ok(&["host", "unbind", &first]);
            assert_eq!(state(), before);
        });
        step("a profile", || {
            let words = ["host", "vf", &name, "1", "--mac", MAC, "--vlan", "12", "--trust", "on"];
            assert_eq!(each_step_of_a_command_is_undone(&vm, &words, state), 2);
            vm.ok(&["host", "vf", &name, "1", "--null-mac", "--vlan", "0", "--trust", "off"]);
            assert_eq!(state(), before);
        });
    });
}

mod soak {
    use super::*;

    #[test]
    fn commands_that_make_functions_and_vdpa_devices_leave_the_host_as_it_was() {
        inside(|| {
            let pf = FREE_PF.function().expect("the lab's card");
            let vm = Vm::new(QemuVersion::V10_0, HARDWARE, 1, "");
            let (name, first) = (pf.to_string(), pf.vfs()[0].to_string());
            let state = || state_of(&vm, &pf);
            let before = state();
            step("a vendor's vDPA driver", || {
                let mgmtdev = format!("pci/{first}");
                let words = ["host", "vdpa", "add", "vdpa4", "--mgmtdev", &mgmtdev, "--driver", "igbvf"];
                assert_eq!(each_step_of_a_command_is_undone(&vm, &words, state), 2);
                assert_eq!(state(), before, "igbvf offers no vDPA");
            });
            step("the number of virtual functions", || {
                let number = || pf.vfs().len().into();
                let words = ["host", "sriov", &name, "--vfs", "2"];
                assert_eq!(each_step_of_a_command_is_undone(&vm, &words, number), 4);
                vm.ok(&["host", "sriov", &name, "--vfs", "4"]);
            });
        });
    }

    #[test]
    fn owner_and_qemu_die_at_each_step_and_recover_gives_the_function_back() {
        inside(|| each_death("both", &["attach", "detach", "clear"]));
    }

    #[test]
    fn the_owner_dies_at_each_step_and_the_next_one_gives_the_function_back() {
        inside(|| each_death("owner", &["attach", "clear"]));
    }

    #[test]
    fn a_member_of_a_group_that_fails_takes_the_others_back() {
        inside(|| {
            let before = drivers();
            let scene = step("boot", || guest(QemuVersion::V10_0, ""));
            let group = format!("host={},id=one,group=true", SHARED.functions()[0]);
            let state = || (drivers(), scene.vm.device_ids());
            let failed = each_step_is_undone(&scene.vm, ["--vfio", &group], state);
            println!("failed and undone: {failed:?}");
            assert_eq!(failed.iter().filter(|step| *step == "driver").count(), 2, "{failed:?}");
            scene.end();
            assert_eq!(drivers(), before, "the VM's end gives the group back too");
        });
    }
}
