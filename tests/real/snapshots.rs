//! Snapshots of a guest that writes all the time: what was kept is what there was, at one instant on all disks, and the guest never notices.

use tests::chain::{are_sound, frozen, states, tops, view};
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::{AGENT_CHANNEL, Vm};

on_one! { 10.0:
    instant => two_disks_at_one_instant,
    larger => disks_that_get_more_room,
    pulled => pulled_and_committed_under_the_guest,
    agent => frozen_by_qemus_own_agent,
    reverted => a_guest_sees_what_it_saw,
}

on_one! { 7.2:
    goes_on => the_guest_goes_on_and_the_next_start_knows,
    deleted => deleted_under_the_guest,
    slowly => merged_slowly_under_the_guest,
    quiet => a_guest_that_is_frozen_is_thawed,
}

/// The number at the beginning of a disk.
fn number(bytes: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(&bytes[..16]);
    text.trim_matches(['\0', ' ']).parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// The guest writes a number to one disk, then to the other, and so on: at any instant the second has the first one's or the one before. Of the two disks
/// one was plugged in, and one is qcow2 on virtio-scsi.
fn two_disks_at_one_instant(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let first = scene.vm.raw("first.img", 1, "0");
    let second = scene.vm.qcow2("second.qcow2", Ok(1));
    scene.attach(["--disk", &format!("path={first},id=first,serial=first")], "disk", "serial=first");
    let option = format!("path={second},format=qcow2,id=second,serial=second,bus=virtio-scsi");
    scene.attach(["--disk", &option], "disk", "serial=second");
    let (a, b) = (scene.disk("first"), scene.disk("second"));
    let writer = format!(
        "i=0; put() {{ printf '%-512s' $i | dd of=/dev/$1 bs=512 count=1 conv=notrunc,fsync 2>/dev/null; }}; put {a}; put {b}; echo begun; \
         while [ ! -e /tmp/enough ]; do i=$((i+1)); put {a}; put {b}; done"
    );
    let mut running = scene.guest.begin(&writer).expect("the writer begins");
    scene.guest.wait_output(&mut running, "begun", tests::guest::SCRIPT).expect("it begins");
    let mut last = 0;
    let mut seen = Vec::new();
    for round in 0..20 {
        let name = format!("r{round}");
        scene.vm.ok(&["snapshot", "create", "guest", &name]);
        let disks = frozen(&scene.vm, &name);
        assert_eq!(disks.len(), 2);
        let [first, second] =
            [&disks[0], &disks[1]].map(|(_, image, format)| number(&view(&scene.vm, image, format)));
        assert!(
            first == second || first == second + 1,
            "{name}: {first} on the first disk, {second} on the second"
        );
        assert!(first >= last, "{name}: {first} after {last}");
        last = first;
        seen.push((first, second));
    }
    println!("-- {version}: numbers on both disks, at 20 instants: {seen:?}");
    assert!(last > 5, "the guest wrote meanwhile: {seen:?}");
    scene.guest.check("touch /tmp/enough").expect("the guest answers");
    scene.guest.finish(running, tests::guest::SCRIPT).expect("the writer ends");
    are_sound(&scene.vm);
    scene.end();
}

/// Five snapshots of a disk that is written and verified all the time; the middle one, the oldest, the newest and the others are deleted meanwhile.
/// What is left is what it was.
fn deleted_under_the_guest(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let storm = Storm::begin(&mut scene, "data", "on_error.engine=hold");
    for number in 1..=5 {
        scene.vm.ok(&["snapshot", "create", "guest", &format!("s{number}")]);
        storm.is_unharmed(&mut scene, "after a snapshot");
    }
    let mut kept = states(&scene.vm);
    for (name, layers) in [("s3", 5), ("s1", 4), ("s5", 3), ("s2", 2), ("s4", 1)] {
        scene.vm.ok(&["snapshot", "delete", "guest", name]);
        storm.is_unharmed(&mut scene, "after a deletion");
        kept.retain(|state, _| !state.starts_with(name));
        assert!(states(&scene.vm) == kept, "{name}: what is left is what it was");
        let nodes = scene.vm.qmp("query-named-block-nodes", &serde_json::json!({"flat": true}));
        assert_eq!(nodes.as_array().map(Vec::len), Some(2 * layers), "{nodes:#}");
        are_sound(&scene.vm);
    }
    println!("{}", scene.vm.ok(&["blocks", "guest"]));
    let stopped = scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    assert_eq!((stopped.error_count, stopped.mismatch_count), (0, 0), "{stopped:#?}");
    let verdict = scene.guest.pattern_verify(&storm.name).expect("a verdict");
    assert!(verdict.is_consistent(), "{verdict:#?}");
    scene.vm.ok(&["detach", "guest", "data", "--wait", "30s"]);
    scene.end();
}

/// The layers of a disk that is written and verified all the time go into the uppermost one, and then that one into the base.
fn pulled_and_committed_under_the_guest(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let storm = Storm::begin(&mut scene, "data", "on_error.engine=hold");
    for name in ["a", "b", "c"] {
        scene.vm.ok(&["snapshot", "create", "guest", name]);
        storm.is_unharmed(&mut scene, "after a snapshot");
    }
    let kept = states(&scene.vm);
    let stands = |vm: &Vm, layers: usize, what: &str| {
        let nodes = vm.qmp("query-named-block-nodes", &serde_json::json!({"flat": true}));
        assert_eq!(nodes.as_array().map(Vec::len), Some(2 * layers), "{what}: {nodes:#}");
        are_sound(vm);
        print!("{}", vm.ok(&["blocks", "guest"]));
    };
    print!("{}", scene.vm.ok(&["block", "pull", "guest", "data"]));
    storm.is_unharmed(&mut scene, "after a pull");
    stands(&scene.vm, 2, "the top and the base");
    assert!(states(&scene.vm) == kept, "what was kept is what it was");
    for name in ["b", "c"] {
        scene.vm.ok(&["snapshot", "delete", "guest", name]);
    }
    print!("{}", scene.vm.ok(&["block", "commit", "guest", "data", "--delete-snapshots", "--speed", "8MiB"]));
    storm.is_unharmed(&mut scene, "after a commit");
    stands(&scene.vm, 1, "the base alone");
    let said = storm.drill(&scene, "1500ms", &[]);
    println!("{said}");
    storm.is_unharmed(&mut scene, "after an outage on the base");
    storm.detach(&mut scene);
    scene.end();
}

/// A layer that the guest writes all the time goes slowly, and meanwhile its storage is not to fail on purpose.
fn merged_slowly_under_the_guest(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let storm = Storm::begin(&mut scene, "data", "on_error.engine=hold");
    scene.vm.ok(&["snapshot", "create", "guest", "a"]);
    let rewritten = |report: &tests::guest::PatternReport| report.verified > 2000;
    scene.guest.wait_pattern(&storm.name, "a disk full of the pattern", rewritten).expect("it goes on");
    let mut command = scene.vm.command(&["snapshot", "delete", "guest", "a", "--speed", "64KiB", "--json"]);
    let pipe = std::process::Stdio::piped;
    let deletion = command.stdout(pipe()).stderr(pipe()).spawn().expect("qvirt starts");
    scene.vm.wait_for("the job", || scene.vm.ok(&["jobs", "guest"]).contains("data-merge"));
    print!("{}", scene.vm.ok(&["jobs", "guest"]));
    let refused = scene.vm.expect(3, &["drill", "guest", "data", "--fail-for", "1s"]);
    assert!(refused.stderr.contains("layers are being merged or pulled"), "{refused}");
    for change in ["pause", "resume"] {
        scene.vm.ok(&["job", change, "guest", "data-merge"]);
    }
    scene.vm.ok(&["qmp", "guest", "block-job-set-speed", r#"{"device": "data-merge", "speed": 0}"#]);
    let output = tests::vm::finished(deletion);
    assert_eq!(output.code, 0, "{output}");
    let lines: Vec<serde_json::Value> =
        output.stdout.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let progress = |line: &serde_json::Value| line["current-progress"].as_u64();
    let told: Vec<u64> = lines.iter().filter_map(progress).collect();
    assert!(told.len() > 1 && told.is_sorted() && told[0] < told[told.len() - 1], "it goes on: {told:?}");
    assert_eq!(lines.last(), Some(&serde_json::json!({"deleted": ["a"]})));
    storm.is_unharmed(&mut scene, "on the base");

    // Given up by a person, it leaves the disk as it is; `block commit` tries again.
    scene.vm.ok(&["snapshot", "create", "guest", "b"]);
    storm.is_unharmed(&mut scene, "after another snapshot");
    let mut command = scene.vm.command(&["snapshot", "delete", "guest", "b", "--speed", "64KiB"]);
    let deletion = command.stdout(pipe()).stderr(pipe()).spawn().expect("qvirt starts");
    scene.vm.wait_for("the job", || scene.vm.ok(&["jobs", "guest"]).contains("data-merge"));
    scene.vm.ok(&["job", "cancel", "guest", "data-merge"]);
    let output = tests::vm::finished(deletion);
    assert!(output.code == 1 && output.stderr.contains("QEMU's job failed: Operation cancel"), "{output}");
    storm.is_unharmed(&mut scene, "on the layer that stayed");
    assert!(scene.vm.ok(&["blocks", "guest"]).contains("data.b.qcow2 <- "), "it stands there");
    print!("{}", scene.vm.ok(&["block", "commit", "guest", "data"]));
    storm.is_unharmed(&mut scene, "on the base again");
    are_sound(&scene.vm);
    storm.detach(&mut scene);
    scene.end();
}

/// A disk, and the channel of an agent that freezes what is on it.
const WITH_AGENT: &str =
    "[[disk]]\nid = \"data\"\npath = \"data.img\"\n[[channel]]\nid = \"ga\"\nguest_agent = true\n";

/// What answers in the guest in the place of qemu-ga: it writes down what it was asked. No file system is frozen by it.
const FAKE_AGENT: &str = r#"for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = org.qemu.guest_agent.0 ] && port=/dev/${p##*/}; done
exec 3<>$port; echo up
while :; do read -r line <&3 || { usleep 50000; continue; }; case $line in
*guest-sync*) id=${line##*\"id\":}; echo "{\"return\":${id%%\}*}}" >&3 ;;
*fsfreeze-freeze*) echo -n F >>/tmp/asked; echo '{"return":1}' >&3 ;;
*fsfreeze-thaw*) echo -n T >>/tmp/asked; echo '{"return":1}' >&3 ;;
esac; done"#;

/// By a guest agent that is not the real one: whatever comes after a freeze, a thaw comes.
fn a_guest_that_is_frozen_is_thawed(version: QemuVersion) {
    let vm = Vm::new(version, QUIET, 8, &format!("{AGENT_CHANNEL}{WITH_AGENT}"));
    vm.raw("data.img", 4, "x");
    let mut scene = Scene::of(vm);
    let silent = scene.vm.expect(1, &["snapshot", "create", "guest", "none", "--quiesce"]);
    assert!(
        silent.stderr.contains("snapshot none was not taken, and nothing of it is left: the guest agent does not answer guest-sync"),
        "{silent}"
    );
    let mut agent = scene.guest.begin(FAKE_AGENT).expect("a script");
    scene.guest.wait_output(&mut agent, "up", tests::guest::SCRIPT).expect("it listens");
    let asked = |scene: &mut Scene, expected: &str| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let now = scene.guest.check("cat /tmp/asked; rm -f /tmp/asked; true").expect("an answer");
            if now.contains(expected) || std::time::Instant::now() > until {
                assert!(
                    now.contains(expected) && now.matches('T').count() >= now.matches('F').count(),
                    "{now:?}, not {expected}"
                );
                return;
            }
        }
    };
    scene.vm.ok(&["snapshot", "create", "guest", "one", "--quiesce"]);
    asked(&mut scene, "FT");
    assert!(scene.vm.ok(&["snapshot", "list", "guest"]).contains("running, quiesced"));

    // The ninth step is the transaction, the tenth the thaw.
    let file = scene.vm.config().display().to_string();
    for (wish, step, code) in
        [("QVIRT_FAIL_STEP", 9, 1), ("QVIRT_FAIL_STEP", 10, 1), ("QVIRT_DIE_STEP", 9, 4)]
    {
        scene.vm.kill_owner();
        let adopted = scene.vm.qvirt_with(&[(wish, &format!("snapshot:{step}"))], &["start", &file]);
        assert_eq!(adopted.code, 0, "{adopted}");
        let name = format!("{}{step}", &wish[6..7]);
        let output = scene.vm.qvirt(&["snapshot", "create", "guest", &name, "--quiesce"]);
        assert_eq!(output.code, code, "{wish} {step}: {output}");
        if wish == "QVIRT_DIE_STEP" {
            scene.vm.wait_for("the owner's end", || scene.vm.ok(&["list"]).contains("without an owner"));
            scene.vm.start();
        }
        asked(&mut scene, "FT");
        let is_taken = scene.vm.ok(&["snapshot", "list", "guest", "--tree"]).contains(&name);
        assert_eq!(is_taken, step == 10, "{wish} {step}: {output}");
    }
    scene.guest.kill(&agent).expect("it ends");
    are_sound(&scene.vm);
    scene.end();
}

