//! PCI functions that guests are to have: what planning must know of them, who uses them, and the profiles of virtual ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use devices::DeviceConfig;
use devices::bdf::HostBdf;
use devices::host::{HostFacts, HostFunction};
use devices::vf::VfProfile;
use thiserror::Error;
use tracing::warn;

use super::link::{self, LinkError, vf};
use super::movable::override_of;
use super::pci::{PciDevice, PciError};
use super::sysfs::{Sysfs, names, text};
use crate::lease::{LeaseKey, Leases, Staleness, look};
use crate::users;

/// The driver that holds a function for a guest.
pub const DRIVER: &str = "vfio-pci";

/// Why a function cannot be had, or its profile not be set.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum VfioError {
    #[error("{host} is a physical function whose virtual function {vf} is used by {holder}: free that first")]
    VfInUse { host: HostBdf, vf: HostBdf, holder: String },
    #[error("{node} is open in {holder}: IOMMU group {group} can be used by one at a time; end that first")]
    Busy { node: String, group: u32, holder: String },
    #[error(
        "physical function {pf} has no network interface, which would keep the profiles of its virtual functions: bind it to its own driver"
    )]
    NoInterface { pf: HostBdf },
    #[error(
        "the interface {name} of physical function {pf} is down, and so its virtual functions have no link: `ip link set {name} up`"
    )]
    Down { pf: HostBdf, name: String },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{name} did not take the profile of virtual function {index}: it has {found:?}, not {wanted:?}")]
    Profile { name: String, index: u32, found: Box<Option<VfProfile>>, wanted: Box<VfProfile> },
}

/// Adds what planning must know of this host's functions; nothing where no device passes one through. Looks at all processes, so not for the
/// owner's task.
///
/// # Errors
/// There is no list of them.
pub fn learn<'a>(
    facts: &mut HostFacts,
    devices: impl IntoIterator<Item = &'a DeviceConfig>,
    leases: &Leases,
) -> Result<(), PciError> {
    facts.pci = functions(&Sysfs::default(), devices)?;
    facts.iommufd = Path::new("/dev/iommu").exists();
    add_users_and_profiles(&mut facts.pci, leases);
    Ok(())
}

/// Whether planning a device must know of the host's functions.
pub fn is_passthrough(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::Vfio(_) | DeviceConfig::Vf(_))
}

/// The host's functions as its files tell; nothing where no device passes one through.
///
/// # Errors
/// There is no list of them.
pub fn functions<'a>(
    sysfs: &Sysfs,
    devices: impl IntoIterator<Item = &'a DeviceConfig>,
) -> Result<BTreeMap<HostBdf, HostFunction>, PciError> {
    if !devices.into_iter().any(is_passthrough) {
        return Ok(BTreeMap::new());
    }
    let all = sysfs.pci_devices()?;
    Ok(all.iter().map(|device| (device.bdf, function(sysfs, device, &all))).collect())
}

/// Adds what is no file: profiles, and who uses what.
fn add_users_and_profiles(facts: &mut BTreeMap<HostBdf, HostFunction>, leases: &Leases) {
    if facts.is_empty() {
        return;
    }
    let users = Users::find(leases);
    let pfs: Vec<(HostBdf, String)> = facts
        .iter()
        .filter(|(_, function)| function.vfs_max.is_some())
        .filter_map(|(bdf, function)| Some((*bdf, function.netdevs.first()?.clone())))
        .collect();
    let profiles: BTreeMap<HostBdf, Vec<VfProfile>> = pfs
        .into_iter()
        .filter_map(|(bdf, netdev)| match vf::profiles(&netdev) {
            Ok(profiles) => Some((bdf, profiles)),
            Err(error) => {
                warn!(%bdf, %error, "the profiles of its virtual functions are not known");
                None
            }
        })
        .collect();
    for (bdf, function) in facts {
        function.held_by = users.of(*bdf, function.group).map(str::to_owned);
        function.profile = function
            .vf_of
            .and_then(|(pf, index)| profiles.get(&pf)?.get(usize::try_from(index).ok()?).cloned());
    }
}

fn function(sysfs: &Sysfs, device: &PciDevice, all: &[PciDevice]) -> HostFunction {
    let folder = sysfs.path("bus/pci/devices").join(device.bdf.to_string());
    let place = |pf: HostBdf| {
        let index = all.iter().find(|other| other.bdf == pf)?.vfs.iter().position(|vf| *vf == device.bdf)?;
        Some((pf, u32::try_from(index).ok()?))
    };
    let is_up = |netdev: &String| {
        let flags = text(&sysfs.path("class/net").join(netdev).join("flags")).unwrap_or_default();
        u32::from_str_radix(flags.trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 == 1)
    };
    HostFunction {
        vendor: device.vendor,
        device: device.device,
        driver: device.driver.clone(),
        driver_override: override_of(&folder),
        group: device.iommu_group,
        bridge: device.is_bridge(),
        uacce: !names(&folder.join("uacce")).is_empty(),
        up: device.netdevs.iter().any(is_up),
        netdevs: device.netdevs.clone(),
        vfs_max: device.vfs_max,
        vf_of: device.pf.and_then(place),
        profile: None,
        held_by: None,
    }
}

