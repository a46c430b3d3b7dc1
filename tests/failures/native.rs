//! Engine `native`: a fake QEMU plays what openEuler's was measured to do. It says so at each attempt that fails, and nothing when one succeeds; at its
//! timeout it reports, and from then on it reports every failure at once, until a request succeeds.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::events::Events;
use tests::fake::{Control, Fake};
use tests::vm::Vm;

use crate::stage::Stage;

/// The interval of every disk here.
const INTERVAL: Duration = Duration::from_millis(500);

/// What drains nothing: questions, and an owner that adopts the VM saying what a shutdown is.
const HARMLESS: [&str; 3] = ["qom-list", "qom-get", "set-action"];

/// A VM with a disk that its QEMU retries, a follower of its events, and the line into the fake.
struct Replay {
    stage: Stage,
    control: Control,
    events: Events,
}

impl Replay {
    fn begin(on_error: &str) -> Replay {
        let image = |stage: &Stage, id: &str| {
            stage.vm.raw(&format!("{id}.img"), 4, id);
            format!("[[disk]]\nid = \"{id}\"\npath = \"{id}.img\"\non_error = {{ {on_error} }}\n")
        };
        let stage = Stage::fake("");
        let mut text = std::fs::read_to_string(stage.vm.config()).expect("the VM file");
        text += &image(&stage, "d");
        std::fs::write(stage.vm.config(), text).expect("written");
        let output = stage.start_with(&Fake::new().retries(), &[]);
        assert_eq!(output.code, 0, "{output}");
        assert_eq!(stage.vm.device("d")["on_error"]["engine"], "native");
        let events = Events::follow(&stage.vm, &["--json"]);
        let mut control = stage.control();
        control.forget();
        Replay { stage, control, events }
    }

    /// Names of our events about disks so far, but for those of retries.
    fn told(&self) -> Vec<String> {
        let text = self.events.text();
        let names = text.lines().filter_map(|line| {
            let event: Value = serde_json::from_str(line).ok()?;
            Some(event["event"].as_str()?.strip_prefix("QVIRT_IO_")?.to_owned())
        });
        names.filter(|name| name != "ERROR" && name != "RETRY").collect()
    }

    fn io(&self) -> Value {
        self.stage.vm.device("d")["io"].clone()
    }

    fn counters(&self) -> [u64; 4] {
        let counters = self.io()["counters"].clone();
        ["suspensions", "retries", "recoveries", "timeouts"]
            .map(|name| counters[name].as_u64().expect("a count"))
    }

    fn is(&self, state: &str) {
        let vm: &Vm = &self.stage.vm;
        vm.wait_for(&format!("disk d to be {state}"), || self.io()["state"] == state);
    }

    fn fails(&mut self, action: &str) {
        self.control.io_error("d", "write", action);
    }

    /// So many attempts that fail, at QEMU's pace.
    fn attempts(&mut self, count: usize) {
        for _ in 0..count {
            std::thread::sleep(INTERVAL);
            self.fails("retry");
        }
    }

    /// Nothing was sent but questions; what is left of the VM is nothing.
    fn end(mut self) {
        let changes: Vec<String> = self
            .control
            .calls()
            .iter()
            .filter_map(|call| call["execute"].as_str().map(str::to_owned))
            .filter(|name| {
                !name.trim_start_matches("x-").starts_with("query-") && !HARMLESS.contains(&name.as_str())
            })
            .collect();
        assert_eq!(changes, Vec::<String>::new(), "sent to a QEMU that retries by itself");
        drop(self.events);
        self.stage.end();
    }
}

const RETRY: &str = "read = \"retry\", write = \"retry\", interval = \"500ms\"";

#[test]
fn an_outage_that_ends_in_time() {
    let mut replay = Replay::begin(RETRY);
    // Two requests wait, so there are two events at each attempt.
    replay.fails("retry");
    replay.fails("retry");
    replay.is("suspended");
    for _ in 0..3 {
        replay.attempts(1);
        replay.fails("retry");
    }
    replay.stage.vm.wait_for("the attempts", || replay.counters() == [1, 3, 0, 0]);
    let outage = replay.io()["outage"].clone();
    let words = (&outage["operation"], &outage["cause"], &outage["attempts"]);
    assert_eq!(words, (&json!("write"), &json!("Input/output error"), &json!(3)));
    assert_eq!(replay.stage.state(), "running");
    let output = replay.stage.vm.qvirt(&["io", "retry", "guest", "d"]);
    assert!(output.code == 3 && output.stderr.contains("disk d is retried by QEMU itself"), "{output}");
    let output = replay.stage.vm.qvirt(&["io", "set", "guest", "d", "--interval", "2s"]);
    let why = "its device takes interval and timeout only when it is made: change the config, then restart VM guest or detach and attach the disk";
    assert!(output.code == 3 && output.stderr.contains(why), "{output}");
    // The look after the last attempt, then the success.
    std::thread::sleep(INTERVAL / 2);
    replay.control.io_done("d", 40);
    replay.is("ok");
    assert_eq!(replay.counters(), [1, 3, 1, 0]);
    replay.stage.vm.wait_for("the end to be told", || replay.told() == ["SUSPENDED", "RECOVERED"]);
    assert!(replay.events.text().contains("QVIRT_IO_RETRY"));
    replay.end();
}

#[test]
fn a_guest_that_is_idle_afterwards() {
    let mut replay = Replay::begin(RETRY);
    replay.fails("retry");
    replay.attempts(1);
    let last = Instant::now();
    replay.is("suspended");
    replay.is("ok");
    assert!(last.elapsed() > INTERVAL * 2, "an attempt may still have failed: {:?}", last.elapsed());
    replay.end();
}

