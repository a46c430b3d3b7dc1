//! What one QEMU binary can do, as data: the answer to "ask this QEMU".
//!
//! Owns the reduced form of `query-qmp-schema` and `device-list-properties` that qvirt decides by, and how it is distilled from
//! QEMU's replies. Does not ask anything: `launcher::probe` talks to QEMU, and saves the result with every launch.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The properties of one driver: name to QEMU's own name of its type (`bool`, `uint32`, `OnOffAuto`, `str`, ...).
pub type Properties = BTreeMap<String, String>;

/// What one QEMU can do. Versions decide nothing; these facts do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `10.0.2 (Debian 1:10.0.2+ds-2)`: for people and logs only.
    pub version: String,
    /// Names of all QMP commands.
    pub commands: BTreeSet<String>,
    /// Names of all QMP events.
    pub events: BTreeSet<String>,
    /// `command/feature`, such as `device_add/json-cli-hotplug`.
    pub features: BTreeSet<String>,
    /// Block drivers that `blockdev-add` accepts.
    pub block_drivers: BTreeSet<String>,
    /// Values of the `aio` option of block driver `file`.
    pub aio: BTreeSet<String>,
    /// Types that `netdev_add` accepts.
    pub netdevs: BTreeSet<String>,
    /// Values of member `action` of event BLOCK_IO_ERROR; `retry` among them is openEuler's I/O suspension.
    pub io_error_actions: BTreeSet<String>,
    /// Types of user-creatable objects.
    pub objects: BTreeSet<String>,
    /// Machine aliases and names to the versioned name: `q35` to `pc-q35-10.0`.
    pub machines: BTreeMap<String, String>,
    /// Driver to its properties, for those of [`Capabilities::DRIVERS`] that this QEMU has.
    pub devices: BTreeMap<String, Properties>,
}

/// QEMU's own replies, from which [`Capabilities::from_replies`] distils.
#[derive(Debug)]
pub struct Replies<'a> {
    /// Reply of `query-version`.
    pub version: &'a Value,
    /// Reply of `query-qmp-schema`, as JSON text: it is large, and only a part of it is looked at.
    pub schema: &'a str,
    /// Replies of `device-list-properties`, by driver. A driver that QEMU does not know is left out.
    pub devices: &'a BTreeMap<String, Value>,
    /// Reply of `qom-list-types` with `implements=user-creatable`.
    pub objects: &'a Value,
    /// Reply of `query-machines`.
    pub machines: &'a Value,
}

/// The members of a schema entry that are looked at.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Entry<'a> {
    name: &'a str,
    meta_type: &'a str,
    arg_type: Option<&'a str>,
    #[serde(default)]
    features: Vec<&'a str>,
    #[serde(default)]
    members: Vec<Member<'a>>,
    #[serde(default)]
    values: Vec<&'a str>,
    #[serde(default)]
    variants: Vec<Variant<'a>>,
}

#[derive(Debug, Deserialize)]
struct Member<'a> {
    // An enum's members have no type, an alternate's have no name; an enum's names are what `values` was before QEMU 6.2.
    #[serde(default)]
    name: &'a str,
    #[serde(rename = "type")]
    kind: Option<&'a str>,
}

#[derive(Debug, Deserialize)]
struct Variant<'a> {
    case: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
}

/// The schema, by name, with the few walks that are needed.
struct Schema<'a>(BTreeMap<&'a str, Entry<'a>>);

