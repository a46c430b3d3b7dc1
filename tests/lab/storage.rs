//! Storage that fails or hangs, and what must not wait for it: a start, a check, an attach, and the end of a VM.

use std::time::{Duration, Instant};

use tests::guest::PatternWish;
use tests::lab::host::faulty::{Behaviour, FaultyDisk};
use tests::lab::{inside, patience, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::{AGENT_CHANNEL, Output, Vm};

/// What a command may take that promises some seconds, in a host that is emulated.
const IN_TIME: Duration = Duration::from_secs(30);

/// Runs qvirt, which must be back in time.
fn timely(vm: &Vm, arguments: &[&str]) -> Output {
    step(&format!("qvirt {}", arguments.join(" ")), || {
        let begin = Instant::now();
        let output = vm.qvirt(arguments);
        assert!(begin.elapsed() < patience(IN_TIME), "{:?}: {output}", begin.elapsed());
        println!("{output}");
        output
    })
}

#[test]
fn storage_is_out_of_order_at_a_start() {
    inside(|| {
        let storage = FaultyDisk::new("sick", 16).expect("a disk of this test");
        let path = storage.path().display().to_string();
        let vm =
            Vm::new(QemuVersion::V10_0, QUIET, 4, &format!("[[disk]]\nid = \"data\"\npath = {path:?}\n"));
        let file = vm.config().display().to_string();
        let cases = [
            (Behaviour::Fails, "reading it failed: Input/output error"),
            (Behaviour::Stalls, "reading it has no answer after 5s: repair its storage"),
        ];
        for (behaviour, reason) in cases {
            storage.behave(behaviour).expect("device-mapper obeys");
            for command in ["check", "start"] {
                let output = timely(&vm, &[command, &file]);
                assert_eq!(output.code, 2, "{output}");
                assert!(output.stderr.contains(&format!("{path}: {reason}")), "{output}");
            }
        }
        storage.behave(Behaviour::Works).expect("device-mapper obeys");
        vm.nothing_left();
        vm.ok(&["start", "--paused", &file]);
        vm.end();
    });
}

#[test]
fn a_vm_on_storage_that_hangs_is_killed() {
    inside(|| {
        let storage = FaultyDisk::new("stuck", 16).expect("a disk of this test");
        let path = storage.path().display().to_string();
        let proxied = "on_error.read=retry,on_error.write=retry,on_error.engine=proxy";
        for (owned, more) in [(true, ""), (false, ""), (true, proxied)] {
            let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
            let disk = format!("path={path},id=data,serial=stuck,cache=none,{more}");
            let disk = disk.trim_end_matches(',');
            step("attach", || scene.attach(["--disk", disk], "disk", "serial=stuck"));
            let name = format!("/dev/{}", scene.disk("stuck"));
            scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
            scene.guest.wait_pattern(&name, "a block", |report| report.verified > 0).expect("it goes on");
            storage.behave(Behaviour::Stalls).expect("device-mapper obeys");
            let hangs = |report: &tests::guest::PatternReport| {
                report.outstanding.as_ref().is_some_and(|r| report.now_us - r.since_us > 1_000_000)
            };
            scene.guest.wait_pattern(&name, "a request that hangs", hangs).expect("the guest waits");
            let output = timely(&scene.vm, &["attach", "guest", "--disk", &format!("path={path},id=twin")]);
            assert!(output.code == 3 && output.stderr.contains("has no answer after 5s"), "{output}");

            if !owned {
                scene.vm.kill_owner();
            }
            let output = timely(&scene.vm, &["kill", "guest"]);
            let held = format!("killed, still held by the kernel in I/O on {path}");
            assert!(output.code == 4 && output.stderr.contains(&held), "{output}");
            assert_eq!(scene.vm.leases().len(), 1, "the disk is still in use");
            if owned && more.is_empty() {
                let status = scene.vm.ok(&["status", "guest"]);
                assert!(status.contains(&held), "{status}");
            }
            storage.behave(Behaviour::Works).expect("device-mapper obeys");
            if owned {
                scene.vm.wait_for("the end of its owner", || scene.vm.leases().is_empty());
            } else {
                let dead = || scene.vm.ok(&["list"]).contains("dead, to be recovered");
                scene.vm.wait_for("the end of QEMU", dead);
                scene.vm.ok(&["recover", "guest"]);
            }
            scene.vm.nothing_left();
        }
    });
}
