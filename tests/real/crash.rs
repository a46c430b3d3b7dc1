//! The owner's death at any moment: at each step of a launch, an attach, a detach and a clearing up, and at random.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tests::guest::BOOT;
use tests::qemu::QemuVersion;
use tests::vm::{Vm, finished};

use tests::on_one;
use tests::scene::{QUIET, Scene};

on_one! { 10.0:
    plug_steps => each_step_of_attach_and_detach,
    random => twenty_random_moments,
}

on_one! { 7.2:
    launch_steps => each_step_of_launch,
}

/// The owner dies by SIGKILL when it begins this step.
fn adopt_to_die(vm: &Vm, step: &str) {
    let config = vm.config().display().to_string();
    let output = vm.qvirt_with(&[("QVIRT_DIE_STEP", step)], &["start", &config]);
    assert_eq!(output.code, 0, "{step}: {output}");
}

/// Whether QEMU has nothing but what the machine was started with.
fn clean(scene: &Scene, before: &Holdings) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while Holdings::of(&scene.vm) != *before {
        assert!(std::time::Instant::now() < until, "left: {:#?}\nnot {before:#?}", Holdings::of(&scene.vm));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// All that qvirt makes in QEMU and on the host.
#[derive(Debug, PartialEq)]
struct Holdings {
    nodes: Value,
    chardevs: Vec<String>,
    objects: Vec<String>,
    devices: Vec<String>,
    ours: Vec<String>,
    seats: Value,
    leases: Vec<String>,
}

impl Holdings {
    fn of(vm: &Vm) -> Holdings {
        let names = |reply: Value, key: &str| {
            let list = reply.as_array().cloned().unwrap_or_default();
            let mut names: Vec<String> =
                list.iter().filter_map(|one| one[key].as_str()).map(str::to_owned).collect();
            names.sort();
            names
        };
        Holdings {
            nodes: vm.qmp("query-named-block-nodes", &json!({"flat": true})),
            // Those of clients of the moment are none of ours.
            chardevs: names(vm.qmp("query-chardev", &json!({})), "label"),
            objects: names(vm.qmp("qom-list", &json!({"path": "/objects"})), "name"),
            devices: names(vm.qmp("qom-list", &json!({"path": "/machine/peripheral"})), "name"),
            ours: vm.device_ids(),
            seats: vm.status()["seats"].clone(),
            leases: vm.leases(),
        }
    }
}

/// A device to sweep over: its option, its id, and the guest's line of it.
struct Victim {
    option: [String; 2],
    id: &'static str,
    line: (&'static str, &'static str),
}

fn each_step_of_attach_and_detach(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let bottom = scene.vm.raw("bottom.img", 4, "BOTTOM");
    let middle = scene.vm.qcow2("middle.qcow2", Err((&bottom, "raw")));
    let top = scene.vm.qcow2("top.qcow2", Err((&middle, "qcow2")));
    let socket = scene.vm.path("channel.sock").display().to_string();
    let victims = [
        Victim {
            option: ["--disk".to_owned(), format!("path={top},format=qcow2,id=disk,serial=chain")],
            id: "disk",
            line: ("disk", "serial=chain"),
        },
        Victim {
            option: ["--nic".to_owned(), "user=true,id=nic,mac=52:54:00:00:cc:01".to_owned()],
            id: "nic",
            line: ("nic", "52:54:00:00:cc:01"),
        },
        Victim {
            option: ["--disk".to_owned(), format!("path={bottom},bus=virtio-scsi,id=lun,serial=lun")],
            id: "lun",
            line: ("disk", "serial=lun"),
        },
        Victim {
            option: ["--channel".to_owned(), format!("id=ch,name=org.test.1,path={socket}")],
            id: "ch",
            line: ("channel", "org.test.1"),
        },
    ];
    let before = Holdings::of(&scene.vm);
    for victim in &victims {
        let [attach, detach, clear] =
            ["attach", "detach", "clear"].map(|work| sweep(&mut scene, victim, work, &before));
        println!(
            "== {version}: {}: the owner died at {attach} steps of attach, {detach} of detach, {clear} of clearing up",
            victim.id
        );
        assert!(attach >= 4 && detach == 2 && clear >= 3, "{attach} {detach} {clear}");
    }
    scene.end();
}

/// Has the owner die at step 1, 2, ... of that work until there are no more; gives how many there were.
fn sweep(scene: &mut Scene, victim: &Victim, work: &str, before: &Holdings) -> u32 {
    let attach = ["attach", "guest", &victim.option[0], &victim.option[1]];
    let detach = ["detach", "guest", victim.id, "--wait", "30s"];
    for number in 1.. {
        let step = format!("{work}:{number}");
        if work != "attach" {
            scene.vm.ok(&attach);
            sees_it(scene, victim);
        }
        scene.vm.kill_owner();
        adopt_to_die(&scene.vm, &step);
        let output = scene.vm.qvirt(if work == "attach" { &attach } else { &detach });
        let died = output.code != 0;
        println!(
            "{step} of {}: exit code {}, the owner {}",
            victim.id,
            output.code,
            if died { "died" } else { "lived" }
        );
        if died {
            // The client may hear of it before the dead owner's locks are gone.
            scene.vm.wait_for("the owner's death", || scene.vm.ok(&["list"]).contains("without an owner"));
            scene.vm.start();
        }
        // Whole or not there at all: qvirt and the guest agree.
        settled(&scene.vm);
        let there = scene.vm.device(victim.id) != Value::Null;
        let (kind, word) = victim.line;
        let what = format!("{} {} after {step}", victim.id, if there { "there" } else { "not there" });
        scene.sees(&what, |seen| seen.find(kind, word).is_some() == there);
        assert!(died || there == (work == "attach"), "{what}: nobody died");
        if there {
            scene.vm.ok(&detach);
            scene.sees(&format!("{} gone", victim.id), |seen| seen.find(kind, word).is_none());
        }
        clean(scene, before);
        if !died {
            return number - 1;
        }
    }
    unreachable!("the numbers have no end")
}

fn sees_it(scene: &mut Scene, victim: &Victim) {
    let (kind, word) = victim.line;
    scene.sees(&format!("{} attached", victim.id), |seen| seen.find(kind, word).is_some());
}

/// Waits until no device is coming or going.
fn settled(vm: &Vm) {
    let until = std::time::Instant::now() + Duration::from_secs(40);
    loop {
        let status = vm.status();
        if status["devices"].as_array().into_iter().flatten().all(|device| device["stage"] == "present") {
            return;
        }
        assert!(std::time::Instant::now() < until, "devices still come or go: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn each_step_of_launch(version: QemuVersion) {
    let tables = "[[disk]]\nid = \"sys\"\npath = \"sys.img\"\nserial = \"sys\"\n\n[[nic]]\nid = \"net0\"\nuser = true\n";
    let vm = Vm::new(version, QUIET, 2, tables);
    vm.raw("sys.img", 4, "SYS");
    let config = vm.config().display().to_string();
    let mut adopted = 0;
    for number in 1.. {
        let step = format!("launch:{number}");
        let output = vm.qvirt_with(&[("QVIRT_DIE_STEP", &step)], &["start", &config]);
        if output.code == 0 {
            println!(
                "== {version}: the owner died at {} steps of a launch, {adopted} of them with QEMU alive",
                number - 1
            );
            break;
        }
        let state = vm.ok(&["list"]);
        println!("{step}: {}", state.lines().last().unwrap_or_default());
        adopted += u32::from(state.contains("without an owner"));
        // The next start adopts what lives and clears up behind what does not; the guest runs.
        vm.start();
        assert_eq!(vm.device_ids(), ["con0", "net0", "sys"], "{step}");
        vm.wait_for("the guest to run", || vm.status()["state"] == "running");
        vm.end();
    }
    assert!(adopted >= 2, "QEMU was to live at some steps, not {adopted}");
    let mut guest = vm.console("con0");
    guest.wait_ready(BOOT).expect("the guest boots");
    let seen = guest.inventory().expect("an inventory");
    println!("{seen}");
    assert!(seen.find("disk", "serial=sys").is_some() && seen.nics().len() == 1, "{seen}");
    vm.end();
}

/// A small generator (SplitMix64): tests need the same numbers for the same seed, not good ones.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// How often the owner is killed: twenty times, or `QVIRT_ROUNDS`.
fn rounds() -> u64 {
    std::env::var("QVIRT_ROUNDS").map_or(20, |text| text.parse().expect("QVIRT_ROUNDS is a number"))
}

fn twenty_random_moments(version: QemuVersion) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let seed = std::env::var("QVIRT_SEED").map_or(now, |text| text.parse().expect("QVIRT_SEED is a number"));
    println!("== {version}: QVIRT_SEED={seed}");
    let mut random = Random(seed);
    let mut scene = Scene::boot(version, QUIET, "");
    let before = Holdings::of(&scene.vm);
    let bare = scene.seen.clone();
    let mut slots: BTreeMap<String, (String, String, &str)> = BTreeMap::new();
    for n in 0..3 {
        let image = scene.vm.raw(&format!("blk{n}.img"), 4, "x");
        slots.insert(
            format!("blk{n}"),
            ("--disk".to_owned(), format!("path={image},id=blk{n},serial=blk{n}"), "disk"),
        );
        let image = scene.vm.raw(&format!("lun{n}.img"), 4, "x");
        slots.insert(
            format!("lun{n}"),
            ("--disk".to_owned(), format!("path={image},id=lun{n},serial=lun{n},bus=virtio-scsi"), "disk"),
        );
    }
    slots.insert(
        "nic0".to_owned(),
        ("--nic".to_owned(), "id=nic0,user=true,mac=52:54:00:00:dd:01".to_owned(), "nic"),
    );
    // What is known to be there: a command that was cut off leaves it open, the next owner decides.
    let mut known: BTreeMap<String, bool> = slots.keys().map(|id| (id.clone(), false)).collect();
    for round in 0..rounds() {
        let owner = scene.vm.owner_pid();
        let delay = Duration::from_millis(random.below(500));
        let mut cut_off = Vec::new();
        std::thread::scope(|threads| {
            let vm = &scene.vm;
            let killer = threads.spawn(move || {
                std::thread::sleep(delay);
                vm.kill_process(owner);
            });
            while !killer.is_finished() {
                let ids: Vec<&String> = slots.keys().collect();
                let id = ids[usize::try_from(random.below(ids.len() as u64)).expect("a small number")];
                let (flag, option, _) = &slots[id];
                let attach = !known[id];
                let arguments = if attach {
                    vec!["attach", "guest", flag, option]
                } else {
                    vec!["detach", "guest", id, "--wait", "20s"]
                };
                let output = finished(vm.command(&arguments).spawn().expect("qvirt starts"));
                println!(
                    "round {round}: {} {id}: exit code {} {}",
                    arguments[0],
                    output.code,
                    output.stdout.trim()
                );
                match output.code {
                    0 => drop(known.insert(id.clone(), attach)),
                    _ => cut_off.push((id.clone(), attach, output.stderr)),
                }
            }
        });
        println!("the owner that died had said\n{}", scene.vm.owner_log());
        let config = scene.vm.config().display().to_string();
        let started = scene.vm.qvirt_with(&[("QVIRT_LOG", "info")], &["start", &config]);
        assert_eq!(started.code, 0, "{started}");
        settled(&scene.vm);
        let devices = scene.vm.device_ids();
        for (id, attach, words) in cut_off {
            let there = devices.contains(&id);
            println!(
                "round {round} after {delay:?}: {} {id} was cut off, it is {}: {}",
                if attach { "attach" } else { "detach" },
                if there { "there" } else { "not there" },
                words.trim()
            );
            known.insert(id, there);
        }
        for (id, there) in &known {
            assert_eq!(devices.contains(id), *there, "round {round}: {id} in {devices:?}");
        }
    }
    // The guest is the judge.
    let expected: Vec<&String> = known.iter().filter(|(_, there)| **there).map(|(id, _)| id).collect();
    println!("expected: {expected:?}");
    let words: BTreeMap<&String, (&str, String)> = slots
        .iter()
        .map(|(id, (_, _, kind))| {
            (
                id,
                (*kind, if *kind == "nic" { "52:54:00:00:dd:01".to_owned() } else { format!("serial={id}") }),
            )
        })
        .collect();
    scene.sees("what qvirt says", |seen| {
        words.iter().all(|(id, (kind, word))| seen.find(kind, word).is_some() == known[*id])
    });
    for id in expected.clone() {
        scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
    }
    scene.sees("as in the beginning", |seen| *seen == bare);
    clean(&scene, &before);
    // Each comes again: nothing of it was left that would be in its way.
    for (id, (flag, option, _)) in &slots {
        let output = scene.vm.qvirt(&["attach", "guest", flag, option]);
        assert_eq!(output.code, 0, "{id}: {output}");
    }
    scene.sees("all devices", |seen| words.values().all(|(kind, word)| seen.find(kind, word).is_some()));
    scene.end();
}
