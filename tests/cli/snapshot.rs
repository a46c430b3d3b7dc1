//! `qvirt snapshot` and `qvirt blocks` where no guest is needed: what is refused, VMs that do not run, what is printed, and what nobody may open any more.

use std::collections::BTreeMap;

use serde_json::Value;
use tests::chain;
use tests::vm::Vm;

use crate::scene::{bare, edit, file, refused, said, start_paused};

const TABLES: &str = "[[disk]]\nid = \"sys\"\npath = \"sys.img\"\n[[disk]]\nid = \"data\"\npath = \"data.qcow2\"\nformat = \"qcow2\"\nbus = \"scsi\"\n\
                      [[disk]]\nid = \"ro\"\npath = \"ro.img\"\nread_only = true\n[[disk]]\nid = \"cd\"\ndevice = \"cdrom\"\n";

pub fn vm() -> Vm {
    let vm = bare(TABLES);
    vm.raw("sys.img", 4, "sys");
    vm.raw("ro.img", 1, "ro");
    vm.qcow2("data.qcow2", Ok(8));
    vm
}

pub fn json(vm: &Vm, arguments: &[&str]) -> Value {
    serde_json::from_str(&vm.ok(arguments)).expect("it is JSON")
}

/// The images in the VM's folder, without those of its config.
pub fn overlays(vm: &Vm) -> Vec<String> {
    let files = std::fs::read_dir(vm.path("")).expect("the folder").flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| name.ends_with(".qcow2") && name != "data.qcow2").collect();
    names.sort();
    names
}

#[test]
fn running_and_stopped() {
    let vm = vm();
    start_paused(&vm);
    let made = vm.ok(&["snapshot", "create", "guest", "one", "--description", "before the change"]);
    assert_eq!(
        said(&vm, &made),
        "guest has snapshot one\nsys writes to DIR/sys.one.qcow2 from now on\ndata writes to DIR/data.one.qcow2 from now on\n"
    );
    let blocks = said(&vm, &vm.ok(&["blocks", "guest"]));
    assert_eq!(
        blocks,
        "DISK  TARGET  FORMAT  SIZE  I/O  SNAPSHOT  SOURCE\n\
         sys   vda     qcow2   4MiB  ok   one       DIR/sys.one.qcow2 <- DIR/sys.img\n\
         data  sda     qcow2   8MiB  ok   one       DIR/data.one.qcow2 <- DIR/data.qcow2\n\
         ro    vdb     raw     1MiB  ok   -         DIR/ro.img\n\
         cd    sdb     -       -     ok   -         -\n"
    );
    vm.end();

    // A VM that was never defined starts from where it was, and says so; so does a check.
    let check = vm.qvirt(&["check", &file(&vm)]);
    assert!(
        said(&vm, &check.stderr)
            .contains("warning: sys: starts from DIR/sys.one.qcow2, the top of the chain on DIR/sys.img"),
        "{check}"
    );
    let made = vm.ok(&["snapshot", "create", &file(&vm), "two", "--disk", "vda"]);
    assert_eq!(said(&vm, &made), "guest has snapshot two\nsys writes to DIR/sys.two.qcow2 from now on\n");
    let blocks = said(&vm, &vm.ok(&["blocks", &file(&vm)]));
    assert!(
        blocks.contains("sys   vda     qcow2   4MiB  -    two       DIR/sys.two.qcow2 <- DIR/sys.one.qcow2 <- DIR/sys.img\n")
            && blocks.contains("data  sda     qcow2   8MiB  -    one       DIR/data.one.qcow2 <- DIR/data.qcow2\n"),
        "{blocks}"
    );
    vm.nothing_left();
    let started = said(&vm, &vm.ok(&["start", "--paused", &file(&vm)]));
    assert_eq!(
        started,
        "sys: starts from DIR/sys.two.qcow2, the top of the chain on DIR/sys.img\n\
         data: starts from DIR/data.one.qcow2, the top of the chain on DIR/data.qcow2\nguest is starting, paused\n"
    );
    // Of an image that lies elsewhere, and by another owner.
    vm.ok(&["leave", "guest"]);
    vm.start();
    std::fs::create_dir(vm.path("sub")).expect("a folder");
    vm.ok(&["snapshot", "create", "guest", "three", "--exclude", "data", "--disk", "sys=sub/x.qcow2"]);
    let blocks = json(&vm, &["blocks", "guest", "--json"]);
    assert_eq!(blocks[0]["source"], vm.path("sub/x.qcow2").display().to_string());
    assert_eq!(blocks[0]["backing"].as_array().map(Vec::len), Some(3));
    chain::are_sound(&vm);
    vm.end();
    chain::are_sound(&vm);
}

