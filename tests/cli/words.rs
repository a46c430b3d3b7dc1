//! Words: of the command line, of `--help`, and of VMs and devices that do not exist.

use crate::scene::{bare, refused};

/// Every command, with the words that its help must have.
const COMMANDS: [(&str, &[&str]); 32] = [
    ("check", &["--incoming", "--against <STATUS.json>", "--argv", "--json", "<TARGET>"]),
    (
        "run",
        &["--console", "--paused", "SIGTERM and SIGINT shut the guest down", "SIGHUP leaves the VM running"],
    ),
    ("start", &["--paused"]),
    ("define", &["<FILE>"]),
    ("undefine", &["<VM>"]),
    ("show", &["--argv", "--toml", "--json"]),
    ("list", &["--all", "--json"]),
    ("status", &["--json"]),
    ("devices", &["--json"]),
    ("shutdown", &["--timeout", "--then-kill", "[default: 60s]"]),
    ("reboot", &["<VM>"]),
    ("reset", &["<VM>"]),
    ("pause", &["<VM>"]),
    ("resume", &["<VM>"]),
    ("kill", &["<VM>"]),
    ("leave", &["<VM>"]),
    (
        "attach",
        &[
            "--disk",
            "--nic",
            "--serial",
            "--channel",
            "--vdpa",
            "--vhost-scsi",
            "--usb",
            "--live",
            "--config",
            "--dry-run",
            "--wait",
            "--json",
        ],
    ),
    ("media", &["<VM>", "<DRIVE>", "insert", "eject"]),
    ("detach", &["--live", "--config", "--wait", "--force", "--json"]),
    ("host", &["pci", "iommu", "usb", "vdpa"]),
    ("blocks", &["<VM>", "--json"]),
    ("chain", &["check"]),
    ("block", &["resize"]),
    ("jobs", &["<VM>", "--json"]),
    ("job", &["cancel", "pause", "resume", "<JOB>"]),
    ("snapshot", &["create", "revert", "delete", "list", "show"]),
    ("io", &["status", "retry", "fail", "set"]),
    ("drill", &["--fail-for", "--reads", "--writes", "--flushes"]),
    ("console", &["[DEVICE]", "--force"]),
    ("events", &["[VMS]...", "--json"]),
    ("qmp", &["<COMMAND>", "[ARGUMENTS]"]),
    ("recover", &["[VM]", "--json"]),
];

#[test]
fn help_names_commands_options_and_exit_codes() {
    let vm = bare("");
    let help = vm.ok(&["--help"]);
    for words in [
        "0  done",
        "1  failed",
        "2  wrong usage: the command line, or a config",
        "3  refused, by qvirt or by the guest",
        "4  pending, or timed out: the outcome is open",
        "5  no such VM or device",
        "QVIRT_ROOT",
        "QVIRT_LOG",
    ] {
        assert!(help.contains(words), "{words:?} is not in {help}");
    }
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed: Vec<&str> =
        commands.map_while(|line| line.strip_prefix("  ")?.split_whitespace().next()).collect();
    for name in listed.iter().filter(|name| **name != "help") {
        let own = vm.ok(&[name, "--help"]);
        let known = COMMANDS.iter().find(|(command, _)| command == name);
        let (_, words) = known.unwrap_or_else(|| panic!("{name} is new: say here what its help has"));
        for word in *words {
            assert!(own.contains(word), "{word:?} is not in the help of {name}: {own}");
        }
    }
    for (name, _) in COMMANDS {
        assert!(listed.contains(&name), "{name} is not in {listed:?}");
    }
    assert!(vm.ok(&["--version"]).starts_with("qvirt "));
    vm.nothing_left();
}

#[test]
fn wrong_words_are_wrong_usage() {
    let vm = bare("");
    for (words, error) in [
        (&[][..], "Usage: qvirt <COMMAND>"),
        (&["frobnicate"], "error: unrecognized subcommand 'frobnicate'"),
        (&["list", "foo"], "error: unexpected argument 'foo' found"),
        (&["status"], "error: the following required arguments were not provided"),
        (
            &["status", "a/b"],
            "error: invalid value 'a/b' for '<VM>': the VM name \"a/b\" has '/' in it: use only ASCII letters",
        ),
        (
            &["start", ""],
            "qvirt: a VM name cannot be empty: give it 1 to 32 letters, digits, `_`, `.` or `-`",
        ),
        (
            &["start", "./none"],
            "qvirt: config ./none cannot be read: No such file or directory (os error 2); check its path, or `qvirt list --all`",
        ),
        (&["attach", "guest"], "error: the following required arguments were not provided"),
        (
            &["attach", "guest", "--disk", "path=x", "--nic", "user=true"],
            "error: the argument '--disk <KEY=VALUE,...>' cannot be used with",
        ),
        (
            &["attach", "guest", "--disk", "path=x", "--dry-run", "--config"],
            "error: the argument '--dry-run' cannot be used with '--config'",
        ),
        (
            &["detach", "guest", "x", "--wait", "5"],
            "error: invalid value '5' for '--wait <WAIT>': \"5\" is no time: a whole number and a unit",
        ),
        (&["show", "guest", "--argv", "--json"], "error: the argument '--argv' cannot be used with '--json'"),
        (
            &["check", "none.toml"],
            "qvirt: config none.toml cannot be read: No such file or directory (os error 2); check its path",
        ),
    ] {
        let output = vm.expect(2, words);
        assert!(output.stderr.contains(error), "{words:?}: {error:?} is not in {output}");
        assert_eq!(output.stdout, "", "{words:?}");
    }
    vm.nothing_left();
}

#[test]
fn a_vm_that_does_not_exist() {
    let vm = bare("");
    let error = "there is no VM nobody: known are none; `qvirt define FILE` stores one";
    for words in [
        &["status", "nobody"][..],
        &["devices", "nobody"],
        &["shutdown", "nobody"],
        &["reboot", "nobody"],
        &["reset", "nobody"],
        &["pause", "nobody"],
        &["resume", "nobody"],
        &["kill", "nobody"],
        &["leave", "nobody"],
        &["attach", "nobody", "--nic", "user=true"],
        &["attach", "nobody", "--nic", "user=true", "--live"],
        &["attach", "nobody", "--nic", "user=true", "--config"],
        &["detach", "nobody", "net0"],
        &["console", "nobody"],
        &["events", "nobody"],
        &["qmp", "nobody", "query-status"],
        &["recover", "nobody"],
        &["undefine", "nobody"],
        &["show", "nobody"],
        &["show", "nobody", "--argv"],
        &["start", "nobody"],
        &["run", "nobody"],
        &["check", "nobody"],
    ] {
        refused(&vm, 5, words, error);
    }
    vm.nothing_left();
}

/// A VM that is known, and does not run.
#[test]
fn a_vm_that_does_not_run() {
    let vm = bare("");
    vm.ok(&["define", &crate::scene::file(&vm)]);
    for words in [
        &["status", "guest"][..],
        &["kill", "guest"],
        &["pause", "guest"],
        &["console", "guest"],
        &["qmp", "guest", "query-status"],
        &["attach", "guest", "--nic", "user=true", "--live"],
        &["detach", "guest", "net0", "--live"],
    ] {
        refused(&vm, 5, words, "VM guest is not running: `qvirt start guest` starts it");
    }
    refused(&vm, 5, &["status", "gues"], "there is no VM gues: known are guest");
    refused(
        &vm,
        5,
        &["detach", "guest", "net0"],
        "the stored config of guest has no device net0: it has none",
    );
    vm.nothing_left();
}
