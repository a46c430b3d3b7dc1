//! The owner's death and QEMU's, with host changes that only a lab allows: taps in bridges, vhost-net nodes, a disk on device-mapper.

use tests::lab::host::faulty::FaultyDisk;
use tests::lab::host::network::{BRIDGE, SWITCH, TAG};
use tests::lab::host::program;
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::AGENT_CHANNEL;

const MAC: &str = "52:54:00:1a:b0:12";

/// A guest with the lab's disk, and a NIC behind the tap `lab-tap0` in that bridge.
fn furnished(storage: &FaultyDisk, bridge: &str) -> Scene {
    let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
    let disk = format!("path={},id=data,serial=faulty", storage.path().display());
    step("attach a disk", || scene.attach(["--disk", &disk], "disk", "serial=faulty"));
    let nic = format!("bridge={bridge},vhost=true,tap=lab-tap0,mac={MAC},id=net0");
    step("attach a NIC", || scene.attach(["--nic", &nic], "nic", MAC));
    scene
}

fn tap_exists() -> bool {
    std::path::Path::new("/sys/class/net/lab-tap0").exists()
}

#[test]
fn the_owner_is_killed_and_its_successor_loses_nothing() {
    inside(|| {
        let storage = FaultyDisk::ready().expect("the lab's disk");
        let mut scene = furnished(&storage, BRIDGE.bridge);
        let (devices, qemu) = (scene.vm.ok(&["devices", "guest"]), scene.vm.qemu_pid());
        step("SIGKILL of the owner, then another one", || {
            scene.vm.kill_owner();
            scene.vm.start();
        });
        assert_eq!((scene.vm.ok(&["devices", "guest"]), scene.vm.qemu_pid()), (devices, qemu));
        let seen = scene.seen.clone();
        scene.sees("what it saw before", |now| *now == seen);
        assert_eq!(scene.read_disk("faulty", 4), "\0\0\0\0", "its disk is still there");
        step("the successor detaches both", || {
            for id in ["data", "net0"] {
                scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
            }
        });
        scene.sees("no disk and no NIC", |seen| seen.disks().is_empty() && seen.nics().is_empty());
        assert!(!tap_exists(), "the tap that its predecessor made is gone");
        scene.end();
    });
}

#[test]
fn owner_and_qemu_are_killed_and_recover_clears_up() {
    inside(|| {
        let storage = FaultyDisk::ready().expect("the lab's disk");
        let ports = || program("ovs-vsctl", &["list-ports", SWITCH.bridge]).expect("the switch answers");
        let before = ports();
        // A tap goes with its QEMU; the switch's record of it stays.
        let scene = furnished(&storage, &format!("{},openvswitch=true,vlan={TAG}", SWITCH.bridge));
        let qemu = scene.vm.qemu_pid();
        step("SIGKILL of the owner, then of QEMU", || {
            scene.vm.kill_owner();
            scene.vm.kill_process(qemu);
        });
        assert_ne!(ports(), before, "nobody has cleared up yet");
        print!("{}", scene.vm.ok(&["recover", "guest"]));
        assert_eq!((ports(), tap_exists()), (before, false), "the port is gone, and the tap");
        scene.vm.nothing_left();
    });
}
