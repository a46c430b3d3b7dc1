//! Network interfaces of this host, seen and changed by rtnetlink: what a name is, up and down, MTU, address, and which
//! Linux bridge an interface belongs to.
//!
//! Owns the messages of one request and its answer, and the kernel's own error text (the *extended acknowledgement*, see
//! [`ack`]). Does not open taps ([`super::tap`]), does not know Open vSwitch beyond recognising it ([`super::ovs`]), and
//! keeps no state: each call opens a socket of its own in the caller's network namespace, which costs some 20 us.
//!
//! | change | inverse |
//! |---|---|
//! | [`set_up`] | [`set_down`] |
//! | [`set_master`] | none: what qvirt puts into a bridge it made, and deletes |
//! | [`set_mtu`], [`set_address`] | the same, with what [`show`] said before |
//!
//! [`delete`] is itself an inverse: of whatever made the interface.

use std::{fmt, io};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

pub use self::name::{BadLinkName, LinkName};

pub mod ack;
mod name;
pub mod vf;

#[cfg(test)]
mod tests;

/// What an interface is, in the kernel's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A Linux bridge.
    Bridge,
    /// A tun or tap interface.
    Tun(Tun),
    /// The local port of an Open vSwitch bridge in the kernel's datapath.
    OpenVSwitch,
    /// Any other virtual kind (`veth`, `vlan`, ...).
    Other(String),
    /// A network card, or the loopback: the kernel names no kind.
    Physical,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Bridge => "a Linux bridge",
            Kind::Tun(Tun { tap: true, .. }) => "a tap",
            Kind::Tun(Tun { tap: false, .. }) => "a tun (layer 3) interface",
            Kind::OpenVSwitch => "an Open vSwitch bridge",
            Kind::Other(kind) => return write!(f, "a {kind} interface"),
            Kind::Physical => "a network card",
        })
    }
}

/// Facts of a tun or tap interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tun {
    /// Whether it carries Ethernet frames (tap) rather than IP packets (tun).
    pub tap: bool,
    /// Whether it was made with `multi_queue`.
    pub multi_queue: bool,
    /// Whether it outlives its last descriptor.
    pub persistent: bool,
    /// How many queues somebody holds open; known only of one with `multi_queue`.
    pub queues: u32,
}

/// One interface as the kernel shows it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number of it, unique in its network namespace and never soon re-used.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Index of the bridge (or bond, or datapath) it is a port of.
    pub master: Option<u32>,
    /// Hardware address; empty where there is none.
    pub address: Vec<u8>,
}

/// Why an interface could not be seen or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No interface of that name.
    #[error(
        "there is no network interface {name} on this host: make it first, or correct the name (`ip link` lists them)"
    )]
    Missing {
        /// The name asked for.
        name: String,
    },
    /// A Linux bridge was wanted.
    #[error(
        "{name} is {kind}, not a Linux bridge: name a bridge (`ip link show type bridge` lists them), or say `openvswitch = true` if it is Open vSwitch's"
    )]
    NotABridge {
        /// The name asked for.
        name: String,
        /// What it is.
        kind: Kind,
    },
    /// A Linux bridge was wanted and this is Open vSwitch's.
    #[error("{name} is an Open vSwitch bridge: say `openvswitch = true` beside `bridge = \"{name}\"`")]
    IsOpenVSwitch {
        /// The name asked for.
        name: String,
    },
    /// The kernel refused a request.
    #[error("cannot {step}{}", next_step(source))]
    Refused {
        /// What was tried, with the interface's name.
        step: String,
        /// The kernel's answer.
        source: ack::Refused,
    },
    /// The netlink socket itself failed.
    #[error("cannot {step}: the rtnetlink socket failed")]
    Socket {
        /// What was tried.
        step: String,
        /// The system's error.
        source: io::Error,
    },
    /// The kernel's answer could not be read.
    #[error("cannot {step}: the kernel's answer was not understood ({reason})")]
    Answer {
        /// What was tried.
        step: String,
        /// What was wrong with it.
        reason: String,
    },
}

