//! One case: its file, the images that it asks for in a folder of its own, and the comparison with what is expected.
//!
//! Lines that begin with `#!` prepare the folder and the host: `raw NAME`, `qcow2 NAME [BACKING [FORMAT]]`, `text NAME WORD`,
//! `folder NAME`, `block NAME` (a file that counts as a block device), `no-kvm`, `no-json-options`, `qemu-retries`,
//! `without BLOCK-DRIVER`, `without-device DRIVER`, `libblkio`, `only 10.0`, `detach ID`, `snapshot` (what a snapshot of its disks is); of the host's
//! devices `vdpa NAME CLASS N|DRIVER BUS|software QUEUES [MAC]`, `scsi-target WWPN GROUP[:no-nexus]...`, `no-vhost-scsi`, `no-configfs`, `iommufd`,
//! `pci BDF VENDOR:DEVICE DRIVER GROUP [bridge] [uacce] [up] [pf VFS NETDEV] [vf PF INDEX] [silent] [held WHO]` with `-` for no driver or group,
//! `usb PLACE NUMBER SPEED VENDOR:PRODUCT SERIAL CLASS` in sysfs' and the kernel's words, with `-` for no serial number.

use std::fs;
use std::path::{Path, PathBuf};

use devices::DeviceConfig;
use devices::bdf::HostBdf;
use devices::capabilities::Capabilities;
use devices::host::{HostFacts, HostFunction, HostVdpa, ScsiGroup, ScsiTargets, VdpaClass};
use devices::vf::VfProfile;
use launcher::accel::{self, KvmNode, Virtualization};
use launcher::examine::Question;
use launcher::folders::{Folders, VmFiles};
use launcher::host::sysfs::Sysfs;
use launcher::image::{self, ImageError};
use launcher::snapshot::Store;
use tempfile::TempDir;

use crate::recorded::Recorded;

/// A case in a folder of its own, which goes away with it.
pub struct Case {
    /// The file's name without `.toml`.
    pub name: String,
    /// The VM file, in the folder.
    pub config: PathBuf,
    directives: Vec<Vec<String>>,
    dir: TempDir,
}

/// Folder `kind` of the cases.
pub fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(kind)
}

/// Names of all cases of a folder, sorted.
pub fn names(kind: &str) -> Vec<String> {
    let files = fs::read_dir(folder(kind)).expect("the folder of cases is there");
    let names = files.map(|file| file.expect("it is readable").file_name().into_string().expect("in UTF-8"));
    let mut names: Vec<String> = names.filter_map(|n| Some(n.strip_suffix(".toml")?.to_owned())).collect();
    names.retain(|name| !name.ends_with(".device"));
    names.sort();
    names
}

impl Case {
    /// The case `kind/name.toml`.
    pub fn read(kind: &str, name: &str) -> Case {
        let text =
            fs::read_to_string(folder(kind).join(format!("{name}.toml"))).expect("the case is readable");
        Case::of(name, &text)
    }

    /// A case by its text.
    pub fn of(name: &str, text: &str) -> Case {
        let dir = TempDir::with_prefix("qv").expect("a temporary folder");
        let config = dir.path().join("vm.toml");
        fs::write(&config, text).expect("the folder is writable");
        let lines = text.lines().filter_map(|line| line.strip_prefix("#!"));
        let directives = lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect();
        let case = Case { name: name.to_owned(), config, directives, dir };
        case.prepare();
        case
    }

    fn prepare(&self) {
        for directive in &self.directives {
            let words: Vec<&str> = directive.iter().map(String::as_str).collect();
            let path = |name: &str| self.dir.path().join(name);
            let written = match words[..] {
                ["raw" | "block", name] => fs::write(path(name), [0; 512]),
                ["text", name, word] => fs::write(path(name), word),
                ["folder", name] => fs::create_dir(path(name)),
                ["qcow2", name] => fs::write(path(name), qcow2(None, None)),
                ["qcow2", name, backing] => fs::write(path(name), qcow2(Some(backing), None)),
                ["qcow2", name, backing, format] => fs::write(path(name), qcow2(Some(backing), Some(format))),
                [
                    "no-kvm" | "no-json-options" | "qemu-retries" | "snapshot" | "libblkio" | "no-vhost-scsi"
                    | "no-configfs" | "iommufd",
                ]
                | ["detach" | "without" | "without-device" | "only", _]
                | ["vdpa" | "scsi-target" | "pci", ..] => Ok(()),
                ["usb", place, number, speed, ids, serial, class] => {
                    usb_device(&path("sys"), place, [number, speed, ids, serial, class])
                }
                _ => panic!("{}: directive {directive:?} is unknown", self.name),
            };
            written.expect("the folder is writable");
        }
    }

    /// Whether it has a directive.
    pub fn says(&self, word: &str) -> bool {
        self.directives.iter().any(|directive| directive[0] == word)
    }

