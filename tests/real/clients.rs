//! Two clients at once, and devices that are not qvirt's.

use serde_json::{Value, json};
use tests::qemu::QemuVersion;
use tests::vm::{Output, Vm, finished};

use crate::faults::Follower;
use tests::on_one;
use tests::scene::{QUIET, Scene};

on_one! { 10.0:
    foreign => foreign_devices,
}

on_one! { 7.2:
    two => two_at_once,
}

/// Runs both at the same time.
fn both(vm: &Vm, disks: [&str; 2]) -> [Output; 2] {
    let programs =
        disks.map(|disk| vm.command(&["attach", "guest", "--disk", disk]).spawn().expect("qvirt starts"));
    let outputs = programs.map(finished);
    outputs
        .iter()
        .zip(disks)
        .for_each(|(output, disk)| println!("$ qvirt attach guest --disk {disk}\n{output}"));
    outputs
}

/// The output of the one that was refused, the other having succeeded.
fn one_refused(outputs: [Output; 2]) -> String {
    let mut codes = outputs.each_ref().map(|output| output.code);
    codes.sort_unstable();
    assert_eq!(codes, [0, 3], "{} {}", outputs[0], outputs[1]);
    outputs.into_iter().find(|output| output.code == 3).map(|output| output.stderr).expect("just counted")
}

fn two_at_once(version: QemuVersion) {
    let mut scene = Scene::boot(version, QUIET, "");
    let before = scene.seen.clone();
    let [a, b, c] = ["a", "b", "c"].map(|name| scene.vm.raw(&format!("{name}.img"), 4, name));
    let followers =
        [Follower::start(&scene.vm, "events1", &[]), Follower::start(&scene.vm, "events2", &["--json"])];
    let outputs = both(&scene.vm, [&format!("path={a},id=a,serial=a"), &format!("path={b},id=b,serial=b")]);
    assert!(outputs.iter().all(|output| output.code == 0), "both are attached");
    scene.sees("two disks at once", |seen| {
        seen.find("disk", "serial=a").is_some() && seen.find("disk", "serial=b").is_some()
    });
    // The same image twice: one gets it, the other learns who has it.
    let refused = one_refused(both(
        &scene.vm,
        [&format!("path={c},id=c1,serial=c"), &format!("path={c},id=c2,serial=c")],
    ));
    assert!(refused.contains("guest") && (refused.contains("c1") || refused.contains("c2")), "{refused}");
    scene.sees("one more disk", |seen| seen.disks().len() == 3);
    // The same id twice.
    let [d, e] = ["d", "e"].map(|name| scene.vm.raw(&format!("{name}.img"), 4, name));
    let refused = one_refused(both(
        &scene.vm,
        [&format!("path={d},id=same,serial=d"), &format!("path={e},id=same,serial=e")],
    ));
    assert!(refused.contains("same"), "{refused}");
    scene.sees("one more disk", |seen| seen.disks().len() == 4);
    // Another VM wants an image of this one: the holder's name is said.
    let other = Vm::new(version, QUIET, 1, &format!("[[disk]]\npath = {a:?}\n"));
    let mut command = other.command(&["start", &other.config().display().to_string()]);
    let text = std::fs::read_to_string(other.config())
        .expect("the VM file")
        .replace("name = \"guest\"", "name = \"other\"");
    std::fs::write(other.config(), text).expect("the VM file is written");
    let refused = finished(command.env("QVIRT_ROOT", scene.vm.root()).spawn().expect("qvirt starts"));
    assert!(refused.code == 3 && refused.stderr.contains("guest"), "{refused}");

    for id in scene.vm.device_ids().iter().filter(|id| *id != "con0") {
        scene.vm.ok(&["detach", "guest", id, "--wait", "30s"]);
    }
    scene.sees("as in the beginning", |seen| *seen == before);
    for follower in &followers {
        for word in ["QVIRT_DEVICE_ATTACHED", "QVIRT_DEVICE_DETACHED"] {
            scene.vm.wait_for("the events of four disks", || follower.lines(&[word]).len() == 4);
        }
        println!("{}", follower.text());
    }
    drop(followers);
    scene.end();
}

fn foreign_devices(version: QemuVersion) {
    let mut scene = Scene::of(Vm::new(version, QUIET, 3, ""));
    let before = scene.seen.clone();
    let free = |vm: &Vm| vm.status()["seats"][0]["free"].as_u64().expect("a number");
    assert_eq!(free(&scene.vm), 3);
    scene.vm.qmp(
        "blockdev-add",
        &json!({"driver": "null-co", "node-name": "theirs", "size": 4 << 20, "read-zeroes": true}),
    );
    scene.vm.qmp("device_add", &json!({"driver": "virtio-blk-pci", "id": "stranger", "bus": "rp1", "drive": "theirs", "serial": "stranger"}));
    scene.sees_line("a foreign disk", "disk", "serial=stranger");
    let shown = |vm: &Vm| {
        let devices = vm.ok(&["devices", "guest"]);
        devices
            .lines()
            .any(|line| line.starts_with("stranger") && line.contains("foreign") && line.contains("rp1"))
    };
    scene.vm.wait_for("the foreign disk on its seat", || shown(&scene.vm));
    println!("{}", scene.vm.ok(&["devices", "guest"]));
    assert_eq!(free(&scene.vm), 2);
    let image = scene.vm.raw("ours.img", 4, "x");
    let refused =
        scene.vm.expect(3, &["attach", "guest", "--disk", &format!("path={image},id=ours,seat=rp1")]);
    assert!(refused.stderr.contains("stranger"), "{refused}");
    scene.attach(["--disk", &format!("path={image},id=ours,serial=ours")], "disk", "serial=ours");
    assert_ne!(scene.vm.device("ours")["address"], "rp1");

    // What is ours is changed by qvirt's commands alone.
    for (command, arguments) in [
        ("device_del", json!({"id": "ours"})),
        ("blockdev-del", json!({"node-name": "ours-1-format"})),
        ("quit", Value::Null),
    ] {
        let arguments = if arguments.is_null() { "{}".to_owned() } else { arguments.to_string() };
        let refused = scene.vm.expect(3, &["qmp", "guest", command, &arguments]);
        let instead = if command == "quit" { "qvirt shutdown guest" } else { "qvirt detach guest ours" };
        assert!(refused.stderr.contains(instead), "{refused}");
    }
    scene.vm.expect(5, &["detach", "guest", "stranger"]);

    // The next owner knows it too; who follows the events learns of the change.
    let follower = Follower::start(&scene.vm, "events", &[]);
    scene.vm.kill_owner();
    follower.sees(&scene.vm, &["QVIRT_OWNER_GONE"]);
    scene.vm.start();
    follower.sees(&scene.vm, &["QVIRT_OWNER_BACK", "state=running"]);
    assert!(shown(&scene.vm), "{}", scene.vm.ok(&["devices", "guest"]));
    assert_eq!(free(&scene.vm), 1);

    scene.vm.qmp("device_del", &json!({"id": "stranger"}));
    scene.sees("the foreign disk gone", |seen| seen.find("disk", "serial=stranger").is_none());
    scene.vm.wait_for("its seat to be free", || free(&scene.vm) == 2 && !shown(&scene.vm));
    follower.sees(&scene.vm, &["DEVICE_DELETED", "device=stranger"]);
    drop(follower);
    scene.vm.qmp("blockdev-del", &json!({"node-name": "theirs"}));
    scene.detach("ours", &before);
    scene.end();
}
