//! Somebody without rights on the lab host: whatever cannot be done is refused by the right that lacks and the way to get it, and nothing changes.

use std::os::unix::fs::lchown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use tests::lab::host::pci::FREE_PF;
use tests::lab::host::usb::STICKS;
use tests::lab::host::vdpa::DISK;
use tests::lab::host::{network, scsi};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::QUIET;
use tests::vm::{Output, SHARED, Vm, finished};

const NOBODY: u32 = 65534;

/// A VM of nobody's.
fn vm(tables: &str) -> Vm {
    let vm = Vm::with_memory(QemuVersion::V10_0, QUIET, 2, SHARED, tables);
    // The cache of all tests is root's.
    std::fs::remove_file(vm.root().join("cache")).expect("a link");
    for path in [vm.path(""), vm.root(), vm.config()] {
        lchown(path, Some(NOBODY), Some(NOBODY)).expect("it is ours to give");
    }
    vm
}

/// Runs `qvirt` as nobody, prints what it says, and looks at it.
fn refused(vm: &Vm, arguments: &[&str], words: &[&str]) {
    let mut command = vm.command(arguments);
    command.uid(NOBODY).gid(NOBODY).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output: Output = finished(command.spawn().expect("qvirt starts"));
    println!("$ qvirt {}\n{}{}", arguments.join(" "), output.stdout, output.stderr);
    assert_ne!(output.code, 0, "{output}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?}: {output}");
    }
}

#[test]
fn somebody_without_rights_is_told_which_one_lacks() {
    inside(|| {
        let pf = FREE_PF.function().expect("the lab's card");
        let (card, vf) = (pf.to_string(), pf.vfs()[0].to_string());
        let driver = pf.vfs()[0].driver();
        let host = vm("");
        step("what changes the host", || {
            refused(&host, &["host", "bind", &vf], &[&vf, "drivers are bound as root"]);
            refused(&host, &["host", "sriov", &card, "--vfs", "1"], &["run as root"]);
            refused(
                &host,
                &["host", "vf", &card, "0", "--vlan", "9"],
                &["it needs CAP_NET_ADMIN; run as root"],
            );
            let add = ["host", "vdpa", "add", "mine", "--mgmtdev", "vduse"];
            refused(&host, &add, &["it needs CAP_NET_ADMIN; run as root"]);
        });
        let [red, ..] = STICKS;
        let stick = format!("{:04x}:{:04x}", red.vendor, red.product);
        let devices = [
            (format!("[[vfio]]\nhost = \"{vf}\"\n"), "root"),
            (
                format!("[[usb_controller]]\nmodel = \"ehci\"\n[[usb]]\nhost = \"{stick}\"\n"),
                "run qvirt as root, or let udev give the right to",
            ),
            (format!("[[vdpa]]\ndevice = {DISK:?}\n"), "no permission to open /dev/vhost-vdpa-"),
            (
                format!("[[vhost_scsi]]\nwwpn = \"{}\"\n", scsi::TARGET),
                "no permission to open /dev/vhost-scsi: run as root",
            ),
            (format!("[[nic]]\nbridge = \"{}\"\n", network::BRIDGE.bridge), "no permission to make tap"),
        ];
        for (table, words) in devices {
            step(table.lines().next().unwrap_or_default(), || {
                let vm = vm(&table);
                let file = vm.config().display().to_string();
                refused(&vm, &["start", "--paused", &file], &[words]);
                vm.nothing_left();
            });
        }
        assert_eq!(pf.vfs()[0].driver(), driver, "it stays where it is");
        assert!(!Path::new("/sys/bus/vdpa/devices/mine").exists());
    });
}