#[test]
fn listed_and_shown() {
    let vm = vm();
    assert_eq!(
        said(&vm, &vm.expect(5, &["snapshot", "list", "guest"]).stderr),
        "qvirt: there is no VM guest: known are none; `qvirt define FILE` stores one\n"
    );
    vm.ok(&["snapshot", "create", &file(&vm), "one", "--description", "some words"]);
    vm.ok(&["snapshot", "create", &file(&vm), "two", "--disk", "data"]);
    assert_eq!(vm.ok(&["snapshot", "list", "guest", "--tree"]), "one\n  two\n");
    let list = vm.ok(&["snapshot", "list", "guest"]);
    let lines: Vec<&str> = list.lines().collect();
    assert!(
        lines[0].starts_with("NAME  CREATED                  STATE    DISKS     PARENT  ON DISK"),
        "{list}"
    );
    assert!(lines[1].starts_with("one   20") && lines[1].contains("stopped  sys,data  -"), "{list}");
    assert!(lines[2].starts_with("two   20") && lines[2].contains("stopped  data      one"), "{list}");
    let all = json(&vm, &["snapshot", "list", "guest", "--json"]);
    assert_eq!((&all[0]["name"], &all[1]["parent"]), (&"one".into(), &"one".into()));
    let shown = said(&vm, &vm.ok(&["snapshot", "show", "guest", "one"]));
    assert!(shown.contains("description: some words\n"), "{shown}");
    assert!(shown.contains("disk sys: DIR/sys.img (raw), "), "{shown}");
    assert!(shown.contains("disk data: written to DIR/data.one.qcow2 since, "), "{shown}");
    let one = json(&vm, &["snapshot", "show", "guest", "one", "--json"]);
    assert_eq!(
        (&one["disks"][0]["is-current"], &one["disks"][1]["is-current"]),
        (&true.into(), &false.into())
    );
    refused(
        &vm,
        5,
        &["snapshot", "show", "guest", "three"],
        "VM guest has no snapshot three: it has one, two",
    );
    vm.nothing_left();
}

