//! What planning must know of the host's USB devices.

use std::time::Duration;

use devices::DeviceConfig;
use devices::host::HostFacts;
use devices::usb::{InterfaceDriver, PortPath, UsbFact, UsbSpeed};

use super::UsbError;
use crate::host::sysfs::{Sysfs, link, names, text};

/// How long looking may take. The kernel holds a device's texts back while it resets or enumerates that device.
const PATIENCE: Duration = Duration::from_secs(5);

/// Class codes of USB.
const HUB: &str = "09";
const STORAGE: &str = "08";

/// Where the host has a USB device now, without asking the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// Its number on the bus.
    pub device: u8,
    /// Vendor.
    pub vendor: u16,
    /// Product.
    pub product: u16,
}

impl Sysfs {
    /// All USB devices as planning wants them, hubs among them.
    pub fn usb_facts(&self) -> Vec<UsbFact> {
        self.usb_devices().into_iter().filter_map(|device| self.usb_fact(device)).collect()
    }

    fn usb_fact(&self, device: super::UsbDevice) -> Option<UsbFact> {
        let bus = u8::try_from(device.bus).ok()?;
        let port: Option<PortPath> = device.port.as_ref().map(|port| port.parse()).transpose().ok()?;
        let name = match &port {
            Some(port) => format!("{bus}-{port}"),
            None => format!("usb{bus}"),
        };
        let folder = self.path("bus/usb/devices");
        let interfaces = self.usb_interfaces(&name);
        let is = |class: &str| {
            let interface =
                |name: &String| text(&folder.join(name).join("bInterfaceClass")).as_deref() == Some(class);
            text(&folder.join(&name).join("bDeviceClass")).as_deref() == Some(class)
                || interfaces.iter().any(interface)
        };
        let driver = |interface: &String| {
            let driver = link(&folder.join(interface).join("driver"))?;
            // That is no driver of the host's, but a program that has it now.
            (driver != "usbfs").then(|| InterfaceDriver { interface: interface.clone(), driver })
        };
        Some(UsbFact {
            bus,
            device: u8::try_from(device.device).ok()?,
            port,
            // Wireless USB and what the kernel does not know are as fast as USB 2.0.
            speed: device.speed.and_then(|speed| speed.parse().ok()).unwrap_or(UsbSpeed::High),
            vendor: device.vendor,
            product: device.product,
            serial: device.serial,
            title: device.title,
            hub: is(HUB),
            storage: is(STORAGE),
            drivers: interfaces.iter().filter_map(driver).collect(),
        })
    }

    /// Whether a program has an interface of a device, and not a driver of the host.
    pub fn usb_is_claimed(&self, bus: u8, port: &PortPath) -> bool {
        let folder = self.path("bus/usb/devices");
        let driver = |interface: String| link(&folder.join(interface).join("driver"));
        self.usb_interfaces(&format!("{bus}-{port}"))
            .into_iter()
            .filter_map(driver)
            .any(|driver| driver == "usbfs")
    }

    /// The interfaces of a device, by sysfs' names.
    pub(super) fn usb_interfaces(&self, device: &str) -> Vec<String> {
        let is = |name: &String| name.strip_prefix(device).is_some_and(|rest| rest.starts_with(':'));
        names(&self.path("bus/usb/devices")).into_iter().filter(is).collect()
    }

    /// What is plugged into a port now. Reads nothing for which the kernel would wait.
    pub fn usb_plugged(&self, bus: u8, port: &PortPath) -> Option<Plugged> {
        let folder = self.path(&format!("bus/usb/devices/{bus}-{port}"));
        let id = |file: &str| u16::from_str_radix(&text(&folder.join(file))?, 16).ok();
        let device = text(&folder.join("devnum"))?.parse().ok()?;
        Some(Plugged { device, vendor: id("idVendor")?, product: id("idProduct")? })
    }

    /// Whether a program of this host mounted what is on a USB device: the mounted devices with their places.
    pub fn usb_mounts(&self, bus: u8, port: &PortPath, mounts: &str) -> Vec<String> {
        let device = format!("/{bus}-{port}/");
        let on_device = |line: &&str| {
            let node = line.split(' ').next().and_then(|node| node.strip_prefix("/dev/"));
            let block = node.and_then(|node| std::fs::canonicalize(self.path("class/block").join(node)).ok());
            block.is_some_and(|block| block.to_string_lossy().contains(&device))
        };
        let words = |line: &str| {
            let mut words = line.split(' ');
            Some(format!("{} at {}", words.next()?, words.next()?))
        };
        mounts.lines().filter(on_device).filter_map(words).collect()
    }
}

/// Whether planning a device must know of the host's USB devices; a controller is only warned of.
pub fn is_usb(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::Usb(_) | DeviceConfig::UsbController(_))
}

/// Adds what planning must know of this host's USB devices; nothing where no device is of USB.
///
/// # Errors
/// It takes too long.
pub async fn learn<'a>(
    facts: &mut HostFacts,
    devices: impl IntoIterator<Item = &'a DeviceConfig>,
) -> Result<(), UsbError> {
    if devices.into_iter().any(is_usb) {
        facts.usb = look(Sysfs::default(), PATIENCE).await?;
    }
    Ok(())
}

/// Looks at the USB devices, in a thread of its own.
///
/// # Errors
/// It takes too long.
pub(super) async fn look(sysfs: Sysfs, patience: Duration) -> Result<Vec<UsbFact>, UsbError> {
    let looking = tokio::task::spawn_blocking(move || sysfs.usb_facts());
    match tokio::time::timeout(patience, looking).await {
        Ok(Ok(facts)) => Ok(facts),
        Ok(Err(_)) | Err(_) => Err(UsbError::Slow { patience }),
    }
}
