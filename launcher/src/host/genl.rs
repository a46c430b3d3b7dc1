//! Generic netlink: a request to a family of the kernel, and its answers as attributes.
//!
//! Owns the framing of messages and the kernel's own error text. What a family's commands and attributes mean is the business of who asks
//! ([`super::vdpa`]). Keeps no state: each request opens a socket of its own.

use std::collections::BTreeMap;
use std::io;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NlasIterator,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

use super::link::ack::Refused;

/// Length of a netlink message's header, in bytes.
const HEADER: usize = 16;
/// Length of the header that generic netlink puts behind it: command, version, two spare bytes.
const GENERIC_HEADER: usize = 4;
/// The family that knows the others, `GENL_ID_CTRL`, and what it is asked (linux/genetlink.h).
const CONTROL: Family = Family { id: 0x10, version: 1 };
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum GenlError {
    /// The kernel refused it.
    #[error("{0}")]
    Refused(Refused),
    /// The socket failed.
    #[error("the generic netlink socket failed: {0}")]
    Socket(#[from] io::Error),
    /// The answer is no netlink.
    #[error("the kernel's answer was not understood: {0}")]
    Answer(&'static str),
}

impl GenlError {
    /// The kernel's error number, positive; 0 where it is no refusal.
    pub fn errno(&self) -> i32 {
        match self {
            GenlError::Refused(refused) => refused.errno(),
            _ => 0,
        }
    }
}

/// The attributes of one message: kind to bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Attributes(BTreeMap<u16, Vec<u8>>);

impl Attributes {
    fn read(bytes: &[u8]) -> Attributes {
        let all = NlasIterator::new(bytes).filter_map(Result::ok);
        Attributes(all.map(|nla| (nla.kind(), nla.value().to_vec())).collect())
    }

    /// An attribute's bytes.
    pub fn bytes(&self, kind: u16) -> Option<&[u8]> {
        self.0.get(&kind).map(Vec::as_slice)
    }

    /// A text, which ends with a null byte.
    pub fn text(&self, kind: u16) -> Option<String> {
        let text = self.bytes(kind)?.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// An unsigned number of whatever width.
    pub fn number(&self, kind: u16) -> Option<u64> {
        Some(match *self.bytes(kind)? {
            [a] => a.into(),
            [a, b] => u16::from_ne_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]).into(),
            [a, b, c, d, e, f, g, h] => u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            _ => return None,
        })
    }
}

/// One attribute of a request.
#[derive(Clone, Debug)]
pub struct Attribute(u16, Vec<u8>);

impl Attribute {
    /// A text.
    pub fn text(kind: u16, text: &str) -> Attribute {
        Attribute(kind, text.bytes().chain([0]).collect())
    }

    /// Bytes as they are.
    pub fn bytes(kind: u16, bytes: &[u8]) -> Attribute {
        Attribute(kind, bytes.to_vec())
    }
}

/// A family, as this kernel numbers it.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    id: u16,
    version: u8,
}

impl Family {
    /// The family of that name; `None` where the kernel, or its module, does not have it.
    ///
    /// # Errors
    /// The kernel could not be asked.
    pub fn find(name: &str, version: u8) -> Result<Option<Family>, GenlError> {
        let answers = match CONTROL.request(GET_FAMILY, 0, &[Attribute::text(FAMILY_NAME, name)]) {
            Err(error) if error.errno() == libc::ENOENT => return Ok(None),
            answers => answers?,
        };
        let id = answers.first().and_then(|found| found.number(FAMILY_ID));
        let id =
            id.and_then(|id| u16::try_from(id).ok()).ok_or(GenlError::Answer("a family without a number"))?;
        Ok(Some(Family { id, version }))
    }

    /// Everything that a command lists.
    ///
    /// # Errors
    /// The kernel's, or of the socket.
    pub fn dump(self, command: u8) -> Result<Vec<Attributes>, GenlError> {
        self.request(command, NLM_F_DUMP, &[])
    }

    /// The one answer of a command.
    ///
    /// # Errors
    /// The kernel's, or of the socket.
    pub fn get(self, command: u8, attributes: &[Attribute]) -> Result<Attributes, GenlError> {
        Ok(self.request(command, 0, attributes)?.into_iter().next().unwrap_or_default())
    }

