//! Why a device cannot be planned. Each message names the thing, the reason and the next step.

use thiserror::Error;

use crate::id::{DeviceId, Label};
use crate::passthrough::PassthroughError;
use crate::topology::TopologyError;
use crate::usb::UsbRule;
use crate::vdpa::VdpaError;
use crate::vhost_scsi::VhostScsiError;

/// A device that cannot be had as it is asked for. `what` is the device's id, or its kind where it has none yet.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Two devices of one id.
    #[error("{id}: the id is taken by another device or a root port of this VM: choose another")]
    DuplicateId {
        /// The id.
        id: DeviceId,
    },
    /// Two disks of one label.
    #[error(
        "{id}: target {label} is the label of {holder}: choose another, or none to get the first free one"
    )]
    LabelTaken {
        /// The disk.
        id: DeviceId,
        /// The label.
        label: Label,
        /// Who has it.
        holder: DeviceId,
    },
    /// A label that does not fit the bus.
    #[error("{id}: target {label} does not fit the bus: on this bus labels are {wanted}a to {wanted}zz")]
    LabelPrefix {
        /// The disk.
        id: DeviceId,
        /// The label.
        label: Label,
        /// The prefix that fits.
        wanted: &'static str,
    },
    /// All 702 labels are given.
    #[error("{id}: no target label is left: {prefix}a to {prefix}zz are all taken; detach a disk")]
    NoLabel {
        /// The disk.
        id: DeviceId,
        /// `vd` or `sd`.
        prefix: &'static str,
    },
    /// No seat.
    #[error("{id}: {source}")]
    Seat {
        /// The device.
        id: DeviceId,
        /// Why.
        source: TopologyError,
    },
    /// A rule for USB.
    #[error("{id}: {source}")]
    Usb {
        /// The device.
        id: DeviceId,
        /// The rule.
        source: UsbRule,
    },
    /// A key that this kind or setting of a device does not take.
    #[error("{id}: `{key}` does not go with {with}: {next}")]
    Misplaced {
        /// The device.
        id: DeviceId,
        /// The key.
        key: &'static str,
        /// What excludes it.
        with: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// A key that must be there.
    #[error("{id}: `{key}` is missing: {next}")]
    Missing {
        /// The device.
        id: DeviceId,
        /// The key.
        key: &'static str,
        /// What to write.
        next: &'static str,
    },
    /// A value out of its range.
    #[error("{id}: {key} = {value} is refused: {rule}")]
    Value {
        /// The device.
        id: DeviceId,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The range, and what to do.
        rule: String,
    },
    /// The image's chain is not known: the launcher did not look, or could not.
    #[error(
        "{id}: nothing is known of image {path}: it does not exist or cannot be read; check the path and the rights on it"
    )]
    UnknownImage {
        /// The disk.
        id: DeviceId,
        /// The path.
        path: String,
    },
    /// This QEMU has no such driver.
    #[error(
        "{id}: this QEMU ({version}) has no {kind} `{name}`: install the QEMU package that brings it, or name another binary with `qemu`"
    )]
    NotInQemu {
        /// The device.
        id: DeviceId,
        /// `device`, `block driver`, `netdev`, `object`, `aio`.
        kind: &'static str,
        /// The name.
        name: String,
        /// QEMU's version, for people.
        version: String,
    },
    /// This QEMU's driver has no such property.
    #[error(
        "{id}: `{driver}` of this QEMU ({version}) has no property `{property}`: leave the option out that needs it, or use another QEMU"
    )]
    NoProperty {
        /// The device.
        id: DeviceId,
        /// The driver.
        driver: String,
        /// The property.
        property: String,
        /// QEMU's version, for people.
        version: String,
    },
    /// An iothread that is not there.
    #[error(
        "{id}: there is no iothread {iothread}: write [[iothread]] id = \"{iothread}\", or attach one first"
    )]
    NoIothread {
        /// The device.
        id: DeviceId,
        /// The iothread.
        iothread: DeviceId,
    },
    /// Two devices of one boot index.
    #[error(
        "{id}: bootindex {index} is that of {holder}: each device that boots has its own; choose another"
    )]
    BootIndexTaken {
        /// The device.
        id: DeviceId,
        /// The index.
        index: u32,
        /// Who has it.
        holder: DeviceId,
    },
    /// Two NICs of one MAC address.
    #[error("{id}: MAC address {mac} is that of {holder}: give it another `mac`")]
    MacTaken {
        /// The NIC.
        id: DeviceId,
        /// The address.
        mac: String,
        /// Who has it.
        holder: DeviceId,
    },
    /// What serves it is another process, or maps memory as one, and cannot map private memory.
    #[error(
        "{id}: {what} needs guest memory that the backend process can map: \
             write memory = {{ size = ..., shared = true }} and start the VM anew"
    )]
    PrivateMemory {
        /// The device.
        id: DeviceId,
        /// What serves it.
        what: &'static str,
    },
    /// A vDPA device of the host that cannot be given to the guest.
    #[error("{id}: {source}")]
    Vdpa {
        /// The device.
        id: DeviceId,
        /// Why.
        source: VdpaError,
    },
    /// A target of vhost-scsi that cannot be given to the guest.
    #[error("{id}: {source}")]
    VhostScsi {
        /// The device.
        id: DeviceId,
        /// Why.
        source: VhostScsiError,
    },
    /// A function of the host that cannot be given to the guest.
    #[error("{id}: {source}")]
    Passthrough {
        /// The device.
        id: DeviceId,
        /// Why.
        source: PassthroughError,
    },
    /// It cannot be plugged while the VM runs.
    #[error("{id}: {kind} cannot be plugged in or out while the VM runs: use --config and start the VM anew")]
    NotHotPluggable {
        /// The device.
        id: DeviceId,
        /// The kind.
        kind: &'static str,
    },
    /// Others depend on it.
    #[error("{id} is used by {users}: detach them first")]
    InUse {
        /// The device.
        id: DeviceId,
        /// Who uses it.
        users: String,
    },
    /// No such device.
    #[error("there is no device {id}: this VM has {known}")]
    NoSuchDevice {
        /// What was asked for.
        id: String,
        /// What there is.
        known: String,
    },
    /// It was asked to leave already, or is being plugged in.
    #[error("{id} is {state}: wait until that has ended (`qvirt devices` shows it)")]
    Busy {
        /// The device.
        id: DeviceId,
        /// What happens to it.
        state: &'static str,
    },
}
