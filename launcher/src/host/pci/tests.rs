//! On a tree like sysfs: what no machine at hand has.

use std::os::unix::fs::symlink;

use super::*;

/// A PCI device of a host that does not exist.
fn device(root: &Path, bdf: &str, files: &[(&str, &str)], links: &[(&str, &str)]) {
    let folder = root.join("bus/pci/devices").join(bdf);
    fs::create_dir_all(folder.join("net")).expect("a folder");
    for (name, text) in
        [("class", "0x020000"), ("vendor", "0x19e5"), ("device", "0x1822")].iter().chain(files)
    {
        fs::write(folder.join(name), format!("{text}\n")).expect("a file");
    }
    for (name, target) in links {
        symlink(target, folder.join(name)).expect("a link");
    }
}

#[test]
fn functions_know_each_other_and_their_group() {
    let temp = tempfile::tempdir().expect("a folder");
    let sysfs = Sysfs::below(temp.path());
    let vf = |n: u32| format!("0000:05:00.{n}");
    let virtfns: Vec<(String, String)> =
        (0..2).map(|n| (format!("virtfn{n}"), format!("../{}", vf(n + 1)))).collect();
    let mut links: Vec<(&str, &str)> =
        virtfns.iter().map(|(name, target)| (name.as_str(), target.as_str())).collect();
    links.extend([
        ("driver", "../../../bus/pci/drivers/hinic"),
        ("iommu_group", "../../../kernel/iommu_groups/7"),
    ]);
    device(temp.path(), "0000:05:00.0", &[("numa_node", "1"), ("sriov_totalvfs", "120")], &links);
    fs::create_dir_all(temp.path().join("bus/pci/devices/0000:05:00.0/net/eth0")).expect("a folder");
    for n in 1..3 {
        let group = format!("../../../kernel/iommu_groups/{}", 7 + n / 2);
        let links = [
            ("physfn", "../0000:05:00.0"),
            ("iommu_group", group.as_str()),
            ("driver", "../drivers/vfio-pci"),
        ];
        device(temp.path(), &vf(n), &[("numa_node", "-1"), ("device", "0x375e")], &links);
    }
    device(
        temp.path(),
        "0000:00:1c.0",
        &[("class", "0x060400")],
        &[("iommu_group", "../8"), ("driver", "../pcieport")],
    );
    device(temp.path(), "0000:00:1d.0", &[("class", "0x060400")], &[("iommu_group", "../9")]);

    let devices = sysfs.pci_devices().expect("devices");
    let [bridge, _, pf, first, second] = &devices[..] else { panic!("{devices:?}") };
    assert!(bridge.is_bridge() && bridge.is_of(Class::Bridge) && !pf.is_bridge() && pf.is_of(Class::Net));
    assert_eq!(
        (pf.vfs.as_slice(), pf.vfs_max, pf.numa_node),
        (&[first.bdf, second.bdf][..], Some(120), Some(1))
    );
    assert_eq!((pf.netdevs.as_slice(), pf.driver.as_deref()), (&["eth0".to_owned()][..], Some("hinic")));
    assert_eq!((first.pf, first.numa_node, second.vfs.len()), (Some(pf.bdf), None, 0));

    let groups = sysfs.iommu_groups(None).expect("groups");
    let in_the_way: Vec<Vec<String>> = groups
        .iter()
        .map(|group| group.in_the_way().map(|(member, driver)| format!("{} {driver}", member.bdf)).collect())
        .collect();
    assert_eq!(
        in_the_way,
        [vec!["0000:05:00.0 hinic".to_owned()], Vec::new(), Vec::new()],
        "a bridge is in nobody's way: {groups:?}"
    );
    assert_eq!(sysfs.iommu_groups(Some(8)).expect("a group")[0].members.len(), 2);
    let has_devices: Vec<bool> = groups.iter().map(IommuGroup::has_devices).collect();
    assert_eq!(has_devices, [true, true, false], "a bridge cannot be given away");
    assert!(matches!(sysfs.iommu_groups(Some(10)), Err(PciError::NoGroup { number: 10 })));
}

#[test]
fn virtual_functions_are_in_the_order_of_their_index() {
    let temp = tempfile::tempdir().expect("a folder");
    let links: Vec<(String, String)> =
        (0..12).map(|n| (format!("virtfn{n}"), format!("../0000:05:0{}.{}", n / 8 + 1, n % 8))).collect();
    let links: Vec<(&str, &str)> =
        links.iter().map(|(name, target)| (name.as_str(), target.as_str())).collect();
    device(temp.path(), "0000:05:00.0", &[], &links);
    let devices = Sysfs::below(temp.path()).pci_devices().expect("devices");
    let vfs: Vec<String> = devices[0].vfs.iter().map(ToString::to_string).collect();
    assert_eq!((vfs.len(), vfs[9].as_str(), vfs[10].as_str()), (12, "0000:05:02.1", "0000:05:02.2"));
}

#[test]
fn a_host_without_an_iommu_is_told_what_to_switch_on() {
    let temp = tempfile::tempdir().expect("a folder");
    let sysfs = Sysfs::below(temp.path());
    assert!(matches!(sysfs.pci_devices(), Err(PciError::List { .. })));
    device(temp.path(), "0000:05:00.0", &[], &[]);
    let said = sysfs.iommu_groups(None).expect_err("no IOMMU").to_string();
    assert!(said.contains("firmware") && said.contains("intel_iommu=on"), "{said}");
}
