//! Work that QEMU does in jobs of its own, and how far they are until it is done: a bar for people, a line of JSON for each change for programs. It goes
//! on when nobody looks.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

use super::Problem;
use super::client::{Client, connect};
use crate::folders::{Folders, VmName};

/// How long it may take: whole disks, at the speed of their storage.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// How often jobs are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Has the owner of a VM do it, and shows the jobs of that VM meanwhile.
pub async fn follow(
    folders: &Folders,
    vm: &VmName,
    command: &str,
    wish: impl Serialize,
    as_json: bool,
) -> Result<Value, Problem> {
    let client = connect(folders, vm).await?;
    // The first connection has an answer to wait for.
    let watch = connect(folders, vm).await?;
    let mut shown = Shown::new(as_json);
    let outcome = tokio::select! {
        outcome = client.ask_for(LONG, command, wish) => outcome,
        // QEMU may not answer while the owner does.
        never = shown.watch(&watch) => match never {},
    };
    // Whether the terminal is still there is of no interest.
    let _ = shown.bars.clear();
    outcome
}

/// What is not known is not shown: the answer tells what came of it.
async fn jobs(client: &Client) -> Vec<Value> {
    let jobs = client.call("query-jobs", Value::Null).await.unwrap_or_default();
    jobs.as_array().cloned().unwrap_or_default()
}

struct Shown {
    as_json: bool,
    bars: MultiProgress,
    of: BTreeMap<String, (ProgressBar, Value)>,
}

impl Shown {
    fn new(as_json: bool) -> Shown {
        // Where standard error is no terminal nothing is drawn.
        Shown { as_json, bars: MultiProgress::new(), of: BTreeMap::new() }
    }

    async fn watch(&mut self, client: &Client) -> Infallible {
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tick.tick().await;
            self.show(&jobs(client).await);
        }
    }

    fn show(&mut self, jobs: &[Value]) {
        let name = |job: &Value| job["id"].as_str().unwrap_or_default().to_owned();
        self.of.retain(|id, (bar, _)| {
            let goes_on = jobs.iter().any(|job| name(job) == *id);
            if !goes_on {
                bar.finish_and_clear();
            }
            goes_on
        });
        for job in jobs {
            let bars = &self.bars;
            let (bar, last) =
                self.of.entry(name(job)).or_insert_with(|| (bars.add(bar(&name(job))), Value::Null));
            if last == job {
                continue;
            }
            if self.as_json {
                println!("{job}");
            } else {
                let number = |key: &str| job[key].as_u64().unwrap_or_default();
                bar.set_length(number("total-progress"));
                bar.set_position(number("current-progress"));
            }
            last.clone_from(job);
        }
    }
}

fn bar(job: &str) -> ProgressBar {
    let style = "{prefix} [{bar:32}] {percent}% {bytes} of {total_bytes} {eta}";
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_prefix(job.to_owned())
}
