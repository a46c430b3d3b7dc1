//! The devices of one machine with their seats, and planning: the one place where a device is refused or accepted.
//!
//! A [`Layout`] is a value. [`plan`] works on a copy and gives back the copy, so a refused device leaves no trace; whoever executes
//! the plan keeps the new layout, and calls [`Layout::remove`] if it could not be carried out.

mod check;
mod host_devices;
mod medium;
mod merge;
mod overlay;
mod passthrough;
mod pull;
mod resize;
mod shared;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use check::check_spec;
use check::{check, hot_pluggable, needs, seat};
pub use medium::NewMedium;
pub use merge::{Lesser, cancel, dismiss, finalize};
pub use overlay::{is_on_top, take_snapshot, writable_disks};
pub use pull::Pull;

use crate::address::{Address, PciSeat};
use crate::bdf::HostBdf;
use crate::capabilities::Capabilities;
use crate::controller::{ScsiControllerConfig, VirtioSerialConfig};
use crate::device::DeviceConfig;
use crate::disk::Storage;
use crate::host::{HostFacts, HostNeed, Layer};
use crate::id::{DeviceId, Generation, Label};
use crate::passthrough::VfioConfig;
use crate::refusal::Refusal;
use crate::retry::{Policies, Retry};
use crate::spec::{Backend, DeviceSpec};
use crate::topology::{Hold, Moment, Occupant, Seat, Topology, TopologyError};
use crate::units::Mac;
use crate::usb::UsbNeed;

/// A device that was planned: everything that is needed to make it, and to unmake it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placed {
    /// Its id.
    pub id: DeviceId,
    /// Its config, with what was assigned filled in.
    pub config: DeviceConfig,
    /// Its seat; an iothread has none.
    pub address: Option<Address>,
    /// Of a controller: its number among those of its kind, by which addresses on it name it.
    #[serde(default)]
    pub index: Option<u8>,
    /// The QEMU objects.
    pub spec: DeviceSpec,
    /// What it needs of the host.
    pub needs: Vec<HostNeed>,
    /// Whether qvirt made it for another device's sake.
    pub on_demand: bool,
    /// How a disk retries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
}

/// A device and what had to be added for it, in the order in which they are made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Controllers first, the device last.
    pub parts: Vec<Placed>,
    /// The machine with them.
    pub layout: Layout,
}

/// What one machine has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    vm: String,
    shared_memory: bool,
    topology: Topology,
    devices: Vec<Placed>,
    /// The last generation that each id used; it outlives the device.
    generations: BTreeMap<DeviceId, Generation>,
    /// Ids of devices that are still to be placed; what is made on demand must not take them.
    #[serde(skip)]
    reserved: BTreeSet<DeviceId>,
    /// Functions of the host that devices still to be placed ask for.
    #[serde(skip)]
    claimed: BTreeSet<HostBdf>,
}

/// Plans one device. Errors: the first thing that speaks against it.
pub fn plan(
    config: &DeviceConfig,
    layout: &Layout,
    host: &HostFacts,
    qemu: &Capabilities,
    moment: Moment,
) -> Result<Plan, Refusal> {
    let first = layout.devices.len();
    let mut next = layout.clone();
    next.place(config.clone(), host, qemu, moment, false)?;
    Ok(Plan { parts: next.devices[first..].to_vec(), layout: next })
}

/// Plans a whole machine before its start. Devices that ask for a seat choose first. An error names the position of its device.
pub fn plan_machine(
    mut layout: Layout,
    configs: &[DeviceConfig],
    host: &HostFacts,
    qemu: &Capabilities,
) -> Result<Layout, (usize, Refusal)> {
    let configs = layout.labelled(layout.named(configs)?)?;
    for (index, config) in configs.iter().enumerate() {
        // Before any of them chooses a seat, so that addresses count the controllers as the file does.
        if let Some(id) = config.id() {
            layout.add_controller(id, config).map_err(|refusal| (index, refusal))?;
        }
    }
    layout.reserved = configs.iter().filter_map(DeviceConfig::id).cloned().collect();
    layout.claimed = configs.iter().filter_map(DeviceConfig::host_function).collect();
    let mut order: Vec<usize> = (0..configs.len()).collect();
    order.sort_by_key(|i| configs[*i].turn());
    for index in order {
        layout
            .place(configs[index].clone(), host, qemu, Moment::Cold, false)
            .map_err(|refusal| (index, refusal))?;
    }
    let position =
        |placed: &Placed| configs.iter().position(|c| c.id() == Some(&placed.id)).unwrap_or(usize::MAX);
    layout.devices.sort_by_key(|placed| (placed.config.rank(), position(placed)));
    layout.reserved.clear();
    layout.claimed.clear();
    Ok(layout)
}

