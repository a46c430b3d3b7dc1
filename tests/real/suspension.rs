//! Storage that fails while a guest writes, reads and verifies a pattern on it all the time: what the guest feels is what its disk's policy says. The
//! storage fails by a drill: a node of QEMU's own that returns errors, under the real engine.

use std::time::Duration;

use serde_json::json;
use tests::guest::PatternReport;
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::AGENT_CHANNEL;
use tests::{on_both, on_one};

use crate::faults::Follower;

on_both! {
    held => outages_that_end_in_time,
}

on_one! { 10.0:
    together => two_disks,
    overlay => a_new_top,
    many => twenty_outages,
    by_hand => what_people_say,
    watched => a_drain_that_is_not_ours,
    taken => a_node_that_cannot_be_made,
}

on_one! { 7.2:
    paused => a_vm_that_is_paused,
    at_the_end => a_timeout_that_pauses,
    owners => owners_that_die,
    nameless => an_image_whose_path_is_gone,
}

/// An iothread, and controllers with and without it.
const TABLES: &str = r#"
[[iothread]]
id = "io1"
[[scsi_controller]]
id = "plain"
[[scsi_controller]]
id = "threaded"
iothread = "io1"
"#;

pub fn boot(version: QemuVersion) -> Scene {
    Scene::boot(version, QUIET, &tables())
}

pub fn tables() -> String {
    format!("{AGENT_CHANNEL}{TABLES}")
}

fn outages_that_end_in_time(version: QemuVersion) {
    let mut scene = boot(version);
    in_time(&mut scene, "hold");
    scene.end();
}

/// Outages of each kind that the guest only feels; gives the disk, which an engine of that name retries.
pub fn in_time(scene: &mut Scene, engine: &str) -> Storm {
    let people = Follower::start(&scene.vm, "events.txt", &[]);
    let storm = Storm::begin(scene, "blk", &format!("on_error.engine={engine},on_error.timeout=1m"));
    storm.drill_felt(scene, "3s", &[]);
    let report = storm.is_unharmed(scene, "after the outage");
    assert!(report.longest_pause_us > 1_000_000, "the outage was felt: {report:#?}");
    assert_eq!(storm.io(scene)["state"], "ok");
    assert!(storm.count(scene, "retries") > 0, "{}", storm.io(scene));
    let all = [
        "device=blk",
        "path=/",
        "/blk.img",
        "operation=",
        "cause=Input/output error",
        "since-unix-ms=",
        "for-ms=",
        "attempts=",
    ];
    for (event, more) in
        [("QVIRT_IO_SUSPENDED", None), ("QVIRT_IO_RETRY", None), ("QVIRT_IO_RECOVERED", Some("lasted-ms="))]
    {
        let parts: Vec<&str> = [event].into_iter().chain(all).chain(more).collect();
        people.sees(&scene.vm, &parts);
    }
    for kind in ["--reads", "--writes"] {
        storm.drill_felt(scene, "1s", &[kind]);
        storm.is_unharmed(scene, kind);
    }
    let log = scene.vm.owner_log();
    for (counter, line) in [("suspensions", "its I/O is held"), ("recoveries", "its I/O goes on")] {
        let lines = log.lines().filter(|text| text.contains(line)).count();
        assert_eq!(lines as u64, storm.count(scene, counter), "a line for each:\n{log}");
    }
    storm
}

fn twenty_outages(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", "on_error.engine=hold");
    // A guest that is slow may not use its disk in so short a time.
    for round in 0..60 {
        if storm.count(&scene, "suspensions") >= 20 {
            break;
        }
        storm.drill(&scene, "300ms", &[]);
        storm.is_unharmed(&mut scene, &format!("after drill {round}"));
    }
    let felt = storm.count(&scene, "suspensions");
    assert!(felt >= 20 && felt == storm.count(&scene, "recoveries"), "{}", storm.io(&scene));
    scene.end();
}

fn a_vm_that_is_paused(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", "on_error.engine=pause");
    storm.drill(&scene, "1s", &[]);
    storm.is_unharmed(&mut scene, "after a pause");
    assert!(storm.count(&scene, "retries") > 0, "{}", storm.io(&scene));
    // Two of them: neither waits for the other one.
    let other = Storm::begin(&mut scene, "other", "bus=scsi,on_error.engine=pause");
    let both = [storm, other];
    both.iter().for_each(|storm| storm.fail_for(&scene, 1500));
    let paused = || scene.vm.status()["reason"] == "io-error";
    scene.vm.wait_for("the VM to be paused", paused);
    for storm in &both {
        storm.waits_for(&scene, "ok");
        storm.is_unharmed(&mut scene, "after two pauses");
    }
    scene.end();
}

