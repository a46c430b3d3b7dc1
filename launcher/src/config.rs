//! The config of a VM, and of a single device: TOML in, checked values out.
//!
//! Owns the VM file's shape and what can be wrong with its text: unknown keys are refused with the nearest known one, and errors name
//! the line. Knows no device option: the tables are the `devices` crate's. Whether the machine can be built is `blueprint`'s question.

use std::path::{Path, PathBuf};

use devices::controller::{IothreadConfig, ScsiControllerConfig, VirtioSerialConfig};
use devices::device::DeviceConfig;
use devices::disk::DiskConfig;
use devices::keyval::KeyvalError;
use devices::machine::{Firmware, Kernel, Memory};
use devices::nic::NicConfig;
use devices::passthrough::{VfConfig, VfioConfig};
use devices::pcie::{ControllerConfig, PcieConfig};
use devices::port::{ChannelConfig, SerialConfig};
use devices::usb::{UsbConfig, UsbControllerConfig};
use devices::vdpa::VdpaConfig;
use devices::vhost_scsi::VhostScsiConfig;
use serde::{Deserialize, Deserializer};
use thiserror::Error;
use toml::Spanned;

use crate::accel::Accel;
use crate::folders::VmName;
use crate::notify::Notify;

/// A config that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("config {} cannot be read: {source}; check its path, or `qvirt list --all` for the names of the defined VMs", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or not of the config's shape. The message has line, column and a caret.
    #[error("config {}: {message}{hint}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        message: String,
        /// The nearest known key, for an unknown one.
        hint: String,
    },
    /// A value breaks a rule.
    #[error("config {}, line {line}: {message}", path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The rule and the next step.
        message: String,
    },
    /// A device file does not hold one device.
    #[error("{}: holds {found} devices: a device file has exactly one table, one of {}", path.display(), DeviceConfig::TABLES.join(", "))]
    NotOneDevice {
        /// The file.
        path: PathBuf,
        /// How many it has.
        found: usize,
    },
    /// A `--disk key=value,...` option.
    #[error("--{table}: {source}{hint}")]
    Flag {
        /// The option's name.
        table: &'static str,
        /// What is wrong.
        source: KeyvalError,
        /// The nearest known key, for an unknown one.
        hint: String,
    },
}

/// A VM file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmFile {
    name: VmName,
    uuid: Option<Spanned<String>>,
    qemu: Option<PathBuf>,
    machine: Option<String>,
    accel: Option<Spanned<String>>,
    cpu: Option<String>,
    vcpus: Option<u16>,
    memory: Option<Memory>,
    firmware: Option<Firmware>,
    kernel: Option<Kernel>,
    pcie: Option<PcieConfig>,
    notify: Option<Spanned<Notify>>,
    #[serde(default)]
    pcie_controller: Vec<Spanned<ControllerConfig>>,
    #[serde(default)]
    iothread: Vec<Spanned<IothreadConfig>>,
    #[serde(default)]
    scsi_controller: Vec<Spanned<ScsiControllerConfig>>,
    #[serde(default)]
    virtio_serial: Vec<Spanned<VirtioSerialConfig>>,
    #[serde(default)]
    disk: Vec<Spanned<DiskConfig>>,
    #[serde(default)]
    nic: Vec<Spanned<NicConfig>>,
    #[serde(default)]
    serial: Vec<Spanned<SerialConfig>>,
    #[serde(default)]
    channel: Vec<Spanned<ChannelConfig>>,
    #[serde(default)]
    vdpa: Vec<Spanned<VdpaConfig>>,
    #[serde(default)]
    vhost_scsi: Vec<Spanned<VhostScsiConfig>>,
    #[serde(default)]
    vfio: Vec<Spanned<VfioConfig>>,
    #[serde(default)]
    vf: Vec<Spanned<VfConfig>>,
    #[serde(default)]
    usb_controller: Vec<Spanned<UsbControllerConfig>>,
    #[serde(default)]
    usb: Vec<Spanned<UsbConfig>>,
}

/// A device file: the same tables, `[disk]` or `[[disk]]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DeviceFile {
    /// Known, so that it can be refused with the rule it breaks.
    pcie_controller: Option<Spanned<serde::de::IgnoredAny>>,
    iothread: OneOrMany<IothreadConfig>,
    scsi_controller: OneOrMany<ScsiControllerConfig>,
    virtio_serial: OneOrMany<VirtioSerialConfig>,
    disk: OneOrMany<DiskConfig>,
    nic: OneOrMany<NicConfig>,
    serial: OneOrMany<SerialConfig>,
    channel: OneOrMany<ChannelConfig>,
    vdpa: OneOrMany<VdpaConfig>,
    vhost_scsi: OneOrMany<VhostScsiConfig>,
    vfio: OneOrMany<VfioConfig>,
    vf: OneOrMany<VfConfig>,
    usb_controller: OneOrMany<UsbControllerConfig>,
    usb: OneOrMany<UsbConfig>,
}

