//! A device as QEMU objects, and the two ways to print them: a command line and QMP commands. Nowhere else is either built.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::capabilities::Capabilities;
use crate::chardev::Chardev;
use crate::id::DeviceId;
use crate::keyval;

/// The members of one QEMU object, in the order in which people read them: driver, id, place, then the rest.
pub type Props = Map<String, Value>;

/// Members from a `json!({...})`; those that are null are left out, so that an option not asked for is not spelled.
pub(crate) fn props(object: Value) -> Props {
    match object {
        Value::Object(members) => members.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Props::new(),
    }
}

/// One QMP command with its arguments.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Call {
    /// The command's name.
    pub execute: &'static str,
    /// Its arguments, an object.
    pub arguments: Value,
}

impl Call {
    pub(crate) fn new(execute: &'static str, arguments: Value) -> Call {
        Call { execute, arguments }
    }
}

/// A device, lowered: what it stands on, in the order in which it is made, and what the guest sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// The device.
    pub id: DeviceId,
    /// Made before the frontend, first to last; deleted after it, last to first.
    pub backends: Vec<Backend>,
    /// What the guest sees. An iothread has none.
    pub frontend: Option<Frontend>,
    /// Further functions of the same slot, made after the frontend. Only what cannot be unplugged has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub companions: Vec<Frontend>,
}

/// A QEMU object that the guest does not see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Backend {
    /// `-object`, `object-add`.
    Object(Props),
    /// `-blockdev`, `blockdev-add`.
    Blockdev(Props),
    /// `-netdev`, `netdev_add`.
    Netdev(Netdev),
    /// `-chardev`, `chardev-add`.
    Chardev(Chardev),
    /// `-add-fd`, `add-fd`.
    Fdset(Fdset),
}

/// A descriptor that QEMU opens by a path: for properties that take nothing but a path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fdset {
    /// The set's number.
    pub number: u32,
    /// The descriptor's name.
    pub descriptor: String,
}

impl Fdset {
    /// The number of the first set that qvirt makes. QEMU counts from 0 where a client names no number.
    pub(crate) const FIRST: u32 = 1000;

    /// What stands for its descriptor where QEMU wants a path.
    pub fn path(&self) -> String {
        format!("/dev/fdset/{}", self.number)
    }
}

/// A netdev, with descriptors that have numbers on a command line and names in QMP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Netdev {
    /// All members but those of descriptors.
    pub props: Props,
    /// Members that name descriptors.
    pub descriptors: Vec<Descriptors>,
}

/// A member of a netdev that stands for open descriptors: `fd`, `fds`, `vhostfd` or `vhostfds`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Descriptors {
    /// The member.
    pub member: String,
    /// The names by which they are sent with `getfd`.
    pub names: Vec<String>,
}

/// The numbers that descriptors have in a QEMU that is about to be started, by name.
pub type Numbers = BTreeMap<String, i32>;

impl Netdev {
    fn members(&self, spell: impl Fn(&str) -> String) -> Props {
        let mut members = self.props.clone();
        for list in &self.descriptors {
            let words: Vec<String> = list.names.iter().map(|name| spell(name)).collect();
            members.insert(list.member.clone(), Value::from(words.join(":")));
        }
        members
    }
}

impl Backend {
    /// The option and its value. `numbers` has every descriptor of this backend: the launcher opened them before it printed.
    pub fn flag(&self, qemu: &Capabilities, numbers: &Numbers) -> [String; 2] {
        let json = |props: &Props| Value::Object(props.clone()).to_string();
        let (option, value) = match self {
            Backend::Object(props) => ("-object", json(props)),
            Backend::Blockdev(props) => ("-blockdev", json(props)),
            Backend::Netdev(netdev) => {
                let members = netdev.members(|name| spelled(numbers, name));
                ("-netdev", if qemu.json_netdev() { json(&members) } else { keyval::print(&members) })
            }
            Backend::Chardev(chardev) => ("-chardev", chardev.option()),
            Backend::Fdset(set) => {
                let Fdset { number, descriptor } = set;
                ("-add-fd", format!("fd={},set={number},opaque={descriptor}", spelled(numbers, descriptor)))
            }
        };
        [option.to_owned(), value]
    }

    /// The command that makes it in a running QEMU.
    pub fn add(&self) -> Call {
        match self {
            Backend::Object(props) => Call::new("object-add", Value::Object(props.clone())),
            Backend::Blockdev(props) => Call::new("blockdev-add", Value::Object(props.clone())),
            Backend::Netdev(netdev) => Call::new("netdev_add", Value::Object(netdev.members(str::to_owned))),
            Backend::Chardev(chardev) => chardev.add(),
            Backend::Fdset(set) => {
                Call::new("add-fd", json!({"fdset-id": set.number, "opaque": set.descriptor}))
            }
        }
    }