/// By the real `qemu-ga`: what the guest has only in its memory is in a snapshot that is quiet, and in no other; and it is thawed by whoever comes next.
fn frozen_by_qemus_own_agent(version: QemuVersion) {
    let vm = Vm::new(version, QUIET, 8, &format!("{AGENT_CHANNEL}{WITH_AGENT}")).with_qemu_ga();
    vm.raw("data.img", 8, "");
    let mut scene = Scene::of(vm);
    let has = |scene: &Scene, name: &str, word: &str| {
        let (_, image, format) = frozen(&scene.vm, name).remove(0);
        let view = view(&scene.vm, &image, &format);
        view.windows(word.len()).any(|bytes| bytes == word.as_bytes())
    };
    // Nothing is written before somebody asks for it.
    let script =
        "echo 0 >/proc/sys/vm/dirty_writeback_centisecs; qga /dev/vda && echo in-memory-only >/mnt/a";
    scene.guest.check(script).expect("the agent starts");
    scene.vm.ok(&["snapshot", "create", "guest", "loud"]);
    scene.vm.ok(&["snapshot", "create", "guest", "quiet", "--quiesce"]);
    assert!(!has(&scene, "loud", "in-memory-only"), "nobody asked the guest to write it");
    assert!(has(&scene, "quiet", "in-memory-only"), "the guest wrote it before it was frozen");
    scene.guest.check("echo after >/mnt/b && sync").expect("it is thawed");

    // The owner dies between freeze and thaw; the next one thaws.
    let file = scene.vm.config().display().to_string();
    scene.vm.kill_owner();
    let adopted = scene.vm.qvirt_with(&[("QVIRT_DIE_STEP", "snapshot:9")], &["start", &file]);
    assert_eq!(adopted.code, 0, "{adopted}");
    let output = scene.vm.qvirt(&["snapshot", "create", "guest", "dying", "--quiesce"]);
    assert_eq!(output.code, 4, "{output}");
    let mut writer = scene.guest.begin("echo x >/mnt/c && sync && echo written").expect("a script");
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(scene.guest.run("[ -e /mnt/c ]").expect("an answer").status, 1, "it is frozen");
    scene.vm.wait_for("the owner's end", || scene.vm.ok(&["list"]).contains("without an owner"));
    scene.vm.start();
    scene.guest.wait_output(&mut writer, "written", tests::guest::SCRIPT).expect("it is thawed");
    scene.guest.finish(writer, tests::guest::SCRIPT).expect("it ends");
    are_sound(&scene.vm);
    scene.end();
}

