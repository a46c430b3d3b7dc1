//! Real processes: `sh` and `sleep` stand for QEMU.

use super::*;
use crate::locks::{OfdLock, probe};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

const PATIENCE: Duration = Duration::from_secs(10);

/// A running child in its own folder, killed when the test ends in any way.
struct Running {
    process: Process,
    temp: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has ended, which is what this is for.
        let _ = self.process.signal(Signal::SIGKILL);
    }
}

impl Running {
    fn log(&self) -> PathBuf {
        self.temp.path().join("qemu.log")
    }

    async fn exit(&self) -> Exit {
        tokio::time::timeout(PATIENCE, self.process.exited()).await.expect("it ends")
    }
}

fn sh(script: &str, inherit: Vec<BorrowedFd<'_>>, memlock: Memlock) -> Running {
    let temp = tempfile::tempdir().expect("a folder");
    let spawn = Spawn {
        binary: &find_binary(Path::new("sh")).expect("sh"),
        args: vec!["-c".into(), script.into()],
        inherit,
        log: &temp.path().join("qemu.log"),
        memlock,
        env: vec![("QVIRT_TEST".into(), "set".into())],
    };
    Running { process: spawn.start().expect("started"), temp }
}

#[tokio::test]
async fn exits_are_told_as_they_were() {
    let failing = sh("echo out; echo why >&2; exit 3", vec![], Memlock::Inherited);
    assert_eq!(failing.exit().await, Exit::Status(3));
    assert_eq!(failing.exit().await.to_string(), "exited with status 3", "asked twice, told twice");
    assert_eq!(last_lines(&failing.log(), 5), "out\nwhy");
    assert!(!failing.process.signal(Signal::SIGTERM).expect("gone is no error"));

    let killed = sh("exec sleep 60", vec![], Memlock::Inherited);
    assert_eq!(killed.process.try_exited(), None);
    let exit = killed.process.kill(PATIENCE).await.expect("ours").expect("it ends");
    assert_eq!(exit.to_string(), "killed by signal 9 (SIGKILL)");
    assert!(!killed.process.identity().is_alive());
}

#[tokio::test]
async fn the_child_is_alone_and_inherits_exactly_what_it_is_given() {
    let temp = tempfile::tempdir().expect("a folder");
    let given = OfdLock::try_acquire(&temp.path().join("life")).expect("usable").expect("free");
    let kept = OfdLock::try_acquire(&temp.path().join("owner")).expect("usable").expect("free");
    // A descriptor that whoever started us forgot: not close-on-exec.
    let stray = rustix::io::fcntl_dupfd_cloexec(&kept, 0).expect("a copy");
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).expect("ours");
    let child = sh("echo $QVIRT_TEST; exec sleep 60", vec![given.as_fd()], Memlock::Inherited);

    let proc = PathBuf::from(format!("/proc/{}", child.process.pid()));
    let end = std::time::Instant::now() + PATIENCE;
    let settled = async |what: &str, now: &dyn Fn() -> String, wanted: &str| {
        // The child becomes `sleep` by and by, and the loader has files open meanwhile.
        while now() != wanted {
            assert!(std::time::Instant::now() < end, "{what} is {}, not {wanted}", now());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let status = |field: &str| {
        let text = fs::read_to_string(proc.join("status")).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
        line.expect("a field of proc(5)").to_owned()
    };
    let fds = || {
        let names = fs::read_dir(proc.join("fd")).expect("it runs").map(|e| e.expect("an entry").file_name());
        let mut fds: Vec<i32> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        fds.sort();
        format!("{fds:?}")
    };
    let link = |name: &str| fs::read_link(proc.join(name)).expect("it runs");
    settled("its name", &|| status("Name"), "sleep").await;
    settled("its descriptors", &fds, &format!("[0, 1, 2, {}]", given.as_fd().as_raw_fd())).await;
    assert_eq!(status("SigBlk"), "0000000000000000");
    let ignored = u64::from_str_radix(&status("SigIgn"), 16).expect("hex");
    assert_eq!(ignored & (1 << (Signal::SIGPIPE as u32 - 1)), 0, "SIGPIPE is not ignored");
    assert_eq!((link("cwd"), link("fd/0"), link("fd/2")), ("/".into(), "/dev/null".into(), child.log()));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.process.pid()).expect("a pid"));
    assert_eq!(nix::unistd::getsid(Some(pid)), Ok(pid), "leader of its own session");
    assert_eq!(last_lines(&child.log(), 1), "set");
}

