//! Cases that work: command lines and hot-plugs, compared with their expectations and checked against both recorded QEMUs.

use std::collections::BTreeSet;

use devices::disk::{Aio, Cache, Discard};
use devices::layout::{cancel, dismiss, finalize, take_snapshot};
use devices::retry::{AtTimeout, EngineWish, ErrorPolicy};
use devices::spec::Numbers;
use devices::topology::Topology;
use devices::{DeviceConfig, Layout, Moment, plan, plan_machine};
use launcher::blueprint::Blueprint;
use launcher::config::{VmConfig, read_device};
use serde_json::{Value, json};

use crate::case::{Case, all_good, compare, folder, learn, names};
use crate::recorded::{QEMU_7_2, QEMU_10_0, Recorded};
use crate::schema::Schema;

/// A case, planned for one QEMU.
struct Drawn {
    argv: Vec<[String; 2]>,
    argv_text: String,
    qmp: Vec<Value>,
    qmp_text: String,
    snapshot: Vec<Value>,
    snapshot_text: String,
}

fn draw(case: &Case, qemu: &Recorded) -> Drawn {
    let config = VmConfig::read(&case.config).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let files = case.files(&config.name);
    let facts = case.facts(&config.name);
    let own_uuid = config.uuid.is_none();
    let drawn = Blueprint::draw_for(
        config,
        "/usr/bin/qemu".into(),
        case.capabilities(qemu),
        &case.host(),
        &files,
        &case.store(),
        facts,
    );
    let mut blueprint = drawn.unwrap_or_else(|e| panic!("{} for QEMU {}: {e}", case.name, qemu.version));
    if own_uuid {
        blueprint.machine.uuid = "$UUID".to_owned();
    }
    use_block_devices(case, &mut blueprint);
    let argv = pairs(&blueprint.argv(["qmp", "rescue"], &Numbers::new()));
    let argv_text: String = argv.iter().map(|[option, value]| format!("{option} {value}\n")).collect();
    let (qmp, qmp_text) = hot_plugs(case, &blueprint);
    let (snapshot, snapshot_text) = snapshot(case, &blueprint);
    let normal = |text: String| {
        let mine = format!("-machine pc-q35-{}", qemu.version);
        case.normal(&text).replace(" \n", "\n").replace(&mine, "-machine pc-q35-$VERSION")
    };
    let snapshot_text = normal(snapshot_text);
    Drawn { argv, argv_text: normal(argv_text), qmp, qmp_text: normal(qmp_text), snapshot, snapshot_text }
}

/// Options with their values; a word that is none begins with `-`.
fn pairs(words: &[String]) -> Vec<[String; 2]> {
    let mut pairs: Vec<[String; 2]> = Vec::new();
    for word in words {
        match pairs.last_mut().filter(|_| !word.starts_with('-')) {
            Some([_, value]) => value.push_str(word),
            None => pairs.push([word.clone(), String::new()]),
        }
    }
    pairs
}

/// Plans anew with files that count as block devices: a real one would need root.
fn use_block_devices(case: &Case, blueprint: &mut Blueprint) {
    let devices = case.said("block");
    if devices.is_empty() {
        return;
    }
    let config = &blueprint.config;
    let mut host = case.facts(&config.name);
    for device in &config.devices {
        learn(&mut host, device).expect("it was looked at before");
    }
    for layer in host.chains.values_mut().flatten() {
        layer.block_device = devices.iter().any(|name| case.path(name).to_str() == Some(&layer.path));
    }
    let empty = Layout::new(config.name.as_str(), false, Topology::growing(config.pcie.pref64_reserve));
    let mut layout = plan_machine(empty, &config.devices, &host, &blueprint.qemu).expect("planned before");
    let spare = blueprint.layout.topology().ports().len() - layout.topology().ports().len();
    layout.topology_mut().add_spare(u16::try_from(spare).expect("few")).expect("there was room before");
    blueprint.layout = layout;
}

