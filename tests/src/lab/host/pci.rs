//! PCI cards of the lab host, and the binding of their functions to drivers.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Done, HostError, link_name, modprobe, names, read, wait_for, write};

/// A root port of the lab host, by its slot: what is plugged there is found through it, whatever bus number it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port(u8);

/// An SR-IOV card with four VFs that no driver holds, each in an IOMMU group of its own.
pub const FREE_PF: Port = Port(0x10);
/// An SR-IOV card whose two VFs igbvf holds.
pub const USED_PF: Port = Port(0x11);
/// Two functions in one IOMMU group.
pub const SHARED: Port = Port(0x12);

const FREE_VFS: usize = 4;
const USED_VFS: usize = 2;

/// A PCI function: `0000:01:10.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function(String);

/// Adds the cards to the command line of the lab host. Both SR-IOV cards are on one hub: without a peer their links are down.
pub(in crate::lab) fn add_hardware(command: &mut Command) {
    let ports = [("free", FREE_PF), ("used", USED_PF), ("shared", SHARED)];
    for (name, Port(slot)) in ports {
        command
            .arg("-device")
            .arg(format!("pcie-root-port,id={name},bus=pcie.0,addr={slot:#x},chassis={slot},slot={slot}"));
    }
    for (name, mac) in [("free", "52:54:00:1a:b0:01"), ("used", "52:54:00:1a:b0:02")] {
        command.arg("-netdev").arg(format!("hubport,id=hub-{name},hubid=1"));
        command.arg("-device").arg(format!("igb,bus={name},netdev=hub-{name},mac={mac}"));
    }
    // Two functions of one slot can talk to each other behind the IOMMU's back, so they are one group.
    command.args(["-device", "e1000e,bus=shared,addr=0.0,multifunction=on,mac=52:54:00:1a:b0:03"]);
    command.args(["-device", "e1000e,bus=shared,addr=0.1,mac=52:54:00:1a:b0:04"]);
}

pub(super) fn prepare() -> Done<()> {
    modprobe(&["vfio-pci", "igb", "igbvf", "e1000e"])?;
    for (port, vfs, probe) in [(FREE_PF, FREE_VFS, 0), (USED_PF, USED_VFS, 1)] {
        let pf = port.function()?;
        wait_for(&format!("the NIC of {pf}"), || pf.netdev())?;
        pf.up()?;
        write(pf.path().join("sriov_drivers_autoprobe"), probe)?;
        write(pf.path().join("sriov_numvfs"), vfs)?;
    }
    let held = USED_PF.function()?.vfs();
    wait_for("igbvf to hold the VFs", || {
        held.iter().all(|vf| vf.driver().as_deref() == Some("igbvf")).then_some(())
    })
}

pub(super) fn list() -> Done<String> {
    let mut text = String::new();
    for (name, port) in [("free PF", FREE_PF), ("used PF", USED_PF), ("shared group", SHARED)] {
        for function in port.functions() {
            let _ = writeln!(text, "{name:13} {}", function.describe());
            for vf in function.vfs() {
                let _ = writeln!(text, "  VF          {}", vf.describe());
            }
        }
    }
    Ok(text)
}

impl Port {
    /// The functions behind this port, VFs not among them, sorted.
    pub fn functions(self) -> Vec<Function> {
        let folder = format!("/sys/bus/pci/devices/0000:00:{:02x}.0", self.0);
        let found = names(folder).into_iter().filter(|name| name.len() == 12 && name.starts_with("0000:"));
        found.map(Function).filter(|function| !function.path().join("physfn").exists()).collect()
    }

    /// The first function behind this port.
    ///
    /// # Errors
    /// There is none.
    pub fn function(self) -> Done<Function> {
        let first = self.functions().into_iter().next();
        first
            .ok_or_else(|| HostError(format!("nothing is plugged into the root port at 00:{:02x}.0", self.0)))
    }
}

impl std::fmt::Display for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Function {
    /// Its folder in sysfs.
    pub fn path(&self) -> PathBuf {
        Path::new("/sys/bus/pci/devices").join(&self.0)
    }

    /// Its virtual functions, in their order.
    pub fn vfs(&self) -> Vec<Function> {
        let number = (0..).map(|index| self.path().join(format!("virtfn{index}")));
        number.map_while(|link| link_name(&link)).map(Function).collect()
    }

    /// The driver that holds it.
    pub fn driver(&self) -> Option<String> {
        link_name(&self.path().join("driver"))
    }

    /// Its IOMMU group's number.
    pub fn group(&self) -> Option<String> {
        link_name(&self.path().join("iommu_group"))
    }

    /// The name of its NIC on the host.
    pub fn netdev(&self) -> Option<String> {
        names(self.path().join("net")).into_iter().next()
    }

    /// `8086:10ca`: vendor and device as the guest sees them too.
    ///
    /// # Errors
    /// The function is gone.
    pub fn model(&self) -> Done<String> {
        let part = |name: &str| {
            read(self.path().join(name)).map(|text| text.trim().trim_start_matches("0x").to_owned())
        };
        // A VF's own registers say ffff: its identity is sysfs'.
        Ok(format!("{}:{}", part("vendor")?, part("device")?))
    }

    /// Sets its NIC up.
    ///
    /// # Errors
    /// It has none, or `ip` fails.
    pub fn up(&self) -> Done<()> {
        let name = self.netdev().ok_or_else(|| HostError(format!("{self} has no NIC")))?;
        super::program("ip", &["link", "set", &name, "up"]).map(drop)
    }

    /// Binds it to that driver, which alone may take it then (`driver_override`); no other function of its kind is touched.
    ///
    /// # Errors
    /// The kernel refuses, or the driver does not take it.
    pub fn bind(&self, driver: &str) -> Done<()> {
        self.unbind()?;
        write(self.path().join("driver_override"), driver)?;
        write("/sys/bus/pci/drivers_probe", self)?;
        match self.driver() {
            Some(holder) if holder == driver => Ok(()),
            holder => Err(HostError(format!("{self} was to be held by {driver}, but is by {holder:?}"))),
        }
    }

    /// Takes it from its driver, if one holds it; leaves it without one, as the VFs of [`FREE_PF`] are.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unbind(&self) -> Done<()> {
        write(self.path().join("driver_override"), "\n")?;
        match self.driver() {
            Some(_) => write(self.path().join("driver/unbind"), self),
            None => Ok(()),
        }
    }

    fn describe(&self) -> String {
        let or = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let (group, driver, netdev) = (or(self.group()), or(self.driver()), or(self.netdev()));
        format!("{self} group {group} driver {driver} NIC {netdev}")
    }
}
