//! Where there can be no lab, or it does not come up, the reason is said; nothing hangs, and no QEMU stays behind.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::qemu::{QemuVersion, images, profile_folder};
use tests::vm::{Output, finished};

/// `lab run true`, with that QEMU and that many seconds to come up.
fn lab(qemu: &Path, seconds: u32) -> Command {
    let mut command = Command::new(profile_folder().join("lab"));
    command.args(["run", "true"]).env("QVIRT_LAB_QEMU", qemu).env("QVIRT_LAB_BOOT", seconds.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A program that goes with the test, however that ends; and a lab host with it.
pub struct Program(pub Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already; it is ours until it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// It must fail, and say all that.
fn refused(output: &Output, words: &[&str]) {
    println!("{}", output.stderr);
    assert_eq!(output.code, 1, "{output}");
    for word in words {
        assert!(output.stderr.contains(word), "{word:?} is not in {output}");
    }
}

/// A QEMU that is told otherwise: what the script does before and after it is the test's.
struct Wrapper {
    folder: tempfile::TempDir,
}

impl Wrapper {
    fn new(script: &str) -> Wrapper {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("qemu");
        let real = images().qemu(QemuVersion::V10_0);
        std::fs::write(&path, format!("#!/bin/sh\nreal={}\n{script}\n", real.display())).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
        Wrapper { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qemu")
    }
}

/// Passes the question for devices on.
const HELP: &str = "case \"$*\" in *help*) exec $real \"$@\";; esac";

fn run(command: &mut Command) -> Output {
    finished(command.spawn().expect("the lab program starts"))
}

#[test]
fn a_qemu_without_igb() {
    let output = run(&mut lab(&images().qemu(QemuVersion::V7_2), 60));
    refused(
        &output,
        &[
            "has no device igb",
            "from 8.0 on",
            "make images",
            "QVIRT_LAB_QEMU",
            "QEMU under test inside the lab may be any",
        ],
    );
}

#[test]
fn a_qemu_without_9p() {
    let wrapper = Wrapper::new("$real \"$@\" | grep -v 9p");
    refused(&run(&mut lab(&wrapper.path(), 60)), &["has no device virtio-9p-pci", "make images"]);
}

#[test]
fn a_qemu_that_is_not_there() {
    refused(
        &run(&mut lab(Path::new("/nonexistent/qemu"), 60)),
        &["/nonexistent/qemu could not be run", "No such file"],
    );
}

#[test]
fn a_qemu_that_refuses_its_command_line() {
    let wrapper = Wrapper::new(&format!("{HELP}\nexec $real \"$@\" -device no-such-device"));
    refused(&run(&mut lab(&wrapper.path(), 60)), &["the lab host did not come up", "no-such-device"]);
}

#[test]
fn a_kernel_that_finds_no_system_disk() {
    let wrapper = Wrapper::new(&format!("{HELP}\nexec $real \"$@\" -set device.root-disk.serial=another"));
    let words = ["the lab host did not come up", "there is no root", "lab-root", "console-1.log"];
    refused(&run(&mut lab(&wrapper.path(), 120)), &words);
}

#[test]
fn a_folder_that_9p_does_not_bring() {
    let wrapper = Wrapper::new(&format!(
        "{HELP}\nfor word; do [ \"$last\" != -append ] || append=$word; last=$word; done\nexec $real \"$@\" -append \"$append lab.share=absent:/absent\""
    ));
    refused(&run(&mut lab(&wrapper.path(), 120)), &["the lab host did not come up", "absent", "9p"]);
}

#[test]
fn a_lab_that_hangs() {
    let wrapper = Wrapper::new(&format!("{HELP}\nexec $real \"$@\" -S"));
    let begin = Instant::now();
    refused(&run(&mut lab(&wrapper.path(), 3)), &["the lab host did not come up", "3s"]);
    assert!(begin.elapsed() < Duration::from_secs(60), "it took {:?}", begin.elapsed());
}

#[test]
fn a_lab_whose_test_program_is_killed_goes_with_it() {
    let wrapper = Wrapper::new(&format!("{HELP}\necho $$ >${{0%/*}}/pid\nexec $real \"$@\" -S"));
    let program = Program(lab(&wrapper.path(), 100).spawn().expect("the lab program starts"));
    let pid = || std::fs::read_to_string(wrapper.folder.path().join("pid")).ok()?.trim().parse::<i32>().ok();
    let until = Instant::now() + Duration::from_secs(60);
    let qemu = loop {
        assert!(Instant::now() < until, "the lab's QEMU did not start");
        match pid() {
            Some(pid) => break pid,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    // By SIGKILL, so that nothing of its own can end QEMU.
    drop(program);
    while Path::new("/proc").join(qemu.to_string()).exists() {
        assert!(Instant::now() < until, "the lab's QEMU, process {qemu}, is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}
