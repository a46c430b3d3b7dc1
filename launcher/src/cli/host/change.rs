//! `qvirt host bind`, `unbind`, `sriov` and `vf`: what changes this host. Each says what it would do with `--dry-run`.

use devices::bdf::HostBdf;
use devices::vf::{VfProfile, VfSettings};
use serde_json::{Value, json};

use super::super::args::VfChange;
use super::super::{Exit, Problem, print};
use super::dash;
use crate::folders::Folders;
use crate::host::begun::{Begun, Change, undo_of_the_dead};
use crate::host::bound::{Bound, BoundError};
use crate::host::link::{self, LinkError};
use crate::host::movable::{Movable, MoveError, Place};
use crate::host::pci::{PciDevice, PciError};
use crate::host::sriov::SriovError;
use crate::host::sysfs::Sysfs;
use crate::host::vfio::{self, DRIVER, Users, VfioError};
use crate::injection::Steps;
use crate::lease::Leases;
use crate::request::chain;

impl From<VfioError> for Problem {
    fn from(error: VfioError) -> Problem {
        let exit = match &error {
            VfioError::VfInUse { .. } | VfioError::Busy { .. } | VfioError::Down { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<MoveError> for Problem {
    fn from(error: MoveError) -> Problem {
        let exit = match &error {
            MoveError::NoDevice { .. } => Exit::Unknown,
            MoveError::NoDriver { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<BoundError> for Problem {
    fn from(error: BoundError) -> Problem {
        match error {
            BoundError::Move(error) => error.into(),
            BoundError::NotBound { .. } => Problem::of(Exit::Refused, &error),
            _ => Problem::of(Exit::Failed, &error),
        }
    }
}

impl From<SriovError> for Problem {
    fn from(error: SriovError) -> Problem {
        let exit = match &error {
            SriovError::NoPf { .. } | SriovError::NoVf { .. } => Exit::Unknown,
            SriovError::TooMany { .. } => Exit::Usage,
            SriovError::InUse { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

impl From<LinkError> for Problem {
    fn from(error: LinkError) -> Problem {
        Problem::of(Exit::Failed, &error)
    }
}

/// What this user's `qvirt` needs to know before it changes anything.
pub(in crate::cli) struct Host {
    pub(in crate::cli) sysfs: Sysfs,
    folders: Folders,
    users: Users,
}

impl Host {
    /// Looks, and if something is to be changed undoes what a command has left that died at that.
    pub(in crate::cli) fn to_change(dry_run: bool) -> Result<Host, Problem> {
        if !dry_run {
            let (undone, failed) = undo_of_the_dead(&Folders::find()?);
            for change in undone {
                eprintln!("qvirt: a command on this host died at work; undone: {change}");
            }
            if let Some(error) = failed {
                // It may be just what this command mends.
                eprintln!("warning: {}", chain(&error));
            }
        }
        Host::look()
    }

    fn look() -> Result<Host, Problem> {
        let folders = Folders::find()?;
        let leases = Leases::open(&folders.leases).map_err(|error| Problem::of(Exit::Failed, &error))?;
        Ok(Host { sysfs: Sysfs::default(), users: Users::find(&leases), folders })
    }

    fn user(&self, host: HostBdf) -> Option<&str> {
        self.users.of(host, self.sysfs.iommu_group_of(host))
    }

    /// Makes changes: all of them, or none.
    pub(in crate::cli) fn make<T>(
        &self,
        changes: Vec<Change>,
        make: impl FnOnce(&mut Steps) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let begun = Begun::note(&self.folders, changes)?;
        let mut steps = Steps::of("host");
        let made = make(&mut steps).and_then(|value| {
            steps.enter("done")?;
            Ok(value)
        });
        match made {
            Ok(value) => {
                begun.done();
                Ok(value)
            }
            Err(error) => {
                if let Err(undo) = begun.undo(&self.folders) {
                    return Err(error.and(&undo));
                }
                Err(error)
            }
        }
    }

    /// A function that nobody uses, nor one of its virtual functions.
    pub(in crate::cli) fn free(&self, host: HostBdf) -> Result<Movable<'_>, Problem> {
        let function = Movable::find(&self.sysfs, host)?;
        if let Some(holder) = self.user(host) {
            return Err(Problem::new(
                Exit::Refused,
                format!("{host} is used by {holder}: detach it there first"),
            ));
        }
        for vf in function.vfs() {
            if let Some(holder) = self.user(vf) {
                return Err(VfioError::VfInUse { host, vf, holder: holder.to_owned() }.into());
            }
        }
        Ok(function)
    }
}

/// `qvirt host bind`: all of them, or none.
pub fn bind(hosts: &[HostBdf], dry_run: bool, as_json: bool) -> Result<Exit, Problem> {
    let host = Host::to_change(dry_run)?;
    let functions: Vec<Movable<'_>> = hosts.iter().map(|bdf| host.free(*bdf)).collect::<Result<_, _>>()?;
    let places: Vec<Place> = functions.iter().map(Movable::place).collect();
    let before: Vec<Option<String>> = places.iter().map(|place| place.driver.clone()).collect();
    if hosts.iter().any(|bdf| host.sysfs.iommu_group_of(*bdf).is_none()) {
        return Err(PciError::NoIommu.into());
    }
    if !dry_run {
        let bound = Bound::of(&host.folders)?;
        let all = || functions.iter().zip(&places);
        let new = all().filter(|(_, place)| place.driver.as_deref() != Some(DRIVER));
        host.make(new.map(|(function, place)| function.change(place, DRIVER)).collect(), |steps| {
            all().try_for_each(|(function, place)| {
                steps.enter("bind")?;
                Ok(bound.bind(&host.folders, function, place)?)
            })
        })?;
    }
    let after = hosts.iter().map(|_| Some(DRIVER.to_owned()));
    moved(hosts, &before, after, dry_run, as_json)
}

/// `qvirt host unbind`: one after the other.
pub fn unbind(hosts: &[HostBdf], dry_run: bool, as_json: bool) -> Result<Exit, Problem> {
    let host = Host::to_change(dry_run)?;
    let functions: Vec<Movable<'_>> = hosts.iter().map(|bdf| host.free(*bdf)).collect::<Result<_, _>>()?;
    let before: Vec<Option<String>> = functions.iter().map(Movable::driver).collect();
    let bound = Bound::of(&host.folders)?;
    functions.iter().try_for_each(|function| bound.can_unbind(function))?;
    if dry_run {
        let after = hosts
            .iter()
            .map(|bdf| bound.driver_before(*bdf).unwrap_or(Some("what the kernel finds".to_owned())));
        return moved(hosts, &before, after, dry_run, as_json);
    }
    functions.iter().try_for_each(|function| bound.unbind(function))?;
    moved(hosts, &before, functions.iter().map(Movable::driver), dry_run, as_json)
}

fn moved(
    hosts: &[HostBdf],
    before: &[Option<String>],
    after: impl Iterator<Item = Option<String>>,
    dry_run: bool,
    as_json: bool,
) -> Result<Exit, Problem> {
    let all: Vec<_> =
        hosts.iter().zip(before).zip(after).map(|((host, before), after)| (host, before, after)).collect();
    if as_json {
        let with = |(host, before, after): &(&HostBdf, &Option<String>, Option<String>)| json!({"bdf": host, "before": before, "after": after, "dry_run": dry_run});
        print::json(&all.iter().map(with).collect::<Vec<_>>())?;
        return Ok(Exit::Done);
    }
    let would = if dry_run { "would go" } else { "went" };
    for (host, before, after) in all {
        println!("{host} {would} from {} to {}", dash(before.as_ref()), dash(after));
    }
    Ok(Exit::Done)
}

/// `qvirt host sriov`
pub fn sriov(name: &str, number: Option<u32>, dry_run: bool, as_json: bool) -> Result<Exit, Problem> {
    let host = Host::to_change(dry_run || number.is_none())?;
    let pf = host.sysfs.pf(name)?;
    let Some(number) = number else { return show(&host, &pf, as_json) };
    if dry_run {
        host.sysfs.can_set_vfs(&pf, number, &host.users)?;
        let (bdf, before) = (pf.bdf, pf.vfs.len());
        match as_json {
            true => print::json(&json!({"pf": bdf, "before": before, "after": number, "dry_run": true}))?,
            false => println!("{bdf} would have {number} virtual functions instead of {before}"),
        }
        return Ok(Exit::Done);
    }
    host.sysfs.can_set_vfs(&pf, number, &host.users)?;
    let before = u32::try_from(pf.vfs.len()).unwrap_or(u32::MAX);
    host.make(vec![Change::Vfs { pf: pf.bdf, before, wanted: number }], |steps| {
        Ok(host.sysfs.set_vfs(&pf, number, &host.users, steps)?)
    })?;
    show(&host, &host.sysfs.pf(name)?, as_json)
}

/// A physical function with its virtual ones.
fn show(host: &Host, pf: &PciDevice, as_json: bool) -> Result<Exit, Problem> {
    let profiles = match pf.netdevs.first() {
        Some(netdev) => link::vf::profiles(netdev)?,
        None => Vec::new(),
    };
    let max = host.sysfs.vfs_max(pf);
    let vfs = pf.vfs.iter().enumerate();
    let driver = |vf: HostBdf| Movable::find(&host.sysfs, vf).ok().and_then(|vf| vf.driver());
    if as_json {
        let with = |(index, vf): (usize, &HostBdf)| {
            json!({
                "index": index, "bdf": vf, "driver": driver(*vf), "profile": profiles.get(index), "held_by": host.user(*vf),
            })
        };
        let vfs: Vec<Value> = vfs.map(with).collect();
        print::json(&json!({"pf": pf.bdf, "netdevs": pf.netdevs, "vfs_max": max, "vfs": vfs}))?;
        return Ok(Exit::Done);
    }
    let of = if pf.netdevs.is_empty() { String::new() } else { format!(" ({})", pf.netdevs.join(",")) };
    println!("{}{of} has {} of {max} virtual functions", pf.bdf, pf.vfs.len());
    let row = |(index, vf): (usize, &HostBdf)| {
        let mut row = vec![index.to_string(), vf.to_string(), dash(driver(*vf))];
        row.extend(told(profiles.get(index)));
        row.push(dash(host.user(*vf)));
        row
    };
    let rows: Vec<Vec<String>> = vfs.map(row).collect();
    let head =
        ["INDEX", "ADDRESS", "DRIVER", "MAC", "VLAN", "QOS", "RATE", "SPOOFCHK", "TRUST", "LINK", "HELD BY"];
    if !rows.is_empty() {
        print::table(&head, &rows)?;
    }
    Ok(Exit::Done)
}

fn told(profile: Option<&VfProfile>) -> Vec<String> {
    let Some(profile) = profile else { return vec!["-".to_owned(); 7] };
    let word = |on: Option<bool>| dash(on.map(|on| if on { "on" } else { "off" }));
    let VfProfile { mac, vlan, qos, rate_min, rate_max, spoofchk, trust, link_state } = profile;
    vec![
        dash(*mac),
        vlan.to_string(),
        qos.to_string(),
        format!("{rate_min}-{rate_max}"),
        word(*spoofchk),
        word(*trust),
        dash(*link_state),
    ]
}

/// `qvirt host vf`
pub fn vf(change: &VfChange) -> Result<Exit, Problem> {
    let host = Host::to_change(change.dry_run)?;
    let pf = host.sysfs.pf(&change.pf)?;
    let (index, found) = (change.index, pf.vfs.len());
    let vf = usize::try_from(index).ok().and_then(|index| pf.vfs.get(index)).copied();
    let vf = vf.ok_or(SriovError::NoVf { pf: pf.bdf, index, found })?;
    let settings = settings(change);
    if let Err((key, value, rule)) = settings.check() {
        return Err(Problem::new(Exit::Usage, format!("--{} {value}: {rule}", key.replace('_', "-"))));
    }
    if settings.is_empty() {
        return Err(Problem::new(
            Exit::Usage,
            "say what to change, such as --mac or --vlan; `qvirt host sriov PF` shows it",
        ));
    }
    if let Some(holder) = host.user(vf) {
        return Err(SriovError::InUse { pf: pf.bdf, vf, holder: holder.to_owned() }.into());
    }
    let link = vfio::interface(&host.sysfs, pf.bdf)?;
    let before = vfio::profile_of(&link.name, index)?.unwrap_or_default();
    let wanted = settings.over(&before);
    if !change.dry_run {
        let profile = Change::VfProfile { pf: pf.bdf, index, before: before.clone(), wanted: wanted.clone() };
        host.make(vec![profile], |steps| {
            steps.enter("profile")?;
            Ok(vfio::set_profile(&host.sysfs, pf.bdf, index, &wanted)?)
        })?;
    }
    if change.json {
        let profiles = json!({"bdf": vf, "before": before, "after": wanted, "dry_run": change.dry_run});
        print::json(&profiles)?;
        return Ok(Exit::Done);
    }
    let would = if change.dry_run { "would have" } else { "has" };
    println!("virtual function {index} ({vf}) of {} {would}:", link.name);
    print::table(&["MAC", "VLAN", "QOS", "RATE", "SPOOFCHK", "TRUST", "LINK"], &[told(Some(&wanted))])?;
    Ok(Exit::Done)
}

fn settings(change: &VfChange) -> VfSettings {
    VfSettings {
        mac: if change.null_mac { Some(None) } else { change.mac.map(Some) },
        vlan: change.vlan,
        qos: change.qos,
        rate_min: change.rate_min,
        rate_max: change.rate_max,
        spoofchk: change.spoofchk.map(Into::into),
        trust: change.trust.map(Into::into),
        link_state: change.link_state,
    }
}
