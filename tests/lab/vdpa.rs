//! vDPA devices of the lab host in a guest: as they are, and as virtio-net; cold and hot. They are played by VDUSE, so the guest's memory is shared.

use std::fs::OpenOptions;

use tests::guest::Inventory;
use tests::lab::host::program;
use tests::lab::host::vdpa::{DISK, DISK_MIB, NIC, NIC_GUEST, NIC_MAC, NIC_NEIGHBOUR, VduseDisk, device};
use tests::lab::{inside, rounds, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, SHARED, Vm};

use crate::sweep::each_step_is_undone;

fn vm(version: QemuVersion, tables: &str) -> Vm {
    Vm::with_memory(version, QUIET, 8, SHARED, &format!("{AGENT_CHANNEL}{tables}"))
}

fn boot(version: QemuVersion, tables: &str) -> Scene {
    step("boot", || Scene::of(vm(version, tables)))
}

/// Whether nobody has the char device.
fn is_free(name: &str) -> bool {
    let node = device(name).expect("it has a char device");
    OpenOptions::new().read(true).write(true).open(node).is_ok()
}

/// The guest writes a text to the lab's disk; gives what the host's file behind it begins with.
fn written(scene: &mut Scene, text: &str) -> String {
    scene.write_disk(DISK, text);
    let bytes = std::fs::read(format!("/run/lab/{DISK}.img")).expect("the file behind the disk");
    String::from_utf8_lossy(&bytes[..text.len()]).into_owned()
}

/// Hot, again and again.
#[test]
fn a_disk_comes_and_goes() {
    inside(|| {
        let mut scene = boot(QemuVersion::V10_0, "");
        let before = scene.seen.clone();
        for round in 0..rounds() {
            step(&format!("round {round}"), || {
                // By its name and by its char device in turn.
                let node = device(DISK).expect("it has a char device").display().to_string();
                let name = if round % 2 == 0 { DISK } else { &node };
                let wish = format!("device={name},id=fast");
                let line = scene.attach(["--vdpa", &wish], "disk", &format!("serial={DISK}"));
                assert!(line.contains(&format!(" {} ", DISK_MIB << 20)), "{line}");
                assert_eq!(scene.vm.leases().len(), 1, "{:?}", scene.vm.leases());
                assert!(!is_free(DISK), "QEMU has it");
                let text = format!("round {round}");
                assert_eq!(written(&mut scene, &text), text, "what the guest wrote is on the host");
                scene.detach("fast", &before);
                assert!(is_free(DISK), "the host has it back");
                assert_eq!((scene.vm.leases(), sets(&scene)), (Vec::new(), 0));
            });
        }
        scene.end();
    });
}

/// How many descriptor sets QEMU has.
fn sets(scene: &Scene) -> usize {
    scene.vm.qmp("query-fdsets", &serde_json::json!({})).as_array().map_or(0, Vec::len)
}

/// Cold, and the journal: adopted by another owner, cleared up after both were killed.
#[test]
fn a_nic_is_there_at_the_boot() {
    inside(|| cold_nic(QemuVersion::V10_0));
}

fn pings(scene: &mut Scene, seen: &Inventory) {
    let line = seen.find("nic", NIC_MAC).expect("the guest has it");
    let nic = line.split(' ').nth(1).expect("a NIC has a name");
    let script = format!(
        "ip link set {nic} up; ip address add {NIC_GUEST}/24 dev {nic}; ping -c 2 -W 5 {NIC_NEIGHBOUR}"
    );
    println!("{}", scene.guest.check(&script).expect("the neighbour answers"));
}

fn nic(version: QemuVersion) {
    let mut scene = boot(version, "");
    let before = scene.seen.clone();
    for round in 0..rounds() {
        step(&format!("round {round}"), || {
            scene.attach(["--vdpa", &format!("device={NIC},type=nic,id=net0")], "nic", NIC_MAC);
            let seen = scene.seen.clone();
            pings(&mut scene, &seen);
            scene.detach("net0", &before);
            assert!(is_free(NIC), "the host has it back");
            assert_eq!(scene.vm.leases(), [""; 0]);
        });
    }
    scene.end();
}

