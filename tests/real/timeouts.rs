//! Outages that last longer than the timeout: on each bus each engine does what `at_timeout` says or is refused, the user is told, and the disk works
//! afterwards without a restart.

use std::fmt;

use tests::guest::PatternReport;
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::storm::Storm;

use crate::faults::Follower;
use crate::suspension::boot;

on_one! { 7.2:
    paused => pause,
}

on_one! { 10.0:
    held => hold,
    proxied => proxy,
}

/// What a disk is asked to do.
pub struct Case {
    pub engine: &'static str,
    pub bus: &'static str,
    pub act: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bus={},on_error.engine={},on_error.at_timeout={}", self.bus, self.engine, self.act)
    }
}

impl Case {
    /// Holes of the table of engines.
    fn is_possible(&self) -> bool {
        match (self.engine, self.bus, self.act) {
            ("hold", "virtio-scsi", "report") => false,
            ("pause", _, act) => act == "pause",
            _ => true,
        }
    }
}

const INTERVAL_MS: u64 = 200;
const TIMEOUT_MS: u64 = 600;
const FAILS_FOR_MS: u64 = 4000;

fn hold(version: QemuVersion) {
    each_act("hold", version);
}

fn proxy(version: QemuVersion) {
    each_act("proxy", version);
}

fn pause(version: QemuVersion) {
    each_act("pause", version);
}

fn each_act(engine: &'static str, version: QemuVersion) {
    let mut scene = boot(version);
    for bus in ["virtio-blk", "virtio-scsi"] {
        for act in ["report", "hold", "pause", "unplug"] {
            let case = Case { engine, bus, act };
            if case.is_possible() {
                times_out(&mut scene, &case);
            } else {
                is_refused(&scene, &case);
            }
        }
    }
    scene.end();
}

fn is_refused(scene: &Scene, case: &Case) {
    let image = scene.vm.raw("refused.img", 4, "x");
    let wish = format!("path={image},on_error.read=retry,on_error.timeout=1s,{case}");
    let output = scene.vm.qvirt(&["attach", "guest", "--disk", &wish]);
    assert!(output.code == 3 && output.stderr.contains("on_error.engine"), "{case}: {output}");
}

/// An outage of that case, and what follows.
pub fn times_out(scene: &mut Scene, case: &Case) {
    println!("-- {case}");
    let id = format!("{}-{}", &case.bus["virtio-".len()..], case.act);
    let people = Follower::start(&scene.vm, &format!("{id}.txt"), &[]);
    let storm = Storm::begin(scene, &id, &format!("{case},on_error.timeout={TIMEOUT_MS}ms"));
    let (event, action) = ("QVIRT_IO_TIMED_OUT", format!("action={}", case.act));
    let told = || people.lines(&[event, &format!("device={id} "), &action]);
    if case.act == "unplug" {
        let said = storm.drill(scene, "60s", &[]);
        assert!(said.contains("the disk was unplugged, as its at_timeout says"), "{said}");
    } else {
        // A guest that is slow may not use its disk in so short a time.
        for _ in 0..3 {
            storm.fail_for(scene, FAILS_FOR_MS);
            let is_over = || !told().is_empty() || storm.io(scene)["drilled"] == false;
            scene.vm.wait_for("the timeout, or the end", is_over);
            if !told().is_empty() {
                break;
            }
        }
    }
    scene.vm.wait_for("the timeout to be told", || !told().is_empty());
    is_in_time(&told()[0]);
    match case.act {
        "report" => reported(scene, storm, case.engine),
        "hold" => still_held(scene, storm),
        "pause" => paused(scene, storm),
        _ => unplugged(scene, storm, case),
    }
    let outages = if (case.engine, case.act) == ("proxy", "report") { 2 } else { 1 };
    assert_eq!(told().len(), outages, "once for an outage:\n{}", people.text());
}

/// No sooner than the timeout (by a clock that began a moment before the owner's, if that is QEMU's), and no later than an attempt after it, tenfold.
fn is_in_time(event: &str) {
    let milliseconds =
        event.split_once(" for-ms=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let milliseconds: u64 = milliseconds.unwrap_or_else(|| panic!("no time in {event}"));
    assert!((TIMEOUT_MS * 9 / 10..=(TIMEOUT_MS + INTERVAL_MS) * 10).contains(&milliseconds), "{event}");
}

fn lives(scene: &mut Scene) {
    assert_eq!(scene.guest.check("echo alive").expect("the guest lives").trim(), "alive");
}

fn reported(scene: &mut Scene, storm: Storm, engine: &str) {
    let told = |report: &PatternReport| report.error_count > 0;
    scene.guest.wait_pattern(&storm.name, "the error", told).expect("the guest is told");
    lives(scene);
    storm.waits_for(scene, "ok");
    let before = storm.report(scene).error_count;
    let report = storm.goes_on(scene, "after the repair, without a restart");
    assert_eq!((report.error_count, report.mismatch_count), (before, 0), "{report:#?}");
    if engine == "proxy" {
        // The guest was told and waits for nothing: the disk can leave while its storage fails.
        storm.fail_for(scene, 60_000);
        storm.waits_for(scene, "timed-out");
    }
    scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    scene.vm.ok(&["detach", "guest", &storm.id, "--wait", "30s"]);
}

fn still_held(scene: &mut Scene, storm: Storm) {
    lives(scene);
    storm.waits_for(scene, "ok");
    storm.is_unharmed(scene, "after a timeout that holds");
    assert_eq!(storm.count(scene, "timeouts"), 1);
    storm.detach(scene);
}

fn paused(scene: &mut Scene, storm: Storm) {
    let is_paused = || scene.vm.status()["reason"] == "io-error";
    scene.vm.wait_for("the VM to be paused", is_paused);
    // Past the end of the outage, of which nobody but who resumes it can make use.
    std::thread::sleep(std::time::Duration::from_millis(FAILS_FOR_MS));
    assert!(is_paused(), "nobody lets it go on: {}", scene.vm.status());
    scene.vm.wait_for("the end of the drill", || {
        scene.vm.ok(&["resume", "guest"]);
        storm.io(scene)["state"] == "ok"
    });
    storm.is_unharmed(scene, "after it was resumed");
    storm.detach(scene);
}

fn unplugged(scene: &mut Scene, storm: Storm, case: &Case) {
    assert!(scene.vm.device(&storm.id).is_null());
    lives(scene);
    // It failed until it was gone.
    scene.guest.pattern_stop(&storm.name).expect("the pattern ends");
    let image = scene.vm.path(&format!("{}.img", storm.id)).display().to_string();
    let storm = Storm::on(scene, &storm.id, &format!("path={image},{case},on_error.timeout=1m"));
    storm.is_unharmed(scene, "attached anew");
    storm.detach(scene);
}
