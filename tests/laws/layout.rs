//! Laws of planning: cold equals hot, both spellings say the same, refusals change nothing, adoption gives the machine back.

use std::collections::{BTreeMap, BTreeSet};

use devices::address::{Address, PciSeat};
use devices::spec::{Backend, DeviceSpec, Numbers};
use devices::topology::TopologyError;
use devices::{Layout, Moment, Refusal, plan};
use proptest::prelude::*;
use serde_json::Value;

use crate::configs::{self, machine, pinned, plug, same_ports};
use crate::recorded::QEMU_10_0;

/// The values of a command line's JSON options.
fn argv_values(spec: &DeviceSpec) -> Vec<Value> {
    let words = spec.argv(&QEMU_10_0.capabilities, &Numbers::new());
    let json = words.into_iter().filter(|word| word.starts_with('{'));
    json.map(|word| serde_json::from_str(&word).expect("it is JSON")).collect()
}

/// The arguments of the commands that have a JSON option as their twin.
fn qmp_values(spec: &DeviceSpec) -> Vec<Value> {
    let calls =
        spec.calls().into_iter().filter(|call| !matches!(call.execute, "getfd" | "chardev-add" | "add-fd"));
    calls.map(|call| call.arguments).collect()
}

/// `-chardev` read back by the parser of `--disk`, beside `chardev-add`.
fn chardevs_agree(spec: &DeviceSpec) {
    for backend in &spec.backends {
        let Backend::Chardev(_) = backend else { continue };
        let [_, option] = backend.flag(&QEMU_10_0.capabilities, &Numbers::new());
        let option: BTreeMap<String, String> =
            devices::keyval::parse(&format!("type={option}")).expect("it is key=value");
        let call = backend.add().arguments;
        let data = &call["backend"]["data"];
        assert_eq!(option["type"], call["backend"]["type"]);
        assert_eq!(option["id"], call["id"]);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        assert_eq!(option.get("path").cloned(), text(&data["addr"]["data"]["path"]));
        assert_eq!(option.get("logfile").cloned(), text(&data["logfile"]));
        let on = |value: &Value| value.as_bool().map(|on| if on { "on" } else { "off" }.to_owned());
        assert_eq!(option.get("server").cloned(), on(&data["server"]));
        assert_eq!(option.get("wait").cloned(), on(&data["wait"]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn cold_equals_hot(devices in configs::devices()) {
        let (_, layout) = machine(&devices);
        for placed in layout.devices() {
            prop_assert_eq!(argv_values(&placed.spec), qmp_values(&placed.spec));
            chardevs_agree(&placed.spec);
            if layout.can_leave(placed).is_err() {
                continue;
            }
            let mut rest = same_ports(&layout);
            for other in layout.devices().iter().filter(|other| other.id != placed.id) {
                rest.restore(other.clone()).expect("it had its seat before");
            }
            match (plug(&pinned(placed), &rest), &placed.address) {
                (Ok(plan), _) => {
                    prop_assert_eq!(plan.parts.len(), 1);
                    prop_assert_eq!(&plan.parts[0].spec, &placed.spec);
                    prop_assert_eq!(&plan.parts[0].address, &placed.address);
                    prop_assert_eq!(&plan.parts[0].needs, &placed.needs);
                    prop_assert_eq!(plan.parts[0].index, placed.index);
                }
                (Err(Refusal::Seat { source: TopologyError::NotHot { .. }, .. }), Some(Address::Pci(seat))) => {
                    prop_assert!(!matches!(seat, PciSeat::Port(_)), "a port takes hot-plug");
                }
                (Err(refusal), _) => prop_assert!(false, "{}", refusal),
            }
        }
    }

    #[test]
    fn a_refused_plan_changes_nothing(devices in configs::devices(), more in configs::devices()) {
        let (_, layout) = machine(&devices);
        let before = layout.clone();
        for config in &more {
            match plug(config, &layout) {
                Ok(plan) => {
                    let ours = |id| plan.parts.iter().any(|part| part.id == id);
                    let others: Vec<_> = plan.layout.devices().iter().filter(|d| !ours(d.id.clone())).collect();
                    prop_assert_eq!(others, layout.devices().iter().collect::<Vec<_>>());
                }
                Err(refusal) => prop_assert!(refusal.to_string().len() > 20, "{}", refusal),
            }
            prop_assert_eq!(&layout, &before);
        }
    }

    /// A plan that could not be carried out is taken back part by part.
    #[test]
    fn removing_the_parts_of_a_plan_gives_the_seats_back(devices in configs::devices(), more in configs::devices()) {
        let (_, layout) = machine(&devices);
        for config in &more {
            let Ok(plan) = plug(config, &layout) else { continue };
            let mut next = plan.layout;
            for part in plan.parts.iter().rev() {
                next.remove(&part.id);
            }
            prop_assert_eq!(next.topology(), layout.topology());
            prop_assert_eq!(next.devices(), layout.devices());
        }
    }

    #[test]
    fn nothing_is_shared(devices in configs::devices()) {
        let (_, layout) = machine(&devices);
        let all = layout.devices();
        let distinct = |texts: Vec<String>| texts.iter().collect::<BTreeSet<_>>().len() == texts.len();
        prop_assert!(distinct(all.iter().map(|d| d.id.to_string()).collect()));
        prop_assert!(distinct(all.iter().filter_map(|d| d.label()).map(ToString::to_string).collect()));
        prop_assert!(distinct(all.iter().filter_map(|d| d.address.as_ref()).map(ToString::to_string).collect()));
        let words = all.iter().flat_map(|d| d.spec.calls()).map(|call| call.arguments);
        let made = |key: &'static str| move |value: &Value| value[key].as_str().map(str::to_owned);
        let values: Vec<Value> = words.collect();
        prop_assert!(distinct(values.iter().filter_map(made("node-name")).collect()));
        prop_assert!(distinct(values.iter().filter_map(made("id")).collect()));
        prop_assert!(distinct(values.iter().filter_map(made("fdname")).collect()));
        prop_assert!(distinct(values.iter().filter_map(made("mac")).collect()));
    }

    #[test]
    fn adoption_gives_the_machine_back(devices in configs::devices(), backwards in any::<bool>()) {
        let (_, layout) = machine(&devices);
        let mut placed = layout.devices().to_vec();
        let mut empty = layout.clone();
        for device in &placed {
            empty.remove(&device.id);
        }
        prop_assert!(empty.topology().taken().is_empty());
        if backwards {
            placed.reverse();
        }
        let mut restored = empty;
        for device in placed {
            restored.restore(device).expect("its seat is free");
        }
        prop_assert_eq!(restored.topology(), layout.topology());
        if !backwards {
            prop_assert_eq!(&restored, &layout);
        }
        let text = serde_json::to_string(&layout).expect("plain data");
        prop_assert_eq!(serde_json::from_str::<Layout>(&text).expect("what was written"), layout);
    }

    /// The config of a placed device, planned again, is the same device: what was assigned is filled in.
    #[test]
    fn what_was_assigned_is_asked_for_the_next_time(devices in configs::devices()) {
        let (_, layout) = machine(&devices);
        let host = configs::host(&devices);
        for placed in layout.devices() {
            let mut alone = layout.clone();
            alone.remove(&placed.id);
            if let Ok(again) = plan(&placed.config, &alone, &host, &QEMU_10_0.capabilities, Moment::Cold) {
                let part = again.parts.last().expect("a plan has its device");
                prop_assert_eq!(&part.config, &placed.config);
                prop_assert_eq!(part.label(), placed.label());
            }
        }
    }
}
