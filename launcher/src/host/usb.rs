//! The USB devices of this host, as sysfs has them, and word of those that come and go; taking one from the host and giving it back is `taken`'s.

pub mod facts;
pub mod taken;
pub mod usage;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use serde::Serialize;
use thiserror::Error;
use tokio::io::unix::AsyncFd;

use crate::process::readable;

use super::sysfs::{Sysfs, hex4, names, text};

/// A USB device that cannot be had, or not be given back.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum UsbError {
    #[error(
        "the USB devices of this host could not be looked at within {patience:?}: one of them does not answer the kernel; pull it, or wait"
    )]
    Slow { patience: Duration },
    #[error(
        "USB device {name} is gone from the host: plug it in again (`qvirt host usb` lists what there is)"
    )]
    Gone { name: String },
    #[error("USB device {name} is in use by {who}: end that, or detach the device there, first")]
    Claimed { name: String, who: String },
    #[error("USB device {name} is in use by this host, which has mounted {mounts}: unmount that first")]
    Mounted { name: String, mounts: String },
    #[error(
        "USB device {name} may not be opened: run qvirt as root, or let udev give the right to {node}, \
         by a rule such as: SUBSYSTEM==\"usb\", ATTR{{idVendor}}==\"{vendor:04x}\", ATTR{{idProduct}}==\"{product:04x}\", TAG+=\"uaccess\""
    )]
    Denied { name: String, node: String, vendor: u16, product: u16, source: io::Error },
    #[error("USB device {name} cannot be opened as {node}: is usbfs there, and udev or devtmpfs?")]
    Node { name: String, node: String, source: io::Error },
    #[error("QEMU was told to take USB device {name} and has not got it: {why}")]
    NotTaken { name: String, why: String },
    #[error("USB device {name} cannot be given back to {driver} ({interface}): pull it and plug it in again")]
    GiveBack { name: String, interface: String, driver: String, source: io::Error },
}

/// A USB device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsbDevice {
    /// Its bus.
    pub bus: u32,
    /// Its number on the bus; another one after each replug.
    pub device: u32,
    /// The ports on the way to it, from the root hub's on: `1.4`. The same after a replug. A root hub has none.
    pub port: Option<String>,
    /// Megabits a second, as the kernel says: `1.5`, `480`, `5000`.
    pub speed: Option<String>,
    /// Vendor.
    #[serde(serialize_with = "hex4")]
    pub vendor: u16,
    /// Product, as its vendor numbers them.
    #[serde(serialize_with = "hex4")]
    pub product: u16,
    /// What it calls itself.
    pub title: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
}

impl Sysfs {
    /// All USB devices, by bus and number; none on a host without USB.
    pub fn usb_devices(&self) -> Vec<UsbDevice> {
        let folder = self.path("bus/usb/devices");
        // The others, `1-4:1.0`, are interfaces.
        let devices = names(&folder).into_iter().filter(|name| !name.contains(':'));
        let mut devices: Vec<UsbDevice> = devices
            .filter_map(|name| {
                let text = |file: &str| text(&folder.join(&name).join(file));
                let id = |file: &str| u16::from_str_radix(&text(file)?, 16).ok();
                Some(UsbDevice {
                    bus: text("busnum")?.parse().ok()?,
                    device: text("devnum")?.parse().ok()?,
                    port: name.split_once('-').map(|(_, port)| port.to_owned()),
                    speed: text("speed"),
                    vendor: id("idVendor")?,
                    product: id("idProduct")?,
                    title: text("product").map(printable),
                    serial: text("serial").map(printable),
                })
            })
            .collect();
        devices.sort_by_key(|device| (device.bus, device.device));
        devices
    }
}

/// What a device says of itself may be meant for a terminal.
fn printable(text: String) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl UsbDevice {
    /// The node that whoever uses it has open.
    pub fn node(&self) -> String {
        format!("/dev/bus/usb/{:03}/{:03}", self.bus, self.device)
    }
}

/// Which of two looks has what the other one has not.
pub fn changes<'a>(
    before: &'a [UsbDevice],
    after: &'a [UsbDevice],
) -> (Vec<&'a UsbDevice>, Vec<&'a UsbDevice>) {
    let without =
        |these: &'a [UsbDevice], those: &[UsbDevice]| these.iter().filter(|d| !those.contains(d)).collect();
    (without(before, after), without(after, before))
}

/// The kernel's word that some device came or went. Which one is for a look to tell: messages get lost when there are many.
pub struct Uevents(AsyncFd<OwnedFd>);

/// The kernel's own messages; those of udev are in another group.
const KERNEL: u32 = 1;

impl Uevents {
    /// Listens from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen() -> io::Result<Uevents> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let descriptor =
            socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkKObjectUEvent)?;
        bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        Ok(Uevents(readable(descriptor)?))
    }

    /// Waits until there was word of anything.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        // All of it: one look answers for all.
        loop {
            match recv(self.0.get_ref().as_raw_fd(), &mut [0; 1], MsgFlags::empty()) {
                // What does not fit is cut off. Some were lost: that is word as well.
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
