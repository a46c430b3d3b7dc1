//! What the kernel's `linux/vduse.h` says, as types: one VDUSE device with two rings, its requests and its memory.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use devices::units::Mac;
use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::EventFd;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::vhost_user::owned;

const CONTROL: &str = "/dev/vduse/control";
const NAME_SIZE: usize = 256;
/// `struct virtio_net_config` up to the members that no feature below asks for; QEMU reads all of it.
const CONFIG_SIZE: usize = 24;
const VIRTIO_NET: u32 = 1;
/// The most that QEMU asks for.
pub const QUEUE_SIZE: u16 = 1024;
/// The receive and the transmit ring, in the order of the virtio specification.
const RINGS: [u32; 2] = [0, 1];
const PAGE: u32 = 4096;
/// Bits of the virtio specification: the modern layout, addresses that the IOMMU translates (VDUSE wants both), a MAC address and a link
/// state in the configuration. VDUSE refuses a control queue, and without one no driver takes several queue pairs.
const FEATURES: u64 = 1 << 32 | 1 << 33 | 1 << 5 | 1 << 16;
const LINK_UP: u8 = 1;
/// Of a request or response; the last 128 bytes depend on its kind.
const MESSAGE_SIZE: usize = 152;

/// `struct vduse_dev_config` with its configuration space.
#[repr(C)]
struct DeviceConfig {
    name: [u8; NAME_SIZE],
    vendor: u32,
    device: u32,
    features: u64,
    rings: u32,
    alignment: u32,
    reserved: [u32; 13],
    config_size: u32,
    config: [u8; CONFIG_SIZE],
}

/// `struct vduse_vq_config`.
#[repr(C)]
struct RingConfig {
    index: u32,
    max_size: u16,
    reserved: [u16; 13],
}

/// `struct vduse_vq_info` of a split ring.
#[derive(Debug, Default)]
#[repr(C)]
pub struct RingInfo {
    index: u32,
    /// How many descriptors it has.
    pub size: u32,
    /// Address of the descriptors; zero when the driver does not use the ring.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Where in the available ring the device goes on.
    pub next_available: u16,
    packed_only: [u16; 3],
    ready: u8,
}

/// `struct vduse_vq_eventfd`.
#[repr(C)]
struct RingKick {
    index: u32,
    event: RawFd,
}

/// `struct vduse_iotlb_entry`.
#[derive(Default)]
#[repr(C)]
struct Mapping {
    offset: u64,
    start: u64,
    last: u64,
    access: u8,
}

/// The ioctls. The size in the number of CREATE_DEV leaves the configuration space out.
mod ioctls {
    use nix::{ioctl_readwrite, ioctl_readwrite_bad, request_code_write};

    use super::{DeviceConfig, Mapping, NAME_SIZE, RingConfig, RingInfo, RingKick};

    const BASE: u8 = 0x81;
    const HEAD: usize = std::mem::offset_of!(DeviceConfig, config);

    ioctl_readwrite_bad!(set_api_version, request_code_write!(BASE, 0x01, size_of::<u64>()), u64);
    ioctl_readwrite_bad!(create, request_code_write!(BASE, 0x02, HEAD), DeviceConfig);
    ioctl_readwrite_bad!(destroy, request_code_write!(BASE, 0x03, NAME_SIZE), [u8; NAME_SIZE]);
    ioctl_readwrite!(mapping, BASE, 0x10, Mapping);
    ioctl_readwrite_bad!(set_up, request_code_write!(BASE, 0x14, size_of::<RingConfig>()), RingConfig);
    ioctl_readwrite!(ring_info, BASE, 0x15, RingInfo);
    ioctl_readwrite_bad!(set_kick, request_code_write!(BASE, 0x16, size_of::<RingKick>()), RingKick);
    ioctl_readwrite_bad!(interrupt, request_code_write!(BASE, 0x17, size_of::<u32>()), u32);
}

/// One of [`ioctls`].
type Ioctl<T> = unsafe fn(RawFd, *mut T) -> nix::Result<libc::c_int>;

#[expect(unsafe_code, reason = "an ioctl with a structure has no safe form")]
fn ask<T>(file: &File, ioctl: Ioctl<T>, value: &mut T) -> nix::Result<RawFd> {
    // SAFETY: `value` is whole, plain numbers, and lives through the call; its type is that of the kernel for this number.
    unsafe { ioctl(file.as_raw_fd(), value) }
}

