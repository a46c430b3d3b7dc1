//! Taps: Ethernet interfaces whose other end is a descriptor, one for each queue, which QEMU gets.
//!
//! Owns opening and making them. A tap that qvirt makes is **not persistent**: the kernel removes it together with its
//! last descriptor, so its inverse is to drop [`Tap`] (and QEMU's copies end with QEMU). Does not touch MTU, state or
//! bridge ([`super::link`], [`super::ovs`]).

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use super::link::{self, Kind, LinkError, LinkName, Tun};

/// A tap's name is any interface's name.
pub type TapName = LinkName;

/// The kernel's limit (`MAX_TAP_QUEUES` in drivers/net/tun.c).
pub const MAX_QUEUES: u16 = 256;

const NODE: &str = "/dev/net/tun";

/// Whether [`open`] may make a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    /// The tap must exist.
    Never,
    /// It is made if it does not exist; needs CAP_NET_ADMIN.
    IfMissing,
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    /// One descriptor for each queue, closed on exec until the launcher passes them on.
    pub fds: Vec<OwnedFd>,
    /// Its name.
    pub name: TapName,
    /// The kernel's number of it.
    pub ifindex: u32,
    /// Whether this call made it, so that it goes with its last descriptor.
    pub created: bool,
}

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No queue, or more than the kernel has.
    #[error(
        "tap {name}: {queues} queues are not possible, the kernel takes 1 to {MAX_QUEUES}: correct `queues`"
    )]
    Queues {
        /// The tap.
        name: TapName,
        /// What was asked.
        queues: u16,
    },
    /// It does not exist and may not be made.
    #[error(
        "there is no tap {name}: make it (`ip tuntap add {name} mode tap user $USER`), or let qvirt make it by naming a bridge instead"
    )]
    Missing {
        /// The tap.
        name: TapName,
    },
    /// Another kind of interface has the name.
    #[error("{name} is {kind}, not a tap: give the name of a tap, or one that is free")]
    NotATap {
        /// The name asked for.
        name: TapName,
        /// What it is.
        kind: Kind,
    },
    /// Several queues on a tap made for one.
    #[error(
        "tap {name} has a single queue and {queues} are wanted: set `queues = 1`, or make it anew with `ip tuntap add {name} mode tap multi_queue`"
    )]
    SingleQueue {
        /// The tap.
        name: TapName,
        /// What was asked.
        queues: u16,
    },
    /// Somebody has its queue, or made it at the same moment.
    #[error(
        "tap {name} is busy: another process has it open (`grep -l {name} /proc/*/fdinfo/*` finds it); stop that one, or name another tap"
    )]
    Busy {
        /// The tap.
        name: TapName,
        /// The system's error.
        source: io::Error,
    },
    /// Its queues are all taken.
    #[error(
        "tap {name} has no queue left for queue {queue}: the kernel allows {MAX_QUEUES} in all; lower `queues`"
    )]
    NoQueueLeft {
        /// The tap.
        name: TapName,
        /// Which queue could not be opened, counted from 1.
        queue: u16,
        /// The system's error.
        source: io::Error,
    },
    /// Not allowed.
    #[error(
        "no permission to {step} tap {name}: making one needs CAP_NET_ADMIN (root), opening one that exists needs to be its user (`ip tuntap add {name} mode tap user $USER`)"
    )]
    Permission {
        /// `open` or `make`.
        step: &'static str,
        /// The tap.
        name: TapName,
        /// The system's error.
        source: io::Error,
    },
    /// The tun driver's node cannot be opened.
    #[error(
        "cannot open {NODE} for tap {name}: load the driver (`modprobe tun`) and see that you may read and write the node"
    )]
    Node {
        /// The tap.
        name: TapName,
        /// The system's error.
        source: io::Error,
    },
    /// Anything else the kernel says.
    #[error("cannot open queue {queue} of tap {name}")]
    Kernel {
        /// The tap.
        name: TapName,
        /// Which queue, counted from 1.
        queue: u16,
        /// The system's error.
        source: io::Error,
    },
    /// What the kernel knows of the name could not be asked.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Opens the tap `name` with `queues` queues (Ethernet frames behind a virtio header, no packet information), and makes
