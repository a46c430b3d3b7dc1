//! Disks on storage that fails: device-mapper below a virtio-blk disk, seen by the guest and by `qvirt status`.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{PatternReport, PatternWish};
use tests::lab::host::faulty::{Behaviour, FaultyDisk};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::AGENT_CHANNEL;

/// Reads or writes one block of the guest's disk past its cache; whether that went well.
fn guest_does(scene: &mut Scene, disk: &str, operation: &str) -> bool {
    let files = match operation {
        "read" => format!("if=/dev/{disk} of=/dev/null iflag=direct"),
        _ => format!("if=/dev/zero of=/dev/{disk} oflag=direct"),
    };
    let output = scene.guest.run(&format!("dd {files} bs=4096 count=1")).expect("the guest answers");
    output.status == 0
}

#[test]
fn a_disk_fails_and_the_status_says_how() {
    inside(|| {
        let storage = FaultyDisk::ready().expect("the lab's disk");
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let accelerator = scene.vm.status()["accel"].clone();
        assert!(
            accelerator.as_str().is_some_and(|text| text.starts_with("kvm")),
            "the lab's KVM runs it: {accelerator}"
        );
        let before = scene.seen.clone();
        let disk = format!("path={},id=data,serial=faulty,cache=none", storage.path().display());
        step("attach", || scene.attach(["--disk", &disk], "disk", "serial=faulty"));
        let name = scene.disk("faulty");

        // What the storage does, and whether the guest can then read and write.
        let cases = [
            (Behaviour::Works, [true, true]),
            (Behaviour::Fails, [false, false]),
            (Behaviour::ReadsFail, [false, true]),
            (Behaviour::WritesFail, [true, false]),
            (Behaviour::BadSectors { first: 0, count: 8 }, [false, false]),
            (Behaviour::BadSectors { first: 8, count: 8 }, [true, true]),
            (Behaviour::Slow(2000), [true, true]),
        ];
        for (behaviour, expected) in cases {
            step(&format!("the storage: {behaviour:?}"), || {
                storage.behave(behaviour).expect("device-mapper obeys");
                let begin = Instant::now();
                let got = ["read", "write"].map(|operation| guest_does(&mut scene, &name, operation));
                assert_eq!(got, expected, "whether the guest can read and write");
                if let Behaviour::Slow(milliseconds) = behaviour {
                    assert!(
                        begin.elapsed() >= 2 * Duration::from_millis(milliseconds.into()),
                        "each one is slow"
                    );
                }
                // Where both fail, QEMU may hold the second event back.
                let failed: &[&str] = match expected {
                    [true, true] => return,
                    [true, false] => &["write"],
                    [false, true] => &["read"],
                    [false, false] => &["read", "write"],
                };
                let fault = || scene.vm.device("data")["fault"].clone();
                let told =
                    || fault()["operation"].as_str().is_some_and(|operation| failed.contains(&operation));
                scene.vm.wait_for("the fault in the status", told);
                assert_eq!(fault()["nospace"], false, "{}", fault());
            });
        }

        let status = scene.vm.ok(&["status", "guest"]);
        println!("{status}");
        assert!(status.lines().any(|line| line.starts_with("fault:") && line.contains("data")), "{status}");

        storage.behave(Behaviour::Works).expect("device-mapper obeys");
        assert!(guest_does(&mut scene, &name, "write"), "the storage is well again");
        step("detach", || scene.detach("data", &before));
        scene.end();
    });
}

#[test]
fn a_disk_stalls_and_vanishes_and_the_guests_pattern_holds() {
    inside(|| {
        let storage = FaultyDisk::new("moody", 16).expect("a disk of this test");
        let mut scene = step("boot", || Scene::boot(QemuVersion::V7_2, QUIET, AGENT_CHANNEL));
        let disk = format!("path={},id=data,serial=moody,cache=none", storage.path().display());
        step("attach", || scene.attach(["--disk", &disk], "disk", "serial=moody"));
        let name = format!("/dev/{}", scene.disk("moody"));
        scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
        scene
            .guest
            .wait_pattern(&name, "some blocks", |report| report.verified > 20)
            .expect("the pattern goes on");

        step("the storage stalls, then goes on", || {
            storage.behave(Behaviour::Stalls).expect("device-mapper obeys");
            let hangs = |report: &PatternReport| {
                report
                    .outstanding
                    .as_ref()
                    .is_some_and(|request| report.now_us - request.since_us > 2_000_000)
            };
            scene.guest.wait_pattern(&name, "a request that hangs", hangs).expect("the guest waits");
            storage.behave(Behaviour::Works).expect("device-mapper obeys");
            let paused = |report: &PatternReport| report.longest_pause_us > 2_000_000;
            let report =
                scene.guest.wait_pattern(&name, "the end of the pause", paused).expect("the guest goes on");
            assert_eq!(
                (report.error_count, report.mismatch_count),
                (0, 0),
                "a stall is no error: {report:#?}"
            );
            println!(
                "a pause of {} us, no error, {} blocks verified",
                report.longest_pause_us, report.verified
            );
        });
        step("the storage vanishes, then comes back", || {
            storage.vanish().expect("device-mapper obeys");
            let failed = |report: &PatternReport| report.error_count > 0;
            scene.guest.wait_pattern(&name, "errors", failed).expect("the guest sees them");
            assert!(!storage.path().exists(), "the host has no such disk");
            storage.come_back().expect("device-mapper obeys");
            let before = scene.guest.pattern_report(&name).expect("a report").verified;
            let well = |report: &PatternReport| report.working && report.verified > before + 20;
            let report = scene.guest.wait_pattern(&name, "blocks again", well).expect("the guest goes on");
            println!("{} errors, then {} more blocks verified", report.error_count, report.verified - before);
        });
        let last = scene.guest.pattern_stop(&name).expect("the last report");
        assert_eq!(last.mismatch_count, 0, "what was written is there: {last:#?}");
        assert_ne!(scene.vm.device("data")["fault"], Value::Null);
        scene.vm.ok(&["detach", "guest", "data", "--wait", "30s"]);
        scene.end();
    });
}
