//! Host-wide leases: what only one VM may use, and who has it.
//!
//! Owns the lease folder, one for all users of the host. A lease is a claim, not a lock: whether its holder
//! lives is asked of that VM's locks and journal ([`look`]). Behind it stands the kernel's own exclusivity
//! (image locks, vfio groups, usbfs).
//!
//! The folder has the sticky bit, so nobody can replace another user's file. Hence each user has a file of
//! their own for each thing, `KEY.UID.json`, and a lease is what all files of a key say together. All changes
//! are made under an flock of `.lock`.

mod holder;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::folders::{UNFINISHED, VmName, WriteError, write_volatile};
use crate::process::BootId;

use holder::describe;
pub use holder::{Holder, Staleness, look};

/// The format that this qvirt writes, and the newest it reads.
const FORMAT: u32 = 1;

/// Changes take microseconds; whoever holds the lock for so long is stopped or means harm.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// No honest lease file is longer.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A thing of the host that is leased.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseKey {
    /// A disk image or block device, by what the file system says it is, not by path.
    Image {
        /// Of the file system, `st_dev`.
        dev: u64,
        /// Within it, `st_ino`.
        ino: u64,
    },
    /// A USB port of the host: it stays when the device on it is enumerated anew.
    Usb {
        /// The bus' number.
        bus: u8,
        /// The path of ports, such as `1.4`.
        port: String,
    },
    /// A PCI function, such as a VF, by its address.
    Pci {
        /// `0000:04:10.1`
        address: String,
    },
    /// An IOMMU group.
    IommuGroup {
        /// Its number under `/sys/kernel/iommu_groups`.
        number: u32,
    },
    /// A vDPA device.
    Vdpa {
        /// Its name under `/sys/bus/vdpa/devices`.
        name: String,
    },
    /// A target of vhost-scsi.
    VhostScsi {
        /// Its name under `/sys/kernel/config/target/vhost`.
        wwpn: String,
    },
}

impl LeaseKey {
    /// The image that `path` leads to.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn image(path: &Path) -> io::Result<LeaseKey> {
        let found = fs::metadata(path)?;
        Ok(match found.rdev() {
            // A block device may have several nodes; its number is what it is.
            rdev if found.mode() & libc::S_IFMT == libc::S_IFBLK => LeaseKey::Image { dev: 0, ino: rdev },
            _ => LeaseKey::Image { dev: found.dev(), ino: found.ino() },
        })
    }

    /// The beginning of its files' names, up to and with the dot before the user's number.
    fn file_prefix(&self) -> String {
        // A name may hold anything; in a file name only these are safe, the dot being ours.
        let safe = |text: &str| {
            let keep = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b':');
            text.bytes()
                .map(|b| if keep(b) { char::from(b).to_string() } else { format!("%{b:02x}") })
                .collect::<String>()
        };
        match self {
            LeaseKey::Image { dev, ino } => format!("image-{dev:x}-{ino:x}."),
            LeaseKey::Usb { bus, port } => format!("usb-{bus}-{}.", safe(port)),
            LeaseKey::Pci { address } => format!("pci-{}.", safe(address)),
            LeaseKey::IommuGroup { number } => format!("iommu-group-{number}."),
            LeaseKey::Vdpa { name } => format!("vdpa-{}.", safe(name)),
            LeaseKey::VhostScsi { wwpn } => format!("vhost-scsi-{}.", safe(wwpn)),
        }
    }
}

/// How a thing is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// By nobody else.
    Exclusive,
    /// Beside others who share it.
    Shared,
}

