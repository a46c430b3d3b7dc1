//! A disk that misbehaves on order: device-mapper on a loop device.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Done, HostError, finished, image, modprobe, program};

/// The one that is there from the start; tests may make more.
pub const NAME: &str = "faulty";
/// Its size.
pub const MIB: u64 = 64;

/// How the disk behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// As a disk should.
    Works,
    /// Every request fails with EIO.
    Fails,
    /// Reads fail, writes are done.
    ReadsFail,
    /// Writes fail, reads are done.
    WritesFail,
    /// Requests that touch these sectors fail.
    BadSectors {
        /// The first one.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Every request takes that many milliseconds longer.
    Slow(u32),
    /// Requests wait until the disk behaves otherwise, and get what it does then.
    Stalls,
}

/// A disk on device-mapper. Dropping one that [`FaultyDisk::new`] made removes it; one from [`FaultyDisk::ready`] then works again.
#[derive(Debug)]
pub struct FaultyDisk {
    name: String,
    loop_device: String,
    sectors: u64,
    ours: bool,
}

pub(super) fn prepare() -> Done<()> {
    modprobe(&["loop", "dm_mod", "dm_flakey", "dm_delay"])?;
    let mut disk = FaultyDisk::new(NAME, MIB)?;
    // It stays.
    disk.ours = false;
    Ok(())
}

pub(super) fn list() -> String {
    format!("faulty disk   /dev/mapper/{NAME}: dmsetup table|suspend|load|resume {NAME}\n")
}

impl FaultyDisk {
    /// A new disk of that size, full of zeros.
    ///
    /// # Errors
    /// A disk of the name exists, or a program fails.
    pub fn new(name: &str, mib: u64) -> Done<FaultyDisk> {
        let file = image(&format!("{name}.disk"), mib)?;
        let loop_device =
            program("losetup", &["--find", "--show", &file.display().to_string()])?.trim().to_owned();
        let disk = FaultyDisk { name: name.to_owned(), loop_device, sectors: mib << 11, ours: true };
        dmsetup(&["create", name, "--table", &disk.table(Behaviour::Works)])?;
        Ok(disk)
    }

    /// The one that the lab has ready, working.
    ///
    /// # Errors
    /// It is not as [`prepare`](super::prepare) left it.
    pub fn ready() -> Done<FaultyDisk> {
        let table = dmsetup(&["deps", "-o", "devname", NAME])?;
        let name = table.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(name, _)| name);
        let name = name.ok_or_else(|| HostError(format!("dmsetup deps {NAME} says {table:?}")))?;
        let disk = FaultyDisk {
            name: NAME.into(),
            loop_device: format!("/dev/{name}"),
            sectors: MIB << 11,
            ours: false,
        };
        disk.behave(Behaviour::Works)?;
        Ok(disk)
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// Changes its behaviour, for requests that wait as well; none is lost or done twice.
    ///
    /// # Errors
    /// A program fails.
    pub fn behave(&self, behaviour: Behaviour) -> Done<()> {
        let name = self.name.as_str();
        // Without a flush, which would wait for what a broken disk never finishes.
        dmsetup(&["suspend", "--noflush", "--nolockfs", name])?;
        if behaviour == Behaviour::Stalls {
            return Ok(());
        }
        dmsetup(&["load", name, "--table", &self.table(behaviour)])?;
        dmsetup(&["resume", name]).map(drop)
    }

    /// Takes the disk from the host: no node, and errors for whoever has it open.
    ///
    /// # Errors
    /// A program fails, or the node is gone already.
    pub fn vanish(&self) -> Done<()> {
        self.behave(Behaviour::Fails)?;
        std::fs::remove_file(self.path())
            .map_err(|e| HostError(format!("removing {}: {e}", self.path().display())))
    }

    /// Brings a vanished disk back, working.
    ///
    /// # Errors
    /// A program fails.
    pub fn come_back(&self) -> Done<()> {
        self.behave(Behaviour::Works)?;
        dmsetup(&["mknodes", &self.name]).map(drop)
    }

    fn table(&self, behaviour: Behaviour) -> String {
        let (sectors, device) = (self.sectors, self.loop_device.as_str());
        match behaviour {
            Behaviour::Works | Behaviour::Stalls => format!("0 {sectors} linear {device} 0"),
            Behaviour::Fails => format!("0 {sectors} error"),
            // Never up, down for an hour at a time.
            Behaviour::ReadsFail => format!("0 {sectors} flakey {device} 0 0 3600 1 error_reads"),
            Behaviour::WritesFail => format!("0 {sectors} flakey {device} 0 0 3600 1 error_writes"),
            Behaviour::Slow(milliseconds) => format!("0 {sectors} delay {device} 0 {milliseconds}"),
            Behaviour::BadSectors { first, count } => {
                let after = first + count;
                let mut table = String::new();
                if first > 0 {
                    table.push_str(&format!("0 {first} linear {device} 0\n"));
                }
                table.push_str(&format!("{first} {count} error\n"));
                if after < sectors {
                    table.push_str(&format!("{after} {} linear {device} {after}\n", sectors - after));
                }
                table
            }
        }
    }

    /// All of it, whatever fails; the first failure is told.
    fn remove(&self) -> Done<()> {
        // What still waits in it would keep the loop device.
        let failing = self.behave(Behaviour::Fails);
        let removed = dmsetup(&["remove", "--retry", &self.name]).map(drop);
        let detached = program("losetup", &["--detach", &self.loop_device]).map(drop);
        // Where the disk was never made there is only its file.
        let _ = std::fs::remove_file(Path::new("/run/lab").join(format!("{}.disk", self.name)));
        failing.and(removed).and(detached)
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let done = if self.ours { self.remove() } else { self.come_back() };
        if let Err(e) = done {
            assert!(std::thread::panicking(), "the disk {} could not be put right: {e}", self.name);
            eprintln!("the disk {} could not be put right: {e}", self.name);
        }
    }
}

fn dmsetup(arguments: &[&str]) -> Done<String> {
    // It then makes the nodes below /dev/mapper itself, so they are there when it returns.
    finished(Command::new("dmsetup").args(arguments).env("DM_DISABLE_UDEV", "1"))
}
