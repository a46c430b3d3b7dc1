//! QEMU at each command of an attach and a detach: it says no, answers late, in pieces, never, or dies.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::fake::Fake;

use crate::stage::Stage;

/// Devices that between them are made and unmade by every command.
fn victims(stage: &Stage) -> [([String; 2], &'static str); 4] {
    let bottom = stage.vm.qcow2("bottom.qcow2", Ok(4));
    let top = stage.vm.qcow2("top.qcow2", Err((&bottom, "qcow2")));
    let device = |option: &str, value: String| [option.to_owned(), value];
    [
        (device("--disk", format!("path={top},format=qcow2,id=v1")), "v1"),
        (device("--nic", "user=true,id=v2".to_owned()), "v2"),
        (device("--serial", "type=virtio-console,id=v3".to_owned()), "v3"),
        (device("--iothread", "id=v4".to_owned()), "v4"),
    ]
}

/// The commands that change something, of those that the fake was sent, each with its number among its like: `blockdev-add#2`.
fn changes(calls: &[Value]) -> Vec<String> {
    let names: Vec<&str> = calls
        .iter()
        .filter(|call| call["monitor"] == "qmp.0")
        .filter_map(|call| call["execute"].as_str())
        .collect();
    let changes =
        names.iter().enumerate().filter(|(_, name)| !name.starts_with("query-") && !name.starts_with("qom-"));
    changes
        .map(|(at, name)| format!("{name}#{}", names[..=at].iter().filter(|other| *other == name).count()))
        .collect()
}

/// The commands of an attach and those of a detach when all goes well.
fn commands(stage: &Stage, device: &[String; 2], id: &str) -> (Vec<String>, Vec<String>) {
    let option = [device[0].as_str(), device[1].as_str()];
    // One line into the fake at a time: it serves a monitor's clients in turn.
    stage.control().forget();
    let output = stage.attach(option);
    assert_eq!(output.code, 0, "{output}");
    let attach = changes(&stage.control().calls());
    let with = stage.holdings();
    stage.control().forget();
    let output = stage.detach(id, "10s");
    assert_eq!(output.code, 0, "{output}");
    // A controller that was made for it goes after it, by itself.
    let gone = |stage: &Stage| stage.vm.device_ids().is_empty();
    stage.vm.wait_for("the controller's end", || gone(stage));
    let detach = changes(&stage.control().calls());
    assert!(!attach.is_empty() && !detach.is_empty() && with != stage.holdings());
    stage.control().forget();
    (attach, detach)
}

/// QEMU says no.
#[test]
fn an_error_at_each_command() {
    let stage = Stage::running("");
    let mut all = std::collections::BTreeSet::new();
    for (device, id) in victims(&stage) {
        let option = [device[0].as_str(), device[1].as_str()];
        let before = stage.holdings();
        let (attach, detach) = commands(&stage, &device, id);
        stage.is_as(&before, "after one that went well");
        for command in &attach {
            stage.control().behave(&format!("{command}: fail GenericError out of luck"));
            let output = stage.attach(option);
            assert_eq!(output.code, 1, "{command}: {output}");
            let name = command.split('#').next().unwrap_or_default();
            let words = format!("{name}: QEMU answered GenericError: out of luck");
            assert!(
                output.stderr.contains(&words) && output.stderr.contains("everything before it was undone"),
                "{command}: {output}"
            );
            stage.is_as(&before, command);
            stage.control().forget();
        }
        for command in &detach {
            let output = stage.attach(option);
            assert_eq!(output.code, 0, "{output}");
            let with = stage.holdings();
            stage.control().forget();
            stage.control().behave(&format!("{command}: fail GenericError out of luck"));
            let output = stage.detach(id, "10s");
            if command == "device_del#1" {
                assert_eq!(output.code, 3, "{command}: {output}");
                assert!(
                    output.stderr.contains(&format!("{id} stays in guest: out of luck")),
                    "{command}: {output}"
                );
                stage.is_as(&with, command);
                let output = stage.detach(id, "10s");
                assert_eq!(output.code, 0, "{output}");
            } else {
                // What QEMU did not let go of is tried again, and only then is the device gone.
                assert_eq!(output.code, 0, "{command}: {output}");
            }
            if command.starts_with("device_del#") && command != "device_del#1" {
                // A controller that cannot leave stays for the next device, and leaves with that.
                stage.control().forget();
                assert_eq!((stage.attach(option).code, stage.detach(id, "10s").code), (0, 0), "{command}");
            }
            stage.is_as(&before, command);
            stage.control().forget();
        }
        all.extend(
            attach
                .into_iter()
                .chain(detach)
                .filter_map(|command| Some(command.split_once('#')?.0.to_owned())),
        );
    }
    let every = [
        "blockdev-add",
        "blockdev-del",
        "chardev-add",
        "chardev-remove",
        "device_add",
        "device_del",
        "netdev_add",
        "netdev_del",
        "object-add",
        "object-del",
    ];
    assert_eq!(all, every.iter().map(ToString::to_string).collect(), "commands that change a VM");
    stage.end();
}

/// Late answers, answers in two pieces, and events that nobody knows beside them change nothing.
#[test]
fn late_torn_and_accompanied_answers() {
    let stage = Stage::running("");
    for (device, id) in victims(&stage) {
        let before = stage.holdings();
        let (attach, detach) = commands(&stage, &device, id);
        for twist in
            ["late 150", "tear 100", "event-before FROM_THE_FUTURE {\"x\": 1}", "event-after FROM_THE_FUTURE"]
        {
            stage.control().behave(
                &attach
                    .iter()
                    .chain(&detach)
                    .map(|command| format!("{command}: {twist}\n"))
                    .collect::<String>(),
            );
            let output = stage.attach([&device[0], &device[1]]);
            assert_eq!(output.code, 0, "{twist}: {output}");
            let output = stage.detach(id, "10s");
            assert_eq!(output.code, 0, "{twist}: {output}");
            stage.is_as(&before, twist);
            stage.control().forget();
        }
    }
    stage.end();
}

/// QEMU dies before it does what it is told, before it answers, and after that. Everything that was the VM's is given back.
#[test]
fn death_at_each_command() {
    let stage = Stage::running("");
    let lists: Vec<_> =
        victims(&stage).into_iter().map(|(device, id)| (commands(&stage, &device, id), device, id)).collect();
    stage.vm.end();
    let deaths = ["kill before", "exit 3 executed", "kill after"];
    for ((attach, detach), device, id) in lists {
        for (at, command) in attach.iter().enumerate() {
            let output = stage.start(&[]);
            assert_eq!(output.code, 0, "{output}");
            let death = deaths[at % deaths.len()];
            stage.control().behave(&format!("{command}: {death}"));
            let output = stage.attach([&device[0], &device[1]]);
            let last = at + 1 == attach.len() && death.ends_with("after");
            assert!(output.code == 1 || last && output.code == 0, "{command}: {death}: {output}");
            stage.vm.nothing_left();
        }
        for (at, command) in detach.iter().enumerate() {
            let output = stage.start(&[]);
            assert_eq!(output.code, 0, "{output}");
            let output = stage.attach([&device[0], &device[1]]);
            assert_eq!(output.code, 0, "{output}");
            stage.control().forget();
            let death = deaths[(at + 1) % deaths.len()];
            stage.control().behave(&format!("{command}: {death}"));
            let output = stage.detach(id, "10s");
            assert!([0, 1].contains(&output.code), "{command}: {death}: {output}");
            stage.vm.nothing_left();
        }
    }
}

/// QEMU at each command of a launch: nothing is left of one that failed, and QEMU's reason is told.
#[test]
fn launch_commands() {
    let tables = "[[disk]]\npath = \"a.img\"\n";
    let stage = Stage::fake(tables);
    stage.vm.raw("a.img", 4, "a");
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    let calls = stage.control().calls();
    let names: Vec<&str> = calls.iter().filter_map(|call| call["execute"].as_str()).collect();
    stage.vm.end();
    for needed in ["query-uuid", "qom-list", "cont"] {
        assert!(names.contains(&needed), "{needed} is not among {names:?}");
        let rule = format!("{needed}#1: fail GenericError out of luck");
        let output = stage.start_with(&Fake::new().rule(&rule), &[]);
        assert!(output.code == 1 && output.stderr.contains("out of luck"), "{rule}: {output}");
        stage.vm.nothing_left();
        for death in ["kill before", "exit 3 executed"] {
            let rule = format!("{needed}#1: {death}");
            let output = stage.start_with(&Fake::new().rule(&rule), &[]);
            assert_eq!(output.code, 1, "{rule}: {output}");
            stage.vm.nothing_left();
        }
    }
    let output = stage.start_with(&Fake::new().rule("start: die 3 no such luck"), &[]);
    let words = "VM guest did not start: QEMU exited with status 3 before it could be asked anything\nQEMU's last words:\nno such luck";
    assert!(output.code == 1 && output.stderr.contains(words), "{output}");
    stage.vm.nothing_left();
    // The answer of the probe is kept; without it, the same word comes from the probe.
    std::fs::remove_dir_all(stage.vm.root().join("cache")).expect("the cache is there");
    let output = stage.start_with(&Fake::new().rule("probe start: die 4 not today"), &[]);
    assert!(
        output.code == 1 && output.stderr.contains("(exited with status 4); it said:\nnot today"),
        "{output}"
    );
    stage.vm.nothing_left();
}

/// QEMU never answers: every wait ends. What timed out may yet have been done, so it is undone like the rest.
#[test]
fn no_answer_at_each_command() {
    let stage = Stage::running("");
    let bottom = stage.vm.raw("probe.img", 4, "p");
    let device = ["--disk".to_owned(), format!("path={bottom},id=v")];
    let (attach, _) = commands(&stage, &device, "v");
    stage.end();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for command in &attach {
            scope.spawn(move || mute(command));
        }
        scope.spawn(hang);
        scope.spawn(deaf);
    });
    assert!(begin.elapsed() > Duration::from_secs(50), "the deadlines are a minute and more");
}

