//! What a real QEMU said of itself, as recorded, and arguments checked against it in QEMU's own words.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::Failure;

const V7_2: &str = include_str!("../../recorded/qemu-7.2.json");
const V10_0: &str = include_str!("../../recorded/qemu-10.0.json");

/// A recording: QEMU's replies.
#[derive(Deserialize)]
pub(super) struct Recorded {
    pub(super) version: Value,
    pub(super) schema: Box<RawValue>,
    pub(super) objects: Vec<String>,
    pub(super) machines: Value,
    pub(super) devices: BTreeMap<String, Vec<Property>>,
    #[serde(skip)]
    entries: HashMap<String, Entry>,
}

/// A property as `device-list-properties` gives it.
#[derive(Deserialize, serde::Serialize)]
pub(super) struct Property {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(rename = "default-value", skip_serializing_if = "Option::is_none")]
    pub(super) default: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    name: String,
    meta_type: String,
    arg_type: Option<String>,
    element_type: Option<String>,
    json_type: Option<String>,
    tag: Option<String>,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    values: Vec<String>,
    #[serde(default)]
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Member {
    #[serde(default)]
    name: String,
    #[serde(rename = "type", default)]
    kind: String,
    /// Present, if only as null, where the member may be left out.
    #[serde(default, deserialize_with = "present")]
    default: bool,
}

fn present<'de, D: serde::Deserializer<'de>>(source: D) -> Result<bool, D::Error> {
    serde::de::IgnoredAny::deserialize(source).map(|_| true)
}

#[derive(Deserialize)]
struct Variant {
    case: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Recorded {
    /// The recording of QEMU `7.2`; of 10.0 for any other word.
    pub(super) fn of(version: &str) -> Recorded {
        let text = if version == "7.2" { V7_2 } else { V10_0 };
        let mut recorded: Recorded = serde_json::from_str(text).expect("the recording is what QEMU said");
        let entries: Vec<Entry> =
            serde_json::from_str(recorded.schema.get()).expect("the recorded schema is what QEMU said");
        recorded.entries = entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        recorded
    }

    /// The same QEMU, retrying by itself as openEuler's does: one more action of BLOCK_IO_ERROR, two more properties of a disk.
    pub(super) fn with_retry(mut self) -> Recorded {
        let property = |name: &str| Property {
            name: name.to_owned(),
            kind: "int64".to_owned(),
            default: None,
            description: None,
        };
        for driver in ["virtio-blk-pci", "scsi-hd", "scsi-cd"] {
            let properties = self.devices.get_mut(driver).expect("it is recorded");
            properties.extend(["retry_interval", "retry_timeout"].map(property));
        }
        let event = self.entries["BLOCK_IO_ERROR"].arg_type.as_ref().expect("it has data");
        let action = self.entries[event].members.iter().find(|member| member.name == "action");
        let action = action.expect("it has an action").kind.clone();
        let mut schema: Vec<Value> = serde_json::from_str(self.schema.get()).expect("it was read before");
        let words = schema.iter_mut().find(|entry| entry["name"] == *action).expect("its type is there");
        let members = words["members"].as_array_mut().expect("an enum has members");
        members.push(serde_json::json!({"name": "retry"}));
        self.schema = serde_json::value::to_raw_value(&schema).expect("it is JSON");
        self
    }

    /// Whether it retries by itself.
    pub(super) fn retries(&self) -> bool {
        self.devices["virtio-blk-pci"].iter().any(|property| property.name == "retry_interval")
    }

    /// Whether QEMU wants JSON's own types for device properties: from 9.2 on.
    pub(super) fn strict(&self) -> bool {
        self.version["qemu"]["major"].as_u64() >= Some(10)
    }

    /// All commands.
    pub(super) fn commands(&self) -> impl Iterator<Item = &str> {
        self.entries.values().filter(|entry| entry.meta_type == "command").map(|entry| entry.name.as_str())
    }

    /// Checks a command's arguments. Errors: an unknown command, or arguments that the schema does not allow.
    pub(super) fn check(&self, command: &str, arguments: &Map<String, Value>) -> Result<(), Failure> {
        let entry = self.entries.get(command).filter(|entry| entry.meta_type == "command");
        let entry = entry.ok_or_else(|| Failure {
            class: "CommandNotFound".to_owned(),
            desc: format!("The command {command} has not been found"),
        })?;
        // The rest of its arguments are the device's properties.
        if command == "device_add" {
            return Ok(());
        }
        let kind = entry.arg_type.as_ref().and_then(|kind| self.entries.get(kind));
        kind.map_or(Ok(()), |kind| self.object(kind, arguments, ""))
    }

    fn value(&self, kind: &str, value: &Value, path: &str) -> Result<(), Failure> {
        let Some(kind) = self.entries.get(kind) else { return Ok(()) };
        let wrong = |expected: &str| {
            Err(Failure::generic(format!("Invalid parameter type for '{path}', expected: {expected}")))
        };
        match (kind.meta_type.as_str(), value) {
            ("object", Value::Object(members)) => self.object(kind, members, path),
            ("object", _) => wrong("object"),
            ("array", Value::Array(items)) => {
                let element = kind.element_type.as_deref().unwrap_or_default();
                let mut items = items.iter().enumerate();
                items.try_for_each(|(index, item)| self.value(element, item, &format!("{path}[{index}]")))
            }
            ("array", _) => wrong("array"),
            ("enum", Value::String(word)) => {
                let known = kind.values.iter().chain(kind.members.iter().map(|member| &member.name));
                if known.into_iter().any(|known| known == word) {
                    return Ok(());
                }
                Err(Failure::generic(format!("Parameter '{path}' does not accept value '{word}'")))
            }
            ("enum", _) => wrong("string"),
            ("alternate", value) => {
                // The branch is chosen by the JSON type alone.
                let branch = kind.members.iter().find(|member| self.takes(&member.kind, value));
                match branch {
                    Some(member) => self.value(&member.kind, value, path),
                    None => wrong("alternate"),
                }
            }
            (_, value) if self.takes(&kind.name, value) => Ok(()),
            _ => wrong(match kind.json_type.as_deref() {
                Some("int") => "integer",
                Some(other) => other,
                None => "value",
            }),
        }
    }

    fn takes(&self, kind: &str, value: &Value) -> bool {
        let Some(kind) = self.entries.get(kind) else { return false };
        match (kind.meta_type.as_str(), kind.json_type.as_deref()) {
            ("object", _) => value.is_object(),
            ("array", _) => value.is_array(),
            ("enum", _) | (_, Some("string")) => value.is_string(),
            (_, Some("boolean")) => value.is_boolean(),
            (_, Some("int")) => value.is_i64() || value.is_u64(),
            (_, Some("number")) => value.is_number(),
            (_, Some("null")) => value.is_null(),
            _ => true,
        }
    }

    fn object(&self, kind: &Entry, members: &Map<String, Value>, path: &str) -> Result<(), Failure> {
        let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let mut known = Vec::new();
        self.members(kind, members, &at, &mut known)?;
        match members.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(Failure::generic(format!("Parameter '{}' is unexpected", at(name)))),
            None => Ok(()),
        }
    }

