//! Who has a console: one process at a time, by name.
//!
//! Owns the lock file: a POSIX record lock, because the kernel names the process that has one, and in the file that
//! process and its user for the one who is refused. The kernel lets go of the lock with the process, however that ends.
//! A take-over is a signal to the holder, which leaves and says who sent it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
    unistd::{Uid, User},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use super::{ConsoleError, signals};

/// Tells a holder to leave.
pub(super) const TAKE_OVER: Signal = Signal::SIGUSR1;
/// The same, as it is sent.
const TELL: rustix::process::Signal = rustix::process::Signal::USR1;

/// How long a holder may take to leave.
const PATIENCE: Duration = Duration::from_secs(5);

/// The right to a console; dropped, the lock file is gone.
#[derive(Debug)]
pub struct Hold {
    path: PathBuf,
    // The lock lasts until *any* descriptor of the file is closed in this process: a process holds a console once.
    file: File,
}

impl Hold {
    /// Takes the lock file `path`. If another process has it: [`ConsoleError::Held`], or with `force` that process is
    /// told to leave and waited for, five seconds at most.
    pub fn acquire(path: &Path, force: bool) -> Result<Hold, ConsoleError> {
        let lock_error = |source: io::Error| ConsoleError::Lock { path: path.to_owned(), source };
        // Before the lock, and for good: whoever sees us hold it may send the signal a moment after we let go.
        signals::handle(TAKE_OVER).map_err(|errno| lock_error(errno.into()))?;
        while signals::caught().is_some() {}
        let deadline = Instant::now() + PATIENCE;
        let mut told = None;
        loop {
            let mut file = open(path).map_err(lock_error)?;
            if try_lock(&file).map_err(lock_error)? {
                // The last holder may have removed the file between our opening and our locking it.
                if is_at(&file, path) {
                    write_holder(&mut file).map_err(lock_error)?;
                    return Ok(Hold { path: path.to_owned(), file });
                }
                continue;
            }
            // None: let go just now.
            let Some(pid) = holder(&file).map_err(lock_error)? else { continue };
            let (user, since) = read_holder(&mut file, pid).map_err(lock_error)?;
            if !force {
                return Err(ConsoleError::Held { pid, user, since });
            }
            if told != Some(pid) {
                tell(&file, pid, &user)?;
                told = Some(pid);
            }
            if Instant::now() > deadline {
                let reason = format!(
                    "it did not within {} s, perhaps it is stopped (`kill -CONT {pid}`)",
                    PATIENCE.as_secs()
                );
                return Err(ConsoleError::Stubborn { pid, user, reason });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // While the lock is ours, and only if the file is; a folder that is gone took it along.
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_CLOEXEC);
    options.open(path)
}

/// The whole file, for writing.
fn record(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn try_lock(file: &File) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_SETLK(&record(libc::F_WRLCK))) {
        Ok(_) => Ok(true),
        Err(Errno::EACCES | Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The process that has the lock, or `None` when it is free; 0 or less when it is one that cannot be seen from here.
fn holder(file: &File) -> io::Result<Option<i32>> {
    let mut lock = record(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    Ok((libc::c_int::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}

/// Whether the open file is still the one of that path.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(ref open), Ok(ref there)) if id(open) == id(there))
}

/// Signals the holder `pid`, and nobody who may have got its number since.
fn tell(file: &File, pid: i32, user: &str) -> Result<(), ConsoleError> {
    let stubborn = |reason: String| ConsoleError::Stubborn { pid, user: user.to_owned(), reason };
    let Some(process) = Pid::from_raw(pid).filter(|_| pid > 0) else {
        return Err(stubborn("it runs in another container; leave it there with ^]".to_owned()));
    };
    let told = pidfd_open(process, PidfdFlags::empty()).and_then(|process| {
        // Still the holder after it was pinned, so it is the holder that is pinned.
        match holder(file) {
            Ok(Some(now)) if now == pid => pidfd_send_signal(process, TELL),
            _ => Ok(()),
        }
    });
    match told {
        // Gone just now is what was wanted.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(rustix::io::Errno::PERM) => Err(stubborn("only that user or root may do it".to_owned())),
        Err(errno) => Err(stubborn(errno.to_string())),
    }
}

fn write_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(format!("{} {}\n", process::id(), user_name(Uid::current().as_raw())).as_bytes())
}

/// The holder's user and since when, from the file, or from the process if it has not written yet.
fn read_holder(file: &mut File, pid: i32) -> io::Result<(String, SystemTime)> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let user = match text.trim_end().split_once(' ') {
        Some((holder, user)) if holder.parse() == Ok(pid) => user.to_owned(),
        _ => match fs::metadata(format!("/proc/{pid}")) {
            Ok(process) => user_name(process.uid()),
            Err(_) => "an unknown user".to_owned(),
        },
    };
    Ok((user, file.metadata()?.modified()?))
}

/// The user's name, or the number where it has none.
pub(super) fn user_name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name,
        _ => format!("uid {uid}"),
    }
}

/// How long ago, for people.
pub(super) fn age(since: SystemTime) -> String {
    let seconds = since.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}