fn mute(command: &str) {
    let stage = Stage::running("");
    let image = stage.vm.raw("v.img", 4, "v");
    let before = stage.holdings();
    stage.control().forget();
    stage.control().behave(&format!("{command}: mute"));
    let output = stage.attach(["--disk", &format!("path={image},id=v")]);
    assert_eq!(output.code, 4, "{command}: {output}");
    assert!(
        output.stderr.contains("was not answered within 60s: its outcome is unknown"),
        "{command}: {output}"
    );
    stage.is_as(&before, command);
    let output = stage.attach(["--disk", &format!("path={image},id=v")]);
    assert_eq!(output.code, 0, "the session goes on: {output}");
    stage.end();
}

/// A monitor that is stuck for good: the client is told so in time, the status is still there, and `kill` still works.
fn hang() {
    let stage = Stage::running("");
    let image = stage.vm.raw("v.img", 4, "v");
    stage.control().behave("blockdev-add#1: hang");
    let output = stage.attach(["--disk", &format!("path={image},id=v")]);
    assert_eq!(output.code, 4, "{output}");
    assert_eq!(stage.vm.device("v")["stage"], "arriving");
    stage.end();
}

/// A QEMU that lives and never greets.
fn deaf() {
    let stage = Stage::fake("");
    let output = stage.start_with(&Fake::new().rule("start: mute"), &[]);
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("VM guest did not start: QEMU's monitor"), "{output}");
    stage.vm.nothing_left();
}

