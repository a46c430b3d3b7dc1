//! Guests that refuse, ignore, hurry and surprise; events that are lost, doubled, late or unknown. Events are hints: what QEMU says when
//! asked is the truth.

use serde_json::json;
use tests::events::Events;

use crate::holdings::Holdings;
use crate::stage::Stage;

/// A running VM with a disk `d`, and what it had before that.
fn with_disk() -> (Stage, Holdings) {
    let stage = Stage::running("");
    let image = stage.vm.raw("d.img", 4, "d");
    let before = stage.holdings();
    let output = stage.attach(["--disk", &format!("path={image},id=d")]);
    assert_eq!(output.code, 0, "{output}");
    (stage, before)
}

#[test]
fn device_deleted_in_any_way_is_seen() {
    for rule in [
        "guest: unplug early",
        "guest: unplug late 300",
        "guest: unplug ignore 1",
        "guest: unplug ignore 1\nguest: repeat refuse",
        "event DEVICE_DELETED: lose",
        "event DEVICE_DELETED: twice",
        "event DEVICE_DELETED: late 500",
        "device_del#1: event-before DEVICE_UNPLUG_GUEST_ERROR {\"device\": \"other\", \"path\": \"/machine/peripheral/other\"}",
    ] {
        let (stage, before) = with_disk();
        stage.control().forget();
        stage.control().behave(rule);
        let output = if rule.ends_with("repeat refuse") {
            // Asked once, ignored, and "already in the process of unplug" from then on: it goes when the guest wants it to.
            assert_eq!(stage.detach("d", "2500ms").code, 4, "{rule}");
            stage.control().eject("d");
            stage.is_as(&before, rule);
            is_unknown(&stage);
            stage.end();
            continue;
        } else {
            stage.detach("d", "10s")
        };
        assert_eq!(
            (output.code, output.stdout.as_str()),
            (0, "d is detached from guest\n"),
            "{rule}: {output}"
        );
        stage.is_as(&before, rule);
        stage.end();
    }
}

fn is_unknown(stage: &Stage) {
    let output = stage.detach("d", "1s");
    assert_eq!(
        (output.code, output.stderr.as_str()),
        (5, "qvirt: there is no device d: this VM has no devices\n"),
        "{output}"
    );
}

/// The guest says no: exit code 3, and the device is as it was, on its seat.
#[test]
fn a_guest_that_refuses() {
    let (stage, before) = with_disk();
    let with = stage.holdings();
    stage.control().behave("guest: unplug refuse");
    let output = stage.detach("d", "10s");
    assert_eq!(
        (output.code, output.stderr.as_str()),
        (3, "qvirt: d stays in guest: the guest refused to let go of it\n"),
        "{output}"
    );
    stage.is_as(&with, "after a refusal");
    // Its seat is taken, its image leased.
    let seat = stage.vm.device("d")["address"].as_str().expect("a seat").to_owned();
    let other = stage.vm.raw("other.img", 4, "o");
    let output = stage.attach(["--disk", &format!("path={other},id=e,seat={seat}")]);
    assert!(output.code == 3 && output.stderr.contains(&format!("seat {seat} is taken by d")), "{output}");
    stage.control().forget();
    assert_eq!(stage.detach("d", "10s").code, 0);
    stage.is_as(&before, "after it was asked again");
    stage.end();
}

/// The guest says nothing: exit code 4, the device is leaving and its seat is taken, also for the next owner, until the guest lets go.
#[test]
fn a_guest_that_ignores() {
    let (stage, before) = with_disk();
    stage.control().behave("guest: unplug ignore");
    let output = stage.detach("d", "300ms");
    assert_eq!(output.code, 4, "{output}");
    let words = "qvirt: d is leaving guest, not gone yet: the guest has not answered yet (0 s); it is finished when the guest lets go, \
                 `qvirt devices guest` shows it\n";
    assert_eq!(output.stderr, words);
    for owner in ["the first owner", "the next one"] {
        assert_eq!(stage.vm.device("d")["stage"], "leaving", "{owner}");
        let seat = stage.vm.device("d")["address"].as_str().expect("a seat").to_owned();
        let other = stage.vm.raw("other.img", 4, "o");
        let output = stage.attach(["--disk", &format!("path={other},id=e,seat={seat}")]);
        assert!(
            output.code == 3 && output.stderr.contains(&format!("seat {seat} is taken by d")),
            "{owner}: {output}"
        );
        stage.adopt(&[]);
    }
    stage.control().eject("d");
    stage.is_as(&before, "after the guest let go");
    stage.end();
}

