//! The matrix of disks that retry: bus, format, cache, iothread and engine, on both QEMUs, each through an outage. A sample of it by pairs, or all of it.

use tests::on_both;
use tests::qemu::QemuVersion;
use tests::scene::Scene;
use tests::storm::Storm;

use crate::suspension::boot;

on_both! {
    soak_everywhere => the_matrix,
}

/// A disk as it may be.
#[derive(Clone, Copy, Debug)]
struct Sample {
    bus: &'static str,
    format: &'static str,
    cache: &'static str,
    iothread: bool,
    engine: &'static str,
}

/// Every pair of values of two columns is in one of these, and what takes the place of those that QEMU 10.0 cannot do.
const PAIRS: [Sample; 9] = [
    Sample { bus: "virtio-blk", format: "raw", cache: "none", iothread: true, engine: "hold" },
    Sample { bus: "virtio-blk", format: "qcow2", cache: "writeback", iothread: false, engine: "hold" },
    Sample { bus: "virtio-scsi", format: "raw", cache: "writeback", iothread: true, engine: "hold" },
    Sample { bus: "virtio-scsi", format: "qcow2", cache: "none", iothread: false, engine: "hold" },
    Sample { bus: "virtio-blk", format: "qcow2", cache: "none", iothread: true, engine: "pause" },
    Sample { bus: "virtio-scsi", format: "raw", cache: "writeback", iothread: false, engine: "pause" },
    Sample { bus: "virtio-blk", format: "raw", cache: "writeback", iothread: false, engine: "proxy" },
    Sample { bus: "virtio-blk", format: "raw", cache: "none", iothread: true, engine: "proxy" },
    Sample { bus: "virtio-scsi", format: "qcow2", cache: "none", iothread: true, engine: "proxy" },
];

/// All of these engines, for `make soak`.
fn all_samples(engines: &[&'static str]) -> Vec<Sample> {
    let mut samples = Vec::new();
    for engine in engines {
        for bus in ["virtio-blk", "virtio-scsi"] {
            for format in ["raw", "qcow2"] {
                for cache in ["none", "writeback"] {
                    samples.extend([true, false].map(|iothread| Sample {
                        bus,
                        format,
                        cache,
                        iothread,
                        engine,
                    }));
                }
            }
        }
    }
    samples
}

/// Whether `check` refuses it: QEMU 10.0 loses interrupts.
fn is_refused(version: QemuVersion, sample: &Sample) -> bool {
    version == QemuVersion::V10_0 && sample.iothread && sample.engine != "proxy"
}

fn the_matrix(version: QemuVersion) {
    let mut scene = boot(version);
    let is_soak = std::env::var_os("QVIRT_ROUNDS").is_some();
    let mut samples = if is_soak { all_samples(&["hold", "pause", "proxy"]) } else { PAIRS.to_vec() };
    samples.retain(|sample| !is_refused(version, sample));
    each(&mut scene, &samples);
    scene.end();
}

/// All samples of one engine.
pub fn all_of(scene: &mut Scene, engine: &'static str) {
    each(scene, &all_samples(&[engine]));
}

fn each(scene: &mut Scene, samples: &[Sample]) {
    for (number, sample) in samples.iter().enumerate() {
        let Sample { bus, format, cache, iothread, engine } = sample;
        let id = format!("disk{number}");
        let image = match *format {
            "raw" => scene.vm.raw(&format!("{id}.img"), 4, "x"),
            _ => scene.vm.qcow2(&format!("{id}.qcow2"), Ok(4)),
        };
        let place = match (*bus, iothread) {
            ("virtio-blk", true) => "iothread=io1".to_owned(),
            ("virtio-blk", false) => "queues=1".to_owned(),
            (_, threaded) => format!("scsi.controller={}", u8::from(*threaded)),
        };
        let wish =
            format!("path={image},bus={bus},format={format},cache={cache},{place},on_error.engine={engine}");
        let storm = Storm::on(scene, &id, &wish);
        // A guest that is slow may not use its disk in so short a time.
        let felt = (0..3).any(|_| storm.drill(scene, "700ms", &[]).contains("suspended"));
        assert!(felt, "{sample:?}: three drills, and none was felt");
        let report = storm.is_unharmed(scene, &format!("{sample:?}"));
        println!("{} {sample:?}: longest pause {} ms", scene.vm.version(), report.longest_pause_us / 1000);
        storm.detach(scene);
    }
}
