//! Which function of the host a device passes through, and all that speaks against it.

use super::{Layout, Placed};
use crate::address::Address;
use crate::bdf::HostBdf;
use crate::capabilities::Capabilities;
use crate::device::DeviceConfig;
use crate::host::{HostFacts, HostFunction, HostNeed};
use crate::id::DeviceId;
use crate::passthrough::{DRIVER, PassthroughError, VfConfig};
use crate::refusal::Refusal;
use crate::spec::DeviceSpec;
use crate::topology::Moment;

/// What a passthrough stands on.
pub(super) struct Passed {
    /// The function.
    pub host: HostBdf,
    /// What it needs of the host: the lease first, so that nothing is touched that another has.
    pub needs: Vec<HostNeed>,
    /// Whether it goes by iommufd, where kernel and QEMU have it.
    pub iommufd: bool,
    /// Other members of its group, which come with it.
    pub rest: Vec<HostBdf>,
}

impl Passed {
    /// The device as QEMU's objects.
    pub(super) fn lower(&self, id: &DeviceId, config: &DeviceConfig, address: &Address) -> DeviceSpec {
        match config {
            DeviceConfig::Vf(vf) => vf.lower(id, address, self.host, self.iommufd),
            DeviceConfig::Vfio(vfio) => vfio.lower(id, address, self.iommufd),
            _ => unreachable!("no other kind passes a function through"),
        }
    }
}

/// What a config says of the function it passes through.
struct Wish {
    host: HostBdf,
    managed: bool,
    whole_group: bool,
    allow_bus0: bool,
}

impl Layout {
    /// The function that a device passes through; none where it passes through nothing. Fills in which one it is.
    pub(super) fn passthrough(
        &self,
        id: &DeviceId,
        config: &mut DeviceConfig,
        facts: &HostFacts,
        qemu: &Capabilities,
        moment: Moment,
    ) -> Result<Option<Passed>, Refusal> {
        let failed = |source| Refusal::Passthrough { id: id.clone(), source };
        let wish = match config {
            DeviceConfig::Vfio(vfio) => Wish {
                host: vfio.host,
                managed: vfio.managed.unwrap_or(true),
                whole_group: vfio.group,
                allow_bus0: vfio.allow_bus0,
            },
            DeviceConfig::Vf(vf) => {
                let host = self.virtual_function(vf, facts).map_err(failed)?;
                (vf.host, vf.pf) = (Some(host), None);
                Wish { host, managed: vf.managed.unwrap_or(true), whole_group: false, allow_bus0: true }
            }
            _ => return Ok(None),
        };
        let (function, group) = self.assignable(&wish, facts).map_err(failed)?;
        let accelerator = function.is_accelerator();
        if accelerator && moment == Moment::Hot {
            return Err(Refusal::NotHotPluggable { id: id.clone(), kind: ACCELERATOR });
        }
        let mut needs = vec![HostNeed::Function { host: wish.host, group, accelerator }];
        if wish.managed && !function.is_vfio() {
            let (before, override_before) = (function.driver.clone(), function.driver_override.clone());
            needs.push(HostNeed::Driver { host: wish.host, before, override_before });
        }
        if let DeviceConfig::Vf(vf) = config {
            needs.extend(profile(vf, wish.host, function).map_err(failed)?);
        }
        let others = members(facts, group).filter(|(bdf, member)| *bdf != wish.host && !member.bridge);
        let rest = others.map(|(bdf, _)| bdf).filter(|bdf| wish.whole_group && !self.passes(*bdf));
        let rest = rest.collect();
        let iommufd = facts.iommufd && qemu.objects.contains("iommufd") && qemu.has(DRIVER, "iommufd");
        Ok(Some(Passed { host: wish.host, needs, iommufd, rest }))
    }

