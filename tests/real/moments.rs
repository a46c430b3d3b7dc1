//! Devices that come and go while the guest boots, is paused, or does not listen; and fifty times in a row on one port.

use std::time::{Duration, Instant};

use tests::guest::{BOOT, Unplug};
use tests::qemu::QemuVersion;
use tests::vm::{Vm, finished};

use tests::scene::{QUIET, Scene};
use tests::{on_both, on_one};

on_both! {
    boot => during_boot,
}

on_one! { 10.0:
    deaf_guest => a_guest_that_ignores_the_unplug,
}

on_one! { 7.2:
    paused => while_paused,
    fifty_times => fifty_times_on_one_port,
}

fn during_boot(version: QemuVersion) {
    let tables = "[[disk]]\nid = \"cold\"\npath = \"cold.img\"\nserial = \"cold\"\n";
    let vm = Vm::new(version, "quiet qvirt.delay=3", 8, tables);
    let [_, early, late, back] =
        ["cold", "early", "late", "back"].map(|name| vm.raw(&format!("{name}.img"), 4, name));
    vm.start();
    let mut guest = vm.console("con0");
    // In the firmware: a disk comes, another one is asked to leave and the guest asked again until it hears.
    vm.ok(&["attach", "guest", "--disk", &format!("path={early},id=early,serial=early")]);
    let leaving = vm.command(&["detach", "guest", "cold", "--wait", "100s"]).spawn().expect("qvirt starts");
    guest.wait_init(BOOT).expect("the guest starts");
    // The kernel is up, its drivers are not.
    vm.ok(&["attach", "guest", "--disk", &format!("path={late},id=late,serial=late")]);
    vm.ok(&["attach", "guest", "--disk", &format!("path={back},id=back,serial=back")]);
    vm.ok(&["detach", "guest", "back", "--wait", "60s"]);
    let left = finished(leaving);
    assert_eq!(left.code, 0, "the cold disk leaves in the end: {left}");
    guest.wait_ready(BOOT).expect("the guest boots");
    let done = |serials: &[&str]| {
        let serials: Vec<String> = serials.iter().map(|serial| format!("serial={serial}")).collect();
        move |seen: &tests::guest::Inventory| {
            seen.disks().len() == serials.len()
                && serials.iter().all(|serial| seen.find("disk", serial).is_some())
        }
    };
    let seen = guest.wait_inventory("early and late", done(&["early", "late"])).expect("the guest has both");
    println!("== {version}: after a boot with devices coming and going\n{seen}");
    let mut scene = Scene { vm, guest, seen };
    scene.wait_devices(&["early", "late"]);
    assert_eq!(
        (scene.read_disk("early", 5), scene.read_disk("late", 4)),
        ("early".to_owned(), "late".to_owned())
    );
    for id in ["early", "late"] {
        scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
    }
    scene.sees("no disks", done(&[]));
    scene.end();
}

fn while_paused(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let [a, b] = ["a", "b"].map(|name| scene.vm.raw(&format!("{name}.img"), 4, name));
    scene.attach(["--disk", &format!("path={a},id=a,serial=a")], "disk", "serial=a");
    scene.vm.ok(&["pause", "guest"]);
    scene.vm.wait_for("the pause in the status", || {
        scene.vm.ok(&["status", "guest"]).contains("paused (requested)")
    });
    scene.vm.ok(&["attach", "guest", "--disk", &format!("path={b},id=b,serial=b")]);
    let pending = scene.vm.expect(4, &["detach", "guest", "a", "--wait", "1s"]);
    assert!(pending.stderr.contains("leaving"), "{pending}");
    assert_eq!(scene.vm.device("a")["stage"], "leaving");
    // Its seat, its image and its id are taken until the guest has let go.
    let refused = scene.vm.expect(3, &["attach", "guest", "--disk", &format!("path={a},id=c")]);
    assert!(refused.stderr.contains("guest"), "the holder is named: {refused}");
    let shutdown = scene.vm.expect(3, &["shutdown", "guest"]);
    assert!(shutdown.stderr.contains("resume"), "{shutdown}");
    scene.vm.ok(&["resume", "guest"]);
    scene.sees("a gone and b come after the pause", |seen| {
        seen.find("disk", "serial=a").is_none() && seen.find("disk", "serial=b").is_some()
    });
    scene.wait_devices(&["b"]);
    scene.attach(["--disk", &format!("path={a},id=a,serial=a")], "disk", "serial=a");

    // Somebody who waits is answered when the VM goes on.
    scene.vm.ok(&["pause", "guest"]);
    let waiting = scene.vm.command(&["detach", "guest", "b", "--wait", "60s"]).spawn().expect("qvirt starts");
    scene.vm.wait_for("b to leave", || scene.vm.device("b")["stage"] == "leaving");
    // So is somebody who wants to replace it: the image, the id and the seat are free then.
    let wish = format!("path={b},id=b,serial=again");
    scene.vm.expect(3, &["attach", "guest", "--disk", &wish]);
    let replacing = scene
        .vm
        .command(&["attach", "guest", "--disk", &wish, "--wait", "60s"])
        .spawn()
        .expect("qvirt starts");
    std::thread::sleep(Duration::from_millis(300));
    scene.vm.ok(&["resume", "guest"]);
    for program in [waiting, replacing] {
        let output = finished(program);
        assert_eq!(output.code, 0, "{output}");
    }
    scene.sees("b replaced", |seen| {
        seen.find("disk", "serial=b").is_none() && seen.find("disk", "serial=again").is_some()
    });
    scene.end();
}

