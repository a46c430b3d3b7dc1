//! Where a PCI device is on the host.

use std::fmt;
use std::str::FromStr;

use crate::text::{TextError, by_text};

/// Domain, bus, slot and function of a PCI device of the host, as in sysfs: `0000:04:10.1`. The guest's are in [`crate::address`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostBdf {
    domain: u32,
    bus: u8,
    slot: u8,
    function: u8,
}

by_text!(HostBdf);

impl HostBdf {
    /// The bus.
    pub const fn bus(self) -> u8 {
        self.bus
    }
}

const FORM: &str = "write domain:bus:slot.function in hexadecimal, as `lspci -D` does: 0000:04:10.1";

impl FromStr for HostBdf {
    type Err = TextError;

    fn from_str(text: &str) -> Result<HostBdf, TextError> {
        let wrong = |rule: &str| TextError::new("PCI address of the host", text, rule);
        let form = || wrong(FORM);
        let (place, function) = text.rsplit_once('.').ok_or_else(form)?;
        let (place, slot) = place.rsplit_once(':').ok_or_else(form)?;
        // Without a domain it is the first one, as everywhere.
        let (domain, bus) = place.rsplit_once(':').unwrap_or(("0000", place));
        let [domain, bus, slot, function] = [domain, bus, slot, function].map(hexadecimal);
        let domain =
            u32::try_from(domain.ok_or_else(form)?).map_err(|_| wrong("the domain is 0 to ffffffff"))?;
        let bus = u8::try_from(bus.ok_or_else(form)?).map_err(|_| wrong("the bus is 00 to ff"))?;
        let below = |number: u64, limit: u8| u8::try_from(number).ok().filter(|number| *number < limit);
        let slot = below(slot.ok_or_else(form)?, 0x20).ok_or_else(|| wrong("the slot is 00 to 1f"))?;
        let function = below(function.ok_or_else(form)?, 8).ok_or_else(|| wrong("the function is 0 to 7"))?;
        Ok(HostBdf { domain, bus, slot, function })
    }
}

/// Digits, and nothing else. Whatever has too many of them is out of every range.
fn hexadecimal(digits: &str) -> Option<u64> {
    let is_hex = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u64::from_str_radix(digits, 16).unwrap_or(u64::MAX))
}

impl fmt::Display for HostBdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HostBdf { domain, bus, slot, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{slot:02x}.{function}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_in_its_range_or_named() {
        let said = |text: &str| text.parse::<HostBdf>().map(|bdf| bdf.to_string()).map_err(|e| e.to_string());
        assert_eq!(said("0000:04:10.1").as_deref(), Ok("0000:04:10.1"));
        assert_eq!(said("4:1f.7").as_deref(), Ok("0000:04:1f.7"));
        assert_eq!(said("10001:FF:00.0").as_deref(), Ok("10001:ff:00.0"));
        for (text, part) in [
            ("0000:04:20.0", "the slot is 00 to 1f"),
            ("0000:04:10.8", "the function is 0 to 7"),
            ("0000:100:10.0", "the bus is 00 to ff"),
            ("100000000:04:10.0", "the domain is 0 to ffffffff"),
            ("ffffffffffffffffffff:04:10.0", "the domain is 0 to ffffffff"),
        ] {
            assert!(said(text).is_err_and(|said| said.contains(part)), "{text}");
        }
        for text in [
            "",
            "eth0",
            "04.1",
            "0000:04:10",
            "0000:04:10.",
            "0000:04:g0.1",
            "0000:04:10.1 ",
            ":04:10.1",
            "+4:10.1",
        ] {
            assert!(said(text).is_err_and(|said| said.contains("lspci -D")), "{text:?}");
        }
    }
}
