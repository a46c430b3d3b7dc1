//! A snapshot that fails at each of its steps, or whose owner dies there, with QEMU or without: the VM has the former chain or the new one, whole, and
//! nothing beside it.

use std::collections::BTreeSet;

use launcher::record::{Entry, Memory};
use launcher::snapshot::Store;
use launcher::work::snapshot::STEPS;
use tests::chain;
use tests::qemu::QemuVersion;
use tests::vm::{Output, Vm};

use crate::stage::Stage;
use crate::sweep::failed_step;

/// A snapshot ends with a success; none has so many steps.
const MANY: u32 = 30;

const TABLES: &str = "[[scsi_controller]]\nid = \"s0\"\n[[disk]]\nid = \"sys\"\npath = \"sys.img\"\n[[disk]]\nid = \"data\"\npath = \"data.qcow2\"\n\
                      format = \"qcow2\"\nbus = \"scsi\"\n";

#[derive(Clone, Copy, PartialEq)]
enum Wish {
    Fails,
    OwnerDies,
    BothDie,
}

impl Wish {
    fn variable(self) -> &'static str {
        if self == Wish::Fails { "QVIRT_FAIL_STEP" } else { "QVIRT_DIE_STEP" }
    }
}

fn prepared(version: QemuVersion) -> Stage {
    let stage = Stage::real(version, TABLES);
    stage.vm.raw("sys.img", 4, "sys");
    stage.vm.qcow2("data.qcow2", Ok(8));
    stage
}

/// Overlays in the VM's folder.
fn overlays(stage: &Stage) -> BTreeSet<String> {
    let files = std::fs::read_dir(stage.vm.path("")).expect("the folder").flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".qcow2") && name != "data.qcow2").collect()
}

/// What is known, what is there, and what a start starts from agree; gives the number of snapshots.
fn is_whole(stage: &Stage, what: &str) -> usize {
    let book = Store::new(&stage.vm.root().join("lib")).read().expect("the book is readable");
    assert!(book.making.is_empty(), "{what}: {:?}", book.making);
    let known: BTreeSet<String> = book
        .chains
        .iter()
        .flat_map(|chain| &chain.overlays)
        .filter_map(|overlay| Some(overlay.path.rsplit_once('/')?.1.to_owned()))
        .collect();
    assert_eq!(overlays(stage), known, "{what}: overlays that there are, and those that are known");
    assert_eq!(known.len(), 2 * book.snapshots.len(), "{what}: both disks or none");
    chain::are_sound(&stage.vm);
    book.snapshots.len()
}

/// The tops that a running VM writes are those that a start would take, and QEMU has no node beside its chains.
fn runs_on_them(stage: &Stage, what: &str) {
    let blocks: serde_json::Value =
        serde_json::from_str(&stage.vm.ok(&["blocks", "guest", "--json"])).expect("it is JSON");
    let book = Store::new(&stage.vm.root().join("lib")).read().expect("the book is readable");
    let mut layers = 0;
    for block in blocks.as_array().into_iter().flatten() {
        let source = block["source"].as_str().unwrap_or_default();
        let below = block["backing"].as_array().map_or(0, Vec::len);
        layers += below + 1;
        assert!(
            book.chain_of_top(source).is_some() || (book.chains.is_empty() && below == 0),
            "{what}: {block} in {book:#?}"
        );
    }
    let nodes = stage.vm.qmp("query-named-block-nodes", &serde_json::json!({"flat": true}));
    assert_eq!(nodes.as_array().map(Vec::len), Some(2 * layers), "{what}: {nodes:#}");
    // A lease for each layer, and none of an image that is not in use.
    assert_eq!(stage.vm.leases().len(), layers, "{what}");
}

