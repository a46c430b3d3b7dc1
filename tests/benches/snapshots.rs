//! `make bench`: what a snapshot costs, against QEMU's own command in the same run, with a guest that writes and reads all the time. Nothing here is a test.

use std::time::{Duration, Instant};

use serde_json::json;
use tests::guest::PatternWish;
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::AGENT_CHANNEL;

const ROUNDS: u32 = 9;
/// How long the guest works before and after.
const BESIDE: Duration = Duration::from_millis(700);

fn main() {
    let mut scene = Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL);
    let mut names = Vec::new();
    for id in ["ours", "raw"] {
        let image = scene.vm.raw(&format!("{id}.img"), 64, "x");
        let disk = format!("path={image},id={id},serial={id}");
        scene.attach(["--disk", &disk], "disk", &format!("serial={id}"));
        names.push(format!("/dev/{}", scene.disk(id)));
    }
    // The node that the raw command finds the disk's top by; it makes its overlays itself.
    let mut top = "raw-1-format".to_owned();
    let (mut still, mut ours, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        still.push(measured(&mut scene, &names[1], |_| {}));
        ours.push(measured(&mut scene, &names[0], |scene| {
            scene.vm.ok(&["snapshot", "create", "guest", &format!("s{round}"), "--disk", "ours"]);
        }));
        let next = format!("raw{round}");
        let file = scene.vm.path(&format!("{next}.qcow2")).display().to_string();
        raw.push(measured(&mut scene, &names[1], |scene| {
            let arguments = json!({"node-name": top, "snapshot-node-name": next, "snapshot-file": file, "format": "qcow2"});
            scene.vm.rescue("transaction", json!({"actions": [{"type": "blockdev-snapshot-sync", "data": arguments}]}));
        }));
        top = next;
    }
    let median = |times: &[(f64, f64)], part: fn(&(f64, f64)) -> f64| {
        let mut times: Vec<f64> = times.iter().map(part).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (pause, whole) = (|times: &(f64, f64)| times.0, |times: &(f64, f64)| times.1);
    println!(
        "the guest's longest gap while a snapshot is made: {:.1} ms; {:.2}x that of the raw transaction ({:.1} ms); without any {:.1} ms",
        median(&ours, pause),
        median(&ours, pause) / median(&raw, pause),
        median(&raw, pause),
        median(&still, pause)
    );
    println!(
        "`qvirt snapshot create` as a whole process: {:.1} ms, {:.2}x the raw transaction that makes its overlay ({:.1} ms)",
        median(&ours, whole),
        median(&ours, whole) / median(&raw, whole),
        median(&raw, whole)
    );
    scene.vm.ok(&["kill", "guest"]);
}

/// The longest gap of the guest's I/O on a disk while that is done, and how long it takes, in milliseconds.
fn measured(scene: &mut Scene, disk: &str, act: impl FnOnce(&mut Scene)) -> (f64, f64) {
    scene.guest.pattern_start(disk, PatternWish::default()).expect("the pattern starts");
    std::thread::sleep(BESIDE);
    let begin = Instant::now();
    act(scene);
    let took = begin.elapsed();
    std::thread::sleep(BESIDE);
    let report = scene.guest.pattern_stop(disk).expect("the pattern ends");
    assert_eq!((report.error_count, report.mismatch_count), (0, 0), "{report:#?}");
    (report.longest_pause_us as f64 / 1000.0, took.as_secs_f64() * 1000.0)
}
