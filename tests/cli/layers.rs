//! `qvirt block commit` and `qvirt block pull` where no guest is needed.

use serde_json::Value;
use tests::chain;

use crate::scene::{edit, file, refused, said, start_paused};
use crate::snapshot::{five, now, overlays, vm};

/// Layers go into one below them, of a VM that does not run and of one that does; but no snapshot is destroyed unasked.
#[test]
fn layers_are_committed() {
    let vm = vm();
    let target = file(&vm);
    let at = |name: &str| vm.path(name).display().to_string();
    refused(
        &vm,
        3,
        &["block", "commit", &target, "data"],
        "disk data: qvirt made no layer of DIR/data.qcow2, so there is nothing to commit: `qvirt blocks` shows its chain",
    );
    let (disks, mut states) = five(&vm);
    let (low, high, other) = (at("data.s1.qcow2"), at("data.s3.qcow2"), at("sys.img"));
    let commit = |words: &[&str]| {
        let all: Vec<String> =
            ["block", "commit", &target, "data"].iter().chain(words).map(ToString::to_string).collect();
        all
    };
    for (words, reason) in [
        (
            ["--base", &low, "--top", &high],
            "that would destroy what snapshots s2, s3 kept: `qvirt snapshot delete` them, or let --delete-snapshots do so",
        ),
        (
            ["--base", &high, "--top", &low],
            "DIR/data.s1.qcow2 does not stand above DIR/data.s3.qcow2: exchange --top and --base",
        ),
        (
            ["--base", &other, "--speed", "1MiB"],
            "DIR/sys.img is no layer of it that qvirt made, nor the image below those: it has DIR/data.s5.qcow2, DIR/data.s4.qcow2, DIR/data.s3.qcow2, \
             DIR/data.s2.qcow2, DIR/data.s1.qcow2, DIR/data.qcow2",
        ),
    ] {
        let words = commit(&words);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        refused(&vm, 3, &words, &format!("disk data: {reason}"));
    }
    assert!(now(&vm) == disks && chain::states(&vm) == states, "nothing was changed");
    let words = commit(&["--base", &low, "--top", &high, "--delete-snapshots"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert_eq!(
        said(&vm, &vm.ok(&words)),
        "snapshot s2 of guest is deleted\nsnapshot s3 of guest is deleted\ndata of guest: its layers went into DIR/data.s1.qcow2\n"
    );
    states.retain(|state, _| !state.starts_with("s2") && !state.starts_with("s3"));
    assert!(now(&vm) == disks && chain::states(&vm) == states, "nothing but the two is gone");
    chain::are_sound(&vm);
    start_paused(&vm);
    refused(
        &vm,
        3,
        &["block", "commit", "guest", "data"],
        "disk data: that would destroy what snapshots s1, s4, s5 kept: `qvirt snapshot delete` them, or let --delete-snapshots do so",
    );
    let lines = vm.ok(&["block", "commit", "guest", "data", "--delete-snapshots", "--json"]);
    let lines: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert_eq!(lines.last(), Some(&serde_json::json!({"deleted": ["s1", "s4", "s5"]})));
    let is_job = |line: &Value| line["id"] == "data-merge" || line["id"] == "sys-merge";
    assert!(lines.iter().rev().skip(1).all(is_job), "{lines:?}");
    assert_eq!(overlays(&vm), [""; 0], "both disks stand on the images that the config names");
    vm.end();
    assert!(now(&vm) == disks, "the disks are as they were");
}

/// The uppermost layer gets what others have, of a VM that does not run and of one that does; snapshots keep what they kept.
#[test]
fn layers_are_pulled() {
    let vm = vm();
    let target = file(&vm);
    let at = |name: &str| vm.path(name).display().to_string();
    let (first, base, other) = (at("data.s1.qcow2"), at("data.qcow2"), at("sys.img"));
    refused(
        &vm,
        3,
        &["block", "pull", &target, "data"],
        "data: base = nothing is refused: the uppermost layer stands on it already, so there is nothing to pull",
    );
    let (disks, states) = five(&vm);
    for words in [["--base", &other], ["--base", &at("ro.img")]] {
        refused(
            &vm,
            3,
            &[&["block", "pull", &target, "data"][..], &words].concat(),
            "disk data: a start from DIR/data.qcow2, which its config names, finds the disk by what stands on that image: pull no further than --base \
             DIR/data.qcow2, or commit into it",
        );
    }
    let is_as_before = |what: &str| {
        assert!(now(&vm) == disks && chain::states(&vm) == states, "{what}");
        chain::are_sound(&vm);
        let check = vm.ok(&["chain", "check", &target]);
        assert!(!check.contains("header"), "{what}: {check}");
    };
    assert_eq!(
        said(&vm, &vm.ok(&["block", "pull", &target, "data", "--base", &first])),
        "data of guest: its uppermost layer stands on DIR/data.s1.qcow2\n"
    );
    is_as_before("while it does not run");
    start_paused(&vm);
    let lines = vm.ok(&["block", "pull", "guest", "data", "--json"]);
    let last: Value = serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last, serde_json::json!({"id": "data", "base": base}));
    let blocks = said(&vm, &vm.ok(&["blocks", "guest"]));
    assert!(blocks.contains("DIR/data.s5.qcow2 <- DIR/data.qcow2\n"), "{blocks}");
    refused(
        &vm,
        3,
        &["block", "pull", "guest", "data"],
        "data: base = DIR/data.qcow2 is refused: the uppermost layer stands on it already, so there is nothing to pull",
    );
    vm.end();
    is_as_before("while it runs");
    for name in ["s5", "s1", "s4", "s2", "s3"] {
        vm.ok(&["snapshot", "delete", &target, name]);
        assert!(now(&vm) == disks, "without {name}");
        chain::are_sound(&vm);
    }
    assert_eq!(overlays(&vm), [""; 0]);
    vm.nothing_left();
}

/// An image of the user's own that stands on another one comes to stand alone.
#[test]
fn an_image_is_made_to_stand_alone() {
    let vm = vm();
    let (template, target) = (vm.path("data.qcow2").display().to_string(), file(&vm));
    let own = vm.path("own.qcow2").display().to_string();
    chain::write(&vm, &template, "qcow2", 7, "64k 64k");
    for running in [false, true] {
        chain::qemu_img(&vm, &["create", "-q", "-f", "qcow2", "-b", &template, "-F", "qcow2", &own]);
        edit(&vm, "data.qcow2", "own.qcow2");
        let before = chain::view(&vm, &own, "qcow2");
        if running {
            start_paused(&vm);
        }
        let said = vm.ok(&["block", "pull", if running { "guest" } else { &target }, "data"]);
        assert_eq!(said, "data of guest: its uppermost layer stands on nothing\n");
        if running {
            vm.end();
        }
        assert_eq!(launcher::image::backing_of(std::path::Path::new(&own)).expect("a header"), None);
        assert!(chain::view(&vm, &own, "qcow2") == before, "the disk is what it was");
        edit(&vm, "own.qcow2", "data.qcow2");
    }
    vm.nothing_left();
}

/// What a revert left, and a snapshot needs, stands on the image as well.
#[test]
fn a_branch_is_in_the_way_of_a_commit() {
    let vm = vm();
    let target = file(&vm);
    for words in [["create", "a"], ["create", "b"], ["revert", "a"]] {
        vm.ok(&["snapshot", words[0], &target, words[1]]);
    }
    refused(
        &vm,
        3,
        &["block", "commit", &target, "data", "--delete-snapshots"],
        "disk data: overlay DIR/data.a.qcow2 stands on DIR/data.qcow2 as well, for snapshot b: delete what it is for first",
    );
    vm.ok(&["snapshot", "delete", &target, "b"]);
    vm.ok(&["block", "commit", &target, "data", "--delete-snapshots"]);
    assert_eq!(overlays(&vm), [""; 0]);
    vm.nothing_left();
}

/// Overlays are a chain's, and not of the VM of whose snapshots they were made: another file of the same disk pulls as well.
#[test]
fn a_vm_of_another_name_pulls() {
    let vm = vm();
    let (disks, states) = five(&vm);
    edit(&vm, "name = \"guest\"", "name = \"other\"");
    vm.ok(&["block", "pull", &file(&vm), "data"]);
    edit(&vm, "name = \"other\"", "name = \"guest\"");
    assert!(now(&vm) == disks && chain::states(&vm) == states, "all is as it was");
    let book = std::fs::read_to_string(vm.root().join("lib/snapshots.toml")).expect("the book");
    assert!(!book.contains("pulling"), "{book}");
    for name in ["s1", "s2", "s3", "s4", "s5"] {
        vm.ok(&["snapshot", "delete", &file(&vm), name]);
    }
    assert!(now(&vm) == disks, "the disks are as they were");
    assert_eq!(overlays(&vm), [""; 0]);
    vm.nothing_left();
}
