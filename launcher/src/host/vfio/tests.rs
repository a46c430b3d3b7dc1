//! On a tree like sysfs, where a driver takes nothing by itself: what is written, and what is left alone. Real functions are moved in the lab.

use std::os::unix::fs::symlink;

use devices::vf::Rate;

use super::*;

/// A tree with one function that `driver` holds.
fn tree(driver: Option<&str>) -> (tempfile::TempDir, HostBdf) {
    let temp = tempfile::tempdir().expect("a folder");
    let folder = temp.path().join("bus/pci/devices/0000:04:10.1");
    fs::create_dir_all(&folder).expect("a folder");
    for known in ["igbvf", DRIVER] {
        let folder = temp.path().join("bus/pci/drivers").join(known);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("unbind"), "").expect("a file");
    }
    fs::write(folder.join("driver_override"), "(null)\n").expect("a file");
    fs::write(temp.path().join("bus/pci/drivers_probe"), "").expect("a file");
    if let Some(driver) = driver {
        symlink(format!("../../drivers/{driver}"), folder.join("driver")).expect("a link");
    }
    (temp, "0000:04:10.1".parse().expect("an address"))
}

#[test]
fn what_was_moved_meanwhile_is_neither_taken_nor_given_back() {
    let (temp, host) = tree(Some("igbvf"));
    let sysfs = Sysfs::below(temp.path());
    let function = Movable::find(&sysfs, host).expect("it is there");
    assert_eq!((function.driver().as_deref(), function.driver_override()), (Some("igbvf"), None));
    let error = function.bind(Some("ixgbevf"), None).expect_err("another driver").to_string();
    assert!(error.contains("has igbvf now, not ixgbevf"), "{error}");
    function.give_back(Some("ixgbevf"), None).expect("it is somebody else's");
    assert_eq!(function.driver_override(), None, "nothing was written");
    assert_eq!(fs::read_to_string(temp.path().join("bus/pci/drivers/igbvf/unbind")).expect("a file"), "");
    let missing = Movable::find(&sysfs, "0000:04:10.2".parse().expect("an address")).err().expect("none");
    assert!(missing.to_string().contains("`qvirt host pci`"), "{missing}");
}

#[test]
fn a_driver_that_takes_nothing_is_said_and_the_override_is_as_it_was() {
    let (temp, host) = tree(None);
    let sysfs = Sysfs::below(temp.path());
    let function = Movable::find(&sysfs, host).expect("it is there");
    let error = function.bind(None, Some("pci-stub")).expect_err("no kernel is here").to_string();
    assert!(error.contains("vfio-pci did not take 0000:04:10.1"), "{error}");
    assert_eq!(function.driver_override().as_deref(), Some("pci-stub"));
    assert_eq!(
        fs::read_to_string(temp.path().join("bus/pci/drivers_probe")).expect("a file"),
        "0000:04:10.1"
    );
}

#[test]
fn an_override_of_ours_goes_also_where_the_driver_never_changed() {
    let (temp, host) = tree(Some("igbvf"));
    let sysfs = Sysfs::below(temp.path());
    let function = Movable::find(&sysfs, host).expect("it is there");
    let file = temp.path().join("bus/pci/devices/0000:04:10.1/driver_override");
    for (left, expected) in [("vfio-pci\n", "\n"), ("pci-stub\n", "pci-stub\n"), ("(null)\n", "(null)\n")] {
        fs::write(&file, left).expect("a file");
        function.give_back(Some("igbvf"), None).expect("it has its driver");
        assert_eq!(fs::read_to_string(&file).expect("a file"), expected, "after {left:?}");
    }
}

#[test]
fn settings_that_somebody_else_changed_stay() {
    let before = VfProfile { vlan: 1, spoofchk: Some(true), ..VfProfile::default() };
    let wanted = VfProfile { vlan: 7, spoofchk: Some(false), rate_max: Rate::mbits(100), ..before.clone() };
    let now = VfProfile { vlan: 9, ..wanted.clone() };
    assert_eq!(restored(&before, &wanted, &now), VfProfile { vlan: 9, ..before.clone() });
    assert_eq!(restored(&before, &wanted, &wanted), before);
}

#[test]
fn an_accelerator_is_known_by_its_ids_and_by_the_kernels_word() {
    let (temp, host) = tree(None);
    let folder = temp.path().join("bus/pci/devices/0000:04:10.1");
    let config: DeviceConfig =
        serde_json::from_value(serde_json::json!({"vfio": {"host": "0000:04:10.1"}})).expect("a config");
    let seen = |vendor: &str, device: &str| {
        for (name, text) in [("class", "0x100000"), ("vendor", vendor), ("device", device)] {
            fs::write(folder.join(name), text).expect("a file");
        }
        let all = functions(&Sysfs::below(temp.path()), [&config]).expect("a list");
        all[&host].is_accelerator()
    };
    assert!(!seen("0x8086", "0x10ca"));
    for device in ["0xa258", "0xa259", "0xa255", "0xa256", "0xa250", "0xa251"] {
        assert!(seen("0x19e5", device), "{device}");
    }
    fs::create_dir_all(folder.join("uacce/hisi_hpre-0")).expect("a folder");
    assert!(seen("0x1af4", "0x0001"));
}
