//! Cases that are refused: the exact text, and a case for every way to be refused.

use std::collections::BTreeSet;
use std::fmt::Write;

use devices::machine::{MachineError, versioned};
use devices::passthrough::PassthroughError;
use devices::pcie::{PcieRule, RootPort, written_out};
use devices::topology::{Topology, TopologyError};
use devices::usb::UsbRule;
use devices::vdpa::VdpaError;
use devices::vhost_scsi::VhostScsiError;
use devices::{DeviceConfig, Layout, Moment, Refusal, plan, plan_machine};
use launcher::accel::AccelError;
use launcher::blueprint::Blueprint;
use launcher::config::{ConfigError, VmConfig, parse_flag, read_device};
use launcher::image::{self, ImageError};

use crate::case::{Case, all_good, compare, folder, learn, names};
use crate::recorded::{QEMU_10_0, Recorded};

/// The names of an enum's variants, and which of them a value is. A variant that is missing here does not compile.
macro_rules! variants {
    ($function:ident, $all:ident, $type:ident: $($variant:ident),+ $(,)?) => {
        const $all: &[&str] = &[$(concat!(stringify!($type), "::", stringify!($variant))),+];
        fn $function(value: &$type) -> &'static str {
            match value {
                $($type::$variant { .. } => concat!(stringify!($type), "::", stringify!($variant))),+
            }
        }
    };
}

variants!(
    refusal, REFUSALS, Refusal: DuplicateId, LabelTaken, LabelPrefix, NoLabel, Seat, Misplaced, Missing, Value, UnknownImage,
    Usb, NotInQemu, NoProperty, NoIothread, BootIndexTaken, MacTaken, PrivateMemory, Vdpa, VhostScsi, Passthrough, NotHotPluggable, InUse,
    NoSuchDevice, Busy
);
variants!(vdpa, VDPA, VdpaError: NoDevice, NoNode, Taken, Class, Mac, Queues, NoGeneric, NoBlockDriver);
variants!(vhost_scsi, VHOST_SCSI, VhostScsiError: NoModule, NoTarget, NoGroup, NoNexus, Taken);
variants!(topology, TOPOLOGY, TopologyError: NoFreePort, NoRoom, Taken, NoSuchSeat, NotHot, ReservedSlot, NotFunctionZero, NoController, Usb, NoSlot, Full);
variants!(
    passthrough, PASSTHROUGH, PassthroughError: BusZero, NoDevice, NoIommu, Bridge, Taken, NotBound, Shared, NoVf, NoPf, NoFreeVf, NoProfile
);
variants!(
    usb, USB, UsbRule: Twice, Order, Index, NoController, NoSuchController, NoSuchPort, WrongPort, WrongController, Full, Companions,
    TabletController, Absent, Ambiguous, Hub, Given
);
variants!(pcie, PCIE, PcieRule: Index, Chassis, Port, Function, Place, Slot, NoPort, Seat, Key, Id);
variants!(machine, MACHINE, MachineError: Unknown, NoPcie, Memory, NoCpu);
variants!(config, CONFIG, ConfigError: Read, Toml, Rule, NotOneDevice, Flag);
variants!(images, IMAGES, ImageError: Open, Read, Kind, NotQcow2, Unsaid, BackingFormat, Backing, Below);
variants!(accel, ACCEL, AccelError: Unknown, NoKvm);

/// These cannot come from a config: the owner makes the one, the other two are for a launcher or a QEMU that is at fault.
const WITHOUT_A_CASE: &[&str] = &["Refusal::Busy", "Refusal::UnknownImage", "Refusal::NoProperty"];

/// What a case is told, and the variants that it went through.
#[derive(Debug)]
struct Told {
    text: String,
    ways: Vec<&'static str>,
}

impl Told {
    fn refusal(error: &Refusal) -> Told {
        let mut ways = vec![refusal(error)];
        match error {
            Refusal::Seat { source, .. } => {
                ways.push(topology(source));
                if let TopologyError::Usb(rule) = source {
                    ways.push(usb(rule));
                }
            }
            Refusal::Usb { source, .. } => ways.push(usb(source)),
            Refusal::Vdpa { source, .. } => ways.push(vdpa(source)),
            Refusal::VhostScsi { source, .. } => ways.push(vhost_scsi(source)),
            _ => {}
        }
        if let Refusal::Passthrough { source, .. } = error {
            ways.push(passthrough(source));
        }
        Told { text: error.to_string(), ways }
    }

    fn config(error: &ConfigError) -> Told {
        let (text, mut ways) = (error.to_string(), vec![config(error)]);
        // It is told as a rule of the config.
        let unknown = AccelError::Unknown("hvf".into());
        if text.contains(&unknown.to_string()) {
            ways.push(accel(&unknown));
        }
        Told { text, ways }
    }

