//! A root shell in the lab, for people.

use std::io::IsTerminal;

use super::machine::{LabError, Line, Process};
use super::probe::parts;

/// Boots a lab host whose shell is this terminal, and waits until that shell ends.
///
/// # Errors
/// As [`super::Lab::boot`]; a lab host that fails to come up says so on this terminal.
pub fn shell() -> Result<(), LabError> {
    let parts = parts()?;
    eprintln!("booting the lab; leave its shell by exit or ctrl-d");
    let (rows, columns) = size();
    let (process, ()) = Process::start_unstalled(&parts, || Ok((Line::Terminal { rows, columns }, ())))?;
    process.wait_for_end()
}

/// Rows and columns of this terminal; what is no terminal has the size of an old one.
fn size() -> (u16, u16) {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(stdout).ok()).flatten();
    size.filter(|size| size.ws_row > 0 && size.ws_col > 0).map_or((25, 80), |size| (size.ws_row, size.ws_col))
}