fn each_step(version: QemuVersion, wish: Wish) {
    let stage = prepared(version);
    assert_eq!(stage.start(&[]).code, 0);
    let (mut taken, mut failed) = (0, 0);
    let mut met = BTreeSet::new();
    for number in 1..MANY {
        stage.adopt(&[(wish.variable(), &format!("snapshot:{number}"))]);
        let qemu = stage.vm.qemu_pid();
        let output = stage.vm.qvirt(&["snapshot", "create", "guest", &format!("s{number}")]);
        let what = format!("step {number}: {output}");
        if output.code == 0 {
            break;
        }
        failed += 1;
        match wish {
            Wish::Fails => {
                assert_eq!(output.code, 1, "{what}");
                met.insert(failed_step(&output, "snapshot", number).unwrap_or_else(|| panic!("{what}")));
            }
            Wish::OwnerDies => {
                stage.vm.wait_for("the owner's end", || stage.vm.ok(&["list"]).contains("without an owner"));
                assert_eq!((output.code, stage.start(&[]).code), (4, 0), "{what}");
            }
            Wish::BothDie => {
                assert_eq!(output.code, 4, "{what}");
                stage.vm.wait_for("the owner's end", || stage.vm.ok(&["list"]).contains("without an owner"));
                stage.vm.kill_process(qemu);
                stage.vm.ok(&["recover", "guest"]);
                stage.vm.nothing_left();
                is_whole(&stage, &what);
                assert_eq!(stage.start(&[]).code, 0, "{what}");
            }
        }
        let now = is_whole(&stage, &what);
        assert!(now == taken || now == taken + 1, "{what}");
        taken = now;
        runs_on_them(&stage, &what);
    }
    if wish == Wish::Fails {
        // A guest that can be frozen has a test of its own; by the last step the snapshot was taken, and that it is not settled is no failure.
        let elsewhere = ["freeze", "thaw", "settle"];
        let here: BTreeSet<String> =
            STEPS.iter().filter(|step| !elsewhere.contains(step)).map(ToString::to_string).collect();
        assert_eq!(met, here, "steps that were failed, and those that there are");
    } else {
        // record, intent, two overlays, two leases, four nodes, book, transaction, settle.
        assert_eq!(failed, 13, "steps");
    }
    assert_eq!(is_whole(&stage, "at the end"), taken + 1);
    runs_on_them(&stage, "at the end");
    stage.end();
}

/// The merge or pull that the journal knows of.
fn shortening(vm: &Vm) -> Option<launcher::work::merge::Shortening> {
    let journal = vm.root().join("run/guest/journal");
    let entries = launcher::journal::read_only::<Entry>(&journal).expect("the journal is readable");
    Memory::of(entries.map(|(_, entries)| entries).unwrap_or_default()).shortening
}

/// Snapshots a and b of a VM that does not run, something being written before each and after them.
fn two_snapshots(vm: &Vm, file: &str) {
    let change = |byte: u8| {
        for (image, format) in chain::tops(vm, file).values() {
            chain::write(vm, image, format, byte, &format!("{}k 96k", u32::from(byte) * 64));
        }
    };
    for (byte, name) in [(1, "a"), (2, "b")] {
        change(byte);
        vm.ok(&["snapshot", "create", file, name]);
    }
    change(3);
}

/// A merge or a pull ended as it was wished; whoever died has a successor, who has finished it beside whatever else happens.
fn is_picked_up(stage: &Stage, wish: Wish, qemu: i32, output: &Output, what: &str) {
    let vm = &stage.vm;
    match wish {
        _ if output.code == 0 => {}
        Wish::Fails => assert_eq!(output.code, 1, "{what}"),
        Wish::OwnerDies | Wish::BothDie => {
            vm.wait_for("the owner's end", || vm.ok(&["list"]).contains("without an owner"));
            if wish == Wish::BothDie {
                vm.kill_process(qemu);
                vm.ok(&["recover", "guest"]);
                vm.nothing_left();
            }
            assert_eq!((output.code, stage.start(&[]).code), (4, 0), "{what}");
            vm.wait_for("the end of the work", || shortening(vm).is_none());
        }
    }
}

