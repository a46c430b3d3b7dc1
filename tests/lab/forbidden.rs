//! What is refused, and what answers, while the storage of one disk hangs and another disk fails; and how such a VM is ended.

use std::path::Path;
use std::time::{Duration, Instant};

use tests::lab::host::faulty::{Behaviour, FaultyDisk};
use tests::lab::{inside, patience, step};
use tests::qemu::QemuVersion;
use tests::refusals::{each_is_refused, is_refused};
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::{AGENT_CHANNEL, Vm};

/// Ten times what an answer from the owner's own knowledge may take.
const AT_ONCE: Duration = Duration::from_secs(5);
/// Ten times what a kill may take.
const KILLED: Duration = Duration::from_secs(20);

/// Either disk may be named: both are in the way.
const REASONS: [&str; 2] = ["is refused: I/O of disk data", "is refused: I/O of disk other"];

/// Everything is refused or answered at once. `near` is the storage of disk `data`.
fn nothing_waits(vm: &Vm, near: &Path) {
    let begin = Instant::now();
    each_is_refused(vm, &near.display().to_string(), AT_ONCE, &REASONS);
    // What disks that merely fail allow, and the monitor would not survive.
    let raw = |command| ["qmp", "guest", command];
    for words in [&["reset", "guest"][..], &["pause", "guest"], &raw("stop"), &raw("system_reset")] {
        is_refused(vm, words, AT_ONCE, &REASONS);
    }
    let away = vm.raw("away.iso", 1, "x");
    let disk = format!("path={away},id=away");
    for words in [
        &["attach", "guest", "--disk", &disk][..],
        &["detach", "guest", "con0"],
        &["media", "guest", "cd0", "insert", &away],
    ] {
        is_refused(vm, words, AT_ONCE, &["while the storage of disk data hangs"]);
    }
    println!("all refusals came in {:.1?}", begin.elapsed());
    for words in [&["list"][..], &["status", "guest"], &["io", "status", "guest"], &["devices", "guest"]] {
        let begin = Instant::now();
        let text = vm.ok(words);
        assert!(begin.elapsed() < patience(AT_ONCE), "{words:?} took {:?}", begin.elapsed());
        print!("$ qvirt {}\n{text}", words.join(" "));
    }
}

#[test]
fn one_disk_hangs_and_another_fails() {
    inside(|| {
        let storages = ["data", "other"].map(|name| FaultyDisk::new(name, 4).expect("a disk of this test"));
        let behaves = |number: usize, behaviour| {
            let storage: &FaultyDisk = &storages[number];
            println!("{}: {behaviour:?}", storage.path().display());
            storage.behave(behaviour).expect("device-mapper obeys");
        };
        let drive = "[[disk]]\nid = \"cd0\"\ndevice = \"cdrom\"\n";
        let tables = format!("{AGENT_CHANNEL}{drive}");
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, &tables));
        let [data, other] = [0, 1].map(|number| {
            let (id, path) = (["data", "other"][number], storages[number].path());
            Storm::on(&mut scene, id, &format!("path={},cache=none,on_error.engine=hold", path.display()))
        });
        step("one fails, then the other one hangs", || {
            behaves(1, Behaviour::Fails);
            other.waits_for(&scene, "suspended");
            behaves(0, Behaviour::Stalls);
            data.waits_for(&scene, "hung");
            nothing_waits(&scene.vm, &storages[0].path());
            assert_eq!(other.io(&scene)["state"], "suspended");
            assert_eq!(scene.guest.check("echo alive").expect("the guest runs").trim(), "alive");
        });
        step("both work again", || {
            behaves(0, Behaviour::Works);
            data.waits_for(&scene, "ok");
            behaves(1, Behaviour::Works);
            other.waits_for(&scene, "ok");
            data.is_unharmed(&mut scene, "after the hang");
            other.is_unharmed(&mut scene, "after the outage");
        });
        step("one hangs, then the other one fails, which freezes QEMU", || {
            behaves(0, Behaviour::Stalls);
            data.waits_for(&scene, "hung");
            let before = scene.vm.device("other")["fault"]["events"].clone();
            behaves(1, Behaviour::Fails);
            scene.vm.wait_for("its error", || scene.vm.device("other")["fault"]["events"] != before);
            other.waits_for(&scene, "suspended");
            nothing_waits(&scene.vm, &storages[0].path());
        });
        step("kill", || {
            let begin = Instant::now();
            let output = scene.vm.qvirt(&["kill", "guest"]);
            println!("{:.1?}: {output}", begin.elapsed());
            assert!(begin.elapsed() < patience(KILLED), "{:?}: {output}", begin.elapsed());
            assert!([0, 4].contains(&output.code), "{output}");
        });
        behaves(0, Behaviour::Works);
        scene.vm.nothing_left();
    });
}
