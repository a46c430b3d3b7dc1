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