/// After a revert the guest reads from both disks, to the last byte, what it read when the snapshot was taken; and after another one what it read later.
fn a_guest_sees_what_it_saw(version: QemuVersion) {
    let disks = "[[disk]]\nid = \"a\"\npath = \"a.img\"\nserial = \"a\"\n\
                 [[disk]]\nid = \"b\"\npath = \"b.qcow2\"\nformat = \"qcow2\"\nbus = \"scsi\"\nserial = \"b\"\n";
    let vm = Vm::new(version, QUIET, 8, &format!("{AGENT_CHANNEL}{disks}"));
    vm.raw("a.img", 4, "x");
    vm.qcow2("b.qcow2", Ok(4));
    let mut scene = Scene::of(vm);
    let sums = |scene: &mut Scene| {
        ["a", "b"].map(|serial| {
            let sum = format!("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/{}", scene.disk(serial));
            scene.guest.check(&sum).expect("the guest reads it")
        })
    };
    let scribble = |scene: &mut Scene| {
        for serial in ["a", "b"] {
            let fill = format!(
                "dd if=/dev/urandom of=/dev/{} bs=64k count=24 seek=7 2>/dev/null; sync",
                scene.disk(serial)
            );
            scene.guest.check(&fill).expect("it is written");
        }
    };
    let mut taken = Vec::new();
    for name in ["one", "two", "three"] {
        scribble(&mut scene);
        taken.push(sums(&mut scene));
        scene.vm.ok(&["snapshot", "create", "guest", name]);
    }
    scribble(&mut scene);
    assert!(!taken.contains(&sums(&mut scene)), "it wrote something else since");
    let file = scene.vm.config().display().to_string();
    for (name, number) in [("one", 0), ("three", 2)] {
        print!("{}", scene.vm.ok(&["snapshot", "revert", &file, name, "--running"]));
        scene = Scene::of_running(scene.vm);
        assert_eq!(sums(&mut scene), taken[number], "the guest's view of {name}");
        scribble(&mut scene);
    }
    are_sound(&scene.vm);
    scene.end();
}

