//! A machine made of files.

use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use super::Inventory;

struct Machine(TempDir);

impl Machine {
    fn new() -> Machine {
        Machine(tempfile::tempdir().expect("a folder"))
    }

    fn file(&self, path: &str, bytes: impl AsRef<[u8]>) -> &Machine {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
        self
    }

    /// A link at `path` to the folder `to`, both below the root.
    fn link(&self, path: &str, to: &str) -> &Machine {
        let (path, to) = (self.0.path().join(path), self.0.path().join(to));
        for folder in [path.parent().expect("a link is in a folder"), &to] {
            std::fs::create_dir_all(folder).expect("a folder");
        }
        symlink(to, path).expect("a link");
        self
    }

    fn lines(&self) -> Vec<String> {
        Inventory::read(self.0.path()).lines().into_iter().collect()
    }
}

const BUS: &str = "sys/devices/pci0000:00";

/// A disk on virtio, one on SCSI with both VPD pages, one on NVMe.
fn disks(machine: &Machine) {
    let vda = format!("{BUS}/0000:00:01.0/0000:01:00.0/virtio0/block/vda");
    machine
        .link("sys/block/vda", &vda)
        .file(&format!("{vda}/size"), "2048\n")
        .file(&format!("{vda}/serial"), "a b\n");
    machine.file(&format!("{vda}/ro"), "0\n").file(&format!("{vda}/queue/write_cache"), "write back\n");
    machine
        .file(&format!("{vda}/queue/discard_max_bytes"), "4096\n")
        .file(&format!("{vda}/queue/logical_block_size"), "512\n");
    machine.file(&format!("{vda}/mq/0/x"), "").file(&format!("{vda}/mq/1/x"), "");

    let scsi = format!("{BUS}/0000:00:02.0/virtio1/host0/target0:0:3/0:0:3:7");
    let sda = format!("{scsi}/block/sda");
    machine
        .link("sys/block/sda", &sda)
        .link(&format!("{sda}/device"), &scsi)
        .file(&format!("{sda}/size"), "8");
    machine.file(&format!("{sda}/ro"), "1").file(&format!("{scsi}/vpd_pg80"), b"\0\x80\0\x08se ond\0\0");
    machine.file(&format!("{scsi}/vpd_pg83"), b"\0\x83\0\x09\x02\0\0\x06my nam\0\0");

    let nvme = format!("{BUS}/0000:00:03.0/nvme/nvme0");
    machine.link("sys/block/nvme0n1", &format!("{nvme}/nvme0n1")).file(&format!("{nvme}/nvme0n1/size"), "16");
    machine.link(&format!("{nvme}/nvme0n1/device"), &nvme).file(&format!("{nvme}/serial"), "flash  \n");
    let path = format!("{nvme}/nvme0c0n1");
    machine
        .link("sys/block/nvme0c0n1", &path)
        .file(&format!("{path}/size"), "16")
        .file(&format!("{path}/hidden"), "1\n");
}

#[test]
fn disks_are_told_by_what_their_driver_says() {
    let machine = Machine::new();
    disks(&machine);
    assert_eq!(
        machine.lines(),
        [
            "cpus 0",
            "disk nvme0n1 8192 serial=flash ro=0 queues=0 cache=- discard=0 block=0 at=0000:00:03.0",
            "disk sda 4096 serial=se_ond ro=1 queues=0 cache=- discard=0 block=0 at=0000:00:02.0 hctl=0:0:3:7 id=my_nam",
            "disk vda 1048576 serial=a b ro=0 queues=2 cache=back discard=1 block=512 at=0000:01:00.0",
            "memory 0",
        ]
    );
}

#[test]
fn a_drive_without_a_medium_cannot_be_read() {
    let machine = Machine::new();
    for (name, lun) in [("sr0", "1:0:0:0"), ("sr1", "1:0:0:1")] {
        let drive = format!("{BUS}/0000:00:1f.2/ata1/{lun}/block/{name}");
        machine.link(&format!("sys/block/{name}"), &drive).file(&format!("{drive}/size"), "2097151");
        machine.link(&format!("{drive}/device"), &format!("{BUS}/0000:00:1f.2/ata1/{lun}"));
    }
    machine.file("dev/sr0", []).file("dev/sr1", [0; 4096]);
    assert_eq!(
        machine.lines()[..2],
        [
            "cdrom sr0 media=none hctl=1:0:0:0 at=0000:00:1f.2",
            "cdrom sr1 media=1073741312 hctl=1:0:0:1 at=0000:00:1f.2",
        ]
    );
}

