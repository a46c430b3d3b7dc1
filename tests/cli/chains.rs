//! `qvirt chain check`: what is wrong with chains of images, found and mended.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use tests::chain;
use tests::qemu::images;
use tests::vm::Vm;

use crate::scene::{bare, file, refused, said, start_paused};

/// A VM with two disks and snapshots one and two of both.
fn vm() -> Vm {
    let vm = bare(
        "[[disk]]\nid = \"sys\"\npath = \"sys.img\"\n[[disk]]\nid = \"data\"\npath = \"data.qcow2\"\nformat = \"qcow2\"\nbus = \"scsi\"\n",
    );
    vm.raw("sys.img", 4, "sys");
    vm.qcow2("data.qcow2", Ok(8));
    for (byte, name) in [(1, "one"), (2, "two")] {
        vm.ok(&["snapshot", "create", &file(&vm), name]);
        for (image, format) in chain::tops(&vm, &file(&vm)).values() {
            chain::write(&vm, image, format, byte, &format!("{}k 96k", u32::from(byte) * 64));
        }
    }
    vm
}

/// What a check says, which ends with that exit code.
fn check(vm: &Vm, code: i32, more: &[&str]) -> String {
    let output = vm.expect(code, &[&["chain", "check", &file(vm)], more].concat());
    assert_eq!(output.stderr, "", "{output}");
    said(vm, &output.stdout)
}

fn is_fine(vm: &Vm) {
    assert_eq!(check(vm, 0, &[]), "the chains of guest are as they should be\n");
    chain::are_sound(vm);
    vm.nothing_left();
}

#[test]
fn what_a_running_qemu_has_open() {
    let vm = vm();
    start_paused(&vm);
    let fine = "the chains of guest are as they should be\n";
    assert_eq!(check(&vm, 0, &[]), fine);

    // A disk that was plugged in takes part.
    let image = vm.raw("more.img", 1, "x");
    vm.ok(&["attach", "guest", "--disk", &format!("path={image},id=more")]);
    vm.ok(&["snapshot", "create", "guest", "three"]);
    assert_eq!(check(&vm, 0, &[]), fine);
    let top = vm.path("more.three.qcow2");
    std::fs::rename(&top, vm.path("away")).expect("it was made");
    let gone = check(&vm, 1, &[]);
    assert!(
        gone.contains("more: overlay DIR/more.three.qcow2 is gone\n")
            && gone.contains(
                "more: image DIR/more.three.qcow2 is gone, and QEMU still has it open (node more-2-file): "
            ),
        "{gone}"
    );
    std::fs::rename(vm.path("away"), &top).expect("it is put back");

    // Nodes that somebody made and forgot, one of them named like a disk's.
    for (node, name) in [("mine", "a.img"), ("former-1-file", "b.img")] {
        let node = serde_json::json!({"driver": "file", "node-name": node, "filename": vm.raw(name, 1, "x")});
        vm.qmp("blockdev-add", &node);
    }
    let words = |end: &str| {
        format!(
            "QEMU has image DIR/a.img open (node mine), which is of no disk: {end}\n\
             QEMU has image DIR/b.img open (node former-1-file), which is of no disk: {end}\n"
        )
    };
    assert_eq!(check(&vm, 1, &[]), words("--repair would have QEMU close it"));
    assert_eq!(check(&vm, 0, &["--repair"]), words("done: have QEMU close it"));
    assert_eq!(check(&vm, 0, &[]), fine);
    vm.ok(&["kill", "guest"]);
    is_fine(&vm);
}

