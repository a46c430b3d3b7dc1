//! A snapshot that fails at each of its steps, or whose owner dies there, with QEMU or without: the VM has the former chain or the new one, whole, and
//! nothing beside it.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use launcher::snapshot::Store;
use launcher::work::snapshot::STEPS;
use tests::qemu::{QemuVersion, images};
use tests::vm::finished;

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
    for name in &known {
        let mut check = Command::new(images().qemu_img(stage.vm.version()));
        check
            .args(["check", "-q", "-U"])
            .arg(stage.vm.path(name))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = finished(check.spawn().expect("qemu-img starts"));
        assert_eq!(output.code, 0, "{what}: {name}: {output}");
    }
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
