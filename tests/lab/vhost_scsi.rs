//! vhost-scsi: the LUNs of a target of the lab host in a guest, cold and hot.

use tests::lab::host::scsi::{LUNS, TARGET};
use tests::lab::{inside, rounds, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Vm};

use crate::sweep::each_step_is_undone;

fn device() -> String {
    format!("wwpn={TARGET},id=luns")
}

/// The guest writes a text to the second LUN; gives what the host's file behind it begins with.
fn written(scene: &mut Scene, text: &str) -> String {
    let (serial, _) = LUNS[1];
    scene.write_disk(serial, text);
    let bytes = std::fs::read(format!("/run/lab/{serial}.img")).expect("the file behind the LUN");
    String::from_utf8_lossy(&bytes[..text.len()]).into_owned()
}

/// Hot, again and again: the guest sees both LUNs, writes, and they are free again.
#[test]
fn luns_come_and_go() {
    inside(|| come_and_go(QemuVersion::V10_0));
}

fn come_and_go(version: QemuVersion) {
    let mut scene = step("boot", || Scene::boot(version, QUIET, AGENT_CHANNEL));
    let before = scene.seen.clone();
    for round in 0..rounds() {
        step(&format!("round {round}"), || {
            for (serial, mib) in LUNS {
                let line = match serial == LUNS[0].0 {
                    true => scene.attach(["--vhost-scsi", &device()], "disk", &format!("serial={serial}")),
                    false => scene.sees_line("the other LUN", "disk", &format!("serial={serial}")),
                };
                assert!(line.contains(&format!(" {} ", mib << 20)), "{line}");
            }
            let text = format!("{version}, round {round}");
            assert_eq!(written(&mut scene, &text), text, "what the guest wrote is on the host");
            assert_eq!(scene.vm.leases().len(), 1, "{:?}", scene.vm.leases());
            scene.detach("luns", &before);
            assert_eq!(scene.vm.leases(), [""; 0]);
        });
    }
    scene.end();
}

fn at_the_boot(version: QemuVersion) {
    let tables = format!("{AGENT_CHANNEL}[[vhost_scsi]]\nid = \"luns\"\nwwpn = {TARGET:?}\n");
    let mut scene = step("boot", || Scene::boot(version, QUIET, &tables));
    scene.sees_line("a LUN", "disk", &format!("serial={}", LUNS[0].0));
    assert_eq!(written(&mut scene, "cold"), "cold");

    step("another VM wants the same target", || {
        let other = scene.vm.path("other.toml");
        let text = std::fs::read_to_string(scene.vm.config()).expect("the VM file");
        std::fs::write(&other, text.replace("name = \"guest\"", "name = \"other\"")).expect("written");
        let output = scene.vm.expect(3, &["start", &other.display().to_string()]);
        let words = format!("{TARGET} is in use: device luns of VM guest");
        assert!(output.stderr.contains(&words), "{output}");
        println!("{output}");
    });
    step("the owner is killed, another one adopts the VM", || {
        scene.vm.kill_owner();
        scene.vm.start();
        assert_eq!(scene.vm.leases().len(), 1, "{:?}", scene.vm.leases());
    });
    scene.vm.ok(&["detach", "guest", "luns", "--wait", "30s"]);
    scene.sees("no LUN", |seen| seen.disks().is_empty());
    assert_eq!(scene.vm.leases(), [""; 0]);
    step("attached again, then owner and QEMU are killed", || {
        scene.attach(["--vhost-scsi", &device()], "disk", &format!("serial={}", LUNS[0].0));
        let qemu = scene.vm.qemu_pid();
        scene.vm.kill_owner();
        scene.vm.kill_process(qemu);
        print!("{}", scene.vm.ok(&["recover", "guest"]));
        scene.vm.nothing_left();
    });
}

/// What the host does not have is refused before anything is touched.
#[test]
fn wrong_targets_are_refused() {
    inside(|| {
        let vm = Vm::new(QemuVersion::V10_0, QUIET, 2, "");
        vm.start();
        for (device, words) in [
            ("wwpn=naa.5001405000000000".to_owned(), format!("it has {TARGET}")),
            (format!("wwpn={TARGET},bootindex=1"), "boot_tpgt = 1".to_owned()),
            (format!("wwpn={TARGET},bootindex=1,boot_tpgt=7"), "no port group 7".to_owned()),
        ] {
            let output = vm.expect(3, &["attach", "guest", "--vhost-scsi", &device]);
            assert!(output.stderr.contains(&words), "{output}");
        }
        vm.end();
    });
}

mod soak {
    use super::*;

    /// Cold: there at the boot, gone by a detach, and there again after a restart of the owner.
    #[test]
    fn luns_are_there_at_the_boot() {
        inside(|| at_the_boot(QemuVersion::V7_2));
    }

    #[test]
    fn each_step_that_fails_is_undone() {
        inside(|| {
            let scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
            let vm = &scene.vm;
            let failed =
                each_step_is_undone(vm, ["--vhost-scsi", &device()], || (vm.device_ids(), vm.leases()));
            assert_eq!(failed, ["record", "vhost-scsi", "descriptor", "frontend", "verify", "settle"]);
            scene.end();
        });
    }
}
