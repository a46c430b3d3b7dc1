//! On a tree like sysfs, where a driver takes nothing by itself: what is written, and what is left alone. Real functions are moved in the lab.

use std::os::unix::fs::symlink;

use super::*;

const TO: &str = "vfio-pci";

fn had(driver: Option<&str>, driver_override: Option<&str>) -> Place {
    Place { driver: driver.map(str::to_owned), driver_override: driver_override.map(str::to_owned) }
}

/// A tree with one function that `driver` holds.
fn tree(driver: Option<&str>) -> (tempfile::TempDir, HostBdf) {
    let temp = tempfile::tempdir().expect("a folder");
    let folder = temp.path().join("bus/pci/devices/0000:04:10.1");
    fs::create_dir_all(&folder).expect("a folder");
    for known in ["igbvf", TO, "vendor_vdpa"] {
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
    assert_eq!(function.place(), had(Some("igbvf"), None));
    let error = function.bind(TO, &had(Some("ixgbevf"), None)).expect_err("another driver").to_string();
    assert!(error.contains("has igbvf now, not ixgbevf"), "{error}");
    function.give_back(TO, &had(Some("ixgbevf"), None)).expect("it is somebody else's");
    assert_eq!(function.place().driver_override, None, "nothing was written");
    assert_eq!(fs::read_to_string(temp.path().join("bus/pci/drivers/igbvf/unbind")).expect("a file"), "");
    let missing = Movable::find(&sysfs, "0000:04:10.2".parse().expect("an address")).err().expect("none");
    assert!(missing.to_string().contains("`qvirt host pci`"), "{missing}");
}

#[test]
fn a_driver_that_takes_nothing_is_said_and_the_override_is_as_it_was() {
    let (temp, host) = tree(None);
    let sysfs = Sysfs::below(temp.path());
    let function = Movable::find(&sysfs, host).expect("it is there");
    let error = function.bind(TO, &had(None, Some("pci-stub"))).expect_err("no kernel is here").to_string();
    assert!(error.contains("vfio-pci did not take 0000:04:10.1"), "{error}");
    assert_eq!(function.place().driver_override.as_deref(), Some("pci-stub"));
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
        function.give_back(TO, &had(Some("igbvf"), None)).expect("it has its driver");
        assert_eq!(fs::read_to_string(&file).expect("a file"), expected, "after {left:?}");
    }
}

#[test]
fn what_does_not_move_to_a_vendors_driver_is_put_back() {
    let (temp, host) = tree(Some("igbvf"));
    let sysfs = Sysfs::below(temp.path());
    let written = |path: &str| fs::read_to_string(temp.path().join("bus/pci").join(path)).expect("written");
    let function = Movable::find(&sysfs, host).expect("it is there");
    let error = function.bind("vendor_vdpa", &function.place()).expect_err("nobody acts on it").to_string();
    assert!(error.starts_with("vendor_vdpa did not take 0000:04:10.1; igbvf has it"), "{error}");
    assert_eq!(written("drivers/igbvf/unbind"), "0000:04:10.1");
    assert_eq!(written("devices/0000:04:10.1/driver_override"), "\n", "no override, as before");
    let error = sysfs.knows_driver("no_such_driver").expect_err("there is none").to_string();
    assert!(error.contains("so that `modprobe no_such_driver` loads it"), "{error}");
}

#[test]
fn what_is_there_already_is_left_alone() {
    let (temp, host) = tree(Some("igbvf"));
    let sysfs = Sysfs::below(temp.path());
    let function = Movable::find(&sysfs, host).expect("it is there");
    function.bind("igbvf", &function.place()).expect("it has it");
    assert_eq!(fs::read_to_string(temp.path().join("bus/pci/drivers_probe")).expect("a file"), "");
}
