//! NICs: virtio-net on user networking, a tap, a bridge of Linux or Open vSwitch (with vhost-net or without), or vhost-user.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::address::{Address, PciSeat};
use crate::capabilities::Capabilities;
use crate::chardev::{Chardev, Stream};
use crate::host::{HostNeed, Switch};
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{Backend, Descriptors, DeviceSpec, Frontend, Netdev, props};
use crate::units::Mac;

/// Table `[[nic]]`. Exactly one of `user`, `tap` (alone), `bridge` and `vhost_user` says where it leads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Default: `net0`, `net1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// QEMU's own NAT; needs no privileges.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user: bool,
    /// Ports of the host that lead into the guest, in QEMU's notation: `tcp:127.0.0.1:2222-:22`. With `user` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<String>,
    /// A tap: an existing one, or the name of the one to make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// A bridge that a tap is plugged into.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Whether `bridge` is an Open vSwitch bridge.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub openvswitch: bool,
    /// VLAN tag of the Open vSwitch port: 1 to 4094.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Whether the host's kernel moves the packets (vhost-net). With `tap` or `bridge`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
    /// Path of the unix socket on which a vhost-user backend listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<String>,
    /// Queue pairs. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Default: derived from the names of VM and device, always the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Place in the boot order (PXE); 0 first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// PCI seat. Default: the first free root port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seat: Option<PciSeat>,
}

const MAX_QUEUES: u16 = 256;

/// Where the packets go, once the keys were found to agree.
enum Path<'a> {
    User,
    Tap { switch: Option<Switch> },
    VhostUser { socket: &'a str },
}