/// What the disks of a VM are that does not run.
fn disks(vm: &Vm, file: &str) -> Vec<Vec<u8>> {
    chain::tops(vm, file).values().map(|(image, format)| chain::view(vm, image, format)).collect()
}

/// Two snapshots of both disks, one of which is deleted while the VM runs: the first, and a layer goes into the base; or the second, and what is
/// written goes into the layer below, on which the guest goes on.
fn each_step_of_a_merge(version: QemuVersion, wish: Wish, gone: &str) {
    let stage = prepared(version);
    let (vm, file) = (&stage.vm, stage.vm.config().display().to_string());
    let mut ends = 0;
    for number in 1..MANY {
        two_snapshots(vm, &file);
        let (states, before) = (chain::states(vm), disks(vm, &file));
        assert_eq!(stage.start(&[(wish.variable(), &format!("merge:{number}"))]).code, 0);
        let qemu = vm.qemu_pid();
        let output = vm.qvirt(&["snapshot", "delete", "guest", gone]);
        let what = format!("step {number}: {output}");
        is_picked_up(&stage, wish, qemu, &output, &what);
        chain::are_sound(vm);
        let now = chain::states(vm);
        assert!(now.iter().all(|(name, bytes)| states.get(name) == Some(bytes)), "{what}: {:?}", now.keys());
        assert!(now.len() == 2 || (now.len() == 4 && number == 1), "{what}: {:?}", now.keys());
        // A former owner's merge may still be finished by the next one.
        vm.kill_owner();
        assert_eq!(stage.start(&[]).code, 0, "{what}");
        vm.ok(&["kill", "guest"]);
        vm.nothing_left();
        assert!(disks(vm, &file) == before, "{what}: the disks are what they were");
        for name in ["a", "b"] {
            // The first name is gone but with the first step; either finishes what is left.
            vm.qvirt(&["snapshot", "delete", &file, name]);
        }
        assert!(overlays(&stage).is_empty(), "{what}: {:?}", overlays(&stage));
        if output.code == 0 {
            break;
        }
        ends += 1;
    }
    // forget; record, lease, commit, flush and book for each disk; complete and pivot instead of the flush where it is written.
    assert_eq!(ends, if gone == "a" { 11 } else { 13 }, "steps");
}

#[test]
fn merge_fails_on_qemu_7_2() {
    each_step_of_a_merge(QemuVersion::V7_2, Wish::Fails, "a");
}

#[test]
fn merge_of_what_is_written_loses_its_owner_on_qemu_7_2() {
    each_step_of_a_merge(QemuVersion::V7_2, Wish::OwnerDies, "b");
}

#[test]
fn merge_of_what_is_written_loses_both_on_qemu_10_0() {
    each_step_of_a_merge(QemuVersion::V10_0, Wish::BothDie, "b");
}

/// The layers of two snapshots between the one that is written and the base are pulled into it while the VM runs.
fn each_step_of_a_pull(version: QemuVersion, wish: Wish) {
    let stage = prepared(version);
    let (vm, file) = (&stage.vm, stage.vm.config().display().to_string());
    two_snapshots(vm, &file);
    let (states, top) = (chain::states(vm), chain::tops(vm, &file)["data"].0.clone());
    let disk = chain::view(vm, &top, "qcow2");
    assert_eq!(stage.start(&[]).code, 0);
    let mut ends = 0;
    for number in 1..MANY {
        stage.adopt(&[(wish.variable(), &format!("pull:{number}"))]);
        let qemu = vm.qemu_pid();
        let output = vm.qvirt(&["block", "pull", "guest", "data"]);
        let what = format!("step {number}: {output}");
        is_picked_up(&stage, wish, qemu, &output, &what);
        chain::are_sound(vm);
        assert!(chain::states(vm) == states && chain::view(vm, &top, "qcow2") == disk, "{what}");
        let check = vm.ok(&["chain", "check", &file]);
        assert!(!check.contains("data"), "{what}: {check}");
        runs_on_them(&stage, &what);
        if output.code == 0 || output.stderr.contains("nothing to pull") {
            break;
        }
        ends += 1;
        let blocks = vm.ok(&["blocks", "guest"]);
        if blocks.contains("data.b.qcow2 <- ") && !blocks.contains("data.a.qcow2") {
            // It was done already when its last step failed, or is done by the next owner.
            break;
        }
    }
    assert!(ends >= 4, "record, intent, stream, flush, book: {ends}");
    stage.end();
}

