//! What a physical function keeps of each of its virtual functions: the profile that `ip link set PF vf N ...` changes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::{TextError, by_text, words};
use crate::units::Mac;

words! {
    /// How a virtual function's link follows that of its physical function.
    LinkState, "link state" {
        /// As the physical function's.
        Auto = "auto",
        /// Up, whatever the physical function's.
        Enable = "enable",
        /// Down.
        Disable = "disable",
    }
}

/// A rate in megabits a second; none limits nothing. Text: `100Mbit`, `1Gbit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u32);

impl Rate {
    /// From megabits a second.
    pub const fn mbits(number: u32) -> Rate {
        Rate(number)
    }

    /// In megabits a second, as the kernel counts.
    pub const fn as_mbits(self) -> u32 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Rate, TextError> {
        let fail = |rule: &str| TextError::new("rate", text, rule);
        let form =
            "a whole number and a unit, Mbit or Gbit (a second), such as \"100Mbit\"; 0Mbit is no limit";
        let (digits, factor) = match (text.strip_suffix("Mbit"), text.strip_suffix("Gbit")) {
            (Some(digits), _) => (digits, 1),
            (_, Some(digits)) => (digits, 1000),
            (None, None) => return Err(fail(form)),
        };
        let number: u32 = digits.parse().map_err(|_| fail(form))?;
        number.checked_mul(factor).map(Rate).ok_or_else(|| fail("it is too high: 4294967295Mbit at most"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0Mbit"),
            whole if whole.is_multiple_of(1000) => write!(f, "{}Gbit", whole / 1000),
            number => write!(f, "{number}Mbit"),
        }
    }
}

by_text!(Rate);

/// A profile as the kernel tells it. What a driver does not tell is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfProfile {
    /// The address that was set; none is all zero, by which drivers mean that none was.
    pub mac: Option<Mac>,
    /// VLAN of all its frames; 0 is none.
    pub vlan: u16,
    /// Priority (802.1p) of its VLAN.
    pub qos: u8,
    /// Rate that it is promised.
    pub rate_min: Rate,
    /// Rate that it is held to.
    pub rate_max: Rate,
    /// Whether frames with another source address are dropped.
    pub spoofchk: Option<bool>,
    /// Whether it may ask for what others' frames would be let through by.
    pub trust: Option<bool>,
    /// How its link follows.
    pub link_state: Option<LinkState>,
}

/// What is to be changed of a profile; the rest stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VfSettings {
    /// The address; `Some(None)` is all zero.
    pub mac: Option<Option<Mac>>,
    /// VLAN, 0 to 4094; 0 is none.
    pub vlan: Option<u16>,
    /// Priority of the VLAN, 0 to 7.
    pub qos: Option<u8>,
    /// Rate that it is promised.
    pub rate_min: Option<Rate>,
    /// Rate that it is held to.
    pub rate_max: Option<Rate>,
    /// Whether foreign source addresses are dropped.
    pub spoofchk: Option<bool>,
    /// Whether it is trusted.
    pub trust: Option<bool>,
    /// How its link follows.
    pub link_state: Option<LinkState>,
}

/// A setting out of its range: the key, the value, the rule.
pub type BadSetting = (&'static str, String, &'static str);

impl VfSettings {
    /// What can be said against it by itself.
    ///
    /// # Errors
    /// The first setting that breaks its rule.
    pub fn check(&self) -> Result<(), BadSetting> {
        match self {
            Self { vlan: Some(vlan), .. } if *vlan > 4094 => {
                Err(("vlan", vlan.to_string(), "a VLAN is 1 to 4094, and 0 is none"))
            }
            Self { qos: Some(qos), .. } if *qos > 7 => Err(("qos", qos.to_string(), "a priority is 0 to 7")),
            Self { qos: Some(1..), vlan: None | Some(0), .. } => {
                let qos = self.qos.unwrap_or_default().to_string();
                Err(("qos", qos, "it is the priority of a VLAN: set `vlan` too"))
            }
            Self { rate_min: Some(min), rate_max: Some(max), .. } if *max != Rate(0) && min > max => {
                Err(("rate_min", min.to_string(), "what is promised is not more than `rate_max`"))
            }
            _ => Ok(()),
        }
    }

    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        *self == VfSettings::default()
    }

    /// The profile that `before` is to become.
    pub fn over(&self, before: &VfProfile) -> VfProfile {
        VfProfile {
            mac: self.mac.unwrap_or(before.mac),
            vlan: self.vlan.unwrap_or(before.vlan),
            // A priority is of a VLAN: another one does not inherit it.
            qos: self.qos.unwrap_or(if self.vlan.is_some() { 0 } else { before.qos }),
            rate_min: self.rate_min.unwrap_or(before.rate_min),
            rate_max: self.rate_max.unwrap_or(before.rate_max),
            spoofchk: self.spoofchk.or(before.spoofchk),
            trust: self.trust.or(before.trust),
            link_state: self.link_state.or(before.link_state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_printed() {
        let said = |text: &str| text.parse::<Rate>().map(|rate| (rate.as_mbits(), rate.to_string()));
        assert_eq!(said("100Mbit"), Ok((100, "100Mbit".to_owned())));
        assert_eq!(said("2Gbit"), Ok((2000, "2Gbit".to_owned())));
        assert_eq!(said("0Gbit"), Ok((0, "0Mbit".to_owned())));
        for text in ["100", "100M", "-1Mbit", "1.5Gbit", "Mbit", "5000000Gbit", ""] {
            assert!(said(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_what_is_set_changes() {
        let before = VfProfile { vlan: 5, qos: 3, spoofchk: Some(true), ..VfProfile::default() };
        assert_eq!(VfSettings::default().over(&before), before);
        let settings = VfSettings { vlan: Some(7), trust: Some(true), ..VfSettings::default() };
        let expected = VfProfile { vlan: 7, qos: 0, trust: Some(true), ..before };
        assert_eq!(settings.over(&before), expected);
    }
}
