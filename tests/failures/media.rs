//! A change of a medium that fails at each of its steps, or whose owner dies there: the drive has the one image or the other, and of the other nothing
//! is left.

use std::time::{Duration, Instant};

use tests::qemu::QemuVersion;

use crate::holdings::Holdings;
use crate::stage::Stage;

/// A change ends with a success; none has so many steps.
const MANY: u32 = 20;

/// A VM with a drive and two images for it, the first one in it.
fn drive(version: QemuVersion) -> (Stage, [String; 2]) {
    let tables = "[[scsi_controller]]\nid = \"s0\"\n[[disk]]\nid = \"cd\"\ndevice = \"cdrom\"\n";
    let stage = Stage::real(version, tables);
    let images = [stage.vm.raw("a.iso", 1, "a"), stage.vm.qcow2("b.qcow2", Ok(4))];
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    insert(&stage, &images[0]);
    (stage, images)
}

fn insert(stage: &Stage, image: &str) {
    stage.vm.ok(&["media", "guest", "cd", "insert", image, "--format", format(image)]);
}

fn format(image: &str) -> &str {
    if image.ends_with(".qcow2") { "qcow2" } else { "raw" }
}

/// All that is held, without the generations of nodes, which rise with each try.
fn held(stage: &Stage) -> Holdings {
    let Holdings(mut all) = stage.holdings();
    for names in all.values_mut() {
        for name in names.iter_mut() {
            *name = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        }
    }
    Holdings(all)
}

/// Waits until what is held is one of these.
fn is_one_of(stage: &Stage, expected: &[&Holdings], what: &str) -> usize {
    let until = Instant::now() + Duration::from_secs(15);
    loop {
        let now = held(stage);
        if let Some(found) = expected.iter().position(|one| **one == now) {
            return found;
        }
        assert!(Instant::now() < until, "{what}: {now:#?} is none of {expected:#?}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

fn each_step(version: QemuVersion, wish: &str) {
    let (stage, [first, second]) = drive(version);
    for (from, to) in [(&first, Some(&second)), (&first, None)] {
        let before = held(&stage);
        let change = |stage: &Stage| match to {
            Some(image) => {
                stage.vm.qvirt(&["media", "guest", "cd", "insert", image, "--format", format(image)])
            }
            None => stage.vm.qvirt(&["media", "guest", "cd", "eject"]),
        };
        assert_eq!(change(&stage).code, 0);
        let after = held(&stage);
        insert(&stage, from);
        is_one_of(&stage, &[&before], "there and back");
        let mut failed = 0;
        for number in 1..MANY {
            stage.adopt(&[(wish, &format!("media:{number}"))]);
            let output = change(&stage);
            if output.code == 0 {
                break;
            }
            failed += 1;
            let what = format!("{wish} at step {number}: {output}");
            if wish == "QVIRT_DIE_STEP" {
                stage.vm.wait_for("the owner's end", || stage.vm.ok(&["list"]).contains("without an owner"));
                assert_eq!((output.code, stage.start(&[]).code), (4, 0), "{what}");
            } else {
                assert_eq!(output.code, 1, "{what}");
            }
            if is_one_of(&stage, &[&before, &after], &what) == 1 {
                assert_eq!(wish, "QVIRT_DIE_STEP", "{what}");
                insert(&stage, from);
            }
        }
        assert!(failed >= 3, "{failed} steps");
        stage.adopt(&[]);
        insert(&stage, from);
    }
    stage.end();
}

#[test]
fn fails_on_qemu_7_2() {
    each_step(QemuVersion::V7_2, "QVIRT_FAIL_STEP");
}

#[test]
fn fails_on_qemu_10_0() {
    each_step(QemuVersion::V10_0, "QVIRT_FAIL_STEP");
}

#[test]
fn owner_dies_on_qemu_7_2() {
    each_step(QemuVersion::V7_2, "QVIRT_DIE_STEP");
}

#[test]
fn owner_dies_on_qemu_10_0() {
    each_step(QemuVersion::V10_0, "QVIRT_DIE_STEP");
}
