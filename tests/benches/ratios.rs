//! `make bench`: what qvirt costs above bare QEMU, as ratios in one run. Nothing here is a test: figures depend on the machine, so only
//! ratios against raw QEMU in the same run are printed beside their goals.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::qemu::{QemuVersion, images};

const ROUNDS: usize = 2000;
const STARTS: usize = 15;
const ATTACHES: usize = 30;

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let qvirt = Qvirt { root: folder.path().join("root"), binary: release_binary() };
    let file = folder.path().join("bench.toml");
    for name in ["system.img", "data.img", "raw.img"] {
        let image = std::fs::File::create(folder.path().join(name)).expect("an image");
        image.set_len(64 << 20).expect("its size");
    }
    let qemu = images().qemu(QemuVersion::V10_0);
    let config = format!(
        "name = \"bench\"\nmemory = \"256MiB\"\nqemu = {qemu:?}\n[[scsi_controller]]\n[[disk]]\nid = \"sys\"\npath = \"system.img\"\n"
    );
    std::fs::write(&file, config).expect("a config");
    println!("QEMU: {}", qemu.display());

    starts(&qvirt, &file, folder.path());
    let _ = Command::new(&qvirt.binary)
        .env("QVIRT_ROOT", &qvirt.root)
        .args(["start", "--paused"])
        .arg(&file)
        .stdout(Stdio::null())
        .status();
    let _ending = Ending(&qvirt);
    let raw = RawQemu::start(&qvirt, &file, folder.path());
    round_trips(&qvirt, &raw);
    attaches(&qvirt, &raw, folder.path());
    memory_and_size(&qvirt);
}

struct Qvirt {
    root: PathBuf,
    binary: PathBuf,
}

struct Ending<'a>(&'a Qvirt);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.run(&["kill", "bench"]);
    }
}

impl Qvirt {
    fn run(&self, args: &[&str]) -> String {
        let output =
            Command::new(&self.binary).env("QVIRT_ROOT", &self.root).args(args).output().expect("qvirt runs");
        assert!(output.status.success(), "qvirt {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.root.join("run/bench").join(name)
    }
}

/// A program built by `make release`.
fn release_binary() -> PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/qvirt");
    assert!(target.exists(), "{} is missing: run `make bench`, which builds it", target.display());
    target
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn report(what: &str, ours: Duration, raw: Duration, goal: f64) {
    let ratio = ours.as_secs_f64() / raw.as_secs_f64();
    println!("{what}: {ratio:.2}x  ({:.3} ms against {:.3} ms raw; goal {goal}x)", ms(ours), ms(raw));
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// From the command to a guest that runs, against the least that a script has to do for it.
fn starts(qvirt: &Qvirt, file: &Path, folder: &Path) {
    let file_text = file.to_str().expect("text");
    qvirt.run(&["check", file_text]);
    let (mut ours, mut raws) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let begin = Instant::now();
        qvirt.run(&["start", file_text]);
        ours.push(begin.elapsed());
        qvirt.run(&["kill", "bench"]);
        let begin = Instant::now();
        let mut raw = RawQemu::start(qvirt, file, folder);
        raw.qmp.call("cont", json!({}));
        raws.push(begin.elapsed());
    }
    report("start to running", median(ours), median(raws), 1.3);
}

/// A QEMU with the same command line, started by hand.
struct RawQemu {
    child: Child,
    qmp: Raw,
}

impl Drop for RawQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl RawQemu {
    fn start(qvirt: &Qvirt, file: &Path, folder: &Path) -> RawQemu {
        static ARGV: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
        let socket = folder.join("raw.sock");
        let argv = ARGV.get_or_init(|| {
            let text = qvirt.run(&["check", file.to_str().expect("text"), "--json"]);
            let check: Value = serde_json::from_str(&text).expect("JSON");
            let words = check["argv"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|w| w.as_str().expect("a word").to_owned());
            let listen = |word: String| {
                let word = word.replace("fd=qmp,", &format!("path={},", socket.display()));
                word.replace("fd=rescue,", &format!("path={}.rescue,", socket.display()))
                    .replace("system.img", "raw.img")
            };
            words.map(listen).collect()
        });
        let _ = std::fs::remove_file(&socket);
        let qemu = images().qemu(QemuVersion::V10_0);
        let child = Command::new(qemu)
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        };
        RawQemu { child, qmp: Raw::negotiate(stream) }
    }
}

/// The least client there is: one blocking socket.
struct Raw {
    reader: BufReader<UnixStream>,
    line: String,
}

impl Raw {
    fn negotiate(stream: UnixStream) -> Raw {
        let mut raw = Raw { reader: BufReader::new(stream), line: String::new() };
        raw.reader.read_line(&mut raw.line).expect("a greeting");
        raw.call("qmp_capabilities", json!({}));
        raw
    }

    fn call(&mut self, command: &str, arguments: Value) {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.send(text.as_bytes());
    }

