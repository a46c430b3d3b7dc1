//! Sizes and times with their units, and MAC addresses: the small newtypes that configs are made of.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::text::{TextError, by_text};

/// A size in bytes. Its text always has a unit: `512MiB`, `2GiB`, `1048576B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(u64);

impl Size {
    const UNITS: [(&'static str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

    /// From bytes.
    pub const fn bytes(bytes: u64) -> Size {
        Size(bytes)
    }

    /// In bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| TextError::new("size", text, rule);
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
        let unit = text[digits.len()..].trim_start();
        let (_, shift) = Self::UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(|| fail("a whole number and a unit: B, KiB, MiB, GiB or TiB, such as \"2GiB\""))?;
        let number: u64 = digits.parse().map_err(|_| fail("the number before the unit is a whole one"))?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| fail("it is past 16 EiB"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: &u32| self.0 != 0 && self.0.trailing_zeros() >= *shift;
        let (unit, shift) = Self::UNITS.iter().find(|(_, shift)| fits(shift)).unwrap_or(&("B", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

by_text!(Size);

/// A span of time in whole milliseconds. Its text always has a unit: `500ms`, `2s`, `1m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis(u64);

impl Millis {
    const UNITS: [(&'static str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

    /// From milliseconds.
    pub const fn new(millis: u64) -> Millis {
        Millis(millis)
    }

    /// In milliseconds.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// As the standard library's type.
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl FromStr for Millis {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| TextError::new("time", text, rule);
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[digits.len()..];
        let (_, factor) = Self::UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(|| fail("a whole number and a unit: ms, s, m or h, such as \"10s\""))?;
        let number: u64 = digits.parse().map_err(|_| fail("the number before the unit is a whole one"))?;
        number.checked_mul(*factor).map(Millis).ok_or_else(|| fail("it is too long"))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |factor: u64| self.0 != 0 && self.0.is_multiple_of(factor);
        let (unit, factor) = Self::UNITS.iter().rev().find(|(_, factor)| fits(*factor)).unwrap_or(&("ms", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

by_text!(Millis);

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of a NIC that was given none: the same for the same VM and device, for ever. In QEMU's 52:54:00 range, with 24
    /// bits of FNV-1a over both names.
    pub fn derived(vm: &str, device: &str) -> Mac {
        let bytes = vm.bytes().chain([0]).chain(device.bytes());
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let [.., a, b, c] = (hash ^ (hash >> 24)).to_be_bytes();
        Mac([0x52, 0x54, 0x00, a, b, c])
    }
}

impl Mac {
    /// Its six bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| TextError::new("MAC address", text, rule);
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            let part = part
                .ok_or_else(|| fail("six pairs of hex digits with colons, such as \"52:54:00:12:34:56\""))?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| fail("hex digits"))?;
        }
        if parts.next().is_some() {
            return Err(fail("it has more than six pairs"));
        }
        if mac[0] & 1 == 1 {
            return Err(fail("it is a multicast address: the first byte of a NIC's address is even"));
        }
        if mac == [0; 6] {
            return Err(fail(
                "all zero is no address: leave `mac` out for one that is derived from the names, or write null_mac = true for a [[vf]] without one",
            ));
        }
        Ok(Mac(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

by_text!(Mac);
