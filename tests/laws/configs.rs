//! Configs of devices made up by chance, and the machine that they are planned into.

use devices::address::{Function, PciSeat, Slot};
use devices::controller::{IothreadConfig, ScsiControllerConfig, VirtioSerialConfig};
use devices::disk::{Aio, Cache, Discard, DiskBus, DiskConfig, Medium, ScsiWish};
use devices::host::{Format, HostFacts, HostVdpa, Layer};
use devices::id::Label;
use devices::nic::NicConfig;
use devices::port::{ChannelConfig, SerialConfig, SerialType};
use devices::retry::{AtTimeout, EngineWish, ErrorPolicy, OnError};
use devices::topology::Topology;
use devices::units::{Mac, Millis};
use devices::usb::{PortPath, UsbConfig, UsbControllerConfig, UsbFact, UsbModel, UsbSelector, UsbSpeed};
use devices::vdpa::{VdpaConfig, VdpaRef, VdpaType};
use devices::vhost_scsi::VhostScsiConfig;
use devices::{DeviceConfig, DeviceId, Layout, Moment, Placed, plan_machine};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::recorded::QEMU_10_0;

pub fn id() -> impl Strategy<Value = DeviceId> {
    "[a-zA-Z][a-zA-Z0-9_-]{0,15}".prop_map(|text| text.parse().expect("it follows the rule"))
}

/// Absolute paths with all that is awkward in QEMU's notation and in TOML.
pub fn path() -> impl Strategy<Value = String> {
    "/[a-c,=:;.'\"\\\\ {}#é$-]{1,12}"
}

pub fn label(prefix: &'static str) -> impl Strategy<Value = Label> {
    (0..Label::COUNT).prop_map(move |number| Label::numbered(prefix, number).expect("it is below COUNT"))
}

pub fn mac() -> impl Strategy<Value = Mac> {
    ("[a-z]{1,4}", "[a-z]{1,4}").prop_map(|(vm, device)| Mac::derived(&vm, &device))
}

pub fn pci_seat() -> impl Strategy<Value = PciSeat> {
    let place = || {
        (0_u8..32, prop_oneof![3 => Just(0_u8), 1 => 0_u8..8])
            .prop_map(|(slot, function)| (Slot(slot), Function(function)))
    };
    prop_oneof![
        4 => (1_usize..12).prop_map(|n| PciSeat::Port(format!("rp{n}").parse().expect("an id"))),
        1 => place().prop_map(|(slot, function)| PciSeat::Root(slot, function)),
        1 => (id(), place()).prop_map(|(bridge, (slot, function))| PciSeat::Bridge(bridge, slot, function)),
    ]
}

/// All of `on_error`; what does not go together is refused when it is planned, half of it or less.
pub fn on_error() -> impl Strategy<Value = OnError> {
    let policies: Vec<ErrorPolicy> =
        ErrorPolicy::ALL.iter().copied().filter(|policy| *policy != ErrorPolicy::Retry).collect();
    let plain = (option::of(select(policies.clone())), option::of(select(policies)))
        .prop_map(|(read, write)| OnError { read, write, ..OnError::default() });
    let time = || (100_u64..100_000).prop_map(Millis::new);
    let timeout = option::of((time(), option::of(select(AtTimeout::ALL))));
    let rest = (option::of(time()), timeout, option::weighted(0.3, select(EngineWish::ALL)));
    let retry =
        (plain.clone(), any::<bool>(), rest).prop_map(|(plain, both, (interval, timeout, engine))| {
            let read = if both { Some(ErrorPolicy::Retry) } else { plain.read };
            let (timeout, at_timeout) = timeout.map_or((None, None), |(timeout, act)| (Some(timeout), act));
            OnError { read, write: Some(ErrorPolicy::Retry), interval, timeout, at_timeout, engine }
        });
    prop_oneof![plain, retry]
}

fn scsi_wish() -> impl Strategy<Value = ScsiWish> {
    (option::of(0_u8..2), option::of(0_u8..6), option::of(0_u16..3))
        .prop_map(|(controller, target, unit)| ScsiWish { controller, bus: None, target, unit })
}

