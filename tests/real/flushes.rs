//! What a guest makes durable while the storage fails: its flush is held and tried again as a write is, and is never answered before it is true.

use std::time::{Duration, Instant};

use serde_json::json;
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::storm::Storm;

use crate::suspension::boot;

on_one! { 10.0:
    in_time => flushes_that_fail_and_nothing_else,
}

on_one! { 7.2:
    too_late => flushes_at_the_timeout,
}

const FAILS_FOR_MS: u64 = 6000;

/// Writes a block past the guest's page cache, so that a flush has something to do.
fn write(storm: &Storm) -> String {
    format!("dd if=/dev/zero of={} bs=4096 count=1 oflag=direct", storm.name)
}

fn flushes_that_fail_and_nothing_else(version: QemuVersion) {
    let mut scene = boot(version);
    for engine in ["hold", "proxy"] {
        let storm = Storm::calm(&mut scene, engine, &format!("on_error.engine={engine},on_error.timeout=1m"));
        let (fails_for, begin) = (Duration::from_millis(2500), Instant::now());
        let drill =
            json!({"id": storm.id, "fail-for-ms": 2500, "reads": false, "writes": false, "flushes": true});
        scene.vm.qmp("qvirt-drill", &drill);
        scene.guest.check(&write(&storm)).expect("a write is no flush");
        let said = scene.guest.check(&format!("sync {} && echo durable", storm.name)).expect("no error");
        assert_eq!(said.trim(), "durable");
        assert!(begin.elapsed() >= fails_for, "{engine}: answered after {:?}, a lie", begin.elapsed());
        storm.waits_for(&scene, "ok");
        assert_eq!(storm.count(&scene, "suspensions"), 1, "{engine}: {}", storm.io(&scene));
        assert_eq!(storm.count(&scene, "timeouts"), 0);
    }
    scene.end();
}

/// The guest is told of the failed flush by `proxy`. `hold` cannot do that: there the flush waits, and the writes are told of.
fn flushes_at_the_timeout(version: QemuVersion) {
    let mut scene = boot(version);
    for (engine, waits) in [("hold", true), ("proxy", false)] {
        let wish = format!("on_error.engine={engine},on_error.timeout=600ms");
        let storm = Storm::calm(&mut scene, engine, &wish);
        let begin = Instant::now();
        storm.fail_for(&scene, FAILS_FOR_MS);
        let (write, ended) = (write(&storm), format!("/tmp/{engine}"));
        let script = format!("({write}; sync {}; echo $? > {ended}) > /dev/null 2>&1 &", storm.name);
        scene.guest.check(&script).expect("it begins");
        storm.waits_for(&scene, "timed-out");
        let told = scene.guest.run(&write).expect("the guest lives");
        assert!(told.status != 0, "{engine}: a write is told of");
        let ended = format!("cat {ended} 2>/dev/null || echo waits");
        let mut code = || scene.guest.check(&ended).expect("the guest lives").trim().to_owned();
        if waits {
            assert_eq!(code(), "waits", "a flush is neither failed nor answered");
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while code() == "waits" {
            assert!(Instant::now() < deadline, "{engine}: the flush has not ended");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(code() == "0", waits, "{engine}: {}", code());
        if waits {
            assert!(begin.elapsed() >= Duration::from_millis(FAILS_FOR_MS), "answered before it was true");
        }
        // Without a restart. A proxy knows that its storage works when somebody uses it.
        let again = format!("{write} && sync {}", storm.name);
        while scene.guest.run(&again).expect("the guest lives").status != 0 {
            assert!(Instant::now() < deadline, "{engine}: it does not work again");
            std::thread::sleep(Duration::from_millis(100));
        }
        storm.waits_for(&scene, "ok");
        assert_eq!(storm.count(&scene, "timeouts"), 1);
    }
    scene.end();
}
