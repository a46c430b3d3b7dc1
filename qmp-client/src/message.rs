//! The shapes of QMP's messages. Owns the one parse of a received line into raw parts, and the building of a
//! command line. It does not decode what a command returns.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::error::QemuError;
use crate::event::{Event, Timestamp};

/// One message of the peer.
#[derive(Debug)]
pub(crate) enum Message<'a> {
    Event(Event),
    /// An answer with the id it carries; `None` where it has none, or one that is no id of ours.
    Reply {
        id: Option<u64>,
        result: Result<&'a RawValue, QemuError>,
    },
    /// An object of JSON that is neither, from a QMP of the future.
    Unknown,
}

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow, default, rename = "return", deserialize_with = "present")]
    returned: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    error: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    event: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(default)]
    timestamp: Timestamp,
}

/// A member that is there, be it `null`.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl<'a> Message<'a> {
    /// # Errors
    /// When `line` is not an object of JSON.
    pub(crate) fn parse(line: &'a [u8]) -> Result<Self, serde_json::Error> {
        // An array would do for serde as the members in their order.
        if line.trim_ascii_start().first() != Some(&b'{') {
            return Err(serde::de::Error::custom("not an object of JSON"));
        }
        let parts: Parts<'a> = serde_json::from_slice(line)?;
        let id = parts.id.and_then(|id| id.get().parse().ok());
        Ok(match parts {
            Parts { event: Some(name), data, timestamp, .. } => {
                let data = data.map(|data| serde_json::from_str(data.get())).transpose()?.unwrap_or_default();
                Self::Event(Event { name: name.into_owned(), data, timestamp })
            }
            Parts { error: Some(error), .. } => {
                let error = serde_json::from_str(error.get()).unwrap_or_else(|_| QemuError {
                    class: "an error of unknown shape".into(),
                    desc: error.get().into(),
                });
                Self::Reply { id, result: Err(error) }
            }
            Parts { returned: Some(returned), .. } => Self::Reply { id, result: Ok(returned) },
            _ => Self::Unknown,
        })
    }
}

/// How a command is to be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Band {
    In,
    Out,
}

/// A command as one line without its end. It is compact, since QEMU reads its monitor byte by byte: no empty
/// `arguments`, short ids. The bytes of `arguments` are kept, but for line ends between its tokens.
pub(crate) fn command_line(band: Band, name: &str, arguments: Option<&RawValue>, id: u64) -> Vec<u8> {
    let verb = match band {
        Band::In => "execute",
        Band::Out => "exec-oob",
    };
    let arguments = arguments.map(RawValue::get).filter(|text| !is_empty(text));
    let mut line = Vec::with_capacity(48 + name.len() + arguments.map_or(0, str::len));
    line.extend_from_slice(format!("{{\"{verb}\":{}", serde_json::Value::from(name)).as_bytes());
    if let Some(text) = arguments {
        line.extend_from_slice(b",\"arguments\":");
        // A string of JSON holds no raw line end, so these stand between tokens.
        line.extend(text.bytes().map(|b| if matches!(b, b'\n' | b'\r') { b' ' } else { b }));
    }
    line.extend_from_slice(format!(",\"id\":{id}}}").as_bytes());
    line
}

fn is_empty(json: &str) -> bool {
    let inner = json.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    json == "null" || inner.is_some_and(|inner| inner.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.into()).expect("the test gives JSON")
    }

    fn line(name: &str, arguments: Option<&str>) -> String {
        let arguments = arguments.map(raw);
        String::from_utf8(command_line(Band::In, name, arguments.as_deref(), 7)).expect("UTF-8")
    }

    #[test]
    fn commands_are_compact_and_keep_their_arguments() {
        assert_eq!(line("stop", None), r#"{"execute":"stop","id":7}"#);
        for empty in ["null", "{}", "{ \n }"] {
            assert_eq!(line("stop", Some(empty)), r#"{"execute":"stop","id":7}"#);
        }
        assert_eq!(
            line("x", Some("{\"backing\": null,\n\"n\": 1.0e2}")),
            "{\"execute\":\"x\",\"arguments\":{\"backing\": null, \"n\": 1.0e2},\"id\":7}"
        );
        assert_eq!(line("a\"\n", None), r#"{"execute":"a\"\n","id":7}"#);
        assert!(command_line(Band::Out, "x", None, 1).starts_with(br#"{"exec-oob":"x""#));
    }

    #[test]
    fn replies_of_every_shape_are_parsed() {
        let parse = |text: &'static str| match Message::parse(text.as_bytes()).expect("JSON") {
            Message::Reply { id, result } => (id, result.map(|raw| raw.get().to_owned())),
            other => panic!("not a reply: {other:?}"),
        };
        assert_eq!(parse(r#"{"return": null, "id": 3, "new": [1]}"#), (Some(3), Ok("null".into())));
        assert_eq!(parse(r#"{"return": {}, "id": "x"}"#).0, None);
        let (id, error) = parse(r#"{"error": {"class": "Novel", "desc": "no", "hint": 1}}"#);
        assert_eq!((id, error), (None, Err(QemuError { class: "Novel".into(), desc: "no".into() })));
        let (_, error) = parse(r#"{"error": "odd", "id": 1}"#);
        assert!(error.is_err_and(|error| error.desc == "\"odd\""));
    }

    #[test]
    fn other_objects_are_unknown_and_other_json_is_refused() {
        assert!(matches!(Message::parse(br#"{"novel": 1}"#), Ok(Message::Unknown)));
        for garbage in ["[]", "1", "{", "", "\"x\"", "{\"event\":\"\u{1}\"}"] {
            assert!(Message::parse(garbage.as_bytes()).is_err(), "{garbage}");
        }
        assert!(Message::parse(b"{\"return\":\"\xff\"}").is_err());
    }
}