    fn try_call(&mut self, command: &str, arguments: Value) -> bool {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.reply_to(text.as_bytes())
    }

    fn send(&mut self, text: &[u8]) {
        assert!(self.reply_to(text), "{}", self.line);
    }

    /// Sends a command and reads up to its reply; `false` if that is an error.
    fn reply_to(&mut self, text: &[u8]) -> bool {
        self.reader.get_mut().write_all(text).expect("sent");
        loop {
            self.line.clear();
            assert!(self.reader.read_line(&mut self.line).expect("a reply") > 0, "the monitor was closed");
            if self.line.starts_with("{\"error\"") || self.line.starts_with("{\"return\"") {
                return self.line.starts_with("{\"return\"");
            }
        }
    }

    fn round_trip(&mut self) -> Duration {
        let begin = Instant::now();
        self.send(b"{\"execute\":\"query-status\"}\n");
        begin.elapsed()
    }
}

/// One `query-status`: by hand, through the client, and through the owner's control socket. Taken in turns, so that all see the same machine.
fn round_trips(qvirt: &Qvirt, raw: &RawQemu) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let socket = raw_socket(raw);
    let (mut direct, mut client, mut control) = (Vec::new(), Vec::new(), Vec::new());
    let mut owner = Raw::negotiate(UnixStream::connect(qvirt.socket("control.sock")).expect("the owner"));
    for _ in 0..8 {
        let mut by_hand = Raw::negotiate(UnixStream::connect(&socket).expect("the second monitor"));
        for _ in 0..ROUNDS / 8 {
            direct.push(by_hand.round_trip());
            control.push(owner.round_trip());
        }
        drop(by_hand);
        runtime.block_on(async {
            let stream = tokio::net::UnixStream::connect(&socket).await.expect("the second monitor");
            let (qmp, events) =
                qmp_client::Qmp::connect(stream, qmp_client::Options::default()).await.expect("negotiated");
            for _ in 0..ROUNDS / 8 {
                let begin = Instant::now();
                qmp.call_raw("query-status", None).await.expect("a reply");
                client.push(begin.elapsed());
            }
            drop((qmp, events));
            tokio::task::yield_now().await;
        });
    }
    let direct = median(direct);
    report("QMP round trip through the client", median(client), direct, 1.2);
    report("QMP round trip through the control socket", median(control), direct, 2.0);
}

fn raw_socket(raw: &RawQemu) -> PathBuf {
    // The second monitor; the first is held by `raw`.
    let address = raw.qmp.reader.get_ref().peer_addr().expect("an address");
    let path = address.as_pathname().expect("a path").to_owned();
    PathBuf::from(format!("{}.rescue", path.display()))
}

/// A disk plugged in by the whole program, against the commands alone.
fn attaches(qvirt: &Qvirt, raw: &RawQemu, folder: &Path) {
    let image = folder.join("data.img");
    let disk = format!("id=hot,bus=virtio-scsi,path={}", image.display());
    let socket = raw_socket(raw);
    let mut by_hand = Raw::negotiate(UnixStream::connect(socket).expect("the second monitor"));
    let (mut ours, mut raws) = (Vec::new(), Vec::new());
    for _ in 0..ATTACHES {
        let begin = Instant::now();
        qvirt.run(&["attach", "bench", "--disk", &disk]);
        ours.push(begin.elapsed());
        qvirt.run(&["detach", "bench", "hot"]);
        let begin = Instant::now();
        let file = json!({"driver": "file", "filename": image});
        by_hand.call("blockdev-add", json!({"driver": "raw", "node-name": "hot", "file": file}));
        by_hand
            .call("device_add", json!({"driver": "scsi-hd", "id": "hot", "bus": "scsi0.0", "drive": "hot"}));
        raws.push(begin.elapsed());
        by_hand.call("device_del", json!({"id": "hot"}));
        // QEMU lets go of the node a moment later.
        while !by_hand.try_call("blockdev-del", json!({"node-name": "hot"})) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let (ours, raw) = (median(ours), median(raws));
    println!(
        "attach of a disk, the whole program: {:.2} ms above the two raw commands ({:.2} ms against {:.2} ms; goal: under 5 ms above)",
        ms(ours.saturating_sub(raw)),
        ms(ours),
        ms(raw)
    );
}

fn memory_and_size(qvirt: &Qvirt) {
    let status: Value = serde_json::from_str(&qvirt.run(&["status", "bench", "--json"])).expect("JSON");
    let text = std::fs::read_to_string(format!("/proc/{}/status", status["owner_pid"])).expect("the owner");
    let line = text.lines().find(|line| line.starts_with("VmRSS")).expect("its memory");
    let kib: f64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    println!("owner's resident memory: {:.2} MiB (goal: under 6 MiB)", kib / 1024.0);
    let size = std::fs::metadata(&qvirt.binary).expect("the program").len();
    println!("program, stripped: {:.2} MiB (goal: under 8 MiB)", size as f64 / f64::from(1 << 20));
}