#[derive(Debug)]
struct OneOrMany<T>(Vec<T>);

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        OneOrMany(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Tables<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> serde::de::Visitor<'de> for Tables<T> {
            type Value = OneOrMany<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    .map(|one| OneOrMany(vec![one]))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut tables: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(table) = tables.next_element()? {
                    all.push(table);
                }
                Ok(OneOrMany(all))
            }
        }
        source.deserialize_any(Tables(std::marker::PhantomData))
    }
}

/// A VM as its file asks for it. Paths are absolute.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The file it came from.
    pub path: PathBuf,
    /// The VM's name.
    pub name: VmName,
    /// UUID that was given.
    pub uuid: Option<String>,
    /// QEMU's binary; default `qemu-system-x86_64` on the path.
    pub qemu: PathBuf,
    /// Machine type; default `q35`.
    pub machine: String,
    /// Accelerator; default `auto`.
    pub accel: Accel,
    /// CPU model; default `host` under KVM, `max` under TCG.
    pub cpu: Option<String>,
    /// Virtual CPUs; default 1.
    pub vcpus: u16,
    /// Memory; default 512 MiB.
    pub memory: Memory,
    /// UEFI.
    pub firmware: Option<Firmware>,
    /// Direct boot.
    pub kernel: Option<Kernel>,
    /// Table `[pcie]`.
    pub pcie: PcieConfig,
    /// What is run when the storage of a disk fails.
    pub notify: Option<Notify>,
    /// Controllers written out, if any.
    pub controllers: Vec<ControllerConfig>,
    /// Devices in the order of their kinds, then of the file.
    pub devices: Vec<DeviceConfig>,
    notify_line: Option<usize>,
    controller_lines: Vec<usize>,
    device_lines: Vec<usize>,
}

impl VmConfig {
    /// QEMU's binary when the config names none.
    pub const QEMU: &'static str = "qemu-system-x86_64";

    /// Reads a VM file.
    pub fn read(path: &Path) -> Result<VmConfig, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let absolute = std::path::absolute(path).map_err(read)?;
        let text = std::fs::read_to_string(path).map_err(read)?;
        VmConfig::parse(&text, &absolute)
    }

    /// Parses a VM file's text; relative paths in it are relative to the folder of `path`, which is absolute.
    pub fn parse(text: &str, path: &Path) -> Result<VmConfig, ConfigError> {
        let file: VmFile = toml::from_str(text).map_err(|e| toml_error(path, &e))?;
        let line = |offset: usize| text[..offset].matches('\n').count() + 1;
        let rule = |offset: usize, message: String| ConfigError::Rule {
            path: path.to_owned(),
            line: line(offset),
            message,
        };
        if let Some(uuid) = file.uuid.as_ref().filter(|uuid| !is_uuid(uuid.get_ref())) {
            let message = format!("uuid {:?} is no UUID: write it as 8-4-4-4-12 hex digits", uuid.get_ref());
            return Err(rule(uuid.span().start, message));
        }
        let accel = file.accel.as_ref().map(|accel| {
            accel.get_ref().parse::<Accel>().map_err(|reason| rule(accel.span().start, reason.to_string()))
        });
        if let (Some(first), Some(_)) =
            (file.pcie_controller.first(), file.pcie.as_ref().and_then(|p| p.root_ports))
        {
            let message =
                "root_ports and [[pcie_controller]] exclude each other: write every port out, or none"
                    .to_owned();
            return Err(rule(first.span().start, message));
        }
        let (devices, device_lines) = devices_of(&file, &line);
        let folder = path.parent().unwrap_or(Path::new("/"));
        let mut config = VmConfig {
            path: path.to_owned(),
            uuid: file.uuid.map(Spanned::into_inner),
            qemu: file.qemu.unwrap_or_else(|| Self::QEMU.into()),
            machine: file.machine.unwrap_or_else(|| "q35".to_owned()),
            accel: accel.transpose()?.unwrap_or(Accel::Auto),
            cpu: file.cpu,
            vcpus: file.vcpus.unwrap_or(1),
            memory: file.memory.unwrap_or(Memory {
                size: devices::units::Size::bytes(512 << 20),
                shared: false,
                hugepages: None,
                prealloc: false,
            }),
            firmware: file.firmware,
            kernel: file.kernel,
            pcie: file.pcie.unwrap_or_default(),
            notify_line: file.notify.as_ref().map(|notify| line(notify.span().start)),
            notify: file.notify.map(Spanned::into_inner),
            controller_lines: file.pcie_controller.iter().map(|c| line(c.span().start)).collect(),
            controllers: file.pcie_controller.into_iter().map(Spanned::into_inner).collect(),
            devices,
            device_lines,
            name: file.name,
        };
        config.paths_mut().into_iter().for_each(|path| absolute(folder, path));
        Ok(config)
    }

    /// The first relative path of a VM file's text, if there is one.
    pub fn relative_path(text: &str, path: &Path) -> Result<Option<String>, ConfigError> {
        // Two folders that relative paths cannot both be below of: what differs was relative.
        let here = VmConfig::parse(text, path)?;
        let there =
            VmConfig::parse(text, &Path::new("/qvirt-elsewhere").join(path.file_name().unwrap_or_default()))?;
        let (mut here, mut there) = (here, there);
        let mut pairs = here.paths_mut().into_iter().zip(there.paths_mut());
        let found =
            pairs.find(|(a, b)| a != b).map(|(_, b)| b.trim_start_matches("/qvirt-elsewhere/").to_owned());
        Ok(found)
    }

    fn paths_mut(&mut self) -> Vec<&mut String> {
        let firmware = self.firmware.iter_mut().flat_map(|f| [Some(&mut f.code), f.vars.as_mut()]);
        let kernel = self.kernel.iter_mut().flat_map(|k| [Some(&mut k.path), k.initrd.as_mut()]);
        let devices = self.devices.iter_mut().flat_map(DeviceConfig::paths_mut);
        firmware.chain(kernel).flatten().chain(devices).collect()
    }

    /// An error at the line of device number `index`.
    pub fn at_device(&self, index: usize, message: impl ToString) -> ConfigError {
        self.at(self.device_lines.get(index), message)
    }

    /// An error at the line of controller number `index`.
    pub fn at_controller(&self, index: usize, message: impl ToString) -> ConfigError {
        self.at(self.controller_lines.get(index), message)
    }

    /// An error at the line of `notify`.
    pub fn at_notify(&self, message: impl ToString) -> ConfigError {
        self.at(self.notify_line.as_ref(), message)
    }

    /// An error of the file as a whole.
    pub fn at_top(&self, message: impl ToString) -> ConfigError {
        self.at(None, message)
    }

    fn at(&self, line: Option<&usize>, message: impl ToString) -> ConfigError {
        let line = line.copied().unwrap_or(1);
        ConfigError::Rule { path: self.path.clone(), line, message: message.to_string() }
    }
}