/// A disk on each bus gets more room, one of them under a snapshot; the guest sees it, and what it writes there is kept.
fn disks_that_get_more_room(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, AGENT_CHANNEL);
    let (a, b) = (scene.vm.raw("a.img", 4, "x"), scene.vm.qcow2("b.qcow2", Ok(4)));
    scene.attach(["--disk", &format!("path={a},id=a,serial=a")], "disk", "serial=a");
    scene.attach(
        ["--disk", &format!("path={b},format=qcow2,id=b,serial=b,bus=virtio-scsi")],
        "disk",
        "serial=b",
    );
    scene.vm.ok(&["snapshot", "create", "guest", "one", "--disk", "b"]);
    for id in ["a", "b"] {
        assert_eq!(
            scene.vm.ok(&["block", "resize", "guest", id, "9MiB"]),
            format!("{id} of guest has 9MiB\n")
        );
        let name = scene.disk(id);
        let size = format!("/sys/block/{name}/size");
        let sectors = format!(
            "for i in $(seq 100); do [ $(cat {size}) = 18432 ] && break; usleep 100000; done; cat {size}"
        );
        assert_eq!(scene.guest.check(&sectors).expect("an answer").trim(), "18432", "{id}");
        let end = format!("echo end | dd of=/dev/{name} bs=512 seek=18431 conv=notrunc,fsync 2>/dev/null");
        scene.guest.check(&end).expect("it writes the last sector");
        scene.vm.wait_for("the size in the status", || scene.vm.device(id)["size_bytes"] == 9 << 20);
        let smaller = scene.vm.expect(3, &["block", "resize", "guest", id, "8MiB"]);
        assert!(
            smaller.stderr.contains("it has 9MiB, and what is cut off would be lost: make it larger"),
            "{smaller}"
        );
    }
    let top = tops(&scene.vm, "guest")["b"].clone();
    assert!(view(&scene.vm, &a, "raw")[(9 << 20) - 512..].starts_with(b"end"));
    assert!(view(&scene.vm, &top.0, &top.1)[(9 << 20) - 512..].starts_with(b"end"));
    assert_eq!(view(&scene.vm, &b, "qcow2").len(), 4 << 20, "what was kept is as it was");
    are_sound(&scene.vm);
    scene.end();
}