fn a_timeout_that_pauses(version: QemuVersion) {
    let mut scene = boot(version);
    let wish = "on_error.engine=hold,on_error.timeout=600ms,on_error.at_timeout=pause";
    let storm = Storm::begin(&mut scene, "blk", wish);
    let told = storm.drill(&scene, "1200ms", &[]);
    assert!(told.contains("the VM is paused, as its at_timeout says"), "{told}");
    scene.vm.ok(&["resume", "guest"]);
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after the drill that paused");
    storm.fail_for(&scene, 2500);
    storm.waits_for(&scene, "timed-out");
    let paused = || scene.vm.status()["reason"] == "io-error";
    scene.vm.wait_for("the VM to be paused", paused);
    // Still broken: it is paused at once, and stays so.
    scene.vm.ok(&["resume", "guest"]);
    scene.vm.wait_for("the VM to be paused again", paused);
    std::thread::sleep(Duration::from_millis(2500));
    assert!(paused(), "nobody else lets it go on: {}", scene.vm.status());
    scene.vm.ok(&["resume", "guest"]);
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after it was resumed");
    scene.end();
}

fn two_disks(version: QemuVersion) {
    let mut scene = boot(version);
    let one = Storm::begin(&mut scene, "one", "on_error.engine=hold");
    let other = Storm::begin(&mut scene, "other", "bus=scsi,on_error.engine=hold");
    // Apart: the other one works on meanwhile.
    one.fail_for(&scene, 8000);
    one.waits_for(&scene, "suspended");
    for _ in 0..3 {
        other.is_unharmed(&mut scene, "beside a disk that fails");
    }
    // Together: one that fails while the other one is held.
    other.fail_for(&scene, 2000);
    other.waits_for(&scene, "suspended");
    assert_eq!(one.io(&scene)["state"], "suspended");
    other.waits_for(&scene, "ok");
    other.is_unharmed(&mut scene, "after both failed");
    one.waits_for(&scene, "ok");
    one.is_unharmed(&mut scene, "after both failed");
    scene.end();
}

/// What is said by hand in an outage, and what cannot be said.
fn what_people_say(version: QemuVersion) {
    let mut scene = boot(version);
    for engine in ["hold", "proxy", "pause"] {
        let storm = Storm::begin(&mut scene, engine, &format!("on_error.engine={engine}"));
        cannot_be_said(&scene, engine);
        for remedy in [&["retry", "guest", engine][..], &["set", "guest", engine, "--interval", "200ms"]] {
            scene.vm.ok(&["io", "set", "guest", engine, "--interval", "1h"]);
            storm.fail_for(&scene, 1000);
            storm.waits_for(&scene, "suspended");
            assert!(scene.vm.ok(&["list"]).contains("suspended"));
            std::thread::sleep(Duration::from_millis(1500));
            assert_eq!(storm.io(&scene)["state"], "suspended", "an hour is not over");
            scene.vm.ok(&[&["io"], remedy].concat());
            storm.waits_for(&scene, "ok");
            storm.is_unharmed(&mut scene, &remedy.join(" "));
        }
        storm.fail_for(&scene, 4000);
        storm.waits_for(&scene, "suspended");
        if engine == "pause" {
            let output = scene.vm.expect(3, &["io", "fail", "guest", engine]);
            assert!(output.stderr.contains("its requests wait in the paused device"), "{output}");
        } else {
            is_told_by_hand(&mut scene, &storm);
        }
        storm.waits_for(&scene, "ok");
        storm.goes_on(&mut scene, "after it was told by hand");
        scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    }
    scene.end();
}

fn cannot_be_said(scene: &Scene, disk: &str) {
    for (words, why) in [
        (
            &["set", "guest", disk, "--at-timeout", "hold"][..],
            "it retries for ever, so an at_timeout would be without effect",
        ),
        (&["set", "guest", disk, "--interval", "10ms"], "the interval is 100ms at least"),
        (&["retry", "guest", disk], "is not suspended"),
        (&["fail", "guest", disk], "is not suspended"),
    ] {
        let output = scene.vm.expect(3, &[&["io"], words].concat());
        assert!(output.stderr.contains(why), "{words:?}: {output}");
    }
}

fn is_told_by_hand(scene: &mut Scene, storm: &Storm) {
    scene.vm.ok(&["io", "fail", "guest", &storm.id]);
    let told = |report: &PatternReport| report.error_count > 0;
    scene.guest.wait_pattern(&storm.name, "the error", told).expect("the guest is told");
    let again = scene.vm.expect(3, &["io", "fail", "guest", &storm.id]);
    assert!(again.stderr.contains("the guest was told already"), "{again}");
}

