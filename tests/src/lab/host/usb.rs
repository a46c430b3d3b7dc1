//! USB sticks of the lab host: mass storage gadgets of its own, each on the emulated bus of a `dummy_hcd`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{Done, HostError, image, link, make_folder, modprobe, names, read, wait_for, write};

/// A stick: what it says of itself, and the controller that it is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stick {
    /// Its gadget's name.
    pub name: &'static str,
    /// USB vendor id.
    pub vendor: u16,
    /// USB product id.
    pub product: u16,
    /// Its serial number; twins differ in nothing else.
    pub serial: &'static str,
    /// `max_speed` of its gadget.
    speed: &'static str,
    controller: u8,
}

/// Two sticks of different make, and two twins.
pub const STICKS: [Stick; 4] = [
    Stick { name: "red", vendor: 0x0781, product: 0x5567, serial: "LABRED", speed: USB2, controller: 0 },
    Stick { name: "blue", vendor: 0x090c, product: 0x1000, serial: "LABBLUE", speed: USB2, controller: 1 },
    Stick { name: "twin1", vendor: 0x13fe, product: 0x4200, serial: "LABTWIN1", speed: USB2, controller: 2 },
    Stick { name: "twin2", vendor: 0x13fe, product: 0x4200, serial: "LABTWIN2", speed: USB2, controller: 3 },
];

/// A stick of USB 1.1.
pub const SLOW: Stick = Stick {
    name: "slow",
    vendor: 0x0ea0,
    product: 0x2168,
    serial: "LABSLOW",
    speed: "full-speed",
    controller: 4,
};

/// A stick of USB 3.0.
pub const FAST: Stick = Stick {
    name: "fast",
    vendor: 0x0951,
    product: 0x1666,
    serial: "LABFAST",
    speed: "super-speed",
    controller: 5,
};

const USB2: &str = "high-speed";

/// The size of each.
pub const MIB: u64 = 8;

const GADGETS: &str = "/sys/kernel/config/usb_gadget";

/// Where a stick is on the host just now; a replug changes the address, not bus and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bus number.
    pub bus: u32,
    /// Address on the bus (`devnum`).
    pub address: u32,
    /// Port path.
    pub port: String,
}

fn all() -> impl Iterator<Item = Stick> {
    STICKS.into_iter().chain([SLOW, FAST])
}

pub(super) fn prepare() -> Done<()> {
    modprobe(&["usb_f_mass_storage", "libcomposite"])?;
    let all: Vec<Stick> = all().collect();
    super::program("modprobe", &["dummy_hcd", &format!("num={}", all.len()), "is_super_speed=1"])?;
    all.iter().try_for_each(Stick::make)?;
    all.iter().try_for_each(Stick::plug)
}

pub(super) fn list() -> Done<String> {
    let mut text = String::new();
    for stick in all() {
        let Place { bus, address, port } = stick.place()?;
        let Stick { name, vendor, product, serial, .. } = stick;
        let _ = writeln!(
            text,
            "USB {name:9} {vendor:04x}:{product:04x} serial {serial} bus {bus} address {address} port {port}"
        );
    }
    Ok(text)
}

impl Stick {
    fn gadget(&self) -> PathBuf {
        Path::new(GADGETS).join(self.name)
    }

    fn make(&self) -> Done<()> {
        let gadget = self.gadget();
        let (strings, function, config) = (
            gadget.join("strings/0x409"),
            gadget.join("functions/mass_storage.0"),
            gadget.join("configs/c.1"),
        );
        [&gadget, &strings, &function, &config].into_iter().try_for_each(|folder| make_folder(folder))?;
        write(gadget.join("idVendor"), format!("{:#06x}", self.vendor))?;
        write(gadget.join("idProduct"), format!("{:#06x}", self.product))?;
        write(gadget.join("max_speed"), self.speed)?;
        write(strings.join("serialnumber"), self.serial)?;
        write(strings.join("manufacturer"), "lab")?;
        write(strings.join("product"), self.name)?;
        write(function.join("lun.0/file"), image(&format!("usb-{}.img", self.name), MIB)?.display())?;
        link(&function, &config.join("mass_storage.0"))
    }

    /// Plugs it in, and waits until the host has it.
    ///
    /// # Errors
    /// It is plugged already, or does not appear.
    pub fn plug(&self) -> Done<()> {
        write(self.gadget().join("UDC"), format!("dummy_udc.{}", self.controller))?;
        self.place().map(drop)
    }

    /// Pulls it out, and waits until the host has noticed.
    ///
    /// # Errors
    /// It is not plugged in.
    pub fn unplug(&self) -> Done<()> {
        write(self.gadget().join("UDC"), "\n")?;
        wait_for(&format!("the end of the USB stick {}", self.name), || self.device().is_none().then_some(()))
    }

    /// Where it is, as soon as the host has it.
    ///
    /// # Errors
    /// It is not there after a minute.
    pub fn place(&self) -> Done<Place> {
        let path = wait_for(&format!("the USB stick {}", self.name), || self.device())?;
        let number = |name: &str| {
            let text = read(path.join(name))?;
            text.trim().parse().map_err(|e| HostError(format!("{}/{name} is {text:?}: {e}", path.display())))
        };
        let port = read(path.join("devpath"))?.trim().to_owned();
        Ok(Place { bus: number("busnum")?, address: number("devnum")?, port })
    }

    /// Its block device, by the name that udev gives it wherever it is plugged in, as soon as that is there.
    ///
    /// # Errors
    /// It is not there after a minute.
    pub fn disk(&self) -> Done<PathBuf> {
        let folder = Path::new("/dev/disk/by-id");
        let end = format!("_{}-0:0", self.serial);
        let disk = || names(folder).into_iter().find(|name| name.starts_with("usb-") && name.ends_with(&end));
        let name = wait_for(&format!("the disk of the USB stick {}", self.name), disk)?;
        Ok(folder.join(name))
    }

    fn device(&self) -> Option<PathBuf> {
        let devices = Path::new("/sys/bus/usb/devices");
        let serial = |name: &String| {
            read(devices.join(name).join("serial")).is_ok_and(|text| text.trim() == self.serial)
        };
        names(devices).into_iter().find(serial).map(|name| devices.join(name))
    }
}
