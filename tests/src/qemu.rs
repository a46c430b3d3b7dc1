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
    let mut files = vec![images.kernel(), images.initramfs(), images.python()];
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
        self.root.join("guest/initramfs.cpio.gz")
    }

    /// A Python that can `import qemu.qmp`.
    pub fn python(&self) -> PathBuf {
        self.root.join("venv/bin/python3")
    }
}

/// The `qvirt` program built with the test that is running: in the folder of its cargo profile. Panics, saying what to run, when it is missing.
pub fn qvirt_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    // A test is `target/PROFILE/deps/NAME-HASH`, an example `target/PROFILE/examples/NAME`, a benchmark run by hand anything below.
    let found =
        test.ancestors().skip(1).take(3).map(|folder| folder.join("qvirt")).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "there is no qvirt program in the folders above {}: run `cargo build -p launcher` with the profile of this test",
            test.display()
        )
    })
}
