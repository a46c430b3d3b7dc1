//! Starting QEMU: its own session, exactly the descriptors it is given, and errors that say what is missing.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::unistd::{AccessFlags, access, setsid};

use super::{Identity, Process, ProcessError, log};
use crate::folders::remedy;

/// The first descriptor after stdin, stdout and stderr.
const FIRST_INHERITED: libc::c_uint = 3;

/// A program to start as QEMU is started: in a session of its own, so that neither Ctrl-C nor a stop of the
/// owner takes it along; without a parent-death signal; stdin from `/dev/null`; in `/`, so that it keeps no
/// mount busy.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// An absolute path, see [`find_binary`].
    pub binary: &'a Path,
    /// Without the program's own name.
    pub args: Vec<OsString>,
    /// What it inherits beside 0, 1 and 2, under the same numbers. They stay close-on-exec in this process.
    pub inherit: Vec<BorrowedFd<'a>>,
    /// Takes stdout and stderr; rotated first.
    pub log: &'a Path,
    /// How many bytes it may lock in memory; a limit that is high enough stays as it is.
    pub memlock: Memlock,
    /// Variables beside those of this process.
    pub env: Vec<(OsString, OsString)>,
}

/// How many bytes a program may lock in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memlock {
    /// As many as this process.
    Inherited,
    /// So many, or as near to that as this user may go.
    Wanted(u64),
    /// So many: without them it is not started.
    Needed(u64),
}

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SpawnError {
    #[error(
        "there is no program {binary:?}: install QEMU (on Debian: apt-get install qemu-system-x86), or name another binary in the \
         VM's config"
    )]
    NoBinary { binary: PathBuf },
    #[error(
        "{binary:?} is not a program this user may run: check its mode (chmod +x) and its folders', or name another binary"
    )]
    NotExecutable { binary: PathBuf, source: io::Error },
    #[error("cannot open the log {log:?}: {}", remedy(.source))]
    Log { log: PathBuf, source: io::Error },
    #[error(
        "{binary:?} needs to lock {wanted} bytes of memory and this user may lock {allowed}: raise the hard limit (LimitMEMLOCK= in \
         the systemd unit, `memlock` in /etc/security/limits.conf) or run as root"
    )]
    Memlock { binary: PathBuf, wanted: u64, allowed: u64, source: io::Error },
    #[error("cannot start {binary:?}: see the reason below; `{} --version` should work from a shell", binary.display())]
    Exec { binary: PathBuf, source: io::Error },
    #[error("started {binary:?} and lost sight of it, so it was killed: try again")]
    Watch { binary: PathBuf, source: ProcessError },
}

/// The absolute path of `binary`: itself if it has a slash in it, else the first one in `PATH`.
///
/// # Errors
/// There is none, or this user may not run it.
pub fn find_binary(binary: &Path) -> Result<PathBuf, SpawnError> {
    find_binary_in(binary, &env::var_os("PATH").unwrap_or_default())
}

fn find_binary_in(binary: &Path, search: &OsStr) -> Result<PathBuf, SpawnError> {
    let missing = || SpawnError::NoBinary { binary: binary.into() };
    let unusable = |source| SpawnError::NotExecutable { binary: binary.into(), source };
    let mut reason = None;
    let candidates = match binary.components().count() {
        1 if !binary.as_os_str().is_empty() && !binary.has_root() => {
            env::split_paths(search).map(|p| p.join(binary)).collect()
        }
        _ => vec![binary.to_owned()],
    };
    for candidate in candidates {
        match access(&candidate, AccessFlags::X_OK) {
            Ok(()) if candidate.is_dir() => reason = Some(io::ErrorKind::IsADirectory.into()),
            Ok(()) => return std::path::absolute(&candidate).map_err(unusable),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
            Err(error) => reason = Some(error.into()),
        }
    }
    Err(reason.map_or_else(missing, unusable))
}

