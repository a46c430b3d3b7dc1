//! The lab host's vhost-scsi target: the kernel's own SCSI target (LIO), file-backed, set up through configfs.

use std::fmt::Write as _;
use std::path::Path;

use super::{Done, image, link, make_folder, modprobe, write};

/// The target's world wide port name, which `vhost-scsi-pci` takes.
pub const TARGET: &str = "naa.5001405bd4e8dead";
/// Its LUNs: the number is the position, the values are unit serial number and MiB.
pub const LUNS: [(&str, u64); 2] = [("lab-lun-0", 16), ("lab-lun-1", 24)];

/// The port group of [`TARGET`]; firmware matches a boot order with 1 only.
const GROUP: u16 = 1;

pub(super) fn prepare() -> Done<()> {
    // The kernel complains if its default folder for persistent reservations is missing.
    make_folder(Path::new("/etc/target"))?;
    modprobe(&["vhost_scsi", "target_core_file"])?;
    let config = Path::new("/sys/kernel/config/target");
    let group = config.join(format!("vhost/{TARGET}/tpgt_{GROUP}"));
    make_folder(&group)?;
    // The nexus is the initiator side of the session: one name does for both ends.
    write(group.join("nexus"), TARGET)?;
    for (number, (serial, mib)) in LUNS.iter().enumerate() {
        let store = config.join(format!("core/fileio_0/{serial}"));
        make_folder(&store)?;
        let file = image(&format!("{serial}.img"), *mib)?;
        write(store.join("control"), format!("fd_dev_name={},fd_dev_size={}", file.display(), mib << 20))?;
        write(store.join("enable"), 1)?;
        write(store.join("wwn/vpd_unit_serial"), serial)?;
        let lun = group.join(format!("lun/lun_{number}"));
        make_folder(&lun)?;
        link(&store, &lun.join("port"))?;
    }
    Ok(())
}

pub(super) fn list() -> String {
    let mut text = format!("vhost-scsi    {TARGET} group {GROUP}\n");
    for (number, (serial, mib)) in LUNS.iter().enumerate() {
        let _ = writeln!(text, "  LUN {number}       serial {serial} {mib} MiB");
    }
    text
}