/// Any success starts QEMU's clock anew, and it is QEMU's clock that counts.
#[test]
fn a_bad_sector_among_good_ones_outlives_any_timeout() {
    let mut replay = Replay::begin(&format!("{RETRY}, timeout = \"1s\""));
    replay.fails("retry");
    for _ in 0..5 {
        replay.control.io_done("d", 20);
        replay.attempts(1);
    }
    replay.is("suspended");
    assert_eq!(replay.counters(), [1, 5, 0, 0]);
    assert_eq!(replay.told(), ["SUSPENDED"]);
    replay.end();
}

#[test]
fn a_timeout_is_what_qemu_reports() {
    let mut replay = Replay::begin(&format!("{RETRY}, timeout = \"1s\""));
    replay.fails("retry");
    replay.attempts(1);
    std::thread::sleep(INTERVAL);
    replay.fails("report");
    replay.is("timed-out");
    assert_eq!(replay.io()["outage"]["at_timeout"], "report");
    // From now on every failure is reported, whenever the guest tries; and when it does not, nothing is known.
    replay.fails("report");
    std::thread::sleep(INTERVAL * 2 + Duration::from_millis(1500));
    assert_eq!(replay.io()["state"], "timed-out");
    replay.control.io_done("d", 1);
    replay.is("ok");
    assert_eq!(replay.counters()[2..], [1, 1]);
    let since = |replay: &Replay| replay.io()["outage"]["since_unix_ms"].as_u64();
    replay.fails("retry");
    replay.is("suspended");
    let first = since(&replay);
    assert!(first.is_some());
    replay
        .stage
        .vm
        .wait_for("all to be told", || replay.told() == ["SUSPENDED", "TIMED_OUT", "RECOVERED", "SUSPENDED"]);
    replay.end();
}

/// That a direction reports its errors is what it was told to do, and no timeout.
#[test]
fn a_direction_that_does_not_retry() {
    let mut replay = Replay::begin("read = \"retry\", interval = \"500ms\"");
    replay.fails("report");
    replay.stage.vm.wait_for("the fault", || !replay.stage.vm.device("d")["fault"].is_null());
    assert_eq!((replay.io()["state"].clone(), replay.counters()), (json!("ok"), [0; 4]));
    replay.control.io_error("d", "read", "report");
    replay.is("timed-out");
    assert_eq!(replay.counters(), [1, 0, 0, 1], "the events before it were lost");
    replay.end();
}

#[test]
fn events_that_are_lost_or_late() {
    let mut replay = Replay::begin(RETRY);
    replay.control.behave("event BLOCK_IO_ERROR#3: lose\nevent BLOCK_IO_ERROR#5: late 6000");
    replay.fails("retry");
    replay.attempts(3);
    replay.is("suspended");
    assert_eq!(replay.counters(), [1, 2, 0, 0], "one was lost, and the next one came in time");
    replay.attempts(1);
    replay.is("ok");
    // It happened before the end that was told, whenever it comes.
    let events = || replay.stage.vm.device("d")["fault"]["events"].as_u64();
    replay.stage.vm.wait_for("the late event", || events() == Some(4));
    assert_eq!((replay.io()["state"].clone(), replay.counters()), (json!("ok"), [1, 2, 1, 0]));
    replay.end();
}

#[test]
fn an_owner_that_dies_in_the_middle() {
    let mut replay = Replay::begin(RETRY);
    replay.fails("retry");
    replay.attempts(2);
    replay.stage.vm.wait_for("the attempts", || replay.counters()[1] == 2);
    let outage = replay.io()["outage"].clone();
    replay.stage.adopt(&[]);
    assert_eq!(replay.io()["outage"]["since_unix_ms"], outage["since_unix_ms"], "the first owner's clock");
    replay.attempts(1);
    replay.stage.vm.wait_for("the next attempt", || replay.counters()[1] >= 2);
    // The repair while nobody looks.
    replay.stage.vm.kill_owner();
    replay.control.io_done("d", 9);
    let output = replay.stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    assert_eq!(replay.io()["state"], "suspended", "an owner that has just come cannot know");
    replay.is("ok");
    assert_eq!(replay.counters()[2], 1);
    replay.end();
}

/// With an interval of 0 QEMU tries without a pause.
#[test]
fn a_busy_loop() {
    let mut replay = Replay::begin("read = \"retry\", write = \"retry\", interval = \"0ms\"");
    let begin = Instant::now();
    for _ in 0..5000 {
        replay.fails("retry");
    }
    let patience = Instant::now();
    assert_eq!(replay.io()["state"], "suspended");
    println!("5000 events in {:?}, then a status in {:?}", begin.elapsed(), patience.elapsed());
    let fault = || replay.stage.vm.device("d")["fault"]["events"].as_u64();
    replay.stage.vm.wait_for("all events", || fault() == Some(5000));
    let retries = replay.counters()[1];
    let told = replay.events.text().matches("\"QVIRT_IO_RETRY\"").count();
    let limit = begin.elapsed().as_secs() + 1;
    assert!(told as u64 <= limit && retries <= limit * 4, "{told} told, {retries} counted in {limit} s");
    let journal =
        std::fs::read_to_string(replay.stage.vm.root().join("run/guest/journal")).expect("a journal");
    assert!(journal.lines().count() < 50, "the journal has {} lines", journal.lines().count());
    replay.is("ok");
    replay.end();
}
