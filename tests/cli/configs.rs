//! VM files and devices that are wrong: each is refused by name, with the next step, before anything is touched.

use tests::vm::Vm;

use crate::scene::{bare, file, refused, start_paused, write};

/// A VM without spare ports beyond one, and with two small images.
fn vm(tables: &str) -> Vm {
    let vm = bare(tables);
    vm.raw("a.img", 4, "a");
    vm.raw("b.img", 4, "b");
    vm
}

/// `DIR` in the text is the VM's folder. What is wrong with the file shows in `check`, `run`, `start` and `define` alike; nothing is left of any of them.
fn wrong(text: &str, error: &str) {
    let vm = vm("");
    let head = std::fs::read_to_string(vm.config()).expect("the VM file");
    let text = text.replace("DIR", vm.path("").display().to_string().trim_end_matches('/'));
    write(&vm, &if text.starts_with("name") { text } else { format!("{head}{text}") });
    let file = file(&vm);
    for command in ["check", "run", "start", "define"] {
        refused(&vm, 2, &[command, &file], error);
        vm.nothing_left();
    }
    assert!(!vm.root().join("etc/guest.toml").exists(), "it was stored");
}

#[test]
fn broken_toml_is_shown_with_its_line() {
    wrong(
        "[[disk]\npath = \"DIR/a.img\"\n",
        "config DIR/guest.toml: TOML parse error at line 7, column 8\n  |\n7 | [[disk]\n  |        ^\n\
         unclosed array table, expected `]`",
    );
}

#[test]
fn an_unknown_key_comes_with_the_nearest_known_one() {
    wrong(
        "[[disk]]\npath = \"DIR/a.img\"\nbuss = \"virtio\"\n",
        "config DIR/guest.toml: TOML parse error at line 9, column 1\n  |\n9 | buss = \"virtio\"\n  | ^^^^\n\
         unknown field `buss`, expected one of `id`, `path`, `format`, `bus`, `device`, `target`, `cache`, `aio`, `discard`, `read_only`, \
         `serial`, `device_id`, `iothread`, `queues`, `bootindex`, `on_error`, `seat`, `scsi`\ndid you mean `bus`?",
    );
}

#[test]
fn ids_are_given_once() {
    wrong(
        "[[disk]]\nid = \"d\"\npath = \"DIR/a.img\"\n[[disk]]\nid = \"d\"\npath = \"DIR/b.img\"\n",
        "config DIR/guest.toml, line 10: d: the id is taken by another device or a root port of this VM: choose another",
    );
}

#[test]
fn a_missing_image_is_named() {
    wrong(
        "[[disk]]\npath = \"DIR/none.img\"\n",
        "config DIR/guest.toml, line 7: image DIR/none.img cannot be opened: No such file or directory (os error 2); check its path, and \
         the rights on it of whoever runs qvirt",
    );
}

#[test]
fn a_folder_is_no_image() {
    wrong(
        "[[disk]]\npath = \"/tmp\"\n",
        "config DIR/guest.toml, line 7: image /tmp: it is neither a file nor a block device: name an image, or a device below /dev",
    );
}

#[test]
fn a_newline_in_a_file_name_is_refused() {
    wrong(
        "[[disk]]\npath = \"DIR/a\\nb.img\"\n",
        "config DIR/guest.toml, line 7: disk0: path = \"DIR/a\\nb.img\" is refused: a path with control characters (a newline, say) \
         cannot be shown or logged truthfully: rename the file",
    );
}

#[test]
fn a_vm_name_has_no_slash() {
    wrong(
        "name = \"a/b\"\n",
        "config DIR/guest.toml: TOML parse error at line 1, column 8\n  |\n1 | name = \"a/b\"\n  |        ^^^^^\n\
         the VM name \"a/b\" has '/' in it: use only ASCII letters, digits, `_`, `.` and `-`",
    );
}

#[test]
fn a_seat_is_taken_once_and_belongs_to_somebody() {
    wrong(
        "[[disk]]\npath = \"DIR/a.img\"\nseat = \"rp1\"\n[[disk]]\npath = \"DIR/b.img\"\nseat = \"rp1\"\n",
        "config DIR/guest.toml, line 10: disk1: seat rp1 is taken by disk0: choose another, or none to get the first free one",
    );
    wrong(
        "[[disk]]\npath = \"DIR/a.img\"\nseat = \"pcie.0:1f.0\"\n",
        "config DIR/guest.toml, line 7: disk0: slot 0x1f of pcie.0 is not for devices: 0x00 to 0x02 are the system's, IDE and USB's, and \
         the display's, 0x1f the chipset's; use 0x03 to 0x1e, or a root port",
    );
}