#[test]
fn wishes_that_are_refused() {
    let vm = vm();
    let target = file(&vm);
    let stopped = |words: &[&str], error: &str| {
        refused(&vm, 3, &[&["snapshot", "create", &target], words].concat(), error);
    };
    stopped(
        &["--quiesce"],
        "--quiesce needs a guest that runs, and VM guest does not: leave it out, its disks are as quiet as they can be",
    );
    stopped(
        &["--disk", "cd"],
        "cd: snapshot = of a CD-ROM drive is refused: it is only read, so there is nothing to keep: leave it out",
    );
    vm.ok(&["snapshot", "create", &target, "one"]);
    start_paused(&vm);
    let before = (overlays(&vm), vm.status()["devices"].clone(), vm.leases());
    let running = |words: &[&str], code: i32, error: &str| {
        refused(&vm, code, &[&["snapshot", "create", "guest"], words].concat(), error);
    };
    running(
        &["one"],
        3,
        "snapshot one of VM guest exists already: take another name, or delete it with `qvirt snapshot delete guest one`",
    );
    running(&["--disk", "other"], 3, "there is no device other: this VM has scsi0, sys, data, ro, cd");
    running(
        &["--disk", "ro"],
        3,
        "ro: snapshot = of a read-only disk is refused: it is only read, so there is nothing to keep: leave it out",
    );
    running(
        &["--disk", "scsi0"],
        3,
        "scsi0: snapshot = of a scsi_controller is refused: only disks have snapshots: name one by its id or target label",
    );
    running(&["--disk", "sys", "--disk", "vda"], 3, "disk sys is named twice: name each disk once");
    running(
        &["--disk", "sys", "--exclude", "vda"],
        3,
        "disk sys is named and excluded: leave one of the two out",
    );
    running(
        &["--exclude", "sys", "--exclude", "data"],
        3,
        "VM guest has no disk that is written, so there is nothing to take a snapshot of",
    );
    running(
        &["--disk", "sys=ro.img"],
        3,
        "overlay DIR/ro.img exists already: take another name, or give the disk another file with --disk ID=FILE",
    );
    running(
        &["--disk", "sys=x.qcow2", "--disk", "data=x.qcow2"],
        3,
        "overlays of two disks would be DIR/x.qcow2: give one of them another file with --disk ID=FILE",
    );
    running(
        &["--disk", "sys=gone/x.qcow2"],
        3,
        "DIR/gone: No such file or directory (os error 2); check it, and the rights on it",
    );
    running(
        &["--quiesce"],
        3,
        "the VM is starting, so its guest cannot be asked to be quiet: leave --quiesce out, or let it run first",
    );
    let bad = vm.expect(2, &["snapshot", "create", "guest", "a/b"]);
    assert!(bad.stderr.contains("\"a/b\" is no name of a snapshot"), "{bad}");
    assert_eq!((overlays(&vm), vm.status()["devices"].clone(), vm.leases()), before);
    vm.ok(&["resume", "guest"]);
    vm.wait_for("the running VM", || vm.status()["state"] == "running");
    running(
        &["two", "--quiesce"],
        3,
        "the VM has no channel to a guest agent: write [[channel]] guest_agent = true into its config, or leave --quiesce out",
    );
    vm.end();
}

#[test]
fn disks_that_can_have_none() {
    let vm = bare(
        "[[disk]]\nid = \"sys\"\npath = \"sys.img\"\non_error = { read = \"retry\", write = \"retry\", engine = \"proxy\" }\n",
    );
    vm.raw("sys.img", 4, "sys");
    start_paused(&vm);
    refused(
        &vm,
        3,
        &["snapshot", "create", "guest"],
        "sys: snapshot = while its images are behind an io-proxy is refused: a proxy serves the images that it was started with, and the overlay would be outside of it: \
         stop the VM first, use on_error.engine = \"hold\", or leave it out with --exclude",
    );
    vm.end();
    // A VM that does not run has no proxy; then its proxy serves the overlay, and what is below.
    vm.ok(&["snapshot", "create", &file(&vm), "one"]);
    start_paused(&vm);
    let words = vm.proxies()[0].1.clone();
    let images = [vm.path("sys.one.qcow2"), vm.path("sys.img")].map(|path| path.display().to_string());
    assert!(words.contains(&images[0]) && words.contains(&format!("--below {}", images[1])), "{words}");
    vm.end();
}

/// A sparse image whose worst case no file system here has room for.
#[test]
fn room_for_what_the_guest_could_write() {
    let vm = bare("[[disk]]\nid = \"big\"\npath = \"big.qcow2\"\nformat = \"qcow2\"\n");
    vm.qcow2("big.qcow2", Ok(64 << 20));
    let target = file(&vm);
    for running in [false, true] {
        if running {
            start_paused(&vm);
        }
        let vm_word = if running { "guest" } else { &target };
        let refused = vm.expect(3, &["snapshot", "create", vm_word, "one"]);
        let text = said(&vm, &refused.stderr);
        assert!(
            text.starts_with("qvirt: no room: DIR/big.one.qcow2 may take ")
                && text.contains(" on the file system of DIR, which has ")
                && text.ends_with(" left: free some, or take the risk with --sparse\n"),
            "{text}"
        );
        assert!(!vm.path("big.one.qcow2").exists());
        let name = format!("{running}");
        vm.ok(&["snapshot", "create", vm_word, &name, "--sparse"]);
    }
    vm.end();
}

