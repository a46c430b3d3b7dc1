//! Raw mode of the user's terminal, and its way back.
//!
//! Owns the saved mode. It is put back when [`Raw`] is dropped, and by a panic hook, because a release build aborts on a
//! panic and drops nothing.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nix::{
    errno::Errno,
    sys::termios::{
        ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr,
    },
    unistd,
};

/// A terminal in raw mode.
pub(super) struct Raw(Arc<Saved>);

struct Saved {
    terminal: OwnedFd,
    mode: Mode,
    active: AtomicBool,
}

/// All that raw mode changes of a terminal's settings.
struct Mode {
    input: InputFlags,
    output: OutputFlags,
    control: ControlFlags,
    local: LocalFlags,
    characters: [libc::cc_t; libc::NCCS],
}

impl Mode {
    fn of(termios: &Termios) -> Mode {
        Mode {
            input: termios.input_flags,
            output: termios.output_flags,
            control: termios.control_flags,
            local: termios.local_flags,
            characters: termios.control_chars,
        }
    }

    fn put_into(&self, termios: &mut Termios) {
        termios.input_flags = self.input;
        termios.output_flags = self.output;
        termios.control_flags = self.control;
        termios.local_flags = self.local;
        termios.control_chars = self.characters;
    }
}

impl Raw {
    /// Makes the terminal raw; `None` if `fd` is none.
    pub(super) fn enter(fd: BorrowedFd<'_>) -> io::Result<Option<Raw>> {
        if !unistd::isatty(fd).unwrap_or(false) {
            return Ok(None);
        }
        let mode = Mode::of(&tcgetattr(fd)?);
        let terminal = fd.try_clone_to_owned()?;
        // In place before the mode is changed, so that there is no gap.
        let raw = Raw(Arc::new(Saved { terminal, mode, active: AtomicBool::new(true) }));
        let (saved, thread) = (Arc::downgrade(&raw.0), thread::current().id());
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // Where a panic unwinds, another thread's does not end the console.
            if let Some(saved) = saved.upgrade()
                && (cfg!(panic = "abort") || thread::current().id() == thread)
            {
                saved.restore();
            }
            before(info);
        }));
        make_raw(fd)?;
        Ok(Some(raw))
    }

    /// Makes it raw once more, after another program changed it. A terminal that refuses stays as it is.
    pub(super) fn again(&self) {
        let _ = make_raw(self.0.terminal.as_fd());
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.0.restore();
    }
}

impl Saved {
    /// At most once. At once, too: waiting for output would hang on a terminal that was stopped. A terminal that is gone
    /// needs nothing.
    fn restore(&self) {
        if self.active.swap(false, Ordering::SeqCst)
            && let Ok(mut termios) = tcgetattr(&self.terminal)
        {
            self.mode.put_into(&mut termios);
            let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &termios);
        }
    }
}

/// Every byte as it is, both ways, and no signals from keys. What was typed before is kept.
pub(super) fn make_raw(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut mode = tcgetattr(fd)?;
    cfmakeraw(&mut mode);
    tcsetattr(fd, SetArg::TCSANOW, &mode)
}
