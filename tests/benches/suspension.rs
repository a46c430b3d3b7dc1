//! `make bench`: what disks that retry cost, with a guest that works, as ratios in one run beside their goals. Nothing here is a test.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::PatternWish;
use tests::qemu::{QemuVersion, images, qvirt_binary};
use tests::scene::{QUIET, Scene};
use tests::vm::AGENT_CHANNEL;

const VERSION: QemuVersion = QemuVersion::V10_0;
const ROUNDS: usize = 9;
const INTERVAL_MS: i64 = 500;

fn main() {
    let mut scene = Scene::boot(VERSION, QUIET, AGENT_CHANNEL);
    idle_cost(&mut scene);
    outages(&mut scene);
    scene.end();
    proxy();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A disk that would be held against one that would not, both well; and a third one against that, which tells what is noise.
fn idle_cost(scene: &mut Scene) {
    let mut names = Vec::new();
    for (id, more) in [
        ("held", "on_error.read=retry,on_error.write=retry,on_error.engine=hold"),
        ("plain", "cache=writeback"),
        ("other", "cache=writeback"),
    ] {
        let image = scene.vm.raw(&format!("{id}.img"), 64, "x");
        scene.attach(
            ["--disk", &format!("path={image},id={id},serial={id},{more}")],
            "disk",
            &format!("serial={id}"),
        );
        names.push(scene.disk(id));
    }
    let (mut ratios, mut noise) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // None is always the first, which may have to warm something up.
        let mut times = [0.0; 3];
        for turn in 0..3 {
            let which = (round + turn) % 3;
            times[which] = read_all(scene, &names[which]);
        }
        let [held, plain, other] = times;
        ratios.push(held / plain);
        noise.push(other / plain);
    }
    println!(
        "guest reads, `hold` configured against not, no outage: {:.2}x the time (goal: noise, which is {:.2}x between two without)",
        median(ratios),
        median(noise)
    );
}

fn read_all(scene: &mut Scene, name: &str) -> f64 {
    let begin = Instant::now();
    let script = format!("dd if=/dev/{name} of=/dev/null bs=4k count=8192 iflag=direct 2>/dev/null");
    scene.guest.check(&script).expect("the guest reads");
    begin.elapsed().as_secs_f64()
}

/// `qvirt events guest --json`; ended with the value.
struct Events {
    program: Child,
    lines: BufReader<ChildStdout>,
}

impl Events {
    fn follow(scene: &Scene) -> Events {
        let mut program = scene
            .vm
            .command(&["events", "guest", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("qvirt starts");
        let lines = BufReader::new(program.stdout.take().expect("a pipe"));
        let mut events = Events { program, lines };
        events.until("QVIRT_FOLLOWING");
        events
    }

    /// The events up to one of that name, as names with their times in milliseconds.
    fn until(&mut self, name: &str) -> Vec<(String, f64)> {
        let mut seen = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).expect("a line") > 0, "the events ended before {name}");
            let event: Value = serde_json::from_str(&line).expect("JSON");
            let time = &event["timestamp"];
            let part = |name: &str| time[name].as_f64().expect("a time");
            let milliseconds = part("seconds") * 1000.0 + part("microseconds") / 1000.0;
            seen.push((event["event"].as_str().expect("a name").to_owned(), milliseconds));
            if seen.last().is_some_and(|(last, _)| last == name) {
                return seen;
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Outages by drills: how long the VM stands still for an attempt, and how long after the repair its I/O goes on.
fn outages(scene: &mut Scene) {
    let image = scene.vm.raw("stormy.img", 16, "x");
    let retry = format!(
        "on_error.read=retry,on_error.write=retry,on_error.interval={INTERVAL_MS}ms,on_error.engine=hold"
    );
    scene.attach(
        ["--disk", &format!("path={image},id=stormy,serial=stormy,{retry}")],
        "disk",
        "serial=stormy",
    );
    let name = format!("/dev/{}", scene.disk("stormy"));
    scene.guest.pattern_start(&name, PatternWish::default()).expect("the pattern starts");
    let mut events = Events::follow(scene);
    let (mut pauses, mut late) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let fail_for = 1200;
        let begin = unix_ms();
        let arguments = serde_json::json!({"id": "stormy", "fail-for-ms": fail_for, "reads": true, "writes": true, "flushes": true});
        scene.vm.qmp("qvirt-drill", &arguments);
        let seen = events.until("QVIRT_IO_RECOVERED");
        let mut stopped = None;
        for (name, time) in &seen {
            match (name.as_str(), stopped) {
                ("STOP", _) => stopped = Some(*time),
                ("RESUME", Some(since)) => {
                    pauses.push(time - since);
                    stopped = None;
                }
                _ => {}
            }
        }
        let went_on = seen.iter().rfind(|(name, _)| name == "RESUME").map_or(0.0, |(_, time)| *time);
        late.push(went_on - (begin + f64::from(fail_for)) - INTERVAL_MS as f64);
    }
    // An attempt in vain stands still twice: to move the disk to its own node, and to move it back.
    println!("pause of the guest per attempt: {:.1} ms (goal: under 20 ms)", 2.0 * median(pauses));
    println!(
        "repair to completed I/O beyond the interval: {:.0} ms, negative when the attempt came sooner (goal: under 50 ms)",
        median(late)
    );
}

fn unix_ms() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
    now.as_secs_f64() * 1000.0
}

/// The process of engine `proxy` in front of a file, against the file.
fn proxy() {
    let folder = tempfile::tempdir().expect("a folder");
    let (image, socket) = (folder.path().join("image"), folder.path().join("nbd.sock"));
    std::fs::write(&image, vec![b'x'; 64 << 20]).expect("an image");
    let mut process = Command::new(qvirt_binary())
        .args(["io-proxy", "--name", "x", "--direct", "--retry-read", "--retry-write", "--socket"])
        .arg(&socket)
        .arg("--control")
        .arg(folder.path().join("control.sock"))
        .arg("--file")
        .arg(&image)
        .spawn()
        .expect("the proxy starts");
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let through = format!("nbd+unix:///x?socket={}", socket.display());
    let direct = image.display().to_string();
    for (size, what, goal) in [
        ("64k", "read", "goal 0.9x"),
        ("4k", "read", "goal 0.6x"),
        ("64k", "write", "no goal"),
        ("4k", "write", "no goal"),
    ] {
        let mut ratios = Vec::new();
        for _ in 0..ROUNDS {
            ratios.push(bench(&direct, size, what) / bench(&through, size, what));
        }
        println!(
            "`proxy` against the file itself, {what}s of {size}: {:.2}x the speed ({goal})",
            median(ratios)
        );
    }
    let _ = process.kill();
    let _ = process.wait();
}

fn bench(image: &str, size: &str, what: &str) -> f64 {
    let begin = Instant::now();
    let count = if size == "4k" { "40000" } else { "8000" };
    let write: &[&str] = if what == "write" { &["-w"] } else { &[] };
    let output = Command::new(images().qemu_img(VERSION))
        .args(["bench", "-f", "raw", "-t", "none", "-d", "16", "-c", count, "-s", size])
        .args(write)
        .arg(image)
        .output()
        .expect("qemu-img runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    begin.elapsed().as_secs_f64()
}