#[tokio::test]
async fn the_life_lock_passes_to_the_child() {
    let temp = tempfile::tempdir().expect("a folder");
    let life = temp.path().join("life");
    let lock = OfdLock::try_acquire(&life).expect("usable").expect("free");
    let child = sh("exec sleep 60", vec![lock.as_fd()], Memlock::Inherited);
    drop(lock);
    assert!(probe(&life).expect("probed"), "the child holds it");
    child.process.kill(PATIENCE).await.expect("ours").expect("it ends");
    let free = async {
        while probe(&life).expect("probed") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, free).await.expect("it ends with the child");
}

#[tokio::test]
async fn a_process_that_is_no_child_is_adopted_and_its_end_seen() {
    // The grandchild's parent ends at once, so it is init's.
    let parent = sh("sleep 60 & echo $!", vec![], Memlock::Inherited);
    assert!(parent.exit().await.success());
    let pid: u32 = last_lines(&parent.log(), 1).parse().expect("a pid");
    let identity = Identity::of(pid).expect("it runs");

    let process = Process::adopt(&identity).expect("allowed").expect("it runs");
    let adopted = Running { process, temp: tempfile::tempdir().expect("a folder") };
    assert_eq!(adopted.process.try_exited(), None);
    let stranger = Identity { start_time: identity.start_time + 1, ..identity.clone() };
    assert!(Process::adopt(&stranger).expect("allowed").is_none(), "same pid, another process");

    assert!(adopted.process.signal(Signal::SIGTERM).expect("ours"));
    assert_eq!(adopted.exit().await, Exit::Gone);
    assert_eq!(adopted.exit().await.to_string(), "gone");
    assert!(Process::adopt(&identity).expect("allowed").is_none());
}

#[tokio::test]
async fn a_dropped_wait_harms_nobody() {
    let child = sh("read line < /dev/null; sleep 0.2; exit 7", vec![], Memlock::Inherited);
    tokio::time::timeout(Duration::from_millis(1), child.process.exited()).await.expect_err("still running");
    let (one, two) = tokio::join!(child.exit(), child.exit());
    assert_eq!((one, two), (Exit::Status(7), Exit::Status(7)));
}

#[tokio::test]
async fn the_memory_lock_limit_is_the_childs_alone() {
    let (soft, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).expect("readable");
    // Within the hard limit no privilege is needed, so this runs as any user.
    let wanted = if soft < hard { soft + 4096 } else { soft };
    let child = sh("grep 'Max locked memory' /proc/self/limits", vec![], Memlock::Needed(wanted));
    assert!(child.exit().await.success());
    let line = last_lines(&child.log(), 1);
    let expected = if wanted == u64::MAX { "unlimited".into() } else { wanted.to_string() };
    assert_eq!(line.split_ascii_whitespace().nth(3), Some(expected.as_str()), "{line}");
    assert_eq!(
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).expect("readable"),
        (soft, hard)
    );
}

/// No user may go past the hard limit but one with CAP_SYS_RESOURCE: what is only wanted goes as far as it can.
#[tokio::test]
async fn memory_that_is_only_wanted_keeps_nobody_from_starting() {
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).expect("readable");
    let child = sh("ulimit -l", vec![], Memlock::Wanted(u64::MAX >> 1));
    assert!(child.exit().await.success(), "it runs");
    let said = last_lines(&child.log(), 1);
    let kib = said.trim().parse::<u64>().unwrap_or(u64::MAX);
    assert!(kib >= hard >> 10, "{said} KiB of {hard} bytes");
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let temp = tempfile::tempdir().expect("a folder");
    let log = temp.path().join("qemu.log");
    let start = |binary: &Path| {
        let spawn = Spawn {
            binary,
            args: vec![],
            inherit: vec![],
            log: &log,
            memlock: Memlock::Inherited,
            env: vec![],
        };
        spawn.start().expect_err("it cannot start")
    };
    assert!(matches!(start(Path::new("/nonexistent/qemu")), SpawnError::NoBinary { .. }));
    let text = temp.path().join("text");
    fs::write(&text, "no program").expect("written");
    assert!(matches!(start(&text), SpawnError::NotExecutable { .. }));
    let nowhere = Path::new("/nonexistent/qemu.log");
    let spawn = Spawn {
        binary: &text,
        args: vec![],
        inherit: vec![],
        log: nowhere,
        memlock: Memlock::Inherited,
        env: vec![],
    };
    let error = spawn.start().expect_err("no log").to_string();
    assert!(error.contains("/nonexistent/qemu.log"), "{error}");
}
