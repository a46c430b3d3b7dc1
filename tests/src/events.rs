//! `qvirt events` beside a test, from its first word on.

use std::fs::File;
use std::path::PathBuf;
use std::process::Child;

use crate::vm::Vm;

/// Somebody who follows the events of a VM; gone with the value.
#[derive(Debug)]
pub struct Events {
    program: Child,
    path: PathBuf,
}

impl Events {
    /// Begins, and returns when nothing that happens from then on is missed.
    pub fn follow(vm: &Vm, more: &[&str]) -> Events {
        let path = vm.path("events");
        let file = File::create(&path).expect("made");
        let mut command = vm.command(&[&["events", "guest"], more].concat());
        let events = Events { program: command.stdout(file).spawn().expect("qvirt starts"), path };
        vm.wait_for("somebody who follows the events", || events.text().contains("QVIRT_FOLLOWING"));
        events
    }

    /// What came up to now.
    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.path).expect("read")
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It is ours and not reaped.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
