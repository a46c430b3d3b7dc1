//! `qvirt host vdpa`: the vDPA devices of this host, shown, made and deleted.

use clap::{Args, Subcommand};
use devices::bdf::HostBdf;
use devices::units::Mac;
use serde_json::{Value, json};

use super::host::change::Host;
use super::host::{Holders, dash};
use super::{Exit, Problem, print};
use crate::host::movable::Movable;
use crate::host::sysfs::Sysfs;
use crate::host::vdpa::{self, NewDevice, VdpaDevice, VdpaError};
use crate::host::vfio;

#[derive(Debug, Subcommand)]
pub enum Vdpa {
    /// Show the devices: class, management device, queues, MAC address, driver, char device, and who holds them; the default
    Show,
    /// Show the management devices, which make them
    Mgmtdevs,
    /// Make a device
    Add(AddVdpa),
    /// Delete a device that nobody uses
    Del {
        /// Its name
        name: String,
        /// Then take the PCI function from the vendor's vDPA driver, for whichever driver the kernel chooses
        #[arg(long)]
        release: bool,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Args)]
pub struct AddVdpa {
    /// Its name
    pub name: String,
    /// What makes it: pci/0000:08:01.1, vduse
    #[arg(long)]
    pub mgmtdev: String,
    /// MAC address of a network device
    #[arg(long)]
    pub mac: Option<Mac>,
    /// Queue pairs of a network device at most
    #[arg(long, value_name = "N")]
    pub max_pairs: Option<u16>,
    /// MTU of a network device
    #[arg(long)]
    pub mtu: Option<u16>,
    /// Bind the PCI function to this vDPA driver of its vendor first
    #[arg(long)]
    pub driver: Option<String>,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}

impl From<VdpaError> for Problem {
    fn from(error: VdpaError) -> Problem {
        let exit = match &error {
            VdpaError::NoDevice { .. } | VdpaError::NoMgmtdev { .. } => Exit::Unknown,
            VdpaError::NoVdpa
            | VdpaError::InUse { .. }
            | VdpaError::Busy { .. }
            | VdpaError::Exists { .. } => Exit::Refused,
            _ => Exit::Failed,
        };
        Problem::of(exit, &error)
    }
}

/// `qvirt host vdpa`
pub fn vdpa(command: Option<Vdpa>, as_json: bool) -> Result<Exit, Problem> {
    match command {
        None | Some(Vdpa::Show) => show(as_json),
        Some(Vdpa::Mgmtdevs) => mgmtdevs(as_json),
        Some(Vdpa::Add(add)) => make(&add, as_json),
        Some(Vdpa::Del { name, release, dry_run }) => delete(&name, release, dry_run, as_json),
    }
}

fn show(as_json: bool) -> Result<Exit, Problem> {
    let devices = vdpa::devices(&Sysfs::default())?;
    let holders = Holders::find()?;
    let holder = |device: &VdpaDevice| device.node.as_ref().and_then(|node| holders.of(node));
    if as_json {
        let with = |device: &VdpaDevice| {
            let mut value = json!(device);
            value["held_by"] = json!(holder(device));
            value
        };
        print::json(&devices.iter().map(with).collect::<Vec<Value>>())?;
        return Ok(Exit::Done);
    }
    let row = |device: &VdpaDevice| {
        vec![
            device.name.clone(),
            device.class.clone(),
            device.mgmtdev.clone(),
            dash(device.vendor),
            dash(device.max_queues),
            dash(device.max_queue_size),
            dash(device.mac),
            dash(device.driver.as_ref()),
            dash(device.node.as_ref()),
            dash(holder(device)),
        ]
    };
    let head = [
        "NAME",
        "CLASS",
        "MGMTDEV",
        "VENDOR",
        "QUEUES",
        "QUEUE SIZE",
        "MAC",
        "DRIVER",
        "CHAR DEVICE",
        "HELD BY",
    ];
    print::table(&head, &devices.iter().map(row).collect::<Vec<_>>())?;
    Ok(Exit::Done)
}

fn mgmtdevs(as_json: bool) -> Result<Exit, Problem> {
    let found = vdpa::mgmtdevs()?;
    if as_json {
        print::json(&found)?;
        return Ok(Exit::Done);
    }
    let row = |mgmtdev: &vdpa::Mgmtdev| {
        vec![mgmtdev.name.clone(), mgmtdev.classes.join(","), dash(mgmtdev.max_queues)]
    };
    print::table(&["MGMTDEV", "CLASSES", "QUEUES"], &found.iter().map(row).collect::<Vec<_>>())?;
    Ok(Exit::Done)
}

