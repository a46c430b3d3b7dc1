//! Meeting what devices need of the host, and giving it back: leases of images, taps and their switches, vhost nodes, socket files.
//!
//! The journal has the device with all its needs before the first of them is met, so [`Host::give_back`] may be called for a need that
//! was never met: it looks at the world first and undoes only what is there and ours.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use devices::bdf::HostBdf;
use devices::host::{Access, HostNeed, Switch};
use devices::units::Mac;
use devices::{DeviceId, Placed};
use thiserror::Error;

use super::io_proxy;
use super::link::{self, BadLinkName, LinkError, LinkName};
use super::movable::{Movable, MoveError, Place};
use super::ovs::{NewPort, Ovs, OvsError};
use super::scsi_target::{self, ScsiTargetError};
use super::sysfs::Sysfs;
use super::tap::{self, Create, TapError};
use super::usb::{UsbError, taken};
use super::vdpa::{self, NewDevice, VdpaError};
use super::vfio::{self, VfioError};
use super::vhost::{VhostError, open_vhost_net};
use crate::folders::VmName;
use crate::lease::{Holder, LeaseError, LeaseKey, Leases, Mode, look};
use crate::locks::LockError;
use crate::process::SpawnError;
use crate::snapshot::Store;

/// A need that cannot be met, or not be given back.
#[derive(Debug, Error)]
pub enum NeedError {
    /// The image cannot be looked at.
    #[error("image {}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else has it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// An interface name.
    #[error(transparent)]
    Name(#[from] BadLinkName),
    /// The interface.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The Open vSwitch bridge.
    #[error(transparent)]
    Ovs(#[from] OvsError),
    /// vhost-net.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// vDPA.
    #[error(transparent)]
    Vdpa(#[from] VdpaError),
    /// vhost-scsi.
    #[error(transparent)]
    VhostScsi(#[from] ScsiTargetError),
    /// A PCI function.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// Its driver.
    #[error(transparent)]
    Move(#[from] MoveError),
    /// The USB device.
    #[error(transparent)]
    Usb(#[from] UsbError),
    /// Something that is no socket lies where QEMU would make one, and QEMU would remove it.
    #[error("{} exists and is no socket: move it away, or give the channel another `path`", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there, and QEMU would take the path away from them.
    #[error("{}: another process listens on this socket: give the channel another `path`", path.display())]
    Listening {
        /// The path.
        path: PathBuf,
    },
    /// The process that is to serve an image does not.
    #[error("disk {id}: its io-proxy does not serve image {}: {reason}; mend that and try again, {} has the details", image.display(), log.display())]
    Proxy {
        /// The disk.
        id: DeviceId,
        /// The image.
        image: PathBuf,
        /// Why.
        reason: String,
        /// Where it says more.
        log: PathBuf,
    },
    /// It cannot be started.
    #[error("the io-proxy")]
    Spawn(#[from] SpawnError),
    /// Whether it runs is not to be seen.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It cannot be ended.
    #[error("disk {id}: its io-proxy is still held by the kernel in I/O on {}: it ends when that storage answers or is gone", image.display())]
    ProxyStays {
        /// The disk.
        id: DeviceId,
        /// The image.
        image: PathBuf,
    },
    /// A socket file that cannot be removed.
    #[error("socket {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl NeedError {
    /// Whether somebody else has the thing: nothing was tried then.
    pub fn is_refusal(&self) -> bool {
        use LeaseError::Held;
        use VdpaError::{Busy, Exists, InUse, NoMgmtdev};
        matches!(
            self,
            NeedError::Lease(Held { .. })
                | NeedError::Vdpa(Busy { .. } | Exists { .. } | InUse { .. } | NoMgmtdev { .. })
                | NeedError::Vfio(
                    VfioError::Busy { .. } | VfioError::VfInUse { .. } | VfioError::Down { .. }
                )
                | NeedError::Usb(UsbError::Claimed { .. } | UsbError::Mounted { .. })
        )
    }
}

/// A descriptor with the name under which QEMU gets to know it.
pub type Named = (String, OwnedFd);

/// The host, on behalf of one VM.
#[derive(Debug)]
pub struct Host {
    /// The VM.
    pub vm: VmName,
    /// Its runtime folder.
    pub run_dir: PathBuf,
    /// The folder of its logs.
    pub state_dir: PathBuf,
    /// Leases of the whole host.
    pub leases: Leases,
}

impl Host {
    /// Meets one need of a device; gives the descriptors that QEMU is to have.
    pub fn meet(&self, id: &DeviceId, need: &HostNeed) -> Result<Vec<Named>, NeedError> {
        match need {
            HostNeed::Image { path, access } => self.lease(id, path, *access).map(|()| Vec::new()),
            HostNeed::Tap { name, descriptors, switch, mac } => {
                self.plug(name, descriptors, switch.as_ref(), *mac)
            }
            HostNeed::VhostNet { descriptors } => {
                let opened = open_vhost_net(u16::try_from(descriptors.len()).unwrap_or(u16::MAX))?;
                Ok(descriptors.iter().cloned().zip(opened).collect())
            }
            HostNeed::Socket { path } => socket_is_free(Path::new(path)).map(|()| Vec::new()),
            HostNeed::Vdpa { name, node, descriptor, make } => {
                let key = LeaseKey::Vdpa { name: name.clone() };
                self.lease_exclusively(id, key.clone(), name)?;
                if let Some(new) = make
                    && let Err(error) = vdpa::add(&NewDevice::wanted(new, name))
                {
                    // Without the lease what is there is not taken for ours, and stays.
                    self.leases.release(&key, &self.vm, id.as_str())?;
                    return Err(error.into());
                }
                let open = |descriptor: &String| Ok((descriptor.clone(), vdpa::open(name, node.as_deref())?));
                descriptor.iter().map(open).collect()
            }
            HostNeed::VhostScsi { wwpn, descriptor } => {
                self.lease_exclusively(id, LeaseKey::VhostScsi { wwpn: wwpn.clone() }, wwpn)?;
                Ok(vec![(descriptor.clone(), scsi_target::open()?)])
            }
            HostNeed::IoProxy(plan) => {
                let log = self.state_dir.join(format!("{id}-io-proxy.log"));
                io_proxy::start(id, plan, &log).map(|()| Vec::new())
            }
            HostNeed::Function { host, group, .. } => {
                self.lease_function(id, *host, *group).map(|()| Vec::new())
            }
            HostNeed::Driver { host, before, override_before } => {
                let sysfs = Sysfs::default();
                let function = Movable::find(&sysfs, *host)?;
                self.vfs_are_free(*host, &function.vfs())?;
                function.bind(vfio::DRIVER, &place(before, override_before))?;
                Ok(Vec::new())
            }
            HostNeed::VfProfile { pf, index, wanted, .. } => {
                vfio::set_profile(&Sysfs::default(), *pf, *index, wanted)?;
                Ok(Vec::new())
            }
            HostNeed::Usb(usb) => {
                let key = LeaseKey::Usb { bus: usb.bus, port: usb.port.to_string() };
                self.lease_exclusively(id, key, &usb.name())?;
                Ok(taken::may_be_taken(usb).map(|()| Vec::new())?)
            }
        }
    }

    /// Undoes what [`Host::meet`] did, as far as it was done.
    pub fn give_back(&self, id: &DeviceId, need: &HostNeed) -> Result<(), NeedError> {
        match need {
            // By holder, not by path: the image may have been renamed or removed meanwhile.
            HostNeed::Vdpa { name, make, .. } => {
                let key = LeaseKey::Vdpa { name: name.clone() };
                let is_ours = self.has_lease(id, &key)?;
                if let Some(new) = make.as_ref().filter(|_| is_ours) {
                    vdpa::delete_made(name, &new.mgmtdev)?;
                }
                Ok(self.leases.release(&key, &self.vm, id.as_str())?)
            }
            HostNeed::Image { .. } | HostNeed::VhostScsi { .. } | HostNeed::Function { .. } => {
                Ok(self.leases.release_device(&self.vm, &self.run_dir, id.as_str())?)
            }
            HostNeed::Tap { name, switch: Some(switch), .. } if switch.openvswitch => {
                match Ovs::default().del_port(&name.parse()?, self.vm.as_str()) {
                    // Without the client there is no port of ours either: it is what adds them.
                    Ok(_) | Err(OvsError::NoClient { .. }) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            }
            // A tap that was made goes with its last descriptor; one that was there before stays as the user made it.
            HostNeed::Tap { .. } | HostNeed::VhostNet { .. } => Ok(()),
            HostNeed::IoProxy(plan) => io_proxy::end(id, plan),
            HostNeed::Socket { path } => remove_socket(Path::new(path)),
            HostNeed::Driver { host, before, override_before } => {
                let sysfs = Sysfs::default();
                match Movable::find(&sysfs, *host) {
                    // Its card was pulled, or its virtual functions were switched off.
                    Err(MoveError::NoDevice { .. }) => Ok(()),
                    function => Ok(function?.give_back(vfio::DRIVER, &place(before, override_before))?),
                }
            }
            HostNeed::VfProfile { pf, index, before, wanted } => {
                Ok(vfio::restore_profile(&Sysfs::default(), *pf, *index, before, wanted)?)
            }
            HostNeed::Usb(usb) => {
                let key = LeaseKey::Usb { bus: usb.bus, port: usb.port.to_string() };
                if self.has_lease(id, &key)? {
                    taken::give_back(usb)?;
                }
                Ok(self.leases.release(&key, &self.vm, id.as_str())?)
            }
        }
    }

    /// Gives everything back, the last first; goes on after an error and returns the first. What an io-proxy still uses is not given back.
    pub fn give_all_back(&self, device: &Placed) -> Result<(), NeedError> {
        let mut outcome = Ok(());
        for need in device.needs.iter().rev() {
            match self.give_back(&device.id, need) {
                Err(stays @ NeedError::ProxyStays { .. }) => return outcome.and(Err(stays)),
                given => outcome = outcome.and(given),
            }
        }
        outcome
    }

    /// What is known of snapshots.
    pub fn store(&self) -> Store {
        Store::new(self.state_dir.parent().unwrap_or(&self.state_dir))
    }

    /// Gives back the images that a device had and has no more.
    pub fn give_back_but(&self, device: &Placed) -> Result<(), NeedError> {
        let images: Vec<&str> = crate::launch::images(std::slice::from_ref(device)).collect();
        Ok(self.leases.release_device_but(&self.vm, &self.run_dir, device.id.as_str(), &images)?)
    }

    /// Leases an image for something that is no device: firmware.
    pub fn lease(&self, id: &DeviceId, path: &str, access: Access) -> Result<(), NeedError> {
        let key = LeaseKey::image(Path::new(path));
        let key = key.map_err(|source| NeedError::Image { path: path.into(), source })?;
        let mode = if access == Access::Write { Mode::Exclusive } else { Mode::Shared };
        let holder = Holder::new(&self.vm, &self.run_dir, id.as_str(), path);
        Ok(self.leases.acquire(&key, mode, holder, look)?)
    }

    /// Leases a device of the host that one guest alone can have.
    fn lease_exclusively(&self, id: &DeviceId, key: LeaseKey, name: &str) -> Result<(), NeedError> {
        let holder = Holder::new(&self.vm, &self.run_dir, id.as_str(), name);
        Ok(self.leases.acquire(&key, Mode::Exclusive, holder, look)?)
    }

    /// Whether a device of this VM holds a lease: without it, what is there is another's.
    fn has_lease(&self, id: &DeviceId, key: &LeaseKey) -> Result<bool, NeedError> {
        let ours = self.leases.held_by(&self.vm, &self.run_dir)?;
        Ok(ours.iter().any(|(held, _, holder)| held == key && holder.device == id.as_str()))
    }

    /// Leases a function and its group. A group that another device of this VM has is open in its QEMU already.
    fn lease_function(&self, id: &DeviceId, host: HostBdf, group: u32) -> Result<(), NeedError> {
        let key = LeaseKey::IommuGroup { number: group };
        let mine = self.leases.held_by(&self.vm, &self.run_dir)?;
        let is_new = !mine.iter().any(|(held, _, _)| *held == key);
        let holder = || Holder::new(&self.vm, &self.run_dir, id.as_str(), &host.to_string());
        self.leases.acquire(&LeaseKey::Pci { address: host.to_string() }, Mode::Exclusive, holder(), look)?;
        self.leases.acquire(&key, Mode::Exclusive, holder(), look)?;
        // After the leases, whose holders have better names.
        if is_new {
            vfio::group_is_free(group)?;
        }
        Ok(())
    }

    /// A physical function takes its virtual ones along when it leaves its driver.
    fn vfs_are_free(&self, host: HostBdf, vfs: &[HostBdf]) -> Result<(), NeedError> {
        if vfs.is_empty() {
            return Ok(());
        }
        let users = vfio::Users::find(&self.leases);
        let group = |vf: &HostBdf| Sysfs::default().iommu_group_of(*vf);
        match vfs.iter().find_map(|vf| Some((*vf, users.of(*vf, group(vf))?.to_owned()))) {
            Some((vf, holder)) => Err(VfioError::VfInUse { host, vf, holder }.into()),
            None => Ok(()),
        }
    }

    fn plug(
        &self,
        name: &str,
        descriptors: &[String],
        switch: Option<&Switch>,
        mac: Mac,
    ) -> Result<Vec<Named>, NeedError> {
        let name: LinkName = name.parse()?;
        if let Some(switch) = switch.filter(|switch| !switch.openvswitch) {
            link::bridge(&switch.bridge)?;
        }
        let queues = u16::try_from(descriptors.len()).unwrap_or(u16::MAX);
        let tap = tap::open(&name, queues, Create::IfMissing)?;
        if tap.created {
            link::set_address(tap.ifindex, link::host_side(mac.bytes()))?;
        }
        if let Some(switch) = switch {
            self.join(&name, tap.ifindex, switch)?;
        }
        // A tap that the user made is up or down as the user wants it.
        if tap.created || switch.is_some() {
            link::set_up(tap.ifindex)?;
        }
        Ok(descriptors.iter().cloned().zip(tap.fds).collect())
    }

    fn join(&self, name: &LinkName, ifindex: u32, switch: &Switch) -> Result<(), NeedError> {
        if switch.openvswitch {
            let bridge: LinkName = switch.bridge.parse()?;
            let new = NewPort {
                bridge: &bridge,
                port: name,
                tag: switch.vlan,
                vm: self.vm.as_str(),
                external_ids: &[],
            };
            return Ok(Ovs::default().add_port(&new)?);
        }
        let bridge = link::bridge(&switch.bridge)?;
        link::set_mtu(ifindex, bridge.mtu)?;
        Ok(link::set_master(ifindex, &switch.bridge)?)
    }
}

fn place(driver: &Option<String>, driver_override: &Option<String>) -> Place {
    Place { driver: driver.clone(), driver_override: driver_override.clone() }
}

/// QEMU removes what lies there before it binds, so what somebody uses must not lie there.
fn socket_is_free(path: &Path) -> Result<(), NeedError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(NeedError::NoSocket { path: path.to_owned() }),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(NeedError::Listening { path: path.to_owned() }),
        _ => Ok(()),
    }
}

/// Removes a socket that nobody listens on: QEMU is dead, or has closed it.
fn remove_socket(path: &Path) -> Result<(), NeedError> {
    if socket_is_free(path).is_err() {
        // Not what QEMU made for us.
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(NeedError::Socket { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