impl LinkError {
    /// Whether the interface is simply no longer there, which an undo counts as done.
    pub fn is_gone(&self) -> bool {
        match self {
            LinkError::Missing { .. } => true,
            LinkError::Refused { source, .. } => source.errno() == libc::ENODEV,
            _ => false,
        }
    }
}

fn next_step(refused: &ack::Refused) -> &'static str {
    match refused.errno() {
        libc::EPERM | libc::EACCES => {
            ": it needs CAP_NET_ADMIN; run as root, or use a tap that was made for this user"
        }
        _ => "",
    }
}

/// The interface called `name`, or `None` when there is none.
pub fn find(name: &str) -> Result<Option<Link>, LinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let step = format!("look up the network interface {name}");
    match request(RouteNetlinkMessage::GetLink(message), 0, step) {
        Ok(Some(answer)) => Ok(Some(read(answer))),
        Ok(None) => Ok(None),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The interface called `name`; [`LinkError::Missing`] when there is none.
pub fn show(name: &str) -> Result<Link, LinkError> {
    find(name)?.ok_or_else(|| LinkError::Missing { name: name.to_owned() })
}

/// The Linux bridge called `name`: its index for [`set_master`] and its MTU for the taps that join it. Anything else of
/// that name is an error that says what it is.
pub fn bridge(name: &str) -> Result<Link, LinkError> {
    let link = show(name)?;
    match link.kind {
        Kind::Bridge => Ok(link),
        Kind::OpenVSwitch => Err(LinkError::IsOpenVSwitch { name: link.name }),
        kind => Err(LinkError::NotABridge { name: link.name, kind }),
    }
}

/// Brings the interface up. Inverse: [`set_down`].
pub fn set_up(index: u32) -> Result<(), LinkError> {
    change(
        index,
        |link| format!("bring up {link}"),
        |message| {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        },
    )
}

/// Takes the interface down. Inverse: [`set_up`].
pub fn set_down(index: u32) -> Result<(), LinkError> {
    change(index, |link| format!("take down {link}"), |message| message.header.change_mask = LinkFlags::Up)
}

/// Sets the MTU, in bytes. Inverse: the same with the MTU it had.
pub fn set_mtu(index: u32, mtu: u32) -> Result<(), LinkError> {
    change(
        index,
        |link| format!("set the MTU {mtu} on {link}"),
        |message| message.attributes.push(LinkAttribute::Mtu(mtu)),
    )
}

/// Sets the hardware address. Inverse: the same with the address it had.
pub fn set_address(index: u32, address: [u8; 6]) -> Result<(), LinkError> {
    change(
        index,
        |link| format!("set the hardware address of {link}"),
        |message| {
            message.attributes.push(LinkAttribute::Address(address.to_vec()));
        },
    )
}

/// The address a tap should have on the host's side, for the MAC its guest has: the same with the first byte `fe`.
///
/// A Linux bridge without an address of its own takes the lowest among its ports, and its peers lose it for a while when
/// that changes; an address beginning with `fe` is above any card's. It may not be the guest's own, or the bridge takes
/// the guest's frames for its own.
pub fn host_side(guest: [u8; 6]) -> [u8; 6] {
    let [_, rest @ ..] = guest;
    let [a, b, c, d, e] = rest;
    [0xfe, a, b, c, d, e]
}

/// Makes the interface a port of the Linux bridge called `bridge`.
pub fn set_master(index: u32, bridge_name: &str) -> Result<(), LinkError> {
    let bridge = bridge(bridge_name)?;
    change(
        index,
        |link| format!("join {link} to the bridge {bridge_name}"),
        |message| {
            message.attributes.push(LinkAttribute::Controller(bridge.index));
        },
    )
}

/// Removes the interface from the host: the inverse of having made it.
pub fn delete(index: u32) -> Result<(), LinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let step = format!("delete {}", label(index));
    request(RouteNetlinkMessage::DelLink(message), NLM_F_ACK, step).map(drop)
}

