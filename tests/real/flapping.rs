//! An hour's flapping in a minute: three disks whose storage fails again and again for moments, at random and often together, while their owner is killed
//! and started anew. One is in an iothread, and one behind a proxy. The seed is fixed, so each run has the same hour.

use std::time::Duration;

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::json;
use tests::on_one;
use tests::qemu::QemuVersion;
use tests::storm::Storm;

use crate::suspension::boot;

on_one! { 7.2:
    soak_flapping => outages_at_random,
}

const SEED: [u8; 16] = *b"an hour flapping";

/// Outages in a row: thirty, or `QVIRT_ROUNDS`.
fn rounds() -> usize {
    std::env::var("QVIRT_ROUNDS").map_or(30, |text| text.parse().expect("QVIRT_ROUNDS is a number"))
}

/// Outages between two deaths of the owner.
const PER_OWNER: usize = 8;

fn outages_at_random(version: QemuVersion) {
    let mut scene = boot(version);
    let storms = [
        // By hold on QEMU 7.2, by proxy on 10.0.
        Storm::begin(&mut scene, "blk", "iothread=io1"),
        Storm::begin(&mut scene, "lun", "bus=scsi,on_error.engine=hold"),
        Storm::begin(&mut scene, "behind", "on_error.engine=proxy"),
    ];
    let mut random = TestRng::from_seed(RngAlgorithm::XorShift, &SEED);
    let mut below = |limit: u32| random.next_u32() % limit;
    for round in 0..rounds() {
        let storm = &storms[below(3) as usize];
        let kind = below(4);
        let (length, gap) = (100 + below(900), below(700));
        let arguments = json!({
            "id": storm.id, "fail-for-ms": length,
            "reads": kind == 0 || kind == 3, "writes": kind == 1 || kind == 3, "flushes": kind >= 1,
        });
        println!("round {round}: {arguments}, then {gap} ms");
        // The owner says no as long as the storage of this disk still fails.
        let drill = ["qmp", "guest", "qvirt-drill", &arguments.to_string()];
        scene.vm.wait_for("the drill before to end", || scene.vm.qvirt(&drill).code == 0);
        std::thread::sleep(Duration::from_millis(gap.into()));
        if round % PER_OWNER == PER_OWNER - 1 {
            scene.vm.kill_owner();
            scene.vm.start();
        }
    }
    for storm in storms {
        storm.waits_for(&scene, "ok");
        let report = storm.is_unharmed(&mut scene, "after the hour");
        println!(
            "{}: longest pause {} ms, {}",
            storm.id,
            report.longest_pause_us / 1000,
            storm.io(&scene)["counters"]
        );
        storm.detach(&mut scene);
    }
    scene.end();
}
