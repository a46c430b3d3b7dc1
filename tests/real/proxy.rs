//! `qvirt io-proxy` in front of real files, with QEMU's clients behind it. Outages are the drill's: requests fail in the proxy as if the storage
//! had said so, and from there on nothing is played.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::on_both;
use tests::qemu::{QemuVersion, images, qvirt_binary};
use tests::vm::{Output, finished};

on_both! {
    what_is_kept_is_done_when_the_storage_works_again => kept,
    the_timeout_is_reported_to_the_client => timeout,
    parking_makes_it_no_space => park,
    an_image_is_the_same_through_it => convert,
    a_qcow2_image_grows_behind_it => qcow2,
    /// The client reconnects and sends again what was not answered.
    its_death_loses_nothing => death,
}

const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: [&str; 4] = ["--retry-read", "--retry-write", "--interval", "100ms"];

/// A folder with an image, and proxies in front of it.
struct Scene {
    folder: TempDir,
    version: QemuVersion,
}

/// A proxy; ended with the value.
struct Proxy(Option<Child>);

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended already; it is ours until it is reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Proxy {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.as_ref().expect("it runs").id() as i32)
    }

    fn ended(mut self) -> Output {
        finished(self.0.take().expect("it was not waited for before"))
    }
}

impl Scene {
    fn new(version: QemuVersion, mib: u64) -> Scene {
        let folder = tempfile::Builder::new().prefix("qvirt-").tempdir().expect("a temporary folder");
        let scene = Scene { folder, version };
        std::fs::File::create(scene.image()).expect("an image").set_len(mib << 20).expect("it grows");
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("image")
    }

