//! A file of a file system whose server is elsewhere, such as NFS, and stops answering on order: FUSE, with QEMU's storage daemon as the server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Done, HostError, image, modprobe, program, wait_for};
use crate::qemu::{QemuVersion, images};

/// Such a file. Dropping it ends the server and removes the file.
#[derive(Debug)]
pub struct FarFile {
    server: Child,
    path: PathBuf,
    backing: PathBuf,
}

impl FarFile {
    /// One of that size, full of zeros, whose server answers.
    ///
    /// # Errors
    /// The server cannot be started, or serves nothing.
    pub fn new(name: &str, mib: u64) -> Done<FarFile> {
        modprobe(&["fuse"])?;
        let (backing, path) = (image(&format!("{name}.behind"), mib)?, image(&format!("{name}.far"), 0)?);
        let mut command = Command::new(images().qemu_storage_daemon(QemuVersion::V10_0));
        command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={}", backing.display()));
        command.args(["--blockdev", "driver=raw,node-name=disk,file=file"]);
        let export = format!("type=fuse,id=far,node-name=disk,writable=on,mountpoint={}", path.display());
        let server = command.args(["--export", &export]).stdin(Stdio::null()).spawn();
        let server = server.map_err(|e| HostError(format!("{command:?} cannot be run: {e}")))?;
        let file = FarFile { server, path, backing };
        let is_there = || std::fs::metadata(&file.path).is_ok_and(|found| found.len() == mib << 20);
        wait_for(&format!("the file {}", file.path.display()), || is_there().then_some(()))?;
        Ok(file)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its server answers from now on.
    ///
    /// # Errors
    /// The server is dead.
    pub fn answers(&self, yes: bool) -> Done<()> {
        let signal = if yes { Signal::SIGCONT } else { Signal::SIGSTOP };
        let pid = Pid::from_raw(self.server.id().cast_signed());
        kill(pid, signal).map_err(|e| HostError(format!("{signal} to the server of a far file: {e}")))
    }
}

impl Drop for FarFile {
    fn drop(&mut self) {
        // Whatever state it is in: the kernel ends the mount with its server.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = program("umount", &["--lazy", &self.path.display().to_string()]);
        for file in [&self.path, &self.backing] {
            let _ = std::fs::remove_file(file);
        }
    }
}