/// Why a lease was not given.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LeaseError {
    #[error("{path} is in use: {}", describe(.holder, *.state))]
    Held { path: String, holder: Box<Holder>, state: Staleness },
    #[error(
        "the run folder {run_dir:?} of VM {vm} is not absolute, so nobody else could find its locks: give QVIRT_ROOT as an absolute path"
    )]
    RelativeRunDir { vm: VmName, run_dir: PathBuf },
    #[error("cannot {step} {path:?}: check that the lease folder has mode 1777, and the owner of the file")]
    Io { path: PathBuf, step: &'static str, source: io::Error },
    #[error("someone has held {path:?} for {} s: see who with `fuser -v {}`", LOCK_PATIENCE.as_secs(), path.display())]
    Locked { path: PathBuf },
    #[error("the lease file {path:?} cannot be read: if no VM uses this any more (`qvirt list`), remove it with `rm {}`", path.display())]
    Corrupt { path: PathBuf, source: serde_json::Error },
    #[error(
        "the lease file {path:?} has format {found} and this qvirt reads up to {FORMAT}: use the newer qvirt that wrote it"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error("cannot store a lease")]
    Write(#[from] WriteError),
}

/// The content of a lease file.
#[derive(Debug, Serialize, Deserialize)]
struct Lease {
    format: u32,
    boot: BootId,
    key: LeaseKey,
    holders: Vec<Held>,
}

/// A holder and how it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    mode: Mode,
    #[serde(flatten)]
    holder: Holder,
}

/// The lease folder.
#[derive(Debug)]
pub struct Leases {
    dir: PathBuf,
    boot: BootId,
}

impl Leases {
    /// The leases in `dir`, which exists (see [`crate::folders::Folders::make`]).
    ///
    /// # Errors
    /// This boot has no id, because `/proc` is not mounted.
    pub fn open(dir: &Path) -> Result<Leases, LeaseError> {
        let boot = BootId::current().map_err(|source| LeaseError::Io {
            path: dir.into(),
            step: "date leases in",
            source,
        })?;
        Ok(Leases { dir: dir.into(), boot })
    }

    /// Gives `key` to `holder`, unless someone who is not stale by `is_stale` has it in a way that excludes
    /// this. Stale holders of this user are removed, those of others passed over. Doing it again for the same
    /// device of the same VM replaces what it has.
    ///
    /// # Errors
    /// It is held, or the lease cannot be read or stored; nothing has changed then.
    pub fn acquire(
        &self,
        key: &LeaseKey,
        mode: Mode,
        holder: Holder,
        is_stale: impl Fn(&Holder) -> Staleness,
    ) -> Result<(), LeaseError> {
        if !holder.run_dir.is_absolute() {
            return Err(LeaseError::RelativeRunDir { vm: holder.vm, run_dir: holder.run_dir });
        }
        let _lock = self.lock()?;
        let mut mode = mode;
        let mut mine = Vec::new();
        for (file, lease) in self.leases(|name| name.starts_with(&key.file_prefix()))? {
            for held in lease.holders {
                if held.holder.is(&holder.vm, &holder.run_dir) && held.holder.device == holder.device {
                    // A chain may come to one image by two paths: the stronger use counts.
                    if held.mode == Mode::Exclusive {
                        mode = Mode::Exclusive;
                    }
                    continue;
                }
                // Members of one group may be several devices, if of one VM.
                let of_one_vm =
                    matches!(key, LeaseKey::IommuGroup { .. }) && held.holder.is(&holder.vm, &holder.run_dir);
                let shareable = of_one_vm || mode == Mode::Shared && held.mode == Mode::Shared;
                match is_stale(&held.holder) {
                    Staleness::Stale => {
                        info!(vm = %held.holder.vm, device = held.holder.device, "passed over a stale lease of {}", holder.path);
                        continue;
                    }
                    state if !shareable => {
                        return Err(LeaseError::Held {
                            path: holder.path,
                            holder: Box::new(held.holder),
                            state,
                        });
                    }
                    _ => {}
                }
                if file == self.own_file(key) {
                    mine.push(held);
                }
            }
        }
        mine.push(Held { mode, holder });
        self.store(key, mine)
    }

