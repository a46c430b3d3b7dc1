//! Chains of images as tests see them: by QEMU's own tools, and by what qvirt says of snapshots.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::qemu::images;
use crate::vm::{Output, Vm, finished};

fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finished(command.spawn().expect("QEMU's tool starts"))
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img(vm: &Vm, arguments: &[&str]) -> String {
    let mut command = Command::new(images().qemu_img(vm.version()));
    command.args(arguments);
    let output = run(command);
    assert_eq!(output.code, 0, "qemu-img {}: {output}", arguments.join(" "));
    output.stdout
}

/// Fills a part of an image that no QEMU has open with one byte: `write(vm, path, "qcow2", 7, "64k 4k")`.
pub fn write(vm: &Vm, image: &str, format: &str, byte: u8, place: &str) {
    let mut command = Command::new(images().qemu_io(vm.version()));
    command.args(["-f", format, "-c", &format!("write -q -P {byte} {place}"), image]);
    let output = run(command);
    assert!(output.code == 0 && !output.stdout.contains("failed"), "qemu-io {image}: {output}");
}

/// What a guest would see of an image, with all that is below it.
pub fn view(vm: &Vm, image: &str, format: &str) -> Vec<u8> {
    let raw = vm.path("view.tmp").display().to_string();
    qemu_img(vm, &["convert", "-U", "-f", format, "-O", "raw", image, &raw]);
    let bytes = std::fs::read(&raw).expect("it was just written");
    std::fs::remove_file(raw).expect("it is ours");
    bytes
}

/// The disks of a snapshot: id, the image that was frozen, its format.
pub fn frozen(vm: &Vm, name: &str) -> Vec<(String, String, String)> {
    let text = vm.ok(&["snapshot", "show", "guest", name, "--json"]);
    let shown: Value = serde_json::from_str(&text).expect("it is JSON");
    let word = |disk: &Value, key: &str| disk[key].as_str().unwrap_or_default().to_owned();
    let disks = shown["disks"].as_array().into_iter().flatten();
    disks.map(|disk| (word(disk, "id"), word(disk, "image"), word(disk, "format"))).collect()
}

/// What each disk of each snapshot is, by names.
pub fn states(vm: &Vm) -> BTreeMap<String, Vec<u8>> {
    let text = vm.ok(&["snapshot", "list", "guest", "--json"]);
    let list: Value = serde_json::from_str(&text).expect("it is JSON");
    let names = list.as_array().into_iter().flatten().filter_map(|s| s["name"].as_str());
    let of = |name: &str| {
        let disks = frozen(vm, name);
        let named = |(id, image, format): (String, String, String)| {
            (format!("{name} {id}"), view(vm, &image, &format))
        };
        disks.into_iter().map(named).collect::<Vec<_>>()
    };
    names.flat_map(of).collect()
}

/// The images that the VM writes, or would: source and format of each disk, by its id.
pub fn tops(vm: &Vm, target: &str) -> BTreeMap<String, (String, String)> {
    let blocks: Value = serde_json::from_str(&vm.ok(&["blocks", target, "--json"])).expect("it is JSON");
    let word = |block: &Value, key: &str| block[key].as_str().unwrap_or_default().to_owned();
    let blocks = blocks.as_array().into_iter().flatten();
    blocks.map(|block| (word(block, "id"), (word(block, "source"), word(block, "format")))).collect()
}

/// Every image of a VM's folder is whole, and every header names the path of an image.
pub fn are_sound(vm: &Vm) {
    for file in std::fs::read_dir(vm.path("")).expect("the folder").flatten() {
        let path = file.path().display().to_string();
        if path.ends_with(".qcow2") {
            qemu_img(vm, &["check", "-q", "-U", &path]);
            let backing = launcher::image::backing_of(Path::new(&path)).expect("a header");
            assert!(backing.is_none_or(|(below, _)| Path::new(&below).is_file()), "{path}");
        }
    }
}