/// Whoever would write an image that has overlays starts from the top, or is refused.
#[test]
fn images_below_an_overlay_are_not_written() {
    let vm = vm();
    vm.ok(&["snapshot", "create", &file(&vm), "one"]);
    vm.ok(&["snapshot", "create", &file(&vm), "two"]);
    let below = "it is the state of snapshot two of VM guest, and overlay DIR/sys.two.qcow2 stands on it: writing it would destroy both; name \
                 DIR/sys.img, from whose current top a VM starts, or open it with read_only = true";
    let original = std::fs::read_to_string(vm.config()).expect("the VM file");

    // By another VM, in a config and by a plug; by a link; and for reading.
    edit(&vm, "\"guest\"", "\"other\"");
    edit(&vm, "\"sys.img\"", "\"sys.one.qcow2\"\nformat = \"qcow2\"");
    refused(
        &vm,
        2,
        &["check", &file(&vm)],
        &format!("config DIR/guest.toml, line 7: image DIR/sys.one.qcow2: {below}"),
    );
    edit(
        &vm,
        "format = \"qcow2\"\n[[disk]]\nid = \"data\"",
        "format = \"qcow2\"\nread_only = true\n[[disk]]\nid = \"data\"",
    );
    vm.ok(&["check", &file(&vm)]);
    std::fs::hard_link(vm.path("sys.img"), vm.path("link.img")).expect("a link");
    std::fs::write(vm.config(), original.replace("\"guest\"", "\"other\"").replace("sys.img", "link.img"))
        .expect("written");
    let check = vm.qvirt(&["check", &file(&vm)]);
    assert!(
        said(&vm, &check.stderr)
            .contains("sys: starts from DIR/sys.two.qcow2, the top of the chain on DIR/link.img"),
        "{check}"
    );
    std::fs::write(vm.config(), &original).expect("written");
    start_paused(&vm);
    refused(
        &vm,
        3,
        &["attach", "guest", "--disk", "path=sys.one.qcow2,format=qcow2"],
        &format!("image DIR/sys.one.qcow2: {below}"),
    );
    vm.end();

    // A base that is another file now, and a chain that leads elsewhere.
    std::fs::remove_file(vm.path("link.img")).expect("removed");
    std::fs::rename(vm.path("sys.img"), vm.path("kept.img")).expect("renamed");
    vm.raw("sys.img", 4, "another");
    refused(
        &vm,
        2,
        &["check", &file(&vm)],
        "config DIR/guest.toml, line 7: image DIR/sys.img: it is not the file that overlay DIR/sys.two.qcow2 was made on, which has been replaced: put the \
         former one back, or, if the snapshots are of no use any more, `qvirt chain check` says what to do",
    );
    std::fs::rename(vm.path("kept.img"), vm.path("sys.img")).expect("renamed");
    std::fs::remove_file(vm.path("sys.one.qcow2")).expect("removed");
    refused(
        &vm,
        2,
        &["check", &file(&vm)],
        "config DIR/guest.toml, line 7: image DIR/sys.two.qcow2: its chain of backing files cannot be used: image DIR/sys.one.qcow2 cannot be opened: No \
         such file or directory (os error 2); check its path, and the rights on it of whoever runs qvirt",
    );
    vm.nothing_left();
}