/// Each device plugged into the machine without it, and the device of `NAME.device.toml` into the whole machine.
fn hot_plugs(case: &Case, blueprint: &Blueprint) -> (Vec<Value>, String) {
    let (mut calls, mut text) = (Vec::new(), String::new());
    let mut show = |title: &str, config: &DeviceConfig, layout: &Layout| {
        let mut host = case.facts(&blueprint.config.name);
        learn(&mut host, config).expect("it was looked at before");
        for layer in host.chains.values_mut().flatten() {
            layer.block_device =
                case.said("block").iter().any(|n| case.path(n).to_str() == Some(&layer.path));
        }
        let plan = match plan(config, layout, &host, &blueprint.qemu, Moment::Hot) {
            Ok(plan) => plan,
            Err(refusal) => return text.push_str(&format!("# {title} is refused: {refusal}\n")),
        };
        for part in plan.parts {
            text.push_str(&headline(&part));
            for call in part.spec.calls() {
                let call = json!({"execute": call.execute, "arguments": call.arguments});
                text.push_str(&format!("{call}\n"));
                calls.push(call);
            }
        }
    };
    let mut kept = String::new();
    for placed in blueprint.layout.devices() {
        match without(&blueprint.layout, &blueprint.config, placed) {
            Ok(layout) => show(placed.id.as_str(), &as_written(&blueprint.config, placed), &layout),
            Err(refusal) => kept.push_str(&format!("# {} stays: {refusal}\n", placed.id)),
        }
    }
    let device = folder("cases").join(format!("{}.device.toml", case.name));
    if device.exists() {
        let copy = case.path("device.toml");
        std::fs::copy(device, &copy).expect("the folder is writable");
        let config = read_device(&copy).expect("the device file is right");
        show(&format!("{}.device.toml", case.name), &config, &blueprint.layout);
    }
    (calls, kept + &text)
}

/// With `#! snapshot`: an overlay on each disk that can have one, and why the others cannot.
fn snapshot(case: &Case, blueprint: &Blueprint) -> (Vec<Value>, String) {
    let (mut calls, mut text, mut disks) = (Vec::new(), String::new(), Vec::new());
    if !case.says("snapshot") {
        return (calls, text);
    }
    let mut show = |text: &mut String, call: devices::spec::Call| {
        let call = json!({"execute": call.execute, "arguments": call.arguments});
        text.push_str(&format!("{call}\n"));
        calls.push(call);
    };
    for old in blueprint.layout.devices().iter().filter(|d| matches!(d.config, DeviceConfig::Disk(_))) {
        let path = case.path(&format!("{}.one.qcow2", old.id)).display().to_string();
        match blueprint.layout.with_overlay(old.id.as_str(), &path, &blueprint.qemu) {
            Ok(new) => {
                text.push_str(&headline(&new));
                new.overlay_nodes().into_iter().for_each(|call| show(&mut text, call));
                disks.push((old, new));
            }
            Err(refusal) => text.push_str(&format!("# {refusal}\n")),
        }
    }
    text.push_str("# at one instant\n");
    show(&mut text, take_snapshot(disks.iter().map(|(old, new)| (*old, new))));
    text.push_str("# undone before that instant\n");
    disks.iter().flat_map(|(_, new)| new.overlay_nodes_undone()).for_each(|call| show(&mut text, call));
    for (old, new) in &disks {
        let frozen = old.layers().into_iter().next().expect("it has an image").path;
        match new.without_layer(&frozen).expect("it can be merged") {
            Some(lesser) => {
                text.push_str(&format!("# {frozen} merged into the one below it\n"));
                [lesser.begin(Some(1 << 20)), lesser.flush(), finalize(&lesser.job), dismiss(&lesser.job)]
                    .into_iter()
                    .for_each(|call| show(&mut text, call));
                lesser.clear().for_each(|call| show(&mut text, call));
                text.push_str(&format!("# then {}", headline(&lesser.placed).trim_start_matches("# ")));
            }
            None => text.push_str(&format!("# {frozen} has nothing below it\n")),
        }
        let written = new.layers().into_iter().next().expect("it has an overlay").path;
        let lesser = new.without_layer(&written).expect("it can be merged").expect("there is an image below");
        let pull = new.pulled_onto(None).expect("it can be pulled");
        text.push_str("# all pulled into what is written\n");
        [pull.begin(Some(1 << 20)), pull.flush()].into_iter().for_each(|call| show(&mut text, call));
        pull.clear().for_each(|call| show(&mut text, call));
        text.push_str(&format!("# then {}", headline(&pull.placed).trim_start_matches("# ")));
        if let Some(base) = old.layers().into_iter().nth(1) {
            let pull = new.pulled_onto(Some(&base.path)).expect("it can be pulled");
            text.push_str(&format!("# what is above {} pulled into what is written\n", base.path));
            show(&mut text, pull.begin(None));
            pull.clear().for_each(|call| show(&mut text, call));
        }
        text.push_str(&format!("# {written}, which is written, merged into the one below it\n"));
        let steps = [lesser.begin(None), lesser.complete(), finalize(&lesser.job), cancel(&lesser.job)];
        steps.into_iter().for_each(|call| show(&mut text, call));
        lesser.clear().for_each(|call| show(&mut text, call));
        text.push_str(&format!("# then {}", headline(&lesser.placed).trim_start_matches("# ")));
    }
    (calls, text)
}