#[test]
fn the_book_is_lost() {
    let vm = vm();
    is_fine(&vm);
    let (tops, states) = (chain::tops(&vm, &file(&vm)), chain::states(&vm));
    std::fs::remove_file(vm.root().join("lib/snapshots.toml")).expect("it was there");
    assert_eq!(
        check(&vm, 1, &[]),
        "sys: image DIR/sys.img has overlays that are not known, the uppermost of them DIR/sys.two.qcow2: --repair would start from DIR/sys.two.qcow2, \
         with snapshots one, two\n\
         data: image DIR/data.qcow2 has overlays that are not known, the uppermost of them DIR/data.two.qcow2: --repair would start from \
         DIR/data.two.qcow2, with snapshots one, two\n"
    );
    assert!(
        check(&vm, 0, &["--repair"])
            .contains("DIR/sys.two.qcow2: done: start from DIR/sys.two.qcow2, with snapshots one, two\n")
    );
    assert!(
        chain::tops(&vm, &file(&vm)) == tops && chain::states(&vm) == states,
        "all but times and descriptions is back"
    );
    is_fine(&vm);

    // In branches only a person knows which one is meant.
    vm.ok(&["snapshot", "revert", &file(&vm), "one"]);
    std::fs::remove_file(vm.root().join("lib/snapshots.toml")).expect("it was there");
    let branches = check(&vm, 1, &["--repair"]);
    assert!(
        branches.contains(
            "sys: image DIR/sys.img has overlays that are not known, in branches: name the one to start from in the config: DIR/sys.one-2.qcow2, \
             DIR/sys.two.qcow2\n"
        ),
        "{branches}"
    );
    vm.nothing_left();
}

#[test]
fn what_a_dead_one_left() {
    let vm = vm();
    let (target, states) = (file(&vm), chain::states(&vm));
    let dies = |step: &str, words: &[&str]| {
        let output = vm.qvirt_with(&[("QVIRT_DIE_STEP", step)], words);
        assert_eq!(output.code, 128 + 9, "{output}");
    };
    // At the second overlay.
    dies("snapshot:3", &["snapshot", "create", &target, "three"]);
    let unfinished = "an overlay was not finished, or not removed";
    assert_eq!(check(&vm, 1, &[]), format!("{unfinished}: --repair would remove what was not finished\n"));
    check(&vm, 0, &["--repair"]);
    is_fine(&vm);
    assert!(chain::states(&vm) == states);
    // Between the headers and the book.
    dies("tidy:4", &["snapshot", "delete", &target, "one"]);
    let idle = check(&vm, 1, &[]);
    assert!(
        idle.contains("has a layer that is of no use any more: --repair would merge and remove it\n"),
        "{idle}"
    );
    check(&vm, 0, &["--repair"]);
    is_fine(&vm);
    assert_eq!(chain::states(&vm).len(), 2);
    assert!(chain::states(&vm).iter().all(|(name, bytes)| states.get(name) == Some(bytes)));
}

#[test]
fn images_that_are_not_as_they_were() {
    let vm = vm();
    let target = file(&vm);
    // One that a revert left behind, and somebody removed.
    vm.ok(&["snapshot", "revert", &target, "two"]);
    std::fs::remove_file(vm.path("sys.two.qcow2")).expect("it was there");
    assert_eq!(
        check(&vm, 1, &[]),
        "sys: overlay DIR/sys.two.qcow2 is gone: --repair would forget DIR/sys.two.qcow2\n"
    );
    start_paused(&vm);
    refused(
        &vm,
        3,
        &["chain", "check", &target, "--repair"],
        "VM guest runs, and its chains are mended only while it does not: shut it down first",
    );
    vm.end();
    check(&vm, 0, &["--repair"]);
    is_fine(&vm);

    // One that is needed, one whose header leads elsewhere, and a base that is another file: a person has to.
    let overlay = vm.path("sys.one.qcow2");
    std::fs::rename(&overlay, vm.path("kept")).expect("renamed");
    assert_eq!(check(&vm, 1, &["--repair"]), "sys: overlay DIR/sys.one.qcow2 is gone\n");
    std::fs::rename(vm.path("kept"), &overlay).expect("renamed");
    let says = |format: &str| {
        let (base, overlay) = (vm.path("sys.img").display().to_string(), overlay.display().to_string());
        chain::qemu_img(&vm, &["rebase", "-u", "-b", &base, "-F", format, &overlay]);
    };
    says("qcow2");
    assert_eq!(
        check(&vm, 1, &["--repair"]),
        "sys: the header of DIR/sys.one.qcow2 says that DIR/sys.img is qcow2, and it is raw: mend it with `qemu-img rebase -u -b DIR/sys.img -F raw \
         DIR/sys.one.qcow2`\n"
    );
    says("raw");
    let other = vm.raw("other.img", 4, "other");
    let rebase = |below: &str| {
        let mut command = std::process::Command::new(images().qemu_img(vm.version()));
        command.args(["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", below]).arg(&overlay);
        assert!(command.status().expect("qemu-img").success());
    };
    rebase(&other);
    assert_eq!(
        check(&vm, 1, &["--repair"]),
        "sys: the header of DIR/sys.one.qcow2 names DIR/other.img below it, and it was made on DIR/sys.img\n"
    );
    rebase(&vm.path("sys.img").display().to_string());
    is_fine(&vm);
    std::fs::rename(vm.path("sys.img"), vm.path("kept.img")).expect("renamed");
    vm.raw("sys.img", 4, "another");
    let replaced = check(&vm, 1, &[]);
    assert!(replaced.starts_with("sys: DIR/sys.img is another file than the one that its overlays were made on: put that one back; or,"), "{replaced}");
}

