//! Taking a USB device from the host, and giving it back with the drivers that it had.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use devices::usb::{InterfaceDriver, UsbNeed};
use tracing::{info, warn};

use super::UsbError;
use super::facts::Plugged;
use crate::host::sysfs::Sysfs;
use crate::users;

/// The node of a device, that whoever uses it has open.
pub fn node(bus: u8, device: u8) -> String {
    format!("/dev/bus/usb/{bus:03}/{device:03}")
}

/// Whether what is on the port is what was planned for.
fn is_same(plugged: Plugged, need: &UsbNeed) -> bool {
    (plugged.vendor, plugged.product) == (need.vendor, need.product)
}

/// Makes sure that QEMU will get the device: that it still is there, that it may be opened, that the host does not use it as a disk.
///
/// # Errors
/// It does not.
pub fn may_be_taken(need: &UsbNeed) -> Result<(), UsbError> {
    let sysfs = Sysfs::default();
    let name = || need.name();
    let plugged = sysfs.usb_plugged(need.bus, &need.port).filter(|plugged| is_same(*plugged, need));
    let plugged = plugged.ok_or_else(|| UsbError::Gone { name: name() })?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = sysfs.usb_mounts(need.bus, &need.port, &mounts);
    if !mounts.is_empty() {
        return Err(UsbError::Mounted { name: name(), mounts: mounts.join(", ") });
    }
    let node = node(need.bus, plugged.device);
    if sysfs.usb_is_claimed(need.bus, &need.port) {
        // Another user's VM, say, whose lease is not ours to see.
        let users: Vec<String> = users::of(Path::new(&node)).into_iter().map(users::name).collect();
        let who = if users.is_empty() { "a process of another user".to_owned() } else { users.join(", ") };
        return Err(UsbError::Claimed { name: name(), who });
    }
    match open(&node) {
        Ok(_) => Ok(()),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            let (vendor, product) = (need.vendor, need.product);
            Err(UsbError::Denied { name: name(), node, vendor, product, source })
        }
        Err(source) => Err(UsbError::Node { name: name(), node, source }),
    }
}

fn open(node: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(node)
}

/// Why QEMU has not got a device that it was told to take, as far as that can be seen.
pub fn not_taken(need: &UsbNeed, qemu: Option<u32>) -> UsbError {
    let plugged = Sysfs::default().usb_plugged(need.bus, &need.port);
    let Some(plugged) = plugged else { return UsbError::Gone { name: need.name() } };
    let node = node(need.bus, plugged.device);
    let users = users::of(Path::new(&node)).into_iter().filter(|pid| Some(*pid) != qemu);
    let users: Vec<String> = users.map(users::name).collect();
    let why = match users.as_slice() {
        [] => "QEMU's log (qemu.log of the VM) may say why".to_owned(),
        users => format!("{} has it open: end that first", users.join(", ")),
    };
    UsbError::NotTaken { name: need.name(), why }
}

/// Gives the device back to the drivers that it had, and what was plugged in later, where QEMU had what is on the port, to those that the kernel finds.
/// QEMU does so itself unless it is killed. What it never had is left alone, and an interface that has a driver.
///
/// # Errors
/// The kernel does not let a driver have it.
pub fn give_back(need: &UsbNeed) -> Result<(), UsbError> {
    let sysfs = Sysfs::default();
    let Some(plugged) = sysfs.usb_plugged(need.bus, &need.port) else { return Ok(()) };
    let drivers = match is_same(plugged, need) {
        true => need.drivers.clone(),
        false if need.by_port => {
            let its = |interface| InterfaceDriver { interface, driver: "its driver".to_owned() };
            sysfs.usb_interfaces(&format!("{}-{}", need.bus, need.port)).into_iter().map(its).collect()
        }
        false => return Ok(()),
    };
    let idle = |interface: &&InterfaceDriver| {
        let folder = sysfs.path("bus/usb/devices").join(&interface.interface);
        folder.exists() && !folder.join("driver").exists()
    };
    let node = node(need.bus, plugged.device);
    for InterfaceDriver { interface, driver } in drivers.iter().filter(idle) {
        match reconnect(&node, interface) {
            Ok(()) => info!(interface, driver, "given back to the host's driver"),
            // It was pulled meanwhile, or a driver was faster.
            Err(error) if [Some(libc::ENODEV), Some(libc::EBUSY)].contains(&error.raw_os_error()) => {
                warn!(interface, driver, %error, "left as it is");
            }
            Err(source) => {
                let (name, interface, driver) = (need.name(), interface.clone(), driver.clone());
                return Err(UsbError::GiveBack { name, interface, driver, source });
            }
        }
    }
    Ok(())
}

/// `struct usbdevfs_ioctl` of linux/usbdevice_fs.h.
#[repr(C)]
#[derive(Debug)]
struct UsbdevfsIoctl {
    interface: libc::c_int,
    code: libc::c_int,
    data: *mut libc::c_void,
}

/// `USBDEVFS_CONNECT`, `_IO('U', 23)`.
const CONNECT: libc::c_int = 0x5517;

mod kernel {
    nix::ioctl_readwrite!(usbdevfs_ioctl, b'U', 18, super::UsbdevfsIoctl);
}

/// Lets a driver of the host have an interface. Needs no more right than that to open the node.
#[expect(unsafe_code, reason = "an ioctl with a structure has no safe form")]
fn reconnect(node: &str, interface: &str) -> io::Result<()> {
    let number = interface.rsplit('.').next().and_then(|number| number.parse().ok());
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    let file = open(node)?;
    let mut request = UsbdevfsIoctl { interface: number, code: CONNECT, data: std::ptr::null_mut() };
    // SAFETY: the structure is the kernel's and outlives the call; this request reads no data behind it.
    unsafe { kernel::usbdevfs_ioctl(file.as_raw_fd(), &raw mut request) }?;
    Ok(())
}
