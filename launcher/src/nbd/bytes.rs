//! Memory for what is read and written: it begins with a page, as direct I/O wants it, and is used again, as getting it anew from the system
//! costs more than most of what is done with it.

use std::ops::{Deref, DerefMut};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use rustix::mm::Advice;

/// What memory for direct I/O begins at a multiple of.
const PAGE: usize = 4096;

/// Memory that is used again comes in pieces of this size, one for each request that QEMU has in flight. All of them together are one huge
/// page if the system likes: so the storage is given one range of memory for each request, and not one for each of its pages.
const PIECE: usize = 128 << 10;
const PIECES: usize = 16;
const ARENA: usize = PIECE * PIECES;

static POOL: LazyLock<Mutex<Vec<BytesMut>>> = LazyLock::new(|| Mutex::new(arena()));

/// A number of bytes, in memory that begins with a page.
#[derive(Default)]
pub struct Bytes {
    memory: BytesMut,
    from: usize,
    length: usize,
    /// It goes back to the others when it is dropped.
    is_piece: bool,
}

impl Bytes {
    /// So many bytes. What they are is left of earlier requests: whoever takes them is to write them all.
    pub fn leftover(length: usize) -> Bytes {
        let piece = if (1..=PIECE).contains(&length) { pool().pop() } else { None };
        match piece {
            Some(memory) => Bytes { memory, from: 0, length, is_piece: true },
            None if length == 0 => Bytes::default(),
            None => {
                let memory = BytesMut::zeroed(length + PAGE);
                Bytes { from: memory.as_ptr().align_offset(PAGE), memory, length, is_piece: false }
            }
        }
    }
}

fn pool() -> MutexGuard<'static, Vec<BytesMut>> {
    // Nothing that is done with it leaves it half done.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory for all pieces, which the system gives when it is used.
#[allow(unsafe_code)]
fn arena() -> Vec<BytesMut> {
    let mut memory = BytesMut::zeroed(2 * ARENA);
    let _ = memory.split_to(memory.as_ptr().align_offset(ARENA));
    memory.truncate(ARENA);
    // SAFETY: the range is ours, and what is in it stays as it is. Without huge pages it is only slower.
    let _ = unsafe { rustix::mm::madvise(memory.as_mut_ptr().cast(), ARENA, Advice::LinuxHugepage) };
    (0..PIECES).map(|_| memory.split_to(PIECE)).collect()
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.is_piece {
            pool().push(std::mem::take(&mut self.memory));
        }
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Bytes {
        let mut copy = Bytes::leftover(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }
}

impl Clone for Bytes {
    fn clone(&self) -> Bytes {
        Bytes::from(&**self)
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.from..self.from + self.length]
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.from..self.from + self.length]
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Bytes) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_with_a_page_whatever_its_length_and_holds_what_it_is_given() {
        for length in [0, 1, PAGE, 64 << 10, PIECE, PIECE + 1, 1 << 20] {
            for round in 0..3 {
                let mut bytes = Bytes::leftover(length);
                assert_eq!(bytes.len(), length);
                assert!(length == 0 || bytes.as_ptr().addr().is_multiple_of(PAGE), "{length}");
                bytes.fill(round);
                assert_eq!(bytes.clone(), Bytes::from(&vec![round; length][..]));
            }
        }
    }

    #[test]
    fn when_all_pieces_are_in_use_there_is_other_memory() {
        let many: Vec<Bytes> = (0..=PIECES).map(|_| Bytes::leftover(PIECE)).collect();
        assert!(many.iter().any(|bytes| !bytes.is_piece));
        drop(many);
        assert!(pool().len() <= PIECES);
    }
}