fn cold_nic(version: QemuVersion) {
    let mut scene = boot(version, &format!("[[vdpa]]\nid = \"net0\"\ndevice = {NIC:?}\ntype = \"nic\"\n"));
    let seen = scene.seen.clone();
    pings(&mut scene, &seen);
    step("another owner, who detaches it", || {
        scene.vm.kill_owner();
        scene.vm.start();
        scene.vm.ok(&["detach", "guest", "net0", "--wait", "30s"]);
        scene.sees("no NIC", |seen| seen.nics().is_empty());
        assert!(is_free(NIC), "the host has it back");
    });
    step("attached again, then owner and QEMU are killed", || {
        scene.attach(["--vdpa", &format!("device={NIC},type=nic,id=net0")], "nic", NIC_MAC);
        let qemu = scene.vm.qemu_pid();
        scene.vm.kill_owner();
        scene.vm.kill_process(qemu);
        assert_eq!(scene.vm.leases().len(), 1, "nobody has cleared up yet");
        print!("{}", scene.vm.ok(&["recover", "guest"]));
        assert!(is_free(NIC), "the host has it back");
        scene.vm.nothing_left();
    });
}

/// Hot expansion, both ways: another disk is plugged in, and a disk that is there grows without an unplug.
#[test]
fn data_disks_are_expanded_while_the_guest_runs() {
    inside(|| {
        let mut scene = boot(QemuVersion::V10_0, &format!("[[vdpa]]\nid = \"fast\"\ndevice = {DISK:?}\n"));
        let before = scene.seen.clone();
        let own = VduseDisk::new("vdpa8", 8).expect("a disk of this test");
        program("vdpa", &["dev", "add", "name", "vdpa8", "mgmtdev", "vduse"]).expect("on the bus");
        let line = scene.attach(["--vdpa", "device=vdpa8,id=more"], "disk", "serial=vdpa8");
        assert!(line.contains(&format!(" {} ", 8_u64 << 20)), "{line}");
        step("it grows", || {
            own.resize(24).expect("its server obeys");
            let size = format!(" {} ", 24_u64 << 20);
            scene.sees("the new size", |seen| {
                seen.find("disk", "serial=vdpa8").is_some_and(|line| line.contains(&size))
            });
            let disk = scene.disk("vdpa8");
            let at_the_end =
                format!("printf grown | dd of=/dev/{disk} bs=512 seek=49151 conv=sync,fsync 2>/dev/null");
            scene.guest.check(&at_the_end).expect("the guest writes to the new end");
            let bytes = std::fs::read(own.file()).expect("the file behind it");
            assert_eq!((bytes.len(), &bytes[49151 * 512..][..5]), (24 << 20, &b"grown"[..]));
        });
        scene.detach("more", &before);
        program("vdpa", &["dev", "del", "vdpa8"]).expect("off the bus");
        scene.end();
    });
}

/// What would hang or fail in the guest is refused before anything is touched.
#[test]
fn wrong_devices_are_refused() {
    inside(|| {
        let private = Vm::new(QemuVersion::V10_0, QUIET, 2, "");
        private.start();
        let output = private.expect(3, &["attach", "guest", "--vdpa", &format!("device={DISK}")]);
        assert!(output.stderr.contains("memory = { size = ..., shared = true }"), "{output}");
        private.end();
        for (version, device, words) in [
            (QemuVersion::V10_0, "device=vdpa99".to_owned(), format!("it has {DISK}, {NIC}")),
            (QemuVersion::V10_0, format!("device={DISK},type=nic"), "is a block device".to_owned()),
            (QemuVersion::V10_0, format!("device={DISK},type=disk"), "built with libblkio".to_owned()),
            (QemuVersion::V10_0, format!("device={NIC},type=nic,queues=2"), "has 2 queues and 5".to_owned()),
            (
                QemuVersion::V10_0,
                format!("device={NIC},type=nic,mac=52:54:00:00:00:01"),
                "keeps its own".to_owned(),
            ),
            (QemuVersion::V7_2, format!("device={DISK}"), "name a newer QEMU".to_owned()),
            (QemuVersion::V7_2, format!("device={NIC}"), "write type = \"nic\", which it has".to_owned()),
        ] {
            let vm = Vm::with_memory(version, QUIET, 2, SHARED, "");
            vm.start();
            let output = vm.expect(3, &["attach", "guest", "--vdpa", &device]);
            assert!(output.stderr.contains(&words), "{device}: {output}");
            vm.end();
        }
    });
}

