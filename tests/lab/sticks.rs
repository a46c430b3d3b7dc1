//! Disks of a guest on USB sticks of the host that are pulled while it writes, and plugged in again: the same stick is then another device.

use serde_json::json;
use tests::events::Events;
use tests::guest::PatternReport;
use tests::lab::host::usb::{STICKS, Stick};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::AGENT_CHANNEL;

/// A guest with a pattern on a stick.
fn begin(version: QemuVersion, stick: &Stick, id: &str, more: &str) -> (Scene, Storm) {
    let mut scene = step("boot", || Scene::boot(version, QUIET, AGENT_CHANNEL));
    let storm = step("attach", || attach(&mut scene, stick, id, more));
    (scene, storm)
}

fn attach(scene: &mut Scene, stick: &Stick, id: &str, more: &str) -> Storm {
    let path = stick.disk().expect("it is plugged in");
    Storm::on(scene, id, &format!("path={},{more}", path.display()))
}

/// A stick that is back at the end, whatever happens in between.
struct Pulled<'a>(&'a Stick);

impl Pulled<'_> {
    fn pull(stick: &Stick) -> Pulled<'_> {
        stick.unplug().expect("it is pulled");
        Pulled(stick)
    }

    fn plug(self) {
        drop(self);
    }
}

impl Drop for Pulled<'_> {
    fn drop(&mut self) {
        self.0.plug().expect("it is plugged in again");
    }
}

/// QEMU itself has the device that is gone. It is held, and people are told; then they unplug the disk and attach it anew.
#[test]
fn a_held_disk_is_attached_anew_on_the_stick_that_is_back() {
    inside(|| {
        let [_, blue, ..] = STICKS;
        let wish = "cache=none,on_error.engine=hold,on_error.timeout=6s,on_error.at_timeout=";
        let (mut scene, storm) = begin(QemuVersion::V7_2, &blue, "blue", &format!("{wish}report"));
        let events = Events::follow(&scene.vm, &[]);
        step("a stick is pulled", || {
            let pulled = Pulled::pull(&blue);
            storm.waits_for(&scene, "suspended");
            assert_eq!(scene.guest.check("sleep 1; echo alive").expect("the guest runs").trim(), "alive");
            let told = |report: &PatternReport| report.error_count > 0;
            scene.guest.wait_pattern(&storm.name, "the error", told).expect("the guest is told");
            storm.waits_for(&scene, "timed-out");
            pulled.plug();
        });
        step("its disk is unplugged, and attached anew", || {
            // It will not recover by itself, so the next attempt is to be the last.
            scene.vm.qmp("qvirt-io-set", &json!({"id": "blue", "at-timeout": "unplug"}));
            scene.vm.wait_for("the disk to be unplugged", || scene.vm.device("blue").is_null());
            let _ = scene.guest.pattern_stop(&storm.name);
            scene.sees("the disk is gone", |seen| seen.find("disk", "serial=blue").is_none());
            let storm = attach(&mut scene, &blue, "blue", &format!("{wish}hold"));
            storm.is_unharmed(&mut scene, "on the stick that is back");
            storm.detach(&mut scene);
        });
        let told = events.text();
        for event in ["QVIRT_IO_SUSPENDED", "QVIRT_IO_TIMED_OUT"] {
            assert!(told.lines().any(|line| line.contains(event) && line.contains("device=blue")), "{told}");
        }
        drop(events);
        scene.end();
    });
}
