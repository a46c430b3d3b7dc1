//! `qvirt host`: what this host has to give to VMs, and making it ready for that (`change`). Asks the host, not an owner.

pub(super) mod change;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tracing::warn;

use super::args::Host;
use super::vdpa::vdpa;
use super::{Exit, Problem, print};
use crate::folders::{Folders, VmName};
use crate::host::names::Names;
use crate::host::pci::{Class, IommuGroup, PciDevice, PciError};
use crate::host::sysfs::Sysfs;
use crate::host::usb::{Uevents, UsbDevice, changes};
use crate::journal;
use crate::process::Identity;
use crate::record::{Entry, Memory};
use crate::users;

impl From<PciError> for Problem {
    fn from(error: PciError) -> Problem {
        let exit = match &error {
            PciError::List { .. } => Exit::Failed,
            PciError::NoIommu => Exit::Refused,
            PciError::NoGroup { .. } => Exit::Unknown,
        };
        Problem::of(exit, &error)
    }
}

/// `qvirt host`
pub async fn host(command: Host) -> Result<Exit, Problem> {
    match command {
        Host::Pci { class, vfs, json } => pci(class, vfs, json),
        Host::Iommu { group, json } => iommu(group, json),
        Host::Vdpa { command, json } => vdpa(command, json),
        Host::Bind { bdf, dry_run, json } => change::bind(&bdf, dry_run, json),
        Host::Unbind { bdf, dry_run, json } => change::unbind(&bdf, dry_run, json),
        Host::Sriov { pf, vfs, dry_run, json } => change::sriov(&pf, vfs, dry_run, json),
        Host::Vf(wish) => change::vf(&wish),
        Host::Usb { follow, json } => {
            // From before the list, so that nothing is missed in between.
            let word = if follow { Some(Uevents::listen()?) } else { None };
            let seen = usb(json)?;
            match word {
                Some(word) => follow_usb(&word, seen, json).await,
                None => Ok(Exit::Done),
            }
        }
    }
}