/// Of two clients that want the same thing while QEMU is slow, one gets it, and the other waits for its turn and is told why not.
#[test]
fn a_slow_qemu_and_two_clients() {
    let stage = Stage::running("");
    let image = stage.vm.raw("v.img", 4, "v");
    let before = stage.holdings();
    stage.control().behave("blockdev-add: late 200");
    let attach = |id: &str| {
        stage
            .vm
            .command(&["attach", "guest", "--disk", &format!("path={image},id={id}")])
            .spawn()
            .expect("qvirt starts")
    };
    let mut codes = [attach("one"), attach("two")].map(tests::vm::finished).map(|output| output.code);
    codes.sort_unstable();
    assert_eq!(codes, [0, 3]);
    // The status does not wait for the command in flight.
    let slow = attach("three");
    let begin = Instant::now();
    assert_eq!(stage.vm.status()["vm"], "guest");
    assert!(begin.elapsed() < Duration::from_millis(190), "{:?}", begin.elapsed());
    assert_eq!(tests::vm::finished(slow).code, 3);
    let id = stage.vm.device_ids()[0].clone();
    stage.control().forget();
    assert_eq!(stage.detach(&id, "10s").code, 0);
    stage.is_as(&before, "after both");
    assert_eq!(stage.vm.qmp("query-name", &json!({})), json!({"name": "guest"}));
    stage.end();
}