    fn image(error: &ImageError) -> Told {
        Told { text: error.to_string(), ways: vec![images(error)] }
    }
}

/// Plans the case's machine, then its device if it has one, then detaches what it says.
fn tell(case: &Case, qemu: &Recorded) -> Result<(), Told> {
    let config = VmConfig::read(&case.config).map_err(|error| Told::config(&error))?;
    let files = case.files(&config.name);
    let drawn = Blueprint::draw_for(
        config.clone(),
        "/qemu".into(),
        case.capabilities(qemu),
        &case.host(),
        &files,
        &case.store(),
        case.facts(&config.name),
    );
    let blueprint = drawn.map_err(|error| {
        let reason = reason(&config, case, qemu);
        let text = error.to_string();
        assert!(text.contains(&reason.text), "{}: {text:?} was to contain {:?}", case.name, reason.text);
        Told { text, ways: reason.ways }
    })?;
    let device = folder("bad").join(format!("{}.device.toml", case.name));
    if device.exists() {
        let copy = case.path("device.toml");
        std::fs::copy(device, &copy).expect("the folder is writable");
        let device = read_device(&copy).map_err(|error| Told::config(&error))?;
        let mut host = case.facts(&config.name);
        learn(&mut host, &device).map_err(|error| Told::image(&error))?;
        plan(&device, &blueprint.layout, &host, &blueprint.qemu, Moment::Hot)
            .map_err(|refusal| Told::refusal(&refusal))?;
    }
    for id in case.said("detach") {
        let placed = blueprint.layout.expect_device(&id).map_err(|error| Told::refusal(&error))?;
        blueprint.layout.can_leave(placed).map_err(|error| Told::refusal(&error))?;
    }
    Ok(())
}

/// The error behind the text: the same steps as a blueprint's, with types.
fn reason(config: &VmConfig, case: &Case, qemu: &Recorded) -> Told {
    let capabilities = case.capabilities(qemu);
    if let Err(error) = launcher::accel::choose(config.accel, &case.host()) {
        return Told { text: error.to_string(), ways: vec![accel(&error)] };
    }
    if let Err(error) = versioned(&config.machine, &capabilities) {
        return Told { text: error.to_string(), ways: vec![machine(&error)] };
    }
    if config.vcpus == 0 {
        return Told { text: MachineError::NoCpu.to_string(), ways: vec![machine(&MachineError::NoCpu)] };
    }
    match behind_devices(config, case, &capabilities) {
        Err(told) => told,
        // What is left has no type of its own: memory's size, files of firmware and kernel.
        Ok(()) => {
            let size = config.memory.size;
            let memory = machine(&MachineError::Memory { size, rule: "" });
            Told { text: String::new(), ways: vec![memory] }
        }
    }
}

fn behind_devices(
    config: &VmConfig,
    case: &Case,
    qemu: &devices::capabilities::Capabilities,
) -> Result<(), Told> {
    let mut host = case.facts(&config.name);
    let mut learn = |device| learn(&mut host, device).map_err(|error| Told::image(&error));
    config.devices.iter().try_for_each(&mut learn)?;
    for path in config.firmware.iter().map(|firmware| &firmware.code) {
        image::chain(path, Some(devices::host::Format::Raw)).map_err(|error| Told::image(&error))?;
    }
    let written = written_out(&config.controllers, config.pcie.pref64_reserve);
    let (ports, bridges) =
        written.map_err(|(_, rule)| Told { text: rule.to_string(), ways: vec![pcie(&rule)] })?;
    let topology_now = match ports.is_empty() {
        true => Topology::growing(config.pcie.pref64_reserve),
        false => Topology::written_out(ports, bridges),
    };
    let empty = Layout::new(config.name.as_str(), config.memory.shared, topology_now);
    let planned = plan_machine(empty, &config.devices, &host, qemu);
    let mut layout = planned.map_err(|(_, error)| Told::refusal(&error))?;
    if config.controllers.is_empty() {
        let spare = config.pcie.root_ports.unwrap_or(RootPort::DEFAULT_SPARE);
        let added = layout.topology_mut().add_spare(spare);
        added.map_err(|error| Told { text: error.to_string(), ways: vec![topology(&error)] })?;
    }
    Ok(())
}

