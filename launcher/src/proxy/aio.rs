//! Direct I/O without a thread that waits for each call: io_submit(2), which the kernel carries out while this process does other things.
//!
//! A short cut and no more. What the kernel says it cannot begin at once (`RWF_NOWAIT`: a queue that is full, a file system that has no such
//! way) and what it leaves half done is for a thread, whose outcome counts.
//!
//! It does not say so always. A write to a file waits for a file system that is frozen, and for its journal: it is not to be made this way. A read
//! of a file may wait until the kernel has looked up where it lies: so whoever submits is not who talks to people.
//!
//! Not io_uring: a process that is killed is gone before the writes that it has given to io_uring have ended, and one of them could then be
//! the last to arrive at a block that its successor has written meanwhile. With this way the kernel keeps the process until they have
//! ended, as it does with one whose thread is in a call.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tracing::info;

use crate::nbd::Bytes;
use crate::process::readable;

#[cfg(test)]
mod tests;

/// How many calls the kernel is asked to take at once; what it does not take is for threads.
const DEPTH: usize = 128;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Direction {
    Read = 0,
    Write = 1,
}

/// What a call came to: `None` if a thread is to make it.
pub type Outcome = Option<io::Result<()>>;

/// Calls that the kernel is busy with. Dropping it waits for them.
pub struct Aio {
    context: libc::c_ulong,
    /// Readable when calls have ended.
    ended: AsyncFd<OwnedFd>,
    calls: Mutex<Calls>,
    /// The file system has no such way.
    refused: AtomicBool,
}

#[derive(Default)]
struct Calls {
    running: HashMap<u64, Call>,
    last: u64,
}

impl Calls {
    fn begin(&mut self, call: Call) -> u64 {
        self.last += 1;
        self.running.insert(self.last, call);
        self.last
    }

    fn end(&mut self, number: u64) -> Call {
        self.running.remove(&number).expect("it was begun, and is ended once")
    }
}

/// The memory of a call is the kernel's until it has ended, whoever still waits for it.
struct Call {
    data: Bytes,
    until_ended: Box<dyn Send>,
    answer: oneshot::Sender<(Bytes, Outcome)>,
}

/// `struct iocb` of <linux/aio_abi.h>, as little-endian machines have it.
#[repr(C)]
#[derive(Default)]
struct ControlBlock {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

const _: () = assert!(
    cfg!(all(target_endian = "little", target_pointer_width = "64")) && size_of::<ControlBlock>() == 64
);

/// `IOCB_FLAG_RESFD`: the eventfd is told.
const TELL_EVENTFD: u32 = 1;

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Ended {
    data: u64,
    block: u64,
    result: i64,
    result2: i64,
}

impl Aio {
    /// Ready for calls; needs a runtime around it, and somebody who awaits [`Aio::run`].
    ///
    /// # Errors
    /// The kernel has no such thing (`CONFIG_AIO`), forbids it, or has too many of them (`fs.aio-max-nr`).
    #[allow(unsafe_code)]
    pub fn new() -> io::Result<Aio> {
        let ended = readable(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one number, to where there is one.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &raw mut context) })?;
        Ok(Aio { context, ended, calls: Mutex::default(), refused: AtomicBool::new(false) })
    }

    /// Reads or writes all of `data`; it comes back with what came of it. `until_ended` is dropped when the call has ended, which may be long
    /// after nobody waits for it any more.
    pub async fn call(
        &self,
        file: &File,
        direction: Direction,
        offset: u64,
        data: Bytes,
        until_ended: impl Send + 'static,
    ) -> (Bytes, Outcome) {
        if self.refused.load(Ordering::Relaxed) {
            return (data, None);
        }
        let (answer, answered) = oneshot::channel();
        let call = Call { data, until_ended: Box::new(until_ended), answer };
        if let Err(call) = self.submit(file, direction, offset, call) {
            return (call.data, None);
        }
        answered.await.expect("a call is answered before it is dropped")
    }

    #[allow(unsafe_code)]
    fn submit(&self, file: &File, direction: Direction, offset: u64, mut call: Call) -> Result<(), Call> {
        let mut block = ControlBlock {
            rw_flags: libc::RWF_NOWAIT,
            opcode: direction as u16,
            file: file.as_raw_fd() as u32,
            buffer: call.data.as_mut_ptr().expose_provenance() as u64,
            length: call.data.len() as u64,
            offset: offset as i64,
            flags: TELL_EVENTFD,
            eventfd: self.ended.get_ref().as_raw_fd() as u32,
            ..ControlBlock::default()
        };
        block.data = self.calls().begin(call);
        let blocks = [&raw mut block];
        // SAFETY: the kernel has read the block when this returns. The memory it points at stays where it is and is touched by nobody until the
        // call has ended: it belongs to `calls`, which gives it up in `end`, or is dropped after the kernel has let go of it in `drop`.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_usize, blocks.as_ptr()) };
        match checked(submitted) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.judge(&error);
                Err(self.calls().end(block.data))
            }
        }
    }

    /// Answers the calls that have ended, for ever.
    ///
    /// # Errors
    /// The kernel no longer tells of them.
    pub async fn run(&self) -> io::Result<()> {
        loop {
            let mut ready = self.ended.readable().await?;
            let mut count = [0; 8];
            match rustix::io::read(self.ended.get_ref(), &mut count) {
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                told => {
                    told?;
                    while self.end()? == DEPTH {}
                }
            }
        }
    }

    /// Answers as many calls as there are, and there is room for; how many.
    #[allow(unsafe_code)]
    fn end(&self) -> io::Result<usize> {
        let mut ended = [Ended::default(); DEPTH];
        // SAFETY: the kernel writes at most as many events as there is room for.
        let count = checked(unsafe {
            let none = std::ptr::null::<libc::timespec>();
            libc::syscall(libc::SYS_io_getevents, self.context, 0_i64, DEPTH as i64, ended.as_mut_ptr(), none)
        });
        let count = match count {
            // A signal, and nothing has ended since the last look.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        for ended in &ended[..count as usize] {
            let Call { data, until_ended, answer } = self.calls().end(ended.data);
            drop(until_ended);
            let outcome = self.outcome(ended.result, data.len());
            // Its connection may be gone.
            let _ = answer.send((data, outcome));
        }
        Ok(count as usize)
    }

    fn outcome(&self, result: i64, wanted: usize) -> Outcome {
        if result == wanted as i64 {
            return Some(Ok(()));
        }
        let errno = i32::try_from(-result).ok().filter(|errno| *errno > 0)?;
        let error = io::Error::from_raw_os_error(errno);
        self.judge(&error).then_some(Err(error))
    }

    /// Whether an error is the storage's, and not about this way to it.
    fn judge(&self, error: &io::Error) -> bool {
        if let Some(libc::EOPNOTSUPP | libc::ENOSYS) = error.raw_os_error() {
            info!(%error, "no asynchronous I/O with this file: every request gets a thread");
            self.refused.store(true, Ordering::Relaxed);
            return false;
        }
        !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::EINVAL))
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Aio {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the context is this one's, and used by nobody any more. It is gone when no call uses the memory in `calls`.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

impl std::fmt::Debug for Aio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} calls", self.calls().running.len())
    }
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
