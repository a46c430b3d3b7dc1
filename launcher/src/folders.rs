//! Where everything lives: the folders of one user, the files of one VM, and the two ways to write a file.
//!
//! Owns the names and modes of folders and files, [`VmName`] (`folders/name.rs`), and replacing a file as a
//! whole (`folders/write.rs`). What is *in* those files belongs to the module that writes it.

mod name;
mod write;

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

pub use name::{VmName, VmNameError};
pub(crate) use write::{UNFINISHED, remedy};
pub use write::{WriteError, write_durably, write_volatile};

/// The longest path of a unix socket: `sockaddr_un` has 108 bytes, the last one is a NUL.
pub const SOCKET_PATH_BYTES: usize = 107;

/// The host's leases when `QVIRT_ROOT` is not set: one place for all users.
const HOST_LEASES: &str = "/run/lock/qvirt";

/// What is wrong with a folder, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FoldersError {
    #[error(
        "QVIRT_ROOT is {path:?}, which is not an absolute path: set it to one, for example QVIRT_ROOT=/tmp/qvirt"
    )]
    RelativeRoot { path: PathBuf },
    #[error(
        "XDG_RUNTIME_DIR is not set to an absolute path, so there is no folder for sockets: log in through systemd-logind (`loginctl \
         enable-linger` keeps it), or set QVIRT_ROOT to a folder of yours"
    )]
    NoRuntimeDir,
    #[error("{variable} is unset and so is HOME: set one of them, or set QVIRT_ROOT to a folder of yours")]
    NoHome { variable: &'static str },
    #[error(
        "cannot make the folder {path:?}: check the rights on its parent, or set QVIRT_ROOT to a folder of yours"
    )]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot read the folder {path:?}: check its owner and mode")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path:?} is not a folder: move it away")]
    NotAFolder { path: PathBuf },
    #[error(
        "the folder {path:?} belongs to uid {owner}, and qvirt runs as uid {uid}: give it back with chown, or set QVIRT_ROOT"
    )]
    NotOurs { path: PathBuf, owner: u32, uid: u32 },
    #[error("the lease folder {path:?} is not open to all users (mode {mode:04o}): as root, run `chmod 1777 {}`", path.display())]
    LeasesClosed { path: PathBuf, mode: u32 },
    #[error(
        "the socket path {path:?} has {bytes} bytes and the kernel takes at most {SOCKET_PATH_BYTES}: use a shorter VM name, or set \
         QVIRT_ROOT to a shorter folder"
    )]
    SocketPath { path: PathBuf, bytes: usize },
}

/// The folders of the user who runs qvirt.
///
/// | | root | others | `QVIRT_ROOT=/x` |
/// |---|---|---|---|
/// | config | /etc/qvirt | XDG_CONFIG_HOME/qvirt | /x/etc |
/// | run | /run/qvirt | XDG_RUNTIME_DIR/qvirt | /x/run |
/// | state | /var/lib/qvirt | XDG_STATE_HOME/qvirt | /x/lib |
/// | cache | /var/cache/qvirt | XDG_CACHE_HOME/qvirt | /x/cache |
/// | leases | /run/lock/qvirt | /run/lock/qvirt | /x/leases |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// `NAME.toml` of each defined VM.
    pub config: PathBuf,
    /// One folder for each VM that runs, or whose owner died; gone after a reboot.
    pub run: PathBuf,
    /// One folder for each VM that has something to keep across a reboot.
    pub state: PathBuf,
    /// Host-wide leases, shared by all users.
    pub leases: PathBuf,
    /// What can be asked again.
    pub cache: PathBuf,
}

impl Folders {
    /// The folders of this process' user, from its environment. Nothing is created.
    ///
    /// # Errors
    /// A variable that is needed is unset or not an absolute path.
    pub fn find() -> Result<Folders, FoldersError> {
        Folders::from_env(Uid::effective().is_root(), |name| env::var_os(name))
    }