fn pci(class: Option<Class>, vfs: bool, as_json: bool) -> Result<Exit, Problem> {
    let mut devices = Sysfs::default().pci_devices()?;
    devices.retain(|device| class.is_none_or(|class| device.is_of(class)) && (!vfs || device.pf.is_some()));
    let (names, holders) = (names_of(devices.iter()), Holders::find()?);
    if as_json {
        let with = |device: &PciDevice| {
            let mut value = json!(device);
            value["name"] = json!(names.name(device.vendor, device.device));
            value["held_by"] = json!(holders.of_group(device.iommu_group));
            value
        };
        print::json(&devices.iter().map(with).collect::<Vec<_>>())?;
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = devices.iter().map(|device| row(device, &names, &holders)).collect();
    print::table(&["ADDRESS", "NAME", "DRIVER", "GROUP", "NUMA", "FUNCTION", "NETDEV", "HELD BY"], &rows)?;
    Ok(Exit::Done)
}

fn row(device: &PciDevice, names: &Names, holders: &Holders) -> Vec<String> {
    let function = match (&device.pf, device.vfs_max) {
        (Some(pf), _) => format!("VF of {pf}"),
        (None, Some(max)) => format!("PF, {} of {max} VFs", device.vfs.len()),
        (None, None) => dash(None::<u32>),
    };
    vec![
        device.bdf.to_string(),
        names.name(device.vendor, device.device),
        dash(device.driver.as_ref()),
        dash(device.iommu_group),
        dash(device.numa_node),
        function,
        dash((!device.netdevs.is_empty()).then(|| device.netdevs.join(","))),
        dash(holders.of_group(device.iommu_group)),
    ]
}

fn iommu(group: Option<u32>, as_json: bool) -> Result<Exit, Problem> {
    let groups = Sysfs::default().iommu_groups(group)?;
    let (names, holders) = (names_of(groups.iter().flat_map(|group| &group.members)), Holders::find()?);
    if as_json {
        let with = |group: &IommuGroup| {
            let way: Vec<_> = group
                .in_the_way()
                .map(|(member, driver)| json!({"bdf": member.bdf, "driver": driver}))
                .collect();
            let held_by = holders.of_group(Some(group.number));
            let assignable = way.is_empty() && group.has_devices() && held_by.is_none();
            json!({
                "number": group.number, "members": group.members, "assignable": assignable, "in_the_way": way,
                "held_by": held_by,
            })
        };
        print::json(&groups.iter().map(with).collect::<Vec<_>>())?;
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = groups.iter().flat_map(|group| rows(group, &names, &holders)).collect();
    print::table(&["GROUP", "ASSIGNABLE", "ADDRESS", "DRIVER", "NAME"], &rows)?;
    Ok(Exit::Done)
}

/// A line a member; what is true of the group stands in its first one.
fn rows(group: &IommuGroup, names: &Names, holders: &Holders) -> Vec<Vec<String>> {
    let way: Vec<String> =
        group.in_the_way().map(|(member, driver)| format!("{} has {driver}", member.bdf)).collect();
    let assignable = match (holders.of_group(Some(group.number)), way.is_empty()) {
        (Some(holder), _) => format!("no: held by {holder}"),
        (None, false) => format!("no: {}", way.join(", ")),
        (None, true) if group.has_devices() => "yes".to_owned(),
        (None, true) => "no: nothing but bridges".to_owned(),
    };
    let line = |(number, member): (usize, &PciDevice)| {
        let (group, assignable) =
            if number == 0 { (group.number.to_string(), assignable.clone()) } else { Default::default() };
        let name = names.name(member.vendor, member.device);
        vec![group, assignable, member.bdf.to_string(), dash(member.driver.as_ref()), name]
    };
    group.members.iter().enumerate().map(line).collect()
}

fn usb(as_json: bool) -> Result<Vec<UsbDevice>, Problem> {
    let devices = Sysfs::default().usb_devices();
    let (names, holders) = (usb_names(&devices), Holders::find()?);
    if as_json {
        let all: Vec<Value> = devices.iter().map(|device| usb_json(device, &names, &holders)).collect();
        print::json(&all)?;
        return Ok(devices);
    }
    let row = |device: &UsbDevice| {
        vec![
            device.bus.to_string(),
            device.device.to_string(),
            dash(device.port.as_ref()),
            dash(device.speed.as_ref()),
            format!("{:04x}:{:04x}", device.vendor, device.product),
            names.name(device.vendor, device.product),
            dash(device.serial.as_ref()),
            dash(holders.of(&device.node())),
        ]
    };
    let head = ["BUS", "DEVICE", "PORT", "MBIT/S", "ID", "NAME", "SERIAL", "HELD BY"];
    print::table(&head, &devices.iter().map(row).collect::<Vec<_>>())?;
    Ok(devices)
}

fn usb_names(devices: &[UsbDevice]) -> Names {
    Names::of("usb.ids", devices.iter().map(|device| (device.vendor, device.product)))
}

fn usb_json(device: &UsbDevice, names: &Names, holders: &Holders) -> Value {
    let mut value = json!(device);
    value["name"] = json!(names.name(device.vendor, device.product));
    value["held_by"] = json!(holders.of(&device.node()));
    value
}

/// Tells of every device that comes or goes, until a signal or the reader ends it.
async fn follow_usb(word: &Uevents, mut before: Vec<UsbDevice>, as_json: bool) -> Result<Exit, Problem> {
    loop {
        word.next().await?;
        let after = Sysfs::default().usb_devices();
        let (gone, come) = changes(&before, &after);
        if gone.is_empty() && come.is_empty() {
            continue;
        }
        let (names, holders) = (usb_names(&[&before[..], &after].concat()), Holders::find()?);
        for (what, device) in
            gone.iter().map(|d| ("unplugged", *d)).chain(come.iter().map(|d| ("plugged", *d)))
        {
            let mut out = std::io::stdout().lock();
            if as_json {
                let line = json!({"event": what, "device": usb_json(device, &names, &holders)});
                writeln!(out, "{line}")?;
                continue;
            }
            let name = names.name(device.vendor, device.product);
            let serial = device.serial.as_ref().map(|serial| format!(" serial {serial}")).unwrap_or_default();
            let port = device.port.as_ref().map(|port| format!(" port {port}")).unwrap_or_default();
            let UsbDevice { bus, device, vendor, product, .. } = device;
            writeln!(
                out,
                "{what}: bus {bus} device {device}{port} {vendor:04x}:{product:04x} {name}{serial}"
            )?;
        }
        before = after;
    }
}

fn names_of<'a>(devices: impl Iterator<Item = &'a PciDevice>) -> Names {
    Names::of("pci.ids", devices.map(|device| (device.vendor, device.device)))
}

pub(super) fn dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Who has which node open: a VM of this user by its name, else the process. Others' processes are seen by root only.
pub(super) struct Holders(BTreeMap<PathBuf, String>);

impl Holders {
    pub(super) fn find() -> Result<Holders, Problem> {
        let vms = qemus(&Folders::find()?)?;
        let is_wanted = |node: &Path| {
            let is_vdpa = node.to_str().is_some_and(|node| node.starts_with("/dev/vhost-vdpa-"));
            is_vdpa || node.starts_with("/dev/vfio") || node.starts_with("/dev/bus/usb")
        };
        let nodes = users::open_files().filter(|(_, node)| is_wanted(node));
        let name = |pid: u32| vms.get(&pid).map_or_else(|| users::name(pid), |vm| format!("VM {vm}"));
        Ok(Holders(nodes.map(|(pid, node)| (node, name(pid))).collect()))
    }

    /// Who has an IOMMU group open.
    fn of_group(&self, group: Option<u32>) -> Option<&str> {
        self.of(&format!("/dev/vfio/{}", group?))
    }

    pub(super) fn of(&self, node: &str) -> Option<&str> {
        self.0.get(Path::new(node)).map(String::as_str)
    }
}

/// The VMs by the pid of their QEMU. One whose journal cannot be read is not named.
fn qemus(folders: &Folders) -> Result<BTreeMap<u32, VmName>, Problem> {
    let mut vms = BTreeMap::new();
    for vm in folders.with_runtime()? {
        match journal::read_only::<Entry>(&folders.vm(&vm)?.journal()) {
            Ok(Some((_, entries))) => {
                let identity = Memory::of(entries).identity.filter(Identity::is_alive);
                vms.extend(identity.map(|identity| (identity.pid, vm)));
            }
            Ok(None) => {}
            Err(error) => warn!(%vm, %error, "what it holds is not known"),
        }
    }
    Ok(vms)
}
