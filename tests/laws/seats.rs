//! Laws of the table of seats, against a model that is only a list.

use std::collections::BTreeMap;

use devices::address::{Address, PciSeat};
use devices::topology::{Hold, Seat, Topology};
use devices::{DeviceId, Moment};
use proptest::prelude::*;
use proptest::sample::select;

use crate::configs;

#[derive(Clone, Debug)]
enum Step {
    Claim(usize, Seat, Moment),
    Leaving(usize),
    Stays(usize),
    Release(usize),
    Foreign(Vec<(u8, usize)>),
}

const IDS: usize = 6;

fn device(number: usize) -> DeviceId {
    format!("dev{number}").parse().expect("an id")
}

/// Foreign devices; some have an id that one of ours has as well.
fn foreign(seats: &[(u8, usize)]) -> Vec<(Address, String)> {
    let name = |number: usize| if number == 0 { device(0).to_string() } else { format!("/foreign/{number}") };
    let seat = |(number, who): &(u8, usize)| (Address::Isa(*number), name(*who));
    let port = |(number, who): &(u8, usize)| {
        let port = format!("rp{}", number + 1).parse().expect("an id");
        (Address::Pci(PciSeat::Port(port)), name(*who))
    };
    seats.iter().map(seat).chain(seats.iter().map(port)).collect()
}

