//! Between QEMU and rust-vmm's backend: every message passes as it is, descriptors and all, but the backend is first told that protocol
//! features are on.
//!
//! QEMU enables the rings of a NIC when it makes it, before it sends SET_FEATURES; the specification allows that, crate `vhost` 0.18 calls
//! it an "inactive feature" and hangs up. This file can go when it does not.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Request, flags and size of the payload, each 32 bits.
const HEADER: usize = 12;
/// The longest payload of the specification is far shorter; what is longer is no vhost-user.
const LONGEST: usize = 1 << 16;

/// SET_FEATURES (2) of protocol version 1, eight bytes: VHOST_USER_F_PROTOCOL_FEATURES alone.
fn protocol_features_on() -> Vec<u8> {
    let header = [2_u32, 1, 8].map(u32::to_ne_bytes).concat();
    [header, (1_u64 << 30).to_ne_bytes().to_vec()].concat()
}

/// Carries messages both ways until one side hangs up; blocks.
pub fn relay(qemu: &UnixStream, backend: &UnixStream) -> std::io::Result<()> {
    send(backend, &protocol_features_on(), &[])?;
    std::thread::scope(|scope| {
        scope.spawn(|| carry(backend, qemu));
        carry(qemu, backend)
    })
}

/// One direction. At its end both sides are shut, so that the other direction ends too.
fn carry(from: &UnixStream, to: &UnixStream) -> std::io::Result<()> {
    let carried = loop {
        match message(from) {
            Ok(Some((bytes, fds))) => {
                if let Err(error) = send(to, &bytes, &fds) {
                    break Err(error);
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    for side in [from, to] {
        // It fails only if that side has gone already.
        let _ = side.shutdown(std::net::Shutdown::Both);
    }
    carried
}

#[allow(unsafe_code)]
pub(crate) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// One message with its descriptors, which come with its first byte; `None` at the end.
fn message(mut from: &UnixStream) -> std::io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut header = [0; HEADER];
    let mut fds = Vec::new();
    let mut space = nix::cmsg_space!([RawFd; 16]);
    let mut slices = [IoSliceMut::new(&mut header)];
    let received =
        recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            fds.extend(numbers.into_iter().map(owned));
        }
    }
    let count = received.bytes;
    if count == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[count..])?;
    let size = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
    if size > LONGEST {
        return Err(std::io::Error::other(format!("a message of {size} bytes is no vhost-user")));
    }
    let mut bytes = header.to_vec();
    bytes.resize(HEADER + size, 0);
    from.read_exact(&mut bytes[HEADER..])?;
    Ok(Some((bytes, fds)))
}

fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> std::io::Result<()> {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let mut sent =
        sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    while sent < bytes.len() {
        let rest = IoSlice::new(&bytes[sent..]);
        sent += sendmsg::<()>(to.as_raw_fd(), &[rest], &[], MsgFlags::MSG_NOSIGNAL, None)?;
    }
    Ok(())
}
