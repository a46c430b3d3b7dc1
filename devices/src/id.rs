//! Names: what a device is called, and every QEMU id that derives from it. No other file builds an id.

use std::fmt;
use std::str::FromStr;

use crate::text::{TextError, by_text};

/// The id of a device: 1 to 16 characters, a letter first, then letters, digits, `-`, `_`. It is QEMU's id of the frontend, and
/// 16 is what leaves room in a node-name's 31 characters for a generation and a suffix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(String);

impl DeviceId {
    /// Longest id, in bytes.
    pub const MAX: usize = 16;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `prefix` and a number: the id of a device that has none of its own. The prefixes are ours and short.
    pub(crate) fn numbered(prefix: &str, number: usize) -> DeviceId {
        DeviceId(format!("{prefix}{number}"))
    }

    /// A function that comes with a USB controller.
    pub(crate) fn companion(&self, number: u8) -> String {
        format!("{}-uhci{number}", self.0)
    }

    /// The netdev behind a NIC.
    pub(crate) fn netdev(&self) -> String {
        format!("{}-net", self.0)
    }

    /// The character device behind a serial port, a channel or a vhost-user NIC.
    pub fn chardev(&self) -> String {
        format!("{}-char", self.0)
    }

    /// The name by which descriptor number `index` of `role` (`tap`, `vhost`) travels by `getfd`. Never a digit first.
    pub fn descriptor(&self, role: &str, index: usize) -> String {
        format!("{}-{role}{index}", self.0)
    }

    /// The format node of one layer of a disk.
    pub fn format_node(&self, generation: Generation) -> String {
        format!("{}-{}-format", self.0, generation.0)
    }

    /// The protocol node of one layer of a disk.
    pub fn file_node(&self, generation: Generation) -> String {
        format!("{}-{}-file", self.0, generation.0)
    }

    /// The node that sees what a guest writes to a disk while the layer that is written goes into the one below.
    pub(crate) fn merge_node(&self) -> String {
        format!("{}-merge", self.0)
    }

    /// The socket on which a disk's proxy serves its image to QEMU.
    pub(crate) fn io_socket(&self, run_dir: &str) -> String {
        format!("{run_dir}/{}-io.sock", self.0)
    }

    /// What a disk's proxy calls a layer: the top like the device, those below by how far below they are.
    pub(crate) fn io_export(&self, depth: usize) -> String {
        if depth == 0 { self.0.clone() } else { format!("{}-{depth}", self.0) }
    }

    /// The socket on which a disk's proxy obeys its owner.
    pub(crate) fn io_control(&self, run_dir: &str) -> String {
        format!("{run_dir}/{}-io-control.sock", self.0)
    }

    /// The device and generation that a node-name was made of, if it is one of ours.
    pub fn of_node(node: &str) -> Option<(DeviceId, Generation)> {
        let stem = node.strip_suffix("-format").or_else(|| node.strip_suffix("-file"))?;
        let (id, generation) = stem.rsplit_once('-')?;
        Some((id.parse().ok()?, Generation(generation.parse().ok()?)))
    }
}

impl FromStr for DeviceId {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let fail = |rule: &str| Err(TextError::new("device id", text, rule));
        if text.is_empty() || text.len() > Self::MAX {
            return fail("it has 1 to 16 characters");
        }
        if !text.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return fail("it begins with a letter");
        }
        if !text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            return fail("it consists of letters, digits, `-` and `_`");
        }
        Ok(DeviceId(text.to_owned()))
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

by_text!(DeviceId);

/// A layer of a disk's chain. It rises with every overlay and every re-attach, so a node-name is never used twice in a VM's life.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u32);

/// A disk's target label: `vda` to `vdzz` on virtio-blk, `sda` to `sdzz` on SCSI. It is a label for people and commands: what
/// the guest calls the disk is the guest's business.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(String);

impl Label {
    /// Labels per prefix: 26 of one letter, 26 * 26 of two.
    pub const COUNT: usize = 26 + 26 * 26;

    /// Label number `index` (0 is `a`, 26 is `aa`); `None` past `zz`.
    pub fn numbered(prefix: &str, index: usize) -> Option<Label> {
        let letter = |n: usize| char::from(b'a' + u8::try_from(n).unwrap_or(0));
        match index {
            0..26 => Some(Label(format!("{prefix}{}", letter(index)))),
            26..Self::COUNT => {
                let index = index - 26;
                Some(Label(format!("{prefix}{}{}", letter(index / 26), letter(index % 26))))
            }
            _ => None,
        }
    }

    /// The label as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `vd` or `sd`.
    pub fn prefix(&self) -> &str {
        &self.0[..2]
    }
}

impl FromStr for Label {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let letters = text.strip_prefix("vd").or_else(|| text.strip_prefix("sd")).unwrap_or("");
        if !(1..=2).contains(&letters.len()) || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
            return Err(TextError::new(
                "target label",
                text,
                "`vda` to `vdzz` on virtio-blk, `sda` to `sdzz` on SCSI",
            ));
        }
        Ok(Label(text.to_owned()))
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

by_text!(Label);