/// A pattern is written and verified all the time: across snapshots, the death of an owner, and a new start from a VM file that knows nothing of
/// snapshots. What was kept stays as it was.
fn the_guest_goes_on_and_the_next_start_knows(version: QemuVersion) {
    let disk = "[[disk]]\nid = \"data\"\npath = \"data.img\"\nserial = \"data\"\non_error = { read = \"retry\", write = \"retry\", interval = \"200ms\", engine = \
                \"hold\" }\n";
    let vm = Vm::new(version, QUIET, 8, &format!("{AGENT_CHANNEL}{disk}"));
    let base = vm.raw("data.img", 4, "x");
    let mut scene = Scene::of(vm);
    let storm = Storm::of_disk(&mut scene, "data");
    scene.vm.ok(&["snapshot", "create", "guest", "one"]);
    storm.is_unharmed(&mut scene, "after a snapshot");
    let one = view(&scene.vm, &base, "raw");
    scene.vm.ok(&["snapshot", "create", "guest", "two"]);
    let overlay = frozen(&scene.vm, "two").remove(0).1;
    let two = view(&scene.vm, &overlay, "qcow2");
    assert!(one != two, "the guest wrote between the two");
    scene.vm.kill_owner();
    scene.vm.start();
    storm.is_unharmed(&mut scene, "with another owner");

    // Its storage fails for a while: the new top is held like the former one.
    let said = storm.drill(&scene, "1500ms", &[]);
    println!("{said}");
    storm.is_unharmed(&mut scene, "after an outage");
    assert!(
        scene.vm.device("data")["io"]["counters"]["recoveries"].as_u64() > Some(0),
        "{}",
        scene.vm.device("data")
    );
    let blocks = scene.vm.ok(&["blocks", "guest"]);
    println!("{blocks}");
    assert!(blocks.contains("data.two.qcow2 <- ") && blocks.contains("data.one.qcow2 <- "), "{blocks}");

    scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    scene.guest.check("sync").expect("it is written");
    let before = scene.guest.check(&format!("md5sum <{}", storm.name)).expect("a sum");
    scene.vm.ok(&["kill", "guest"]);
    scene.vm.nothing_left();
    let started = scene.vm.ok(&["start", &scene.vm.config().display().to_string()]);
    assert!(started.contains("data: starts from "), "{started}");
    scene = Scene::of_running(scene.vm);
    let name = format!("/dev/{}", scene.disk("data"));
    assert_eq!(scene.guest.check(&format!("md5sum <{name}")).expect("a sum"), before, "the guest's view");
    let verdict = scene.guest.pattern_verify(&name).expect("a verdict");
    assert!(verdict.is_consistent(), "{verdict:#?}");
    assert!(
        view(&scene.vm, &base, "raw") == one && view(&scene.vm, &overlay, "qcow2") == two,
        "what was kept"
    );
    are_sound(&scene.vm);
    scene.end();
}
