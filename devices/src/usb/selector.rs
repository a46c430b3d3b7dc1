//! How a config names a USB device of the host.

use std::fmt;
use std::str::FromStr;

use crate::text::{TextError, by_text};

/// A USB device of the host, by where it is or by what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsbSelector {
    /// Bus and device number, as `lsusb` has them. Text: `1.4`. Another one after each replug.
    Address {
        /// 1 to 255.
        bus: u8,
        /// 1 to 127.
        device: u8,
    },
    /// Bus and ports on the way: whatever is plugged in there. Text: `1-1.4`.
    Port {
        /// 1 to 255.
        bus: u8,
        /// From the root hub's port on.
        port: PortPath,
    },
    /// Vendor, product, and where twins must be told apart the serial number. Text: `12d1:0003`, `12d1:0003:A1B2`.
    Ids {
        /// Vendor.
        vendor: u16,
        /// Product, as its vendor numbers them.
        product: u16,
        /// Serial number.
        serial: Option<String>,
    },
}

/// The ports on the way to a device, from the root hub's on. Text: `1.4`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPath(String);

impl PortPath {
    /// Ports of hubs in a row: the root hub's, and five hubs behind it.
    const DEEPEST: usize = 6;

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A number without sign, in a range.
fn number(digits: &str, range: std::ops::RangeInclusive<u8>) -> Option<u8> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|number| plain && range.contains(number))
}

impl FromStr for PortPath {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let ports: Vec<Option<u8>> = text.split('.').map(|port| number(port, 1..=255)).collect();
        let fail = |rule| Err(TextError::new("USB port path", text, rule));
        if ports.len() > Self::DEEPEST {
            return fail("at most six ports, since at most five hubs stand in a row");
        }
        let Some(ports) = ports.into_iter().collect::<Option<Vec<u8>>>() else {
            return fail("port numbers from 1 to 255 with dots between them, such as `1.4`");
        };
        Ok(PortPath(ports.iter().map(u8::to_string).collect::<Vec<_>>().join(".")))
    }
}

impl fmt::Display for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

by_text!(PortPath);

const WHAT: &str = "USB device of the host";

impl FromStr for UsbSelector {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| TextError::new(WHAT, text, rule);
        let bus = |digits| number(digits, 1..=255).ok_or_else(|| fail("a bus has a number from 1 to 255"));
        if let Some((vendor, rest)) = text.split_once(':') {
            let (product, serial) = match rest.split_once(':') {
                Some((product, serial)) => (product, Some(serial)),
                None => (rest, None),
            };
            let four = |digits: &str| {
                let plain = digits.len() == 4 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                u16::from_str_radix(digits, 16).ok().filter(|_| plain)
            };
            let rule = "vendor and product have four hexadecimal digits each, such as `12d1:0003`";
            let (vendor, product) = four(vendor)
                .zip(four(product))
                .filter(|(vendor, _)| *vendor != 0)
                .ok_or_else(|| fail(rule))?;
            if serial.is_some_and(|serial| serial.is_empty() || serial.chars().any(char::is_control)) {
                return Err(fail(
                    "behind the second colon stands a serial number, or there is no such colon",
                ));
            }
            return Ok(UsbSelector::Ids { vendor, product, serial: serial.map(str::to_owned) });
        }
        if let Some((digits, port)) = text.split_once('-') {
            let port = port.parse().map_err(|error: TextError| fail(&error.rule))?;
            return Ok(UsbSelector::Port { bus: bus(digits)?, port });
        }
        let Some((digits, device)) = text.split_once('.') else {
            return Err(fail(
                "bus and device number such as `1.4`, bus and ports such as `1-1.4`, or vendor and product such as `12d1:0003`, with \
                 `:SERIAL` behind it where there are twins; `qvirt host usb` lists all of these",
            ));
        };
        let device =
            number(device, 1..=127).ok_or_else(|| fail("a device on a bus has a number from 1 to 127"))?;
        Ok(UsbSelector::Address { bus: bus(digits)?, device })
    }
}

impl fmt::Display for UsbSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UsbSelector::Address { bus, device } => write!(f, "{bus}.{device}"),
            UsbSelector::Port { bus, port } => write!(f, "{bus}-{port}"),
            UsbSelector::Ids { vendor, product, serial: None } => write!(f, "{vendor:04x}:{product:04x}"),
            UsbSelector::Ids { vendor, product, serial: Some(serial) } => {
                write!(f, "{vendor:04x}:{product:04x}:{serial}")
            }
        }
    }
}

by_text!(UsbSelector);

#[cfg(test)]
mod tests {
    use super::UsbSelector;

    #[test]
    fn three_ways_to_name_a_device_and_no_fourth() {
        for (text, shown) in [
            ("1.4", "1.4"),
            ("001.004", "1.4"),
            ("1-1.4", "1-1.4"),
            ("12D1:0003", "12d1:0003"),
            ("12d1:0003:A-1.2:x", "12d1:0003:A-1.2:x"),
        ] {
            let selector: UsbSelector = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((selector.to_string(), shown.parse()), (shown.to_owned(), Ok(selector)));
        }
        let wrong = [
            "",
            "1",
            "0.4",
            "256.4",
            "1.0",
            "1.128",
            "+1.4",
            "1-",
            "1-0",
            "1-1.256",
            "1-1..4",
            "0-1",
            "1-1.2.3.4.5.6.7",
            "12d1",
            "12d1:",
            "12d1:3",
            "0000:0003",
            "12d1:+003",
            "12d1:0003:",
            "12g1:0003",
            "12d1:0003:a\n",
        ];
        for text in wrong {
            assert!(text.parse::<UsbSelector>().is_err(), "{text:?}");
        }
    }
}