    /// Takes `key` back from `device` of this user's `vm`. Not having it is no error.
    ///
    /// # Errors
    /// The lease cannot be read or stored.
    pub fn release(&self, key: &LeaseKey, vm: &VmName, device: &str) -> Result<(), LeaseError> {
        let _lock = self.lock()?;
        let own = self.own_file(key);
        match read(&own, &self.boot)? {
            Some(lease) => self.keep(lease, |held| held.vm != *vm || held.device != device),
            None => Ok(()),
        }
    }

    /// Takes back everything that `device` of this user's `vm` has.
    ///
    /// # Errors
    /// A lease cannot be read or stored; those before it are released.
    pub fn release_device(&self, vm: &VmName, run_dir: &Path, device: &str) -> Result<(), LeaseError> {
        self.release_device_but(vm, run_dir, device, &[])
    }

    /// Gives up everything that a device holds but for what it has by these paths.
    ///
    /// # Errors
    /// As [`Leases::release`].
    pub fn release_device_but(
        &self,
        vm: &VmName,
        run_dir: &Path,
        device: &str,
        paths: &[&str],
    ) -> Result<(), LeaseError> {
        let _lock = self.lock()?;
        for (_, lease) in self.leases(is_own)? {
            let goes = |held: &Holder| {
                held.is(vm, run_dir) && held.device == device && !paths.contains(&held.path.as_str())
            };
            self.keep(lease, |held| !goes(held))?;
        }
        Ok(())
    }

    /// Takes back everything that this user's `vm` with that runtime folder has.
    ///
    /// # Errors
    /// A lease cannot be read or stored; those before it are released.
    pub fn release_all(&self, vm: &VmName, run_dir: &Path) -> Result<(), LeaseError> {
        self.release_all_but(vm, run_dir, &[])
    }

    /// Takes back everything that this user's `vm` has, but for what these devices have.
    ///
    /// # Errors
    /// As [`Leases::release`].
    pub fn release_all_but(&self, vm: &VmName, run_dir: &Path, devices: &[&str]) -> Result<(), LeaseError> {
        let _lock = self.lock()?;
        let stays = |held: &Holder| !held.is(vm, run_dir) || devices.contains(&held.device.as_str());
        for (_, lease) in self.leases(is_own)? {
            self.keep(lease, stays)?;
        }
        Ok(())
    }

