//! Names, the loopback that every machine has, and how the kernel's refusals read. What needs root is in the lab.

use std::error::Error as _;

use super::*;

#[test]
fn names_the_kernel_takes_are_taken() {
    for name in ["tap0", "a", "br-int", "vnet0.100", "fifteen-bytes-x", "tap_é"] {
        assert_eq!(name.parse::<LinkName>().expect(name).as_str(), name);
    }
}

#[test]
fn names_the_kernel_or_a_tool_would_misread_are_refused() {
    for (name, word) in [
        ("", "empty"),
        ("sixteen-bytes-xx", "15 bytes"),
        ("éééééééé", "15 bytes"),
        (".", "folders"),
        ("..", "folders"),
        ("-rf", "option"),
        ("a/b", "/ : %"),
        ("tap%d", "/ : %"),
        ("eth0:1", "/ : %"),
        ("tap 0", "whitespace"),
        ("tap\u{b}", "whitespace"),
        ("tap\u{7f}", "control"),
    ] {
        let error = name.parse::<LinkName>().expect_err(name).to_string();
        assert!(error.contains(word), "{name}: {error}");
    }
}

#[test]
fn the_loopback_is_seen_and_is_no_bridge() {
    let link = show("lo").expect("every network namespace has one");
    assert_eq!((link.index, link.name.as_str(), &link.kind), (1, "lo", &Kind::Physical));
    assert!(link.mtu >= 1500, "{link:?}");
    let error = bridge("lo").expect_err("no bridge").to_string();
    assert!(error.contains("lo is a network card, not a Linux bridge"), "{error}");
}

#[test]
fn a_missing_interface_is_named() {
    assert_eq!(find("qvirt-none").expect("a look-up needs no rights"), None);
    let error = bridge("qvirt-none").expect_err("there is none");
    assert!(error.is_gone());
    assert!(error.to_string().contains("there is no network interface qvirt-none"), "{error}");
}

#[test]
fn a_refusal_names_the_step_and_carries_the_kernels_words() {
    // No interface has this index, so whoever runs this, nothing changes.
    let error = set_mtu(0x7fff_fff0, 1500).expect_err("there is none");
    assert!(
        error.to_string().contains("cannot set the MTU 1500 on the network interface with index"),
        "{error}"
    );
    let source = error.source().expect("the kernel's answer").to_string();
    assert!(source.starts_with("the kernel says: "), "{source}");
}

#[test]
fn a_change_names_only_what_it_changes() {
    let mut message = LinkMessage::default();
    message.header.index = 7;
    message.attributes.push(LinkAttribute::Controller(3));
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::SetLink(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let words: Vec<u32> =
        bytes[16..].chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
    // ifinfomsg: family, index, flags, change; then IFLA_MASTER (10), 8 bytes long.
    assert_eq!(words, [0, 7, 0, 0, 8 | 10 << 16, 3]);
}

#[test]
fn the_hosts_side_of_a_tap_sorts_above_every_card() {
    assert_eq!(host_side([0x52, 0x54, 0, 1, 2, 3]), [0xfe, 0x54, 0, 1, 2, 3]);
}