fn seat() -> impl Strategy<Value = Seat> {
    let scsi = (prop::option::of(0_u8..3), prop::option::of(0_u8..3), prop::option::of(0_u16..3));
    prop_oneof![
        prop::option::of(configs::pci_seat()).prop_map(Seat::Pci),
        scsi.prop_map(|(controller, target, unit)| Seat::Scsi { controller, target, unit }),
        any::<bool>().prop_map(|console| Seat::SerialPort { console }),
        Just(Seat::Isa),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0..IDS;
    let moment = select(&[Moment::Cold, Moment::Hot][..]);
    prop_oneof![
        6 => (id.clone(), seat(), moment).prop_map(|(id, seat, moment)| Step::Claim(id, seat, moment)),
        1 => id.clone().prop_map(Step::Leaving),
        1 => id.clone().prop_map(Step::Stays),
        2 => id.prop_map(Step::Release),
        1 => prop::collection::vec((0_u8..4, 0_usize..3), 0..3).prop_map(Step::Foreign),
    ]
}

type Model = BTreeMap<Address, (String, Hold)>;

fn set_hold(model: &mut Model, id: usize, hold: Hold) {
    let name = device(id).to_string();
    model.values_mut().filter(|(n, h)| *n == name && *h != Hold::Foreign).for_each(|held| held.1 = hold);
}

fn apply(topology: &mut Topology, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    match step {
        Step::Claim(id, seat, moment) => {
            let id = device(*id);
            let before = topology.taken().clone();
            match topology.claim(&id, seat, *moment) {
                Ok(address) => {
                    let held = model.get(&address).is_some_and(|(name, _)| *name != id.as_str());
                    prop_assert!(!held, "{} was given twice", address);
                    let on_port = matches!(address, Address::Pci(PciSeat::Port(_)));
                    let pci = matches!(address, Address::Pci(_));
                    prop_assert!(
                        !pci || on_port || *moment == Moment::Cold,
                        "{} is not for hot-plug",
                        address
                    );
                    model.insert(address, (id.to_string(), Hold::Present));
                }
                Err(_) => prop_assert_eq!(&before, topology.taken(), "a refused claim took something"),
            }
        }
        Step::Leaving(id) => {
            topology.leaving(&device(*id));
            set_hold(model, *id, Hold::Leaving);
        }
        Step::Stays(id) => {
            topology.stays(&device(*id));
            set_hold(model, *id, Hold::Present);
        }
        Step::Release(id) => {
            topology.release(&device(*id));
            let name = device(*id).to_string();
            model.retain(|_, (holder, hold)| *holder != name || *hold == Hold::Foreign);
        }
        Step::Foreign(seats) => {
            topology.set_foreign(foreign(seats));
            model.retain(|_, (_, hold)| *hold != Hold::Foreign);
            for (address, name) in foreign(seats) {
                model.entry(address).or_insert((name, Hold::Foreign));
            }
        }
    }
    Ok(())
}

/// What `counts` is to say, the slow way.
fn naive_free(model: &Model, topology: &Topology, kind: &str) -> usize {
    let free = |address: &Address| !model.contains_key(address);
    match kind {
        "root-port" => {
            let ports = topology.ports().iter().map(|port| Address::Pci(PciSeat::Port(port.id.clone())));
            ports.filter(free).count()
        }
        "scsi-target ctl0" => {
            let held = |target| move |a: &Address| matches!(a, Address::Scsi(a) if a.target == target && a.controller == 0);
            (0..=u8::MAX).filter(|target| !model.keys().any(held(*target))).count()
        }
        _ => (0..31).filter(|nr| free(&Address::SerialPort { controller: 0, nr: *nr })).count(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_seat_is_given_twice(steps in prop::collection::vec(step(), 1..60)) {
        let mut topology = Topology::growing(None);
        topology.add_spare(4).expect("there is room");
        topology.add_scsi_controller(&"ctl0".parse().expect("an id"));
        topology.add_serial_controller(&"ser0".parse().expect("an id"));
        let mut model = Model::new();
        for step in &steps {
            apply(&mut topology, &mut model, step)?;
            let taken: Model = topology.taken().iter().map(|(a, o)| (a.clone(), (o.name.clone(), o.hold))).collect();
            prop_assert_eq!(&taken, &model, "after {:?}", step);
            for count in topology.counts().iter().filter(|count| count.kind != "isa-serial") {
                prop_assert_eq!(count.free, naive_free(&model, &topology, &count.kind), "{}", count.kind);
            }
            let mut places: Vec<_> = topology.ports().iter().map(|p| (p.slot, p.function)).collect();
            places.extend(model.keys().filter_map(|address| match address {
                Address::Pci(PciSeat::Root(slot, function)) => Some((*slot, *function)),
                _ => None,
            }));
            let all = places.len();
            places.sort();
            places.dedup();
            prop_assert_eq!(places.len(), all, "a port and a device, or two ports, in one place of pcie.0");
        }
        let text = serde_json::to_string(&topology).expect("plain data");
        prop_assert_eq!(serde_json::from_str::<Topology>(&text).expect("what was written"), topology);
    }

    /// The convention, for any number of ports: chassis from 1, port = slot * 8 + function, function 0 alone says multifunction.
    #[test]
    fn ports_follow_the_convention(count in 0_u16..=240) {
        let mut topology = Topology::growing(None);
        topology.add_spare(count).expect("240 is the most");
        for (number, port) in topology.ports().iter().enumerate() {
            prop_assert_eq!(usize::from(port.chassis), number + 1);
            prop_assert_eq!(usize::from(port.port), number + 8);
            prop_assert_eq!(usize::from(port.slot.0), number / 8 + 1);
            prop_assert_eq!(usize::from(port.function.0), number % 8);
            let frontend = port.lower().frontend.expect("a port has a frontend");
            prop_assert_eq!(frontend.0.contains_key("multifunction"), number % 8 == 0);
        }
        let controllers: Vec<_> = topology.ports().iter().map(written).collect();
        let (ports, _) = devices::pcie::written_out(&controllers, None).expect("the convention follows the rules");
        prop_assert_eq!(ports.as_slice(), topology.ports());
    }
}

/// A port as `[[pcie_controller]]` would have it.
fn written(port: &devices::pcie::RootPort) -> devices::pcie::ControllerConfig {
    devices::pcie::ControllerConfig {
        model: devices::pcie::ControllerModel::RootPort,
        index: Some(port.chassis.into()),
        id: Some(port.id.clone()),
        chassis: Some(port.chassis.into()),
        port: Some(port.port.into()),
        slot: Some(port.slot.0.into()),
        function: Some(port.function.0.into()),
        seat: None,
    }
}

proptest! {
    /// A guest may be told of an eject twice: a seat that was left a moment ago is the last to be given again.
    #[test]
    fn a_seat_that_was_left_is_used_last(ports in 2_u16..12, leaver in 0_usize..2) {
        let mut topology = Topology::growing(None);
        topology.add_spare(ports).expect("there is room");
        let any = Seat::Pci(None);
        let mut first = Vec::new();
        for number in 0..2 {
            first.push(topology.claim(&device(number), &any, Moment::Hot).expect("a port is free"));
        }
        topology.release(&device(leaver));
        // All others come first, and then it.
        for number in 2..usize::from(ports) {
            let id = format!("other{number}").parse().expect("an id");
            prop_assert_ne!(&topology.claim(&id, &any, Moment::Hot).expect("a port is free"), &first[leaver]);
        }
        let last = topology.claim(&device(leaver), &any, Moment::Hot).expect("a port is free");
        prop_assert_eq!(&last, &first[leaver]);
        prop_assert!(topology.claim(&device(5), &any, Moment::Hot).is_err());
    }

    /// What stands on a controller would go with it: one that was asked to leave takes nothing new.
    #[test]
    fn a_controller_that_leaves_takes_no_devices(console in any::<bool>()) {
        let mut topology = Topology::growing(None);
        topology.add_spare(4).expect("there is room");
        let (scsi, serial) = (device(0), device(1));
        for (id, index) in [(&scsi, topology.add_scsi_controller(&scsi)), (&serial, topology.add_serial_controller(&serial))] {
            prop_assert_eq!(index, Some(0));
            topology.claim(id, &Seat::Pci(None), Moment::Hot).expect("a port is free");
        }
        prop_assert!(topology.has_free_target() && topology.has_free_serial_port(console));
        topology.leaving(&scsi);
        topology.leaving(&serial);
        prop_assert!(!topology.has_free_target() && !topology.has_free_serial_port(console));
        topology.stays(&scsi);
        topology.stays(&serial);
        prop_assert!(topology.has_free_target() && topology.has_free_serial_port(console));
    }
}
