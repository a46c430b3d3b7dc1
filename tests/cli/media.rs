//! `qvirt media` where no guest is needed: wrong input, and the stored config.

use crate::scene::{bare, edit, file, refused, start_paused};

const TABLES: &str =
    "[[disk]]\nid = \"data\"\npath = \"data.img\"\n[[disk]]\nid = \"cd\" # the drive\ndevice = \"cdrom\"\n";

#[test]
fn what_is_no_drive_and_what_is_no_image() {
    let vm = bare(TABLES);
    vm.raw("data.img", 1, "x");
    start_paused(&vm);
    let no_drive = "data: medium = of a disk is refused: only a CD-ROM drive, a disk with device = \"cdrom\", takes a medium";
    refused(&vm, 3, &["media", "guest", "data", "eject"], no_drive);
    refused(&vm, 3, &["media", "guest", "data", "insert", "gone.iso"], no_drive);
    refused(
        &vm,
        3,
        &["media", "guest", "cd", "insert", "gone.iso"],
        "image DIR/gone.iso cannot be opened: No such file or directory (os error 2); check its path, and the rights on it of whoever runs qvirt",
    );
    refused(
        &vm,
        5,
        &["media", "guest", "other", "eject"],
        "there is no device other: this VM has scsi0, data, cd",
    );
    refused(
        &vm,
        3,
        &["media", "guest", "cd", "insert", "data.img"],
        "medium of cd: DIR/data.img is in use: device data of VM guest (user root) has it as DIR/data.img; detach it there first",
    );
    assert_eq!(vm.leases().len(), 1);
    vm.end();
}

#[test]
fn the_stored_config() {
    let vm = bare(TABLES);
    let (data, iso) = (vm.raw("data.img", 1, "x"), vm.raw("a.iso", 1, "x"));
    edit(&vm, "\"data.img\"", &format!("{data:?}"));
    vm.ok(&["define", &file(&vm)]);
    let before = vm.ok(&["show", "guest"]);
    let said = vm.ok(&["media", "guest", "cd", "insert", "a.iso", "--format", "raw"]);
    assert_eq!(said, format!("cd has {iso} in the stored config of guest\n"));
    let now = vm.ok(&["show", "guest"]);
    assert_eq!(now, format!("{before}path = {iso:?}\nformat = \"raw\"\n"));
    vm.ok(&["media", "guest", "cd", "eject", "--config"]);
    assert_eq!(vm.ok(&["show", "guest"]), before);
    refused(
        &vm,
        3,
        &["media", "guest", "data", "eject"],
        "device data of guest is no CD-ROM drive: only a disk with device = \"cdrom\" takes a medium",
    );
    vm.nothing_left();
}
