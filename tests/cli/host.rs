//! Hosts that do not play along: folders that cannot be, paths that are too long, a disk that is full while the journal is written.

use std::process::Command;

use tests::vm::{Output, Vm, finished};

use crate::scene::{bare, file, is_refusal, said, start_paused};

/// Runs `start` with another `QVIRT_ROOT`.
fn start_in(vm: &Vm, root: &str) -> Output {
    let mut command = vm.command(&["start", &file(vm)]);
    finished(command.env("QVIRT_ROOT", root).spawn().expect("qvirt starts"))
}

#[test]
fn a_socket_path_that_is_too_long() {
    let vm = bare("");
    let root = vm.path(&"l".repeat(90));
    let output = start_in(&vm, &root.display().to_string());
    let socket = root.join("run/guest/control-ro.sock").display().to_string();
    let bytes = socket.len();
    let error = format!(
        "the socket path {socket:?} has {bytes} bytes and the kernel takes at most 107: use a shorter VM name, or set QVIRT_ROOT to a \
         shorter folder"
    );
    is_refusal(&vm, &output, 1, &said(&vm, &error));
    assert!(!root.exists(), "nothing was made");

    let vm = bare(&format!("[[channel]]\npath = \"/tmp/{}.sock\"\n", "l".repeat(110)));
    let output = vm.qvirt(&["start", &file(&vm)]);
    assert_eq!(output.code, 2, "{output}");
    assert!(
        output.stderr.contains("line 7: channel0: path = ") && output.stderr.contains("at most 107 bytes"),
        "{output}"
    );
    vm.nothing_left();
}

#[test]
fn a_root_that_is_not_absolute() {
    let vm = bare("");
    let error = "QVIRT_ROOT is \"here\", which is not an absolute path: set it to one, for example QVIRT_ROOT=/tmp/qvirt";
    is_refusal(&vm, &start_in(&vm, "here"), 1, error);
}

/// Root may write into any folder, so these are none: the refusals are those of every user.
#[test]
fn folders_that_cannot_be() {
    for folder in ["etc", "run", "lib", "cache", "leases"] {
        let vm = bare("");
        std::fs::create_dir(vm.root()).expect("made");
        std::fs::write(vm.root().join(folder), "").expect("written");
        let output = vm.qvirt(&["run", &file(&vm)]);
        assert_eq!(output.code, 1, "{folder}: {output}");
        let text = said(&vm, &output.stderr);
        let last = text.lines().last().unwrap_or_default();
        assert!(last.contains(&format!("\"DIR/root/{folder}\" is not a folder: move it away")), "{text}");
        assert_eq!(vm.processes(), [0; 0], "no process is left");
        std::fs::remove_file(vm.root().join(folder)).expect("removed");
        vm.nothing_left();
    }
    let vm = bare("");
    let error = "cannot make the folder \"/proc/nowhere/lib\": check the rights on its parent, or set QVIRT_ROOT to a folder of yours: No such \
                 file or directory (os error 2)";
    let output = start_in(&vm, "/proc/nowhere");
    assert_eq!(output.code, 1, "{output}");
    let last =
        output.stderr.lines().last().unwrap_or_default().replace("/proc/nowhere/etc", "/proc/nowhere/lib");
    assert_eq!(last, format!("qvirt: {error}"), "{output}");
}

/// `qvirt` with files limited to so many bytes: the kernel then refuses as on a full disk, first by a short write, then by an error.
fn limited(vm: &Vm, bytes: u64, arguments: &[&str]) -> Output {
    let plain = vm.command(arguments);
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; exec prlimit --fsize=\"$0\": \"$@\"", &bytes.to_string()])
        .arg(plain.get_program());
    command.args(plain.get_args()).envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    finished(command.current_dir(vm.path("")).spawn().expect("sh starts"))
}

/// Limits the files of the owner, which was started to bear it.
fn limit_owner(vm: &Vm, bytes: &str) {
    let pid = vm.owner_pid().to_string();
    let status = Command::new("prlimit").args([&format!("--fsize={bytes}:"), "--pid", &pid]).status();
    assert!(status.expect("prlimit starts").success());
}

const FULL: &str =
    "the file size limit is reached, raise it (`ulimit -f`) and try again: File too large (os error 27)";