/// Who uses which function, by leases and by open VFIO groups.
pub struct Users {
    leased: BTreeMap<String, String>,
    open: BTreeMap<PathBuf, String>,
}

impl Users {
    /// Looks at all leases and all processes. Others' processes are seen by root only.
    pub fn find(leases: &Leases) -> Users {
        let held = leases.all().unwrap_or_else(|error| {
            warn!(%error, "who has leases is not known");
            Vec::new()
        });
        let leased = held.into_iter().filter_map(|(key, holder)| match key {
            LeaseKey::Pci { address } if look(&holder) != Staleness::Stale => {
                Some((address, format!("VM {} as {}", holder.vm, holder.device)))
            }
            _ => None,
        });
        let open = users::open_files().filter(|(_, node)| node.starts_with("/dev/vfio"));
        Users { leased: leased.collect(), open: open.map(|(pid, node)| (node, users::name(pid))).collect() }
    }

    /// Those of such leases alone, by address.
    #[cfg(test)]
    pub(super) fn of_leases(leased: BTreeMap<String, String>) -> Users {
        Users { leased, open: BTreeMap::new() }
    }

    /// Who uses a function.
    pub fn of(&self, host: HostBdf, group: Option<u32>) -> Option<&str> {
        let open = || self.open.get(&node(group?));
        self.leased.get(&host.to_string()).or_else(open).map(String::as_str)
    }
}

fn node(group: u32) -> PathBuf {
    PathBuf::from(format!("/dev/vfio/{group}"))
}

/// Refuses a group that a process has open which is not known to be of a VM.
///
/// # Errors
/// One has.
pub fn group_is_free(group: u32) -> Result<(), VfioError> {
    let node = node(group);
    match users::open_files().find(|(_, open)| *open == node) {
        Some((pid, _)) => {
            Err(VfioError::Busy { node: node.display().to_string(), group, holder: users::name(pid) })
        }
        None => Ok(()),
    }
}

/// Sets the profile of a virtual function, and reads it back. Inverse: [`restore_profile`].
///
/// # Errors
/// The interface is missing or down, the driver refuses a setting, or says yes and has another one.
pub fn set_profile(sysfs: &Sysfs, pf: HostBdf, index: u32, wanted: &VfProfile) -> Result<(), VfioError> {
    let link = interface(sysfs, pf)?;
    if !link.up {
        return Err(VfioError::Down { pf, name: link.name });
    }
    let now = profile_of(&link.name, index)?.unwrap_or_default();
    vf::change(&link, index, &now, wanted)?;
    let found = profile_of(&link.name, index)?;
    if found.as_ref() != Some(wanted) {
        let (found, wanted) = (Box::new(found), Box::new(wanted.clone()));
        return Err(VfioError::Profile { name: link.name, index, found, wanted });
    }
    Ok(())
}

/// Gives a virtual function the profile that it had. A setting that is not as we left it is somebody else's, and stays.
///
/// # Errors
/// The driver refuses.
pub fn restore_profile(
    sysfs: &Sysfs,
    pf: HostBdf,
    index: u32,
    before: &VfProfile,
    wanted: &VfProfile,
) -> Result<(), VfioError> {
    let link = match interface(sysfs, pf) {
        // The virtual functions went with their driver.
        Err(VfioError::NoInterface { .. }) => return Ok(()),
        other => other?,
    };
    let Some(now) = profile_of(&link.name, index)? else { return Ok(()) };
    Ok(vf::change(&link, index, &now, &restored(before, wanted, &now))?)
}

fn restored(before: &VfProfile, wanted: &VfProfile, now: &VfProfile) -> VfProfile {
    fn pick<T: PartialEq + Clone>(before: &T, wanted: &T, now: &T) -> T {
        if now == wanted { before.clone() } else { now.clone() }
    }
    VfProfile {
        mac: pick(&before.mac, &wanted.mac, &now.mac),
        vlan: pick(&before.vlan, &wanted.vlan, &now.vlan),
        qos: pick(&before.qos, &wanted.qos, &now.qos),
        rate_min: pick(&before.rate_min, &wanted.rate_min, &now.rate_min),
        rate_max: pick(&before.rate_max, &wanted.rate_max, &now.rate_max),
        spoofchk: pick(&before.spoofchk, &wanted.spoofchk, &now.spoofchk),
        trust: pick(&before.trust, &wanted.trust, &now.trust),
        link_state: pick(&before.link_state, &wanted.link_state, &now.link_state),
    }
}

/// The interface of a physical function.
///
/// # Errors
/// It has none.
pub fn interface(sysfs: &Sysfs, pf: HostBdf) -> Result<link::Link, VfioError> {
    let folder = sysfs.path("bus/pci/devices").join(pf.to_string());
    let name = super::pci::netdevs(&folder).into_iter().next().ok_or(VfioError::NoInterface { pf })?;
    Ok(link::show(&name)?)
}

/// The profile of one virtual function, as its card keeps it.
///
/// # Errors
/// The card cannot be asked.
pub fn profile_of(pf: &str, index: u32) -> Result<Option<VfProfile>, LinkError> {
    let all = vf::profiles(pf)?;
    Ok(usize::try_from(index).ok().and_then(|index| all.into_iter().nth(index)))
}

#[cfg(test)]
mod tests;