    /// What follows a directive, each time it stands there.
    pub fn said(&self, word: &str) -> Vec<String> {
        let said = self.directives.iter().filter(|directive| directive[0] == word);
        said.filter_map(|directive| directive.get(1).cloned()).collect()
    }

    /// A host whose accelerators do not depend on where the test runs.
    pub fn host(&self) -> accel::HostFacts {
        let kvm = if self.says("no-kvm") { KvmNode::Missing } else { KvmNode::Usable };
        accel::HostFacts { virtualization: Virtualization::Vmx, kvm }
    }

    /// What the QEMU of this case can do.
    pub fn capabilities(&self, qemu: &Recorded) -> Capabilities {
        let mut capabilities = match (self.says("no-json-options"), self.says("qemu-retries")) {
            (true, _) => qemu.without_json_options(),
            (_, true) => qemu.with_retry(),
            _ => qemu.capabilities.clone(),
        };
        let without = self.said("without");
        capabilities.block_drivers.retain(|driver| !without.contains(driver));
        let without = self.said("without-device");
        capabilities.devices.retain(|driver, _| !without.contains(driver));
        if self.says("libblkio") {
            capabilities.block_drivers.insert("virtio-blk-vhost-vdpa".to_owned());
        }
        capabilities
    }

    /// Whether it is one for that QEMU: another may lack what it shows.
    pub fn is_for(&self, qemu: &Recorded) -> bool {
        self.said("only").iter().all(|version| version == qemu.version)
    }

    /// What the case's host has.
    pub fn facts(&self, vm: &launcher::folders::VmName) -> HostFacts {
        let functions = self.directives.iter().filter(|directive| directive[0] == "pci");
        let vdpa = self.directives.iter().filter(|words| words[0] == "vdpa");
        let scsi = ScsiTargets {
            driver: !self.says("no-vhost-scsi"),
            targets: (!self.says("no-configfs")).then(|| self.targets()),
        };
        HostFacts {
            run_dir: self.files(vm).dir().to_string_lossy().into_owned(),
            pci: functions.map(|directive| function(directive)).collect(),
            iommufd: self.says("iommufd"),
            vdpa: vdpa.map(|words| vdpa_device(words)).collect(),
            scsi: Some(scsi),
            usb: Sysfs::below(&self.path("sys")).usb_facts(),
            ..HostFacts::default()
        }
    }

    fn targets(&self) -> std::collections::BTreeMap<String, Vec<ScsiGroup>> {
        let targets = self.directives.iter().filter(|words| words[0] == "scsi-target");
        let group = |word: &String| {
            let (number, nexus) =
                word.split_once(':').map_or((word.as_str(), true), |(number, _)| (number, false));
            ScsiGroup { number: number.parse().expect("a group's number"), nexus }
        };
        targets.map(|words| (words[1].clone(), words[2..].iter().map(group).collect())).collect()
    }

    /// A file in the case's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What is known of snapshots: nothing.
    pub fn store(&self) -> Store {
        Store::new(&self.dir.path().join("lib"))
    }

    /// The runtime files of the case's VM.
    pub fn files(&self, vm: &launcher::folders::VmName) -> VmFiles {
        let root = self.dir.path().as_os_str().to_owned();
        let folders = Folders::from_env(false, |name| (name == "QVIRT_ROOT").then(|| root.clone()));
        folders.and_then(|folders| folders.vm(vm)).expect("the folder's path is short")
    }

    /// `text` without the name of the folder.
    pub fn normal(&self, text: &str) -> String {
        text.replace(self.dir.path().to_str().expect("a temporary folder's name is ASCII"), "$DIR")
    }
}

/// `vdpa NAME CLASS N|DRIVER BUS|software QUEUES [MAC]`
fn vdpa_device(words: &[String]) -> HostVdpa {
    let [_, name, class, place, bus, queues, mac @ ..] = words else {
        panic!("{words:?}: name, class, number, bus and queues are wanted")
    };
    let node = place.parse::<u32>().ok().map(|number| format!("/dev/vhost-vdpa-{number}"));
    HostVdpa {
        name: name.clone(),
        driver: Some(if node.is_some() { "vhost_vdpa".to_owned() } else { place.clone() }),
        node,
        class: match class.as_str() {
            "net" => Some(VdpaClass::Net),
            "blk" => Some(VdpaClass::Block),
            "unknown" => None,
            _ => Some(VdpaClass::Other),
        },
        in_software: bus == "software",
        max_queues: queues.parse().ok(),
        mac: mac.first().map(|mac| mac.parse().expect("a MAC address")),
    }
}