fn devices_of(file: &VmFile, line: &dyn Fn(usize) -> usize) -> (Vec<DeviceConfig>, Vec<usize>) {
    fn all<'a, T: Clone>(
        list: &'a [Spanned<T>],
        kind: fn(T) -> DeviceConfig,
    ) -> impl Iterator<Item = (DeviceConfig, usize)> + 'a {
        list.iter().map(move |item| (kind(item.get_ref().clone()), item.span().start))
    }
    let found = all(&file.iothread, DeviceConfig::Iothread)
        .chain(all(&file.scsi_controller, DeviceConfig::ScsiController))
        .chain(all(&file.virtio_serial, DeviceConfig::VirtioSerial))
        .chain(all(&file.disk, DeviceConfig::Disk))
        .chain(all(&file.nic, DeviceConfig::Nic))
        .chain(all(&file.serial, DeviceConfig::Serial))
        .chain(all(&file.channel, DeviceConfig::Channel))
        .chain(all(&file.vdpa, DeviceConfig::Vdpa))
        .chain(all(&file.vhost_scsi, DeviceConfig::VhostScsi))
        .chain(all(&file.vfio, DeviceConfig::Vfio))
        .chain(all(&file.vf, DeviceConfig::Vf))
        .chain(all(&file.usb_controller, DeviceConfig::UsbController))
        .chain(all(&file.usb, DeviceConfig::Usb));
    found.map(|(device, offset)| (device, line(offset))).unzip()
}

