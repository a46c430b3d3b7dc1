//! What makes the images, on a full disk: the lab may mount one.

use std::path::Path;
use std::process::{Command, Stdio};

use tests::lab::host::program;
use tests::lab::inside;
use tests::qemu::images;
use tests::vm::finished;

#[test]
fn a_disk_without_space_is_said_before_anything_is_fetched() {
    inside(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let place = folder.path().display().to_string();
        program("mount", &["-t", "tmpfs", "-o", "size=16m", "tmpfs", &place]).expect("a small disk");
        program("cp", &["-r", &images().sources().display().to_string(), &place]).expect("it fits");
        let mut command = Command::new(folder.path().join("integration-images/setup"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = finished(child.expect("the script starts"));
        let made = Path::new(&place).join("target").exists();
        program("umount", &[&place]).expect("nobody uses it");
        println!("{output}");
        assert_eq!((output.code, made), (1, false), "{output}");
        for words in ["MiB are free for", "MiB are needed: free some space"] {
            assert!(output.stderr.contains(words), "{output}");
        }
    });
}
