//! What a block says of itself: a head of seven numbers, then bytes that follow from them.
//!
//! | word | what                                                    |
//! |------|---------------------------------------------------------|
//! | 0    | `QVIRTPAT`                                              |
//! | 1    | a checksum of all words but this one                    |
//! | 2    | the run: when it was started, which no two runs share   |
//! | 3    | where the block belongs                                 |
//! | 4    | the generation: how often the area was begun by then    |
//! | 5    | the size of the area                                    |
//! | 6    | the size of a block                                     |

use super::Shape;

const MAGIC: u64 = u64::from_le_bytes(*b"QVIRTPAT");
/// Bytes of a word.
const WORD: usize = 8;
/// Words before the filling.
const HEAD: usize = 7;

/// What stands in the head of a block, its checksum aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The run that wrote it.
    pub run: u64,
    /// Where it belongs.
    pub offset: u64,
    /// How often the area was begun by then.
    pub generation: u64,
    /// The run's area and block size.
    pub shape: Shape,
}

/// Bytes that are no whole block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBlock {
    /// They were never one.
    Foreign,
    /// They were, or parts of several.
    Damaged,
}

/// Fills a buffer of the block's size.
pub fn write(head: &Head, buffer: &mut [u8]) {
    let (words, _) = buffer.as_chunks_mut::<WORD>();
    let numbers =
        [MAGIC, 0, head.run, head.offset, head.generation, head.shape.area, u64::from(head.shape.block)];
    for (word, number) in words.iter_mut().zip(numbers) {
        *word = number.to_le_bytes();
    }
    let mut state = mix(head.run ^ mix(head.offset) ^ head.generation);
    for word in words.iter_mut().skip(HEAD) {
        state = mix(state);
        *word = state.to_le_bytes();
    }
    let sum = checksum(words);
    if let Some(word) = words.get_mut(1) {
        *word = sum.to_le_bytes();
    }
}

/// Reads the head of a block, of which these are all bytes: the checksum tells whether they belong together.
pub fn read(buffer: &[u8]) -> Result<Head, NoBlock> {
    let head = peek(buffer).ok_or(NoBlock::Foreign)?;
    let (words, rest) = buffer.as_chunks::<WORD>();
    let whole =
        rest.is_empty() && buffer.len() == head.shape.block as usize && checksum(words) == number(words, 1);
    if whole { Ok(head) } else { Err(NoBlock::Damaged) }
}

/// Reads a head whose block need not be whole.
pub fn peek(buffer: &[u8]) -> Option<Head> {
    let (words, _) = buffer.as_chunks::<WORD>();
    if words.len() < HEAD || number(words, 0) != MAGIC {
        return None;
    }
    let shape = Shape { area: number(words, 5), block: u32::try_from(number(words, 6)).ok()? };
    Some(Head { run: number(words, 2), offset: number(words, 3), generation: number(words, 4), shape })
}

/// What was found, in words.
pub fn describe(found: Result<Head, NoBlock>) -> String {
    match found {
        Ok(Head { run, offset, generation, .. }) => {
            format!("generation {generation} of the block at {offset}, of the run {run}")
        }
        Err(NoBlock::Foreign) => "bytes that no pattern has written".to_owned(),
        Err(NoBlock::Damaged) => "a damaged block".to_owned(),
    }
}

fn number(words: &[[u8; WORD]], place: usize) -> u64 {
    words.get(place).map_or(0, |word| u64::from_le_bytes(*word))
}

/// Depends on each word and its place.
fn checksum(words: &[[u8; WORD]]) -> u64 {
    let others = words.iter().enumerate().filter(|(place, _)| *place != 1);
    others.fold(0, |sum, (_, word)| {
        (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}

/// Spreads a change of any bit over all.
fn mix(mut word: u64) -> u64 {
    word ^= word << 13;
    word ^= word >> 7;
    word ^= word << 17;
    word.wrapping_add(0x9e37_79b9_7f4a_7c15)
}