impl NicConfig {
    fn path(&self) -> Option<Path<'_>> {
        match (self.user, &self.tap, &self.bridge, &self.vhost_user) {
            (true, None, None, None) => Some(Path::User),
            (false, Some(_), None, None) => Some(Path::Tap { switch: None }),
            (false, _, Some(bridge), None) => {
                let switch =
                    Switch { bridge: bridge.clone(), openvswitch: self.openvswitch, vlan: self.vlan };
                Some(Path::Tap { switch: Some(switch) })
            }
            (false, None, None, Some(socket)) => Some(Path::VhostUser { socket }),
            _ => None,
        }
    }

    fn mac(&self, vm: &str, id: &DeviceId) -> Mac {
        self.mac.unwrap_or_else(|| Mac::derived(vm, id.as_str()))
    }

    fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// What can be said against it without looking at the seats.
    pub(crate) fn check(
        &self,
        id: &DeviceId,
        shared_memory: bool,
        qemu: &Capabilities,
    ) -> Result<(), Refusal> {
        let misplaced = |key, with, next| Err(Refusal::Misplaced { id: id.clone(), key, with, next });
        let value = |key, value: String, rule: &str| {
            Err(Refusal::Value { id: id.clone(), key, value, rule: rule.to_owned() })
        };
        let next = "write exactly one of user = true, tap, bridge or vhost_user (tap beside bridge names the tap to make)";
        let Some(path) = self.path() else {
            let nothing =
                !self.user && self.tap.is_none() && self.bridge.is_none() && self.vhost_user.is_none();
            return match nothing {
                true => {
                    Err(Refusal::Missing { id: id.clone(), key: "user, tap, bridge or vhost_user", next })
                }
                false => misplaced("user, tap, bridge, vhost_user", "one another", next),
            };
        };
        let tap = matches!(path, Path::Tap { .. });
        match self {
            _ if !self.forward.is_empty() && !self.user => {
                return misplaced("forward", "this kind of NIC", "it needs user = true");
            }
            _ if self.vhost && !tap => {
                return misplaced("vhost", "this kind of NIC", "vhost-net needs tap or bridge");
            }
            _ if self.openvswitch && self.bridge.is_none() => {
                return misplaced(
                    "openvswitch",
                    "a NIC without `bridge`",
                    "name the Open vSwitch bridge: bridge = \"...\"",
                );
            }
            _ if self.vlan.is_some() && !self.openvswitch => {
                return misplaced("vlan", "a bridge that is not Open vSwitch's", "write openvswitch = true");
            }
            _ if self.user && self.queues() > 1 => {
                return misplaced("queues", "user networking", "it has one queue");
            }
            Self { vlan: Some(vlan), .. } if !(1..=4094).contains(vlan) => {
                return value("vlan", vlan.to_string(), "a VLAN tag is 1 to 4094");
            }
            Self { queues: Some(queues), .. } if !(1..=MAX_QUEUES).contains(queues) => {
                return value("queues", queues.to_string(), "write 1 to 256");
            }
            _ => {}
        }
        for (key, name) in [("tap", &self.tap), ("bridge", &self.bridge)] {
            if let Some(name) = name.as_ref().filter(|n| !is_interface_name(n)) {
                return value(
                    key,
                    format!("{name:?}"),
                    "an interface name has 1 to 15 characters, no `/`, `:` and no blanks",
                );
            }
        }
        if matches!(path, Path::VhostUser { .. }) && !shared_memory {
            return Err(Refusal::PrivateMemory { id: id.clone(), what: "vhost-user" });
        }
        let kind = self.netdev_type();
        if !qemu.netdevs.contains(kind) {
            let version = qemu.version.clone();
            return Err(Refusal::NotInQemu {
                id: id.clone(),
                kind: "netdev",
                name: kind.to_owned(),
                version,
            });
        }
        Ok(())
    }

    fn netdev_type(&self) -> &'static str {
        match self.path() {
            Some(Path::User) | None => "user",
            Some(Path::Tap { .. }) => "tap",
            Some(Path::VhostUser { .. }) => "vhost-user",
        }
    }

    /// The tap's name: the given one, or one derived from the names of VM and device, always the same.
    fn tap_name(&self, vm: &str, id: &DeviceId) -> String {
        // 24 bits of each order of the names: 14 characters, where the kernel allows 15.
        let half = |a: &str, b: &str| Mac::derived(a, b).to_string().replace(':', "").split_off(6);
        let derived = || format!("qv{}{}", half(vm, id.as_str()), half(id.as_str(), vm));
        self.tap.clone().unwrap_or_else(derived)
    }

    fn descriptors(&self, id: &DeviceId, role: &str) -> Vec<String> {
        (0..usize::from(self.queues())).map(|queue| id.descriptor(role, queue)).collect()
    }

    /// What it needs of the host.
    pub(crate) fn needs(&self, vm: &str, id: &DeviceId) -> Vec<HostNeed> {
        let Some(Path::Tap { switch }) = self.path() else { return Vec::new() };
        let name = self.tap_name(vm, id);
        let mac = self.mac(vm, id);
        let mut needs = vec![HostNeed::Tap { name, descriptors: self.descriptors(id, "tap"), switch, mac }];
        if self.vhost {
            needs.push(HostNeed::VhostNet { descriptors: self.descriptors(id, "vhost") });
        }
        needs
    }

    /// The NIC as QEMU's objects.
    pub(crate) fn lower(&self, vm: &str, id: &DeviceId, address: &Address) -> DeviceSpec {
        let mut backends = Vec::new();
        if let Some(Path::VhostUser { socket }) = self.path() {
            let stream = Stream::UnixConnect(socket.to_owned());
            backends.push(Backend::Chardev(Chardev { id: id.chardev(), stream, log: None }));
        }
        backends.push(Backend::Netdev(self.netdev(id)));
        let Address::Pci(seat) = address else { unreachable!("a NIC claims a PCI seat and gets one") };
        let queues = self.queues();
        let frontend = props(json!({
            "driver": "virtio-net-pci",
            "id": id.as_str(),
            "bus": seat.bus(),
            "addr": seat.addr(),
            "netdev": id.netdev(),
            "mac": self.mac(vm, id).to_string(),
            "mq": (queues > 1).then_some(true),
            // Two a queue pair, one for the configuration, one for the control queue.
            "vectors": (queues > 1).then_some(2 * u32::from(queues) + 2),
            "bootindex": self.bootindex,
            // The option ROM serves PXE alone, and comes in a package that a small host does not have.
            "romfile": self.bootindex.is_none().then_some(""),
        }));
        DeviceSpec { id: id.clone(), backends, frontend: Some(Frontend(frontend)), companions: Vec::new() }
    }

    fn netdev(&self, id: &DeviceId) -> Netdev {
        let forward: Vec<_> = self.forward.iter().map(|rule| json!({"str": rule})).collect();
        let vhost_user = matches!(self.path(), Some(Path::VhostUser { .. }));
        let members = props(json!({
            "type": self.netdev_type(),
            "id": id.netdev(),
            "hostfwd": (!forward.is_empty()).then_some(forward),
            "vhost": self.vhost.then_some(true),
            "chardev": vhost_user.then(|| id.chardev()),
            "queues": (vhost_user && self.queues() > 1).then(|| self.queues()),
        }));
        let mut descriptors = Vec::new();
        if self.netdev_type() == "tap" {
            descriptors.push(self.descriptor_list(id, "tap", "fd", "fds"));
            if self.vhost {
                descriptors.push(self.descriptor_list(id, "vhost", "vhostfd", "vhostfds"));
            }
        }
        Netdev { props: members, descriptors }
    }

    fn descriptor_list(&self, id: &DeviceId, role: &str, one: &str, many: &str) -> Descriptors {
        let member = if self.queues() > 1 { many } else { one };
        Descriptors { member: member.to_owned(), names: self.descriptors(id, role) }
    }
}

fn is_interface_name(name: &str) -> bool {
    let fits = (1..=15).contains(&name.len()) && name != "." && name != "..";
    fits && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}