/// Whatever would use the chain says which image is in the way, and why; nothing is changed.
#[test]
fn a_layer_is_away_or_damaged_or_in_use() {
    let vm = vm();
    let (target, layer, kept) = (file(&vm), vm.path("sys.one.qcow2"), vm.path("kept"));
    let (tops, states) = (chain::tops(&vm, &target), chain::states(&vm));
    let each_says = |what: &str| {
        for words in [
            &["start", &target][..],
            &["snapshot", "create", &target, "three"],
            &["snapshot", "revert", &target, "one"],
            &["snapshot", "delete", &target, "one"],
            &["block", "commit", &target, "sys", "--delete-snapshots"],
            &["block", "pull", &target, "sys"],
        ] {
            let output = vm.expect(2, words);
            let text = said(&vm, &output.stderr);
            assert!(text.contains(&format!("image DIR/sys.one.qcow2{what}")), "{words:?}: {text}");
        }
        let found = check(&vm, 1, &[]);
        assert!(found.contains("sys.one.qcow2"), "{found}");
        vm.nothing_left();
    };
    std::fs::rename(&layer, &kept).expect("renamed");
    each_says(" cannot be opened: No such file or directory");
    std::fs::write(&layer, "no image").expect("written");
    each_says(": it is no qcow2 image");
    std::fs::rename(&kept, &layer).expect("renamed");
    is_fine(&vm);
    assert!(chain::tops(&vm, &target) == tops && chain::states(&vm) == states, "all is as it was");

    let mut other = Command::new(images().qemu_io(vm.version()));
    other.args(["-f", "qcow2", "-c", "sleep 600000"]).arg(&layer).stdin(Stdio::null());
    let mut other = other.spawn().expect("qemu-io starts");
    let locks = || std::fs::read_to_string("/proc/locks").expect("read");
    let inode = format!(":{} ", std::fs::metadata(&layer).expect("there").ino());
    vm.wait_for("its lock", || locks().contains(&inode));
    let output = vm.expect(1, &["snapshot", "delete", &target, "one"]);
    // It is ours and not reaped.
    other.kill().expect("it sleeps");
    other.wait().expect("it is our child");
    let text = said(&vm, &output.stderr);
    assert!(
        text.starts_with("qvirt: DIR/sys.one.qcow2: qemu-img commit failed, and the disk is as it was:")
            && text.contains("Is another process using the image"),
        "{text}"
    );
    assert!(chain::tops(&vm, &target) == tops, "the disks are as they were");
    assert!(check(&vm, 1, &[]).contains("--repair would merge and remove it"), "what is left to do");
    check(&vm, 0, &["--repair"]);
    is_fine(&vm);
}
