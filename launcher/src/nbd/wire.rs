//! The bytes of NBD, as its protocol document has them: constants, what a client sends, what it is answered. No I/O.

use super::bytes::Bytes;
use super::export::{Errno, Extent, Features, Reply, Request};

/// Bytes that one request may read or write; longer ones are answered EINVAL. QEMU asks for 32 MiB at most.
pub const MAX_PAYLOAD: u32 = 32 << 20;

pub(super) const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";
/// Client's flags: fixed newstyle, and no padding after EXPORT_NAME.
pub(super) const CLIENT_FIXED: u32 = 1;
pub(super) const CLIENT_NO_ZEROES: u32 = 2;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Options of the handshake.
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(super) mod answer {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of a request.
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;

impl Features {
    /// The transmission flags.
    pub(super) fn flags(self) -> u16 {
        let bits = [
            (true, 0),
            (self.read_only, 1),
            (self.flush, 2),
            (self.flush, 3),
            (self.trim, 5),
            (self.write_zeroes, 6),
            (self.fast_zero, 11),
        ];
        bits.iter().map(|&(on, bit)| u16::from(on) << bit).sum()
    }

    /// Whether it takes requests of this kind: EPERM for a change of what cannot be changed, EINVAL for what was not offered.
    fn allow(self, command: Command) -> Result<(), Errno> {
        let (offered, changes) = match command {
            Command::Read => (true, false),
            Command::Write => (true, true),
            Command::Flush => (self.flush, false),
            Command::Trim => (self.trim, true),
            Command::WriteZeroes => (self.write_zeroes, true),
            Command::BlockStatus => (self.block_status, false),
            Command::Disconnect | Command::Other => (false, false),
        };
        match (offered, self.read_only && changes) {
            (_, true) => Err(Errno::Perm),
            (false, _) => Err(Errno::Invalid),
            (true, false) => Ok(()),
        }
    }
}

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OptionHead {
    pub option: u32,
    pub length: u32,
}

impl OptionHead {
    pub const SIZE: usize = 16;

    /// `None` if it is not one.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Option<OptionHead> {
        let mut fields = Fields(bytes);
        (fields.u64()? == OPTION_MAGIC)
            .then_some(())
            .and_then(|()| Some(OptionHead { option: fields.u32()?, length: fields.u32()? }))
    }
}

/// A reply to an option.
pub(super) fn option_reply(option: u32, answer: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for field in [option, answer, data.len() as u32] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

/// Reads big-endian fields one after the other; `None` when there are too few bytes.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text with its length before it.
    pub fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        std::str::from_utf8(self.bytes(length as usize)?).ok()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
    Other,
}

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RequestHead {
    flags: u16,
    pub command: Command,
    pub cookie: u64,
    offset: u64,
    length: u32,
}

impl RequestHead {
    pub const SIZE: usize = 28;

