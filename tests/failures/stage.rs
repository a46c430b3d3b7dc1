//! A VM to fail: on a real QEMU whose guest never runs, or on the fake one whose guest does as it is told; and the two ways to compare.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;
use tests::fake::{Control, Fake, State};
use tests::qemu::{QemuVersion, images};
use tests::vm::{Output, Vm, finished};

use crate::holdings::Holdings;

/// A VM and the QEMU behind it.
pub struct Stage {
    pub vm: Vm,
    control: Option<PathBuf>,
    own_network: bool,
}

/// The head of a VM file, and spare ports.
fn config(vm: &Vm, qemu: &std::path::Path, tables: &str) {
    let text = format!(
        "name = \"guest\"\nmemory = {{ size = \"64MiB\", shared = true }}\nqemu = {qemu:?}\n[pcie]\nroot_ports = 6\n{tables}"
    );
    std::fs::write(vm.config(), text).expect("the VM file is written");
}

impl Stage {
    /// A VM on a real QEMU. Nothing is started.
    pub fn real(version: QemuVersion, tables: &str) -> Stage {
        let vm = Vm::new(version, "", 0, "");
        config(&vm, &images().qemu(version), tables);
        Stage { vm, control: None, own_network: false }
    }

    /// A VM on the fake QEMU. Nothing is started.
    pub fn fake(tables: &str) -> Stage {
        let vm = Vm::new(QemuVersion::V10_0, "", 0, "");
        config(&vm, &Fake::binary(), tables);
        let control = Some(vm.path("control"));
        Stage { vm, control, own_network: false }
    }

    /// The same with a network of its owner's own, in which that may do anything.
    pub fn with_own_network(self) -> Stage {
        Stage { own_network: true, ..self }
    }

    /// A fake QEMU whose guest runs.
    pub fn running(tables: &str) -> Stage {
        let stage = Stage::fake(tables);
        let output = stage.start(&[]);
        assert_eq!(output.code, 0, "{output}");
        stage
    }

    /// Starts the VM, or adopts it, with more variables. On a real QEMU its guest does not run.
    pub fn start(&self, variables: &[(&str, &str)]) -> Output {
        self.start_with(&Fake::new(), variables)
    }

    /// The same with a fake QEMU that has rules from its beginning.
    pub fn start_with(&self, fake: &Fake, variables: &[(&str, &str)]) -> Output {
        let file = self.vm.config().display().to_string();
        let fresh = !self.vm.root().join("run/guest").exists();
        let paused: &[&str] = if self.control.is_none() && fresh { &["--paused"] } else { &[] };
        let mut command = self.vm.command(&[&["start"], paused, &[&file]].concat());
        if self.own_network {
            command = in_own_network(&self.vm, &command);
        }
        if let Some(control) = &self.control {
            command.envs(fake.clone().control(control).env());
        }
        finished(command.envs(variables.iter().copied()).spawn().expect("qvirt starts"))
    }

    /// Another owner, with more variables, adopts the VM.
    pub fn adopt(&self, variables: &[(&str, &str)]) {
        self.vm.kill_owner();
        let output = self.start(variables);
        assert_eq!(output.code, 0, "{output}");
    }

    /// A line into the fake.
    pub fn control(&self) -> Control {
        Control::connect(self.control.as_ref().expect("only a fake has one"))
    }

    /// All that the VM has.
    pub fn holdings(&self) -> Holdings {
        if self.control.is_none() {
            return Holdings::of_real(&self.vm);
        }
        let Holdings(mut all) = Holdings::of_books(&self.vm);
        let State { nodes, netdevs, chardevs, objects, fds, fdsets, devices } = self.control().state();
        let lists = [
            ("nodes", nodes),
            ("netdevs", netdevs),
            ("chardevs", chardevs),
            ("objects", objects),
            ("fds", fds),
            ("peripherals", devices),
        ];
        all.extend(lists.map(|(what, names)| (what, names.into_iter().collect())));
        all.insert("links", links(self.vm.owner_pid()));
        all.insert("fdsets", fdsets.iter().map(ToString::to_string).collect());
        Holdings(all)
    }

    /// Waits until the VM has just what it had then.
    pub fn is_as(&self, before: &Holdings, what: &str) {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(15);
        loop {
            let now = self.holdings();
            if now == *before {
                return;
            }
            if std::time::Instant::now() > until {
                // One that says where they differ.
                let differs: Vec<_> =
                    now.0.iter().filter(|(kind, names)| before.0.get(*kind) != Some(names)).collect();
                let was: Vec<_> =
                    before.0.iter().filter(|(kind, names)| now.0.get(*kind) != Some(names)).collect();
                panic!("{what}: it has {differs:#?}, it had {was:#?}");
            }
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
    }

    /// `qvirt attach guest OPTION VALUE`
    pub fn attach(&self, device: [&str; 2]) -> Output {
        self.vm.qvirt(&["attach", "guest", device[0], device[1]])
    }

    /// `qvirt detach guest ID --wait WAIT`
    pub fn detach(&self, id: &str, wait: &str) -> Output {
        self.vm.qvirt(&["detach", "guest", id, "--wait", wait])
    }

    /// Ends the VM; nothing may be left.
    pub fn end(self) {
        self.vm.end();
    }

    /// The run state.
    pub fn state(&self) -> String {
        self.vm.qmp("query-status", &json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }
}

/// The same program as root of a user namespace and of a network namespace.
fn in_own_network(vm: &Vm, plain: &Command) -> Command {
    let mut command = Command::new("unshare");
    command.arg("-Urn").arg(plain.get_program()).args(plain.get_args());
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(vm.path(""));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The links of a process's network.
fn links(pid: i32) -> Vec<String> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    table.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}
