//! QEMU's `key=value,key=value` notation, both ways: commas in values doubled, nested members with dots.
//!
//! Printed for the few options that take no JSON (`-chardev`, and `-device` or `-netdev` of an old QEMU). Parsed for `--disk` and its
//! siblings, where the parsed text deserializes into the same structs as a TOML table.

use std::collections::BTreeMap;

use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

/// `text` with its commas doubled.
pub(crate) fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

/// JSON members as `key=value,...`; booleans are `on` and `off`, lists repeat their key, `{"str": x}` is `x` (QEMU's `String` type).
pub(crate) fn print(props: &Map<String, Value>) -> String {
    let mut parts = Vec::new();
    props.iter().for_each(|(key, value)| push(&mut parts, key, value));
    parts.join(",")
}

fn push(parts: &mut Vec<String>, key: &str, value: &Value) {
    match value {
        Value::Null => {}
        Value::Bool(on) => parts.push(format!("{key}={}", if *on { "on" } else { "off" })),
        Value::Number(number) => parts.push(format!("{key}={number}")),
        Value::String(text) => parts.push(format!("{key}={}", escaped(text))),
        Value::Array(items) => items.iter().for_each(|item| push(parts, key, item)),
        Value::Object(members) if members.len() == 1 && members.contains_key("str") => {
            push(parts, key, &members["str"]);
        }
        Value::Object(members) => members.iter().for_each(|(k, v)| push(parts, &format!("{key}.{k}"), v)),
    }
}

/// What is wrong with a `key=value` text.
#[derive(Debug, Error)]
pub enum KeyvalError {
    /// A part without `=`.
    #[error("{0:?} has no `=`: write key=value, commas inside a value doubled")]
    NoValue(String),
    /// The same key twice.
    #[error("key `{0}` is given twice")]
    Twice(String),
    /// A key that is both a value and the head of dotted keys.
    #[error("key `{0}` is given a value and members: write one or the other")]
    Mixed(String),
    /// The values do not fit the device.
    #[error("{0}")]
    Config(String),
}

impl serde::de::Error for KeyvalError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        KeyvalError::Config(message.to_string())
    }
}

/// Parses `key=value,...` into a config struct.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, KeyvalError> {
    let mut root = Tree::default();
    for part in split(text) {
        let (key, value) = part.split_once('=').ok_or_else(|| KeyvalError::NoValue(part.clone()))?;
        insert(&mut root, key, key, value)?;
    }
    T::deserialize(Node::Members(root))
}

/// Splits at single commas; a doubled one stands for itself.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            parts.last_mut().expect("there is always a part").push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts.last_mut().expect("there is always a part").push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

type Tree = BTreeMap<String, Node>;

enum Node {
    Text(String),
    Members(Tree),
}

fn insert(tree: &mut Tree, whole: &str, key: &str, value: &str) -> Result<(), KeyvalError> {
    if let Some((head, rest)) = key.split_once('.') {
        return match tree.entry(head.to_owned()).or_insert_with(|| Node::Members(Tree::new())) {
            Node::Members(members) => insert(members, whole, rest, value),
            Node::Text(_) => Err(KeyvalError::Mixed(head.to_owned())),
        };
    }
    match tree.insert(key.to_owned(), Node::Text(value.to_owned())) {
        None => Ok(()),
        Some(Node::Text(_)) => Err(KeyvalError::Twice(whole.to_owned())),
        Some(Node::Members(_)) => Err(KeyvalError::Mixed(whole.to_owned())),
    }
}

impl<'de> IntoDeserializer<'de, KeyvalError> for Node {
    type Deserializer = Node;
    fn into_deserializer(self) -> Node {
        self
    }
}

/// A value that is one of the types a config has; the struct that asks decides how its text is read.
macro_rules! from_text {
    ($($method:ident $visit:ident $type:ty),+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyvalError> {
            match self {
                Node::Text(text) => match text.parse::<$type>() {
                    Ok(value) => visitor.$visit(value),
                    Err(reason) => Err(KeyvalError::Config(format!("{text:?} does not fit: {reason}"))),
                },
                members => members.deserialize_any(visitor),
            }
        }
    )+};
}

impl<'de> Deserializer<'de> for Node {
    type Error = KeyvalError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyvalError> {
        match self {
            Node::Text(text) => visitor.visit_string(text),
            Node::Members(members) => visitor.visit_map(MapDeserializer::new(members.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyvalError> {
        visitor.visit_some(self)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyvalError> {
        match self {
            Node::Text(text) => match text.as_str() {
                "true" | "on" | "yes" => visitor.visit_bool(true),
                "false" | "off" | "no" => visitor.visit_bool(false),
                _ => Err(KeyvalError::Config(format!("{text:?} does not fit: write true or false"))),
            },
            members => members.deserialize_any(visitor),
        }
    }

    from_text!(
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64,
        deserialize_i64 visit_i64 i64
    );

    /// A list is one text with `;` between its items: commas and colons are taken.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyvalError> {
        match self {
            Node::Text(text) => {
                let items = text.split(';').map(str::to_owned).collect::<Vec<_>>();
                visitor.visit_seq(serde::de::value::SeqDeserializer::new(items.into_iter()))
            }
            members => members.deserialize_any(visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct map struct
        enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        path: Option<String>,
        queues: Option<u16>,
        #[serde(default)]
        ro: bool,
        inner: Option<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        a: u32,
    }

    #[test]
    fn commas_dots_and_types() {
        let sample: Sample = parse("path=/a,,b=c,queues=2,ro=true,inner.a=7").expect("fits");
        let inner = Some(Inner { a: 7 });
        assert_eq!(sample, Sample { path: Some("/a,b=c".into()), queues: Some(2), ro: true, inner });
    }

    #[test]
    fn a_number_is_a_text_where_a_text_is_wanted() {
        assert_eq!(parse::<Sample>("path=123").expect("fits").path.as_deref(), Some("123"));
    }

    #[test]
    fn errors_name_the_key() {
        let text = |input| parse::<Sample>(input).expect_err("does not fit").to_string();
        assert!(text("path").contains("has no `=`"));
        assert!(text("ro=true,ro=false").contains("`ro` is given twice"));
        assert!(text("inner=1,inner.a=1").contains("`inner`"));
        assert!(text("queues=many").contains("\"many\""));
        assert!(text("colour=red").contains("unknown field `colour`"));
    }

    #[test]
    fn printed_as_qemu_reads_it() {
        let props = json!({"driver": "x", "path": "/a,b", "on": true, "n": 3, "fwd": [{"str": "tcp::1-:2"}], "cache": {"direct": false}});
        let Value::Object(props) = props else { unreachable!("an object was written") };
        assert_eq!(print(&props), "driver=x,path=/a,,b,on=on,n=3,fwd=tcp::1-:2,cache.direct=off");
    }

    proptest::proptest! {
        /// Whatever stands in a value, it comes back; nested members by their dots.
        #[test]
        fn what_is_printed_is_read_back(
            flat in proptest::collection::btree_map("[a-m]{1,4}", "\\PC{0,12}", 1..5),
            nested in proptest::collection::btree_map("[a-z]{1,4}", "[a-c,.=]{0,6}", 1..4),
        ) {
            let mut members = json!(flat);
            members["nested"] = json!(nested);
            let Value::Object(props) = &members else { unreachable!("an object was written") };
            proptest::prop_assert_eq!(&parse::<Value>(&print(props)).expect("what was printed"), &members);
        }
    }
}