/// What disks of both buses have.
fn any_disk() -> impl Strategy<Value = DiskConfig> {
    let what = (option::weighted(0.3, id()), path(), option::of(select(Format::ALL)));
    let how = (
        option::of(select(Cache::ALL)),
        option::of(select(&[Aio::Threads, Aio::IoUring][..])),
        option::of(select(Discard::ALL)),
        any::<bool>(),
        option::of("[A-Za-z0-9, =]{1,20}"),
        option::weighted(0.2, 0_u32..40),
        option::of(on_error()),
    );
    (what, how).prop_map(
        |((id, path, format), (cache, aio, discard, read_only, serial, bootindex, on_error))| {
            let path = Some(path);
            DiskConfig {
                id,
                path,
                format,
                cache,
                aio,
                discard,
                read_only,
                serial,
                bootindex,
                on_error,
                ..Default::default()
            }
        },
    )
}

fn disk() -> impl Strategy<Value = DiskConfig> {
    let blk = (option::weighted(0.3, pci_seat()), option::of(1_u16..9), option::weighted(0.2, label("vd")));
    let scsi = (
        option::of(scsi_wish()),
        option::of("[a-z,]{1,36}"),
        option::weighted(0.2, label("sd")),
        any::<bool>(),
    );
    prop_oneof![
        (any_disk(), blk).prop_map(|(disk, (seat, queues, target))| DiskConfig {
            seat,
            queues,
            target,
            ..disk
        }),
        (any_disk(), scsi).prop_map(|(disk, (scsi, device_id, target, cdrom))| {
            let device = cdrom.then_some(Medium::Cdrom);
            DiskConfig { bus: Some(DiskBus::VirtioScsi), device, scsi, device_id, target, ..disk }
        }),
    ]
}

fn nic() -> impl Strategy<Value = NicConfig> {
    let way = prop_oneof![
        prop::collection::vec("tcp::[1-9]{1,3}-:[1-9]", 0..3).prop_map(|forward| NicConfig {
            user: true,
            forward,
            ..Default::default()
        }),
        ("[a-z]{1,12}", any::<bool>(), option::of(1_u16..5)).prop_map(|(tap, vhost, queues)| NicConfig {
            tap: Some(tap),
            vhost,
            queues,
            ..Default::default()
        }),
        ("[a-z]{1,12}", option::of(1_u16..4095)).prop_map(|(bridge, vlan)| NicConfig {
            bridge: Some(bridge),
            openvswitch: true,
            vlan,
            ..Default::default()
        }),
        (path(), option::of(1_u16..5)).prop_map(|(socket, queues)| NicConfig {
            vhost_user: Some(socket),
            queues,
            ..Default::default()
        }),
    ];
    let rest = (option::weighted(0.3, id()), option::of(mac()), option::weighted(0.3, pci_seat()));
    (way, rest).prop_map(|(nic, (id, mac, seat))| NicConfig { id, mac, seat, ..nic })
}

fn port() -> impl Strategy<Value = DeviceConfig> {
    let serial = (option::weighted(0.3, id()), option::of(select(SerialType::ALL)), option::of(path()));
    let channel = (option::weighted(0.3, id()), option::of("[a-z.]{1,12}"), option::of(path()));
    prop_oneof![
        serial.prop_map(|(id, kind, log)| DeviceConfig::Serial(SerialConfig { id, kind, log })),
        channel.prop_map(|(id, name, path)| {
            DeviceConfig::Channel(ChannelConfig { id, name, guest_agent: false, path })
        }),
    ]
}