/// What is not said in QMP: label, seat, and what the launcher has to prepare.
fn headline(part: &devices::Placed) -> String {
    let label = part.label().map(|label| format!(", {label}")).unwrap_or_default();
    let seat = part.address.as_ref().map(|address| format!(" at {address}")).unwrap_or_default();
    let mut line = format!("# {}{label}{seat}\n", part.id);
    for need in &part.needs {
        line.push_str(&format!("# needs {}\n", serde_json::to_value(need).expect("needs are plain data")));
    }
    line
}

/// The device as the file has it, with the id that it got.
fn as_written(config: &VmConfig, placed: &devices::Placed) -> DeviceConfig {
    let written = config.devices.iter().find(|d| d.id() == Some(&placed.id));
    written.unwrap_or(&placed.config).clone()
}

/// The same machine without one device, put together from its parts as an adoption does it.
fn without(
    layout: &Layout,
    config: &VmConfig,
    leaving: &devices::Placed,
) -> Result<Layout, devices::Refusal> {
    layout.can_leave(leaving)?;
    let (ports, bridges) = (layout.topology().ports().to_vec(), layout.topology().bridges().to_vec());
    let topology = Topology::written_out(ports, bridges);
    let mut rest = Layout::new(config.name.as_str(), config.memory.shared, topology);
    for placed in layout.devices().iter().filter(|placed| placed.id != leaving.id) {
        rest.restore(placed.clone()).expect("it had its seat before");
    }
    Ok(rest)
}

#[test]
fn every_case_gives_what_is_expected() {
    let mut results = Vec::new();
    for name in names("cases") {
        let case = Case::read("cases", &name);
        let new = draw(&case, &QEMU_10_0);
        let mut check = |suffix: &str, text: Option<&str>| {
            results.push(compare(&folder("cases").join(format!("{name}.{suffix}")), text));
        };
        check("argv", Some(&new.argv_text));
        check("qmp", Some(&new.qmp_text));
        check("snapshot", (!new.snapshot.is_empty()).then_some(&new.snapshot_text));
        if !case.is_for(&QEMU_7_2) {
            continue;
        }
        let old = draw(&case, &QEMU_7_2);
        check("argv.7.2", (old.argv_text != new.argv_text).then_some(&old.argv_text));
        check("qmp.7.2", (old.qmp_text != new.qmp_text).then_some(&old.qmp_text));
    }
    all_good(results);
}

