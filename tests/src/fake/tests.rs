//! The fake, driven directly by `qmp-client`, and held beside a real QEMU.

mod alike;
mod behaviour;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use qmp_client::{Events, Options, Qmp};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Control, Fake};

/// A machine with three root ports and one monitor, fake or real; killed and reaped whatever happens.
struct Machine {
    process: Child,
    folder: TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[allow(unsafe_code)]
fn inherit(command: &mut Command, fd: OwnedFd) {
    // SAFETY: the child only makes a system call, on a descriptor that the closure owns.
    unsafe {
        command
            .pre_exec(move || fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).map(|_| ()).map_err(Into::into));
    }
}

impl Machine {
    fn start(binary: &Path, fake: &Fake, more: &[&str]) -> Machine {
        let folder = tempfile::tempdir().expect("a folder");
        let image = File::create(folder.path().join("disk.raw")).expect("an image");
        image.set_len(1 << 20).expect("room");
        let listener = UnixListener::bind(folder.path().join("qmp")).expect("a listener");
        let mut command = Command::new(binary);
        command.args(["-nodefaults", "-no-user-config", "-S", "-display", "none", "-machine", "q35"]);
        command.args(["-accel", "tcg", "-m", "size=64M", "-name", "guest=web,debug-threads=on"]);
        let fd = listener.as_raw_fd();
        command.args(["-chardev", &format!("socket,id=qmp.0,fd={fd},server=on,wait=off")]);
        command.args(["-mon", "chardev=qmp.0,mode=control"]);
        for port in 1..4 {
            let id = format!("rp{port}");
            let port = json!({"driver": "pcie-root-port", "id": id, "bus": "pcie.0", "addr": format!("0x{port}"), "chassis": port});
            command.args(["-device", &port.to_string()]);
        }
        command.args(more).envs(fake.env()).env("QVIRT_FAKE_CONTROL", folder.path().join("control"));
        command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        inherit(&mut command, listener.into());
        Machine { process: command.spawn().expect("it starts"), folder }
    }

    fn fake(rules: &str) -> Machine {
        Machine::start(&Fake::binary(), &Fake::new().rule(rules), &[])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn connect(&self) -> (Qmp, Events) {
        let stream = tokio::net::UnixStream::connect(self.path("qmp")).await.expect("a monitor");
        Qmp::connect(stream, Options::default()).await.expect("a session")
    }

    fn control(&self) -> Control {
        Control::connect(&self.path("control"))
    }

    fn ended(&mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match self.process.try_wait().expect("our own child") {
                Some(status) => return status,
                None if Instant::now() > until => panic!("it still runs"),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// The events that came so far and until none came for `quiet`: name and data.
async fn drain(events: &mut Events, quiet: Duration) -> Vec<(String, Value)> {
    let mut seen = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(quiet, events.next()).await {
        seen.push((event.name, event.data));
    }
    seen
}