/// A device of the host that one guest alone has.
fn host_device() -> impl Strategy<Value = DeviceConfig> {
    let vdpa = (option::weighted(0.3, id()), "[a-z]{1,3}", any::<bool>(), option::weighted(0.3, pci_seat()));
    let scsi = (
        option::weighted(0.3, id()),
        "naa\\.5[0-9a-f]{15}",
        option::of(1_u16..9),
        option::weighted(0.3, pci_seat()),
    );
    prop_oneof![
        vdpa.prop_map(|(id, name, nic, seat)| {
            let kind = nic.then_some(VdpaType::Nic);
            let device = VdpaRef::Name(name);
            DeviceConfig::Vdpa(VdpaConfig {
                id,
                device,
                kind,
                mgmtdev: None,
                queues: None,
                mac: None,
                bootindex: None,
                seat,
            })
        }),
        scsi.prop_map(|(id, wwpn, queues, seat)| {
            let wwpn = wwpn.parse().expect("a target's name");
            DeviceConfig::VhostScsi(VhostScsiConfig {
                id,
                wwpn,
                boot_tpgt: None,
                queues,
                bootindex: None,
                seat,
            })
        }),
    ]
}

fn usb_port(number: u8) -> PortPath {
    format!("{}.{number}", number % 3 + 1).parse().expect("a port path")
}

/// What is plugged into the host of every law: devices of all speeds, on one bus.
fn usb_facts() -> Vec<UsbFact> {
    let fact = |number: u8| UsbFact {
        bus: 1,
        device: number,
        port: Some(usb_port(number)),
        speed: UsbSpeed::ALL[usize::from(number) % UsbSpeed::ALL.len()],
        vendor: 0x1209,
        product: u16::from(number / 4),
        serial: Some(format!("S{number}")),
        title: None,
        hub: false,
        storage: number.is_multiple_of(2),
        drivers: Vec::new(),
    };
    (1..=12).map(fact).collect()
}

/// Any text that may stand for a USB device, also of such as the host does not have.
pub fn usb_selector() -> impl Strategy<Value = UsbSelector> {
    let number = 1_u8..14;
    prop_oneof![
        number.clone().prop_map(|device| UsbSelector::Address { bus: 1, device }),
        number.clone().prop_map(|number| UsbSelector::Port { bus: 1, port: usb_port(number) }),
        (number, any::<bool>()).prop_map(|(number, serial)| UsbSelector::Ids {
            vendor: 0x1209,
            product: u16::from(number / 4),
            serial: serial.then(|| format!("S{number}")),
        }),
    ]
}

fn usb() -> impl Strategy<Value = UsbConfig> {
    let place = (option::weighted(0.3, 0_u8..3), option::weighted(0.3, 1_u8..9), option::weighted(0.3, id()));
    let what = (option::weighted(0.8, usb_selector()), any::<bool>(), option::weighted(0.2, 0_u32..40));
    (place, what).prop_map(|((controller, port, id), (host, optional, bootindex))| match host {
        Some(host) => {
            UsbConfig { id, host: Some(host), controller, port, optional, bootindex, ..Default::default() }
        }
        None => UsbConfig { id, tablet: true, port, ..Default::default() },
    })
}

/// Any device.
pub fn device() -> impl Strategy<Value = DeviceConfig> {
    let controller = (option::weighted(0.3, id()), option::weighted(0.3, pci_seat()), option::of(1_u16..9));
    prop_oneof![
        // Boxed, since a test thread has a small stack and what stands here would all be on it.
        5 => disk().prop_map(DeviceConfig::Disk).boxed(),
        3 => nic().prop_map(DeviceConfig::Nic).boxed(),
        2 => port().boxed(),
        2 => host_device().boxed(),
        1 => option::of(id()).prop_map(|id| DeviceConfig::Iothread(IothreadConfig { id })),
        1 => controller.prop_map(|(id, seat, queues)| {
            DeviceConfig::ScsiController(ScsiControllerConfig { id, iothread: None, queues, seat })
        }),
        2 => (option::weighted(0.3, id()), select(UsbModel::ALL), option::weighted(0.2, pci_seat())).prop_map(
            |(id, model, seat)| {
                DeviceConfig::UsbController(UsbControllerConfig { id, model, index: None, seat })
            }
        ),
        3 => usb().prop_map(DeviceConfig::Usb).boxed(),
        1 => (option::of(id()), option::of(pci_seat())).prop_map(|(id, seat)| {
            DeviceConfig::VirtioSerial(VirtioSerialConfig { id, seat })
        }),
    ]
}

