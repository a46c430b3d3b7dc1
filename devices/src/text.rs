//! The one door into a newtype: its text. Owns the parse error and the serde glue; each type keeps its own rule.

use thiserror::Error;

/// A text that is not what it should be: the thing, the text, and the rule it breaks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is no {what}: {rule}")]
pub struct TextError {
    /// What was expected: `device id`, `MAC address`.
    pub what: &'static str,
    /// What was there.
    pub text: String,
    /// The rule in words, with an example where that helps.
    pub rule: String,
}

impl TextError {
    pub(crate) fn new(what: &'static str, text: &str, rule: impl Into<String>) -> TextError {
        TextError { what, text: text.to_owned(), rule: rule.into() }
    }
}

/// Serde by way of `FromStr` and `Display`, so that a config, a flag and a control request take the same road.
macro_rules! by_text {
    ($type:ty) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(source)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, sink: S) -> Result<S::Ok, S::Error> {
                sink.collect_str(self)
            }
        }
    };
}

/// An enum whose values are words: `FromStr`, `Display`, serde, and the list of all values in the error.
/// Words after the first of a value are accepted spellings; the first is the one that is printed. A text after the values says why there
/// are no others.
macro_rules! words {
    ($(#[$meta:meta])* $type:ident, $what:literal { $($(#[$vmeta:meta])* $value:ident = $word:literal $(| $alias:literal)*),+ $(,)? } $($why:literal)?) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $type { $($(#[$vmeta])* $value),+ }

        impl $type {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [$type] = &[$($type::$value),+];

            /// The word for it in configs and on QEMU's command line.
            pub fn word(self) -> &'static str {
                match self { $($type::$value => $word),+ }
            }
        }

        impl std::str::FromStr for $type {
            type Err = crate::text::TextError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($word $(| $alias)* => Ok($type::$value),)+
                    _ => {
                        let rule = concat!("one of", $(" `", $word, "`"),+ $(, "; ", $why)?);
                        Err(crate::text::TextError::new($what, text, rule))
                    }
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.word()) }
        }

        crate::text::by_text!($type);
    };
}

pub(crate) use {by_text, words};
