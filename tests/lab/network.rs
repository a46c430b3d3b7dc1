//! NICs on the lab's networks: taps, bridges, switches and vhost-net, each seen by a guest that pings the lab host.

use std::collections::BTreeSet;
use std::path::Path;

use tests::lab::host::network::{BRIDGE, Network, SWITCH, TAG, TAGGED};
use tests::lab::host::program;
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Vm};

const MAC: &str = "52:54:00:1a:b0:11";

/// Gives the guest's NIC an address of that network, and tells whether the host answers it.
fn pings(scene: &mut Scene, network: Network) -> bool {
    let line = scene.seen.find("nic", MAC).expect("the guest has the NIC").to_owned();
    let nic = line.split(' ').nth(1).expect("a NIC has a name");
    let Network { address, guest, .. } = network;
    let script = format!(
        "ip address flush dev {nic}; ip link set {nic} up; ip address add {guest}/24 dev {nic}; ping -c 3 -W 3 {address}"
    );
    let output = scene.guest.run(&script).expect("the guest answers");
    println!("guest# ping {address}\n{}", output.stdout);
    output.status == 0
}

/// A guest with two processors, the lab's emulated or not: it uses no more queues of a NIC than it has processors.
fn two_processors(version: QemuVersion) -> Scene {
    let vm = Vm::new(version, QUIET, 8, AGENT_CHANNEL);
    let config = std::fs::read_to_string(vm.config()).expect("the VM file is there");
    std::fs::write(vm.config(), config.replace("vcpus = 1\n", "vcpus = 2\n"))
        .expect("the VM file is written");
    Scene::of(vm)
}

/// How many descriptors QEMU has open on a node.
fn open_in_qemu(scene: &Scene, node: &str) -> usize {
    let folder = format!("/proc/{}/fd", scene.vm.qemu_pid());
    let entries = std::fs::read_dir(folder).expect("QEMU runs").flatten();
    entries
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(node)))
        .count()
}

/// The host's taps.
fn taps() -> BTreeSet<String> {
    let links = std::fs::read_dir("/sys/class/net").expect("sysfs is there").flatten();
    let taps = links.filter(|link| link.path().join("tun_flags").exists());
    taps.map(|link| link.file_name().to_string_lossy().into_owned()).collect()
}

fn bridge_ports(bridge: &str) -> usize {
    std::fs::read_dir(format!("/sys/class/net/{bridge}/brif")).map_or(0, Iterator::count)
}

#[test]
fn a_nic_on_the_bridge_with_vhost_net_comes_and_goes() {
    inside(|| {
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let before = scene.seen.clone();
        let nic = format!("bridge={},vhost=true,mac={MAC},id=net0", BRIDGE.bridge);
        step("attach", || scene.attach(["--nic", &nic], "nic", MAC));
        assert_eq!(
            (open_in_qemu(&scene, "/dev/vhost-net"), taps().len(), bridge_ports(BRIDGE.bridge)),
            (1, 1, 1),
            "vhost nodes in QEMU, taps, ports of the bridge"
        );
        assert!(step("ping", || pings(&mut scene, BRIDGE)), "the lab host answers");
        step("detach", || scene.detach("net0", &before));
        assert_eq!((taps().len(), bridge_ports(BRIDGE.bridge)), (0, 0), "the tap went with the NIC");
        scene.end();
    });
}

#[test]
fn vhost_net_with_two_queues() {
    inside(|| {
        let mut scene = step("boot", || two_processors(QemuVersion::V7_2));
        let before = scene.seen.clone();
        let nic = format!("bridge={},vhost=true,queues=2,mac={MAC},id=net0", BRIDGE.bridge);
        let line = step("attach", || scene.attach(["--nic", &nic], "nic", MAC));
        assert!(line.contains(" queues=2 "), "{line}");
        assert_eq!(open_in_qemu(&scene, "/dev/vhost-net"), 2, "one vhost for each queue");
        assert!(step("ping", || pings(&mut scene, BRIDGE)), "the lab host answers");
        step("detach", || scene.detach("net0", &before));
        assert_eq!(taps().len(), 0, "the tap went with the NIC");
        scene.end();
    });
}

