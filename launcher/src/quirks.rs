//! The one file that reads QEMU's `desc`: texts for people that happen to be the only way to tell two errors apart.

use qmp_client::QemuError;

/// What a failed `device_del` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnplugError {
    /// The guest was asked already and has not answered: waiting and asking again may help.
    Asked,
    /// The guest is not ready to be asked: asking again may help.
    Busy,
    /// There is no such device.
    Absent,
    /// It cannot be unplugged; asking again is no use.
    Refused,
}

/// Reads the error of `device_del`. Texts of QEMU 7.2 to 10.0: `qdev_unplug` in softmmu/qdev-monitor.c ("Device X is already in the process of
/// unplug") and `pcie_cap_slot_unplug_request_cb` in hw/pci/pcie.c ("guest is busy (power indicator blinking)").
pub fn unplug_error(error: &QemuError) -> UnplugError {
    if error.class == "DeviceNotFound" {
        UnplugError::Absent
    } else if error.desc.contains("already in the process of unplug") {
        UnplugError::Asked
    } else if error.desc.contains("guest is busy") {
        UnplugError::Busy
    } else {
        UnplugError::Refused
    }
}

/// Whether a failed deletion says that the object is not there. Texts of QEMU 7.2 to 10.0: "Failed to find node with node-name='X'" (blockdev-del),
/// "Device 'X' not found" (netdev_del), "Chardev 'X' not found" (chardev-remove), "object 'X' not found" (object-del),
/// "File descriptor named 'X' not found" (closefd).
pub fn is_absent(error: &QemuError) -> bool {
    let absent = ["not found", "Failed to find node", "Cannot find device"];
    error.class == "DeviceNotFound" || absent.iter().any(|text| error.desc.contains(text))
}

/// Whether an error says that another process has locked an image. Texts of QEMU 7.2 to 10.0, `raw_check_lock_bytes` in block/file-posix.c:
/// "Failed to get \"write\" lock", "Failed to get shared \"consistent read\" lock". Only the command line adds the image's path.
pub fn is_locked(text: &str) -> bool {
    text.contains("Failed to get ") && text.contains("\" lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(class: &str, desc: &str) -> QemuError {
        QemuError { class: class.to_owned(), desc: desc.to_owned() }
    }

    #[test]
    fn unplug_errors() {
        let read = |desc| unplug_error(&error("GenericError", desc));
        assert_eq!(read("Device disk0 is already in the process of unplug"), UnplugError::Asked);
        assert_eq!(read("Hot-unplug failed: guest is busy (power indicator blinking)"), UnplugError::Busy);
        assert_eq!(read("Bus 'pcie.0' does not support hotplugging"), UnplugError::Refused);
        assert_eq!(unplug_error(&error("DeviceNotFound", "Device 'x' not found")), UnplugError::Absent);
    }

    #[test]
    fn locks() {
        assert!(is_locked("Failed to get shared \"write\" lock"));
        assert!(!is_locked("Failed to get a lock of the door"));
    }

    #[test]
    fn absences() {
        assert!(is_absent(&error("GenericError", "Failed to find node with node-name='disk0-1-file'")));
        assert!(is_absent(&error("GenericError", "object 'io0' not found")));
        assert!(!is_absent(&error("GenericError", "Block device disk0-1-format is in use")));
    }
}