/// Somebody stops the VM past the owner while requests are held: QEMU waits for them until they are given back, and answers.
fn a_drain_that_is_not_ours(version: QemuVersion) {
    let mut scene = boot(version);
    for engine in ["hold", "proxy"] {
        let storm = Storm::begin(&mut scene, engine, &format!("on_error.engine={engine}"));
        storm.fail_for(&scene, 6000);
        storm.waits_for(&scene, "suspended");
        scene.vm.wait_for("held requests", || storm.io(&scene)["held"].as_u64() >= Some(1));
        scene.vm.rescue("stop", json!({}));
        assert_eq!(storm.io(&scene)["state"], "suspended", "given back, and not lost");
        scene.vm.ok(&["resume", "guest"]);
        storm.waits_for(&scene, "ok");
        storm.is_unharmed(&mut scene, "after a stop by another monitor");
        storm.detach(&mut scene);
    }
    scene.end();
}

/// The name of the node that the disk is to be parked on is taken: another one is made, and nothing goes to the stranger.
fn a_node_that_cannot_be_made(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", "on_error.engine=hold");
    let stranger = json!({"driver": "null-co", "node-name": "blk-park-1", "size": 16 << 20});
    scene.vm.qmp("blockdev-add", &stranger);
    storm.fail_for(&scene, 2000);
    storm.waits_for(&scene, "suspended");
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after an outage in which a node could not be made");
    let log = scene.vm.owner_log();
    assert!(log.contains("a disk could not be moved"), "the stranger was in the way: {log}");
    scene.end();
}

/// A snapshot gives the disk another top, also in an outage: it comes back to that one.
fn a_new_top(version: QemuVersion) {
    let mut scene = boot(version);
    let base = scene.vm.qcow2("base.qcow2", Ok(16));
    let storm = Storm::on(&mut scene, "blk", &format!("path={base},format=qcow2,on_error.engine=hold"));
    storm.drill(&scene, "700ms", &[]);
    let overlay = scene.vm.path("overlay.qcow2").display().to_string();
    scene.vm.ok(&["snapshot", "create", "guest", "one", "--disk", &format!("blk={overlay}")]);
    for _ in 0..2 {
        storm.drill(&scene, "1s", &[]);
        storm.is_unharmed(&mut scene, "on the overlay");
    }
    let used = scene.vm.qmp("query-block", &json!({})).to_string();
    assert!(used.contains(&overlay), "the disk stands on its overlay: {used}");
    scene.end();
}

/// As that of a stick that was pulled: its device leaves it and comes back all the same.
fn an_image_whose_path_is_gone(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", "on_error.engine=hold");
    std::fs::rename(scene.vm.path("blk.img"), scene.vm.path("away.img")).expect("it is ours");
    storm.fail_for(&scene, 4000);
    storm.waits_for(&scene, "suspended");
    assert_eq!(scene.guest.check("sleep 1; echo alive").expect("the guest runs").trim(), "alive");
    storm.waits_for(&scene, "ok");
    storm.is_unharmed(&mut scene, "after an outage without a path");
    let log = scene.vm.owner_log();
    assert!(!log.contains("a disk could not be moved"), "{log}");
    scene.end();
}

fn owners_that_die(version: QemuVersion) {
    let mut scene = boot(version);
    let storm = Storm::begin(&mut scene, "blk", "on_error.engine=hold,on_error.timeout=10m");
    for round in 0..3 {
        storm.fail_for(&scene, 4000);
        storm.waits_for(&scene, "suspended");
        let since = storm.io(&scene)["outage"]["since_unix_ms"].clone();
        scene.vm.kill_owner();
        scene.vm.start();
        assert_eq!(storm.io(&scene)["outage"]["since_unix_ms"], since, "the first owner's clock");
        storm.waits_for(&scene, "ok");
        storm.is_unharmed(&mut scene, &format!("after owner {round} died"));
    }
    // A timeout whose clock began before the owner did.
    scene.vm.ok(&["io", "set", "guest", "blk", "--timeout", "3s"]);
    let before = storm.count(&scene, "timeouts");
    storm.fail_for(&scene, 8000);
    storm.waits_for(&scene, "suspended");
    let since = storm.io(&scene)["outage"]["since_unix_ms"].clone();
    scene.vm.kill_owner();
    scene.vm.start();
    storm.waits_for(&scene, "timed-out");
    assert_eq!(storm.io(&scene)["outage"]["since_unix_ms"], since);
    assert_eq!(storm.count(&scene, "timeouts"), before + 1);
    let told = |report: &PatternReport| report.error_count > 0;
    scene.guest.wait_pattern(&storm.name, "the error", told).expect("the guest is told");
    storm.waits_for(&scene, "ok");
    scene.end();
}