/// What the kernel asks of the device.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Where does ring `index` go on?
    NextAvailable {
        /// Of the ring.
        index: u32,
    },
    /// The driver wrote this status.
    Status(u8),
    /// The memory is another.
    Memory,
    /// Of a newer kernel.
    Unknown(u32),
}

/// A request as it was read. It is to be answered: the kernel waits, and so does the guest.
#[derive(Debug)]
pub struct Message {
    id: [u8; 4],
    /// What it asks.
    pub request: Request,
}

impl Message {
    fn decode(bytes: &[u8; MESSAGE_SIZE]) -> Message {
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        let request = match u32::from_ne_bytes(word(0)) {
            0 => Request::NextAvailable { index: u32::from_ne_bytes(word(24)) },
            1 => Request::Status(bytes[24]),
            2 => Request::Memory,
            other => Request::Unknown(other),
        };
        Message { id: word(4), request }
    }

    /// The response: `Some` is success, with the number that [`Request::NextAvailable`] asks for and the others do not look at.
    fn encode(&self, answer: Option<u16>) -> [u8; MESSAGE_SIZE] {
        let mut bytes = [0; MESSAGE_SIZE];
        bytes[..4].copy_from_slice(&self.id);
        bytes[4..8].copy_from_slice(&u32::from(answer.is_none()).to_ne_bytes());
        bytes[28..30].copy_from_slice(&answer.unwrap_or_default().to_ne_bytes());
        bytes
    }
}

/// A VDUSE network device in the kernel. [`Device::destroy`] takes it away again; nothing else does.
#[derive(Debug)]
pub struct Device {
    name: [u8; NAME_SIZE],
    control: File,
    file: File,
}

impl AsFd for Device {
    /// Readable when there is a [`Message`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device {
    /// Makes the device with its rings; from then on `vdpa dev add` takes it. One that a killed server left behind is taken away before.
    pub fn create(name: &str, mac: Mac) -> Result<Device> {
        let control = open(CONTROL, "run `modprobe vduse` and be root")?;
        let mut bytes = [0; NAME_SIZE];
        let room = bytes[..NAME_SIZE - 1].get_mut(..name.len());
        room.ok_or_else(|| Error::other("the name is too long"))?.copy_from_slice(name.as_bytes());
        ask(&control, ioctls::set_api_version, &mut 0)?;
        // It fails if there is none, and if there is a server or a vDPA device: then the next step says so.
        let _ = ask(&control, ioctls::destroy, &mut bytes);
        match ask(&control, ioctls::create, &mut config(bytes, mac)) {
            Err(Errno::EEXIST) => {
                return Err(Error::other("it exists already: end its server, or run `vdpa dev del`"));
            }
            made => made?,
        };
        let device = Device {
            name: bytes,
            file: open(&format!("/dev/vduse/{name}"), "it was made, but cannot be opened")?,
            control,
        };
        for index in RINGS {
            let mut ring = RingConfig { index, max_size: QUEUE_SIZE, reserved: [0; 13] };
            ask(&device.file, ioctls::set_up, &mut ring)?;
        }
        Ok(device)
    }