/// Reads a device file: one table of one device.
pub fn read_device(path: &Path) -> Result<DeviceConfig, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let absolute_path = std::path::absolute(path).map_err(read)?;
    let text = std::fs::read_to_string(path).map_err(read)?;
    let file: DeviceFile = toml::from_str(&text).map_err(|e| toml_error(path, &e))?;
    if let Some(port) = &file.pcie_controller {
        let line = text[..port.span().start].matches('\n').count() + 1;
        let message = "a PCIe root port or bridge cannot be plugged in while the VM runs: seats are planned before the start; \
                       write it into the VM's file, or raise [pcie] root_ports there";
        return Err(ConfigError::Rule { path: path.to_owned(), line, message: message.to_owned() });
    }
    let mut devices: Vec<DeviceConfig> = Vec::new();
    devices.extend(file.iothread.0.into_iter().map(DeviceConfig::Iothread));
    devices.extend(file.scsi_controller.0.into_iter().map(DeviceConfig::ScsiController));
    devices.extend(file.virtio_serial.0.into_iter().map(DeviceConfig::VirtioSerial));
    devices.extend(file.disk.0.into_iter().map(DeviceConfig::Disk));
    devices.extend(file.nic.0.into_iter().map(DeviceConfig::Nic));
    devices.extend(file.serial.0.into_iter().map(DeviceConfig::Serial));
    devices.extend(file.channel.0.into_iter().map(DeviceConfig::Channel));
    devices.extend(file.vdpa.0.into_iter().map(DeviceConfig::Vdpa));
    devices.extend(file.vhost_scsi.0.into_iter().map(DeviceConfig::VhostScsi));
    devices.extend(file.vfio.0.into_iter().map(DeviceConfig::Vfio));
    devices.extend(file.vf.0.into_iter().map(DeviceConfig::Vf));
    devices.extend(file.usb_controller.0.into_iter().map(DeviceConfig::UsbController));
    devices.extend(file.usb.0.into_iter().map(DeviceConfig::Usb));
    let found = devices.len();
    match devices.pop() {
        Some(mut device) if found == 1 => {
            let folder = absolute_path.parent().unwrap_or(Path::new("/"));
            device.paths_mut().into_iter().for_each(|path| absolute(folder, path));
            Ok(device)
        }
        _ => Err(ConfigError::NotOneDevice { path: path.to_owned(), found }),
    }
}

/// Parses the value of `--disk`, `--nic`, ...; `table` is one of [`DeviceConfig::TABLES`]. Relative paths are relative to `folder`.
pub fn parse_flag(table: &'static str, text: &str, folder: &Path) -> Result<DeviceConfig, ConfigError> {
    use devices::keyval::parse;
    let parsed = match table {
        "iothread" => parse(text).map(DeviceConfig::Iothread),
        "scsi_controller" => parse(text).map(DeviceConfig::ScsiController),
        "virtio_serial" => parse(text).map(DeviceConfig::VirtioSerial),
        "disk" => parse(text).map(DeviceConfig::Disk),
        "nic" => parse(text).map(DeviceConfig::Nic),
        "serial" => parse(text).map(DeviceConfig::Serial),
        "vdpa" => parse(text).map(DeviceConfig::Vdpa),
        "vhost_scsi" => parse(text).map(DeviceConfig::VhostScsi),
        "vfio" => parse(text).map(DeviceConfig::Vfio),
        "vf" => parse(text).map(DeviceConfig::Vf),
        "usb_controller" => parse(text).map(DeviceConfig::UsbController),
        "usb" => parse(text).map(DeviceConfig::Usb),
        _ => parse(text).map(DeviceConfig::Channel),
    };
    let mut device = parsed.map_err(|source| {
        let hint = nearest_known(&source.to_string());
        ConfigError::Flag { table, source, hint }
    })?;
    device.paths_mut().into_iter().for_each(|path| absolute(folder, path));
    Ok(device)
}

fn absolute(folder: &Path, path: &mut String) {
    if !path.is_empty() && !path.starts_with('/') {
        *path = folder.join(&*path).to_string_lossy().into_owned();
    }
}

fn toml_error(path: &Path, error: &toml::de::Error) -> ConfigError {
    let message = error.to_string().trim_end().to_owned();
    let hint = nearest_known(error.message());
    ConfigError::Toml { path: path.to_owned(), message, hint }
}

/// serde's "unknown field `x`, expected one of `a`, `b`": what `x` is called here, or the known one that it is nearest to.
fn nearest_known(message: &str) -> String {
    let Some((_, rest)) = message.split_once("unknown field `") else { return String::new() };
    let mut words = rest.split('`').step_by(2);
    let Some(unknown) = words.next() else { return String::new() };
    match unknown {
        "on_error" => return "\nonly a [[disk]] has it, on virtio-blk or virtio-scsi: I/O of other devices cannot be held while storage fails".into(),
        // QEMU's and libvirt's words.
        "rerror" | "werror" | "error_policy" | "rerror_policy" | "retry_interval" | "retry_timeout" => {
            return "\na [[disk]] has on_error = { read, write, interval, timeout, at_timeout, engine }".into();
        }
        _ => {}
    }
    let near = words.map(|known| (strsim::damerau_levenshtein(unknown, known), known)).min();
    match near {
        Some((distance, known)) if distance <= known.len().max(unknown.len()) / 2 => {
            format!("\ndid you mean `{known}`?")
        }
        _ => String::new(),
    }
}

fn is_uuid(text: &str) -> bool {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
}
