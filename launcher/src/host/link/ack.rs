//! The kernel's answer to a refused netlink request: its error number and its own words.
//!
//! Owns reading the *extended acknowledgement* (Documentation/userspace-api/netlink/intro.rst), the same for rtnetlink
//! and generic netlink. Sends nothing.
//!
//! ```text
//! nlmsghdr (flags) | error: i32 | nlmsghdr of the request [| its payload, unless NLM_F_CAPPED] | attributes, if NLM_F_ACK_TLVS
//! ```

use std::{fmt, io};

use netlink_packet_core::{ErrorMessage, NLM_F_ACK_TLVS, NLM_F_CAPPED, NlasIterator};

/// Length of a netlink message's header, in bytes.
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the text.
const TEXT: u16 = 1;

/// What the kernel refused, in its words: the error number's text and, where it gave one, the reason.
#[derive(Debug)]
pub struct Refused {
    errno: i32,
    text: Option<String>,
}

impl Refused {
    /// Reads an error message whose netlink header has `flags`; `None` if it says that all went well.
    pub fn read(flags: u16, message: &ErrorMessage) -> Option<Refused> {
        let errno = message.code?.get().abs();
        Some(Refused { errno, text: text(flags, &message.header) })
    }

    /// The error number, positive, as in `errno.h`.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The kernel's own reason, where it gave one.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.errno);
        match &self.text {
            Some(text) => write!(f, "the kernel says: {text} ({error})"),
            None => write!(f, "the kernel says: {error}"),
        }
    }
}

impl std::error::Error for Refused {}

/// The text among the attributes after the copy of the request that `echo` begins with.
fn text(flags: u16, echo: &[u8]) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let request = match flags & NLM_F_CAPPED {
        0 => usize::try_from(u32::from_ne_bytes(*echo.first_chunk()?)).ok()?.next_multiple_of(4),
        _ => HEADER,
    };
    let attributes = NlasIterator::new(echo.get(request..)?);
    let text = attributes.filter_map(Result::ok).find(|attribute| attribute.kind() == TEXT)?;
    let text = text.value().split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroI32;

    use super::*;

    /// An attribute with a text, and before it one with an offset, as the kernel sends them.
    fn attributes(text: &[u8]) -> Vec<u8> {
        let mut bytes = vec![8, 0, 2, 0, 20, 0, 0, 0];
        let length = u16::try_from(4 + text.len()).expect("a short text");
        bytes.extend(length.to_ne_bytes());
        bytes.extend([1, 0]);
        bytes.extend(text);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(code: i32, header: Vec<u8>) -> ErrorMessage {
        let mut message = ErrorMessage::default();
        message.code = NonZeroI32::new(code);
        message.header = header;
        message
    }

    #[test]
    fn the_text_is_found_behind_a_capped_request() {
        let mut echo = vec![0xff; HEADER];
        echo.extend(attributes(b"Device is already a bridge port\0"));
        let refused = Refused::read(NLM_F_CAPPED | NLM_F_ACK_TLVS, &message(-16, echo)).expect("an error");
        assert_eq!(refused.errno(), 16);
        assert_eq!(refused.text(), Some("Device is already a bridge port"));
        assert!(refused.to_string().contains("already a bridge port (Device or resource busy"), "{refused}");
    }

    #[test]
    fn the_text_is_found_behind_a_whole_request() {
        let mut echo = 30u32.to_ne_bytes().to_vec();
        echo.resize(32, 0xff);
        echo.extend(attributes(b"mtu less than device minimum\0"));
        let refused = Refused::read(NLM_F_ACK_TLVS, &message(-22, echo)).expect("an error");
        assert_eq!(refused.text(), Some("mtu less than device minimum"));
    }

    #[test]
    fn no_flag_no_text_and_nothing_is_read_past_the_end() {
        let mut echo = vec![0; HEADER];
        echo.extend(attributes(b"stray\0"));
        assert_eq!(Refused::read(0, &message(-1, echo)).expect("an error").text(), None);
        let mut lying = u32::MAX.to_ne_bytes().to_vec();
        lying.resize(HEADER, 0);
        assert_eq!(Refused::read(NLM_F_ACK_TLVS, &message(-1, lying)).expect("an error").text(), None);
        let truncated = vec![0; 3];
        assert_eq!(Refused::read(NLM_F_ACK_TLVS, &message(-1, truncated)).expect("an error").text(), None);
    }

    #[test]
    fn an_acknowledgement_is_no_error() {
        assert!(Refused::read(0, &message(0, vec![0; HEADER])).is_none());
    }
}
