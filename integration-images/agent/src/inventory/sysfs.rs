//! Reads an inventory out of `/sys`. A device may go while it is read: what is not there any more is not known, and no error.

use std::fs::{File, read, read_dir, read_to_string};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Cdrom, Disk, Inventory, Nic, Pci, Usb};

impl Inventory {
    /// Looks at the machine whose `sys` and `dev` are in `root`, which is `/` but for tests.
    pub fn read(root: &Path) -> Inventory {
        let sys = root.join("sys");
        let (channels, consoles) = ports(&sys);
        Inventory {
            pci: entries(&sys.join("bus/pci/devices"), "").iter().filter_map(|device| pci(device)).collect(),
            disks: ["nvme", "sd", "vd"]
                .iter()
                .flat_map(|kind| entries(&sys.join("block"), kind))
                .filter_map(|disk| self::disk(&disk))
                .collect(),
            cdroms: entries(&sys.join("block"), "sr").iter().filter_map(|drive| cdrom(root, drive)).collect(),
            nics: entries(&sys.join("class/net"), "").iter().filter_map(|card| nic(card)).collect(),
            usb: entries(&sys.join("bus/usb/devices"), "").iter().filter_map(|device| usb(device)).collect(),
            channels,
            consoles,
            serial: entries(&sys.join("class/tty"), "ttyS")
                .iter()
                .filter(|uart| answered(uart))
                .map(|uart| name(uart))
                .collect(),
            memory_kib: memory_kib(&sys.join("devices/system/memory")),
            cpus: cpus(&sys.join("devices/system/cpu")),
        }
    }
}