/// A device leaves unasked: what stood behind it is cleared up, also when the event is lost or nobody owned the VM then.
#[test]
fn a_device_that_leaves_unasked() {
    for rule in ["", "event DEVICE_DELETED: lose"] {
        let (stage, before) = with_disk();
        stage.control().behave(rule);
        stage.control().eject("d");
        if !rule.is_empty() {
            // Any event makes the owner look.
            stage.vm.ok(&["pause", "guest"]);
            stage.vm.ok(&["resume", "guest"]);
        }
        stage.is_as(&before, rule);
        stage.end();
    }
    let (stage, before) = with_disk();
    let owner = stage.vm.owner_pid();
    stage.vm.kill_process(owner);
    stage.control().eject("d");
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    stage.is_as(&before, "gone while nobody owned the VM");
    stage.end();
}

/// A guest that boots throws a device out again, right after it came.
#[test]
fn a_device_that_does_not_stay() {
    let stage = Stage::running("");
    let image = stage.vm.raw("d.img", 4, "d");
    let before = stage.holdings();
    stage.control().behave("device_add#1: eject d");
    let output = stage.attach(["--disk", &format!("path={image},id=d")]);
    let words = "device_add succeeded, and the device is gone again: the guest may have thrown it out while it booted; try again";
    assert!(output.code == 1 && output.stderr.contains(words), "{output}");
    stage.is_as(&before, "after it was thrown out");
    let output = stage.attach(["--disk", &format!("path={image},id=d")]);
    assert_eq!(output.code, 0, "{output}");
    stage.end();
}

/// Words that QEMU does not have yet reach the clients, and harm nobody.
#[test]
fn unknown_words_pass_through() {
    let (stage, _) = with_disk();
    let events = Events::follow(&stage.vm, &["--json"]);
    let heard = |word: &str| events.text().contains(word);
    let mut control = stage.control();
    control.emit("FROM_THE_FUTURE", json!({"deep": {"list": [1, null]}}));
    stage.vm.wait_for("the unknown event", || heard("{\"deep\":{\"list\":[1,null]}}"));

    // openEuler's QEMU holds a failed request back and says so with an action of its own.
    control.io_error("d", "read", "retry");
    stage.vm.wait_for("the fault", || !stage.vm.device("d")["fault"].is_null());
    let fault = stage.vm.device("d")["fault"].clone();
    assert_eq!(
        (&fault["operation"], &fault["action"], &fault["events"]),
        (&json!("read"), &json!("retry"), &json!(1))
    );
    assert_eq!(stage.state(), "running");
    stage.vm.wait_for("its event", || heard("QVIRT_IO_ERROR") && heard("\"action\":\"retry\""));
    assert!(stage.vm.ok(&["status", "guest"]).contains(
        "fault:    d (vda): read of d-1-format failed: Input/output error (action retry, 1 events"
    ));
    // It is remembered by the next owner.
    stage.adopt(&[]);
    assert_eq!(stage.vm.device("d")["fault"]["action"], "retry");
    control.io_error("d", "write", "stop");
    stage.vm.wait_for("the stop", || stage.vm.status()["reason"] == "io-error");
    assert_eq!(stage.vm.device("d")["fault"]["events"], 2);
    drop(events);
    stage.end();
}

/// The VM stands still for a disk that retries, and no event of it arrives: it is seen all the same, and goes on.
#[test]
fn a_stop_that_nobody_tells_of() {
    let stage = Stage::running("");
    let image = stage.vm.raw("d.img", 1, "x");
    let retry = "on_error.read=retry,on_error.write=retry,on_error.interval=200ms,on_error.engine=pause";
    let output = stage.attach(["--disk", &format!("path={image},id=d,{retry}")]);
    assert_eq!(output.code, 0, "{output}");
    let mut control = stage.control();
    control.behave("event STOP: lose\nevent BLOCK_IO_ERROR: lose");
    control.io_error("d", "write", "stop");
    let counter = |name: &str| stage.vm.device("d")["io"]["counters"][name].as_u64();
    stage.vm.wait_for("the outage", || counter("suspensions") == Some(1));
    stage.vm.wait_for("the VM to run", || stage.state() == "running");
    control.io_done("d", 1);
    stage.vm.wait_for("its end", || counter("recoveries") == Some(1));
    assert_eq!(counter("suspensions"), Some(1));
    stage.end();
}
