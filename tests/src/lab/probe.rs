//! What must be there before a lab host can boot: its files, a QEMU that has the lab's hardware, and the accelerator to run it on.

use std::path::{Path, PathBuf};
use std::process::Command;

use launcher::accel::{Accel, HostFacts, choose};

use super::machine::LabError;
use crate::qemu::{QemuVersion, images, profile_folder};

/// Another QEMU for the lab host than that of bookworm-backports.
pub const LAB_QEMU: &str = "QVIRT_LAB_QEMU";

/// Devices of the lab host that not every QEMU has, with what they are in the lab.
const HARDWARE: [(&str, &str); 4] = [
    ("igb", "the SR-IOV card; QEMU has it from 8.0 on"),
    ("intel-iommu", "the IOMMU"),
    ("virtio-9p-pci", "9p, which shows the lab the programs under test"),
    ("virtserialport", "the line to the lab's agent"),
];

/// How the lab host's processor is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processor {
    /// Translated; TCG emulates AMD's SVM, which the lab's own KVM then uses.
    Emulated,
    /// This machine's, with KVM in KVM.
    Hardware,
}

impl Processor {
    /// How many the lab host has, as QEMU reads it. Of two that are translated one waits for ever, now and then, for an interrupt from the other one or
    /// from its own timer; a second one makes the tests faster by a tenth.
    pub(super) fn count(self) -> &'static str {
        match self {
            Processor::Emulated => "1",
            Processor::Hardware => "2",
        }
    }
}

/// What a lab host boots from.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) qemu: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) root: PathBuf,
    pub(super) processor: Processor,
    /// Folders that the lab host has at the same places, read-only: the programs under test, what they boot, and what that is made with.
    pub(super) shares: [PathBuf; 3],
}

/// Looks at everything before anything is started.
pub(super) fn parts() -> Result<Parts, LabError> {
    let qemu = match std::env::var_os(LAB_QEMU) {
        Some(path) => PathBuf::from(path),
        None => images().qemu(QemuVersion::V10_0),
    };
    let (kernel, initramfs, root) = (images().lab_kernel(), images().lab_initramfs(), images().lab_root());
    for file in [&kernel, &initramfs, &root] {
        if !file.exists() {
            return Err(LabError::Missing(file.clone()));
        }
    }
    check_hardware(&qemu)?;
    let shares = [profile_folder(), images().folder().to_owned(), images().sources()];
    // The kernel's command line, which names them, has no way to quote one.
    if let Some(folder) = shares.iter().find(|folder| folder.to_string_lossy().contains(char::is_whitespace))
    {
        return Err(LabError::Blank(folder.clone()));
    }
    let kvm = matches!(choose(Accel::Auto, &HostFacts::read()), Ok((Accel::Kvm, _)));
    Ok(Parts { qemu, kernel, initramfs, root, processor: processor(kvm, Path::new("/sys/module")), shares })
}

fn check_hardware(qemu: &Path) -> Result<(), LabError> {
    let output = Command::new(qemu).args(["-M", "q35", "-device", "help"]).output();
    let output = output.map_err(|source| LabError::Spawn { program: qemu.to_owned(), source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(LabError::Broken { qemu: qemu.to_owned(), said });
    }
    let devices = String::from_utf8_lossy(&output.stdout);
    for (device, what) in HARDWARE {
        if !devices.contains(&format!("name \"{device}\"")) {
            return Err(LabError::NoDevice { qemu: qemu.to_owned(), device, what });
        }
    }
    Ok(())
}

/// Hardware only where KVM works here, by qvirt's own rule, and would work in the lab too, as the module's parameter says.
fn processor(kvm: bool, modules: &Path) -> Processor {
    let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
        let value = std::fs::read_to_string(modules.join(module).join("parameters/nested"));
        value.is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
    });
    if kvm && nested { Processor::Hardware } else { Processor::Emulated }
}

#[cfg(test)]
mod tests {
    use super::{Processor, processor};

    #[test]
    fn hardware_takes_kvm_and_nested_kvm() {
        let modules = tempfile::tempdir().expect("a temporary folder");
        let parameters = modules.path().join("kvm_amd/parameters");
        std::fs::create_dir_all(&parameters).expect("a folder");
        assert_eq!(processor(true, modules.path()), Processor::Emulated);
        for (nested, expected) in
            [("0\n", Processor::Emulated), ("1\n", Processor::Hardware), ("Y\n", Processor::Hardware)]
        {
            std::fs::write(parameters.join("nested"), nested).expect("a file");
            assert_eq!(processor(true, modules.path()), expected, "nested is {nested:?}");
            assert_eq!(processor(false, modules.path()), Processor::Emulated, "KVM does not work here");
        }
    }
}