    /// The command that deletes it again.
    pub fn del(&self) -> Call {
        let text = |props: &Props, key: &str| props.get(key).cloned().unwrap_or_default();
        match self {
            Backend::Object(props) => Call::new("object-del", json!({"id": text(props, "id")})),
            Backend::Blockdev(props) => {
                Call::new("blockdev-del", json!({"node-name": text(props, "node-name")}))
            }
            Backend::Netdev(netdev) => Call::new("netdev_del", json!({"id": text(&netdev.props, "id")})),
            Backend::Chardev(chardev) => Call::new("chardev-remove", json!({"id": chardev.id})),
            Backend::Fdset(set) => Call::new("remove-fd", json!({"fdset-id": set.number})),
        }
    }

    /// Names of the descriptors that must have been sent to QEMU before it is made.
    pub fn descriptors(&self) -> impl Iterator<Item = &str> {
        let lists = match self {
            Backend::Netdev(netdev) => netdev.descriptors.as_slice(),
            // A set takes its descriptor along with the command.
            Backend::Object(_) | Backend::Blockdev(_) | Backend::Chardev(_) | Backend::Fdset(_) => &[],
        };
        lists.iter().flat_map(|list| list.names.iter().map(String::as_str))
    }
}

/// What the guest sees: the members of `-device` and `device_add`, `driver` and `id` among them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Frontend(pub Props);

impl Frontend {
    /// QEMU's id of it.
    pub fn id(&self) -> &str {
        self.0.get("id").and_then(Value::as_str).unwrap_or("")
    }

    /// QEMU's name of the driver.
    pub fn driver(&self) -> &str {
        self.0.get("driver").and_then(Value::as_str).unwrap_or("")
    }

    /// The properties: all members but the three that `device_add` itself reads.
    pub fn properties(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0.iter().filter(|(key, _)| !matches!(key.as_str(), "driver" | "id" | "bus"))
    }

    /// The property that stands for an open descriptor.
    const DESCRIPTOR: &'static str = "vhostfd";

    /// The name of the descriptor that must have been sent to QEMU before it is made.
    pub fn descriptor(&self) -> Option<&str> {
        self.0.get(Self::DESCRIPTOR)?.as_str()
    }

    /// The option and its value.
    pub fn flag(&self, qemu: &Capabilities, numbers: &Numbers) -> [String; 2] {
        let mut members = self.0.clone();
        if let Some(name) = self.descriptor() {
            members.insert(Self::DESCRIPTOR.to_owned(), Value::from(spelled(numbers, name)));
        }
        let value =
            if qemu.json_device() { Value::Object(members).to_string() } else { keyval::print(&members) };
        ["-device".to_owned(), value]
    }

    /// The command that plugs it in.
    pub fn add(&self) -> Call {
        Call::new("device_add", Value::Object(self.0.clone()))
    }
}

impl DeviceSpec {
    /// All that the guest sees of it.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.frontend.iter().chain(&self.companions)
    }

    /// The command that asks the guest to let go of it.
    pub fn device_del(&self) -> Call {
        Call::new("device_del", json!({"id": self.id.as_str()}))
    }

    /// The whole device as command-line words.
    pub fn argv(&self, qemu: &Capabilities, numbers: &Numbers) -> Vec<String> {
        let backends = self.backends.iter().flat_map(|b| b.flag(qemu, numbers));
        backends.chain(self.frontends().flat_map(|f| f.flag(qemu, numbers))).collect()
    }

    /// The whole device as the QMP commands of its hot-plug, `getfd` among them.
    pub fn calls(&self) -> Vec<Call> {
        let getfd = |name: &str| Call::new("getfd", json!({"fdname": name}));
        let mut calls = Vec::new();
        for backend in &self.backends {
            calls.extend(backend.descriptors().map(getfd));
            calls.push(backend.add());
        }
        for frontend in self.frontends() {
            calls.extend(frontend.descriptor().map(getfd));
            calls.push(frontend.add());
        }
        calls
    }

    /// Names of all descriptors that QEMU gets to know by a name of their own.
    pub fn named_descriptors(&self) -> impl Iterator<Item = &str> {
        let of_frontend = self.frontend.iter().filter_map(Frontend::descriptor);
        self.backends.iter().flat_map(Backend::descriptors).chain(of_frontend)
    }
}

/// A descriptor on a command line: its number, or its name where it has none yet.
fn spelled(numbers: &Numbers, name: &str) -> String {
    numbers.get(name).map_or_else(|| name.to_owned(), i32::to_string)
}
