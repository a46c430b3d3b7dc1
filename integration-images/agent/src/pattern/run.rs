//! The I/O: block by block, over the area again and again. After a write, by turns, the newest block and the oldest are read: the one finds
//! what is not written, the other what does not stay.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::account::Account;
use super::block::{self, Head};
use super::{Operation, Report, Shape};

/// O_DIRECT wants memory aligned to the device's blocks; none has larger ones.
const ALIGNMENT: usize = 4096;
/// The pause after an error, so that a device that is gone costs no processor.
const AFTER_ERROR: Duration = Duration::from_millis(10);

/// How a device is opened: past the page cache, which would answer for it.
pub fn open(path: &Path, write: bool) -> io::Result<File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
}

/// What a block is written to: a device, or what a test makes of one.
pub(super) trait Disk: Send {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Disk for File {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }
}

/// Opens the device, as often as that is needed.
pub(super) type Opener = Box<dyn FnMut() -> io::Result<Box<dyn Disk>> + Send>;

/// A pattern that is being written.
pub struct Pattern {
    account: Arc<Account>,
    stop: Arc<AtomicBool>,
    thread: Thread,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Pattern {
    /// Begins, if the device can be opened. `rate` is the most writes in a second.
    pub fn start(path: &Path, shape: Shape, rate: Option<NonZero<u32>>) -> io::Result<Pattern> {
        let device = path.to_owned();
        let opener = move || Ok(Box::new(open(&device, true)?) as Box<dyn Disk>);
        Pattern::start_with(Box::new(opener), path, shape, rate)
    }

    pub(super) fn start_with(
        mut opener: Opener,
        path: &Path,
        shape: Shape,
        rate: Option<NonZero<u32>>,
    ) -> io::Result<Pattern> {
        let disk = Some(opener()?);
        let account = Arc::new(Account::new(path.display().to_string(), shape));
        let stop = Arc::new(AtomicBool::new(false));
        let blocks = usize::try_from(shape.blocks()).map_err(io::Error::other)?;
        let writer = Writer {
            opener,
            disk,
            account: account.clone(),
            stop: stop.clone(),
            shape,
            run: account.report().started_unix_us,
            turn: rate.map(|rate| Duration::from_secs(1) / rate.get()),
            waited: Duration::ZERO,
            buffer: Aligned::new(shape.block as usize),
            written: vec![0; blocks],
        };
        let (alive, ended) = channel();
        let thread = std::thread::Builder::new().name("pattern".into()).spawn(move || {
            writer.work();
            drop(alive);
        })?;
        Ok(Pattern { account, stop, thread: thread.thread().clone(), ended })
    }

    /// What it did up to now; does not wait for an operation under way.
    pub fn report(&self) -> Report {
        self.account.report()
    }

    /// Ends it: after the operation under way, which is waited for that long and no longer. The report then shows it as outstanding.
    pub fn stop(self, patience: Duration) -> Report {
        self.stop.store(true, Ordering::Release);
        self.thread.unpark();
        // Either it ended or it hangs; the report tells.
        let _ = self.ended.recv_timeout(patience);
        self.account.report()
    }
}

struct Writer {
    opener: Opener,
    disk: Option<Box<dyn Disk>>,
    account: Arc<Account>,
    stop: Arc<AtomicBool>,
    shape: Shape,
    run: u64,
    /// The time of one block, if there is a rate.
    turn: Option<Duration>,
    /// How long the rate made it wait since the last operation.
    waited: Duration,
    buffer: Aligned,
    /// The generation that stands in each block; 0 where that is not known.
    written: Vec<u64>,
}

impl Writer {
    fn work(mut self) {
        let mut due = Instant::now();
        for generation in 1.. {
            self.account.generation(generation);
            for place in 0..self.written.len() {
                if self.step(place, generation).is_err() {
                    // It is in the account. The device may come back as another one under the same name, which this one would keep away.
                    self.disk = None;
                    std::thread::sleep(AFTER_ERROR);
                }
                due = self.wait(due);
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
            }
        }
    }

    /// Waits for the next block's turn, and gives the time of that turn.
    fn wait(&mut self, due: Instant) -> Instant {
        let Some(turn) = self.turn else { return due };
        let (now, due) = (Instant::now(), due + turn);
        self.waited = due.saturating_duration_since(now);
        while !self.stop.load(Ordering::Acquire) {
            match due.saturating_duration_since(Instant::now()) {
                Duration::ZERO => break,
                left => std::thread::park_timeout(left),
            }
        }
        // What was missed is not made up for.
        due.max(now)
    }

    fn step(&mut self, place: usize, generation: u64) -> io::Result<()> {
        if self.disk.is_none() {
            let opener = &mut self.opener;
            self.disk = Some(self.account.operation(Operation::Open, 0, Duration::ZERO, opener)?);
        }
        self.write(place, generation)?;
        self.verify(if place.is_multiple_of(2) { place } else { (place + 1) % self.written.len() })
    }

    fn offset(&self, place: usize) -> u64 {
        place as u64 * u64::from(self.shape.block)
    }

    fn write(&mut self, place: usize, generation: u64) -> io::Result<()> {
        let head = Head { run: self.run, offset: self.offset(place), generation, shape: self.shape };
        block::write(&head, self.buffer.bytes());
        // What stands there after a failure is anybody's guess.
        self.written[place] = 0;
        self.transfer(Operation::Write, head.offset)?;
        self.written[place] = generation;
        Ok(())
    }

    fn verify(&mut self, place: usize) -> io::Result<()> {
        let generation = self.written[place];
        if generation == 0 {
            return Ok(());
        }
        let expected = Head { run: self.run, offset: self.offset(place), generation, shape: self.shape };
        self.transfer(Operation::Read, expected.offset)?;
        match block::read(self.buffer.bytes()) {
            Ok(found) if found == expected => self.account.verified(),
            found => self.account.mismatch(expected.offset, generation, block::describe(found)),
        }
        Ok(())
    }

    fn transfer(&mut self, operation: Operation, offset: u64) -> io::Result<()> {
        let (disk, bytes) = (self.disk.as_ref(), self.buffer.bytes());
        self.account.operation(operation, offset, std::mem::take(&mut self.waited), || {
            let disk = disk.ok_or(io::ErrorKind::NotConnected)?;
            match operation {
                Operation::Write => disk.write(bytes, offset),
                _ => disk.read(bytes, offset),
            }
        })
    }
}

/// Bytes where O_DIRECT wants them.
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn new(length: usize) -> Aligned {
        let memory = vec![0; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Aligned { memory, start, length }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}