/// The header of a qcow2 image, version 3, as far as chains are concerned.
fn qcow2(backing: Option<&str>, format: Option<&str>) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(format) = format {
        extensions.extend(0xe279_2aca_u32.to_be_bytes());
        extensions.extend(u32::try_from(format.len()).expect("it is short").to_be_bytes());
        extensions.extend(format.bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let mut image = vec![0; 104];
    image[..4].copy_from_slice(b"QFI\xfb");
    image[4..8].copy_from_slice(&3_u32.to_be_bytes());
    image[100..104].copy_from_slice(&104_u32.to_be_bytes());
    image.extend(extensions);
    if let Some(backing) = backing {
        let offset = u64::try_from(image.len()).expect("it is short");
        image[8..16].copy_from_slice(&offset.to_be_bytes());
        image[16..20].copy_from_slice(&u32::try_from(backing.len()).expect("it is short").to_be_bytes());
        image.extend(backing.bytes());
    }
    image
}

/// Compares with the expectation `file`, or writes it when `UPDATE` is set; `None` is that there is none. Gives what differs.
pub fn compare(file: &Path, actual: Option<&str>) -> Result<(), String> {
    if std::env::var_os("UPDATE").is_some() {
        return match actual {
            Some(actual) => fs::write(file, actual),
            None if file.exists() => fs::remove_file(file),
            None => Ok(()),
        }
        .map_err(|error| format!("{}: {error}", file.display()));
    }
    let expected = fs::read_to_string(file).ok();
    if expected.as_deref() == actual {
        return Ok(());
    }
    let none = "(nothing)";
    let (expected, actual) = (expected.as_deref().unwrap_or(none), actual.unwrap_or(none));
    let pairs = expected.lines().zip(actual.lines());
    let first = pairs.enumerate().find(|(_, (e, a))| e != a).map_or(0, |(line, _)| line + 1);
    Err(format!(
        "{} differs, first in line {first} (0: in length)\n--- expected\n{expected}\n--- actual\n{actual}\nUPDATE=1 writes it anew",
        file.display()
    ))
}

/// Fails with every difference, not only the first.
pub fn all_good(results: impl IntoIterator<Item = Result<(), String>>) {
    let wrong: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// A function of the host, from the words of its directive.
fn function(words: &[String]) -> (HostBdf, HostFunction) {
    let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
    let [bdf, ids, driver, group, more @ ..] = words.as_slice() else { panic!("{words:?}: too few") };
    let hex = |text: &str| u16::from_str_radix(text, 16).expect("four hex digits");
    let (vendor, device) = ids.split_once(':').expect("VENDOR:DEVICE");
    let number = |text: &str| text.parse::<u32>().ok();
    let mut function = HostFunction {
        vendor: hex(vendor),
        device: hex(device),
        driver: (*driver != "-").then(|| (*driver).to_owned()),
        group: number(group),
        ..HostFunction::default()
    };
    let mut more = more.iter().copied();
    while let Some(word) = more.next() {
        let mut next = || more.next().expect("a word has what belongs to it");
        match word {
            "bridge" => function.bridge = true,
            "uacce" => function.uacce = true,
            "up" => function.up = true,
            "held" => function.held_by = Some(next().to_owned()),
            "pf" => (function.vfs_max, function.netdevs) = (number(next()), vec![next().to_owned()]),
            "vf" => {
                let pf = next().parse().expect("the address of a PF");
                function.vf_of = number(next()).map(|index| (pf, index));
                function.profile = Some(VfProfile::default());
            }
            "silent" => function.profile = None,
            word => panic!("{word} is unknown"),
        }
    }
    (bdf.parse().expect("an address"), function)
}

/// A USB device with one interface, which a driver has unless it is a hub.
fn usb_device(
    sysfs: &Path,
    place: &str,
    [number, speed, ids, serial, class]: [&str; 5],
) -> std::io::Result<()> {
    let devices = sysfs.join("bus/usb/devices");
    let (folder, interface) = (devices.join(place), devices.join(format!("{place}:1.0")));
    fs::create_dir_all(&folder)?;
    fs::create_dir_all(&interface)?;
    let bus = place.trim_start_matches("usb").split('-').next().unwrap_or("");
    let (vendor, product) = ids.split_once(':').expect("vendor:product");
    let files = [
        ("busnum", bus),
        ("devnum", number),
        ("speed", speed),
        ("idVendor", vendor),
        ("idProduct", product),
        ("serial", serial),
    ];
    for (file, text) in files.into_iter().filter(|(_, text)| *text != "-") {
        fs::write(folder.join(file), format!("{text}\n"))?;
    }
    fs::write(folder.join("bDeviceClass"), if class == "09" { "09\n" } else { "00\n" })?;
    fs::write(interface.join("bInterfaceClass"), format!("{class}\n"))?;
    if class == "08" {
        std::os::unix::fs::symlink("../../../bus/usb/drivers/usb-storage", interface.join("driver"))?;
    }
    Ok(())
}

/// Looks at a device's image, as planning wants it.
pub fn learn(host: &mut HostFacts, device: &DeviceConfig) -> Result<(), ImageError> {
    // There are no snapshots, so what is written is what a config names.
    if let (Some(path), DeviceConfig::Disk(disk)) = (Question::subject(device), device) {
        let chain = image::chain(path, disk.format)?;
        host.chains.insert(path.to_owned(), chain);
    }
    Ok(())
}
