//! Disk errors, made by QEMU's blkdebug: the guest feels what the policy says, and `events` and `status` show them at the right device.

use std::process::{Child, Stdio};

use serde_json::{Value, json};
use tests::guest::SCRIPT;
use tests::qemu::QemuVersion;
use tests::vm::Vm;

use tests::on_one;
use tests::scene::{QUIET, Scene};

on_one! { 7.2:
    policies => each_policy,
}

/// `qvirt events guest`, written to a file; ended with the value.
pub struct Follower {
    program: Child,
    file: std::path::PathBuf,
}

impl Follower {
    pub fn start(vm: &Vm, name: &str, more: &[&str]) -> Follower {
        let file = vm.path(name);
        let into = std::fs::File::create(&file).expect("a file");
        let arguments = [&["events", "guest"], more].concat();
        let program = vm.command(&arguments).stdout(Stdio::from(into)).spawn().expect("qvirt starts");
        let follower = Follower { program, file };
        vm.wait_for("the follower", || follower.text().contains("QVIRT_FOLLOWING"));
        follower
    }

    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.file).unwrap_or_default()
    }

    /// Waits for a line that has all these words; what was seen instead stands in the output of a test that fails.
    pub fn sees(&self, vm: &Vm, words: &[&str]) {
        println!("the events up to now:\n{}", self.text());
        vm.wait_for(&format!("{words:?} among the events"), || !self.lines(words).is_empty());
    }

    /// The lines that have all these words.
    pub fn lines(&self, words: &[&str]) -> Vec<String> {
        self.text()
            .lines()
            .filter(|line| words.iter().all(|word| line.contains(word)))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may have ended already; it is ours until it is reaped.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// A policy, the error that meets it, and what follows.
struct Case {
    id: &'static str,
    bus: &'static str,
    policy: &'static str,
    operation: &'static str,
    errno: u32,
    /// What QEMU does: the event's `action`.
    action: &'static str,
    /// Whether the guest's request succeeds, in the end.
    succeeds: bool,
}

const CASES: &[Case] = &[
    Case {
        id: "report",
        bus: "virtio-blk",
        policy: "on_error.read=report",
        operation: "read",
        errno: 5,
        action: "report",
        succeeds: false,
    },
    Case {
        id: "ignore",
        bus: "virtio-blk",
        policy: "on_error.read=ignore",
        operation: "read",
        errno: 5,
        action: "ignore",
        succeeds: true,
    },
    Case {
        id: "stop",
        bus: "virtio-blk",
        policy: "on_error.read=stop",
        operation: "read",
        errno: 5,
        action: "stop",
        succeeds: true,
    },
    Case {
        id: "full",
        bus: "virtio-blk",
        policy: "on_error.write=enospc",
        operation: "write",
        errno: 28,
        action: "stop",
        succeeds: true,
    },
    Case {
        id: "broken",
        bus: "virtio-blk",
        policy: "on_error.write=enospc",
        operation: "write",
        errno: 5,
        action: "report",
        succeeds: false,
    },
    Case {
        id: "scsi",
        bus: "virtio-scsi",
        policy: "on_error.write=stop",
        operation: "write",
        errno: 5,
        action: "stop",
        succeeds: true,
    },
];

fn each_policy(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let people = Follower::start(&scene.vm, "events.txt", &[]);
    let programs = Follower::start(&scene.vm, "events.json", &["--json"]);
    // Another disk, which must never be blamed.
    let innocent = scene.vm.raw("innocent.img", 8, "x");
    scene.attach(
        ["--disk", &format!("path={innocent},id=innocent,serial=innocent")],
        "disk",
        "serial=innocent",
    );
    for case in CASES {
        meet(&mut scene, case, &people, &programs);
    }
    assert_eq!(scene.vm.device("innocent")["fault"], Value::Null);
    scene.sees("only the innocent disk", |seen| seen.disks().len() == 1);
    drop((people, programs));
    scene.end();
}

fn meet(scene: &mut Scene, case: &Case, people: &Follower, programs: &Follower) {
    let Case { id, bus, policy, operation, action, .. } = case;
    println!("== {}: {policy} meets error {} of a {operation} on {bus}", scene.vm.version(), case.errno);
    let image = scene.vm.raw(&format!("{id}.img"), 8, "x");
    let wish = format!("path={image},id={id},serial={id},bus={bus},{policy}");
    scene.attach(["--disk", &wish], "disk", &format!("serial={id}"));
    let name = scene.disk(id);
    let node = format!("blkdebug-{id}");
    // One error, then the storage is well again; under "report" and "ignore" too, as a guest retries a read by itself.
    scene.vm.qmp("blockdev-add", &json!({
        "driver": "blkdebug", "node-name": node, "image": {"driver": "null-co", "size": 8 << 20, "read-zeroes": true},
        "inject-error": [{"event": "none", "iotype": operation, "errno": case.errno, "once": true}],
    }));
    scene.vm.qmp(
        "qom-set",
        &json!({"path": format!("/machine/peripheral/{id}"), "property": "drive", "value": node}),
    );
    let script = match *operation {
        "read" => format!("dd if=/dev/{name} of=/dev/null bs=4096 count=1 iflag=direct"),
        _ => format!("dd if=/dev/zero of=/dev/{name} bs=4096 count=1 oflag=direct"),
    };
    // It hangs while the VM is stopped.
    let request = scene.guest.begin(&script).expect("a script");
    scene.vm.wait_for("the fault in the status", || scene.vm.device(id)["fault"]["action"] == *action);
    if *action == "stop" {
        scene
            .vm
            .wait_for("the VM to stop", || scene.vm.ok(&["status", "guest"]).contains("paused (I/O error)"));
        scene.vm.ok(&["resume", "guest"]);
    }
    let status = scene.vm.ok(&["status", "guest"]);
    println!("{status}");
    let line = status
        .lines()
        .find(|line| line.starts_with("fault:") && line.contains(id))
        .expect("a line of the fault");
    assert!(line.contains(operation) && line.contains(action), "{line}");
    let fault = scene.vm.device(id)["fault"].clone();
    assert_eq!(
        (&fault["operation"], &fault["nospace"]),
        (&json!(operation), &json!(case.errno == 28)),
        "{fault}"
    );

    let result = scene.guest.finish(request, SCRIPT).expect("the request ends");
    println!("the guest: {result:?}");
    assert_eq!(result.status == 0, case.succeeds, "{policy}: {result:?}");
    assert_eq!(scene.vm.status()["state"], "running");
    for (follower, form) in [(people, " action="), (programs, "\"action\":")] {
        let raw = follower.lines(&["BLOCK_IO_ERROR", form, action, &node]);
        let ours = follower.lines(&["QVIRT_IO_ERROR", form, action, id]);
        println!("{raw:#?}\n{ours:#?}");
        assert!(!raw.is_empty() && !ours.is_empty(), "{}", follower.text());
    }
    scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
    scene.vm.qmp("blockdev-del", &json!({"node-name": node}));
}