impl Spawn<'_> {
    /// Starts it. When this returns, the program has been executed.
    ///
    /// # Errors
    /// Nothing runs then.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(&self) -> Result<Process, SpawnError> {
        let binary = || self.binary.to_path_buf();
        let memlock = self.memlock().map_err(|source| SpawnError::Exec { binary: binary(), source })?;
        let log = log::open_rotated(self.log);
        let log = log.and_then(|file| Ok((file.try_clone()?, file)));
        let (stdout, stderr) = log.map_err(|source| SpawnError::Log { log: self.log.into(), source })?;

        let mut command = Command::new(self.binary);
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value))).current_dir("/");
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let is_needed = matches!(self.memlock, Memlock::Needed(_));
        prepare_child(&mut command, &self.inherit, memlock, is_needed);
        // The standard library gives the child an empty signal mask and the default SIGPIPE.
        let child = command.spawn().map_err(|source| self.explain(source, memlock))?;

        // Nobody has reaped the child, so its pid is still its own.
        let watched = Identity::of(child.id())
            .map_err(|source| ProcessError { pid: child.id(), step: "identify", source })
            .and_then(Process::watch);
        watched.map_err(|source| {
            let mut child = child;
            // Both fail only if it has ended already, which is what we want.
            let _ = child.kill().and_then(|()| child.wait());
            SpawnError::Watch { binary: binary(), source }
        })
    }

    /// The soft and hard limit to set, if the present soft one is not enough.
    fn memlock(&self) -> io::Result<Option<(rlim_t, rlim_t)>> {
        let (Memlock::Wanted(bytes) | Memlock::Needed(bytes)) = self.memlock else { return Ok(None) };
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
        Ok((bytes > soft).then_some((bytes, hard.max(bytes))))
    }

    fn explain(&self, source: io::Error, memlock: Option<(rlim_t, rlim_t)>) -> SpawnError {
        let binary = self.binary.to_path_buf();
        let allowed = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(_, hard)| hard);
        match (source.kind(), memlock) {
            (io::ErrorKind::NotFound, _) if !self.binary.exists() => SpawnError::NoBinary { binary },
            (io::ErrorKind::PermissionDenied, Some((wanted, hard))) if hard > allowed => {
                SpawnError::Memlock { binary, wanted, allowed, source }
            }
            (io::ErrorKind::PermissionDenied, _) => SpawnError::NotExecutable { binary, source },
            _ => SpawnError::Exec { binary, source },
        }
    }
}

/// What happens between fork and exec.
#[allow(unsafe_code)]
fn prepare_child(
    command: &mut Command,
    inherit: &[BorrowedFd<'_>],
    memlock: Option<(rlim_t, rlim_t)>,
    is_needed: bool,
) {
    let inherit: Vec<_> = inherit.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: the child of a process that may have threads may only make async-signal-safe calls: these are
    // system calls only, and nothing allocates (an `io::Error` made from an errno does not). `Spawn` borrows
    // the descriptors, so they are open until after the fork, and `command` does not outlive that.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            // What whoever started us left open is not QEMU's. Before Linux 5.11 this fails, and such
            // descriptors stay open.
            libc::syscall(
                libc::SYS_close_range,
                FIRST_INHERITED,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            if let Some((soft, hard)) = memlock
                && let Err(refused) = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)
            {
                if is_needed {
                    return Err(refused.into());
                }
                // Root in a container, say, may not go past the hard limit.
                let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
                setrlimit(Resource::RLIMIT_MEMLOCK, soft.min(hard), hard)?;
            }
            for number in &inherit {
                fcntl(BorrowedFd::borrow_raw(*number), FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_binary_is_found_as_a_shell_would() {
        let temp = tempfile::tempdir().expect("a folder");
        let (first, second) = (temp.path().join("first"), temp.path().join("second"));
        for folder in [&first, &second] {
            fs::create_dir(folder).expect("made");
        }
        fs::write(second.join("qemu"), "").expect("written");
        let search = env::join_paths([&first, &second]).expect("no colon");
        let look = |binary: &Path| find_binary_in(binary, &search);

        assert!(matches!(look(Path::new("qemu")), Err(SpawnError::NotExecutable { .. })));
        fs::set_permissions(second.join("qemu"), Permissions::from_mode(0o755)).expect("ours");
        assert_eq!(look(Path::new("qemu")).expect("found"), second.join("qemu"));
        assert_eq!(look(&second.join("qemu")).expect("found"), second.join("qemu"));
        assert!(matches!(look(&first), Err(SpawnError::NotExecutable { .. })), "a folder");
        let error = look(Path::new("qemu-none")).expect_err("missing").to_string();
        assert!(error.contains("qemu-none") && error.contains("apt-get install qemu-system-x86"), "{error}");
        assert!(matches!(look(Path::new("")), Err(SpawnError::NoBinary { .. })));
    }
}
