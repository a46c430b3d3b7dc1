//! `qvirt host vdpa`: vDPA devices of the lab host, shown, made and deleted; and those that are made for a VM.

use std::os::unix::process::CommandExt;

use serde_json::Value;
use tests::lab::host::vdpa::{DISK, NIC, NIC_MAC, VduseDisk, device};
use tests::lab::host::{pci, program};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Output, SHARED, Vm, finished};

use crate::sweep::each_step_is_undone;

/// Runs `qvirt host vdpa` with these words and prints both.
fn vdpa(vm: &Vm, words: &[&str]) -> Output {
    let output = vm.qvirt(&[&["host", "vdpa"], words].concat());
    println!("$ qvirt host vdpa {}\n{}{}", words.join(" "), output.stdout, output.stderr);
    output
}

fn json(vm: &Vm, words: &[&str]) -> Value {
    let output = vdpa(vm, &[words, &["--json"]].concat());
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output}"))
}

/// What iproute2 shows of the devices, by name.
fn told() -> Value {
    let text = program("vdpa", &["-j", "dev", "show"]).expect("the kernel answers");
    serde_json::from_str::<Value>(&text).expect("JSON")["dev"].clone()
}

fn of<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().into_iter().flatten().find(|entry| entry["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list:#}"))
}

fn exists(name: &str) -> bool {
    told().get(name).is_some()
}

#[test]
fn devices_are_shown_made_and_deleted() {
    inside(|| {
        let vm = Vm::with_memory(QemuVersion::V10_0, QUIET, 4, SHARED, AGENT_CHANNEL);
        step("what there is", || {
            vdpa(&vm, &[]);
            vdpa(&vm, &["mgmtdevs"]);
            let (shown, told) = (json(&vm, &["show"]), told());
            assert_eq!(shown.as_array().map(Vec::len), told.as_object().map(serde_json::Map::len));
            for (name, class, mac) in [(DISK, "blk", Value::Null), (NIC, "net", NIC_MAC.into())] {
                let (mine, theirs) = (of(&shown, name), &told[name]);
                assert_eq!(
                    (&mine["class"], &mine["mgmtdev"], &mine["mac"]),
                    (&class.into(), &"vduse".into(), &mac)
                );
                assert_eq!(
                    (&mine["vendor"], &mine["max_queues"], &mine["max_queue_size"]),
                    (&theirs["vendor_id"], &theirs["max_vqs"], &theirs["max_vq_size"])
                );
                assert_eq!((&mine["driver"], &mine["held_by"]), (&"vhost_vdpa".into(), &Value::Null));
                assert_eq!(mine["node"].as_str(), device(name).expect("a char device").to_str());
            }
            let mgmtdevs = json(&vm, &["mgmtdevs"]);
            assert_eq!(of(&mgmtdevs, "vduse")["classes"], serde_json::json!(["net", "blk"]));
        });
        let own = VduseDisk::new("vdpa6", 8).expect("a disk of this test");
        step("one is made", || {
            let output = vdpa(&vm, &["add", "vdpa6", "--mgmtdev", "vduse", "--dry-run"]);
            assert_eq!(output.stdout, "would make vDPA device vdpa6 at vduse\n");
            assert!(!exists("vdpa6"), "nothing was done");
            let output = vdpa(&vm, &["add", "vdpa6", "--mgmtdev", "vduse"]);
            assert!(output.code == 0 && output.stdout.contains("vdpa6 is /dev/vhost-vdpa-"), "{output}");
            assert!(exists("vdpa6"));
        });
        step("what cannot be made", || {
            for (words, code, reason) in [
                (&["add", "vdpa6", "--mgmtdev", "vduse"][..], 3, "there is a vDPA device vdpa6 already"),
                (&["add", "vdpa9", "--mgmtdev", "vdusen"], 5, "this host has vduse"),
                (&["add", "vdpa9", "--mgmtdev", "vduse"], 1, "must be served first"),
                (&["add", "vdpa9", "--mgmtdev", "vduse", "--driver", "x"], 2, "a management device on PCI"),
                (&["del", "vdpa9"], 5, "there is no vDPA device vdpa9"),
            ] {
                let output = vdpa(&vm, words);
                assert!(output.code == code && output.stderr.contains(reason), "{output}");
            }
        });
        step("without the right to", || {
            let mut command = vm.command(&["host", "vdpa", "del", "vdpa6"]);
            // Its own folders are root's; those of a user are where the user may write.
            let output = finished(command.uid(65534).gid(65534).spawn().expect("qvirt starts"));
            assert!(output.code == 1 && output.stderr.contains("CAP_NET_ADMIN"), "{output}");
            assert!(exists("vdpa6"));
        });
        vm.start();
        step("a VM has it", || {
            let mut scene = Scene::of_running(vm);
            let before = scene.seen.clone();
            scene.attach(["--vdpa", "device=vdpa6,id=fast"], "disk", "serial=vdpa6");
            assert_eq!(of(&json(&scene.vm, &["show"]), "vdpa6")["held_by"], "VM guest");
            let output = vdpa(&scene.vm, &["del", "vdpa6"]);
            assert!(output.code == 3 && output.stderr.contains("used by VM guest"), "{output}");
            let migrate = scene.vm.expect(3, &["qmp", "guest", "migrate", "{\"uri\":\"exec:true\"}"]);
            assert!(migrate.stderr.contains("device fast is a vDPA device of this host"), "{migrate}");
            scene.detach("fast", &before);
            let output = vdpa(&scene.vm, &["del", "vdpa6", "--json"]);
            assert!(output.code == 0 && !exists("vdpa6"), "{output}");
            scene.end();
        });
        drop(own);
    });
}