/// Everything that is JSON on a command line, and every QMP command, fits the recorded schema.
#[test]
fn every_case_fits_both_schemas() {
    let mut results = Vec::new();
    for qemu in [&*QEMU_10_0, &*QEMU_7_2] {
        let schema = Schema::new(&qemu.schema);
        for name in names("cases") {
            let case = Case::read("cases", &name);
            if !case.is_for(qemu) {
                continue;
            }
            let (drawn, capabilities) = (draw(&case, qemu), case.capabilities(qemu));
            let check = |command: &str, arguments: &Value| {
                // Neither recorded QEMU was built with the library that this driver needs, so their schemas do not have it.
                if command == "blockdev-add" && arguments["driver"] == "virtio-blk-vhost-vdpa" {
                    assert!(!qemu.capabilities.block_drivers.contains("virtio-blk-vhost-vdpa"));
                    return Ok(());
                }
                let checked = schema.command(command, arguments, &capabilities);
                checked.map_err(|reason| format!("{name} for QEMU {}: {reason}", qemu.version))
            };
            for [option, value] in drawn.argv.iter().filter(|[_, value]| value.starts_with('{')) {
                let arguments: Value = serde_json::from_str(value).expect("a value in braces is JSON");
                results.push(match option.as_str() {
                    "-blockdev" => check("blockdev-add", &arguments),
                    "-object" => check("object-add", &arguments),
                    // Numbers of descriptors are words here, as names are in QMP.
                    "-netdev" => check("netdev_add", &arguments),
                    "-device" => check("device_add", &arguments),
                    other => Err(format!("{name}: {other} has JSON, and no command is known for it")),
                });
            }
            for call in drawn.qmp.iter().chain(&drawn.snapshot) {
                results.push(check(call["execute"].as_str().unwrap_or(""), &call["arguments"]));
            }
        }
    }
    assert!(results.len() > 400, "only {} values were checked", results.len());
    all_good(results);
}

/// What a device is on the command line, it is in QMP: where it gets the same seat again, the values are equal.
#[test]
fn command_line_and_qmp_agree() {
    for name in names("cases").iter().filter(|name| !name.starts_with("old-")) {
        let drawn = draw(&Case::read("cases", name), &QEMU_10_0);
        let cold: BTreeSet<String> = drawn.argv.iter().map(|[_, value]| value.clone()).collect();
        let added = drawn.qmp.iter().filter(|call| {
            matches!(call["execute"].as_str(), Some("blockdev-add" | "object-add" | "netdev_add"))
        });
        for call in added {
            let value = call["arguments"].to_string();
            let of_device_file = folder("cases").join(format!("{name}.device.toml")).exists();
            assert!(cold.contains(&value) || of_device_file, "{name}: {value} is not on the command line");
        }
    }
}

/// A value that the config knows has a case, or a reason why it cannot have one.
#[test]
fn every_word_of_a_disk_has_a_case() {
    let argv: String =
        names("cases").iter().map(|n| draw(&Case::read("cases", n), &QEMU_10_0).argv_text).collect();
    let texts =
        names("cases").into_iter().map(|n| std::fs::read_to_string(folder("cases").join(n + ".toml")));
    let texts: String = texts.map(|text| text.expect("readable")).collect();
    for cache in Cache::ALL {
        assert!(texts.contains(&format!("cache = \"{cache}\"")), "no case has cache {cache}");
    }
    for aio in Aio::ALL {
        assert!(argv.contains(&format!("\"aio\":\"{aio}\"")), "no case has aio {aio}");
    }
    for discard in Discard::ALL {
        assert!(argv.contains(&format!("\"discard\":\"{discard}\"")), "no case has discard {discard}");
    }
    for policy in ErrorPolicy::ALL {
        for key in ["rerror", "werror"] {
            assert!(argv.contains(&format!("\"{key}\":\"{policy}\"")), "no case has {key} {policy}");
        }
    }
    for act in AtTimeout::ALL {
        assert!(texts.contains(&format!("at_timeout = \"{act}\"")), "no case has at_timeout {act}");
    }
    for engine in EngineWish::ALL {
        assert!(texts.contains(&format!("engine = \"{engine}\"")), "no case has engine {engine}");
    }
}