    /// All that anybody has, stale or not.
    ///
    /// # Errors
    /// A lease cannot be read.
    pub fn all(&self) -> Result<Vec<(LeaseKey, Holder)>, LeaseError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let with_key = |(_, lease): (PathBuf, Lease)| {
            let Lease { key, holders, .. } = lease;
            holders.into_iter().map(move |held| (key.clone(), held.holder))
        };
        Ok(self.leases(|_| true)?.into_iter().flat_map(with_key).collect())
    }

    /// What this user's `vm` has: key, mode, and the rest.
    ///
    /// # Errors
    /// A lease cannot be read.
    pub fn held_by(&self, vm: &VmName, run_dir: &Path) -> Result<Vec<(LeaseKey, Mode, Holder)>, LeaseError> {
        let mut all = Vec::new();
        for (_, lease) in self.leases(is_own)? {
            let held = lease.holders.into_iter().filter(|held| held.holder.is(vm, run_dir));
            all.extend(held.map(|held| (lease.key.clone(), held.mode, held.holder)));
        }
        Ok(all)
    }

    fn own_file(&self, key: &LeaseKey) -> PathBuf {
        self.dir.join(format!("{}{}.json", key.file_prefix(), Uid::effective()))
    }

    /// Stores those holders of a lease of ours that `keep` keeps, if that makes a difference.
    fn keep(&self, mut lease: Lease, keep: impl Fn(&Holder) -> bool) -> Result<(), LeaseError> {
        let before = lease.holders.len();
        lease.holders.retain(|held| keep(&held.holder));
        if lease.holders.len() == before {
            return Ok(());
        }
        self.store(&lease.key, lease.holders)
    }

    fn store(&self, key: &LeaseKey, holders: Vec<Held>) -> Result<(), LeaseError> {
        let path = &self.own_file(key);
        let failed = |step| move |source| LeaseError::Io { path: path.clone(), step, source };
        if holders.is_empty() {
            return fs::remove_file(path).map_err(failed("remove"));
        }
        let lease = Lease { format: FORMAT, boot: self.boot.clone(), key: key.clone(), holders };
        let text = serde_json::to_vec(&lease)
            .map_err(|source| LeaseError::Corrupt { path: path.clone(), source })?;
        write_volatile(path, &text)?;
        // Others must see who has it.
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(failed("open to others"))
    }

    /// This boot's leases whose file name `wanted` wants.
    fn leases(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<(PathBuf, Lease)>, LeaseError> {
        let failed = |source| LeaseError::Io { path: self.dir.clone(), step: "list", source };
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            match name.to_str() {
                Some(name) if name.ends_with(".json") && !name.starts_with('.') && wanted(name) => {
                    let path = self.dir.join(name);
                    all.extend(read(&path, &self.boot)?.map(|lease| (path, lease)));
                }
                _ => {}
            }
        }
        Ok(all)
    }

    /// Removes what a process of this user left that was killed while it wrote: under the lock nobody else writes.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let unfinished = entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED));
            if unfinished && entry.metadata().is_ok_and(|file| file.uid() == Uid::effective().as_raw()) {
                // One that stays is in nobody's way.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn lock(&self) -> Result<Flock<File>, LeaseError> {
        let path = &self.dir.join(".lock");
        let failed = |step| move |source| LeaseError::Io { path: path.clone(), step, source };
        let mut file = open_lock(path).map_err(failed("open"))?;
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => {
                    self.sweep();
                    return Ok(locked);
                }
                Err((file, Errno::EAGAIN)) if Instant::now() < end => file,
                Err((_, Errno::EAGAIN)) => return Err(LeaseError::Locked { path: path.clone() }),
                Err((_, error)) => return Err(failed("lock")(error.into())),
            };
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Whether a file name is of this process' user.
fn is_own(name: &str) -> bool {
    name.ends_with(&format!(".{}.json", Uid::effective()))
}

/// In a sticky folder the kernel refuses O_CREAT on another user's file (fs.protected_regular), so creating
/// is its own case.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    match options.write(true).create_new(true).mode(0o644).open(path) {
        Ok(file) => {
            // The umask may have taken the others' right to read, which is all that a lock needs.
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            Ok(file)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)
        }
        Err(error) => Err(error),
    }
}

/// The lease in `path`; `None` if there is none, or only one of another boot. The folder is open to all
/// users, so nothing of the file is trusted: neither its kind, nor its length, nor what it says about whose
/// it is.
fn read(path: &Path, boot: &BootId) -> Result<Option<Lease>, LeaseError> {
    let failed = |step| move |source| LeaseError::Io { path: path.into(), step, source };
    let corrupt = |source| LeaseError::Corrupt { path: path.into(), source };
    let file =
        match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open")(error)),
        };
    let uid = file.metadata().map_err(failed("look at"))?.uid();
    let mut text = Vec::new();
    file.take(FILE_MAX_BYTES).read_to_end(&mut text).map_err(failed("read"))?;
    #[derive(Deserialize)]
    struct Format {
        format: u32,
        boot: BootId,
    }
    let first: Format = serde_json::from_slice(&text).map_err(corrupt)?;
    if first.boot != *boot {
        warn!(?path, "passed over a lease of another boot");
        return Ok(None);
    }
    if first.format > FORMAT {
        return Err(LeaseError::Newer { path: path.into(), found: first.format });
    }
    let mut lease: Lease = serde_json::from_slice(&text).map_err(corrupt)?;
    for held in &mut lease.holders {
        held.holder.uid = uid;
    }
    Ok(Some(lease))
}

#[cfg(test)]
mod tests;
