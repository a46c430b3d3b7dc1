//! Makes the machine it runs on deaf to PCI plug and unplug requests, or lets it hear again.
//!
//! ACPI hot-plug (the default of q35): QEMU raises general purpose event 1; masked, it is not served, and what was asked meanwhile is done
//! when it is unmasked. Native hot-plug of PCIe: the port's service is taken from its driver; on return the driver looks at the slot anew.
//! `acpiphp.disable=1` on the kernel's command line does the same as [`Unplug::Ignore`] for good, and needs no help from init.
//!
//! A Linux guest that *refuses* the unplug of a PCI device does not exist on q35: neither ACPI's eject nor the PCIe slot has an answer "no".
//! Memory and CPUs have one, ACPI's _OST method. Seen with QEMU 10.0.2: device_del of a pc-dimm that was onlined with `online_kernel` and is
//! in use gives ACPI_DEVICE_OST with source 3, status 132 (in progress), then 130 (busy); DEVICE_UNPLUG_GUEST_ERROR does not come even then.

use std::fs::{read_dir, read_to_string, write};
use std::io;
use std::path::Path;

/// What becomes of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplug {
    /// They stay unanswered.
    Ignore,
    /// They are done, those first that came meanwhile.
    Answer,
}

impl Unplug {
    /// The word for it on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Unplug::Ignore => "ignore",
            Unplug::Answer => "answer",
        }
    }

    /// Reads that word.
    pub fn parse(word: &str) -> Option<Unplug> {
        [Unplug::Ignore, Unplug::Answer].into_iter().find(|unplug| unplug.word() == word)
    }

    /// Does it to the machine whose `sys` is in `root`, which is `/` but for tests.
    pub fn set(self, root: &Path) -> Result<(), String> {
        // Init may ask before the event was ever used, when "disable" is not accepted: mask works at any time.
        let (mask, action) = match self {
            Unplug::Ignore => ("mask", "unbind"),
            Unplug::Answer => ("unmask", "bind"),
        };
        let event = root.join("sys/firmware/acpi/interrupts/gpe01");
        let set = || -> io::Result<()> {
            // Without ACPI hot-plug nobody serves the event, and it takes no word.
            if !read_to_string(&event)?.contains("invalid") {
                // The kernel knows the word by the end of its line.
                write(&event, format!("{mask}\n"))?;
            }
            Ok(())
        };
        set().map_err(|e| format!("cannot {mask} {}: {e}: this needs root and ACPI", event.display()))?;
        let driver = root.join("sys/bus/pci_express/drivers/pciehp");
        for service in hotplug_services(root) {
            if driver.join(&service).exists() == (self == Unplug::Ignore) {
                let file = driver.join(action);
                write(&file, &service)
                    .map_err(|e| format!("cannot write {service} to {}: {e}", file.display()))?;
            }
        }
        Ok(())
    }
}

/// The hot-plug services of the PCIe ports: `0000:00:01.0:pcie004` or `...pcie204`.
fn hotplug_services(root: &Path) -> Vec<String> {
    let services = read_dir(root.join("sys/bus/pci_express/devices")).into_iter().flatten().flatten();
    let names = services.map(|service| service.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| {
            name.rsplit_once(":pcie").is_some_and(|(_, kind)| kind.len() == 3 && kind.ends_with("04"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, read_to_string, write};

    use super::Unplug;

    #[test]
    fn the_event_is_masked_and_only_services_of_hot_plug_change_hands() {
        let root = tempfile::tempdir().expect("a folder");
        let at = |path: &str| root.path().join("sys").join(path);
        create_dir_all(at("firmware/acpi/interrupts")).expect("a folder");
        let event = at("firmware/acpi/interrupts/gpe01");
        write(&event, "       0  EN     enabled      unmasked\n").expect("a file");
        for service in ["0000:00:01.0:pcie001", "0000:00:01.0:pcie004"] {
            create_dir_all(at("bus/pci_express/devices").join(service)).expect("a folder");
        }
        let driver = at("bus/pci_express/drivers/pciehp");
        create_dir_all(driver.join("0000:00:01.0:pcie004")).expect("a folder");

        Unplug::Ignore.set(root.path()).expect("it is done");
        assert_eq!(read_to_string(&event).expect("a file"), "mask\n");
        assert_eq!(read_to_string(driver.join("unbind")).expect("a file"), "0000:00:01.0:pcie004");
        // It still stands with its driver, as files do: nothing to bind.
        Unplug::Answer.set(root.path()).expect("it is done");
        assert_eq!(read_to_string(&event).expect("a file"), "unmask\n");
        assert!(!driver.join("bind").exists());
        std::fs::remove_dir(driver.join("0000:00:01.0:pcie004")).expect("the driver lost it");
        Unplug::Answer.set(root.path()).expect("it is done");
        assert_eq!(read_to_string(driver.join("bind")).expect("a file"), "0000:00:01.0:pcie004");

        let unserved = "       0         invalid      unmasked\n";
        write(&event, unserved).expect("a file");
        Unplug::Answer.set(root.path()).expect("it is done");
        assert_eq!(read_to_string(&event).expect("a file"), unserved);
    }

    #[test]
    fn a_machine_without_acpi_says_so() {
        let root = tempfile::tempdir().expect("a folder");
        write(root.path().join("sys"), "").expect("a file");
        assert!(Unplug::Answer.set(root.path()).expect_err("there is no ACPI").contains("gpe01"));
        assert_eq!((Unplug::parse("answer"), Unplug::parse("off")), (Some(Unplug::Answer), None));
    }
}
