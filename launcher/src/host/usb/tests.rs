//! On a tree like sysfs.

use std::fs;
use std::path::Path;

use super::*;

fn device(root: &Path, name: &str, files: &[(&str, &str)]) {
    let folder = root.join("bus/usb/devices").join(name);
    fs::create_dir_all(&folder).expect("a folder");
    for (file, text) in files {
        fs::write(folder.join(file), format!("{text}\n")).expect("a file");
    }
}

#[test]
fn devices_are_told_from_hubs_and_interfaces_and_a_replug_is_seen() {
    let temp = tempfile::tempdir().expect("a folder");
    let sysfs = Sysfs::below(temp.path());
    assert_eq!(sysfs.usb_devices(), [], "a host without USB");
    let hub =
        [("busnum", "1"), ("devnum", "1"), ("idVendor", "1d6b"), ("idProduct", "0002"), ("speed", "480")];
    device(temp.path(), "usb1", &hub);
    let stick = |number| {
        [
            ("busnum", "1"),
            ("devnum", number),
            ("idVendor", "0781"),
            ("idProduct", "5567"),
            ("serial", "A1"),
            ("speed", "480"),
        ]
    };
    device(temp.path(), "1-1.4", &stick("9"));
    device(temp.path(), "1-1.4:1.0", &[("bInterfaceClass", "08")]);
    // One that is just going away.
    device(temp.path(), "1-2", &[("busnum", "1")]);
    let before = sysfs.usb_devices();
    let [hub, seen] = &before[..] else { panic!("{before:?}") };
    assert_eq!((&hub.port, hub.node()), (&None, "/dev/bus/usb/001/001".to_owned()));
    assert_eq!(
        (seen.port.as_deref(), seen.serial.as_deref(), seen.vendor),
        (Some("1.4"), Some("A1"), 0x0781)
    );
    // A replug between two looks.
    device(temp.path(), "1-1.4", &stick("10"));
    let after = sysfs.usb_devices();
    let (gone, come) = changes(&before, &after);
    assert_eq!((gone, come), (vec![&before[1]], vec![&after[1]]));
    assert_eq!(changes(&after, &after), (Vec::new(), Vec::new()));
}

#[test]
fn drivers_programs_and_mounts_of_a_stick_are_seen() {
    let temp = tempfile::tempdir().expect("a folder");
    let sysfs = Sysfs::below(temp.path());
    let stick = [
        ("busnum", "1"),
        ("devnum", "9"),
        ("idVendor", "0781"),
        ("idProduct", "5567"),
        ("speed", "480"),
        ("bDeviceClass", "00"),
    ];
    device(temp.path(), "1-1.4", &stick);
    device(temp.path(), "1-1.4:1.0", &[("bInterfaceClass", "08")]);
    // Its name begins with that of the other one.
    device(
        temp.path(),
        "1-1.40",
        &[("busnum", "1"), ("devnum", "10"), ("idVendor", "1d6b"), ("idProduct", "0104")],
    );
    device(temp.path(), "1-1.40:1.0", &[("bInterfaceClass", "09")]);
    let port = "1.4".parse().expect("a port path");
    let link = temp.path().join("bus/usb/devices/1-1.4:1.0/driver");
    let drive = |driver: &str| {
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(format!("../drivers/{driver}"), &link).expect("a link");
    };
    drive("usb-storage");
    let facts = sysfs.usb_facts();
    assert_eq!((facts.len(), facts[0].storage, facts[0].hub, facts[1].hub), (2, true, false, true));
    assert_eq!((facts[0].drivers.len(), facts[1].drivers.len()), (1, 0));
    assert_eq!(
        (facts[0].drivers[0].interface.as_str(), facts[0].drivers[0].driver.as_str()),
        ("1-1.4:1.0", "usb-storage")
    );
    assert!(!sysfs.usb_is_claimed(1, &port));
    drive("usbfs");
    assert!(
        sysfs.usb_is_claimed(1, &port) && sysfs.usb_facts()[0].drivers.is_empty(),
        "a program is no driver"
    );

    let block = temp.path().join("devices/pci/usb1/1-1/1-1.4/1-1.4:1.0/host0/block/sda/sda1");
    fs::create_dir_all(&block).expect("a folder");
    fs::create_dir_all(temp.path().join("class/block")).expect("a folder");
    std::os::unix::fs::symlink(&block, temp.path().join("class/block/sda1")).expect("a link");
    let mounts = "proc /proc proc rw 0 0\n/dev/vda / ext4 rw 0 0\n/dev/sda1 /media/stick vfat rw 0 0\n";
    assert_eq!(sysfs.usb_mounts(1, &port, mounts), ["/dev/sda1 at /media/stick"]);
    assert_eq!(sysfs.usb_mounts(1, &"1.40".parse().expect("a port path"), mounts), [""; 0]);
    assert_eq!(sysfs.usb_plugged(1, &port).map(|plugged| plugged.device), Some(9));
    assert_eq!(sysfs.usb_plugged(2, &port), None);
}

/// A FIFO that nobody writes to answers as a device does that is being reset: not yet.
#[tokio::test]
async fn a_device_that_does_not_answer_the_kernel_is_waited_for_no_longer_than_that() {
    let temp = tempfile::tempdir().expect("a folder");
    device(temp.path(), "1-1", &[("devnum", "2"), ("idVendor", "0781"), ("idProduct", "5567")]);
    let silent = temp.path().join("bus/usb/devices/1-1/busnum");
    nix::unistd::mkfifo(&silent, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let patience = std::time::Duration::from_millis(200);
    let looked = facts::look(Sysfs::below(temp.path()), patience).await;
    // Its thread has an end too.
    fs::write(&silent, "1\n").expect("somebody reads");
    let error = looked.expect_err("it does not answer").to_string();
    assert!(
        error.contains("could not be looked at within 200ms") && error.contains("pull it, or wait"),
        "{error}"
    );
}