/// The lab has no vendor's vDPA driver: another driver takes the function and offers no management device, so all is undone.
#[test]
fn a_function_whose_driver_offers_no_vdpa_is_given_back() {
    inside(|| {
        let vm = Vm::new(QemuVersion::V10_0, QUIET, 1, "");
        let vf = pci::FREE_PF.function().expect("a PF").vfs().into_iter().next().expect("it has VFs");
        let name = format!("pci/{vf}");
        let driver = |vf: &pci::Function| vf.driver();
        assert_eq!(driver(&vf), None);
        let wish = ["add", "vdpa4", "--mgmtdev", &name, "--driver", "igbvf"];
        let output = vdpa(&vm, &[&wish[..], &["--dry-run"]].concat());
        let plan = format!("would bind {name} to igbvf\nwould make vDPA device vdpa4 at {name}\n");
        assert_eq!((output.code, output.stdout), (0, plan));
        assert_eq!(driver(&vf), None, "nothing was done");
        let output = vdpa(&vm, &wish);
        assert!(
            output.code == 5 && output.stderr.contains(&format!("no vDPA management device {name}")),
            "{output}"
        );
        assert_eq!(driver(&vf), None, "it has no driver, as before");
        let output = vdpa(&vm, &["add", "vdpa4", "--mgmtdev", &name, "--driver", "none"]);
        assert!(output.code == 3 && output.stderr.contains("modprobe none"), "{output}");
        vf.bind("vfio-pci").expect("vfio-pci takes it");
        let output = vdpa(&vm, &wish);
        assert!(output.code == 3 && output.stderr.contains("for a guest"), "{output}");
        vf.unbind().expect("vfio-pci gives it back");
    });
}

mod soak {
    use super::*;

    /// A device that a VM wants is made for it and deleted with it: at a detach, at the end, and by `recover`.
    #[test]
    fn devices_are_made_for_a_vm() {
        inside(|| {
            let own = VduseDisk::new("vdpa5", 8).expect("a disk of this test");
            let wish = "device=vdpa5,mgmtdev=vduse,id=made";
            let vm = Vm::with_memory(QemuVersion::V10_0, QUIET, 8, SHARED, AGENT_CHANNEL);
            let mut scene = step("boot", || Scene::of(vm));
            let before = scene.seen.clone();
            step("attach and detach", || {
                scene.attach(["--vdpa", wish], "disk", "serial=vdpa5");
                assert!(exists("vdpa5"));
                scene.detach("made", &before);
                assert!(!exists("vdpa5"), "it went with the guest's device");
            });
            step("each step that fails", || {
                let state = || (scene.vm.device_ids(), scene.vm.leases(), exists("vdpa5"));
                let failed = each_step_is_undone(&scene.vm, ["--vdpa", wish], state);
                assert_eq!(failed, ["record", "vdpa", "fdset", "frontend", "verify", "settle"]);
            });
            step("one that is there already is nobody's to delete", || {
                scene.vm.ok(&["detach", "guest", "made", "--wait", "30s"]);
                assert!(!exists("vdpa5"));
                program("vdpa", &["dev", "add", "name", "vdpa5", "mgmtdev", "vduse"]).expect("on the bus");
                scene.attach(["--vdpa", wish], "disk", "serial=vdpa5");
                scene.detach("made", &before);
                assert!(exists("vdpa5"), "it was there before");
                program("vdpa", &["dev", "del", "vdpa5"]).expect("off the bus");
            });
            step("owner and QEMU are killed", || {
                scene.attach(["--vdpa", wish], "disk", "serial=vdpa5");
                let qemu = scene.vm.qemu_pid();
                scene.vm.kill_owner();
                scene.vm.kill_process(qemu);
                assert!(exists("vdpa5"), "nobody has cleared up yet");
                print!("{}", scene.vm.ok(&["recover", "guest"]));
                assert!(!exists("vdpa5"));
                scene.vm.nothing_left();
            });
            drop(own);
        });
    }
}