#[test]
fn a_tap_that_was_there_before_is_there_afterwards() {
    inside(|| {
        program("ip", &["tuntap", "add", "dev", "mine", "mode", "tap"]).expect("a tap");
        program("ip", &["link", "set", "mine", "master", BRIDGE.bridge, "up"]).expect("a tap in the bridge");
        // From the start, in the file.
        let table = format!("{AGENT_CHANNEL}[[nic]]\nid = \"net0\"\ntap = \"mine\"\nmac = \"{MAC}\"\n");
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, &table));
        assert!(step("ping", || pings(&mut scene, BRIDGE)), "the lab host answers");
        assert_eq!(open_in_qemu(&scene, "/dev/vhost-net"), 0);
        scene.end();
        assert_eq!(taps(), BTreeSet::from(["mine".to_owned()]));
        program("ip", &["link", "delete", "mine"]).expect("the tap is ours");
    });
}

#[test]
fn open_vswitch_with_and_without_a_vlan_tag() {
    inside(|| {
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let before = scene.seen.clone();
        let ports = || program("ovs-vsctl", &["list-ports", SWITCH.bridge]).expect("the switch answers");
        let own_ports = ports();

        let tagged = format!(
            "bridge={},openvswitch=true,vlan={TAG},tap=qvlan0,vhost=true,mac={MAC},id=net0",
            SWITCH.bridge
        );
        step("attach, tagged", || scene.attach(["--nic", &tagged], "nic", MAC));
        assert_eq!(
            program("ovs-vsctl", &["get", "Port", "qvlan0", "tag"]).expect("the switch answers").trim(),
            TAG.to_string()
        );
        assert!(
            step("ping in the VLAN", || pings(&mut scene, TAGGED)),
            "the host's port of that tag answers"
        );
        assert!(!step("ping outside of it", || pings(&mut scene, SWITCH)), "nobody else does");
        step("detach", || scene.detach("net0", &before));
        assert_eq!((ports(), taps().len()), (own_ports.clone(), 0), "port and tap went with the NIC");

        let untagged = format!("bridge={},openvswitch=true,mac={MAC},id=net0", SWITCH.bridge);
        step("attach, untagged", || scene.attach(["--nic", &untagged], "nic", MAC));
        assert!(step("ping", || pings(&mut scene, SWITCH)), "the host's own port answers");
        scene.end();
        assert_eq!((ports(), taps().len()), (own_ports, 0), "port and tap went with the VM");
    });
}

mod soak {
    use super::*;
    use crate::sweep::failed_attach;

    #[test]
    fn each_step_of_a_nic_that_fails_is_undone() {
        inside(|| {
            // A device that was plugged goes when the guest says so.
            let scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
            let vm = &scene.vm;
            let ports = || program("ovs-vsctl", &["list-ports", SWITCH.bridge]).expect("the switch answers");
            let linux = format!("bridge={}", BRIDGE.bridge);
            let switch = format!("bridge={},openvswitch=true,vlan={TAG}", SWITCH.bridge);
            let own_ports = ports();
            for (id, network) in [("net0", linux), ("net1", switch)] {
                let before = (ports(), taps(), vm.device_ids());
                let nic = format!("{network},vhost=true,queues=2,id={id}");
                let failed: Vec<String> = (1..)
                    .map_while(|number| failed_attach(vm, number, ["--nic", &nic]))
                    .inspect(|step| {
                        vm.wait_for(&format!("the undoing of {step}"), || {
                            (ports(), taps(), vm.device_ids()) == before
                        });
                    })
                    .collect();
                println!("{network}: failed and undone: {failed:?}");
                for kind in ["tap", "vhost-net", "descriptor", "netdev", "frontend"] {
                    assert!(failed.iter().any(|step| step == kind), "{kind} is not among {failed:?}");
                }
            }
            scene.end();
            assert_eq!((ports(), taps().len()), (own_ports, 0), "ports and taps went with the VM");
        });
    }
}
