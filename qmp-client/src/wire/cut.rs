//! Where one message ends and the next begins.

/// How a stream is cut into messages.
#[derive(Debug)]
pub(super) enum Cut {
    /// At ends of line, where QEMU ends each of its messages.
    Lines,
    /// After each JSON object, where QEMU ends each message that it reads: clients need send no end of line, and may send several.
    Objects(Scan),
}

/// How far a message was read. What is no object ends with its line, as does an object with an end of line in a string, which JSON does
/// not have: so whoever sends nonsense is understood again from the next line on.
#[derive(Debug, Default)]
pub(super) struct Scan {
    depth: usize,
    string: bool,
    escaped: bool,
    junk: bool,
}

/// The end of a message's text, and where the next message begins.
pub(super) type End = (usize, usize);

impl Cut {
    /// The end of the message that goes on with `bytes`.
    pub(super) fn end(&mut self, bytes: &[u8]) -> Option<End> {
        match self {
            Cut::Lines => memchr::memchr(b'\n', bytes).map(|at| (at, at + 1)),
            Cut::Objects(scan) => {
                let end = bytes.iter().enumerate().find_map(|(at, byte)| scan.step(at, *byte))?;
                *scan = Scan::default();
                Some(end)
            }
        }
    }
}

impl Scan {
    fn step(&mut self, at: usize, byte: u8) -> Option<End> {
        match byte {
            b'\n' if self.depth == 0 || self.string => return Some((at, at + 1)),
            _ if self.escaped => self.escaped = false,
            b'\\' if self.string => self.escaped = true,
            b'"' if self.depth > 0 => self.string = !self.string,
            _ if self.string => {}
            b'{' | b'[' if !self.junk => self.depth += 1,
            b'}' | b']' if self.depth > 0 => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Some((at + 1, at + 1));
                }
            }
            byte => self.junk |= self.depth == 0 && !byte.is_ascii_whitespace(),
        }
        None
    }
}
