//! A VM that needs no guest, and the one way to look at a refusal: its whole text, its exit code, and that nothing is left.

use tests::qemu::{QemuVersion, images};
use tests::vm::{Output, Vm};

/// The QEMU of tests that are about qvirt alone.
pub const QEMU: QemuVersion = QemuVersion::V10_0;

/// A VM without a kernel or devices of its own. `head` are further keys, `tables` the TOML tables behind them. Nothing is started.
pub fn bare_on(version: QemuVersion, head: &str, tables: &str) -> Vm {
    let vm = Vm::new(version, "", 0, "");
    let qemu = images().qemu(version);
    write(&vm, &format!("name = \"guest\"\nmemory = \"64MiB\"\nqemu = {qemu:?}\n{head}\n{tables}"));
    vm
}

/// The same on [`QEMU`], with two spare ports unless `tables` says otherwise.
pub fn bare(tables: &str) -> Vm {
    let ports = if tables.contains("[pcie]") || tables.contains("[[pcie_controller]]") {
        ""
    } else {
        "[pcie]\nroot_ports = 2\n"
    };
    bare_on(QEMU, "", &format!("{ports}{tables}"))
}

/// Replaces the VM file.
pub fn write(vm: &Vm, text: &str) {
    std::fs::write(vm.config(), text).expect("the VM file is written");
}

/// Replaces a part of the VM file, which must be there.
pub fn edit(vm: &Vm, from: &str, to: &str) {
    let text = std::fs::read_to_string(vm.config()).expect("the VM file");
    assert!(text.contains(from), "{from:?} is not in {text}");
    write(vm, &text.replace(from, to));
}

/// The VM file's path as a word.
pub fn file(vm: &Vm) -> String {
    vm.config().display().to_string()
}

/// Starts the VM without letting its processors run.
pub fn start_paused(vm: &Vm) {
    vm.ok(&["start", "--paused", &file(vm)]);
}

/// A folder's path, for a text in which `DIR` stands for the VM's folder.
fn folder(vm: &Vm) -> String {
    vm.config().parent().expect("a file is in a folder").display().to_string()
}

/// What a program said, with `DIR` for the VM's folder and `QEMU` for that of the QEMU.
pub fn said(vm: &Vm, text: &str) -> String {
    let qemu = images().qemu(vm.version());
    text.replace(&folder(vm), "DIR").replace(&qemu.display().to_string(), "QEMU")
}

/// Runs qvirt, which must end with that exit code, print nothing else, and say exactly that on its standard error.
pub fn refused(vm: &Vm, code: i32, arguments: &[&str], error: &str) {
    let output = vm.qvirt(arguments);
    is_refusal(vm, &output, code, error);
}

/// Whether an output is such a refusal. Tests of one text differ in paths alone: see [`said`].
pub fn is_refusal(vm: &Vm, output: &Output, code: i32, error: &str) {
    assert_eq!(
        (said(vm, &output.stderr).trim_end(), output.code),
        (format!("qvirt: {error}").as_str(), code),
        "{output}"
    );
    assert_eq!(output.stdout, "", "{output}");
}