fn fifty_times_on_one_port(version: QemuVersion) {
    let mut scene = Scene::of(Vm::new(version, QUIET, 1, ""));
    let image = scene.vm.raw("lap.img", 4, "lap");
    let begin = Instant::now();
    for lap in 1..=50 {
        scene.vm.ok(&["attach", "guest", "--disk", &format!("path={image},id=lap,serial=lap-{lap}")]);
        // No inventory for each lap: it costs more than the lap. It counts the disk when it can read this lap's serial number.
        let script = format!(
            "n=0; until [ \"$(cat /sys/block/vda/serial 2>/dev/null)\" = lap-{lap} ]; do \
             n=$((n + 1)); [ $n -lt 1000 ] || exit 1; usleep 10000; done; echo lap-{lap} >>/tmp/laps"
        );
        scene.guest.check(&script).unwrap_or_else(|error| panic!("lap {lap}: {error}"));
        scene.vm.ok(&["detach", "guest", "lap", "--wait", "30s"]);
        scene.guest.check("[ ! -e /sys/block/vda ]").unwrap_or_else(|error| panic!("lap {lap}: {error}"));
    }
    let counted = scene.guest.check("sort -u /tmp/laps | wc -l").expect("a script");
    println!("== {version}: the guest counted {} laps in {:.1?}", counted.trim(), begin.elapsed());
    assert_eq!(counted.trim(), "50");
    let before = scene.seen.clone();
    scene.sees("all as before the first lap", |seen| *seen == before);
    assert_eq!(scene.vm.status()["seats"][0]["free"], 1);
    scene.end();
}

fn a_guest_that_ignores_the_unplug(version: QemuVersion) {
    let tables: String = (1..=4)
        .map(|n| format!("[[disk]]\nid = \"d{n}\"\npath = \"d{n}.img\"\nserial = \"d{n}\"\n\n"))
        .collect();
    let vm = Vm::new(version, "quiet qvirt.nohotplug=1", 2, &tables);
    (1..=4).for_each(|n| drop(vm.raw(&format!("d{n}.img"), 4, "x")));
    let mut scene = Scene::of(vm);
    let gone = |serial: &str| {
        let word = format!("serial={serial}");
        move |seen: &tests::guest::Inventory| seen.find("disk", &word).is_none()
    };

    // Pending, then finished by the owner that asked.
    scene.vm.expect(4, &["detach", "guest", "d1", "--wait", "1s"]);
    scene.sees("all four still there", |seen| seen.disks().len() == 4);
    scene.guest.unplug(Unplug::Answer).expect("the guest hears again");
    scene.sees("d1 gone", gone("d1"));
    scene.wait_devices(&["d2", "d3", "d4"]);

    // Pending, the owner killed, finished by the next one.
    scene.guest.unplug(Unplug::Ignore).expect("the guest is deaf");
    scene.vm.expect(4, &["detach", "guest", "d2", "--wait", "1s"]);
    scene.vm.kill_owner();
    let orphan = scene.vm.ok(&["list"]);
    assert!(orphan.contains("without an owner"), "{orphan}");
    scene.vm.start();
    assert_eq!(scene.vm.device("d2")["stage"], "leaving");
    scene.sees("d2 still there after the adoption", |seen| seen.find("disk", "serial=d2").is_some());
    scene.guest.unplug(Unplug::Answer).expect("the guest hears again");
    scene.sees("d2 gone", gone("d2"));
    scene.wait_devices(&["d3", "d4"]);

    // The guest lets go while nobody owns the VM: the next owner finds out by asking.
    scene.guest.unplug(Unplug::Ignore).expect("the guest is deaf");
    scene.vm.expect(4, &["detach", "guest", "d3", "--wait", "500ms"]);
    scene.vm.kill_owner();
    scene.guest.unplug(Unplug::Answer).expect("the guest hears again");
    scene.sees("d3 gone", gone("d3"));
    scene.vm.start();
    scene.wait_devices(&["d4"]);

    // Somebody waits long enough.
    scene.guest.unplug(Unplug::Ignore).expect("the guest is deaf");
    let waiting =
        scene.vm.command(&["detach", "guest", "d4", "--wait", "60s"]).spawn().expect("qvirt starts");
    scene.vm.wait_for("d4 to leave", || scene.vm.device("d4")["stage"] == "leaving");
    std::thread::sleep(Duration::from_secs(1));
    scene.guest.unplug(Unplug::Answer).expect("the guest hears again");
    let left = finished(waiting);
    assert_eq!(left.code, 0, "{left}");
    scene.sees("d4 gone", gone("d4"));
    let nodes = scene.vm.qmp("query-named-block-nodes", &serde_json::json!({"flat": true}));
    assert_eq!(nodes, serde_json::json!([]));
    // All images are free again.
    let again = format!("path={},id=again,serial=again", scene.vm.path("d2.img").display());
    scene.attach(["--disk", &again], "disk", "serial=again");
    scene.end();
}