/// Any devices, also such as cannot be together.
pub fn devices() -> impl Strategy<Value = Vec<DeviceConfig>> {
    prop::collection::vec(device(), 1..9)
}

/// A host that has every image that the configs name; how deep its chain is depends on the path's length.
pub fn host(devices: &[DeviceConfig]) -> HostFacts {
    let mut host =
        HostFacts { run_dir: "/run/qvirt/vm".to_owned(), usb: usb_facts(), ..HostFacts::default() };
    for path in devices.iter().filter_map(DeviceConfig::image) {
        let layer = |depth: usize| Layer {
            path: if depth == 0 { path.to_owned() } else { format!("{path}.{depth}") },
            format: if depth == path.len() % 3 { Format::Raw } else { Format::Qcow2 },
            block_device: path.len().is_multiple_of(5),
        };
        host.chains.insert(path.to_owned(), (0..=path.len() % 3).map(layer).collect());
    }
    for device in devices {
        // Those that are asked for are there; of a target nothing is known.
        if let DeviceConfig::Vdpa(VdpaConfig { device: VdpaRef::Name(name), .. }) = device {
            host.vdpa.push(HostVdpa {
                name: name.clone(),
                node: Some("/dev/vhost-vdpa-0".to_owned()),
                in_software: name.len() == 1,
                ..HostVdpa::default()
            });
        }
    }
    host
}

/// The devices that can be together, each kept if the machine can have it beside those before, and that machine with spare ports.
pub fn machine(devices: &[DeviceConfig]) -> (Vec<DeviceConfig>, Layout) {
    let empty = || Layout::new("vm", true, Topology::growing(None));
    let host = host(devices);
    let (mut kept, mut layout) = (Vec::new(), empty());
    for device in devices {
        kept.push(device.clone());
        match plan_machine(empty(), &kept, &host, &QEMU_10_0.capabilities) {
            Ok(planned) => layout = planned,
            Err(_) => drop(kept.pop()),
        }
    }
    layout.topology_mut().add_spare(3).expect("a dozen ports leave room");
    (kept, layout)
}

/// Plans a device into a running machine.
pub fn plug(config: &DeviceConfig, layout: &Layout) -> Result<devices::Plan, devices::Refusal> {
    devices::plan(config, layout, &host(std::slice::from_ref(config)), &QEMU_10_0.capabilities, Moment::Hot)
}

/// A machine with these ports and bridges, empty otherwise.
pub fn same_ports(layout: &Layout) -> Layout {
    let (ports, bridges) = (layout.topology().ports().to_vec(), layout.topology().bridges().to_vec());
    Layout::new("vm", true, Topology::written_out(ports, bridges))
}

/// The config of a placed device with its seat asked for.
pub fn pinned(placed: &Placed) -> DeviceConfig {
    use devices::address::Address::{Pci, Scsi, Usb};
    let mut config = placed.config.clone();
    match (&mut config, &placed.address) {
        (DeviceConfig::Disk(disk), Some(Pci(seat))) => disk.seat = Some(seat.clone()),
        (DeviceConfig::Disk(disk), Some(Scsi(a))) => {
            let (controller, target, unit) = (Some(a.controller), Some(a.target), Some(a.unit));
            disk.scsi = Some(ScsiWish { controller, bus: Some(0), target, unit });
        }
        (DeviceConfig::Nic(nic), Some(Pci(seat))) => nic.seat = Some(seat.clone()),
        (DeviceConfig::Vdpa(vdpa), Some(Pci(seat))) => vdpa.seat = Some(seat.clone()),
        (DeviceConfig::VhostScsi(scsi), Some(Pci(seat))) => scsi.seat = Some(seat.clone()),
        (DeviceConfig::ScsiController(scsi), Some(Pci(seat))) => scsi.seat = Some(seat.clone()),
        (DeviceConfig::VirtioSerial(serial), Some(Pci(seat))) => serial.seat = Some(seat.clone()),
        (DeviceConfig::Usb(usb), Some(Usb { controller, port })) => {
            (usb.controller, usb.port) = (Some(*controller), Some(*port));
        }
        _ => {}
    }
    config
}