impl Layout {
    /// An empty machine.
    pub fn new(vm: &str, shared_memory: bool, topology: Topology) -> Layout {
        Layout { vm: vm.to_owned(), shared_memory, topology, ..Layout::default() }
    }

    /// The seats.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The seats, to mark what leaves, stays or is foreign.
    pub fn topology_mut(&mut self) -> &mut Topology {
        &mut self.topology
    }

    /// The devices, in the order in which they were made.
    pub fn devices(&self) -> &[Placed] {
        &self.devices
    }

    /// A device by its id, or a disk by its target label.
    pub fn device(&self, name: &str) -> Option<&Placed> {
        let by_id = self.devices.iter().find(|d| d.id.as_str() == name);
        by_id.or_else(|| self.devices.iter().find(|d| d.label().is_some_and(|label| label.as_str() == name)))
    }

    /// A device by its id or label, or the refusal that lists what there is.
    pub fn expect_device(&self, name: &str) -> Result<&Placed, Refusal> {
        self.device(name).ok_or_else(|| {
            let known: Vec<&str> = self.devices.iter().map(|d| d.id.as_str()).collect();
            let known = if known.is_empty() { "no devices".to_owned() } else { known.join(", ") };
            Refusal::NoSuchDevice { id: name.to_owned(), known }
        })
    }

    /// The device is gone, and its seat free.
    pub fn remove(&mut self, id: &DeviceId) {
        self.devices.retain(|d| d.id != *id);
        self.topology.release(id);
    }

    /// The machine without its devices, to put back those that the journal knows.
    pub fn bare(&self) -> Layout {
        let mut bare = self.clone();
        for device in &self.devices {
            bare.remove(&device.id);
        }
        bare
    }

    /// Remembers the generations of a device that came and went, and that its seat was left.
    pub fn remember(&mut self, gone: &Placed) {
        self.note_generation(gone);
        if let Some(seat) = &gone.address {
            self.topology.was_left(seat);
        }
    }

    /// Puts a device back that is known from the journal: adoption.
    pub fn restore(&mut self, placed: Placed) -> Result<(), Refusal> {
        if let Some(address) = placed.address.clone() {
            self.sit(&placed.id, &placed.config, address)?;
        }
        if let Some(index) = placed.index {
            match &placed.config {
                DeviceConfig::UsbController(usb) => {
                    self.topology.set_usb_controller(index, &placed.id, usb.model);
                }
                DeviceConfig::ScsiController(_) => self.topology.set_scsi_controller(index, &placed.id),
                _ => self.topology.set_serial_controller(index, &placed.id),
            }
        }
        self.note_generation(&placed);
        self.devices.push(placed);
        Ok(())
    }

    /// Takes a device's very seat, and those that go with it.
    fn sit(&mut self, id: &DeviceId, config: &DeviceConfig, address: Address) -> Result<(), Refusal> {
        let further = match config {
            DeviceConfig::UsbController(usb) => usb.further_seats(&address),
            _ => Vec::new(),
        };
        for seat in std::iter::once(address).chain(further) {
            let occupant = Occupant { name: id.to_string(), hold: Hold::Present };
            let taken = self.topology.take(seat, occupant);
            taken.map_err(|source| Refusal::Seat { id: id.clone(), source })?;
        }
        Ok(())
    }

