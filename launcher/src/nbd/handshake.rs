//! A client's way to an export: fixed newstyle, one option after the other until one of them begins the transmission.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::wire::{
    CLIENT_FIXED, CLIENT_NO_ZEROES, Fields, GREETING, MAX_PAYLOAD, OptionHead, answer, info, option,
    option_reply,
};
use super::{AnyExport, Cut, Exports};

/// The longest data of an option; a name has 4096 bytes at most.
const OPTION: u32 = 64 << 10;

/// The context in which block status is told, and its id.
const CONTEXT: &str = "base:allocation";
const CONTEXT_ID: u32 = 1;

/// What a client ended up with.
pub(super) struct Chosen {
    pub name: String,
    pub export: Arc<dyn AnyExport>,
    pub structured: bool,
    /// The id of `base:allocation`, if the client may ask for block status.
    pub context: Option<u32>,
}

/// Greets a client and answers its options.
pub(super) async fn negotiate(
    stream: &mut UnixStream,
    exports: &watch::Receiver<Exports>,
) -> Result<Chosen, Cut> {
    stream.write_all(&GREETING).await?;
    let flags = stream.read_u32().await?;
    if flags & CLIENT_FIXED == 0 || flags & !(CLIENT_FIXED | CLIENT_NO_ZEROES) != 0 {
        return Err(Cut::Nonsense(format!("client flags {flags:#x}")));
    }
    let mut talk = Talk {
        exports: exports.clone(),
        structured: false,
        context_of: None,
        padded: flags & CLIENT_NO_ZEROES == 0,
    };
    loop {
        let mut head = [0; OptionHead::SIZE];
        stream.read_exact(&mut head).await?;
        let head = OptionHead::parse(&head)
            .ok_or_else(|| Cut::Nonsense("an option without its magic number".into()))?;
        if head.length > OPTION {
            return Err(Cut::Nonsense(format!("an option of {} bytes", head.length)));
        }
        let mut data = vec![0; head.length as usize];
        stream.read_exact(&mut data).await?;
        let said = talk.option(head.option, &data)?;
        stream.write_all(&said.bytes).await?;
        match said.then {
            Then::Next => {}
            Then::Abort => return Err(Cut::Aborted),
            Then::Transmit(chosen) => return Ok(chosen),
        }
    }
}

/// What is said to an option, and what comes after it.
struct Said {
    bytes: Vec<u8>,
    then: Then,
}

enum Then {
    Next,
    Abort,
    Transmit(Chosen),
}

/// What has been agreed on so far.
struct Talk {
    exports: watch::Receiver<Exports>,
    structured: bool,
    /// The export that `base:allocation` was asked for.
    context_of: Option<String>,
    /// An old client wants zeros after the answer to EXPORT_NAME.
    padded: bool,
}

impl Talk {
    fn option(&mut self, number: u32, data: &[u8]) -> Result<Said, Cut> {
        let next = |bytes| Said { bytes, then: Then::Next };
        let reply = |answer| next(option_reply(number, answer, &[]));
        Ok(match number {
            option::EXPORT_NAME => return self.export_name(data),
            option::ABORT => Said { then: Then::Abort, ..reply(answer::ACK) },
            option::LIST if data.is_empty() => next(self.list()),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(answer::ACK)
            }
            option::LIST | option::STRUCTURED_REPLY => reply(answer::ERR_INVALID),
            option::GO | option::INFO => self.go(number, data).unwrap_or_else(|| reply(answer::ERR_INVALID)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => next(
                self.context(number, data).unwrap_or_else(|| option_reply(number, answer::ERR_INVALID, &[])),
            ),
            _ => reply(answer::ERR_UNSUP),
        })
    }

    fn find(&self, name: &str) -> Option<Arc<dyn AnyExport>> {
        self.exports.borrow().get(name).cloned()
    }

    fn choose(&self, name: &str, export: Arc<dyn AnyExport>) -> Chosen {
        let status = self.context_of.as_deref() == Some(name) && export.features().block_status;
        Chosen {
            name: name.to_owned(),
            export,
            structured: self.structured,
            context: status.then_some(CONTEXT_ID),
        }
    }

    /// The oldest way in, which has no way to say no.
    fn export_name(&self, data: &[u8]) -> Result<Said, Cut> {
        let name = String::from_utf8_lossy(data).into_owned();
        let Some(export) = self.find(&name) else { return Err(Cut::UnknownExport(name)) };
        let mut bytes = export.size().to_be_bytes().to_vec();
        bytes.extend(export.features().flags().to_be_bytes());
        if self.padded {
            bytes.extend([0; 124]);
        }
        Ok(Said { bytes, then: Then::Transmit(self.choose(&name, export)) })
    }

    fn list(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for name in self.exports.borrow().keys() {
            let entry = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
            bytes.extend(option_reply(option::LIST, answer::SERVER, &entry));
        }
        bytes.extend(option_reply(option::LIST, answer::ACK, &[]));
        bytes
    }

    /// GO and INFO: what there is to know about an export, and with GO the transmission. `None` if it cannot be read.
    fn go(&self, number: u32, data: &[u8]) -> Option<Said> {
        let mut fields = Fields(data);
        let name = fields.text()?;
        // What a client wants to know beside the size is a wish, and the block sizes are of use to all.
        let wishes = fields.u16()?;
        fields.bytes(usize::from(wishes) * 2).filter(|_| fields.0.is_empty())?;
        let Some(export) = self.find(name) else {
            return Some(Said { bytes: option_reply(number, answer::ERR_UNKNOWN, &[]), then: Then::Next });
        };
        let features = export.features();
        let mut size = info::EXPORT.to_be_bytes().to_vec();
        size.extend(export.size().to_be_bytes());
        size.extend(features.flags().to_be_bytes());
        let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for field in [features.min_block, features.preferred_block, MAX_PAYLOAD] {
            blocks.extend(field.to_be_bytes());
        }
        let mut bytes = option_reply(number, answer::INFO, &size);
        bytes.extend(option_reply(number, answer::INFO, &blocks));
        bytes.extend(option_reply(number, answer::ACK, &[]));
        let go = number == option::GO;
        Some(Said { bytes, then: if go { Then::Transmit(self.choose(name, export)) } else { Then::Next } })
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT: `base:allocation` is all there is. `None` if it cannot be read or comes too early.
    fn context(&mut self, number: u32, data: &[u8]) -> Option<Vec<u8>> {
        let set = number == option::SET_META_CONTEXT;
        if set {
            self.context_of = None;
        }
        let mut fields = Fields(data);
        let name = fields.text().filter(|_| self.structured)?;
        let count = fields.u32()?;
        let mut wanted = count == 0 && !set;
        for _ in 0..count {
            let query = fields.text()?;
            wanted |= query == CONTEXT || (query == "base:" && !set);
        }
        if !fields.0.is_empty() {
            return None;
        }
        let Some(export) = self.find(name) else {
            return Some(option_reply(number, answer::ERR_UNKNOWN, &[]));
        };
        let mut bytes = Vec::new();
        if wanted && export.features().block_status {
            let id = if set { CONTEXT_ID } else { 0 };
            let entry = [&id.to_be_bytes()[..], CONTEXT.as_bytes()].concat();
            bytes.extend(option_reply(number, answer::META_CONTEXT, &entry));
            if set {
                self.context_of = Some(name.to_owned());
            }
        }
        bytes.extend(option_reply(number, answer::ACK, &[]));
        Some(bytes)
    }
}