#[test]
fn a_stored_config_has_absolute_paths() {
    let vm = vm("[[disk]]\npath = \"a.img\"\n");
    refused(
        &vm,
        2,
        &["define", &file(&vm)],
        "config DIR/guest.toml: path \"a.img\" is relative; a stored config needs absolute paths",
    );
    assert!(!vm.root().join("etc/guest.toml").exists(), "it was stored");
}

#[test]
fn a_stored_config_bears_the_name_of_its_vm() {
    let vm = vm("");
    vm.ok(&["define", &file(&vm)]);
    let stored = vm.root().join("etc/guest.toml");
    let text = std::fs::read_to_string(&stored).expect("it was stored");
    std::fs::write(&stored, text.replace("\"guest\"", "\"other\"")).expect("written");
    for command in ["check", "run", "start", "show"] {
        let error = "config DIR/root/etc/guest.toml: name is \"other\", and the file is that of guest: they must agree";
        refused(&vm, 2, &[command, "guest"], error);
    }
}

/// Refusals of a running VM: each leaves it as it was.
#[test]
fn a_running_vm_refuses_what_cannot_be() {
    let vm = vm("[pcie]\nroot_ports = 1\n[[scsi_controller]]\nid = \"s0\"\n");
    vm.raw("comma,name.img", 4, "c");
    start_paused(&vm);
    let before = vm.status();
    let disk = |words: &str, code: i32, error: &str| {
        refused(&vm, code, &["attach", "guest", "--disk", words], error)
    };
    disk(
        "path=b.img,seat=pcie.0:5.0",
        3,
        "disk0: seat pcie.0:05.0 cannot be plugged into while the VM runs: pcie.0 and conventional PCI buses take no hot-plug; use a root \
         port, or --config",
    );
    disk(
        "path=b.img,seat=rp1",
        3,
        "disk0: seat rp1 is taken by s0: choose another, or none to get the first free one",
    );
    disk(
        "path=none.img,bus=scsi",
        3,
        "image DIR/none.img cannot be opened: No such file or directory (os error 2); check its path, and the rights on it of whoever runs \
         qvirt",
    );
    disk(
        "path=new\nline.img,bus=scsi",
        3,
        "disk0: path = \"DIR/new\\nline.img\" is refused: a path with control characters (a newline, say) cannot be shown or logged \
         truthfully: rename the file",
    );
    disk("path", 2, "--disk: \"path\" has no `=`: write key=value, commas inside a value doubled");
    disk(
        "path=a.img,id=s0",
        3,
        "s0: the id is taken by another device or a root port of this VM: choose another",
    );
    assert_eq!(vm.status()["devices"], before["devices"], "a refusal changes nothing");

    vm.ok(&["attach", "guest", "--disk", "path=comma,,name.img,id=c"]);
    assert!(vm.device("c")["backing"].as_str().is_some_and(|path| path.ends_with("/comma,name.img")));
    disk(
        "path=b.img",
        3,
        "disk0: no root port is free, of 2: detach a device, or plan more ([pcie] root_ports, or another [[pcie_controller]]) and start \
         the VM anew",
    );
    refused(
        &vm,
        3,
        &["attach", "guest", "--serial", "type=isa-serial"],
        "serial0: an isa-serial port cannot be plugged in or out while the VM runs: use --config and start the VM anew",
    );
    refused(
        &vm,
        5,
        &["attach", "guest", "--disk", "path=b.img", "--config"],
        "VM guest has no stored config: `qvirt define FILE` stores one, or leave --config out",
    );
    refused(&vm, 5, &["detach", "guest", "nothing"], "there is no device nothing: this VM has s0, c");
    vm.ok(&["attach", "guest", "--disk", "path=a.img,id=a,bus=scsi"]);
    refused(&vm, 3, &["detach", "guest", "s0"], "s0 is used by a: detach them first");
    vm.end();
}