/// Cases whose files would be long, by their names.
fn generated() -> Vec<(&'static str, String)> {
    let mut labels = String::from("name = \"no-label\"\n");
    for number in 0..=devices::id::Label::COUNT {
        let _ = write!(labels, "[[disk]]\nid = \"d{number}\"\ndevice = \"cdrom\"\n");
        if let Some(label) = devices::id::Label::numbered("sd", number) {
            let _ = writeln!(labels, "target = \"{label}\"");
        }
    }
    let mut targets = String::from("name = \"full-scsi-controller\"\n");
    for number in 0..=256 {
        let _ = write!(
            targets,
            "[[disk]]\nid = \"d{number}\"\ndevice = \"cdrom\"\nscsi = {{ controller = 0 }}\n"
        );
    }
    vec![("no-label", labels), ("full-scsi-controller", targets)]
}

fn told(case: &Case, qemu: &Recorded) -> Told {
    match tell(case, qemu) {
        Err(told) => told,
        Ok(()) => panic!("{} is not refused by QEMU {}", case.name, qemu.version),
    }
}

#[test]
fn every_wrong_input_is_told_what_to_do_and_every_refusal_has_a_case() {
    let mut results = Vec::new();
    let mut seen: BTreeSet<&str> = WITHOUT_A_CASE.iter().copied().collect();
    let mut check = |case: &str, told: Told, text: &str| {
        seen.extend(told.ways);
        results.push(compare(&folder("bad").join(format!("{case}.err")), Some(&format!("{text}\n"))));
    };
    let files = names("bad").into_iter().map(|name| Case::read("bad", &name));
    let generated = generated().into_iter().map(|(name, text)| Case::of(name, &text));
    for case in files.chain(generated) {
        let told = told(&case, &QEMU_10_0);
        let text = case.normal(&told.text);
        check(&case.name, told, &text);
    }
    for (name, told, text) in without_files() {
        check(name, told, &text);
    }
    all_good(results);
    let all = [REFUSALS, TOPOLOGY, USB, VDPA, VHOST_SCSI, PASSTHROUGH, PCIE, MACHINE, CONFIG, IMAGES, ACCEL]
        .concat();
    let missing: Vec<_> = all.iter().filter(|variant| !seen.contains(**variant)).collect();
    assert!(missing.is_empty(), "no case is refused by {missing:?}: write one into tests/bad");
}

/// Errors of files that are not there and of options of the command line.
fn without_files() -> Vec<(&'static str, Told, String)> {
    let case = Case::of("no-config", "name = \"unused\"\n");
    let missing = VmConfig::read(&case.path("no-such.toml")).map(drop);
    let flag = |table, text| parse_flag(table, text, case.path("").as_path()).map(drop);
    let all = [
        ("no-config", missing),
        ("flag-unknown-key", flag("disk", "path=/a,cahce=none")),
        ("flag-no-value", flag("nic", "user")),
        ("flag-bad-value", flag("disk", "path=/a,aio=slow")),
        ("flag-key-twice", flag("disk", "path=/a,path=/b")),
    ];
    let told = all.into_iter().map(|(name, result)| {
        let told = Told::config(&result.expect_err("it is refused"));
        let text = case.normal(&told.text);
        (name, told, text)
    });
    told.collect()
}

/// The three refusals that no config leads to.
#[test]
fn refusals_of_a_launcher_or_a_qemu_at_fault() {
    let disk = serde_json::json!({"disk": {"id": "sys", "path": "/a.raw", "cache": "writeback"}});
    let disk: DeviceConfig = serde_json::from_value(disk).expect("a disk");
    let mut topology = Topology::growing(None);
    topology.add_spare(1).expect("there is room");
    let layout = Layout::new("vm", false, topology);
    let mut host = devices::host::HostFacts::default();
    let mut qemu = QEMU_10_0.capabilities.clone();
    let unknown = plan(&disk, &layout, &host, &qemu, Moment::Hot).expect_err("nobody looked at the image");
    assert_eq!(
        unknown.to_string(),
        "sys: nothing is known of image /a.raw: it does not exist or cannot be read; check the path and the rights on it"
    );
    let layer = devices::host::Layer {
        path: "/a.raw".into(),
        format: devices::host::Format::Raw,
        block_device: false,
    };
    host.chains.insert("/a.raw".into(), vec![layer]);
    qemu.version = "1.2.3".into();
    qemu.devices.get_mut("virtio-blk-pci").expect("it is recorded").remove("write-cache");
    let without = plan(&disk, &layout, &host, &qemu, Moment::Hot).expect_err("the property is gone");
    assert_eq!(
        without.to_string(),
        "sys: `virtio-blk-pci` of this QEMU (1.2.3) has no property `write-cache`: leave the option out that needs it, or use \
         another QEMU"
    );
    let busy = Refusal::Busy { id: "sys".parse().expect("an id"), state: "leaving" };
    assert_eq!(busy.to_string(), "sys is leaving: wait until that has ended (`qvirt devices` shows it)");
}
