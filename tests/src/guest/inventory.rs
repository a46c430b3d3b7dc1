//! What the guest sees, as lines to be compared. Nothing here talks to a guest.

use std::collections::BTreeSet;
use std::fmt;

/// What the guest sees, one device a line; [`agent::inventory`] tells what stands in each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    lines: BTreeSet<String>,
    devices: agent::inventory::Inventory,
}

impl Inventory {
    pub(super) fn of_guest(devices: agent::inventory::Inventory) -> Inventory {
        Inventory { lines: devices.lines(), devices }
    }

    /// The same, not as text.
    pub fn devices(&self) -> &agent::inventory::Inventory {
        &self.devices
    }

    /// The lines of one kind: `disk`, `cdrom`, `nic`, `usb`, `channel`, `console`, `serial`, `pci`, `memory`, `cpus`.
    pub fn of(&self, kind: &str) -> Vec<&str> {
        self.lines.iter().filter(|line| line.split(' ').next() == Some(kind)).map(String::as_str).collect()
    }

    /// The disks, CD-ROM drives not among them.
    pub fn disks(&self) -> Vec<&str> {
        self.of("disk")
    }

    /// The network cards.
    pub fn nics(&self) -> Vec<&str> {
        self.of("nic")
    }

    /// The first line of that kind that has `word` among its words: `find("disk", "serial=abc")`.
    pub fn find(&self, kind: &str, word: &str) -> Option<&str> {
        self.of(kind).into_iter().find(|line| line.split(' ').any(|one| one == word))
    }

    /// What `later` has and this has not, and the reverse.
    pub fn diff(&self, later: &Inventory) -> Difference {
        let lines = |a: &Inventory, b: &Inventory| a.lines.difference(&b.lines).cloned().collect();
        Difference { added: lines(later, self), removed: lines(self, later) }
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// The difference of two inventories; empty if nothing changed. A device that changed stands in both lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Lines that are new.
    pub added: Vec<String>,
    /// Lines that are gone.
    pub removed: Vec<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.removed.iter().try_for_each(|line| writeln!(f, "- {line}"))?;
        self.added.iter().try_for_each(|line| writeln!(f, "+ {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::Inventory;

    fn inventory(lines: &[&str]) -> Inventory {
        let lines = lines.iter().map(|line| (*line).to_owned()).collect();
        Inventory { lines, ..Inventory::default() }
    }

    #[test]
    fn a_word_is_found_whole_and_only_in_its_kind() {
        let seen = inventory(&["disk vda 512 serial=abcd", "disk vdb 512 serial=abc", "nic eth0 serial=abc"]);
        assert_eq!(seen.find("disk", "serial=abc"), Some("disk vdb 512 serial=abc"));
        assert_eq!((seen.disks().len(), seen.nics().len()), (2, 1));
    }

    #[test]
    fn a_difference_names_both_directions() {
        let (before, after) = (inventory(&["cpus 1", "disk vda"]), inventory(&["cpus 1", "nic eth0"]));
        assert_eq!(before.diff(&after).to_string(), "- disk vda\n+ nic eth0\n");
        assert_eq!(before.diff(&before).to_string(), "");
    }
}
