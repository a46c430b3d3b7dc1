//! Real programs, small ones.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use serde_json::Value;

use super::*;

/// A program of a test: a shell script that may write to `$1`.
fn script(folder: &Path, name: &str, text: &str) -> Notify {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("its mode is set");
    let words = [path, folder.join("told")].map(|path| path.display().to_string());
    Notify::new(words.to_vec()).expect("a program")
}

fn event(name: &str, number: usize) -> Event {
    Event { timestamp: qmp_client::Timestamp::now(), name: name.to_owned(), data: json!({"number": number}) }
}

fn notifier(notify: Notify, deadline: Duration) -> Notifier {
    Notifier::with_deadline(notify, "guest".parse().expect("a name"), deadline)
}

/// Waits for so many lines in the file that scripts write.
async fn told(folder: &Path, count: usize) -> Vec<Value> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(folder.join("told")).unwrap_or_default();
        let lines: Vec<Value> =
            text.split_inclusive('\n').filter_map(|line| serde_json::from_str(line).ok()).collect();
        if lines.len() >= count {
            return lines;
        }
        assert!(Instant::now() < until, "{} of {count} lines: {text}", lines.len());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn numbers(lines: &[Value]) -> Vec<u64> {
    lines.iter().filter_map(|line| line["data"]["number"].as_u64()).collect()
}

#[tokio::test]
async fn events_come_in_order_and_those_of_retries_do_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let notifier = notifier(script(folder.path(), "ok", "cat >> $1; echo said; exit 3"), DEADLINE);
    for (number, name) in ["QVIRT_IO_SUSPENDED", "QVIRT_IO_RETRY", "QVIRT_IO_TIMED_OUT", "QVIRT_IO_RECOVERED"]
        .into_iter()
        .enumerate()
    {
        notifier.tell(&event(name, number));
    }
    let lines = told(folder.path(), 3).await;
    assert_eq!(numbers(&lines), [0, 2, 3]);
    assert_eq!((&lines[0]["vm"], &lines[0]["event"]), (&json!("guest"), &json!("QVIRT_IO_SUSPENDED")));
    assert!(lines[0]["timestamp"]["seconds"].is_i64(), "{}", lines[0]);
}

#[tokio::test]
async fn one_that_hangs_is_killed_with_all_it_started_and_the_next_is_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = "read line; echo \"$line\" >> $1; sleep 600 & echo $! >> $1.pids; wait";
    let notifier = notifier(script(folder.path(), "hangs", text), Duration::from_millis(500));
    for number in 0..2 {
        notifier.tell(&event("QVIRT_IO_SUSPENDED", number));
    }
    assert_eq!(numbers(&told(folder.path(), 2).await), [0, 1]);
    // By the time of the second run nothing of the first one lives.
    let pids = std::fs::read_to_string(folder.path().join("told.pids")).expect("numbers");
    let first: i32 = pids.lines().next().and_then(|pid| pid.parse().ok()).expect("a number");
    let stat = std::fs::read_to_string(format!("/proc/{first}/stat")).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z"), "{stat}");
}

#[tokio::test]
async fn the_oldest_are_dropped() {
    let folder = tempfile::tempdir().expect("a folder");
    let gate = folder.path().join("told.go");
    let text = "cat >> $1; until [ -e $1.go ]; do sleep 0.01; done";
    let notifier = notifier(script(folder.path(), "waits", text), DEADLINE);
    notifier.tell(&event("QVIRT_IO_SUSPENDED", 0));
    told(folder.path(), 1).await;
    (1..=WAITING + 5).for_each(|number| notifier.tell(&event("QVIRT_IO_SUSPENDED", number)));
    std::fs::write(gate, "").expect("written");
    let lines = told(folder.path(), 1 + WAITING).await;
    let expected: Vec<u64> = std::iter::once(0).chain(6..=69).collect();
    assert_eq!(numbers(&lines), expected);
}

#[tokio::test]
async fn one_that_is_gone_is_tried_for_each_event() {
    let folder = tempfile::tempdir().expect("a folder");
    let notify = script(folder.path(), "late", "cat >> $1");
    let (here, away) = (folder.path().join("late"), folder.path().join("away"));
    std::fs::rename(&here, &away).expect("renamed");
    assert!(notify.check().expect_err("it is gone").contains("No such file or directory"));
    let error = run(&notify, "{}\n").await.expect_err("it is gone");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    std::fs::rename(&away, &here).expect("renamed");
    let notifier = notifier(notify, DEADLINE);
    notifier.tell(&event("QVIRT_IO_RECOVERED", 1));
    assert_eq!(numbers(&told(folder.path(), 1).await), [1]);
}

#[test]
fn what_is_a_program() {
    let parse = |text: &str| serde_json::from_str::<Notify>(text).map_err(|error| error.to_string());
    let plain = parse("\"/bin/true\"").expect("a program");
    assert_eq!(plain, parse("[\"/bin/true\"]").expect("the same"));
    assert_eq!(serde_json::to_string(&plain).expect("JSON"), "[\"/bin/true\"]");
    for wrong in ["\"true\"", "\"\"", "[]"] {
        assert!(parse(wrong).expect_err(wrong).contains("absolute path"), "{wrong}");
    }
    assert!(parse("7").expect_err("a number").contains("a list of a program and its arguments"));
    let why = |path: &str| parse(&format!("{path:?}")).expect("a path").check().expect_err(path);
    assert_eq!(plain.check(), Ok(()));
    assert!(why("/etc").contains("is no file"));
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    std::fs::write(&data, "").expect("written");
    assert!(why(&data.display().to_string()).contains("`chmod +x` it"));
}
