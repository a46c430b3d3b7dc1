//! Disks that retry on storage that hangs: a suspended device-mapper device neither fails nor answers, and a file whose server is halted does not.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::events::Events;
use tests::guest::{PatternReport, PatternWish};
use tests::lab::host::far::FarFile;
use tests::lab::host::faulty::{Behaviour, FaultyDisk};
use tests::lab::host::frozen::FrozenFile;
use tests::lab::{inside, patience, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::vm::AGENT_CHANNEL;

/// How long `qvirt` may take to answer while storage hangs.
const AT_ONCE: Duration = Duration::from_secs(5);

/// An owner looks at its disks some times in so long.
const LOOKS: Duration = Duration::from_secs(4);

/// What a disk stands on.
enum Storage {
    Near(FaultyDisk),
    Far(FarFile),
    Frozen(FrozenFile),
}

/// A guest with a pattern on a disk whose storage does as it is told.
struct Hanging {
    scene: Scene,
    storage: Storage,
    name: String,
    events: Events,
}

impl Hanging {
    fn begin(version: QemuVersion, name: &str, storage: Storage, more: &str) -> Hanging {
        let path = match &storage {
            Storage::Near(disk) => disk.path(),
            Storage::Far(file) => file.path().to_owned(),
            Storage::Frozen(file) => file.path().to_owned(),
        };
        let mut scene = step("boot", || Scene::boot(version, QUIET, AGENT_CHANNEL));
        let events = Events::follow(&scene.vm, &["--json"]);
        let disk = format!(
            "path={},id=data,serial={name},cache=none,on_error.read=retry,on_error.write=retry,on_error.interval=500ms,{more}",
            path.display()
        );
        step("attach", || scene.attach(["--disk", &disk], "disk", &format!("serial={name}")));
        let name = format!("/dev/{}", scene.disk(name));
        scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
        let mut hanging = Hanging { scene, storage, name, events };
        hanging.goes_on("at the start");
        hanging
    }

    /// Waits until the pattern has verified more blocks, without an error so far.
    fn goes_on(&mut self, when: &str) -> PatternReport {
        let before = self.scene.guest.pattern_report(&self.name).expect("a report").verified;
        let more = |report: &PatternReport| report.verified > before + 20;
        let what = format!("pattern that goes on {when}");
        let report = self.scene.guest.wait_pattern(&self.name, &what, more).expect("it goes on");
        assert_eq!((report.error_count, report.mismatch_count), (0, 0), "{when}: {report:#?}");
        report
    }

    fn behaves(&self, behaviour: Behaviour) {
        println!("the storage: {behaviour:?}");
        match &self.storage {
            Storage::Near(disk) => disk.behave(behaviour).expect("device-mapper obeys"),
            Storage::Far(file) => {
                file.answers(behaviour == Behaviour::Works).expect("its server obeys");
            }
            Storage::Frozen(file) => {
                file.thaws(behaviour == Behaviour::Works).expect("its file system obeys");
            }
        }
    }

    fn io(&self) -> Value {
        self.scene.vm.device("data")["io"].clone()
    }

    fn is(&self, state: &str) {
        let begin = Instant::now();
        let mut longest = Duration::ZERO;
        loop {
            let asked = Instant::now();
            let io = self.io();
            longest = longest.max(asked.elapsed());
            if io["state"] == state {
                println!("{state} after {:.1?}; a status took {longest:.1?} at most", begin.elapsed());
                assert!(longest < AT_ONCE, "a status took {longest:?}");
                return;
            }
            assert!(
                begin.elapsed() < patience(Duration::from_secs(30)),
                "not {state} but {io}:\n{}",
                self.scene.vm.owner_log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn events(&self, name: &str) -> usize {
        self.events.text().lines().filter(|line| line.contains(&format!("{name:?}"))).count()
    }

    /// It hangs: everybody is told, nothing is done that drains, and the answers come at once.
    fn is_seen_to_hang(&self) {
        self.is("hung");
        let vm = &self.scene.vm;
        let begin = Instant::now();
        let why =
            ["I/O of disk data", "nothing is attached or detached while the storage of disk data hangs"];
        for (id, why) in ["data", "con0"].into_iter().zip(why) {
            let output = vm.qvirt(&["detach", "guest", id]);
            assert!(
                output.code == 3 && output.stderr.contains(why) && output.stderr.contains("hangs"),
                "{output}"
            );
        }
        for arguments in [&["list"][..], &["status", "guest"], &["io", "status", "guest"]] {
            let text = vm.ok(arguments);
            print!("$ qvirt {}\n{text}", arguments.join(" "));
            assert!(text.contains("hangs"), "{text}");
        }
        println!("five answers in {:.1?}", begin.elapsed());
        assert!(begin.elapsed() < patience(AT_ONCE * 5));
    }

    fn end(mut self) {
        println!("{}\n{}", self.io(), self.scene.vm.owner_log());
        self.scene.guest.pattern_stop(&self.name).expect("the pattern ends");
        let verdict = self.scene.guest.pattern_verify(&self.name).expect("a verdict");
        assert_eq!((verdict.mismatch_count, verdict.stale), (0, 0), "{verdict:#?}");
        self.scene.vm.ok(&["detach", "guest", "data", "--wait", "30s"]);
        drop(self.events);
        self.scene.end();
    }
}

/// Storage that hangs while it is used. Owners come and go meanwhile.
fn hangs_in_use(disk: &mut Hanging) {
    step("the storage hangs while the guest uses it", || {
        disk.behaves(Behaviour::Stalls);
        disk.is_seen_to_hang();
        disk.scene.vm.kill_owner();
        disk.scene.vm.start();
        assert_eq!(disk.io()["state"], "hung", "the next owner knows at once");
        // Whoever follows events finds the next owner a moment later, and must not miss the end.
        disk.scene.vm.wait_for("the follower", || disk.events("QVIRT_OWNER_BACK") == 1);
        std::thread::sleep(LOOKS);
        assert_eq!(disk.io()["state"], "hung", "and does not forget it");
        disk.behaves(Behaviour::Works);
        disk.is("ok");
        disk.goes_on("after the hang");
    });
}

/// The same, storage that hangs when it is to be tried again, and storage that fails after it hung.
fn hangs_thrice(mut disk: Hanging) {
    hangs_in_use(&mut disk);
    step("the storage fails, then hangs, then works", || {
        disk.behaves(Behaviour::Fails);
        disk.is("suspended");
        disk.scene.vm.wait_for("attempts", || disk.io()["counters"]["retries"].as_u64() >= Some(3));
        disk.behaves(Behaviour::Stalls);
        disk.is_seen_to_hang();
        disk.behaves(Behaviour::Works);
        disk.is("ok");
        disk.goes_on("after the outage");
    });
    step("the storage hangs, then fails, then works", || {
        disk.behaves(Behaviour::Stalls);
        disk.is("hung");
        disk.behaves(Behaviour::Fails);
        disk.is("suspended");
        disk.behaves(Behaviour::Works);
        disk.is("ok");
        disk.goes_on("after the hang that failed");
    });
    assert_eq!((disk.events("QVIRT_IO_HUNG"), disk.events("QVIRT_IO_ANSWERS")), (3, 3));
    assert_eq!(disk.io()["counters"]["hangs"], 3);
    disk.end();
}

#[test]
fn a_virtio_blk_disk_hangs_and_the_guest_never_knows() {
    inside(|| {
        let storage = Storage::Near(FaultyDisk::new("stuckblk", 16).expect("a disk of this test"));
        hangs_thrice(Hanging::begin(
            QemuVersion::V10_0,
            "stuckblk",
            storage,
            "bus=virtio-blk,on_error.engine=hold",
        ));
    });
}

/// As on NFS: nothing fails, and whoever asks the file anything waits as well.
#[test]
fn a_server_stops_answering_and_the_guest_never_knows() {
    inside(|| {
        let storage = Storage::Far(FarFile::new("far", 16).expect("a file of this test"));
        let mut disk =
            Hanging::begin(QemuVersion::V10_0, "farfile", storage, "bus=virtio-blk,on_error.engine=hold");
        hangs_in_use(&mut disk);
        assert_eq!((disk.events("QVIRT_IO_HUNG"), disk.events("QVIRT_IO_ANSWERS")), (1, 1));
        disk.end();
    });
}

#[test]
fn a_disk_behind_a_proxy_hangs_and_the_guest_never_knows() {
    inside(|| {
        let storage = Storage::Near(FaultyDisk::new("stuckfar", 4).expect("a disk of this test"));
        let more = "bus=virtio-blk,on_error.engine=proxy";
        let mut disk = Hanging::begin(QemuVersion::V10_0, "stuckfar", storage, more);
        hangs_in_use(&mut disk);
        assert_eq!((disk.events("QVIRT_IO_HUNG"), disk.events("QVIRT_IO_ANSWERS")), (1, 1));
        disk.end();
    });
}

mod soak {
    use super::*;

    #[test]
    fn a_scsi_disk_hangs_and_the_guest_never_knows() {
        inside(|| {
            let storage = Storage::Near(FaultyDisk::new("stuckscsi", 16).expect("a disk of this test"));
            hangs_thrice(Hanging::begin(
                QemuVersion::V7_2,
                "stuckscsi",
                storage,
                "bus=scsi,on_error.engine=hold",
            ));
        });
    }

    /// Its VM stands still while the storage fails, and hangs with a request that is tried.
    #[test]
    fn a_disk_that_pauses_its_vm_hangs_and_the_guest_never_knows() {
        inside(|| {
            let storage = Storage::Near(FaultyDisk::new("stuckpause", 16).expect("a disk of this test"));
            let more = "bus=virtio-blk,on_error.engine=pause";
            hangs_thrice(Hanging::begin(QemuVersion::V7_2, "stuckpause", storage, more));
        });
    }

    /// Its writes wait in the kernel, and what else the proxy is asked is answered.
    #[test]
    fn a_file_behind_a_proxy_is_frozen_and_the_guest_never_knows() {
        inside(|| {
            let storage = Storage::Frozen(FrozenFile::new("frozen", 8).expect("a file of this test"));
            let more = "bus=virtio-blk,on_error.engine=proxy";
            let mut disk = Hanging::begin(QemuVersion::V10_0, "frozen", storage, more);
            hangs_in_use(&mut disk);
            step("reads are done while writes hang", || {
                disk.behaves(Behaviour::Stalls);
                disk.is_seen_to_hang();
                let read = format!("dd if={} of=/dev/null bs=4096 count=1 skip=9 iflag=direct", disk.name);
                for _ in 0..4 {
                    disk.scene.guest.check(&read).expect("a read");
                    std::thread::sleep(LOOKS / 2);
                    assert_eq!(disk.io()["state"], "hung");
                }
                disk.behaves(Behaviour::Works);
                disk.is("ok");
                disk.goes_on("after reads");
            });
            assert_eq!((disk.events("QVIRT_IO_HUNG"), disk.events("QVIRT_IO_ANSWERS")), (2, 2));
            disk.end();
        });
    }
}
