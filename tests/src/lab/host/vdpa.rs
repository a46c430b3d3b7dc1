//! vDPA devices of the lab host: in software, by VDUSE.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    let file = image("vdpa0.img", DISK_MIB)?;
    let mut daemon = Command::new(images().qemu_storage_daemon(QemuVersion::V10_0));
    daemon.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={}", file.display()));
    daemon.args(["--blockdev", "driver=raw,node-name=disk,file=file"]);
    daemon.args([
        "--export",
        &format!("type=vduse-blk,id=vduse,node-name=disk,name={DISK},writable=on,serial={DISK}"),
    ]);
    serve(DISK, &mut daemon)?;
    serve(NIC, Command::new(profile_folder().join("vduse-net")).args([NIC, "--mac", NIC_MAC]))
}

/// Starts the server of a VDUSE device, which serves until the lab ends, and puts the device on the vDPA bus.
fn serve(name: &str, server: &mut Command) -> Done<()> {
    server.stdin(Stdio::null()).stdout(Stdio::null());
    server.spawn().map_err(|e| HostError(format!("{server:?} cannot be run: {e}")))?;
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