    fn members<'a>(
        &'a self,
        kind: &'a Entry,
        given: &Map<String, Value>,
        at: &impl Fn(&str) -> String,
        known: &mut Vec<&'a str>,
    ) -> Result<(), Failure> {
        for member in &kind.members {
            match given.get(&member.name) {
                Some(value) => self.value(&member.kind, value, &at(&member.name))?,
                None if member.default => {}
                None => return Err(Failure::generic(format!("Parameter '{}' is missing", at(&member.name)))),
            }
            known.push(&member.name);
        }
        let case = kind.tag.as_ref().and_then(|tag| given.get(tag)).and_then(Value::as_str);
        let variant = kind.variants.iter().find(|variant| Some(variant.case.as_str()) == case);
        match variant.and_then(|variant| self.entries.get(&variant.kind)) {
            Some(variant) => self.members(variant, given, at, known),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The words are those that QEMU 10.0.2 answered to the same arguments.
    #[test]
    fn arguments_are_refused_in_qemus_words() {
        let qemu = Recorded::of("10.0");
        let check = |command: &str, arguments: Value| {
            let arguments = arguments.as_object().cloned().unwrap_or_default();
            qemu.check(command, &arguments).map_err(|failure| failure.desc)
        };
        let refused = [
            ("getfd", json!({}), "Parameter 'fdname' is missing"),
            ("getfd", json!({"fdname": 1}), "Invalid parameter type for 'fdname', expected: string"),
            ("query-status", json!({"x": 1}), "Parameter 'x' is unexpected"),
            ("nonsense", json!({}), "The command nonsense has not been found"),
            ("blockdev-add", json!({"driver": "nope"}), "Parameter 'driver' does not accept value 'nope'"),
            ("blockdev-add", json!({"driver": "raw"}), "Parameter 'file' is missing"),
            ("blockdev-add", json!({"driver": "raw", "file": "f", "zz": 1}), "Parameter 'zz' is unexpected"),
        ];
        for (command, arguments, desc) in refused {
            assert_eq!(check(command, arguments), Err(desc.to_owned()), "{command}");
        }
        let overlay = json!({"driver": "qcow2", "node-name": "o", "file": "f", "backing": null});
        assert_eq!(check("blockdev-add", overlay), Ok(()));
        let socket = json!({"addr": {"type": "unix", "data": {"path": "/x"}}, "server": true, "wait": false});
        let chardev = json!({"id": "c", "backend": {"type": "socket", "data": socket}});
        assert_eq!(check("chardev-add", chardev), Ok(()));
    }
}
