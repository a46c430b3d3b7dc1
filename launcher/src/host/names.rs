//! Names of PCI and USB devices, from the lists that the host's tools use (`pci.ids`, `usb.ids`): each is read for what is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where distributions keep them.
const PLACES: [&str; 4] = ["/usr/share/hwdata", "/usr/share/misc", "/usr/share", "/var/lib/usbutils"];

/// Names of vendors and of their devices.
#[derive(Debug, Default)]
pub struct Names {
    vendors: BTreeMap<u16, String>,
    devices: BTreeMap<(u16, u16), String>,
}

impl Names {
    /// Those of these devices, vendor and number, from the list of that name; none on a host without it.
    pub fn of(list: &str, wanted: impl Iterator<Item = (u16, u16)>) -> Names {
        let found = PLACES.iter().find_map(|place| std::fs::read(Path::new(place).join(list)).ok());
        let text = found.unwrap_or_default();
        Names::read(&String::from_utf8_lossy(&text), &wanted.collect())
    }

    /// From the list's text. A line is `vendor  name`, after a tab `device  name` of that vendor, after two something finer.
    fn read(text: &str, wanted: &BTreeSet<(u16, u16)>) -> Names {
        let mut names = Names::default();
        let mut vendor = None;
        for line in text.lines() {
            let (is_device, line) = match line.strip_prefix('\t') {
                Some(rest) => (true, rest),
                None => (false, line),
            };
            let Some((id, name)) = line.split_once("  ") else { continue };
            // Comments, finer lines, and the classes behind the vendors are no numbers of four digits.
            let Some(id) = (id.len() == 4).then(|| u16::from_str_radix(id, 16).ok()).flatten() else {
                if !is_device {
                    vendor = None;
                }
                continue;
            };
            match (is_device, vendor) {
                (false, _) => {
                    vendor = Some(id);
                    if wanted.iter().any(|(vendor, _)| *vendor == id) {
                        names.vendors.insert(id, name.to_owned());
                    }
                }
                (true, Some(vendor)) if wanted.contains(&(vendor, id)) => {
                    names.devices.insert((vendor, id), name.to_owned());
                }
                (true, _) => {}
            }
        }
        names
    }

    /// Vendor and device in words, or as numbers where nobody knows the words.
    pub fn name(&self, vendor: u16, device: u16) -> String {
        let vendor_name = self.vendors.get(&vendor);
        let device_name = self.devices.get(&(vendor, device));
        match (vendor_name, device_name) {
            (Some(vendor), Some(device)) => format!("{vendor} {device}"),
            (Some(vendor), None) => format!("{vendor} device {device:04x}"),
            _ => format!("device {vendor:04x}:{device:04x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_numbers_stand_in_for_unknown_ones() {
        let text = "# a comment\n8086  Intel Corporation\n\t10c9  82576 Gigabit Network Connection\n\t\t8086 a01f  of a vendor\n\
                    19e5  Huawei Technologies Co., Ltd.\n\t10c9  another one's\n\nC 02  Network controller\n\t00  Ethernet controller\n";
        let wanted = [(0x8086, 0x10c9), (0x8086, 0x10ca), (0x19e5, 0x1822), (0x1234, 0x1111)];
        let names = Names::read(text, &wanted.into());
        let said = wanted.map(|(vendor, device)| names.name(vendor, device));
        assert_eq!(
            said,
            [
                "Intel Corporation 82576 Gigabit Network Connection",
                "Intel Corporation device 10ca",
                "Huawei Technologies Co., Ltd. device 1822",
                "device 1234:1111"
            ]
        );
    }
}
