//! The shell in the lab, used as a person does.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tests::qemu::profile_folder;

use crate::troubles::Program;

/// Much more than a boot takes.
const PATIENCE: Duration = Duration::from_secs(300);
const PROMPT: &str = "lab:~# ";

/// Reads on until `seen` ends in a prompt.
fn read_prompt(pieces: &Receiver<Vec<u8>>, seen: &mut Vec<u8>) {
    let until = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(seen).ends_with(PROMPT) {
        let left = until.saturating_duration_since(Instant::now());
        let piece = pieces.recv_timeout(left);
        let text = String::from_utf8_lossy(seen).into_owned();
        seen.extend(piece.unwrap_or_else(|e| panic!("no prompt ({e}), but:\n{text}")));
    }
}

#[test]
fn qvirt_and_the_names_of_the_devices_are_at_hand() {
    let begin = Instant::now();
    let mut shell = Command::new(profile_folder().join("lab"));
    shell.arg("shell").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut shell = Program(shell.spawn().expect("the lab program starts"));
    let mut stdin = shell.0.stdin.take().expect("a pipe");
    let mut stdout = shell.0.stdout.take().expect("a pipe");
    let (sender, pieces) = channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        // It ends with the shell, or with the test.
        while let Ok(count @ 1..) = stdout.read(&mut piece) {
            if sender.send(piece[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut seen = Vec::new();
    read_prompt(&pieces, &mut seen);
    println!("a prompt after {:.1?}", begin.elapsed());
    stdin.write_all(b"qvirt --version; id -u; ls /dev/kvm\n").expect("the shell reads");
    seen.push(b'\n');
    read_prompt(&pieces, &mut seen);
    stdin.write_all(b"exit\n").expect("the shell reads");
    let status = shell.0.wait().expect("the shell ends");
    let text = String::from_utf8_lossy(&seen).replace('\r', "");
    println!("{text}");
    assert!(status.success(), "{status}");
    for words in ["free PF", "Open vSwitch", "qvirt 0.", "\n0\n", "/dev/kvm\n"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
}
