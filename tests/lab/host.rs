//! The lab itself: what its table in `tests::lab::host` names is there, and is what it says.

use std::collections::BTreeSet;

use tests::lab::host::faulty::FaultyDisk;
use tests::lab::host::network::{BRIDGE, SWITCH, TAGGED};
use tests::lab::host::{list, pci, program, usb, vdpa};
use tests::lab::inside;

#[test]
fn each_name_stands_for_what_it_says() {
    inside(|| {
        print!("{}", list().expect("all of it is there"));
        for node in ["/dev/kvm", "/dev/vhost-net", "/dev/vhost-scsi", "/dev/net/tun", "/dev/vfio/vfio"] {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(node);
            file.unwrap_or_else(|e| panic!("{node}: {e}"));
        }
        groups();
        let twins = usb::STICKS.map(|stick| (stick.vendor, stick.product));
        assert_eq!(
            (BTreeSet::from(twins).len(), twins[2]),
            (3, twins[3]),
            "two different sticks and two twins"
        );
        let buses = usb::STICKS.map(|stick| stick.place().expect("it is plugged in").bus);
        assert_eq!(BTreeSet::from(buses).len(), 4);
        for name in [vdpa::DISK, vdpa::NIC] {
            vdpa::device(name).expect("a vDPA device");
        }
        assert!(FaultyDisk::ready().expect("the disk on device-mapper").path().exists());
        for network in [BRIDGE, SWITCH, TAGGED] {
            let route = program("ip", &["route", "get", network.guest]).expect("a route to its guests");
            assert!(route.contains(network.address), "{route}");
        }
    });
}

/// Whose IOMMU group is whose.
fn groups() {
    let group = |function: &pci::Function| {
        function.group().unwrap_or_else(|| panic!("{function} has no IOMMU group"))
    };
    let free = pci::FREE_PF.function().expect("a PF").vfs();
    let alone: BTreeSet<String> = free.iter().map(group).collect();
    assert_eq!((free.len(), alone.len()), (4, 4), "each VF is alone in its group");
    assert!(free.iter().all(|vf| vf.driver().is_none()), "no driver holds them");

    let used = pci::USED_PF.function().expect("another PF").vfs();
    assert!(
        !used.is_empty() && used.iter().all(|vf| vf.driver().as_deref() == Some("igbvf")),
        "igbvf holds these"
    );
    assert!(used.iter().all(|vf| vf.netdev().is_some()), "and they are the host's NICs");

    let shared = pci::SHARED.functions();
    assert_eq!(
        (shared.len(), BTreeSet::from_iter(shared.iter().map(group)).len()),
        (2, 1),
        "two functions, one group"
    );
}

#[test]
fn usb_sticks_are_pulled_and_plugged() {
    inside(|| {
        let [_, blue, ..] = usb::STICKS;
        let before = blue.place().expect("it is plugged in");
        blue.unplug().expect("it is pulled");
        blue.plug().expect("it is plugged again");
        let after = blue.place().expect("it is back");
        assert_ne!(before.address, after.address, "a new address");
        assert_eq!((before.bus, before.port), (after.bus, after.port), "on the old port");
    });
}
