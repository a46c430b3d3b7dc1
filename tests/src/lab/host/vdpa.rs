//! vDPA devices of the lab host: in software, by VDUSE. Tests make others of their own, which go with them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Done, HostError, image, modprobe, names, program, wait_for};
use crate::qemu::{QemuVersion, images, profile_folder};

/// The vDPA disk's name.
pub const DISK: &str = "vdpa0";
/// Its size.
pub const DISK_MIB: u64 = 32;
/// The vDPA NIC's name.
pub const NIC: &str = "vdpan0";
/// Its MAC.
pub const NIC_MAC: &str = "52:54:00:1a:b0:31";
/// Who answers ARP and ping at its other end.
pub const NIC_NEIGHBOUR: &str = "10.77.0.1";
/// An address in its neighbour's network, of 24 bits.
pub const NIC_GUEST: &str = "10.77.0.2";

pub(super) fn prepare() -> Done<()> {
    modprobe(&["vduse", "vhost_vdpa"])?;
    serve(DISK, &mut daemon(DISK, &image("vdpa0.img", DISK_MIB)?))?;
    serve(NIC, Command::new(profile_folder().join("vduse-net")).args([NIC, "--mac", NIC_MAC])).map(drop)
}

/// QEMU's storage daemon with a file as a VDUSE disk.
fn daemon(name: &str, file: &Path) -> Command {
    let mut daemon = Command::new(images().qemu_storage_daemon(QemuVersion::V10_0));
    daemon.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={}", file.display()));
    daemon.args(["--blockdev", "driver=raw,node-name=disk,file=file"]);
    let export = format!("type=vduse-blk,id=vduse,node-name=disk,name={name},writable=on,serial={name}");
    daemon.args(["--export", &export]);
    let socket = format!("socket,id=qmp,path={},server=on,wait=off", monitor(name).display());
    daemon.args(["--chardev", &socket, "--monitor", "chardev=qmp"]);
    daemon
}

fn monitor(name: &str) -> PathBuf {
    Path::new("/run/lab").join(format!("{name}.qmp"))
}

/// A disk of a test's own, not yet on the vDPA bus, which goes away with this.
#[derive(Debug)]
pub struct VduseDisk {
    name: String,
    file: PathBuf,
    daemon: Child,
}

impl VduseDisk {
    /// Starts to serve one of that size.
    ///
    /// # Errors
    /// Its server does not start.
    pub fn new(name: &str, mib: u64) -> Done<VduseDisk> {
        let file = image(&format!("{name}.img"), mib)?;
        let daemon = spawn(&mut daemon(name, &file))?;
        let disk = VduseDisk { name: name.to_owned(), file, daemon };
        // It listens when it has made its export.
        wait_for(&format!("the server of {name}"), || monitor(name).exists().then_some(()))?;
        Ok(disk)
    }

    /// The file behind it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Gives it another size.
    ///
    /// # Errors
    /// Its server refuses.
    pub fn resize(&self, mib: u64) -> Done<()> {
        let failed = |e: &dyn std::fmt::Display| HostError(format!("resizing {}: {e}", self.name));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| failed(&e))?.block_on(async {
            let stream =
                tokio::net::UnixStream::connect(monitor(&self.name)).await.map_err(|e| failed(&e))?;
            let connected = qmp_client::Qmp::connect(stream, qmp_client::Options::default()).await;
            let (qmp, _events) = connected.map_err(|e| failed(&e))?;
            let arguments = serde_json::json!({"node-name": "disk", "size": mib << 20});
            qmp.call("block_resize", arguments).await.map(drop).map_err(|e| failed(&e))
        })
    }
}

impl Drop for VduseDisk {
    fn drop(&mut self) {
        // A test that failed may have left it on the bus; one that was deleted is not there.
        let _ = program("vdpa", &["dev", "del", &self.name]);
        // It is ours and not reaped.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = std::fs::remove_file(monitor(&self.name));
        let _ = std::fs::remove_file(&self.file);
    }
}

fn spawn(server: &mut Command) -> Done<Child> {
    server.stdin(Stdio::null()).stdout(Stdio::null());
    server.spawn().map_err(|e| HostError(format!("{server:?} cannot be run: {e}")))
}

/// Starts the server of a VDUSE device, which serves until the lab ends, and puts the device on the vDPA bus.
fn serve(name: &str, server: &mut Command) -> Done<()> {
    spawn(server)?;
    // The kernel takes the device when the server has set all its queues up, and nothing but the attempt tells.
    wait_for(&format!("vdpa dev add {name}"), || {
        program("vdpa", &["dev", "add", "name", name, "mgmtdev", "vduse"]).ok()
    })?;
    device(name).map(drop)
}

pub(super) fn list() -> Done<String> {
    let (disk, nic) = (device(DISK)?, device(NIC)?);
    Ok(format!(
        "vDPA disk     {DISK} {}\nvDPA NIC      {NIC} {} {NIC_MAC}, pings {NIC_NEIGHBOUR}\n",
        disk.display(),
        nic.display()
    ))
}

/// The char device of a vDPA device, `/dev/vhost-vdpa-0`.
///
/// # Errors
/// It is not there after a minute.
pub fn device(name: &str) -> Done<PathBuf> {
    let folder = Path::new("/sys/bus/vdpa/devices").join(name);
    let node = || {
        names(&folder)
            .into_iter()
            .find(|entry| entry.starts_with("vhost-vdpa-"))
            .map(|entry| Path::new("/dev").join(entry))
    };
    wait_for(&format!("the char device of vDPA device {name}"), || node().filter(|path| path.exists()))
}
