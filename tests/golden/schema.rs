//! Checks QMP commands against a recorded schema: unknown and missing members, JSON types, enum values.

use std::collections::HashMap;

use devices::capabilities::Capabilities;
use serde_json::{Map, Value};

/// A recorded schema, by the names of its entries.
pub struct Schema<'a>(HashMap<&'a str, &'a Value>);

fn list<'a>(entry: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    entry[key].as_array().into_iter().flatten()
}

fn text<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry[key].as_str().unwrap_or("")
}

impl<'a> Schema<'a> {
    /// From the reply of `query-qmp-schema`.
    pub fn new(reply: &'a Value) -> Schema<'a> {
        let entries = reply.as_array().expect("a schema is a list");
        Schema(entries.iter().map(|entry| (text(entry, "name"), entry)).collect())
    }

    /// A command with its arguments; `device_add` by the driver's properties, which the schema does not have.
    pub fn command(&self, name: &str, arguments: &Value, qemu: &Capabilities) -> Result<(), String> {
        let entry = self.0.get(name).filter(|entry| text(entry, "meta-type") == "command");
        let entry = entry.ok_or_else(|| format!("there is no command {name}"))?;
        if name != "device_add" {
            return self.value(text(entry, "arg-type"), arguments, name);
        }
        let members = arguments.as_object().ok_or("device_add wants an object")?;
        let driver = members.get("driver").and_then(Value::as_str).ok_or("device_add without driver")?;
        let wrong = |(key, value): &(&String, &Value)| match key.as_str() {
            "driver" | "id" | "bus" => !value.is_string(),
            property => !qemu.accepts(driver, property, value),
        };
        match members.iter().find(wrong) {
            Some((key, value)) => {
                let kind = qemu.driver(driver).and_then(|properties| properties.get(key));
                Err(format!("{driver} does not take {key} = {value}: its type is {kind:?}"))
            }
            None => Ok(()),
        }
    }

    fn value(&self, kind: &str, value: &Value, at: &str) -> Result<(), String> {
        let entry = self.0.get(kind).ok_or_else(|| format!("{at}: the schema has no type {kind}"))?;
        match text(entry, "meta-type") {
            "builtin" => builtin(text(entry, "json-type"), value, at),
            "enum" => {
                // `values` alone before QEMU 6.2, names of `members` since.
                let known = list(entry, "members").filter_map(|member| member["name"].as_str());
                let mut known = known.chain(list(entry, "values").filter_map(Value::as_str));
                match value.as_str() {
                    Some(word) if known.any(|name| name == word) => Ok(()),
                    _ => Err(format!("{at}: {value} is not of the enum")),
                }
            }
            "array" => {
                let items = value.as_array().ok_or_else(|| format!("{at}: {value} is no array"))?;
                items.iter().try_for_each(|item| self.value(text(entry, "element-type"), item, at))
            }
            "alternate" => {
                let tried = list(entry, "members").map(|branch| self.value(text(branch, "type"), value, at));
                let tried: Vec<_> = tried.collect();
                let reason = || tried.iter().filter_map(|t| t.clone().err()).collect::<Vec<_>>().join(" | ");
                if tried.iter().any(Result::is_ok) { Ok(()) } else { Err(reason()) }
            }
            "object" => {
                let given = value.as_object().ok_or_else(|| format!("{at}: {value} is no object"))?;
                self.object(entry, given, at)
            }
            other => Err(format!("{at}: a value cannot be a {other}")),
        }
    }

    fn object(&self, entry: &Value, given: &Map<String, Value>, at: &str) -> Result<(), String> {
        let mut members: Vec<&Value> = list(entry, "members").collect();
        if let Some(tag) = entry["tag"].as_str() {
            let case = given.get(tag).and_then(Value::as_str).ok_or_else(|| format!("{at}: no tag {tag}"))?;
            if let Some(variant) = list(entry, "variants").find(|variant| text(variant, "case") == case) {
                let variant = self.0.get(text(variant, "type")).ok_or("a variant without a type")?;
                members.extend(list(variant, "members"));
                if variant["tag"].is_string() {
                    return Err(format!("{at}: nested variants are not known to this check"));
                }
            }
        }
        for (key, value) in given {
            let member = members.iter().find(|member| text(member, "name") == key);
            let member = member.ok_or_else(|| format!("{at}: unknown member {key}"))?;
            self.value(text(member, "type"), value, &format!("{at}.{key}"))?;
        }
        // An optional member has a default, if only null.
        let missing =
            members.iter().find(|m| m.get("default").is_none() && !given.contains_key(text(m, "name")));
        missing.map_or(Ok(()), |member| Err(format!("{at}: member {} is missing", text(member, "name"))))
    }
}

fn builtin(json_type: &str, value: &Value, at: &str) -> Result<(), String> {
    let fits = match json_type {
        "string" => value.is_string(),
        "int" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        _ => true,
    };
    if fits { Ok(()) } else { Err(format!("{at}: {value} is no {json_type}")) }
}

/// The check itself, or a wrong command would pass.
#[test]
fn wrong_commands_are_found() {
    let qemu = &*crate::recorded::QEMU_10_0;
    let schema = Schema::new(&qemu.schema);
    let check = |name: &str, arguments: Value| schema.command(name, &arguments, &qemu.capabilities);
    let file = |extra: Value| {
        let mut node = serde_json::json!({"driver": "file", "node-name": "a", "filename": "/a"});
        for (key, value) in extra.as_object().into_iter().flatten() {
            node[key] = value.clone();
        }
        node
    };
    let error = |name: &str, arguments: Value| check(name, arguments).expect_err("it is wrong");
    assert_eq!(check("blockdev-add", file(serde_json::json!({"cache": {"direct": true}}))), Ok(()));
    assert_eq!(
        check("blockdev-add", serde_json::json!({"driver": "qcow2", "file": "a", "backing": null})),
        Ok(())
    );
    assert!(error("blockdev-add", file(serde_json::json!({"colour": 1}))).contains("unknown member colour"));
    assert!(error("blockdev-add", file(serde_json::json!({"aio": "slow"}))).contains("not of the enum"));
    assert!(error("blockdev-add", file(serde_json::json!({"cache": {"direct": "on"}}))).contains("boolean"));
    assert!(error("blockdev-add", serde_json::json!({"driver": "file"})).contains("filename is missing"));
    assert!(error("blockdev-add", serde_json::json!({"driver": "vfat2"})).contains("not of the enum"));
    assert!(error("blockdev-add", serde_json::json!({"driver": "raw", "file": 7})).contains("file"));
    assert!(error("no-such", serde_json::json!({})).contains("no command"));
    let nic = serde_json::json!({"driver": "virtio-net-pci", "mq": "on"});
    assert!(error("device_add", nic).contains("mq"));
    let nic = serde_json::json!({"driver": "virtio-net-pci", "colour": "red"});
    assert!(error("device_add", nic).contains("colour"));
}
