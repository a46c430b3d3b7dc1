//! The file or block device behind the proxy. Every call blocks, for as long as the storage likes; [`Storage::submit`] does so seldom.
//!
//! A failed write must leave no doubt, or a retry is worth nothing. The page cache leaves one: when the kernel cannot write back what it was
//! given, it says so to one flush and forgets the data. So cached writes that are to be retried go through to the storage one by one
//! (`O_DSYNC`), zeroes and discards too, and their error is their own; with direct I/O it is so anyway.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, StatxFlags};

use super::aio::{Aio, Direction};
use crate::nbd::{Bytes, Extent, Features, Reply, Request};

#[cfg(test)]
mod tests;

/// What offsets and lengths of direct I/O are multiples of where the system does not say.
const PAGE: u32 = 4096;

/// Zeros written at once where the storage has no quicker way.
const ZEROS: usize = 1 << 20;

/// Extents told at once: enough for a file in pieces, little enough for one reply.
const EXTENTS: usize = 256;

/// How an image is used.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file or block device.
    pub path: PathBuf,
    /// Only for reading.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// Give up discarded blocks.
    pub unmap: bool,
    /// Make every write durable before it is answered.
    pub write_through: bool,
    /// How many bytes to serve at least: a regular file grows up to there as it is written to.
    pub size: u64,
}

/// An image that is open.
#[derive(Debug)]
pub struct Storage {
    file: File,
    device: bool,
    block: u32,
    options: Options,
}

impl Storage {
    /// Opens an image.
    ///
    /// # Errors
    /// The system's, or what is wrong with the image.
    pub fn open(options: Options) -> io::Result<Storage> {
        let mut flags = 0;
        if options.direct {
            flags |= libc::O_DIRECT;
        }
        if options.write_through {
            flags |= libc::O_DSYNC;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(&options.path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("it is neither a file nor a block device"));
        }
        let device = kind.is_block_device();
        let block = if options.direct { direct_block(&file, device)? } else { 1 };
        let storage = Storage { file, device, block, options };
        let size = storage.size()?;
        if !size.is_multiple_of(u64::from(block)) {
            let reason = format!(
                "its size {size} is no multiple of {block}, which direct I/O needs: leave --direct out"
            );
            return Err(io::Error::other(reason));
        }
        Ok(storage)
    }

    /// Opens an image that is only read, as one below another is.
    ///
    /// # Errors
    /// As [`Storage::open`]'s.
    pub fn open_below(path: PathBuf, direct: bool) -> io::Result<Storage> {
        // A file may end anywhere; what is behind its end reads as zeros. A device has no length here, and its own is the least.
        let size = std::fs::metadata(&path)?.len().next_multiple_of(u64::from(PAGE));
        let (read_only, unmap, write_through) = (true, false, false);
        Storage::open(Options { path, read_only, direct, unmap, write_through, size })
    }

    /// The image's path.
    pub fn path(&self) -> &Path {
        &self.options.path
    }

    /// How many bytes there are to serve now.
    pub fn size(&self) -> io::Result<u64> {
        // A device has no length in its metadata; nobody else uses this file's position.
        let size = (&self.file).seek(SeekFrom::End(0))?;
        Ok(if self.device { size } else { size.max(self.options.size) })
    }

    /// What it can do.
    pub fn features(&self) -> Features {
        Features {
            read_only: self.options.read_only,
            flush: true,
            trim: self.options.unmap,
            write_zeroes: true,
            fast_zero: true,
            block_status: true,
            min_block: self.block,
            preferred_block: PAGE,
        }
    }

    /// Carries out a request.
    ///
    /// # Errors
    /// The system's.
    pub fn perform(&self, request: &Request) -> io::Result<Reply> {
        let fua = match *request {
            Request::Read { offset, length } => return self.read(offset, length as usize).map(Reply::Data),
            Request::BlockStatus { offset, length } => {
                return Ok(Reply::Extents(self.extents(offset, length)?));
            }
            Request::Flush => true,
            Request::Write { offset, ref data, fua } => {
                self.file.write_all_at(data, offset)?;
                fua
            }
            Request::Trim { offset, length, fua } => {
                self.trim(offset, length)?;
                fua || self.options.write_through
            }
            Request::WriteZeroes { offset, length, fua, may_trim, only_fast } => {
                self.zero(offset, length, may_trim, only_fast)?;
                fua || self.options.write_through
            }
        };
        if fua {
            self.file.sync_data()?;
        }
        Ok(Reply::Done)
    }

    /// Whether a request can go the way of [`Storage::submit`].
    pub fn can_submit(&self, request: &Request) -> bool {
        match request {
            Request::Read { .. } => self.options.direct,
            Request::Write { fua: false, .. } => self.options.direct && self.device,
            _ => false,
        }
    }

