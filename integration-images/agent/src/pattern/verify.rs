//! Looks at a disk that a pattern has written: whether each block is whole, stands where it belongs, and is as new as it must be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::block::{self, Head, NoBlock};
use super::run::{Aligned, open};
use super::{KEPT, Mismatch, Shape, Verdict};

/// Reads the disk; the error says why that is not possible.
pub fn verify(device: &Path) -> Result<Verdict, String> {
    let failed = |e: io::Error| format!("cannot read {}: {e}", device.display());
    let file = open(device, false).map_err(failed)?;
    verify_file(&file, &device.display().to_string())
        .map_err(failed)?
        .ok_or_else(|| format!("no pattern stands on {}: `pattern start` writes one", device.display()))
}

pub(super) fn verify_file(file: &File, device: &str) -> io::Result<Option<Verdict>> {
    let Some(shape) = find_shape(file)? else { return Ok(None) };
    let mut buffer = Aligned::new(shape.block as usize);
    let mut blocks = Vec::new();
    for place in 0..shape.blocks() {
        file.read_exact_at(buffer.bytes(), place * u64::from(shape.block))?;
        blocks.push(block::read(buffer.bytes()));
    }
    Ok(Some(judge(device, shape, &blocks)))
}

/// The shape that the first block tells, which need not stand at the beginning: its write may have failed.
fn find_shape(file: &File) -> io::Result<Option<Shape>> {
    const SECTOR: usize = 512;
    let (mut buffer, mut offset) = (Aligned::new(1 << 20), 0);
    loop {
        let count = file.read_at(buffer.bytes(), offset)?;
        for (place, sector) in buffer.bytes()[..count].chunks(SECTOR).enumerate() {
            let here = offset + (place * SECTOR) as u64;
            let head = block::peek(sector).filter(|head| head.offset == here && head.shape.is_possible());
            if let Some(head) = head {
                return Ok(Some(head.shape));
            }
        }
        if count == 0 {
            return Ok(None);
        }
        offset += count as u64;
    }
}

fn judge(device: &str, shape: Shape, blocks: &[Result<Head, NoBlock>]) -> Verdict {
    let run = blocks.iter().flatten().map(|head| head.run).max().unwrap_or(0);
    let ours: Vec<Option<u64>> = blocks
        .iter()
        .map(|head| head.ok().filter(|head| head.run == run).map(|head| head.generation))
        .collect();
    let generation = ours.iter().flatten().copied().max().unwrap_or(0);
    // Blocks are written in order: up to the last of the newest generation all are of it, the others of the one before.
    let last = ours.iter().rposition(|found| *found == Some(generation)).unwrap_or(0);
    let mut verdict = Verdict {
        device: device.to_owned(),
        shape,
        generation,
        verified: 0,
        stale: 0,
        unwritten: 0,
        mismatch_count: 0,
        mismatches: Vec::new(),
    };
    for (place, found) in blocks.iter().enumerate() {
        let offset = place as u64 * u64::from(shape.block);
        let due = if place <= last { generation } else { generation - generation.min(1) };
        match *found {
            Ok(head) if head.run == run && (head.offset, head.shape) == (offset, shape) => {
                verdict.verified += 1;
                verdict.stale += u64::from(head.generation < due);
            }
            // What stood there before this run came by.
            Ok(Head { run: other, .. }) if other != run => verdict.before(due),
            Err(NoBlock::Foreign) => verdict.before(due),
            found => {
                verdict.mismatch_count += 1;
                if verdict.mismatches.len() < KEPT {
                    let found = block::describe(found);
                    verdict.mismatches.push(Mismatch { offset, expected: Some(due), found, at_us: 0 });
                }
            }
        }
    }
    verdict
}

impl Verdict {
    /// A block that this run has not written, which it should have if a generation is due there.
    fn before(&mut self, due: u64) {
        if due == 0 { self.unwritten += 1 } else { self.stale += 1 }
    }
}