/// A NIC on virtio, the loopback, a USB stick with its hub and its interface.
fn cards(machine: &Machine) {
    let function = format!("{BUS}/0000:00:05.0");
    machine.file(&format!("{function}/vendor"), "0x1af4\n").file(&format!("{function}/device"), "0x1041\n");
    machine.link(&format!("{function}/driver"), "sys/bus/pci/drivers/virtio-pci");
    machine.link(&format!("{function}/virtio3/driver"), "sys/bus/virtio/drivers/virtio_net");
    machine.link("sys/bus/pci/devices/0000:00:05.0", &function);
    let nic = format!("{function}/virtio3/net/eth0");
    machine.link("sys/class/net/eth0", &nic).link(&format!("{nic}/device"), &format!("{function}/virtio3"));
    machine.file(&format!("{nic}/address"), "52:54:00:00:00:07\n").file(&format!("{nic}/mtu"), "1500\n");
    machine.file(&format!("{nic}/queues/rx-0/x"), "").file(&format!("{nic}/queues/tx-0/x"), "");
    machine.file("sys/class/net/lo/address", "00:00:00:00:00:00\n");

    let controller = format!("{BUS}/0000:00:06.0");
    machine.file(&format!("{controller}/vendor"), "0x1b36").file(&format!("{controller}/device"), "0x000d");
    machine.link("sys/bus/pci/devices/0000:00:06.0", &controller);
    let hub = format!("{controller}/usb1");
    let stick = format!("{hub}/1-2");
    machine
        .link("sys/bus/usb/devices/usb1", &hub)
        .file(&format!("{hub}/idVendor"), "1d6b")
        .file(&format!("{hub}/idProduct"), "2");
    machine
        .link("sys/bus/usb/devices/1-2", &stick)
        .link("sys/bus/usb/devices/1-2:1.0", &format!("{stick}/1-2:1.0"));
    machine.file(&format!("{stick}/idVendor"), "0951\n").file(&format!("{stick}/idProduct"), "1666\n");
    machine.file(&format!("{stick}/serial"), "A 1\n").file(&format!("{stick}/speed"), "480\n");
}

#[test]
fn cards_and_sticks_are_told_and_what_belongs_to_the_kernel_is_not() {
    let machine = Machine::new();
    cards(&machine);
    assert_eq!(
        machine.lines()[2..],
        [
            "nic eth0 52:54:00:00:00:07 queues=1 mtu=1500 at=0000:00:05.0",
            "pci 0000:00:05.0 1af4:1041 virtio_net",
            "pci 0000:00:06.0 1b36:000d -",
            "usb 1-2 0951:1666 serial=A_1 speed=480 at=0000:00:06.0",
        ]
    );
}

#[test]
fn lines_of_text_memory_and_processors() {
    let machine = Machine::new();
    machine
        .file("sys/class/virtio-ports/vport1p0/name", "")
        .file("sys/class/virtio-ports/vport1p1/name", "org.x\n");
    machine.file("sys/class/tty/ttyS0/type", "4\n").file("sys/class/tty/ttyS1/type", "0\n");
    machine.file("sys/devices/system/memory/block_size_bytes", "8000000\n");
    for (block, state) in [("memory0", "online"), ("memory1", "offline"), ("memory2", "online")] {
        machine.file(&format!("sys/devices/system/memory/{block}/state"), format!("{state}\n"));
    }
    machine.file("sys/devices/system/cpu/cpu0/x", "").file("sys/devices/system/cpu/cpu1/online", "1\n");
    machine.file("sys/devices/system/cpu/cpu2/online", "0\n").file("sys/devices/system/cpu/cpufreq/x", "");
    assert_eq!(
        machine.lines(),
        ["channel org.x", "console vport1p0", "cpus 2", "memory 262144", "serial ttyS0"]
    );
}

#[test]
fn json_goes_both_ways_and_an_empty_machine_is_no_error() {
    let machine = Machine::new();
    disks(&machine);
    cards(&machine);
    let seen = Inventory::read(machine.0.path());
    let json = serde_json::to_string(&seen).expect("JSON");
    assert_eq!(serde_json::from_str::<Inventory>(&json).expect("the same"), seen);
    assert_eq!(Inventory::read(Path::new("/nonexistent")), Inventory::default());
}