    /// Carries out a request without a thread; a thread is to [`Storage::perform`] it if there is no outcome.
    pub async fn submit(
        &self,
        aio: &Aio,
        request: &mut Request,
        until_ended: impl Send + 'static,
    ) -> Option<io::Result<Reply>> {
        match request {
            Request::Read { offset, length } => {
                let data = Bytes::leftover(*length as usize);
                let (data, outcome) = aio.call(&self.file, Direction::Read, *offset, data, until_ended).await;
                Some(outcome?.map(|()| Reply::Data(data)))
            }
            Request::Write { offset, data, .. } => {
                let (back, outcome) =
                    aio.call(&self.file, Direction::Write, *offset, std::mem::take(data), until_ended).await;
                *data = back;
                Some(outcome?.map(|()| Reply::Done))
            }
            _ => None,
        }
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let mut bytes = Bytes::leftover(length);
        let read = self.fill(offset, &mut bytes)?;
        bytes[read..].fill(0);
        Ok(bytes)
    }

    /// Reads until `bytes` is full or the file ends; how many bytes.
    fn fill(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                // A device that was unplugged has no bytes any more, which is no reason to make some up.
                Ok(0) if self.device => return Err(io::Error::from_raw_os_error(libc::EIO)),
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // A file that ends within a block: what follows is not there, and direct I/O could not ask for it.
            if !done.is_multiple_of(self.block as usize) {
                break;
            }
        }
        Ok(done)
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u32) -> io::Result<()> {
        let flags = flags | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, u64::from(length))?)
    }

    /// Gives blocks up. Storage that cannot is left as it is: a discard is a wish.
    fn trim(&self, offset: u64, length: u32) -> io::Result<()> {
        let outcome = match self.device {
            true => discard(&self.file, offset, length),
            false => self.allocate(FallocateFlags::PUNCH_HOLE, offset, length),
        };
        outcome.or_else(|error| if unsupported(&error) { Ok(()) } else { Err(error) })
    }

    /// Zeroes blocks the quickest way; for a block device the kernel makes of these flags what it makes of BLKZEROOUT.
    fn zero(&self, offset: u64, length: u32, may_trim: bool, only_fast: bool) -> io::Result<()> {
        let ways = [
            (may_trim && self.options.unmap, FallocateFlags::PUNCH_HOLE),
            // On a device this one writes zeros where it must, which is not fast.
            (!(self.device && only_fast), FallocateFlags::ZERO_RANGE),
        ];
        for (_, way) in ways.into_iter().filter(|(allowed, _)| *allowed) {
            match self.allocate(way, offset, length) {
                Err(error) if unsupported(&error) => {}
                outcome => return outcome,
            }
        }
        if only_fast {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let mut zeros = Bytes::leftover(ZEROS.min(length as usize));
        zeros.fill(0);
        let mut done = 0;
        while done < u64::from(length) {
            let piece = zeros.len().min((u64::from(length) - done) as usize);
            self.file.write_all_at(&zeros[..piece], offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    /// What is allocated in a range, in whole blocks: a block is a hole only if all of it is.
    fn extents(&self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        let end = offset + u64::from(length);
        let mut extents = Vec::new();
        let mut at = offset;
        while at < end && extents.len() < EXTENTS {
            let data = self.next(rustix::fs::SeekFrom::Data(at), end)?;
            let data = data - data % u64::from(self.block);
            let (hole, until) = match data > at {
                true => (true, data),
                false => (false, self.next(rustix::fs::SeekFrom::Hole(at), end)?),
            };
            let until = until.max(at + 1).next_multiple_of(u64::from(self.block)).min(end);
            extents.push(Extent { length: (until - at) as u32, hole, zero: hole });
            at = until;
        }
        Ok(extents)
    }

    /// The next data or hole, `end` if there is none before. A device, and a file system that cannot tell, have data all over.
    fn next(&self, what: rustix::fs::SeekFrom, end: u64) -> io::Result<u64> {
        let (at, absent) = match what {
            rustix::fs::SeekFrom::Data(at) => (at, at),
            rustix::fs::SeekFrom::Hole(at) => (at, end),
            _ => return Ok(end),
        };
        debug_assert!(at < end);
        if self.device {
            return Ok(absent);
        }
        match rustix::fs::seek(&self.file, what) {
            Ok(place) => Ok(place.min(end)),
            // Nothing from there on to the end of the file, and nothing behind it.
            Err(rustix::io::Errno::NXIO) => Ok(end),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(absent),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Whether an error says that the request cannot be had, and not that the storage is broken: trying again would not help.
pub fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENOTTY))
}

/// What offsets and lengths of direct I/O are multiples of. Asks the system and no storage, which may be broken just now.
fn direct_block(file: &File, device: bool) -> io::Result<u32> {
    let block = match device {
        true => rustix::fs::ioctl_blksszget(file)?,
        false => {
            let facts = rustix::fs::statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
            // Kernels before 6.1 and some file systems do not tell.
            facts.map_or(0, |facts| facts.stx_dio_offset_align)
        }
    };
    Ok(if block.is_power_of_two() { block } else { PAGE })
}

/// BLKDISCARD.
#[allow(unsafe_code)]
fn discard(file: &File, offset: u64, length: u32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    let range = [offset, u64::from(length)];
    // SAFETY: the descriptor is open, and the kernel reads two numbers from an array that outlives the call.
    unsafe { blkdiscard(file.as_raw_fd(), &range) }?;
    Ok(())
}
