//! Names of network interfaces: which text is one.

use std::{fmt, str::FromStr};

/// The name of a network interface, as the kernel accepts it: 1 to 15 bytes, no `/`, `:`, `%` (the kernel reads it as a
/// template), whitespace or control character, neither `.` nor `..`; and no leading `-`, which tools would read as an
/// option.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkName(String);

/// Why a text is no name of a network interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is no name of a network interface: {reason}")]
pub struct BadLinkName {
    name: String,
    reason: &'static str,
}

impl FromStr for LinkName {
    type Err = BadLinkName;

    fn from_str(name: &str) -> Result<Self, BadLinkName> {
        let reason = if name.is_empty() {
            "it is empty"
        } else if name.len() > 15 {
            "it has more than 15 bytes"
        } else if matches!(name, "." | "..") {
            "the kernel keeps . and .. for folders"
        } else if name.starts_with('-') {
            "it begins with -, which tools read as an option"
        } else if name.contains(['/', ':', '%']) {
            "it holds one of / : %"
        } else if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            "it holds whitespace or a control character"
        } else {
            return Ok(LinkName(name.to_owned()));
        };
        Err(BadLinkName { name: name.to_owned(), reason })
    }
}

impl LinkName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