/// Changes what `fill` says of the interface `index`, and nothing else; `step` names it for an error.
fn change(
    index: u32,
    step: impl FnOnce(&str) -> String,
    fill: impl FnOnce(&mut LinkMessage),
) -> Result<(), LinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    fill(&mut message);
    let step = step(&label(index));
    request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, step).map(drop)
}

/// What people call the interface `index`.
fn label(index: u32) -> String {
    match nix::net::if_::if_indextoname(index) {
        // An index without an interface comes back as an error from some C libraries and as an empty name from others.
        Ok(name) if !name.is_empty() => format!("the network interface {}", name.to_string_lossy()),
        _ => format!("the network interface with index {index}, which is gone"),
    }
}

/// Sends one request and reads its one answer: a link, or an acknowledgement.
fn request(message: RouteNetlinkMessage, flags: u16, step: String) -> Result<Option<LinkMessage>, LinkError> {
    let bytes =
        exchange(message, flags).map_err(|source| LinkError::Socket { step: step.clone(), source })?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
        .map_err(|error| LinkError::Answer { step: step.clone(), reason: error.to_string() })?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        NetlinkPayload::Error(error) => match ack::Refused::read(answer.header.flags, &error) {
            Some(source) => Err(LinkError::Refused { step, source }),
            None => Ok(None),
        },
        other => Err(LinkError::Answer { step, reason: format!("netlink message {}", other.message_type()) }),
    }
}

/// One datagram out, one in, with extended acknowledgements on.
fn exchange(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<u8>> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.header.sequence_number = 1;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);

    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // Both are hints to the kernel; one too old for them answers without its text.
    let _ = socket.set_ext_ack(true);
    let _ = socket.set_cap_ack(true);
    socket.send(&bytes, 0)?;
    loop {
        match socket.recv_from_full() {
            Ok((answer, _)) => return Ok(answer),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The facts of a link message.
fn read(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: Kind::Physical,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        master: None,
        address: Vec::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(master) => link.master = Some(master),
            LinkAttribute::Address(address) => link.address = address,
            LinkAttribute::LinkInfo(infos) => link.kind = read_kind(&infos),
            _ => {}
        }
    }
    link
}

fn read_kind(infos: &[LinkInfo]) -> Kind {
    let mut kind = Kind::Physical;
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => kind = Kind::Bridge,
            LinkInfo::Kind(InfoKind::Tun) => kind = Kind::Tun(Tun::default()),
            LinkInfo::Kind(InfoKind::Other(name)) if name == "openvswitch" => kind = Kind::OpenVSwitch,
            LinkInfo::Kind(other) => kind = Kind::Other(other.to_string()),
            LinkInfo::Data(InfoData::Tun(facts)) => kind = Kind::Tun(read_tun(facts)),
            _ => {}
        }
    }
    kind
}

/// The attributes of `IFLA_INFO_DATA` of a tun (linux/if_link.h): one byte each, the counts four.
fn read_tun(facts: &[InfoTun]) -> Tun {
    const TYPE: u16 = 3;
    const PERSIST: u16 = 6;
    const MULTI_QUEUE: u16 = 7;
    const QUEUES: u16 = 8;
    const DISABLED_QUEUES: u16 = 9;
    let mut tun = Tun::default();
    for fact in facts {
        let mut value = vec![0; fact.value_len()];
        fact.emit_value(&mut value);
        match (fact.kind(), value.as_slice()) {
            (TYPE, &[kind]) => tun.tap = libc::c_int::from(kind) == libc::IFF_TAP,
            (PERSIST, &[on]) => tun.persistent = on != 0,
            (MULTI_QUEUE, &[on]) => tun.multi_queue = on != 0,
            (QUEUES | DISABLED_QUEUES, &[a, b, c, d]) => tun.queues += u32::from_ne_bytes([a, b, c, d]),
            _ => {}
        }
    }
    tun
}
