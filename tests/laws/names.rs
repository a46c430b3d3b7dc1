//! Laws of names: nodes never repeat in a VM's life and always fit, labels count as people do.

use std::collections::BTreeSet;

use devices::disk::{DiskBus, DiskConfig};
use devices::host::{Format, HostFacts, Layer};
use devices::id::Label;
use devices::spec::Backend;
use devices::topology::Topology;
use devices::{DeviceConfig, DeviceId, Layout, Moment, Placed, plan};
use proptest::prelude::*;

use crate::configs;
use crate::recorded::QEMU_10_0;

/// QEMU's own limit.
const NODE_NAME_MAX: usize = 31;

fn nodes(placed: &Placed) -> Vec<String> {
    let blockdevs = placed.spec.backends.iter().filter_map(|backend| match backend {
        Backend::Blockdev(props) => props["node-name"].as_str(),
        _ => None,
    });
    blockdevs.map(str::to_owned).collect()
}

fn chain(depth: usize) -> HostFacts {
    let layer = |n| Layer { path: format!("/image{n}"), format: Format::Qcow2, block_device: false };
    let mut host = HostFacts::default();
    host.chains.insert("/image0".to_owned(), (0..depth).map(layer).collect());
    host
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Three disks come and go, with chains of any depth; now and then the owner starts anew from its record.
    #[test]
    fn a_node_name_is_used_once(
        ids in prop::collection::hash_set(configs::id(), 3),
        steps in prop::collection::vec((0_usize..3, 1_usize..5, any::<bool>(), any::<bool>()), 1..40),
    ) {
        let ids: Vec<DeviceId> = ids.into_iter().collect();
        let mut topology = Topology::growing(None);
        topology.add_spare(4).expect("there is room");
        let mut layout = Layout::new("vm", false, topology);
        let mut used = BTreeSet::new();
        for (which, depth, scsi, restart) in steps {
            let id = &ids[which];
            if layout.device(id.as_str()).is_some() {
                layout.remove(id);
                continue;
            }
            let bus = scsi.then_some(DiskBus::VirtioScsi);
            let (id, path, format) = (Some(id.clone()), Some("/image0".to_owned()), Some(Format::Qcow2));
            let disk = DeviceConfig::Disk(DiskConfig { id, path, format, bus, ..Default::default() });
            let planned = plan(&disk, &layout, &chain(depth), &QEMU_10_0.capabilities, Moment::Hot);
            let Ok(planned) = planned else { continue };
            let made = planned.parts.last().map(nodes).unwrap_or_default();
            prop_assert_eq!(made.len(), 2 * depth);
            for node in made {
                prop_assert!(node.len() <= NODE_NAME_MAX, "{} is too long", node);
                let (owner, _) = DeviceId::of_node(&node).expect("it is one of ours");
                prop_assert_eq!(&owner, &ids[which]);
                prop_assert!(used.insert(node.clone()), "{} was used before", node);
            }
            layout = planned.layout;
            if restart {
                let record = serde_json::to_string(&layout).expect("plain data");
                layout = serde_json::from_str(&record).expect("what was written");
            }
        }
    }

    #[test]
    fn labels_are_the_first_free_ones(given in prop::collection::vec(prop::option::of(0_usize..8), 1..8)) {
        let disk = |number: &Option<usize>| {
            let target = number.and_then(|number| Label::numbered("vd", number));
            DeviceConfig::Disk(DiskConfig { path: Some("/image0".to_owned()), target, ..Default::default() })
        };
        let disks: Vec<DeviceConfig> = given.iter().map(disk).collect();
        let empty = Layout::new("vm", false, Topology::growing(None));
        let planned = devices::plan_machine(empty, &disks, &chain(1), &QEMU_10_0.capabilities);
        let asked: Vec<usize> = given.iter().flatten().copied().collect();
        let twice = asked.iter().collect::<BTreeSet<_>>().len() < asked.len();
        prop_assert_eq!(planned.is_err(), twice);
        let Ok(layout) = planned else { return Ok(()) };
        let mut free = (0..).filter(|number| !asked.contains(number));
        for (number, placed) in given.iter().zip(layout.devices()) {
            let expected = number.or_else(|| free.next()).and_then(|number| Label::numbered("vd", number));
            prop_assert_eq!(placed.label(), expected.as_ref());
        }
    }
}

#[test]
fn labels_count_as_people_do() {
    for prefix in ["vd", "sd"] {
        let letters = 'a'..='z';
        let one = letters.clone().map(|a| format!("{prefix}{a}"));
        let two = letters.clone().flat_map(|a| letters.clone().map(move |b| format!("{prefix}{a}{b}")));
        let all: Vec<String> = one.chain(two).collect();
        assert_eq!(all.len(), Label::COUNT);
        for (number, text) in all.iter().enumerate() {
            let label = Label::numbered(prefix, number).expect("it is below COUNT");
            assert_eq!(label.as_str(), text);
            assert_eq!(text.parse::<Label>().expect("a label"), label);
        }
        assert_eq!(Label::numbered(prefix, Label::COUNT), None);
        assert_eq!(all.last().map(String::as_str), Some(format!("{prefix}zz").as_str()));
    }
}
