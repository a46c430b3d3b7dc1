//! What a VM may be called.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a VM: also a file name, a part of socket paths, and what users type.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Why a text is no VM name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum VmNameError {
    #[error("a VM name cannot be empty: give it 1 to {} letters, digits, `_`, `.` or `-`", VmName::MAX_BYTES)]
    Empty,
    #[error(
        "the VM name {name:?} has {bytes} bytes, and at most {} are allowed: shorten it",
        VmName::MAX_BYTES
    )]
    TooLong { name: String, bytes: usize },
    #[error("the VM name {name:?} begins with {first:?}: begin it with an ASCII letter or a digit")]
    Start { name: String, first: char },
    #[error("the VM name {name:?} has {found:?} in it: use only ASCII letters, digits, `_`, `.` and `-`")]
    Character { name: String, found: char },
}

impl VmName {
    /// The longest name.
    pub const MAX_BYTES: usize = 32;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = VmNameError;

    fn from_str(name: &str) -> Result<VmName, VmNameError> {
        let first = name.chars().next().ok_or(VmNameError::Empty)?;
        if name.len() > VmName::MAX_BYTES {
            return Err(VmNameError::TooLong { name: name.into(), bytes: name.len() });
        }
        let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if let Some(found) = name.chars().find(|c| !allowed(c)) {
            return Err(VmNameError::Character { name: name.into(), found });
        }
        if !first.is_ascii_alphanumeric() {
            return Err(VmNameError::Start { name: name.into(), first });
        }
        Ok(VmName(name.into()))
    }
}

impl TryFrom<String> for VmName {
    type Error = VmNameError;

    fn try_from(name: String) -> Result<VmName, VmNameError> {
        name.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_never_masked() {
        for good in ["a", "7", "web-1.example_com", &"x".repeat(32)] {
            assert_eq!(good.parse::<VmName>().expect("a good name").as_str(), good);
        }
        let error = |text: &str| text.parse::<VmName>().expect_err("refused");
        assert_eq!(error(""), VmNameError::Empty);
        assert!(matches!(error(&"x".repeat(33)), VmNameError::TooLong { bytes: 33, .. }));
        assert!(matches!(error(".."), VmNameError::Start { first: '.', .. }));
        assert!(matches!(error("a/b"), VmNameError::Character { found: '/', .. }));
        assert!(matches!(error("ünix"), VmNameError::Character { found: 'ü', .. }));
        assert!(serde_json::from_str::<VmName>("\"-x\"").is_err(), "serde is no second door");
    }
}