#[test]
fn pull_loses_both_on_qemu_7_2() {
    each_step_of_a_pull(QemuVersion::V7_2, Wish::BothDie);
}

/// The same of a VM that does not run: whoever takes the snapshot is who dies.
fn each_step_stopped(version: QemuVersion, wish: Wish) {
    let stage = prepared(version);
    let file = stage.vm.config().display().to_string();
    let (mut taken, mut failed) = (0, 0);
    for number in 1..MANY {
        let step = format!("snapshot:{number}");
        let output = stage
            .vm
            .qvirt_with(&[(wish.variable(), &step)], &["snapshot", "create", &file, &format!("s{number}")]);
        let what = format!("step {number}: {output}");
        if output.code == 0 {
            break;
        }
        failed += 1;
        if wish == Wish::Fails {
            assert!(output.code == 1 && output.stderr.contains("failed on purpose at snapshot"), "{what}");
        } else {
            assert_eq!(output.code, 128 + 9, "{what}");
            stage.vm.ok(&["recover", "guest"]);
        }
        stage.vm.nothing_left();
        let now = is_whole(&stage, &what);
        assert!(now == taken || now == taken + 1, "{what}");
        taken = now;
    }
    // intent, two overlays, book.
    assert_eq!(failed, 4, "steps");
    assert_eq!(is_whole(&stage, "at the end"), taken + 1);
    assert_eq!(stage.start(&[]).code, 0);
    runs_on_them(&stage, "started");
    stage.end();
}

/// A deletion in the middle of a chain, and a revert, of a VM that does not run: at whatever step they end, each disk and each snapshot is what it was, and
/// doing it again finishes.
fn each_step_of_a_chain(wish: Wish) {
    let stage = prepared(QemuVersion::V7_2);
    let (vm, file) = (&stage.vm, stage.vm.config().display().to_string());
    let run = |work: &str, number: u32, words: &[&str]| {
        let output = vm.qvirt_with(&[(wish.variable(), &format!("{work}:{number}"))], words);
        if output.code != 0 && wish != Wish::Fails {
            assert_eq!(output.code, 128 + 9, "{work} step {number}: {output}");
            vm.ok(&["recover", "guest"]);
        }
        vm.nothing_left();
        chain::are_sound(vm);
        output
    };
    let change = |byte: u8| {
        for (image, format) in chain::tops(vm, &file).values() {
            chain::write(vm, image, format, byte, &format!("{}k 96k", u32::from(byte) * 64));
        }
    };
    let mut ends = 0;
    for number in 1..MANY {
        for (byte, name) in [(1, "a"), (2, "b")] {
            vm.ok(&["snapshot", "create", &file, name]);
            change(byte);
        }
        let (before, mut states) = (disks(vm, &file), chain::states(vm));
        let output = run("tidy", number, &["snapshot", "delete", &file, "a"]);
        if number > 1 {
            states.retain(|state, _| !state.starts_with('a'));
        }
        assert!(disks(vm, &file) == before && chain::states(vm) == states, "step {number}: {output}");
        // Whatever is deleted next finishes it.
        vm.ok(&["snapshot", "delete", &file, "b"]);
        if number == 1 {
            vm.ok(&["snapshot", "delete", &file, "a"]);
        }
        assert!(
            overlays(&stage).is_empty() && disks(vm, &file) == before,
            "step {number}: {:?}",
            overlays(&stage)
        );
        if output.code == 0 {
            break;
        }
        ends += 1;
    }
    // forget; commit, rebase and book for each disk.
    assert_eq!(ends, 7, "steps");

    let before = disks(vm, &file);
    vm.ok(&["snapshot", "create", &file, "s4"]);
    for (image, format) in chain::tops(vm, &file).values() {
        chain::write(vm, image, format, 4, "0 1M");
    }
    let after = disks(vm, &file);
    for number in 1..MANY {
        let output = run("revert", number, &["snapshot", "revert", &file, "s4"]);
        let is_back = disks(vm, &file) == before;
        assert!(is_back || disks(vm, &file) == after, "step {number}: both disks or none: {output}");
        if output.code == 0 {
            assert!(is_back && number == 5, "intent, two overlays, book: {number}");
            break;
        }
        assert!(!is_back, "step {number}: {output}");
    }
    assert!(overlays(&stage).len() == 4, "{:?}", overlays(&stage));

    vm.ok(&["snapshot", "create", &file, "s5"]);
    let (before, states) = (disks(vm, &file), chain::states(vm));
    for number in 1..MANY {
        let output = run("pull", number, &["block", "pull", &file, "data"]);
        assert!(disks(vm, &file) == before && chain::states(vm) == states, "step {number}: {output}");
        // The header was changed by the third step, and the next one knows.
        let base = if number < 3 { "data.s4-2.qcow2" } else { "data.qcow2" };
        let blocks = vm.ok(&["blocks", &file]);
        assert!(
            blocks.contains(&format!("data.s5.qcow2 <- {}", vm.path(base).display())),
            "step {number}: {blocks}"
        );
        if number == 3 {
            break;
        }
    }
    let check = vm.qvirt(&["chain", "check", &file]).stdout;
    assert!(!check.contains("header"), "{check}");
}

