//! From a config to a machine that this QEMU and this host can have: probe, look at the images, plan the seats, print the command line.
//!
//! Changes nothing on the host but the cache of what QEMU can do. `check` stops here; `launch` goes on.

use std::path::PathBuf;

use devices::capabilities::Capabilities;
use devices::host::{Format, HostFacts};
use devices::layout::{check_spec, plan_machine};
use devices::machine::{Machine, MachineError, versioned};
use devices::pcie::{RootPort, written_out};
use devices::spec::Numbers;
use devices::topology::Topology;
use devices::{DeviceConfig, DeviceId, Layout};
use thiserror::Error;

use crate::accel::{self, Accel, AccelError};
use crate::config::{ConfigError, VmConfig};
use crate::examine::{Answer, Question, examine};
use crate::folders::{Folders, FoldersError, VmFiles};
use crate::host::pci::PciError;
use crate::host::usb::UsbError;
use crate::host::{scsi_target, usb, vdpa, vfio};
use crate::lease::{LeaseError, Leases};
use crate::probe::{ProbeError, probe};
use crate::process::{SpawnError, find_binary};
use crate::snapshot::Store;

/// A machine that cannot be had.
#[derive(Debug, Error)]
pub enum BlueprintError {
    /// The config, at one of its lines.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine around the devices.
    #[error("config {}: {source}", path.display())]
    Machine {
        /// The config.
        path: PathBuf,
        /// What is wrong.
        source: MachineError,
    },
    /// The accelerator.
    #[error("config {}: {source}", path.display())]
    Accel {
        /// The config.
        path: PathBuf,
        /// What is wrong.
        source: AccelError,
    },
    /// Folders and socket paths.
    #[error(transparent)]
    Folders(#[from] FoldersError),
    /// QEMU could not be asked.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The host's USB devices.
    #[error(transparent)]
    Usb(#[from] UsbError),
    /// QEMU is missing.
    #[error(transparent)]
    Binary(#[from] SpawnError),
    /// The host's devices could not be listed.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The leases of devices.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// A machine, planned down to every seat.
#[derive(Debug)]
pub struct Blueprint {
    /// What was asked for.
    pub config: VmConfig,
    /// Absolute path of QEMU.
    pub binary: PathBuf,
    /// What that QEMU can do.
    pub qemu: Capabilities,
    /// The machine around the devices.
    pub machine: Machine,
    /// The devices and their seats.
    pub layout: Layout,
    /// The accelerator that was picked, and why.
    pub accel_reason: String,
    /// What is allowed and yet worth a word.
    pub warnings: Vec<String>,
}

impl Blueprint {
    /// Plans a VM. Errors: the first thing that speaks against it, at its line.
    pub async fn draw(config: VmConfig, folders: &Folders) -> Result<Blueprint, BlueprintError> {
        let files = folders.vm(&config.name)?;
        let binary = find_binary(&config.qemu)?;
        let qemu = probe(&binary, &folders.cache).await?;
        let store = Store::new(&folders.state);
        let answers = examine(&questions(&config, &store)).await;
        let mut facts = HostFacts::default();
        vdpa::learn(&mut facts, &config.devices);
        scsi_target::learn(&mut facts, &config.devices);
        usb::facts::learn(&mut facts, &config.devices).await?;
        let leases = Leases::open(&folders.leases)?;
        vfio::learn(&mut facts, &config.devices, &leases)?;
        Blueprint::plan(config, binary, qemu, &accel::HostFacts::read(), &files, (facts, answers))
    }

    /// Plans a VM for a QEMU and a host that are known already (`facts`: its devices); looks at its images in this process.
    pub fn draw_for(
        config: VmConfig,
        binary: PathBuf,
        qemu: Capabilities,
        host: &accel::HostFacts,
        files: &VmFiles,
        store: &Store,
        facts: HostFacts,
    ) -> Result<Blueprint, BlueprintError> {
        let answers = questions(&config, store).iter().map(Question::answer).collect();
        Blueprint::plan(config, binary, qemu, host, files, (facts, answers))
    }

    fn plan(
        config: VmConfig,
        binary: PathBuf,
        qemu: Capabilities,
        host: &accel::HostFacts,
        files: &VmFiles,
        found: (HostFacts, Vec<Answer>),
    ) -> Result<Blueprint, BlueprintError> {
        let (accel, accel_reason) = accel::choose(config.accel, host)
            .map_err(|source| BlueprintError::Accel { path: config.path.clone(), source })?;
        let machine = machine(&config, accel, &qemu);
        let machine =
            machine.map_err(|source| BlueprintError::Machine { path: config.path.clone(), source })?;
        if let Some(notify) = &config.notify {
            notify.check().map_err(|why| config.at_notify(why))?;
        }
        let facts = facts_of(&config, files, found)?;
        let (layout, mut warnings) = layout(&config, machine.shares_memory(), &facts, &qemu)?;
        warnings.extend(devices::usb::warnings(&layout.topology().usb_controllers(), &facts.usb));
        let accel_reason = format!("{}: {accel_reason}", machine.accel);
        Ok(Blueprint { config, binary, qemu, machine, layout, accel_reason, warnings })
    }

    /// Which disks do not start from the image that their config names, for people.
    pub fn tops(&self) -> impl Iterator<Item = String> {
        self.layout.devices().iter().filter_map(|device| {
            let (named, top) = (device.config.image()?, device.layers().into_iter().next()?);
            let (id, top) = (&device.id, top.path);
            (named != top).then(|| format!("{id}: starts from {top}, the top of the chain on {named}"))
        })
    }

    /// The command line without the program's name. `monitors` are the descriptors of the two QMP listeners, as words.
    pub fn argv(&self, monitors: [&str; 2], numbers: &Numbers) -> Vec<String> {
        let mut words = Machine::prelude();
        words.extend(self.machine.argv(&self.qemu));
        words.extend(Machine::monitor("qmp", monitors[0]));
        words.extend(Machine::monitor("rescue", monitors[1]));
        for spec in self.layout.controllers() {
            words.extend(spec.argv(&self.qemu, numbers));
        }
        for device in self.layout.devices() {
            words.extend(device.spec.argv(&self.qemu, numbers));
        }
        words
    }
}

/// All that is to be looked at before a config is planned: images of devices, firmware, kernel files.
fn questions(config: &VmConfig, store: &Store) -> Vec<Question> {
    let devices = config.devices.iter().filter_map(|device| Question::of(device, store));
    let firmware = firmware(config).map(|path| Question::Image(path.clone(), Some(Format::Raw)));
    devices.chain(firmware).chain(kernel(config).map(|path| Question::File(path.clone()))).collect()
}

fn firmware(config: &VmConfig) -> impl Iterator<Item = &String> {
    config.firmware.iter().flat_map(|f| [Some(&f.code), f.vars.as_ref()]).flatten()
}

fn kernel(config: &VmConfig) -> impl Iterator<Item = &String> {
    config.kernel.iter().flat_map(|k| [Some(&k.path), k.initrd.as_ref()]).flatten()
}

/// What was found out, in the order of [`questions`].
fn facts_of(
    config: &VmConfig,
    files: &VmFiles,
    (mut facts, answers): (HostFacts, Vec<Answer>),
) -> Result<HostFacts, ConfigError> {
    facts.run_dir = files.dir().to_string_lossy().into_owned();
    let mut answers = answers.into_iter();
    let mut next = || answers.next().unwrap_or_else(|| Err("it was not looked at: try again".to_owned()));
    for (index, device) in config.devices.iter().enumerate() {
        if let Some(path) = Question::subject(device) {
            let layers = next().map_err(|error| config.at_device(index, error))?;
            facts.chains.insert(path.to_owned(), layers);
        }
    }
    for _ in firmware(config) {
        next().map_err(|error| config.at_top(format!("firmware: {error}")))?;
    }
    for path in kernel(config) {
        next().map_err(|error| {
            config.at_top(format!(
                "kernel file {path} cannot be opened: {error}; check `path` and `initrd` of [kernel]"
            ))
        })?;
    }
    Ok(facts)
}

fn machine(config: &VmConfig, accel: Accel, qemu: &Capabilities) -> Result<Machine, MachineError> {
    let cpu = if accel == Accel::Kvm { "host" } else { "max" };
    let machine = Machine {
        name: config.name.to_string(),
        uuid: config.uuid.clone().unwrap_or_else(|| derived_uuid(config.name.as_str())),
        machine: versioned(&config.machine, qemu)?,
        accel: accel.to_string(),
        cpu: config.cpu.clone().unwrap_or_else(|| cpu.to_owned()),
        vcpus: config.vcpus,
        memory: config.memory.clone(),
        firmware: config.firmware.clone(),
        kernel: config.kernel.clone(),
    };
    machine.check()?;
    Ok(machine)
}

/// The planned machine, and what it does without.
fn layout(
    config: &VmConfig,
    shared_memory: bool,
    facts: &HostFacts,
    qemu: &Capabilities,
) -> Result<(Layout, Vec<String>), ConfigError> {
    let reserve = config.pcie.pref64_reserve;
    let topology = if config.controllers.is_empty() {
        Topology::growing(reserve)
    } else {
        let (ports, bridges) = written_out(&config.controllers, reserve)
            .map_err(|(index, rule)| config.at_controller(index, rule))?;
        Topology::written_out(ports, bridges)
    };
    let empty = Layout::new(config.name.as_str(), shared_memory, topology);
    let (places, devices, warnings) = without_absent(&config.devices, facts);
    let mut layout = plan_machine(empty, &devices, facts, qemu)
        .map_err(|(index, refusal)| config.at_device(places[index], refusal))?;
    if config.controllers.is_empty() {
        let spare = config.pcie.root_ports.unwrap_or(RootPort::DEFAULT_SPARE);
        layout
            .topology_mut()
            .add_spare(spare)
            .map_err(|error| config.at_top(format!("[pcie] root_ports = {spare}: {error}")))?;
    }
    for spec in layout.controllers() {
        check_spec(&spec, qemu).map_err(|refusal| config.at_top(refusal))?;
    }
    Ok((layout, warnings))
}

/// Devices without those that may be missing on the host and are: their places in the config, the devices, and word of the others.
fn without_absent(
    devices: &[DeviceConfig],
    facts: &HostFacts,
) -> (Vec<usize>, Vec<DeviceConfig>, Vec<String>) {
    let (mut places, mut present, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
    for (place, device) in devices.iter().enumerate() {
        match device {
            DeviceConfig::Usb(usb) if usb.is_left_out(&facts.usb) => {
                let id = usb.id.as_ref().map_or("a [[usb]] device", DeviceId::as_str);
                let host = device.backing().unwrap_or_default();
                warnings.push(format!(
                    "{id} is left out: no USB device {host} is plugged into this host; plug it in, then `qvirt attach`"
                ));
            }
            _ => {
                places.push(place);
                present.push(device.clone());
            }
        }
    }
    (places, present, warnings)
}

/// The UUID of a VM that was given none: the same on this host for the same name, and another on every other host.
fn derived_uuid(name: &str) -> String {
    let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let half = |salt: u8| {
        let bytes = [salt].into_iter().chain(host.trim().bytes()).chain([0]).chain(name.bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let (high, low) = (half(1), half(2));
    // Version 8 (a scheme of one's own), variant 10, as RFC 9562 has it.
    let high = high & !0xf000 | 0x8000;
    let low = low & !(0b11 << 62) | 0b10 << 62;
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}