    /// Whether a device can be detached while the machine runs; the refusal says why not.
    pub fn can_leave(&self, placed: &Placed) -> Result<(), Refusal> {
        let by_iothread =
            self.devices.iter().filter(|d| d.config.iothread() == Some(&placed.id)).map(|d| d.id.as_str());
        let users: Vec<&str> = self.topology.users_of(&placed.id).into_iter().chain(by_iothread).collect();
        if !users.is_empty() {
            return Err(Refusal::InUse { id: placed.id.clone(), users: users.join(", ") });
        }
        if let Some(leader) = self.leader(placed) {
            return Err(Refusal::InUse { id: placed.id.clone(), users: leader.id.to_string() });
        }
        if placed.is_accelerator() {
            return Err(Refusal::NotHotPluggable { id: placed.id.clone(), kind: passthrough::ACCELERATOR });
        }
        hot_pluggable(&placed.id, &placed.config)
    }

    /// Root ports and bridges as QEMU's objects, in order.
    pub fn controllers(&self) -> Vec<DeviceSpec> {
        let ports = self.topology.ports().iter().map(crate::pcie::RootPort::lower);
        ports.chain(self.topology.bridges().iter().map(crate::pcie::Bridge::lower)).collect()
    }

    /// Gives each device its id, in the config's order, those that were given first.
    fn named(&self, configs: &[DeviceConfig]) -> Result<Vec<DeviceConfig>, (usize, Refusal)> {
        let mut named = configs.to_vec();
        for (index, config) in configs.iter().enumerate() {
            let Some(id) = config.id() else { continue };
            if self.has_id(id) || configs[..index].iter().any(|c| c.id() == Some(id)) {
                return Err((index, Refusal::DuplicateId { id: id.clone() }));
            }
        }
        for index in 0..named.len() {
            if named[index].id().is_none() {
                let taken = |id: &DeviceId| self.has_id(id) || named.iter().any(|c| c.id() == Some(id));
                let id = free_id(named[index].id_prefix(), taken);
                named[index].set_id(id);
            }
        }
        Ok(named)
    }

    fn has_id(&self, id: &DeviceId) -> bool {
        let buses =
            self.topology.ports().iter().map(|p| &p.id).chain(self.topology.bridges().iter().map(|b| &b.id));
        let companions = self.devices.iter().flat_map(|d| &d.spec.companions);
        self.devices.iter().map(|d| &d.id).chain(buses).any(|known| known == id)
            || companions.into_iter().any(|companion| companion.id() == id.as_str())
            || self.topology.could_grow_to(id)
    }

    fn place(
        &mut self,
        mut config: DeviceConfig,
        host: &HostFacts,
        qemu: &Capabilities,
        moment: Moment,
        on_demand: bool,
    ) -> Result<DeviceId, Refusal> {
        let id = config.id().cloned().unwrap_or_else(|| free_id(config.id_prefix(), |id| self.has_id(id)));
        if self.has_id(&id) {
            return Err(Refusal::DuplicateId { id });
        }
        config.set_id(id.clone());
        if moment == Moment::Hot {
            hot_pluggable(&id, &config)?;
        }
        self.check_shared(&id, &config)?;
        let about = (self.shared_memory, self.is_threaded(&config));
        let storage = check(&id, &config, about, host, qemu)?;
        self.check_host_devices(&id, &config, &storage)?;
        host_devices::adopt_mac(&mut config, &storage);
        self.assign(&id, &mut config)?;
        let passed = self.passthrough(&id, &mut config, host, qemu, moment)?;
        let seat = seat(&config, host);
        if let Some(seat) = &seat {
            self.controller_for(&id, seat, host, qemu, moment)?;
        }
        let claimed = seat.map(|seat| self.topology.claim(&id, &seat, moment)).transpose();
        let address = claimed.map_err(|source| Refusal::Seat { id: id.clone(), source })?;
        if let Some(address) = &address {
            self.sit(&id, &config, address.clone())?;
        }
        let index = self.add_controller(&id, &config)?;
        let spec = match (&passed, address.as_ref()) {
            (Some(passed), Some(address)) => passed.lower(&id, &config, address),
            _ => self.lower(&id, &config, address.as_ref(), &storage, host),
        };
        check_spec(&spec, qemu)?;
        let mut names = spec.companions.iter().filter_map(|companion| companion.id().parse().ok());
        if let Some(id) = names.find(|name| self.has_id(name) || self.reserved.contains(name)) {
            return Err(Refusal::DuplicateId { id });
        }
        let (mut needs, mut rest) = (needs(&self.vm, &id, &config, &storage, host), Vec::new());
        self.check_usb(&id, &needs, &config)?;
        if let Some(passed) = passed {
            (needs, rest) = (passed.needs, passed.rest);
        }
        let (retry, config_prefix) = (storage.retry, config.id_prefix());
        let placed = Placed { id: id.clone(), config, address, index, spec, needs, on_demand, retry };
        if let (
            DeviceConfig::Vfio(VfioConfig { multifunction: true, .. }),
            Some(Address::Pci(PciSeat::Root(slot, _))),
        ) = (&placed.config, &placed.address)
        {
            self.topology.has_functions(*slot);
        }
        self.note_generation(&placed);
        self.devices.push(placed);
        for function in rest {
            let other = free_id(config_prefix, |id| self.has_id(id) || self.reserved.contains(id));
            let config = DeviceConfig::Vfio(VfioConfig::of_group(function, other));
            self.place(config, host, qemu, moment, true)?;
        }
        Ok(id)
    }