    /// [`Folders::find`] for any user and environment.
    ///
    /// # Errors
    /// As [`Folders::find`].
    pub fn from_env(root: bool, var: impl Fn(&str) -> Option<OsString>) -> Result<Folders, FoldersError> {
        let set = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = set("QVIRT_ROOT") {
            if !path.is_absolute() {
                return Err(FoldersError::RelativeRoot { path });
            }
            return Ok(Folders {
                config: path.join("etc"),
                run: path.join("run"),
                state: path.join("lib"),
                leases: path.join("leases"),
                cache: path.join("cache"),
            });
        }
        let leases = PathBuf::from(HOST_LEASES);
        if root {
            return Ok(Folders {
                config: "/etc/qvirt".into(),
                run: "/run/qvirt".into(),
                state: "/var/lib/qvirt".into(),
                leases,
                cache: "/var/cache/qvirt".into(),
            });
        }
        // The XDG specification says that a relative path counts as unset.
        let absolute = |name| set(name).filter(|path: &PathBuf| path.is_absolute());
        let under = |variable: &'static str, home: &str| match absolute(variable) {
            Some(path) => Ok(path.join("qvirt")),
            None => {
                absolute("HOME").map(|h| h.join(home).join("qvirt")).ok_or(FoldersError::NoHome { variable })
            }
        };
        Ok(Folders {
            config: under("XDG_CONFIG_HOME", ".config")?,
            run: absolute("XDG_RUNTIME_DIR").ok_or(FoldersError::NoRuntimeDir)?.join("qvirt"),
            state: under("XDG_STATE_HOME", ".local/state")?,
            leases,
            cache: under("XDG_CACHE_HOME", ".cache")?,
        })
    }

    /// Makes the folders that are missing: mode 0700 for the user's own, 1777 for the leases.
    ///
    /// # Errors
    /// A folder cannot be made, belongs to someone else, or the lease folder is closed to other users.
    pub fn make(&self) -> Result<(), FoldersError> {
        for path in [&self.config, &self.run, &self.state, &self.cache] {
            make_private(path)?;
        }
        make_leases(&self.leases)
    }

    /// The stored config of `vm`; it need not exist.
    pub fn config_file(&self, vm: &VmName) -> PathBuf {
        self.config.join(format!("{vm}.toml"))
    }

    /// The folder for what `vm` keeps across a reboot; it need not exist, see [`make_private`].
    pub fn state_dir(&self, vm: &VmName) -> PathBuf {
        self.state.join(vm.as_str())
    }

    /// The runtime files of `vm`; they need not exist.
    ///
    /// # Errors
    /// Its socket paths would be too long for the kernel.
    pub fn vm(&self, vm: &VmName) -> Result<VmFiles, FoldersError> {
        VmFiles::new(&self.run, vm)
    }

    /// The VMs that have a stored config, sorted. Files with other names are passed over.
    ///
    /// # Errors
    /// The config folder exists and cannot be read.
    pub fn defined(&self) -> Result<Vec<VmName>, FoldersError> {
        names_in(&self.config, |name| name.strip_suffix(".toml"))
    }

    /// The VMs that have a runtime folder, sorted, whether they run or not.
    ///
    /// # Errors
    /// The runtime folder exists and cannot be read.
    pub fn with_runtime(&self) -> Result<Vec<VmName>, FoldersError> {
        names_in(&self.run, |name| Some(name))
    }
}

fn names_in(folder: &Path, name_of: impl Fn(&str) -> Option<&str>) -> Result<Vec<VmName>, FoldersError> {
    let unreadable = |source| FoldersError::Read { path: folder.into(), source };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let file = entry.map_err(unreadable)?.file_name();
        names.extend(file.to_str().and_then(&name_of).and_then(|name| name.parse().ok()));
    }
    names.sort();
    Ok(names)
}

