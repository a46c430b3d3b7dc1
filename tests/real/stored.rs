//! The stored config: what `--config`, `--live` and both change, comments kept, and what a restart shows.

use tests::qemu::QemuVersion;
use tests::vm::Vm;

use tests::on_one;
use tests::scene::{QUIET, Scene};

on_one! { 10.0:
    config => stored_config,
}

const TABLES: &str = "\
# The system.
[[disk]]              # it boots from the kernel above
id = \"sys\"
path = \"SYS\"        # raw
serial = \"sys\"

# The network.
[[nic]]
id = \"net0\"
user = true           # no privileges needed
mac = \"52:54:00:00:bb:01\"
";

fn stored_config(version: QemuVersion) {
    let vm = Vm::new(version, QUIET, 8, "");
    let sys = vm.raw("sys.img", 4, "SYS");
    let text = std::fs::read_to_string(vm.config())
        .expect("the VM file")
        .replace("\"console.log\"", &format!("{:?}", vm.path("console.log").display().to_string()));
    std::fs::write(vm.config(), text + &TABLES.replace("SYS", &sys)).expect("the VM file is written");
    vm.ok(&["define", &vm.config().display().to_string()]);
    let original = vm.ok(&["show", "guest"]);
    vm.ok(&["start", "guest"]);
    let mut scene = Scene::of_running(vm);

    // Only the config: the guest sees nothing of it.
    let [a, b, c] = ["a", "b", "c"].map(|name| scene.vm.raw(&format!("{name}.img"), 4, name));
    let before = scene.seen.clone();
    scene.vm.ok(&["attach", "guest", "--config", "--disk", &format!("path={a},id=a,serial=a")]);
    // Only the running VM.
    scene.vm.ok(&["attach", "guest", "--live", "--disk", &format!("path={b},id=b,serial=b")]);
    // Both, as a device file; and by default the running VM alone, as virsh has it.
    let file = scene.vm.path("device.toml");
    std::fs::write(&file, format!("[disk]\npath = {c:?}\nserial = \"c\"\nid = \"c\"\n"))
        .expect("the device file");
    let file = file.display().to_string();
    scene.vm.ok(&["attach", "guest", &file, "--live", "--config"]);
    scene.vm.ok(&["attach", "guest", "--nic", "user=true,id=net1,mac=52:54:00:00:bb:02"]);
    scene.sees("b, c and a NIC live", |seen| seen.disks().len() == 3 && seen.nics().len() == 2);
    assert!(scene.seen.find("disk", "serial=a").is_none(), "{}", scene.seen);
    let edited = scene.vm.ok(&["show", "guest"]);
    println!("{edited}");
    kept(&original, &edited);
    assert!(edited.contains("id = \"a\"") && edited.contains("id = \"c\""), "{edited}");
    assert!(!edited.contains("id = \"b\"") && !edited.contains("net1"), "{edited}");
    // What is in the config already is refused, and changes nothing.
    scene.vm.expect(3, &["attach", "guest", "--live", "--config", "--disk", &format!("path={c},id=c")]);
    assert_eq!(scene.vm.ok(&["show", "guest"]), edited);

    // A restart shows the config's devices.
    scene.vm.ok(&["shutdown", "guest"]);
    scene.vm.nothing_left();
    scene.restart();
    println!("== {version}: after a restart\n{}", scene.seen);
    for serial in ["sys", "a", "c"] {
        assert!(scene.seen.find("disk", &format!("serial={serial}")).is_some(), "{serial}: {}", scene.seen);
    }
    assert_eq!((scene.seen.disks().len(), scene.seen.nics().len()), (3, 1), "{}", scene.seen);

    // Out of the config alone; out of the running VM by default; out of both.
    scene.vm.ok(&["detach", "guest", "a", "--config"]);
    scene.sees("a still there", |seen| seen.find("disk", "serial=a").is_some());
    scene.vm.ok(&["detach", "guest", "c", "--wait", "30s"]);
    scene.sees("c gone", |seen| seen.find("disk", "serial=c").is_none());
    let edited = scene.vm.ok(&["show", "guest"]);
    assert!(edited.contains("id = \"c\"") && !edited.contains("id = \"a\""), "{edited}");
    scene.vm.ok(&["detach", "guest", "net0", "--live", "--config", "--wait", "30s"]);
    scene.sees("the NIC gone", |seen| seen.nics().is_empty());
    assert!(before.nics().len() == 1 && !scene.vm.ok(&["show", "guest"]).contains("net0"));
    scene.vm.ok(&["shutdown", "guest"]);
    scene.vm.nothing_left();

    // Not running: the config by default. `--live` has nothing to change.
    scene.vm.ok(&["attach", "guest", "--nic", "user=true,id=net0,mac=52:54:00:00:bb:01"]);
    scene.vm.ok(&["detach", "guest", &file]);
    scene.vm.expect(5, &["detach", "guest", "a"]);
    scene.vm.expect(5, &["attach", "guest", "--live", "--nic", "user=true"]);
    let last = scene.vm.ok(&["show", "guest"]);
    println!("{last}");
    assert!(last.contains("net0") && !last.contains("id = \"c\""), "{last}");
    let lines = original.split("# The network.").next().expect("a first part");
    kept(lines, &last);
    scene.vm.ok(&["undefine", "guest"]);
    scene.vm.expect(5, &["show", "guest"]);
}

/// Every line of the one stands in the other, in its order.
fn kept(original: &str, edited: &str) {
    let mut lines = edited.lines();
    for line in original.lines() {
        assert!(lines.any(|other| other == line), "{line:?} is not kept, or not in its place:\n{edited}");
    }
}