mod soak {
    use super::*;

    /// As virtio-net, again and again: the guest pings the device's neighbour.
    #[test]
    fn a_nic_comes_and_goes() {
        inside(|| nic(QemuVersion::V7_2));
    }

    /// Without QEMU's virtio-net in between.
    #[test]
    fn a_nic_as_it_is() {
        inside(|| {
            let mut scene = boot(QemuVersion::V10_0, "");
            let before = scene.seen.clone();
            scene.attach(["--vdpa", &format!("device={NIC},id=net0")], "nic", NIC_MAC);
            let seen = scene.seen.clone();
            pings(&mut scene, &seen);
            scene.detach("net0", &before);
            assert!(is_free(NIC), "the host has it back");
            scene.end();
        });
    }

    /// Two disks at the boot; another VM is refused, by name where it can be known; the journal.
    #[test]
    fn disks_are_there_at_the_boot_and_nobody_else_gets_them() {
        inside(|| {
            let own = VduseDisk::new("vdpa7", 8).expect("a disk of this test");
            program("vdpa", &["dev", "add", "name", "vdpa7", "mgmtdev", "vduse"]).expect("on the bus");
            let tables = format!(
                "[[vdpa]]\nid = \"fast\"\ndevice = {DISK:?}\n\n[[vdpa]]\nid = \"more\"\ndevice = \"vdpa7\"\n"
            );
            let mut scene = boot(QemuVersion::V10_0, &tables);
            scene.sees_line("a disk of its own", "disk", "serial=vdpa7");
            assert_eq!(written(&mut scene, "cold"), "cold");
            step("another VM of the same user", || {
                let other = scene.vm.path("other.toml");
                let text = std::fs::read_to_string(scene.vm.config()).expect("the VM file");
                std::fs::write(&other, text.replace("name = \"guest\"", "name = \"other\""))
                    .expect("written");
                let output = scene.vm.expect(3, &["start", &other.display().to_string()]);
                assert!(
                    output.stderr.contains(&format!("{DISK} is in use: device fast of VM guest")),
                    "{output}"
                );
                println!("{output}");
            });
            step("another VM that knows nothing of these leases", || {
                let other = vm(QemuVersion::V10_0, &tables);
                let output = other.expect(3, &["start", &other.config().display().to_string()]);
                let words = format!("of vDPA device {DISK} is open in process {} (qemu", scene.vm.qemu_pid());
                assert!(output.stderr.contains(&words), "{output}");
                println!("{output}");
                other.nothing_left();
            });
            step("owner and QEMU are killed", || {
                let qemu = scene.vm.qemu_pid();
                scene.vm.kill_owner();
                scene.vm.kill_process(qemu);
                print!("{}", scene.vm.ok(&["recover", "guest"]));
                scene.vm.nothing_left();
                assert!(is_free(DISK) && is_free("vdpa7"), "the host has both back");
            });
            program("vdpa", &["dev", "del", "vdpa7"]).expect("off the bus");
            drop(own);
        });
    }

    #[test]
    fn each_step_that_fails_is_undone() {
        inside(|| {
            let scene = boot(QemuVersion::V10_0, "");
            let vm = &scene.vm;
            for (wish, name, kinds) in [
                (
                    format!("device={DISK},id=fast"),
                    DISK,
                    &["record", "vdpa", "fdset", "frontend", "verify", "settle"][..],
                ),
                (
                    format!("device={NIC},type=nic,id=net0"),
                    NIC,
                    &["record", "vdpa", "descriptor", "netdev", "frontend", "verify", "settle"],
                ),
            ] {
                let state = || (vm.device_ids(), vm.leases(), is_free(name), sets(&scene));
                assert_eq!(each_step_is_undone(vm, ["--vdpa", &wish], state), kinds);
                vm.ok(&["detach", "guest", wish.split_once("id=").expect("an id").1, "--wait", "30s"]);
            }
            scene.end();
        });
    }
}
