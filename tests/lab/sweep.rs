//! Each step of an attach failed in turn, by `QVIRT_FAIL_STEP`: nothing may be left of it.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use tests::vm::Vm;

/// How long a guest may take to let go of a device that it was just given: it probes it to the end first, and SCSI has many targets to ask.
const LETTING_GO: Duration = Duration::from_secs(90);

/// Fails every step of an attach until one succeeds; after each, `state` must be what it was. Gives the names of the steps that were failed.
pub fn each_step_is_undone<T: PartialEq + Debug>(
    vm: &Vm,
    device: [&str; 2],
    state: impl Fn() -> T,
) -> Vec<String> {
    let before = state();
    let undone = |step: &String| {
        let until = Instant::now() + LETTING_GO;
        while state() != before {
            assert!(Instant::now() < until, "{step} is not undone: {:?}, not {before:?}", state());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    (1..).map_while(|number| failed_attach(vm, number, device)).inspect(undone).collect()
}

/// Attaches a device by an owner that fails at that step; gives the step's name, nothing if there are not so many.
pub fn failed_attach(vm: &Vm, number: u32, device: [&str; 2]) -> Option<String> {
    vm.kill_owner();
    let (file, step) = (vm.config().display().to_string(), format!("attach:{number}"));
    let started = vm.qvirt_with(&[("QVIRT_FAIL_STEP", &step)], &["start", &file]);
    assert_eq!(started.code, 0, "{started}");
    let output = vm.qvirt(&["attach", "guest", device[0], device[1]]);
    if output.code == 0 {
        return None;
    }
    let words = format!("failed on purpose at attach step {number} (");
    let name = output.stderr.split_once(&words).and_then(|(_, rest)| rest.split_once(')'));
    Some(name.unwrap_or_else(|| panic!("step {number}: {output}")).0.to_owned())
}