    /// A command that changes something; it is done when this returns.
    ///
    /// # Errors
    /// The kernel's, or of the socket.
    pub fn change(self, command: u8, attributes: &[Attribute]) -> Result<(), GenlError> {
        self.request(command, NLM_F_ACK, attributes).map(drop)
    }

    fn request(
        self,
        command: u8,
        flags: u16,
        attributes: &[Attribute],
    ) -> Result<Vec<Attributes>, GenlError> {
        let socket = Socket::new(NETLINK_GENERIC)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Both are hints to the kernel; one too old for them answers without its text.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        socket.send(&self.message(command, flags, attributes), 0)?;
        let mut answers = Vec::new();
        loop {
            let bytes = match socket.recv_from_full() {
                Ok((bytes, _)) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if read(&bytes, flags, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    fn message(self, command: u8, flags: u16, attributes: &[Attribute]) -> Vec<u8> {
        let mut body = vec![command, self.version, 0, 0];
        for Attribute(kind, value) in attributes {
            // No value that we send is near 64 KiB.
            body.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(self.id.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        // The sequence number, and our own port, which the kernel fills in.
        bytes.extend(1u32.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(body);
        bytes
    }
}

/// Reads the messages of a datagram; whether they were the last.
fn read(mut bytes: &[u8], flags: u16, answers: &mut Vec<Attributes>) -> Result<bool, GenlError> {
    while let Some((header, _)) = bytes.split_first_chunk::<HEADER>() {
        let [a, b, c, d, e, f, g, h, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let (kind, its_flags) = (u16::from_ne_bytes([e, f]), u16::from_ne_bytes([g, h]));
        let message = bytes.get(..length).filter(|_| length >= HEADER);
        let body = &message.ok_or(GenlError::Answer("a message that is cut off"))?[HEADER..];
        match kind {
            NLMSG_ERROR | NLMSG_DONE => {
                // A list may end with no number at all.
                let (code, echo) = body
                    .split_first_chunk()
                    .map_or((0, body), |(code, echo)| (i32::from_ne_bytes(*code), echo));
                let mut error = ErrorMessage::default();
                error.code = std::num::NonZeroI32::new(code);
                error.header = echo.to_vec();
                return Refused::read(its_flags, &error)
                    .map_or(Ok(true), |refused| Err(GenlError::Refused(refused)));
            }
            _ => answers.push(Attributes::read(body.get(GENERIC_HEADER..).unwrap_or_default())),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    // Only a list and a change say when they are over.
    Ok(flags & (NLM_F_DUMP | NLM_F_ACK) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_its_control_family_and_not_ours() {
        let control = Family::find("nlctrl", 1).expect("the kernel answers").expect("it has it");
        assert_eq!(control.id, CONTROL.id);
        assert!(Family::find("qvirt-none", 1).expect("the kernel answers").is_none());
        let listed = control.dump(GET_FAMILY).expect("a list");
        assert!(listed.iter().any(|family| family.text(FAMILY_NAME).as_deref() == Some("nlctrl")));
    }

    #[test]
    fn answers_are_read_and_damage_is_not_read_past() {
        let sent = CONTROL.message(7, 0, &[Attribute::text(4, "vdpa0"), Attribute::bytes(9, &[0, 1])]);
        let mut answers = Vec::new();
        assert!(read(&sent, 0, &mut answers).expect("whole"));
        assert_eq!((answers[0].text(4).as_deref(), answers[0].number(9)), (Some("vdpa0"), Some(256)));
        assert!(!read(&sent, NLM_F_DUMP, &mut answers).expect("more is to come"));
        assert!(matches!(read(&sent[..sent.len() - 4], 0, &mut answers), Err(GenlError::Answer(_))));
        let refused = |code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes.resize(36, 0);
            read(&bytes, NLM_F_ACK, &mut Vec::new())
        };
        assert!(refused(0).expect("done"));
        assert_eq!(refused(-libc::EBUSY).expect_err("busy").errno(), libc::EBUSY);
    }
}
