//! `vduse-net NAME --mac MAC`: a vDPA network device without hardware, for one queue pair (VDUSE has no control queue, which more would
//! need), which `vdpa dev add name NAME mgmtdev vduse` takes as soon as it is set up. On its wire is the host of `vhost-user-net`:
//! 10.77.0.1, which answers ARP and ICMP echo. SIGTERM and SIGINT end it; the device goes with it if `vdpa dev del NAME` was run before.
//!
//! It needs root, the module vduse, and for QEMU the module vhost_vdpa.

use std::io::Result;

use devices::units::Mac;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tests::vduse::Nic;

const USAGE: &str = "usage: vduse-net NAME --mac MAC";

fn arguments(words: &[String]) -> std::result::Result<(&str, Mac), String> {
    match words {
        [name, option, mac] if option == "--mac" => {
            let mac = mac.parse().map_err(|error| format!("--mac: {error}"))?;
            Ok((name, mac))
        }
        _ => Err(USAGE.to_owned()),
    }
}

fn run(name: &str, mac: Mac) -> Result<()> {
    let ending = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    ending.thread_block()?;
    let ending = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC)?;
    let mut nic = Nic::create(name, mac)?;
    nic.serve(&ending).and(nic.destroy())
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (name, mac) = arguments(&words).unwrap_or_else(|wrong| {
        eprintln!("vduse-net: {wrong}");
        std::process::exit(2);
    });
    if let Err(error) = run(name, mac) {
        eprintln!("vduse-net: {name}: {error}");
        std::process::exit(1);
    }
}