/// Makes `path` and its missing parents with mode 0700; an existing folder is left as it is.
///
/// # Errors
/// It cannot be made, or what is there is no folder or belongs to another user.
pub fn make_private(path: &Path) -> Result<(), FoldersError> {
    let failed = |source| FoldersError::Make { path: path.into(), source };
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(FoldersError::NotAFolder { path: path.into() }),
        Ok(found) if found.uid() != Uid::effective().as_raw() => Err(FoldersError::NotOurs {
            path: path.into(),
            owner: found.uid(),
            uid: Uid::effective().as_raw(),
        }),
        Ok(_) => Ok(()),
        Err(_) => DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed),
    }
}

fn make_leases(path: &Path) -> Result<(), FoldersError> {
    let failed = |source| FoldersError::Make { path: path.into(), source };
    // create_dir tells who made it, so two users starting at once cannot both believe they did.
    let made = match fs::create_dir(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(failed)?;
            true
        }
        Err(error) => return Err(failed(error)),
    };
    // The parent is everybody's: a link there may lead anywhere, and is not followed.
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.is_dir() {
        return Err(FoldersError::NotAFolder { path: path.into() });
    }
    let mode = found.mode() & 0o7777;
    let ours = found.uid() == Uid::effective().as_raw();
    if mode == 0o1777 && (ours || found.uid() == 0 || !Uid::effective().is_root()) {
        return Ok(());
    }
    // mkdir obeys the umask, so our own folder gets its mode here. What others made is left as it is.
    if !made && !ours {
        return Err(FoldersError::LeasesClosed { path: path.into(), mode });
    }
    fs::set_permissions(path, Permissions::from_mode(0o1777)).map_err(failed)
}

/// The runtime files of one VM, all in `RUN/NAME/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFiles {
    dir: PathBuf,
}

impl VmFiles {
    fn new(run: &Path, vm: &VmName) -> Result<VmFiles, FoldersError> {
        let files = VmFiles { dir: run.join(vm.as_str()) };
        // The longest of the fixed sockets speaks for the others.
        checked_socket(files.control_ro())?;
        Ok(files)
    }

    /// Makes the folder, mode 0700.
    ///
    /// # Errors
    /// As [`make_private`].
    pub fn make(&self) -> Result<(), FoldersError> {
        make_private(&self.dir)
    }

    /// The folder itself, absolute: the VM's identity in leases.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The owner's control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The owner's control socket for queries and events only.
    pub fn control_ro(&self) -> PathBuf {
        self.dir.join("control-ro.sock")
    }

    /// QEMU's monitor socket, the owner's own.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// QEMU's second monitor socket, for when the owner is gone.
    pub fn rescue(&self) -> PathBuf {
        self.dir.join("rescue.sock")
    }

    /// Locked as long as the owner that launched it or QEMU lives.
    pub fn life(&self) -> PathBuf {
        self.dir.join("life")
    }

    /// Locked as long as an owner lives.
    pub fn owner(&self) -> PathBuf {
        self.dir.join("owner")
    }

    /// What was launched: argv, capabilities, identity.
    pub fn launch(&self) -> PathBuf {
        self.dir.join("launch.json")
    }

    /// The host steps to undo.
    pub fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// The lock of whoever is attached to the console `device`.
    pub fn console_lock(&self, device: &str) -> PathBuf {
        self.dir.join(format!("console-{device}.lock"))
    }

    /// A unix socket of the device `device`, such as a channel's.
    ///
    /// # Errors
    /// Its path would be too long for the kernel.
    pub fn device_socket(&self, device: &str) -> Result<PathBuf, FoldersError> {
        checked_socket(self.dir.join(format!("{device}.sock")))
    }
}