impl<'a> Schema<'a> {
    fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        let entries: Vec<Entry<'a>> = serde_json::from_str(text)?;
        Ok(Schema(entries.into_iter().map(|entry| (entry.name, entry)).collect()))
    }

    fn names(&self, meta_type: &str) -> BTreeSet<String> {
        self.0.values().filter(|e| e.meta_type == meta_type).map(|e| e.name.to_owned()).collect()
    }

    /// The object type that a command or event takes.
    fn argument(&self, name: &str) -> Option<&Entry<'a>> {
        self.0.get(self.0.get(name)?.arg_type?)
    }

    fn member(&self, object: &Entry<'a>, name: &str) -> Option<&Entry<'a>> {
        let kind = object.members.iter().find(|m| m.name == name)?.kind?;
        self.0.get(kind)
    }

    fn variant(&self, object: &Entry<'a>, case: &str) -> Option<&Entry<'a>> {
        self.0.get(object.variants.iter().find(|v| v.case == case)?.kind)
    }

    /// The values of an enum-typed member; empty where there is none.
    fn values(&self, object: Option<&Entry<'a>>, member: &str) -> BTreeSet<String> {
        let Some(kind) = object.and_then(|o| self.member(o, member)) else { return BTreeSet::new() };
        let names = kind.members.iter().map(|m| m.name);
        names.chain(kind.values.iter().copied()).map(str::to_owned).collect()
    }
}

impl Capabilities {
    /// Drivers whose properties are asked for: all that qvirt may ever put on a command line.
    pub const DRIVERS: &'static [&'static str] = &[
        "ich9-usb-ehci1",
        "ich9-usb-uhci1",
        "ich9-usb-uhci2",
        "ich9-usb-uhci3",
        "isa-serial",
        "nec-usb-xhci",
        "pcie-pci-bridge",
        "pcie-root-port",
        "piix3-usb-uhci",
        "qemu-xhci",
        "scsi-cd",
        "scsi-hd",
        "vhost-scsi-pci",
        "vhost-vdpa-device-pci",
        "vfio-pci",
        "usb-ehci",
        "usb-host",
        "usb-tablet",
        "virtconsole",
        "virtio-blk-pci",
        "virtio-net-pci",
        "virtio-scsi-pci",
        "virtio-serial-pci",
        "virtserialport",
    ];

    /// Distils QEMU's replies. Errors: a schema that is not the JSON that QEMU documents.
    pub fn from_replies(replies: &Replies<'_>) -> Result<Capabilities, serde_json::Error> {
        let schema = Schema::parse(replies.schema)?;
        let blockdev = schema.argument("blockdev-add");
        let file = blockdev.and_then(|b| schema.variant(b, "file"));
        let mut features = BTreeSet::new();
        for entry in schema.0.values().filter(|e| e.meta_type == "command") {
            features.extend(entry.features.iter().map(|f| format!("{}/{f}", entry.name)));
        }
        Ok(Capabilities {
            version: version_text(replies.version),
            commands: schema.names("command"),
            events: schema.names("event"),
            features,
            block_drivers: schema.values(blockdev, "driver"),
            aio: schema.values(file, "aio"),
            netdevs: schema.values(schema.argument("netdev_add"), "type"),
            io_error_actions: schema.values(schema.argument("BLOCK_IO_ERROR"), "action"),
            objects: names_in(replies.objects).map(str::to_owned).collect(),
            machines: machines(replies.machines),
            devices: replies.devices.iter().map(|(d, p)| (d.clone(), properties(p))).collect(),
        })
    }

    /// The properties of a driver, if this QEMU has it.
    pub fn driver(&self, driver: &str) -> Option<&Properties> {
        self.devices.get(driver)
    }

    /// Whether this QEMU's `driver` has `property`.
    pub fn has(&self, driver: &str, property: &str) -> bool {
        self.driver(driver).is_some_and(|p| p.contains_key(property))
    }

    /// Whether a JSON value is of the type that this QEMU names for a property, and in its range. QEMU 9.2 and later refuse a wrong one.
    pub fn accepts(&self, driver: &str, property: &str, value: &Value) -> bool {
        let below =
            |bits: u32| value.as_u64().is_some_and(|number| number.checked_shr(bits).unwrap_or(0) == 0);
        match self.driver(driver).and_then(|properties| properties.get(property)).map(String::as_str) {
            None => false,
            // Before 9.x a PCI address was called an int32, and yet was a text such as "04.0".
            Some("int32") if property == "addr" => value.is_string(),
            Some("bool") => value.is_boolean(),
            Some("uint8") => below(8),
            Some("uint16") => below(16),
            Some("uint32") => below(32),
            Some("uint64" | "size") => below(64),
            Some("int32") => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
            Some("int64" | "int") => value.is_i64() || value.is_u64(),
            Some(_) => value.is_string(),
        }
    }

    /// Whether `-device` takes JSON without losing DEVICE_DELETED. QEMU 6.2 took it and leaked a reference.
    pub fn json_device(&self) -> bool {
        self.features.contains("device_add/json-cli-hotplug")
    }

    /// Whether `-netdev` takes JSON. It came in one release with the netdev type `stream`, and the schema does not tell.
    pub fn json_netdev(&self) -> bool {
        self.netdevs.contains("stream")
    }
}

fn version_text(reply: &Value) -> String {
    let number = |part: &str| reply["qemu"][part].as_u64().unwrap_or(0);
    let package = reply["package"].as_str().unwrap_or("").trim();
    let version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
    if package.is_empty() { version } else { format!("{version} ({package})") }
}

fn names_in(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(|item| item["name"].as_str())
}

fn properties(reply: &Value) -> Properties {
    let entries = reply.as_array().into_iter().flatten();
    entries.filter_map(|p| Some((p["name"].as_str()?.to_owned(), p["type"].as_str()?.to_owned()))).collect()
}

fn machines(reply: &Value) -> BTreeMap<String, String> {
    let mut machines = BTreeMap::new();
    for machine in reply.as_array().into_iter().flatten() {
        let Some(name) = machine["name"].as_str() else { continue };
        machines.insert(name.to_owned(), name.to_owned());
        if let Some(alias) = machine["alias"].as_str() {
            machines.insert(alias.to_owned(), name.to_owned());
        }
    }
    machines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_of_the_type_and_in_the_range() {
        let kinds = [
            ("b", "bool"),
            ("u", "uint8"),
            ("w", "uint32"),
            ("i", "int32"),
            ("s", "OnOffAuto"),
            ("addr", "int32"),
        ];
        let properties = kinds.map(|(name, kind)| (name.to_owned(), kind.to_owned())).into();
        let qemu = Capabilities { devices: [("x".to_owned(), properties)].into(), ..Capabilities::default() };
        let accepts = |property, value: Value| qemu.accepts("x", property, &value);
        assert!(accepts("b", json!(true)) && !accepts("b", json!("on")));
        assert!(accepts("u", json!(255)) && !accepts("u", json!(256)) && !accepts("u", json!(-1)));
        assert!(accepts("w", json!(u32::MAX)) && !accepts("w", json!(u64::from(u32::MAX) + 1)));
        assert!(accepts("i", json!(-1)) && !accepts("i", json!(1_u64 << 31)));
        assert!(accepts("s", json!("on")) && !accepts("s", json!(true)));
        assert!(accepts("addr", json!("04.0")) && !accepts("addr", json!(4)));
        assert!(!accepts("none", json!(1)) && !qemu.accepts("y", "b", &json!(true)));
    }
}
