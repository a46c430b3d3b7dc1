//! A vhost-user backend for tests: the program `vhost-user-net` as a process that ends with its handle, and the host it plays,
//! 10.77.0.1, as a function from a frame to its answer and on a pair of rings.

#[cfg(test)]
mod ping;
mod relay;
mod rings;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) use relay::owned;
pub use relay::relay;
pub use rings::answer;

use crate::fake::program_beside_the_test;
use crate::qemu::QemuVersion;

/// The address that answers ARP and ping.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The host's MAC address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x01];

/// A running backend. Killed and reaped on drop; its socket is removed.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens: the `socket` of a `vhost-user` NIC.
    pub socket: PathBuf,
    process: Child,
}

impl Backend {
    /// Starts it in `dir` and waits until it listens. Panics, saying why, when it does not within ten seconds.
    pub fn start(dir: &Path) -> Backend {
        let socket = dir.join("vhost-user-net.sock");
        let program = program_beside_the_test("vhost-user-net");
        let process = Command::new(&program).arg(&socket).stdin(Stdio::null()).spawn();
        let process = process.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut backend = Backend { socket, process };
        let until = Instant::now() + Duration::from_secs(10);
        while !backend.socket.exists() {
            if let Ok(Some(status)) = backend.process.try_wait() {
                panic!("vhost-user-net ended before it listened on {}: {status}", backend.socket.display());
            }
            assert!(Instant::now() < until, "vhost-user-net does not listen on {}", backend.socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        backend
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What a guest with a vhost-user NIC needs on its kernel's command line. QEMU 7.2 without KVM ends with SIGSEGV when a guest masks an MSI-X vector of a vhost-user device (seen with 7.2 of Debian 12, not with
/// 10.0), so its guest is told
/// to do without; that can go with 7.2.
pub fn guest_words(version: QemuVersion) -> &'static str {
    match version {
        QemuVersion::V7_2 => "pci=nomsi",
        QemuVersion::V10_0 => "",
    }
}

/// What the host says to an Ethernet frame: the answer to an ARP request for [`ADDRESS`] or to an ICMP echo request sent to it. To anything
/// else it is silent.
pub fn reply_to(frame: &[u8]) -> Option<Vec<u8>> {
    let mut answer = match frame.get(12..14)? {
        [0x08, 0x06] => arp(frame)?,
        [0x08, 0x00] => echo(frame)?,
        _ => return None,
    };
    let (to, from) = answer.split_at_mut(6);
    to.copy_from_slice(frame.get(6..12)?);
    from.get_mut(..6)?.copy_from_slice(&MAC);
    Some(answer)
}

fn arp(frame: &[u8]) -> Option<Vec<u8>> {
    // RFC 826: Ethernet, IPv4, request; sender's MAC and address, target's MAC and address.
    let request = frame.get(14..42)?;
    if request[..8] != [0, 1, 8, 0, 6, 4, 0, 1] || request[24..28] != ADDRESS.octets() {
        return None;
    }
    let mut answer = frame.to_vec();
    answer[21] = 2;
    answer[22..28].copy_from_slice(&MAC);
    answer[28..32].copy_from_slice(&ADDRESS.octets());
    answer[32..42].copy_from_slice(&request[8..18]);
    Some(answer)
}

fn echo(frame: &[u8]) -> Option<Vec<u8>> {
    let packet = frame.get(14..)?;
    let header = usize::from(packet.first()? & 0xf) * 4;
    let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let message = packet.get(header..length)?;
    // ICMP, to us, and a request.
    if *packet.get(9)? != 1
        || packet.get(16..20)? != ADDRESS.octets()
        || *message.first()? != 8
        || message.len() < 8
    {
        return None;
    }
    let mut answer = frame[..14 + length].to_vec();
    let (from, to) = (packet.get(12..16)?, packet.get(16..20)?);
    answer[26..30].copy_from_slice(to);
    answer[30..34].copy_from_slice(from);
    // Swapping the addresses leaves the header's checksum as it is.
    let message = &mut answer[14 + header..];
    message[0] = 0;
    message[2..4].fill(0);
    let sum = checksum(message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    Some(answer)
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];

    fn frame(to: [u8; 6], kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
        [&to[..], &GUEST, &kind, payload].concat()
    }

    #[test]
    fn an_arp_request_is_answered_with_our_address() {
        let request =
            [&[0, 1, 8, 0, 6, 4, 0, 1][..], &GUEST, &[10, 77, 0, 2], &[0; 6], &[10, 77, 0, 1]].concat();
        let answer = reply_to(&frame([0xff; 6], [8, 6], &request)).expect("an answer");
        let expected = [
            &GUEST[..],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &MAC,
            &[10, 77, 0, 1],
            &GUEST,
            &[10, 77, 0, 2],
        ];
        assert_eq!(answer, expected.concat());
        let other = [&request[..24], &[10, 77, 0, 3]].concat();
        assert_eq!(reply_to(&frame([0xff; 6], [8, 6], &other)), None, "another host's address");
    }

    #[test]
    fn a_ping_is_echoed_with_a_right_checksum() {
        let message = [8, 0, 0, 0, 1, 2, 0, 1, b'a', b'b', b'c'];
        let header = [0x45, 0, 0, 31, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1];
        // Short frames are padded; the padding is no part of the message.
        let request = frame(MAC, [8, 0], &[&header[..], &message, &[0; 20]].concat());
        let answer = reply_to(&request).expect("an answer");
        assert_eq!(answer.len(), 14 + 31);
        assert_eq!(answer[26..34], [10, 77, 0, 1, 10, 77, 0, 2]);
        assert_eq!((answer[34], &answer[38..]), (0, &message[4..]));
        assert_eq!(checksum(&answer[34..]), 0, "a message with its own checksum sums up to nothing");
        assert_eq!(reply_to(&frame(MAC, [0x86, 0xdd], &header)), None, "IPv6");
        assert_eq!(reply_to(&request[..20]), None, "a torn frame");
    }
}
