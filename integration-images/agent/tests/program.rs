//! The program as it is called, on this machine.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use agent::inventory::Inventory;
use agent::pattern::{Report, Verdict};

fn agent(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_agent")).args(words).output().expect("the agent starts")
}

fn json<T: serde::de::DeserializeOwned>(words: &[&str]) -> T {
    let output = agent(words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}: {output:?}"))
}

fn refused(words: &[&str], code: i32, reason: &str) {
    let output = agent(words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(code) && said.contains(reason), "{words:?}: {output:?}");
}

#[test]
fn what_it_does_not_know_is_answered_with_its_usage() {
    let wrong: [&[&str]; 8] = [
        &[],
        &["reboot"],
        &["inventory", "--json"],
        &["unplug", "off"],
        &["pattern", "start"],
        &["pattern", "start", "/dev/null", "--rate"],
        &["pattern", "start", "/dev/null", "--rate", "0/s"],
        &["serve", "--port"],
    ];
    for words in wrong {
        refused(words, 2, "usage: agent serve");
    }
}

#[test]
fn its_name_can_be_its_first_word() {
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("inventory");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_agent"), &link).expect("a link");
    let by_name = Command::new(link).arg("--lines").output().expect("the agent starts");
    let seen: Inventory = json(&["inventory"]);
    let lines: Vec<String> = seen.lines().into_iter().collect();
    assert_eq!(String::from_utf8_lossy(&by_name.stdout).lines().collect::<Vec<_>>(), lines);
    assert!(seen.cpus > 0 && seen.pci.iter().all(|function| function.address.len() == 12), "{seen:?}");
}

/// A process in the background, which must not stay if the test fails.
struct Background<'a>(&'a str);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        // It was stopped, if all went well.
        drop(agent(&["pattern", "stop", self.0]));
    }
}

#[test]
fn a_pattern_runs_in_the_background_until_it_is_stopped() {
    // Not where temporary files may be in memory, which has no direct I/O.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.as_file().set_len(1 << 20).expect("it grows");
    let device = file.path().to_str().expect("a path of text");

    refused(&["pattern", "report", device], 1, "pattern start");
    refused(&["pattern", "verify", device], 1, "no pattern");
    refused(&["pattern", "start", device, "--mib", "2"], 1, "fewer than");
    refused(&["pattern", "start", "/no/such/disk"], 1, "No such file");
    let _background = Background(device);
    let started = agent(&["pattern", "start", device, "--mib", "1", "--block", "8192", "--rate", "2000/s"]);
    assert!(started.status.success() && started.stdout.is_empty(), "{started:?}");
    refused(&["pattern", "start", device], 1, "pattern stop");

    let begin = Instant::now();
    let running = loop {
        let report: Report = json(&["pattern", "report", device]);
        if report.generation > 1 {
            break report;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{report:#?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(running.working && running.device == device && running.shape.block == 8192, "{running:#?}");
    let last: Report = json(&["pattern", "stop", device]);
    assert!(
        last.writes >= running.writes && last.outstanding.is_none() && last.mismatch_count == 0,
        "{last:#?}"
    );
    let verdict: Verdict = json(&["pattern", "verify", device]);
    assert_eq!((verdict.verified, verdict.generation), (128, last.generation));
    refused(&["pattern", "stop", device], 1, "no pattern runs");

    std::os::unix::fs::FileExt::write_all_at(file.as_file(), b"x", 100).expect("a byte");
    let verdict = agent(&["pattern", "verify", device]);
    let text = String::from_utf8_lossy(&verdict.stdout).into_owned();
    assert!(verdict.status.code() == Some(1) && text.contains("damaged"), "{verdict:?}");
    assert!(Path::new(device).exists());
}