/// Says what is done, or with `--dry-run` what would be.
fn say(dry_run: bool, as_json: bool, steps: &[String], device: Option<&VdpaDevice>) -> Result<Exit, Problem> {
    if as_json {
        print::json(&json!({"dry_run": dry_run, "steps": steps, "device": device}))?;
        return Ok(Exit::Done);
    }
    steps.iter().for_each(|step| println!("{}{step}", if dry_run { "would " } else { "" }));
    if let Some(device) = device {
        match (&device.node, &device.driver) {
            (Some(node), _) => println!("{} is {node}", device.name),
            (None, driver) => println!(
                "{} has no char device for a guest: {} has it; `modprobe vhost_vdpa`",
                device.name,
                dash(driver.as_ref())
            ),
        }
    }
    Ok(Exit::Done)
}

fn make(add: &AddVdpa, as_json: bool) -> Result<Exit, Problem> {
    let AddVdpa { name, mgmtdev, mac, max_pairs, mtu, driver, dry_run } = add;
    let sysfs = Sysfs::default();
    let new = NewDevice {
        name: name.clone(),
        mgmtdev: mgmtdev.clone(),
        mac: *mac,
        max_pairs: *max_pairs,
        mtu: *mtu,
    };
    let host = Host::to_change(*dry_run)?;
    let moving = match driver {
        Some(driver) => Some((to_be_moved(&host, function(mgmtdev)?, driver)?, driver)),
        None => None,
    };
    let mut steps = Vec::new();
    if let Some((moving, driver)) = &moving {
        let from = moving.driver().map(|driver| format!(" from {driver}")).unwrap_or_default();
        steps.push(format!("bind {mgmtdev}{from} to {driver}"));
    }
    steps.push(format!("make vDPA device {name} at {mgmtdev}"));
    if *dry_run {
        // A function that is still to be bound has no management device yet.
        vdpa::is_free(&new, moving.is_some())?;
        return say(true, as_json, &steps, None);
    }
    let moving = moving.map(|(moving, driver)| (moving.place(), moving, driver));
    let changes = moving.iter().map(|(before, moving, driver)| moving.change(before, driver)).collect();
    host.make(changes, |work| {
        if let Some((before, moving, driver)) = &moving {
            work.enter("bind")?;
            moving.bind(driver, before)?;
        }
        work.enter("add")?;
        Ok(vdpa::add(&new)?)
    })?;
    let made = vdpa::devices(&sysfs)?.into_iter().find(|device| device.name == *name);
    say(false, as_json, &steps, made.as_ref())
}

/// A function that nobody uses, on its way to a driver that the kernel has.
fn to_be_moved<'a>(host: &'a Host, bdf: HostBdf, driver: &str) -> Result<Movable<'a>, Problem> {
    let function = host.free(bdf)?;
    host.sysfs.knows_driver(driver)?;
    if function.driver().as_deref() == Some(vfio::DRIVER) {
        let words = format!(
            "{bdf} is bound to {}, for a guest that drives it itself: `qvirt host unbind {bdf}` first",
            vfio::DRIVER
        );
        return Err(Problem::new(Exit::Refused, words));
    }
    Ok(function)
}

/// The PCI function of a management device.
fn function(mgmtdev: &str) -> Result<HostBdf, Problem> {
    let bdf = mgmtdev.strip_prefix("pci/").and_then(|bdf| bdf.parse().ok());
    bdf.ok_or_else(|| {
        let words = format!(
            "--driver goes with a management device on PCI, such as pci/0000:08:01.1; {mgmtdev} is none"
        );
        Problem::new(Exit::Usage, words)
    })
}

fn delete(name: &str, release: bool, dry_run: bool, as_json: bool) -> Result<Exit, Problem> {
    let sysfs = Sysfs::default();
    let (found, others): (Vec<_>, Vec<_>) =
        vdpa::devices(&sysfs)?.into_iter().partition(|device| device.name == name);
    let device = found.into_iter().next().ok_or_else(|| VdpaError::NoDevice { name: name.to_owned() })?;
    if let Some(holder) =
        device.node.as_ref().and_then(|node| Holders::find().ok()?.of(node).map(str::to_owned))
    {
        return Err(VdpaError::InUse { name: name.to_owned(), holder }.into());
    }
    let mut steps = vec![format!("delete vDPA device {name} of {}", device.mgmtdev)];
    let released = match release {
        true => {
            let bdf = function(&device.mgmtdev)?;
            if let Some(other) = others.iter().find(|other| other.mgmtdev == device.mgmtdev) {
                let words = format!(
                    "{bdf} has vDPA device {} too, which would go with its driver: delete that first, or leave out --release",
                    other.name
                );
                return Err(Problem::new(Exit::Refused, words));
            }
            steps.push(format!("give {bdf} to whichever driver the kernel chooses"));
            Some(bdf)
        }
        false => None,
    };
    if !dry_run {
        vdpa::delete(name)?;
        if let Some(bdf) = released {
            Movable::find(&sysfs, bdf)?.give_to_anyone()?;
        }
    }
    say(dry_run, as_json, &steps, None)
}