/// it first if it does not exist and `create` allows. On an error nothing is left behind.
pub fn open(name: &TapName, queues: u16, create: Create) -> Result<Tap, TapError> {
    if !(1..=MAX_QUEUES).contains(&queues) {
        return Err(TapError::Queues { name: name.clone(), queues });
    }
    let existing = match link::find(name.as_str())? {
        Some(link) => Some(as_tap(name, queues, link.kind)?),
        None if create == Create::Never => return Err(TapError::Missing { name: name.clone() }),
        None => None,
    };
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // One queue of a multi-queue tap is opened with the flag as well, or the kernel refuses it.
    if queues > 1 || existing.is_some_and(|tun| tun.multi_queue) {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let created = existing.is_none();
    let fds = (1..=queues)
        .map(|queue| {
            // Whoever makes the same name between our look and now shall not be joined.
            let exclusive = if created && queue == 1 { libc::IFF_TUN_EXCL } else { 0 };
            open_queue(name, queue, flags | exclusive, created)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let ifindex = link::show(name.as_str())?.index;
    Ok(Tap { fds, name: name.clone(), ifindex, created })
}

/// That what exists under the name is a tap with room for `queues`.
fn as_tap(name: &TapName, queues: u16, kind: Kind) -> Result<Tun, TapError> {
    match kind {
        Kind::Tun(tun) if tun.tap => {
            if queues > 1 && !tun.multi_queue {
                return Err(TapError::SingleQueue { name: name.clone(), queues });
            }
            // The kernel would give us queues beside another VM's, and each would get half of the packets.
            if tun.queues > 0 {
                let source = io::Error::from_raw_os_error(libc::EBUSY);
                return Err(TapError::Busy { name: name.clone(), source });
            }
            Ok(tun)
        }
        kind => Err(TapError::NotATap { name: name.clone(), kind }),
    }
}

fn open_queue(name: &TapName, queue: u16, flags: libc::c_int, making: bool) -> Result<OwnedFd, TapError> {
    let node = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(NODE)
        .map_err(|source| TapError::Node { name: name.clone(), source })?;
    attach(&node, name, flags).map_err(|source| explain(source, name, queue, making))?;
    Ok(node.into())
}

/// Names the reason behind a refused `TUNSETIFF`.
fn explain(source: io::Error, name: &TapName, queue: u16, making: bool) -> TapError {
    let name = name.clone();
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => TapError::Busy { name, source },
        Some(libc::E2BIG) => TapError::NoQueueLeft { name, queue, source },
        Some(libc::EPERM | libc::EACCES) => {
            TapError::Permission { step: if making { "make" } else { "open" }, name, source }
        }
        _ => TapError::Kernel { name, queue, source },
    }
}

/// `TUNSETIFF`: ties the open node to the interface `name`.
#[expect(unsafe_code, reason = "an ioctl with a structure has no safe form")]
fn attach(node: &File, name: &TapName, flags: libc::c_int) -> io::Result<()> {
    let text = CString::new(name.as_str()).expect("a link name holds no control character");
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(text.as_bytes_with_nul()) {
        *to = from.cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (flags as u16).cast_signed();
    // SAFETY: the descriptor is open and `request` is a whole `ifreq` that lives through the call, as TUNSETIFF wants.
    let result = unsafe { libc::ioctl(node.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> TapName {
        text.parse().expect("a good name")
    }

    #[test]
    fn queues_have_bounds() {
        for queues in [0, MAX_QUEUES + 1] {
            let error = open(&name("qvirt-t"), queues, Create::Never).expect_err("out of bounds").to_string();
            assert!(error.contains("1 to 256"), "{error}");
        }
    }

    #[test]
    fn a_missing_tap_is_not_made_unasked() {
        let error = open(&name("qvirt-none"), 1, Create::Never).expect_err("there is none").to_string();
        assert!(error.contains("ip tuntap add qvirt-none"), "{error}");
    }

    #[test]
    fn another_interface_of_the_name_is_said() {
        let error = open(&name("lo"), 1, Create::IfMissing).expect_err("the loopback").to_string();
        assert!(error.contains("lo is a network card, not a tap"), "{error}");
    }

    #[test]
    fn what_exists_must_be_a_tap_with_enough_queues() {
        let single = Tun { tap: true, ..Tun::default() };
        let multi = Tun { multi_queue: true, ..single };
        assert_eq!(as_tap(&name("t"), 1, Kind::Tun(single)).expect("one fits"), single);
        assert_eq!(as_tap(&name("t"), 4, Kind::Tun(multi)).expect("four fit"), multi);
        assert!(matches!(
            as_tap(&name("t"), 2, Kind::Tun(single)),
            Err(TapError::SingleQueue { queues: 2, .. })
        ));
        let shared = Tun { queues: 1, ..multi };
        assert!(matches!(as_tap(&name("t"), 2, Kind::Tun(shared)), Err(TapError::Busy { .. })));
        assert!(matches!(as_tap(&name("t"), 1, Kind::Tun(Tun::default())), Err(TapError::NotATap { .. })));
    }

    #[test]
    fn each_refusal_has_its_next_step() {
        for (errno, making, word) in [
            (libc::EBUSY, false, "another process has it open"),
            (libc::E2BIG, false, "lower `queues`"),
            (libc::EPERM, true, "no permission to make tap t"),
            (libc::EPERM, false, "no permission to open tap t"),
            (libc::EINVAL, false, "cannot open queue 3 of tap t"),
        ] {
            let error = explain(io::Error::from_raw_os_error(errno), &name("t"), 3, making).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