/// `path`, if the kernel takes it as the path of a unix socket.
///
/// # Errors
/// It has more than [`SOCKET_PATH_BYTES`] bytes.
pub fn checked_socket(path: PathBuf) -> Result<PathBuf, FoldersError> {
    match path.as_os_str().len() {
        bytes if bytes > SOCKET_PATH_BYTES => Err(FoldersError::SocketPath { path, bytes }),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(root: bool, vars: &[(&str, &str)]) -> Result<Folders, FoldersError> {
        let var = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        Folders::from_env(root, var)
    }

    fn name(text: &str) -> VmName {
        text.parse().expect("a good name")
    }

    #[test]
    fn root_user_and_qvirt_root_have_their_folders() {
        let root = folders(true, &[("HOME", "/root")]).expect("root needs no variable");
        assert_eq!(root.run, Path::new("/run/qvirt"));
        assert_eq!(root.leases, Path::new("/run/lock/qvirt"));

        let user = folders(
            false,
            &[("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7"), ("XDG_STATE_HOME", "/s")],
        )
        .expect("a user");
        assert_eq!(user.config, Path::new("/home/u/.config/qvirt"));
        assert_eq!(user.run, Path::new("/run/user/7/qvirt"));
        assert_eq!(user.state, Path::new("/s/qvirt"));
        assert_eq!(user.leases, root.leases, "leases are host-wide");

        let own = folders(false, &[("QVIRT_ROOT", "/x")]).expect("QVIRT_ROOT alone is enough");
        assert_eq!((own.run, own.leases), ("/x/run".into(), "/x/leases".into()));
    }

    #[test]
    fn missing_variables_say_what_to_do() {
        let message = |vars: &[(&str, &str)]| folders(false, vars).expect_err("refused").to_string();
        assert!(message(&[("HOME", "/h")]).contains("XDG_RUNTIME_DIR"));
        assert!(message(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "tmp")]).contains("QVIRT_ROOT"));
        assert!(message(&[("XDG_RUNTIME_DIR", "/r")]).contains("HOME"));
        assert!(message(&[("QVIRT_ROOT", "x")]).contains("absolute"));
    }

    #[test]
    fn folders_get_their_modes_and_may_exist_already() {
        let temp = tempfile::tempdir().expect("a folder");
        let root = temp.path().join("x");
        let folders = folders(false, &[("QVIRT_ROOT", root.to_str().expect("utf-8"))]).expect("folders");
        folders.make().expect("made");
        folders.make().expect("made again");
        let mode = |path: &Path| fs::metadata(path).expect("exists").mode() & 0o7777;
        assert_eq!(mode(&folders.run), 0o700);
        assert_eq!(mode(&folders.leases), 0o1777);

        folders.vm(&name("web")).expect("short").make().expect("made");
        fs::write(folders.config_file(&name("db")), "").expect("written");
        fs::write(folders.config.join("not a vm.toml"), "").expect("written");
        assert_eq!(folders.with_runtime().expect("read"), [name("web")]);
        assert_eq!(folders.defined().expect("read"), [name("db")]);

        fs::remove_dir(&folders.cache).expect("empty");
        fs::write(&folders.cache, "").expect("written");
        assert!(matches!(folders.make(), Err(FoldersError::NotAFolder { .. })));
    }

    #[test]
    fn a_socket_path_is_measured_before_anything_runs() {
        let run = |bytes: usize| PathBuf::from("/".to_owned() + &"r".repeat(bytes - 1));
        let longest = SOCKET_PATH_BYTES - "/vm/control-ro.sock".len();
        assert!(VmFiles::new(&run(longest), &name("vm")).is_ok());
        let error = VmFiles::new(&run(longest + 1), &name("vm")).expect_err("108 bytes").to_string();
        assert!(
            error.contains("108 bytes") && error.contains("QVIRT_ROOT") && error.contains("/vm/"),
            "{error}"
        );
        let files = VmFiles::new(&run(longest), &name("vm")).expect("fits");
        assert!(files.device_socket("a-long-device-id").is_err());
    }
}