#[test]
fn a_full_disk_at_the_launch() {
    let vm = bare("[[disk]]\npath = \"a.img\"\n[[disk]]\npath = \"b.img\"\n");
    for name in ["a.img", "b.img"] {
        vm.raw(name, 4, name);
    }
    // What QEMU can do is known already, so the journal is the first large file; the record of the launch is larger.
    vm.ok(&["check", &file(&vm)]);
    let mut met = Vec::new();
    for bytes in [50, 300, 600, 1500, 4000] {
        let output = limited(&vm, bytes, &["run", "--paused", &file(&vm)]);
        assert_eq!(output.code, 1, "{bytes} bytes: {output}");
        let text = said(&vm, &output.stderr);
        assert!(text.starts_with("qvirt: VM guest did not start: cannot "), "{bytes} bytes: {text}");
        assert!(
            text.contains("the disk is full") || text.contains("the file size limit is reached"),
            "{bytes} bytes: {text}"
        );
        vm.nothing_left();
        let files = ["run/guest/journal", "run/guest/launch.json", "leases"];
        met.extend(files.into_iter().filter(|name| text.contains(&format!("DIR/root/{name}"))));
    }
    for name in ["run/guest/journal", "run/guest/launch.json"] {
        assert!(met.contains(&name), "{name} was never the one that was full: {met:?}");
    }
}

#[test]
fn a_full_disk_while_devices_come_and_go() {
    let vm = bare("[[scsi_controller]]\nid = \"s0\"\n");
    for name in ["a.img", "b.img"] {
        vm.raw(name, 4, name);
    }
    vm.ok(&["check", &file(&vm)]);
    let output = limited(&vm, 100 << 20, &["start", "--paused", &file(&vm)]);
    assert_eq!(output.code, 0, "{output}");
    vm.ok(&["attach", "guest", "--disk", "path=a.img,id=a,bus=scsi"]);
    let nodes = vm.qmp("query-named-block-nodes", &serde_json::json!({}));

    let journal = vm.root().join("run/guest/journal");
    let length = std::fs::metadata(&journal).expect("a journal").len();
    // A line that does not fit is torn off again, so what follows is refused the same way.
    for room in [0, 10] {
        limit_owner(&vm, &(length + room).to_string());
        let output = vm.qvirt(&["attach", "guest", "--disk", "path=b.img,id=b,bus=scsi"]);
        assert_eq!(output.code, 1, "{output}");
        let text = said(&vm, &output.stderr);
        let begin = "qvirt: attach b: step record failed, and everything before it was undone: the journal could not be written, so \
                     nothing was changed: cannot add to the journal \"DIR/root/run/guest/journal\", so the change was not begun: ";
        assert!(text.starts_with(begin), "{text}");
        assert_eq!(vm.device_ids(), ["a", "s0"]);
        assert_eq!(vm.qmp("query-named-block-nodes", &serde_json::json!({})), nodes);
        assert_eq!(
            std::fs::metadata(&journal).expect("a journal").len(),
            length,
            "the journal has whole lines only"
        );
    }
    limit_owner(&vm, &length.to_string());
    let output = vm.qvirt(&["detach", "guest", "a"]);
    let error = format!(
        "a stays in guest: the journal could not be written, so nothing was changed: cannot add to the journal \
         \"DIR/root/run/guest/journal\", so the change was not begun: {FULL}"
    );
    is_refusal(&vm, &output, 3, &error);
    assert_eq!(vm.device("a")["stage"], "present");

    limit_owner(&vm, "unlimited");
    vm.ok(&["attach", "guest", "--disk", "path=b.img,id=b,bus=scsi"]);
    vm.ok(&["detach", "guest", "a"]);
    assert_eq!(vm.device_ids(), ["b", "s0"]);
    // The journal that once was full is one that the next owner can read.
    vm.kill_owner();
    vm.start();
    assert_eq!(vm.device_ids(), ["b", "s0"]);
    vm.end();
}

#[test]
fn a_vm_starts_after_the_folders_are_mended() {
    let vm = bare("");
    std::fs::create_dir(vm.root()).expect("made");
    std::fs::write(vm.root().join("run"), "").expect("written");
    vm.expect(1, &["start", &file(&vm)]);
    std::fs::remove_file(vm.root().join("run")).expect("removed");
    start_paused(&vm);
    vm.end();
}