#[test]
fn chain_of_a_stopped_vm_fails() {
    each_step_of_a_chain(Wish::Fails);
}

#[test]
fn chain_of_a_stopped_vm_dies() {
    each_step_of_a_chain(Wish::OwnerDies);
}

#[test]
fn fails_on_qemu_7_2() {
    each_step(QemuVersion::V7_2, Wish::Fails);
}

#[test]
fn fails_on_qemu_10_0() {
    each_step(QemuVersion::V10_0, Wish::Fails);
}

#[test]
fn owner_dies_on_qemu_7_2() {
    each_step(QemuVersion::V7_2, Wish::OwnerDies);
}

#[test]
fn owner_dies_on_qemu_10_0() {
    each_step(QemuVersion::V10_0, Wish::OwnerDies);
}

#[test]
fn owner_and_qemu_die_on_qemu_7_2() {
    each_step(QemuVersion::V7_2, Wish::BothDie);
}

#[test]
fn owner_and_qemu_die_on_qemu_10_0() {
    each_step(QemuVersion::V10_0, Wish::BothDie);
}

#[test]
fn stopped_vm_fails() {
    each_step_stopped(QemuVersion::V10_0, Wish::Fails);
}

#[test]
fn stopped_vm_dies() {
    each_step_stopped(QemuVersion::V10_0, Wish::OwnerDies);
}

mod soak {
    use super::*;

    #[test]
    fn merge_loses_its_owner_on_qemu_10_0() {
        each_step_of_a_merge(QemuVersion::V10_0, Wish::OwnerDies, "a");
    }

    #[test]
    fn merge_loses_both_on_qemu_7_2() {
        each_step_of_a_merge(QemuVersion::V7_2, Wish::BothDie, "a");
    }

    #[test]
    fn merge_of_what_is_written_fails_on_qemu_10_0() {
        each_step_of_a_merge(QemuVersion::V10_0, Wish::Fails, "b");
    }

    #[test]
    fn pull_fails_on_qemu_7_2() {
        each_step_of_a_pull(QemuVersion::V7_2, Wish::Fails);
    }

    #[test]
    fn pull_loses_its_owner_on_qemu_10_0() {
        each_step_of_a_pull(QemuVersion::V10_0, Wish::OwnerDies);
    }
}
