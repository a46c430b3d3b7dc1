//! Snapshots where there is no room: refused beforehand, or an outage, or a merge that fails and is done again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use tests::chain::{are_sound, states};
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::{QUIET, Scene};
use tests::storm::Storm;
use tests::vm::{AGENT_CHANNEL, Vm, finished};

/// A file system of its own, of 12 MiB, of which something else may take a part; unmounted with the value.
pub struct Small(PathBuf);

impl Small {
    /// Mounted in a VM's folder.
    pub fn beside(vm: &Vm) -> Small {
        let small = Small(vm.path("small"));
        std::fs::create_dir(&small.0).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=12m", "small"]).arg(&small.0);
        assert!(mount.status().expect("mount runs").success(), "a small file system");
        small
    }

    /// A file on it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Takes room away.
    pub fn fill(&self, mib: usize) {
        std::fs::write(self.0.join("ballast"), vec![0; mib << 20]).expect("the ballast is written");
    }

    /// Gives it back.
    pub fn relieve(&self) {
        std::fs::remove_file(self.0.join("ballast")).expect("room is made");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// An image of 8 MiB that takes no room yet.
pub fn thin(path: &str) {
    File::create(Path::new(path)).and_then(|file| file.set_len(8 << 20)).expect("a thin image");
}

const WISH: &str = "on_error.engine=hold";

#[test]
fn snapshots_without_room() {
    inside(|| {
        let mut scene = step("boot", || Scene::boot(QemuVersion::V10_0, QUIET, AGENT_CHANNEL));
        let small = Small::beside(&scene.vm);
        step("an overlay fills its file system while its layer goes", || overlay(&mut scene, &small));
        step("the image below has no room for what is merged into it", || base(&mut scene, &small));
        scene.end();
    });
}

/// What the guest writes goes to an overlay that finds no room, which is an outage. A commit that goes on meanwhile cannot end: the disk's device is
/// where its requests are held.
fn overlay(scene: &mut Scene, small: &Small) {
    let base = scene.vm.path("near.img").display().to_string();
    thin(&base);
    let storm = Storm::on(scene, "near", &format!("path={base},{WISH}"));
    small.fill(11);
    let disk = format!("near={}", small.path("top.qcow2"));
    let create = ["snapshot", "create", "guest", "one", "--disk", &disk];
    let refused = scene.vm.expect(3, &create);
    assert!(refused.stderr.contains("no room") && refused.stderr.contains("--sparse"), "{refused}");
    assert!(!Path::new(&small.path("top.qcow2")).exists() && states(&scene.vm).is_empty(), "nothing is left");
    scene.vm.ok(&[&create[..], &["--sparse"]].concat());
    // So slow that it cannot end before the overlay is full.
    let mut command = scene.vm.command(&["snapshot", "delete", "guest", "one", "--speed", "4KiB"]);
    let deletion = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("qvirt starts");
    storm.waits_for(scene, "suspended");
    // The commit could still end while the device is not where its requests are held, as at each attempt: the one that is due is the last.
    scene.vm.ok(&["io", "set", "guest", "near", "--interval", "1h"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    scene.vm.wait_for("held requests", || storm.io(scene)["held"].as_u64() >= Some(1));
    // By qvirt that is refused now, as all that changes the disk is.
    scene.vm.rescue("block-job-set-speed", json!({"device": "near-merge", "speed": 0}));
    print!("{}{}", scene.vm.ok(&["io", "status", "guest"]), scene.vm.ok(&["jobs", "guest"]));
    let refused = scene.vm.expect(3, &["block", "commit", "guest", "near"]);
    assert!(refused.stderr.contains("block commit is refused: I/O of disk near"), "{refused}");
    let output = finished(deletion);
    assert!(
        output.code == 1 && output.stderr.contains("the I/O of disk near was held meanwhile"),
        "{output}"
    );
    small.relieve();
    scene.vm.ok(&["io", "set", "guest", "near", "--interval", "200ms"]);
    storm.waits_for(scene, "ok");
    storm.is_unharmed(scene, "on the layer that stayed");
    print!("{}", scene.vm.ok(&["blocks", "guest"]));
    print!("{}", scene.vm.ok(&["block", "commit", "guest", "near"]));
    storm.is_unharmed(scene, "on the base");
    are_sound(&scene.vm);
    storm.detach(scene);
}

/// The merge fails, the disk is as it was, and with room it is done.
fn base(scene: &mut Scene, small: &Small) {
    let base = small.path("far.img");
    thin(&base);
    let disk = format!("far={}", scene.vm.path("far.one.qcow2").display());
    scene.attach(["--disk", &format!("path={base},id=far,serial=far")], "disk", "serial=far");
    scene.vm.ok(&["snapshot", "create", "guest", "one", "--disk", &disk]);
    let name = format!("/dev/{}", scene.disk("far"));
    scene
        .guest
        .check(&format!("dd if=/dev/urandom of={name} bs=64k oflag=direct; sync"))
        .expect("it is written");
    let sum = |scene: &mut Scene| {
        let sum = format!("echo 3 >/proc/sys/vm/drop_caches; md5sum <{name}");
        scene.guest.check(&sum).expect("the guest reads it")
    };
    let before = sum(scene);
    small.fill(8);
    let failed = scene.vm.expect(1, &["snapshot", "delete", "guest", "one"]);
    assert!(
        failed.stderr.contains("each disk is as it was") && failed.stderr.contains("No space left"),
        "{failed}"
    );
    println!("{failed}");
    assert_eq!(sum(scene), before, "the guest's view");
    small.relieve();
    print!("{}", scene.vm.ok(&["block", "commit", "guest", "far"]));
    assert_eq!(sum(scene), before, "the guest's view on the base");
    assert!(!scene.vm.path("far.one.qcow2").exists(), "the layer is gone");
    scene.vm.ok(&["detach", "guest", "far", "--wait", "30s"]);
}