/// Five snapshots with something written after each; gives what the disks are at the end, and each time before.
pub fn five(vm: &Vm) -> (BTreeMap<String, Vec<u8>>, BTreeMap<String, Vec<u8>>) {
    let target = file(vm);
    for number in 1..=5_u8 {
        for (image, format) in
            chain::tops(vm, &target).values().filter(|(image, _)| !image.contains("ro.img"))
        {
            if !image.is_empty() {
                chain::write(vm, image, format, number, &format!("{}k 96k", u32::from(number) * 64));
            }
        }
        vm.ok(&["snapshot", "create", &target, &format!("s{number}")]);
    }
    for (image, format) in chain::tops(vm, &target).values().filter(|(image, _)| image.contains(".s5.")) {
        chain::write(vm, image, format, 9, "0 4k");
    }
    (now(vm), chain::states(vm))
}

/// What the disks that are written are.
pub fn now(vm: &Vm) -> BTreeMap<String, Vec<u8>> {
    let tops = chain::tops(vm, &file(vm));
    let written = tops.into_iter().filter(|(id, _)| id == "sys" || id == "data");
    written.map(|(id, (image, format))| (id, chain::view(vm, &image, &format))).collect()
}

#[test]
fn deleted_the_middle_the_oldest_the_newest_and_all() {
    let vm = vm();
    let target = file(&vm);
    let (disks, mut states) = five(&vm);
    for (name, images) in [("s3", 8), ("s1", 6), ("s5", 4)] {
        let said = vm.ok(&["snapshot", "delete", &target, name]);
        assert_eq!(said, format!("snapshot {name} of guest is deleted\n"));
        states.retain(|state, _| !state.starts_with(name));
        assert!(now(&vm) == disks && chain::states(&vm) == states, "nothing but the snapshot {name} is gone");
        assert_eq!(overlays(&vm).len(), images, "{:?}", overlays(&vm));
        chain::are_sound(&vm);
    }
    assert_eq!(vm.ok(&["snapshot", "list", "guest", "--tree"]), "s2\n  s4\n");
    assert_eq!(
        vm.ok(&["snapshot", "delete", &target, "s2", "--children"]),
        "snapshot s2 of guest is deleted\nsnapshot s4 of guest is deleted\n"
    );
    assert!(now(&vm) == disks, "the disks are as they were");
    assert_eq!(overlays(&vm), [""; 0]);
    let blocks = said(&vm, &vm.ok(&["blocks", &target]));
    assert!(blocks.contains("raw     4MiB  -    -         DIR/sys.img\n"), "{blocks}");
    refused(&vm, 5, &["snapshot", "delete", &target, "s2"], "VM guest has no snapshot s2: it has none");
    vm.nothing_left();
}

#[test]
fn reverted_and_what_was_left_behind() {
    let vm = vm();
    let target = file(&vm);
    let (disks, states) = five(&vm);
    let of = |name: &str| {
        let disks = states
            .iter()
            .filter_map(|(state, bytes)| Some((state.strip_prefix(&format!("{name} "))?, bytes)));
        disks.map(|(id, bytes)| (id.to_owned(), bytes.clone())).collect::<BTreeMap<_, _>>()
    };
    start_paused(&vm);
    refused(
        &vm,
        3,
        &["snapshot", "revert", &target, "s2"],
        "VM guest runs, and its disks cannot be put back under it: shut it down first, or let --running end it and start it again",
    );
    let made = said(&vm, &vm.ok(&["snapshot", "revert", &target, "s2", "--running"]));
    assert!(
        made.contains("guest is back at snapshot s2\nsys writes to DIR/sys.s2-2.qcow2 from now on\n")
            && made.ends_with("guest is running\n"),
        "{made}"
    );
    vm.end();
    assert!(now(&vm) == of("s2") && chain::states(&vm) == states, "back, and every snapshot is as it was");
    assert_eq!(overlays(&vm).len(), 12, "what was left is kept");

    // Forth again, to the newest, and back with what is written there given up.
    vm.ok(&["snapshot", "revert", &target, "s5"]);
    assert!(now(&vm) == of("s5"));
    vm.ok(&["snapshot", "create", &target, "s6"]);
    assert_eq!(
        vm.ok(&["snapshot", "list", "guest", "--tree"]),
        "s1\n  s2\n    s3\n      s4\n        s5\n          s6\n"
    );
    vm.ok(&["snapshot", "revert", &target, "s1", "--discard"]);
    assert!(now(&vm) == of("s1"));
    // Twelve, and two for s5-2 and s1-2 each; those of s6 were given up.
    assert_eq!(overlays(&vm).len(), 16, "{:?}", overlays(&vm));
    chain::are_sound(&vm);
    vm.ok(&["snapshot", "delete", &target, "s2", "--children"]);
    assert!(now(&vm) == of("s1") && now(&vm) != disks);
    assert_eq!(overlays(&vm), ["data.s1-2.qcow2", "sys.s1-2.qcow2"], "the branch that is written");
    vm.ok(&["snapshot", "delete", &target, "s1"]);
    assert!(now(&vm) == of("s1"));
    assert_eq!(overlays(&vm), [""; 0]);
    vm.nothing_left();
}