    /// Makes the controller that a seat needs, if there is none with room.
    fn controller_for(
        &mut self,
        id: &DeviceId,
        seat: &Seat,
        host: &HostFacts,
        qemu: &Capabilities,
        moment: Moment,
    ) -> Result<(), Refusal> {
        let config = match seat {
            // A controller that is asked for by its index is made when it is the very next one.
            Seat::Scsi { controller, .. } => {
                let missing = match controller {
                    Some(0) => self.topology.scsi_controller(0).is_none(),
                    Some(_) => false,
                    None => !self.topology.has_free_target(),
                };
                missing.then(|| DeviceConfig::ScsiController(ScsiControllerConfig::default()))
            }
            Seat::SerialPort { console } => {
                let missing = !self.topology.has_free_serial_port(*console);
                missing.then(|| DeviceConfig::VirtioSerial(VirtioSerialConfig::default()))
            }
            Seat::Pci(_) | Seat::Isa | Seat::RootSlot | Seat::Usb { .. } => None,
        };
        let Some(mut config) = config else { return Ok(()) };
        config.set_id(free_id(config.id_prefix(), |other| {
            other == id || self.has_id(other) || self.reserved.contains(other)
        }));
        self.place(config, host, qemu, moment, true).map(drop)
    }

    /// A controller's index; other devices have none.
    fn add_controller(&mut self, id: &DeviceId, config: &DeviceConfig) -> Result<Option<u8>, Refusal> {
        let index = match config {
            DeviceConfig::ScsiController(_) => self.topology.add_scsi_controller(id),
            DeviceConfig::VirtioSerial(_) => self.topology.add_serial_controller(id),
            DeviceConfig::UsbController(usb) => {
                let added = self.topology.add_usb_controller(id, usb.model, usb.index);
                return added.map(Some).map_err(|source| Refusal::Usb { id: id.clone(), source });
            }
            _ => return Ok(None),
        };
        let full = Refusal::Seat { id: id.clone(), source: TopologyError::Full { kind: "controller index" } };
        index.map(Some).ok_or(full)
    }