    /// `None` if it is not one.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Option<RequestHead> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        let flags = fields.u16()?;
        let command = match fields.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => Command::Other,
        };
        Some(RequestHead {
            flags,
            command,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Bytes that follow it, whether the request is good or not.
    pub fn payload(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Bytes of memory that it takes to answer it.
    pub fn memory(&self) -> u32 {
        if matches!(self.command, Command::Read | Command::Write) { self.length } else { 0 }
    }

    /// Whether the client wants to know about one extent only.
    pub fn one_extent(&self) -> bool {
        self.flags & REQ_ONE != 0
    }

    /// Whether an export of that size and kind can be asked this, before its payload is read.
    pub fn check(&self, size: u64, features: Features) -> Result<(), Errno> {
        features.allow(self.command)?;
        let known = match self.command {
            Command::WriteZeroes => FUA | NO_HOLE | FAST_ZERO,
            Command::BlockStatus => FUA | REQ_ONE,
            // Meaningless with a read or a flush, and allowed.
            _ => FUA,
        };
        if self.flags & !known != 0 {
            return Err(Errno::Invalid);
        }
        if self.command == Command::Flush {
            return Ok(());
        }
        let block = u64::from(features.min_block);
        if self.length == 0
            || self.memory() > MAX_PAYLOAD
            || !self.offset.is_multiple_of(block)
            || !u64::from(self.length).is_multiple_of(block)
        {
            return Err(Errno::Invalid);
        }
        match self.offset.checked_add(u64::from(self.length)) {
            Some(end) if end <= size => Ok(()),
            _ if matches!(self.command, Command::Write | Command::WriteZeroes) => Err(Errno::NoSpace),
            _ => Err(Errno::Invalid),
        }
    }

    /// The request; `data` is its payload. `None` for those that no export is asked.
    pub fn request(&self, data: Bytes) -> Option<Request> {
        let RequestHead { offset, length, .. } = *self;
        let has = |flag| self.flags & flag != 0;
        Some(match self.command {
            Command::Read => Request::Read { offset, length },
            Command::Write => Request::Write { offset, data, fua: has(FUA) },
            Command::Flush => Request::Flush,
            Command::Trim => Request::Trim { offset, length, fua: has(FUA) },
            Command::WriteZeroes => Request::WriteZeroes {
                offset,
                length,
                fua: has(FUA),
                may_trim: !has(NO_HOLE),
                only_fast: has(FAST_ZERO),
            },
            Command::BlockStatus => Request::BlockStatus { offset, length },
            Command::Disconnect | Command::Other => return None,
        })
    }

    /// The head of the reply, and the bytes that follow it. `context` is the id under which the client knows `base:allocation`.
    pub fn reply(&self, structured: bool, context: u32, outcome: Result<Reply, Errno>) -> (Vec<u8>, Bytes) {
        // A reply of another form would be read as the beginning of the next one.
        let outcome = outcome.and_then(|reply| if self.fits(&reply) { Ok(reply) } else { Err(Errno::Io) });
        if structured {
            return self.chunk(context, outcome);
        }
        let (error, data) = match outcome {
            Ok(Reply::Data(data)) => (0, data),
            Ok(_) => (0, Bytes::default()),
            Err(errno) => (errno as u32, Bytes::default()),
        };
        let mut head = SIMPLE_MAGIC.to_be_bytes().to_vec();
        head.extend(error.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        (head, data)
    }

    fn fits(&self, reply: &Reply) -> bool {
        match (self.command, reply) {
            (Command::Read, Reply::Data(data)) => data.len() == self.length as usize,
            (Command::BlockStatus, Reply::Extents(extents)) => !extents.is_empty(),
            (Command::Read | Command::BlockStatus, _) => false,
            (_, reply) => *reply == Reply::Done,
        }
    }

    /// A structured reply of one chunk.
    fn chunk(&self, context: u32, outcome: Result<Reply, Errno>) -> (Vec<u8>, Bytes) {
        const DONE: u16 = 1;
        const NONE: u16 = 0;
        const OFFSET_DATA: u16 = 1;
        const BLOCK_STATUS: u16 = 5;
        const ERROR: u16 = 1 << 15 | 1;
        let (kind, fields, data) = match outcome {
            Ok(Reply::Done) => (NONE, Vec::new(), Bytes::default()),
            Ok(Reply::Data(data)) => (OFFSET_DATA, self.offset.to_be_bytes().to_vec(), data),
            Ok(Reply::Extents(extents)) => {
                (BLOCK_STATUS, context.to_be_bytes().to_vec(), Bytes::from(&*self.extents(&extents)))
            }
            // The number, and a text of no bytes.
            Err(errno) => (ERROR, [&(errno as u32).to_be_bytes()[..], &[0, 0]].concat(), Bytes::default()),
        };
        let mut head = CHUNK_MAGIC.to_be_bytes().to_vec();
        head.extend(DONE.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        head.extend(((fields.len() + data.len()) as u32).to_be_bytes());
        head.extend(fields);
        (head, data)
    }

    fn extents(&self, extents: &[Extent]) -> Vec<u8> {
        let wanted = if self.one_extent() { 1 } else { extents.len() };
        let encode = |extent: &Extent| {
            // One extent alone must not reach beyond what was asked.
            let length = if self.one_extent() { extent.length.min(self.length) } else { extent.length };
            let flags = u32::from(extent.hole) | u32::from(extent.zero) << 1;
            [length.to_be_bytes(), flags.to_be_bytes()].concat()
        };
        extents.iter().take(wanted).flat_map(encode).collect()
    }
}

#[cfg(test)]
mod tests;
