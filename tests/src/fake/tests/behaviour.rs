//! Every rule, once.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use qmp_client::{Options, Qmp, QmpError};
use serde_json::{Value, json};

use super::{Machine, drain};
use crate::fake::{Fake, State};
use crate::qemu::QemuVersion;

const QUIET: Duration = Duration::from_millis(100);

async fn plug(qmp: &Qmp, id: &str, bus: &str) {
    let node = json!({"driver": "null-co", "node-name": format!("{id}-node")});
    qmp.call("blockdev-add", node).await.expect("a node");
    let device = json!({"driver": "virtio-blk-pci", "id": id, "bus": bus, "drive": format!("{id}-node")});
    qmp.call("device_add", device).await.expect("a device");
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

fn desc(answer: Result<Value, QmpError>) -> String {
    match answer {
        Err(QmpError::Refused(error)) => format!("{}: {}", error.class, error.desc),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_call_fails_comes_late_in_halves_or_not_at_all() {
    let machine = Machine::fake(
        "query-name#2: fail DeviceNotFound no luck\nquery-uuid: late 100; query-uuid: tear 50\nstop: mute",
    );
    let (qmp, _events) = machine.connect().await;
    qmp.call("query-name", Value::Null).await.expect("the first call succeeds");
    assert_eq!(desc(qmp.call("query-name", Value::Null).await), "DeviceNotFound: no luck");
    let before = Instant::now();
    qmp.call("query-uuid", Value::Null).await.expect("late and torn, but whole");
    assert!(before.elapsed() >= Duration::from_millis(150), "{:?}", before.elapsed());
    qmp.call("cont", Value::Null).await.expect("it runs");
    let impatient = qmp.with_deadline(QUIET);
    assert!(!matches!(impatient.call("stop", Value::Null).await, Ok(_) | Err(QmpError::Refused(_))));
    let status = qmp.call("query-status", Value::Null).await.expect("the monitor still answers");
    assert_eq!(status["status"], "paused", "a mute command was executed");
    machine.control().behave("query-kvm: hang");
    assert!(impatient.call("query-kvm", Value::Null).await.is_err());
    assert!(impatient.call("query-status", Value::Null).await.is_err(), "the monitor is stuck behind it");
}

#[tokio::test]
async fn the_guest_lets_go_refuses_or_ignores() {
    let machine =
        Machine::fake("guest@no: unplug refuse; guest@deaf: unplug ignore 1; guest@deaf: repeat refuse");
    let (qmp, mut events) = machine.connect().await;
    qmp.call("cont", Value::Null).await.expect("it runs");
    for (id, bus) in [("yes", "rp1"), ("no", "rp2"), ("deaf", "rp3")] {
        plug(&qmp, id, bus).await;
    }
    drain(&mut events, QUIET).await;
    let del = async |id: &str| qmp.call("device_del", json!({"id": id})).await;
    del("yes").await.expect("asked");
    let seen = drain(&mut events, QUIET).await;
    let paths = ["/machine/peripheral/yes/virtio-backend", "/machine/peripheral/yes"];
    assert_eq!(names(&seen), ["DEVICE_DELETED"; 2]);
    assert_eq!([&seen[0].1["path"], &seen[1].1["path"]], paths);
    assert_eq!((seen[0].1.get("device"), &seen[1].1["device"]), (None, &json!("yes")));

    del("no").await.expect("asked");
    let refusal = json!({"device": "no", "path": "/machine/peripheral/no"});
    assert_eq!(drain(&mut events, QUIET).await, [("DEVICE_UNPLUG_GUEST_ERROR".to_owned(), refusal)]);

    del("deaf").await.expect("asked");
    assert_eq!(drain(&mut events, QUIET).await, []);
    assert_eq!(desc(del("deaf").await), "GenericError: Device deaf is already in the process of unplug");
    let mut control = machine.control();
    control.forget();
    del("deaf").await.expect("asked again");
    assert_eq!(names(&drain(&mut events, QUIET).await), ["DEVICE_DELETED"; 2]);

    control.eject("no");
    assert_eq!(names(&drain(&mut events, QUIET).await), ["DEVICE_DELETED"; 2], "unasked");
    let devices = control.state().devices;
    assert_eq!(devices.into_iter().collect::<Vec<_>>(), ["rp1", "rp2", "rp3"]);
}

/// Sends raw lines: `qmp-client` hides whether an event came before a reply.
#[test]
fn an_early_guest_answers_before_the_reply() {
    let machine = Machine::fake("guest: unplug early\nquery-name: event-before NEWS_TO_ALL {\"x\": 1}");
    let mut direct = crate::fake::Control::connect(&machine.path("qmp"));
    let reply = direct.command("query-name", json!({}));
    assert_eq!(reply["return"]["name"], "web");
    direct.command("cont", json!({}));
    direct.command("device_add", json!({"driver": "virtio-rng-pci", "id": "r", "bus": "rp1"}));
    let deleted = direct.command("device_del", json!({"id": "r"}));
    assert_eq!(deleted, json!({"return": {}}));
    // `events` sends one more command, so count what was there before it.
    let seen = direct.events(Duration::ZERO);
    let seen: Vec<&Value> = seen.iter().map(|event| &event["event"]).collect();
    assert_eq!(seen, ["NEWS_TO_ALL", "RESUME", "DEVICE_DELETED", "DEVICE_DELETED"]);
}

#[tokio::test]
async fn events_are_lost_doubled_and_made_up() {
    let machine = Machine::fake("event STOP#1: lose; event RESUME: twice; event RESET: late 200");
    let (qmp, mut events) = machine.connect().await;
    for command in ["cont", "stop", "cont", "stop", "system_reset"] {
        qmp.call(command, Value::Null).await.expect(command);
    }
    let seen = drain(&mut events, QUIET).await;
    assert_eq!(names(&seen), ["RESUME", "RESUME", "RESUME", "RESUME", "STOP"]);
    assert_eq!(names(&drain(&mut events, Duration::from_millis(400)).await), ["RESET"]);
    machine.control().emit("UNHEARD_OF", json!({"a": [1]}));
    assert_eq!(drain(&mut events, QUIET).await, [("UNHEARD_OF".to_owned(), json!({"a": [1]}))]);
}

#[tokio::test]
async fn a_disk_fails_with_any_action() {
    let machine = Machine::fake("");
    let (qmp, mut events) = machine.connect().await;
    plug(&qmp, "d0", "rp1").await;
    qmp.call("cont", Value::Null).await.expect("it runs");
    drain(&mut events, QUIET).await;
    let mut control = machine.control();
    control.io_error("d0", "write", "retry");
    let seen = drain(&mut events, QUIET).await;
    assert_eq!(names(&seen), ["BLOCK_IO_ERROR"]);
    assert_eq!((&seen[0].1["action"], &seen[0].1["node-name"]), (&json!("retry"), &json!("d0-node")));
    control.io_error("d0", "write", "stop");
    assert_eq!(names(&drain(&mut events, QUIET).await), ["BLOCK_IO_ERROR", "STOP"]);
    let ask = async |command: &str| qmp.call(command, Value::Null).await.expect("an answer");
    assert_eq!(ask("query-status").await["status"], "io-error");
    assert_eq!(ask("query-block").await[0]["io-status"], "failed");
    ask("cont").await;
    assert_eq!(ask("query-block").await[0]["io-status"], "ok");
}

#[tokio::test]
async fn it_dies_when_told() {
    let dies = async |rule: &str, dump: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("state");
        let fake = Fake::new().rule(rule).dump(&file);
        let mut machine = Machine::start(&Fake::binary(), &fake, &[]);
        let (qmp, _events) = machine.connect().await;
        let object = qmp.call("object-add", json!({"qom-type": "iothread", "id": "io0"})).await;
        let status = machine.ended();
        let objects: Vec<String> = State::dumped(&file).objects.into_iter().collect();
        assert_eq!(objects.concat(), dump, "{rule}");
        (object.is_ok(), status)
    };
    let (answered, status) = dies("object-add: exit 7 before", "").await;
    assert_eq!((answered, status.code()), (false, Some(7)));
    let (answered, status) = dies("object-add: kill executed", "io0").await;
    assert_eq!((answered, status.signal()), (false, Some(9)));
    let (answered, status) = dies("object-add: exit 0 after", "io0").await;
    assert_eq!((answered, status.code()), (true, Some(0)));
}

#[tokio::test]
async fn a_bad_start() {
    let mut machine = Machine::fake("start: die 3 no such luck");
    assert_eq!(machine.ended().code(), Some(3));
    let machine = Machine::fake("start: mute");
    let stream = tokio::net::UnixStream::connect(machine.path("qmp")).await.expect("a socket");
    let options = Options { greeting_deadline: QUIET, ..Options::default() };
    assert!(Qmp::connect(stream, options).await.is_err(), "no greeting");
    let mut machine = Machine::start(&Fake::binary(), &Fake::new(), &["-frobnicate", "1"]);
    assert_eq!(machine.ended().code(), Some(1));
}

#[tokio::test]
async fn the_machine_ends_by_its_power_button_by_quit_and_by_a_signal() {
    let mut machine = Machine::fake("guest: powerdown ignore");
    let (qmp, mut events) = machine.connect().await;
    for command in ["cont", "system_powerdown"] {
        qmp.call(command, Value::Null).await.expect(command);
    }
    assert_eq!(names(&drain(&mut events, QUIET).await), ["RESUME", "POWERDOWN"]);
    machine.control().forget();
    qmp.call("system_powerdown", Value::Null).await.expect("asked");
    let seen = drain(&mut events, Duration::from_secs(5)).await;
    assert_eq!(names(&seen), ["POWERDOWN", "SHUTDOWN"]);
    assert_eq!(seen[1].1, json!({"guest": true, "reason": "guest-shutdown"}));
    assert!(machine.ended().success());

    let mut machine = Machine::fake("");
    let (qmp, _events) = machine.connect().await;
    qmp.call("quit", Value::Null).await.expect("its reply comes before its end");
    assert!(machine.ended().success());

    let mut machine = Machine::fake("");
    let (_qmp, mut events) = machine.connect().await;
    let pid = nix::unistd::Pid::from_raw(machine.process.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our own child");
    let seen = drain(&mut events, Duration::from_secs(5)).await;
    assert_eq!(seen, [("SHUTDOWN".to_owned(), json!({"guest": false, "reason": "host-signal"}))]);
    assert!(machine.ended().success());
}

#[tokio::test]
async fn one_client_at_a_time_and_names_per_monitor() {
    let machine = Machine::fake("");
    let (first, _events) = machine.connect().await;
    let second = tokio::net::UnixStream::connect(machine.path("qmp")).await.expect("the backlog");
    let options = Options { greeting_deadline: QUIET, ..Options::default() };
    assert!(Qmp::connect(second, options).await.is_err(), "a second client waits");
    let mut control = machine.control();
    let before = control.state();
    let null = std::fs::File::open("/dev/null").expect("always there");
    first.call_with_fds("getfd", json!({"fdname": "tap"}), vec![null.into()]).await.expect("taken");
    assert_eq!(control.state().fds.into_iter().collect::<Vec<_>>(), ["qmp.0:tap"]);
    let netdev = json!({"type": "tap", "id": "n", "fd": "tap"});
    let reply = control.command("netdev_add", netdev.clone());
    assert_eq!(reply["error"]["desc"], "File descriptor named 'tap' has not been found");
    first.call("netdev_add", netdev).await.expect("the name was this monitor's");
    assert_ne!(control.state(), before);
    first.call("netdev_del", json!({"id": "n"})).await.expect("deleted");
    assert_eq!(control.state(), before, "its descriptor went with it");
    let calls: Vec<Value> = control.calls().iter().map(|call| call["execute"].clone()).collect();
    assert_eq!(calls, ["getfd", "netdev_add", "netdev_del"], "the control's own are not counted");
}

#[tokio::test]
async fn it_plays_the_older_version_too() {
    let machine = Machine::start(&Fake::binary(), &Fake::new().version(QemuVersion::V7_2), &[]);
    let (qmp, _events) = machine.connect().await;
    let version = qmp.call("query-version", Value::Null).await.expect("a version");
    assert_eq!((&version["qemu"]["major"], &version["qemu"]["minor"]), (&json!(7), &json!(2)));
    let device = json!({"driver": "virtio-rng-pci", "id": "r", "bus": "rp1", "multifunction": "on"});
    qmp.call("device_add", device).await.expect("7.2 takes words for types");
}

/// What qvirt learns of the fake is what it would learn of the QEMU that was recorded.
#[tokio::test]
async fn qvirt_probes_it_as_any_qemu() {
    let cache = tempfile::tempdir().expect("a folder");
    let qemu = launcher::probe::probe(&Fake::binary(), cache.path()).await.expect("capabilities");
    assert!(qemu.version.starts_with("10.0.2"), "{}", qemu.version);
    assert_eq!(qemu.machines.get("q35").map(String::as_str), Some("pc-q35-10.0"));
    assert!(qemu.features.contains("device_add/json-cli-hotplug"));
    assert!(qemu.objects.contains("iothread"));
    assert!(qemu.devices.get("virtio-blk-pci").is_some_and(|known| known.contains_key("drive")));
}
