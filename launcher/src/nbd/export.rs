//! What an export is, what it is asked, and what it answers: all that an implementation has to know.

use std::future::Future;
use std::io;
use std::pin::Pin;

use super::bytes::Bytes;

/// What an export is made of. The server knows nothing of storage, and an export nothing of NBD.
///
/// Requests come checked: inside the export, aligned to its `min_block`, of a kind that its features offer, of a length other than 0.
pub trait Export: Send + Sync + 'static {
    /// Its size in bytes. A client learns it when it connects; requests are checked against the size of their moment.
    fn size(&self) -> u64;

    /// What it can do.
    fn features(&self) -> Features;

    /// Awaited before the first request of a connection is handled.
    fn connected(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Carries out one request. Many run at once; the future is dropped when its connection ends, as nobody waits for the reply then.
    fn handle(&self, request: Request) -> impl Future<Output = Result<Reply, Errno>> + Send;
}

/// An [`Export`] of any type.
pub(super) trait AnyExport: Send + Sync {
    fn size(&self) -> u64;
    fn features(&self) -> Features;
    fn connected(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
    fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Reply, Errno>> + Send + '_>>;
}

impl<E: Export> AnyExport for E {
    fn size(&self) -> u64 {
        Export::size(self)
    }

    fn features(&self) -> Features {
        Export::features(self)
    }

    fn connected(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(Export::connected(self))
    }

    fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Reply, Errno>> + Send + '_>> {
        Box::pin(Export::handle(self, request))
    }
}

/// What an export can do. Sizes of blocks are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Nothing can be changed.
    pub read_only: bool,
    /// Writes can be made durable: all of them by a flush, one of them by its `fua`.
    pub flush: bool,
    /// Blocks can be given up.
    pub trim: bool,
    /// Blocks can be zeroed without sending zeros.
    pub write_zeroes: bool,
    /// A request to zero only if that is fast is understood.
    pub fast_zero: bool,
    /// It can tell what is allocated.
    pub block_status: bool,
    /// What offsets and lengths must be multiples of.
    pub min_block: u32,
    /// What they had better be multiples of.
    pub preferred_block: u32,
}

/// What is asked of an export. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Request {
    Read {
        offset: u64,
        length: u32,
    },
    /// With `fua`, durable when answered; so below.
    Write {
        offset: u64,
        data: Bytes,
        fua: bool,
    },
    /// Everything answered before this was sent is durable when this is answered.
    Flush,
    Trim {
        offset: u64,
        length: u32,
        fua: bool,
    },
    /// `may_trim`: the blocks may be given up. `only_fast`: answer ENOTSUP if it is no faster than writing.
    WriteZeroes {
        offset: u64,
        length: u32,
        fua: bool,
        may_trim: bool,
        only_fast: bool,
    },
    BlockStatus {
        offset: u64,
        length: u32,
    },
}

/// What a request comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done.
    Done,
    /// What was read: as many bytes as were asked for.
    Data(Bytes),
    /// What is allocated from the offset asked about on: at least one extent, none of them empty.
    Extents(Vec<Extent>),
}

/// A run of blocks that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub length: u32,
    /// Nothing is allocated for it.
    pub hole: bool,
    /// It reads as zeros.
    pub zero: bool,
}

/// An error as NBD knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Errno {
    Perm = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    Shutdown = 108,
}

impl From<&io::Error> for Errno {
    /// What has no name in NBD is an EIO, as a disk would have it.
    fn from(error: &io::Error) -> Errno {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Errno::Perm,
            Some(libc::ENOMEM) => Errno::NoMemory,
            Some(libc::EINVAL) => Errno::Invalid,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Errno::NoSpace,
            Some(libc::EOVERFLOW) => Errno::Overflow,
            Some(libc::EOPNOTSUPP) => Errno::NotSupported,
            Some(libc::ESHUTDOWN) => Errno::Shutdown,
            _ => Errno::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_become_those_of_nbd() {
        for (raw, errno) in [
            (libc::ENOSPC, Errno::NoSpace),
            (libc::EROFS, Errno::Perm),
            (libc::EOPNOTSUPP, Errno::NotSupported),
            (libc::ENODEV, Errno::Io),
        ] {
            assert_eq!(Errno::from(&io::Error::from_raw_os_error(raw)), errno);
        }
    }
}
