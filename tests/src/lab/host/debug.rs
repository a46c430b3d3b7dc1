//! SCSI disks in the kernel's memory (`scsi_debug`) that have bad sectors on order.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Done, modprobe, names, program, wait_for, write};

/// What they do beside what disks do.
const OPTIONS: &str = "/sys/bus/pseudo/drivers/scsi_debug/opts";
/// One of these: the sectors that are to be bad are bad.
const BAD_SECTORS: u8 = 2;

/// Disks of one driver: the sectors that are bad are the same on all. Dropping this removes them; one set is there at a time.
#[derive(Debug)]
pub struct DebugDisks {
    /// As the kernel calls them: `sda`.
    names: Vec<String>,
}

impl DebugDisks {
    /// That many disks of that size, full of zeros. All their sectors are good until [`DebugDisks::are_bad`].
    ///
    /// # Errors
    /// There are some already, or the kernel makes none.
    pub fn new(count: usize, mib: u64, bad: &Range<u64>) -> Done<DebugDisks> {
        // Without a store for each, all disks of the driver are the same memory.
        let size = [format!("dev_size_mb={mib}"), format!("add_host={count}"), "per_host_store=1".to_owned()];
        let sectors = [
            format!("medium_error_start={}", bad.start),
            format!("medium_error_count={}", bad.end - bad.start),
        ];
        let words: Vec<&str> = size.iter().chain(&sectors).map(String::as_str).collect();
        program("modprobe", &[&["scsi_debug", "opts=0"], &words[..]].concat())?;
        let mut disks = DebugDisks { names: Vec::new() };
        for adapter in 0..count {
            disks.names.push(wait_for(&format!("the disk of adapter{adapter}"), || disk_of(adapter))?);
        }
        Ok(disks)
    }

    /// The block device of one.
    pub fn path(&self, number: usize) -> PathBuf {
        Path::new("/dev").join(&self.names[number])
    }

    /// Whether the sectors that are to be bad cannot be read.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn are_bad(&self, bad: bool) -> Done<()> {
        write(OPTIONS, if bad { BAD_SECTORS } else { 0 })
    }

    /// All of them.
    fn remove(&self) -> Done<()> {
        self.are_bad(false)?;
        // Who looks at a new disk, as udev does, has it open for a moment.
        wait_for("the end of the driver scsi_debug", || modprobe(&["-r", "scsi_debug"]).ok())
    }
}

impl Drop for DebugDisks {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            assert!(std::thread::panicking(), "the disks of scsi_debug could not be removed: {e}");
            eprintln!("the disks of scsi_debug could not be removed: {e}");
        }
    }
}

/// The disk on an adapter, once it has a node.
fn disk_of(adapter: usize) -> Option<String> {
    let mut folder = Path::new("/sys/bus/pseudo/devices").join(format!("adapter{adapter}"));
    for is_next in ["host", "target", ""] {
        let next = names(&folder).into_iter().find(|name| match is_next {
            // Host, channel, target and unit.
            "" => name.split(':').count() == 4,
            beginning => name.starts_with(beginning),
        });
        folder = folder.join(next?);
    }
    let name = names(folder.join("block")).pop()?;
    Path::new("/dev").join(&name).exists().then_some(name)
}