/// What is in a folder, by the beginning of its name, sorted.
fn entries(folder: &Path, start: &str) -> Vec<PathBuf> {
    let found = read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = found
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The first line of a file, trimmed; none if there is no file or nothing in it.
fn text(path: PathBuf) -> Option<String> {
    let text = read_to_string(path).ok()?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

fn number(path: PathBuf) -> Option<u64> {
    text(path)?.parse().ok()
}

/// The name of what a link leads to.
fn target(link: PathBuf) -> Option<String> {
    link.read_link().ok().map(|path| name(&path))
}

/// Whether a text is `0000:01:00.0`.
fn is_pci_address(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 12
        && bytes.iter().enumerate().all(|(place, byte)| match place {
            4 | 7 => *byte == b':',
            10 => *byte == b'.',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The last PCI address on the way to a device. Its link in a class or on a bus tells that way, at the cost of one system call.
fn at(device: &Path) -> Option<String> {
    let path = device.read_link().ok()?;
    path.ancestors().map(name).find(|part| is_pci_address(part))
}

/// The SCSI address of a block device.
fn hctl(disk: &Path) -> Option<String> {
    target(disk.join("device")).filter(|name| name.split(':').count() == 4)
}

fn pci(device: &Path) -> Option<Pci> {
    let id = |file| text(device.join(file)).map(|text| text.trim_start_matches("0x").to_owned());
    let virtio = entries(device, "virtio");
    let driver = virtio.iter().find_map(|child| target(child.join("driver")));
    Some(Pci {
        address: name(device),
        vendor: id("vendor")?,
        device: id("device")?,
        driver: driver.or_else(|| target(device.join("driver"))),
    })
}

fn disk(disk: &Path) -> Option<Disk> {
    // A path of an NVMe namespace, which is a disk of its own beside it.
    if number(disk.join("hidden")) == Some(1) {
        return None;
    }
    let queue = disk.join("queue");
    Some(Disk {
        name: name(disk),
        bytes: number(disk.join("size"))? * 512,
        serial: scsi_serial(disk)
            .or_else(|| text(disk.join("serial")))
            .or_else(|| text(disk.join("device/serial")))
            .unwrap_or_default(),
        read_only: number(disk.join("ro")) == Some(1),
        queues: entries(&disk.join("mq"), "").len(),
        cache: text(queue.join("write_cache")).map(|text| text.trim_start_matches("write ").to_owned()),
        discard: number(queue.join("discard_max_bytes")).is_some_and(|bytes| bytes > 0),
        block: number(queue.join("logical_block_size")).unwrap_or(0),
        at: at(disk),
        hctl: hctl(disk),
        id: scsi_id(disk),
    })
}

/// A SCSI disk tells its serial in VPD page 0x80, after four bytes of header.
fn scsi_serial(disk: &Path) -> Option<String> {
    let page = read(disk.join("device/vpd_pg80")).ok()?;
    Some(word(page.get(4..)?))
}

/// The first designator of VPD page 0x83, if it is a text: code set, at byte 4, is 2 and its length stands at byte 7.
fn scsi_id(disk: &Path) -> Option<String> {
    let page = read(disk.join("device/vpd_pg83")).ok()?;
    let length = usize::from(*page.get(7)?);
    let text = page.get(8..)?;
    (page[4] == 2).then(|| word(&text[..length.min(text.len())])).filter(|text| !text.is_empty())
}

/// Bytes of a device as one word of a line.
fn word(bytes: &[u8]) -> String {
    let bytes: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).replace(' ', "_").trim_end().to_owned()
}

fn cdrom(root: &Path, drive: &Path) -> Option<Cdrom> {
    let bytes = number(drive.join("size"))? * 512;
    // Without a medium the size in sysfs is a guess of the driver's: only reading tells.
    let device = File::open(root.join("dev").join(drive.file_name()?));
    let media = device.and_then(|mut device| device.read_exact(&mut [0; 2048]));
    Some(Cdrom { name: name(drive), media: media.is_ok().then_some(bytes), hctl: hctl(drive), at: at(drive) })
}

fn nic(nic: &Path) -> Option<Nic> {
    // The loopback and bridges have no device.
    nic.join("device").exists().then(|| Nic {
        name: name(nic),
        mac: text(nic.join("address")),
        queues: entries(&nic.join("queues"), "rx-").len(),
        mtu: number(nic.join("mtu")),
        at: at(nic),
    })
}

fn usb(device: &Path) -> Option<Usb> {
    let place = name(device);
    // `usb1` is a root hub, `1-2:1.0` an interface of `1-2`.
    if place.starts_with("usb") {
        return None;
    }
    Some(Usb {
        vendor: text(device.join("idVendor"))?,
        product: text(device.join("idProduct"))?,
        serial: text(device.join("serial")).map(|text| text.replace(' ', "_")),
        speed: text(device.join("speed")),
        at: at(device),
        place,
    })
}

/// Channels and consoles: a console port needs no name, a channel has one.
fn ports(sys: &Path) -> (Vec<String>, Vec<String>) {
    let (mut channels, mut consoles) = (Vec::new(), Vec::new());
    for port in entries(&sys.join("class/virtio-ports"), "") {
        match text(port.join("name")) {
            Some(name) => channels.push(name),
            None => consoles.push(name(&port)),
        }
    }
    channels.sort();
    (channels, consoles)
}

/// `type` is 0 (PORT_UNKNOWN) where no UART answered.
fn answered(uart: &Path) -> bool {
    number(uart.join("type")).is_some_and(|kind| kind != 0)
}

fn memory_kib(memory: &Path) -> u64 {
    let block = text(memory.join("block_size_bytes")).and_then(|text| u64::from_str_radix(&text, 16).ok());
    let online = entries(memory, "memory")
        .into_iter()
        .filter(|block| text(block.join("state")).as_deref() == Some("online"));
    online.count() as u64 * block.unwrap_or(0) / 1024
}

fn cpus(cpus: &Path) -> u32 {
    let numbered = |cpu: &PathBuf| name(cpu)["cpu".len()..].starts_with(|digit: char| digit.is_ascii_digit());
    // A CPU that cannot be put offline has no such file, and is online.
    let online = |cpu: &PathBuf| number(cpu.join("online")).is_none_or(|online| online == 1);
    let count = entries(cpus, "cpu").into_iter().filter(|cpu| numbered(cpu) && online(cpu)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}
