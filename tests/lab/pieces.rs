//! The raw pieces of passthrough, plugged by plain QMP: what the lab's hardware is worth, before qvirt has commands for it. Each is plugged into a
//! running guest, seen and used by it, and unplugged; one guest of each QEMU for all.

use serde_json::{Value, json};
use tests::guest::Inventory;
use tests::lab::host::{pci, scsi, usb, vdpa};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::vm::{AGENT_CHANNEL, Vm};

#[test]
fn by_plain_qmp_on_qemu_10_0() {
    inside(|| each_piece(QemuVersion::V10_0));
}

fn each_piece(version: QemuVersion) {
    // The drivers of passed-through hardware are loaded in this guest. A vDPA device in software maps its memory, which must be shared
    // for that.
    let memory = "{ size = \"256MiB\", shared = true }";
    let vm = Vm::with_memory(version, "quiet qvirt.hardware=1", 8, memory, AGENT_CHANNEL);
    let mut scene = step("boot", || Scene::of(vm));
    step("a virtual function", || virtual_function(&mut scene));
    step("a USB stick", || usb_stick(&mut scene));
    step("LUNs of vhost-scsi", || vhost_scsi(&mut scene));
    // The generic vDPA device came with QEMU 8.0.
    if version != QemuVersion::V7_2 {
        step("a vDPA disk", || vdpa_disk(&mut scene));
    }
    step("a vDPA NIC", || vdpa_nic(&mut scene));
    scene.end();
}

/// Plugs a device into a root port that qvirt has planned as a spare one, each into another.
fn plug(scene: &Scene, port: &str, id: &str, mut device: Value) {
    device["id"] = json!(id);
    device["bus"] = json!(port);
    device["addr"] = json!("0");
    scene.vm.qmp("device_add", &device);
}

/// Unplugs what was plugged by QMP; the guest must then see what it saw before.
fn unplug(scene: &mut Scene, id: &str, before: &Inventory) {
    scene.vm.qmp("device_del", &json!({ "id": id }));
    scene.sees(&format!("{id} gone"), |seen| seen == before);
}

fn virtual_function(scene: &mut Scene) {
    let before = scene.seen.clone();
    let pf = pci::FREE_PF.function().expect("the lab's SR-IOV card");
    let vf = pf.vfs().into_iter().next().expect("it has VFs");
    vf.bind("vfio-pci").expect("vfio-pci takes the VF");
    plug(scene, "rp8", "vf0", json!({"driver": "vfio-pci", "host": vf.to_string()}));
    // Its MAC may be a random one: where all is emulated, the PF may answer the VF's question too late.
    let driven = format!(" {} igbvf", vf.model().expect("the VF is there"));
    let seen = scene.sees("a virtual function and its NIC", |seen| {
        let function = seen.of("pci").into_iter().find(|line| line.ends_with(&driven));
        let address = function.and_then(|line| line.split(' ').nth(1));
        address.is_some_and(|address| seen.find("nic", &format!("at={address}")).is_some())
    });
    assert_eq!(seen.nics().len(), 1, "{seen}");
    unplug(scene, "vf0", &before);
    vf.unbind().expect("vfio-pci gives it back");
}

fn usb_stick(scene: &mut Scene) {
    let without_controller = scene.seen.clone();
    plug(scene, "rp7", "xhci", json!({"driver": "qemu-xhci"}));
    let has_controller = |seen: &Inventory| seen.of("pci").iter().any(|line| line.ends_with(" xhci_hcd"));
    let before = scene.sees("a USB controller", has_controller).clone();
    let [red, ..] = usb::STICKS;
    let place = red.place().expect("the stick is plugged into the host");
    let stick = json!({"driver": "usb-host", "hostbus": place.bus, "hostport": place.port, "id": "stick", "bus": "xhci.0"});
    scene.vm.qmp("device_add", &stick);
    scene.sees_line("a USB stick", "usb", &format!("serial={}", red.serial));
    let size = format!(" {} ", usb::MIB << 20);
    scene.sees("its disk", |seen| seen.disks().iter().any(|line| line.contains(&size)));
    unplug(scene, "stick", &before);
    unplug(scene, "xhci", &without_controller);
}

fn vhost_scsi(scene: &mut Scene) {
    let before = scene.seen.clone();
    plug(scene, "rp6", "luns", json!({"driver": "vhost-scsi-pci", "wwpn": scsi::TARGET}));
    for (serial, mib) in scsi::LUNS {
        let line = scene.sees_line("a LUN", "disk", &format!("serial={serial}"));
        assert!(line.contains(&format!(" {} ", mib << 20)), "{line}");
    }
    let (serial, _) = scsi::LUNS[1];
    let text = format!("written by {}", scene.vm.version());
    write_disk(scene, serial, &text);
    unplug(scene, "luns", &before);
    stored(&format!("/run/lab/{serial}.img"), &text);
}

fn vdpa_disk(scene: &mut Scene) {
    let before = scene.seen.clone();
    let node = vdpa::device(vdpa::DISK).expect("the lab's vDPA disk");
    plug(scene, "rp5", "vdpa", json!({"driver": "vhost-vdpa-device-pci", "vhostdev": node}));
    let line = scene.sees_line("a vDPA disk", "disk", &format!("serial={}", vdpa::DISK));
    assert!(line.contains(&format!(" {} ", vdpa::DISK_MIB << 20)), "{line}");
    write_disk(scene, vdpa::DISK, "VDPA");
    unplug(scene, "vdpa", &before);
    stored("/run/lab/vdpa0.img", "VDPA");
}

fn vdpa_nic(scene: &mut Scene) {
    let before = scene.seen.clone();
    let node = vdpa::device(vdpa::NIC).expect("the lab's vDPA NIC");
    scene.vm.qmp("netdev_add", &json!({"type": "vhost-vdpa", "id": "vdpan", "vhostdev": node}));
    plug(scene, "rp4", "vdpanic", json!({"driver": "virtio-net-pci", "netdev": "vdpan"}));
    let line = scene.sees_line("a vDPA NIC", "nic", vdpa::NIC_MAC);
    let nic = line.split(' ').nth(1).expect("a NIC has a name");
    let script = format!(
        "ip link set {nic} up; ip address add {}/24 dev {nic}; ping -c 3 -W 5 {}",
        vdpa::NIC_GUEST,
        vdpa::NIC_NEIGHBOUR
    );
    println!("{}", scene.guest.check(&script).expect("the neighbour answers"));
    unplug(scene, "vdpanic", &before);
    scene.vm.qmp("netdev_del", &json!({"id": "vdpan"}));
}

fn write_disk(scene: &mut Scene, serial: &str, text: &str) {
    let disk = scene.disk(serial);
    let script = format!("printf '{text}' | dd of=/dev/{disk} bs=512 conv=sync,fsync 2>/dev/null");
    scene.guest.check(&script).expect("the guest writes to its disk");
}

/// What the guest wrote is in the host's file.
fn stored(file: &str, text: &str) {
    let bytes = std::fs::read(file).expect("the file behind the disk");
    assert!(bytes.starts_with(text.as_bytes()), "{file} does not begin with {text:?}");
}

mod soak {
    use super::*;

    #[test]
    fn by_plain_qmp_on_qemu_7_2() {
        inside(|| each_piece(QemuVersion::V7_2));
    }
}
