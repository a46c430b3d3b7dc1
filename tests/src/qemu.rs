//! Where the things under test are: both QEMUs, the guest's kernel and initramfs, the `qvirt` program. It starts nothing.

use std::fmt;
use std::path::{Path, PathBuf};

/// A QEMU that the tests run against. Both are unpacked beside each other by `make images`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QemuVersion {
    /// Debian 12's own.
    V7_2,
    /// The one of bookworm-backports.
    V10_0,
}

impl QemuVersion {
    /// Every version, oldest first.
    pub const ALL: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

    /// The version as the names of folders and recorded schemas have it: `7.2`, `10.0`.
    pub fn name(self) -> &'static str {
        match self {
            QemuVersion::V7_2 => "7.2",
            QemuVersion::V10_0 => "10.0",
        }
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU {}", self.name())
    }
}

/// A QEMU that retries failed I/O by itself, as openEuler's does: `QVIRT_TEST_QEMU_RETRY` names its program. Panics where there is none of that name.
pub fn retrying_qemu() -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("QVIRT_TEST_QEMU_RETRY").filter(|path| !path.is_empty())?);
    assert!(
        path.is_absolute() && path.is_file(),
        "QVIRT_TEST_QEMU_RETRY: {} is no program: give its absolute path",
        path.display()
    );
    Some(path)
}

/// The folder `target/images`, as `integration-images/setup` makes it.
#[derive(Clone, Debug)]
pub struct Images {
    root: PathBuf,
}

/// Finds `target/images` in the folder of this crate or above it. Panics, saying what to run, when it is missing or incomplete.
pub fn images() -> Images {
    let found = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|folder| folder.join("target/images"))
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| panic!("there is no target/images: run `make images` in the checkout"));
    let images = Images { root: found };
    let mut files = vec![images.kernel(), images.initramfs(), images.guest_agent()];
    files.extend(QemuVersion::ALL.map(|version| images.qemu(version)));
    for file in files {
        assert!(file.exists(), "{} is missing: run `make images` in the checkout", file.display());
    }
    images
}

impl Images {
    /// `qemu-system-x86_64` of that version: a two-line script that sets the library path and executes the program (so the process id stays).
    pub fn qemu(&self, version: QemuVersion) -> PathBuf {
        self.program(version, "qemu-system-x86_64")
    }

    /// `qemu-img` of that version.
    pub fn qemu_img(&self, version: QemuVersion) -> PathBuf {
        self.program(version, "qemu-img")
    }

    /// `qemu-io` of that version: a block client that does what it is told.
    pub fn qemu_io(&self, version: QemuVersion) -> PathBuf {
        self.program(version, "qemu-io")
    }

    /// `qemu-storage-daemon` of that version: a real vhost-user-blk or NBD peer.
    pub fn qemu_storage_daemon(&self, version: QemuVersion) -> PathBuf {
        self.program(version, "qemu-storage-daemon")
    }

    fn program(&self, version: QemuVersion, name: &str) -> PathBuf {
        self.root.join(format!("qemu-{}", version.name())).join(name)
    }

    /// The guest's kernel as an ELF image, which QEMU boots without having the guest decompress it: twice as fast under TCG.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("guest/vmlinux")
    }

    /// The same kernel as Debian packs it.
    pub fn compressed_kernel(&self) -> PathBuf {
        self.root.join("guest/vmlinuz")
    }

    /// The guest's root file system; `integration-images/guest/init` tells what it does.
    pub fn initramfs(&self) -> PathBuf {
        self.root.join("guest/initramfs.cpio")
    }

    /// QEMU's own agent, to be appended to that.
    pub fn guest_agent(&self) -> PathBuf {
        self.root.join("guest-agent/guest-agent.cpio")
    }

    /// The lab host's kernel, an ELF image as well.
    pub fn lab_kernel(&self) -> PathBuf {
        self.root.join("lab/vmlinux")
    }

    /// What loads the drivers of the lab host's system disk.
    pub fn lab_initramfs(&self) -> PathBuf {
        self.root.join("lab/initramfs.cpio")
    }

    /// The lab host's system disk, a raw image. Boots throw away what they write to it.
    pub fn lab_root(&self) -> PathBuf {
        self.root.join("lab/root.ext4")
    }

    /// The folder `integration-images` of the checkout, which they are made with.
    pub fn sources(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("integration-images")
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// A Python that can `import qemu.qmp`.
    pub fn python(&self) -> PathBuf {
        self.root.join("venv/bin/python3")
    }
}

/// The `qvirt` program built with the test that is running. Panics, saying what to run, when it is missing.
pub fn qvirt_binary() -> PathBuf {
    let qvirt = profile_folder().join("qvirt");
    assert!(
        qvirt.is_file(),
        "there is no {}: run `cargo build -p launcher` with the profile of this test",
        qvirt.display()
    );
    qvirt
}

/// The folder of the cargo profile that the running program was built with: `target/debug` of a test in `target/debug/deps`.
pub fn profile_folder() -> PathBuf {
    let program = std::env::current_exe().expect("a running program has a path");
    let folder = program.parent().expect("a program is in a folder");
    let inner = matches!(folder.file_name().and_then(|name| name.to_str()), Some("deps" | "examples"));
    folder.parent().filter(|_| inner).unwrap_or(folder).to_owned()
}