/// A merge that takes its time: seen, held up, left by its client and its owner, and finished by the next one; another one is ended.
#[test]
fn a_merge_is_a_job() {
    let vm = vm();
    let target = file(&vm);
    vm.ok(&["snapshot", "create", &target, "one"]);
    let fill = || {
        let (image, format) = chain::tops(&vm, &target)["data"].clone();
        chain::write(&vm, &image, &format, 7, "0 6M");
    };
    fill();
    vm.ok(&["snapshot", "create", &target, "two"]);
    let states = chain::states(&vm);
    start_paused(&vm);
    let begin = |name: &str| {
        let words = ["snapshot", "delete", "guest", name, "--speed", "512KiB"];
        vm.command(&words).spawn().expect("qvirt starts")
    };
    let shows = |words: &str| vm.ok(&["jobs", "guest"]).contains(words);
    let client = begin("one");
    vm.wait_for("the job", || shows("data-merge  commit  running"));
    refused(&vm, 5, &["job", "pause", "guest", "other"], "VM guest has no job other: it has data-merge");
    vm.ok(&["job", "pause", "guest", "data-merge"]);
    vm.wait_for("the pause", || shows("data-merge  commit  paused"));
    vm.kill_owner();
    assert_eq!(tests::vm::finished(client).code, 4, "the outcome is open");
    vm.start();
    assert!(shows("data-merge  commit  paused"));
    vm.ok(&["job", "resume", "guest", "data-merge"]);
    vm.wait_for("the end of the job", || !shows("data-merge"));
    vm.wait_for("the file's end", || !overlays(&vm).contains(&"data.one.qcow2".to_owned()));
    chain::are_sound(&vm);
    assert_eq!(vm.ok(&["snapshot", "list", "guest", "--tree"]), "two\n");
    let left = chain::states(&vm);
    assert!(left.iter().all(|(name, bytes)| states.get(name) == Some(bytes)) && left.len() == 2);
    vm.end();

    // One that a person ends leaves the disk as it is, and the rest to the next deletion.
    fill();
    vm.ok(&["snapshot", "create", &target, "three"]);
    let disks = now(&vm);
    start_paused(&vm);
    let client = begin("two");
    vm.wait_for("the job", || shows("data-merge  commit  running"));
    vm.ok(&["job", "cancel", "guest", "data-merge"]);
    let ended = tests::vm::finished(client);
    assert!(ended.code == 1 && ended.stderr.contains("each disk is as it was"), "{ended}");
    vm.end();
    assert!(now(&vm) == disks);
    vm.ok(&["snapshot", "delete", &target, "three"]);
    assert!(now(&vm) == disks);
    assert_eq!(overlays(&vm), [""; 0]);
}
