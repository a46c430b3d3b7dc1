//! Networks of the lab host: a Linux bridge and an Open vSwitch bridge, each with the host's own address in it, for guests to ping.

use std::path::Path;

use super::{Done, make_folder, modprobe, program};

/// The Linux bridge.
pub const BRIDGE: Network = Network { bridge: "lab0", address: "192.168.77.1", guest: "192.168.77.2" };
/// The Open vSwitch bridge, untagged.
pub const SWITCH: Network = Network { bridge: "ovs0", address: "192.168.78.1", guest: "192.168.78.2" };
/// What can be reached in that bridge with the tag [`TAG`] only.
pub const TAGGED: Network = Network { bridge: "ovs0", address: "192.168.79.1", guest: "192.168.79.2" };
/// The VLAN of [`TAGGED`].
pub const TAG: u16 = 100;

/// The host's end of [`TAGGED`].
const TAGGED_PORT: &str = "lab-vlan";

/// A network that has the host in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The bridge's name.
    pub bridge: &'static str,
    /// The host's address, of 24 bits.
    pub address: &'static str,
    /// An address that a guest may take.
    pub guest: &'static str,
}

pub(super) fn prepare() -> Done<()> {
    modprobe(&["bridge", "openvswitch"])?;
    program("ip", &["link", "add", BRIDGE.bridge, "type", "bridge"])?;
    join(BRIDGE.bridge, BRIDGE.address)?;
    start_switch()?;
    let Network { bridge, .. } = SWITCH;
    let tag = format!("tag={TAG}");
    let internal = ["set", "Interface", TAGGED_PORT, "type=internal"];
    let port = ["add-br", bridge, "--", "add-port", bridge, TAGGED_PORT, &tag, "--"];
    program("ovs-vsctl", &[&port[..], &internal[..]].concat())?;
    join(bridge, SWITCH.address)?;
    join(TAGGED_PORT, TAGGED.address)
}

/// The database and the switch, as two daemons in their own folders of this host.
fn start_switch() -> Done<()> {
    const DATABASE: &str = "/etc/openvswitch/conf.db";
    const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
    const SOCKET: &str = "punix:/var/run/openvswitch/db.sock";
    for folder in ["/etc/openvswitch", "/var/run/openvswitch", "/var/log/openvswitch"] {
        make_folder(Path::new(folder))?;
    }
    program("ovsdb-tool", &["create", DATABASE, SCHEMA])?;
    program(
        "ovsdb-server",
        &["--detach", "--pidfile", "--log-file", &format!("--remote={SOCKET}"), DATABASE],
    )?;
    program("ovs-vsctl", &["--no-wait", "init"])?;
    program("ovs-vswitchd", &["--detach", "--pidfile", "--log-file"]).map(drop)
}

fn join(interface: &str, address: &str) -> Done<()> {
    program("ip", &["address", "add", &format!("{address}/24"), "dev", interface])?;
    program("ip", &["link", "set", interface, "up"]).map(drop)
}

pub(super) fn list() -> String {
    format!(
        "Linux bridge  {} {}\nOpen vSwitch  {} {}, VLAN {TAG} {}\n",
        BRIDGE.bridge, BRIDGE.address, SWITCH.bridge, SWITCH.address, TAGGED.address
    )
}