    /// A proxy that may not be there yet.
    fn launch(&self, image: &Path, more: &[&str]) -> Proxy {
        let mut command = Command::new(qvirt_binary());
        command.arg("io-proxy").arg("--socket").arg(self.path("nbd.sock"));
        command.arg("--control").arg(self.path("control.sock"));
        command.args(["--name", "disk"]).arg("--file").arg(image).args(more);
        command.env_remove("QVIRT_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Proxy(Some(command.spawn().expect("qvirt starts")))
    }

    /// A proxy that serves.
    fn proxy(&self, more: &[&str]) -> (Proxy, Control) {
        let proxy = self.launch(&self.image(), more);
        let mut control = self.control();
        control.state("the first state", |_| true);
        (proxy, control)
    }

    fn control(&self) -> Control {
        let path = self.path("control.sock");
        let until = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Control::new(stream),
                Err(error) => assert!(Instant::now() < until, "no control line: {error}"),
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    fn node(&self) -> Value {
        let server = json!({"type": "unix", "path": self.path("nbd.sock")});
        json!({"driver": "nbd", "server": server, "export": "disk", "reconnect-delay": 30})
    }

    fn qemu_io(&self, node: &Value, steps: &[&str]) -> Child {
        let mut command = Command::new(images().qemu_io(self.version));
        for step in steps {
            command.args(["-c", step]);
        }
        command.arg(format!("json:{node}"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("qemu-io starts")
    }

    /// Steps that must succeed.
    fn does(&self, node: &Value, steps: &[&str]) {
        succeeded(finished(self.qemu_io(node, steps)));
    }

    fn qemu_img(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(images().qemu_img(self.version));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = finished(command.spawn().expect("qemu-img starts"));
        assert_eq!(output.code, 0, "qemu-img {arguments:?}: {output}");
        output.stdout
    }
}

fn succeeded(output: Output) {
    let failed = output.stdout.contains("failed") || output.stdout.contains("error");
    assert!(output.code == 0 && !failed, "{output}");
}

/// A client of the control line.
struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    fn new(stream: UnixStream) -> Control {
        stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
        Control { lines: BufReader::new(stream) }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line in time");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Waits for a state.
    fn state(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = self.line();
            if line["event"] == "state" && wanted(&line) {
                return line;
            }
            assert!(Instant::now() < until, "{what} does not come: {line}");
        }
    }

    /// Sends a command and waits for its answer.
    fn ask(&mut self, command: &Value) -> Value {
        // In one piece: told to quit, the proxy waits for no more.
        self.lines.get_mut().write_all(format!("{command}\n").as_bytes()).expect("sent");
        loop {
            let line = self.line();
            if line["event"].is_null() {
                return line;
            }
        }
    }

    fn tell(&mut self, command: &Value) {
        assert_eq!(self.ask(command), json!({"return": {}}), "{command}");
    }

    fn fault(&mut self, kind: &str, on: bool) {
        self.tell(&json!({"command": "fault", kind: true, "on": on}));
    }
}

fn kept(version: QemuVersion) {
    let scene = Scene::new(version, 8);
    for mode in [&["--direct"][..], &[]] {
        let (proxy, mut control) = scene.proxy(&[&RETRY[..], mode].concat());
        for (kind, held) in [("writes", "write"), ("flushes", "flush"), ("reads", "read")] {
            control.fault(kind, true);
            let client =
                scene.qemu_io(&scene.node(), &["write -P 0x5a 1M 64k", "flush", "read -P 0x5a 1M 64k"]);
            let state = control.state("a request that is held", |state| {
                state["held"][held] == 1 && state["attempts"].as_u64() > Some(3)
            });
            assert_eq!((&state["operation"], &state["errno"]), (&json!(held), &json!(5)), "{state}");
            assert_eq!(state["error"], "Input/output error");
            assert!(state["since_unix_ms"].as_u64() > Some(1_600_000_000_000), "{state}");
            control.fault(kind, false);
            succeeded(finished(client));
            let state = control.state("the end of the outage", |state| state["since_unix_ms"].is_null());
            assert_eq!(state["held"], json!({"read": 0, "write": 0, "flush": 0}));
        }
        let bytes = std::fs::read(scene.image()).expect("the image is read");
        assert!(bytes[1 << 20..(1 << 20) + 65536].iter().all(|byte| *byte == 0x5a));
        control.tell(&json!({"command": "quit"}));
        assert_eq!(proxy.ended().code, 0);
    }
}

fn timeout(version: QemuVersion) {
    let scene = Scene::new(version, 8);
    let (_proxy, mut control) = scene.proxy(&[&RETRY[..], &["--timeout", "1s"]].concat());
    control.fault("writes", true);
    let began = Instant::now();
    let failed = finished(scene.qemu_io(&scene.node(), &["write 0 64k", "write 64k 64k"]));
    let took = began.elapsed();
    assert_eq!(
        format!("{}{}", failed.stdout, failed.stderr).matches("Input/output error").count(),
        2,
        "{failed}"
    );
    assert!(took > Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");
    // The flush with which the client ends succeeds, so the state may have passed.
    control.state("the timeout", |state| state["timeouts"] == 1);
    control.fault("writes", false);
    scene.does(&scene.node(), &["write -P 1 0 64k"]);
    control.state("the end of it", |state| state["timed_out"] == false && state["since_unix_ms"].is_null());

    // The times can be changed at any moment, also in an outage.
    control.tell(&json!({"command": "set", "timeout_ms": 0}));
    control.fault("reads", true);
    let client = scene.qemu_io(&scene.node(), &["read -P 1 0 64k"]);
    control.state("a read that is held for longer", |state| {
        state["held"]["read"] == 1 && state["timeout_ms"].is_null() && state["attempts"].as_u64() > Some(15)
    });
    let refused = control.ask(&json!({"command": "set", "interval_ms": 5}));
    assert!(refused["error"].as_str().is_some_and(|error| error.contains("100")), "{refused}");
    let refused = control.ask(&json!({"command": "jump"}));
    assert!(refused["error"].as_str().is_some_and(|error| error.contains("jump")), "{refused}");
    control.tell(&json!({"command": "fail"}));
    let failed = finished(client);
    assert!(format!("{}{}", failed.stdout, failed.stderr).contains("Input/output error"), "{failed}");
}

fn park(version: QemuVersion) {
    let scene = Scene::new(version, 8);
    let (_proxy, mut control) = scene.proxy(&["--retry-write", "--interval", "1h"]);
    control.fault("writes", true);
    let client = scene.qemu_io(&scene.node(), &["aio_write 0 64k", "aio_write 64k 64k", "aio_flush"]);
    control.state("both writes", |state| state["held"]["write"] == 2);
    control.tell(&json!({"command": "park"}));
    let parked = finished(client);
    assert_eq!(format!("{}{}", parked.stdout, parked.stderr).matches("No space left").count(), 2, "{parked}");
    let parked = finished(scene.qemu_io(&scene.node(), &["write 0 64k"]));
    assert!(format!("{}{}", parked.stdout, parked.stderr).contains("No space left"), "{parked}");
    assert_eq!(control.ask(&json!({"command": "state"}))["return"]["parked"], true);
    control.tell(&json!({"command": "unpark"}));
    let client = scene.qemu_io(&scene.node(), &["write 0 64k"]);
    control.state("a write that is held", |state| state["held"]["write"] == 1);
    control.fault("writes", false);
    control.tell(&json!({"command": "retry"}));
    succeeded(finished(client));
    // A read is not to be retried here.
    control.fault("reads", true);
    let failed = finished(scene.qemu_io(&scene.node(), &["read 0 64k"]));
    assert!(format!("{}{}", failed.stdout, failed.stderr).contains("Input/output error"), "{failed}");
}

fn convert(version: QemuVersion) {
    let scene = Scene::new(version, 32);
    let source = scene.path("source").display().to_string();
    let far = scene.path("qvirt-io-proxy.raw").display().to_string();
    std::fs::File::create(&source).expect("a file").set_len(32 << 20).expect("it grows");
    let steps = ["write -P 0x11 0 1M", "write -P 0x22 5M 3M", "write -P 0x33 31M 1M"];
    scene.does(&json!({"driver": "raw", "file": {"driver": "file", "filename": source}}), &steps);
    for mode in [&["--direct"][..], &[]] {
        let (proxy, mut control) = scene.proxy(&[&RETRY[..], &["--discard", "unmap"], mode].concat());
        let node = format!("json:{}", json!({"driver": "raw", "file": scene.node()}));
        // Everything is overwritten, so that zeros have to be made.
        scene.does(&scene.node(), &["write -P 0xff 0 32M"]);
        scene.qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", &source, &node]);
        scene.qemu_img(&["compare", "-f", "raw", "-F", "raw", &source, &node]);
        scene.qemu_img(&["convert", "-f", "raw", "-O", "raw", &node, &far]);
        scene.qemu_img(&["compare", "-f", "raw", "-F", "raw", &source, &far]);
        scene.does(&scene.node(), &["discard 5M 1M", "write -z 6M 1M", "write -z -u 7M 512k", "flush"]);
        scene.does(&scene.node(), &["read -P 0 5M 2560k", "read -P 0x22 7680k 512k", "write -f -P 9 8M 4k"]);
        let map = |image: &str| -> Vec<(u64, u64, bool)> {
            let text = scene.qemu_img(&["map", "--output=json", "-f", "raw", image]);
            let map: Value = serde_json::from_str(&text).expect("JSON");
            let number = |value: &Value| value.as_u64().expect("a number");
            let extents = map.as_array().expect("a list").iter();
            extents.map(|e| (number(&e["start"]), number(&e["length"]), e["zero"] == true)).collect()
        };
        assert_eq!(map(&node), map(&scene.image().display().to_string()));
        // Growth is seen when it is asked for.
        assert_eq!(control.ask(&json!({"command": "size"})), json!({"return": {"size": 32 << 20}}));
        std::fs::OpenOptions::new()
            .write(true)
            .open(scene.image())
            .and_then(|image| image.set_len(40 << 20))
            .expect("the image grows");
        assert_eq!(control.ask(&json!({"command": "size"})), json!({"return": {"size": 40 << 20}}));
        scene.does(&scene.node(), &["write -P 7 39M 1M"]);
        kill(proxy.pid(), Signal::SIGTERM).expect("it runs");
        let ended = proxy.ended();
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended}");
        assert!(!scene.path("nbd.sock").exists() && !scene.path("control.sock").exists());
        std::fs::File::create(scene.image()).and_then(|image| image.set_len(32 << 20)).expect("anew");
    }
}

fn qcow2(version: QemuVersion) {
    let scene = Scene::new(version, 0);
    let image = scene.image().display().to_string();
    scene.qemu_img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    let (_proxy, mut control) = scene.proxy(&[&RETRY[..], &["--size", "66MiB", "--direct"]].concat());
    let node = json!({"driver": "qcow2", "file": scene.node()});
    control.fault("writes", true);
    let client = scene.qemu_io(&node, &["write -P 0x77 0 48M", "flush", "read -P 0x77 0 48M"]);
    control.state("a write that is held", |state| state["held"]["write"].as_u64() > Some(0));
    control.fault("writes", false);
    succeeded(finished(client));
    scene.does(&node, &["read -P 0x77 0 48M", "read -P 0 48M 16M"]);
    control.tell(&json!({"command": "quit"}));
    scene.qemu_img(&["check", "-q", &image]);
}

fn death(version: QemuVersion) {
    let scene = Scene::new(version, 8);
    let (proxy, mut control) = scene.proxy(&RETRY);
    control.fault("writes", true);
    let steps: Vec<String> = (0..8).map(|n| format!("aio_write -P {} {n}M 1M", n + 1)).collect();
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    let client = scene.qemu_io(&scene.node(), &[&steps[..], &["aio_flush", "flush"]].concat());
    control.state("all writes", |state| state["held"]["write"] == 8);
    // As an accident would; it has no time to remove its sockets.
    kill(proxy.pid(), Signal::SIGKILL).expect("it runs");
    proxy.ended();
    let (_proxy, _control) = scene.proxy(&RETRY);
    succeeded(finished(client));
    let bytes = std::fs::read(scene.image()).expect("the image is read");
    for (n, piece) in bytes.chunks(1 << 20).enumerate() {
        assert!(piece.iter().all(|byte| usize::from(*byte) == n + 1), "piece {n}");
    }
}

#[test]
fn a_proxy_that_cannot_open_its_image_says_so_and_ends() {
    let scene = Scene::new(QemuVersion::V10_0, 1);
    let proxy = scene.launch(Path::new("/nonexistent/image"), &[]);
    let told = scene.control().line();
    let ended = proxy.ended();
    assert_eq!(told["event"], "failed", "{told}");
    assert!(told["error"].as_str().is_some_and(|error| error.contains("/nonexistent/image")), "{told}");
    assert_eq!(ended.code, 1, "{ended}");
    assert!(ended.stderr.contains("/nonexistent/image") && ended.stderr.contains("No such file"), "{ended}");
    assert!(!scene.path("control.sock").exists());

    // Nobody writes to this pipe, so opening it for reading never returns.
    let hangs = scene.path("hangs");
    nix::unistd::mkfifo(&hangs, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let began = Instant::now();
    let proxy = scene.launch(&hangs, &["--read-only"]);
    let told = scene.control().line();
    assert!(told["error"].as_str().is_some_and(|error| error.contains("hangs")), "{told}");
    assert_eq!(proxy.ended().code, 1);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());

    let hurried = scene.launch(&scene.image(), &["--interval", "5ms"]).ended();
    assert!(hurried.code == 2 && hurried.stderr.contains("--interval"), "{hurried}");
}
