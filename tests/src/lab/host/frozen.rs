//! A file of a file system that is frozen on order, as a snapshot or a backup of the host does it: reads are done, writes wait.

use std::path::{Path, PathBuf};

use super::faulty::FaultyDisk;
use super::{Done, HostError, modprobe, program};

/// Such a file, on an ext4 of its own. Dropping it thaws and unmounts that, and removes the disk below.
#[derive(Debug)]
pub struct FrozenFile {
    mount: PathBuf,
    path: PathBuf,
    // Last, so that it goes after the file system.
    _disk: FaultyDisk,
}

impl FrozenFile {
    /// One of that size, full of zeros, that can be written.
    ///
    /// # Errors
    /// The file system cannot be made or mounted.
    pub fn new(name: &str, mib: u64) -> Done<FrozenFile> {
        modprobe(&["ext4"])?;
        let disk = FaultyDisk::new(name, mib * 2 + 16)?;
        let device = disk.path().display().to_string();
        program("mkfs.ext4", &["-q", &device])?;
        let mount = std::env::temp_dir().join(format!("qvirt-frozen-{name}"));
        let failed = |e: std::io::Error| HostError(format!("{}: {e}", mount.display()));
        std::fs::create_dir(&mount).map_err(failed)?;
        program("mount", &[&device, &mount.display().to_string()])?;
        let path = mount.join("disk.img");
        let file = FrozenFile { mount, path, _disk: disk };
        // Written: where it has no blocks yet, its writes would allocate them.
        let zeros = vec![0; usize::try_from(mib << 20).map_err(|e| HostError(e.to_string()))?];
        std::fs::write(&file.path, zeros).map_err(|e| HostError(format!("{}: {e}", file.path.display())))?;
        program("sync", &[])?;
        Ok(file)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it can be written from now on.
    ///
    /// # Errors
    /// The file system is so already.
    pub fn thaws(&self, yes: bool) -> Done<()> {
        let how = if yes { "--unfreeze" } else { "--freeze" };
        program("fsfreeze", &[how, &self.mount.display().to_string()]).map(drop)
    }
}

impl Drop for FrozenFile {
    fn drop(&mut self) {
        // It may be thawed.
        let _ = self.thaws(true);
        let _ = program("umount", &[&self.mount.display().to_string()]);
        let _ = std::fs::remove_dir(&self.mount);
    }
}