    /// The function with its group, if it can be given away at all.
    fn assignable<'a>(
        &self,
        wish: &Wish,
        facts: &'a HostFacts,
    ) -> Result<(&'a HostFunction, u32), PassthroughError> {
        let host = wish.host;
        if host.bus() == 0 && !wish.allow_bus0 {
            return Err(PassthroughError::BusZero { host });
        }
        if let Some(holder) = self.devices.iter().find(|device| device.passes() == Some(host)) {
            return Err(PassthroughError::Taken { host, holder: holder.id.clone() });
        }
        let function = facts.pci.get(&host).ok_or(PassthroughError::NoDevice { host })?;
        if function.bridge {
            return Err(PassthroughError::Bridge { host });
        }
        let group = function.group.ok_or(PassthroughError::NoIommu { host })?;
        if !wish.managed && !function.is_vfio() {
            let driver = function.driver.clone().unwrap_or_else(|| "no driver".to_owned());
            return Err(PassthroughError::NotBound { host, driver });
        }
        let way: Vec<String> = members(facts, group)
            .filter(|(bdf, _)| *bdf != host && !wish.whole_group && !self.passes(*bdf))
            .filter_map(|(bdf, member)| Some(format!("{bdf}, which {} holds", member.in_the_way()?)))
            .collect();
        match way.is_empty() {
            true => Ok((function, group)),
            false => Err(PassthroughError::Shared { host, group, members: way.join(", and ") }),
        }
    }

    fn virtual_function(&self, vf: &VfConfig, facts: &HostFacts) -> Result<HostBdf, PassthroughError> {
        let Some(pf_name) = &vf.pf else {
            let host = vf.host.expect("a virtual function without address and card was refused before");
            let function = facts.pci.get(&host).ok_or(PassthroughError::NoDevice { host })?;
            return function.vf_of.map(|_| host).ok_or(PassthroughError::NoVf { host });
        };
        let pf = facts.pf(pf_name).ok_or_else(|| PassthroughError::NoPf { pf: pf_name.clone() })?;
        let of_pf = |function: &HostFunction| function.vf_of.filter(|(of, _)| *of == pf);
        let mut vfs: Vec<(u32, HostBdf, &HostFunction)> = facts
            .pci
            .iter()
            .filter_map(|(bdf, function)| Some((of_pf(function)?.1, *bdf, function)))
            .collect();
        // Those that no driver of the host has come first.
        vfs.sort_by_key(|(index, _, function)| (function.in_the_way().is_some(), *index));
        let user = |bdf: HostBdf, function: &HostFunction| match &function.held_by {
            _ if self.passes(bdf) => Some("this VM".to_owned()),
            Some(holder) => Some(holder.clone()),
            None => function.up.then(|| format!("the host as {}", function.netdevs.join(","))),
        };
        let free = vfs.iter().find(|(_, bdf, function)| user(*bdf, function).is_none());
        free.map(|(_, bdf, _)| *bdf).ok_or_else(|| {
            let used =
                vfs.iter().filter_map(|(_, bdf, f)| Some(format!("{bdf} is used by {}", user(*bdf, f)?)));
            let used: Vec<String> = used.collect();
            let why = if used.is_empty() { "there is none at all".to_owned() } else { used.join(", ") };
            PassthroughError::NoFreeVf { pf: pf_name.clone(), why }
        })
    }

    /// Whether a function goes to this VM, now or as soon as its turn comes.
    fn passes(&self, host: HostBdf) -> bool {
        self.claimed.contains(&host) || self.devices.iter().any(|device| device.passes() == Some(host))
    }

    /// Devices that came with one that takes all of its group, and leave with it.
    pub fn companions(&self, placed: &Placed) -> impl Iterator<Item = &Placed> {
        let whole = matches!(&placed.config, DeviceConfig::Vfio(vfio) if vfio.group);
        let group = placed.group().filter(|_| whole);
        self.devices
            .iter()
            .filter(move |device| device.on_demand && group.is_some() && device.group() == group)
    }

    /// The device that one came with.
    pub(super) fn leader(&self, placed: &Placed) -> Option<&Placed> {
        self.devices.iter().find(|device| self.companions(device).any(|other| other.id == placed.id))
    }
}

/// What is said of a device that takes no hot-plug.
pub(super) const ACCELERATOR: &str = "an accelerator (HPRE, SEC, ZIP)";

impl Placed {
    /// The function of the host that it passes through.
    pub fn passes(&self) -> Option<HostBdf> {
        self.function().map(|(host, _, _)| host)
    }

    fn group(&self) -> Option<u32> {
        self.function().map(|(_, group, _)| group)
    }

    /// Whether it is an accelerator of the host.
    pub(super) fn is_accelerator(&self) -> bool {
        self.function().is_some_and(|(_, _, accelerator)| accelerator)
    }

    fn function(&self) -> Option<(HostBdf, u32, bool)> {
        self.needs.iter().find_map(|need| match need {
            HostNeed::Function { host, group, accelerator } => Some((*host, *group, *accelerator)),
            _ => None,
        })
    }
}

fn members(facts: &HostFacts, group: u32) -> impl Iterator<Item = (HostBdf, &HostFunction)> {
    facts
        .pci
        .iter()
        .filter(move |(_, member)| member.group == Some(group))
        .map(|(bdf, member)| (*bdf, member))
}

/// The change of a virtual function's profile, if there is one to make.
fn profile(
    vf: &VfConfig,
    host: HostBdf,
    function: &HostFunction,
) -> Result<Option<HostNeed>, PassthroughError> {
    let (pf, index) = function.vf_of.ok_or(PassthroughError::NoVf { host })?;
    let before = function.profile.clone().ok_or(PassthroughError::NoProfile { host, pf })?;
    let wanted = vf.settings().over(&before);
    Ok((wanted != before).then_some(HostNeed::VfProfile { pf, index, before, wanted }))
}