    /// Takes the device away. The kernel refuses while it is on the vDPA bus.
    pub fn destroy(self) -> Result<()> {
        let Device { mut name, control, file } = self;
        drop(file);
        match ask(&control, ioctls::destroy, &mut name) {
            Ok(_) => Ok(()),
            Err(Errno::EBUSY) => {
                Err(Error::other("it stays, since it is on the vDPA bus: run `vdpa dev del` first"))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The next request, if there is one.
    pub fn read(&self) -> Result<Option<Message>> {
        let mut bytes = [0; MESSAGE_SIZE];
        match (&self.file).read_exact(&mut bytes) {
            Ok(()) => Ok(Some(Message::decode(&bytes))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Answers a request: `None` says that it failed, `Some` is the number that it asked for, if any.
    pub fn answer(&self, message: &Message, answer: Option<u16>) -> Result<()> {
        (&self.file).write_all(&message.encode(answer))
    }

    /// All memory that the driver has mapped, at the addresses that it uses.
    pub fn memory(&self) -> Result<GuestMemoryMmap> {
        let mut memory = GuestMemoryMmap::new();
        let mut next = Some(0);
        while let Some(start) = next {
            let mut found = Mapping { start, last: u64::MAX, ..Mapping::default() };
            let fd = match ask(&self.file, ioctls::mapping, &mut found) {
                // There is none from `start` on.
                Err(Errno::EINVAL) => break,
                fd => owned(fd?),
            };
            let region = region(&found, fd.into())?;
            memory = memory.insert_region(Arc::new(region)).map_err(Error::other)?;
            next = found.last.checked_add(1);
        }
        Ok(memory)
    }

    /// Where the driver has put a ring.
    pub fn ring(&self, index: u32) -> Result<RingInfo> {
        let mut info = RingInfo { index, ..RingInfo::default() };
        ask(&self.file, ioctls::ring_info, &mut info)?;
        Ok(info)
    }

    /// `event` fires whenever the driver kicks the ring, until the next reset.
    pub fn set_kick(&self, index: u32, event: &EventFd) -> Result<()> {
        ask(&self.file, ioctls::set_kick, &mut RingKick { index, event: event.as_raw_fd() })?;
        Ok(())
    }

    /// Interrupts the driver: there is something in the used ring. A driver that has gone meanwhile hears nothing.
    pub fn interrupt(&self, mut index: u32) -> Result<()> {
        match ask(&self.file, ioctls::interrupt, &mut index) {
            Ok(_) | Err(Errno::EINVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// `cure` is what helps if it cannot be opened.
fn open(path: &str, cure: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    opened.map_err(|error| Error::new(error.kind(), format!("{path}: {error}: {cure}")))
}

fn config(name: [u8; NAME_SIZE], mac: Mac) -> DeviceConfig {
    let mut config = [0; CONFIG_SIZE];
    config[..6].copy_from_slice(&mac.bytes());
    config[6] = LINK_UP;
    DeviceConfig {
        name,
        vendor: 0,
        device: VIRTIO_NET,
        features: FEATURES,
        rings: RINGS.len() as u32,
        alignment: PAGE,
        reserved: [0; 13],
        config_size: CONFIG_SIZE as u32,
        config,
    }
}

fn region(found: &Mapping, file: File) -> Result<GuestRegionMmap> {
    let size = usize::try_from(found.last - found.start).map_err(Error::other)? + 1;
    // Bit 0 of the access is reading, bit 1 writing.
    let writing = if found.access & 2 == 0 { 0 } else { libc::PROT_WRITE };
    let file = FileOffset::new(file, found.offset);
    let mapped = MmapRegion::build(Some(file), size, libc::PROT_READ | writing, libc::MAP_SHARED);
    let region = GuestRegionMmap::new(mapped.map_err(Error::other)?, GuestAddress(found.start));
    region.ok_or_else(|| Error::other("a mapping at the end of the address space"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u32, rest: &[u8]) -> [u8; MESSAGE_SIZE] {
        let mut bytes = [0; MESSAGE_SIZE];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[24..24 + rest.len()].copy_from_slice(rest);
        bytes
    }

    #[test]
    fn requests_are_told_apart() {
        let kind = |kind, rest: &[u8]| Message::decode(&request(kind, rest)).request;
        assert_eq!(kind(0, &1_u32.to_ne_bytes()), Request::NextAvailable { index: 1 });
        assert_eq!(kind(1, &[15]), Request::Status(15));
        assert_eq!(kind(2, &[0xff; 16]), Request::Memory);
        assert_eq!(kind(3, &[]), Request::Unknown(3));
    }

    #[test]
    fn a_response_names_its_request() {
        let message = Message::decode(&request(0, &[]));
        let (done, failed) = (message.encode(Some(513)), message.encode(None));
        assert_eq!((&done[..4], &done[4..8], &done[28..30]), (&[7, 0, 0, 0][..], &[0; 4][..], &[1, 2][..]));
        assert_eq!((&failed[..4], &failed[4..8]), (&[7, 0, 0, 0][..], &[1, 0, 0, 0][..]));
    }

    #[test]
    fn structures_have_the_sizes_of_the_header() {
        assert_eq!(std::mem::offset_of!(DeviceConfig, config), 336);
        assert_eq!((size_of::<RingConfig>(), size_of::<RingInfo>()), (32, 48));
        assert_eq!((size_of::<RingKick>(), size_of::<Mapping>()), (8, 32));
    }
}