    fn lower(
        &self,
        id: &DeviceId,
        config: &DeviceConfig,
        address: Option<&Address>,
        storage: &Storage,
        host: &HostFacts,
    ) -> DeviceSpec {
        let controller = address.and_then(|address| match address {
            Address::Scsi(a) => self.topology.scsi_controller(a.controller),
            Address::SerialPort { controller, .. } => self.topology.serial_controller(*controller),
            Address::Usb { controller, .. } => self.topology.usb_controller(*controller),
            Address::Pci(_) | Address::Isa(_) => None,
        });
        match (config, address) {
            (DeviceConfig::Disk(disk), Some(address)) => {
                let top = self.top_generation(id, &storage.chain);
                disk.lower(id, address, controller, storage, top, &host.run_dir)
            }
            (DeviceConfig::Nic(nic), Some(address)) => nic.lower(&self.vm, id, address),
            (DeviceConfig::Serial(serial), Some(address)) => serial.lower(id, address, controller),
            (DeviceConfig::Channel(channel), Some(address)) => {
                channel.lower(id, address, controller, &host.run_dir)
            }
            (DeviceConfig::ScsiController(scsi), Some(address)) => scsi.lower(id, address),
            (DeviceConfig::VirtioSerial(serial), Some(address)) => serial.lower(id, address),
            (DeviceConfig::Vdpa(vdpa), Some(address)) => {
                let device = storage.vdpa.as_ref().expect("a vDPA device was found before it is lowered");
                vdpa.lower(id, address, device, self.free_fdset(), self.next_generation(id))
            }
            (DeviceConfig::VhostScsi(scsi), Some(address)) => scsi.lower(id, address),
            (DeviceConfig::UsbController(usb), Some(address)) => usb.lower(id, address),
            (DeviceConfig::Usb(usb), Some(address)) => usb.lower(id, address, controller, host),
            (DeviceConfig::Iothread(iothread), _) => iothread.lower(id),
            (DeviceConfig::Vfio(_) | DeviceConfig::Vf(_), _) => {
                unreachable!("what passes a function through lowers it")
            }
            (_, None) => unreachable!("every kind but an iothread claims a seat"),
        }
    }

    /// Generations count layers: a chain of three takes three, and the top has the highest.
    fn top_generation(&self, id: &DeviceId, chain: &[Layer]) -> Generation {
        let last = self.generations.get(id).copied().unwrap_or_default().0;
        Generation(last.saturating_add(u32::try_from(chain.len()).unwrap_or(u32::MAX)))
    }

    fn next_generation(&self, id: &DeviceId) -> Generation {
        Generation(self.generations.get(id).copied().unwrap_or_default().0.saturating_add(1))
    }

    fn note_generation(&mut self, placed: &Placed) {
        let nodes = placed.spec.backends.iter().filter_map(|backend| match backend {
            Backend::Blockdev(props) => {
                DeviceId::of_node(props.get("node-name")?.as_str()?).map(|(_, generation)| generation)
            }
            _ => None,
        });
        if let Some(highest) = nodes.max() {
            let entry = self.generations.entry(placed.id.clone()).or_default();
            *entry = highest.max(*entry);
        }
    }
}

impl Placed {
    /// What is behind it on the host, for people: an image, a bridge, a socket.
    pub fn backing(&self) -> Option<String> {
        let socket = self.needs.iter().find_map(|need| match need {
            HostNeed::Socket { path } => Some(path.clone()),
            _ => None,
        });
        let usb = self.usb().map(UsbNeed::name);
        usb.or_else(|| self.config.backing()).or(socket)
    }

    /// The host's USB device that it is.
    pub fn usb(&self) -> Option<&UsbNeed> {
        self.needs.iter().find_map(|need| match need {
            HostNeed::Usb(usb) => Some(usb),
            _ => None,
        })
    }

    /// A disk's target label.
    pub fn label(&self) -> Option<&Label> {
        match &self.config {
            DeviceConfig::Disk(disk) => disk.target.as_ref(),
            _ => None,
        }
    }

    /// What a disk does at an error.
    pub fn policies(&self) -> Option<Policies> {
        match &self.config {
            DeviceConfig::Disk(disk) => Some(disk.on_error.unwrap_or_default().policies()),
            _ => None,
        }
    }

    fn mac(&self) -> Option<Mac> {
        host_devices::mac(&self.config)
    }
}

fn free_id(prefix: &str, taken: impl Fn(&DeviceId) -> bool) -> DeviceId {
    (0..).map(|n| DeviceId::numbered(prefix, n)).find(|id| !taken(id)).expect("numbers do not run out")
}
