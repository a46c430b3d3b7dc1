//! What the lab host has, by name, and how it is made ready. This runs in the lab host, as root.
//!
//! | name | what |
//! |---|---|
//! | [`pci::FREE_PF`] | an SR-IOV card (igb) with four VFs that no driver holds, each in an IOMMU group of its own |
//! | [`pci::USED_PF`] | another, whose two VFs igbvf holds: host NICs; the cable of both cards is one hub |
//! | [`pci::SHARED`] | two functions (e1000e) in one IOMMU group |
//! | [`usb::STICKS`] | two different USB sticks and two twins, each on a bus of its own |
//! | [`usb::SLOW`], [`usb::FAST`] | sticks of USB 1.1 and 3.0 |
//! | [`vdpa::DISK`] | a vDPA disk (VDUSE, served by QEMU's storage daemon) |
//! | [`vdpa::NIC`] | a vDPA NIC of one queue pair (VDUSE, served by `vduse-net` of this crate), with a neighbour that answers ping |
//! | [`scsi::TARGET`] | a vhost-scsi target with two LUNs |
//! | [`faulty::NAME`] | a disk on device-mapper that fails, stalls, slows down, vanishes and recovers on order |
//! | [`network::BRIDGE`], [`network::SWITCH`] | a Linux bridge and an Open vSwitch bridge, each with an address to ping |
//! | | `/dev/kvm`, `/dev/vhost-net`, 200 huge pages of 2 MiB |
//!
//! Everything is found again by looking at the host, not in notes that [`prepare`] left: a test and a person in the lab's shell see the same.

use std::fmt::{Display, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub mod debug;
pub mod far;
pub mod faulty;
pub mod frozen;
pub mod network;
pub mod pci;
pub mod scsi;
pub mod usb;
pub mod vdpa;

/// How many huge pages of 2 MiB the lab host has.
pub const HUGE_PAGES: u64 = 200;
/// How long something in the lab host may take to appear.
const APPEARING: Duration = Duration::from_secs(60);

/// What could not be done in the lab host, and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostError(String);

/// Shorthand of everything here.
pub type Done<T> = Result<T, HostError>;

/// Makes one part of the lab host ready.
type Part = fn() -> Done<()>;

/// Makes everything in the table above. Once, at boot.
///
/// # Errors
/// The first thing that could not be made.
pub fn prepare() -> Done<()> {
    let parts: [(&str, Part); 7] = [
        ("KVM, vhost-net, huge pages", kernel),
        ("pci", pci::prepare),
        ("usb", usb::prepare),
        ("vhost-scsi", scsi::prepare),
        ("vdpa", vdpa::prepare),
        ("faulty disk", faulty::prepare),
        ("networks", network::prepare),
    ];
    let run = |(name, part): (&str, Part)| {
        let begin = Instant::now();
        part().map_err(|e| HostError(format!("{name}: {e}")))?;
        println!("lab: {name} ready after {:.1} s", begin.elapsed().as_secs_f32());
        Ok(())
    };
    // Most of it is waiting for programs and the kernel; two processors do it in half the time.
    std::thread::scope(|scope| {
        let running = parts.map(|part| scope.spawn(move || run(part)));
        running
            .into_iter()
            .try_for_each(|part| part.join().map_err(|_| HostError("a thread panicked".into()))?)
    })
}

fn kernel() -> Done<()> {
    modprobe(&["vhost_net", "tun"])?;
    // The lab's processor is AMD's where it is emulated, this machine's elsewhere.
    let cpuinfo = read("/proc/cpuinfo")?;
    modprobe(&[if cpuinfo.contains(" svm") { "kvm_amd" } else { "kvm_intel" }])?;
    // It gathers pages of guests into huge ones, and asks the other processor each time, which may not hear it where both are emulated.
    write("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", 3_600_000)?;
    write("/proc/sys/vm/nr_hugepages", HUGE_PAGES)?;
    let got = read("/proc/sys/vm/nr_hugepages")?;
    match got.trim().parse() == Ok(HUGE_PAGES) {
        true => Ok(()),
        false => Err(HostError(format!("the kernel gave {} huge pages, not {HUGE_PAGES}", got.trim()))),
    }
}

/// Names and what they stand for, for the lab's shell.
///
/// # Errors
/// Something that should be there is not.
pub fn list() -> Done<String> {
    let mut text = String::new();
    for lines in [pci::list()?, usb::list()?, scsi::list(), vdpa::list()?, faulty::list(), network::list()] {
        text.push_str(&lines);
    }
    let _ = writeln!(text, "KVM           /dev/kvm\nhuge pages    {HUGE_PAGES} of 2 MiB");
    Ok(text)
}

/// Prints the last lines of what this host's kernel, its daemons, and the VMs of a test have logged.
pub fn print_logs() {
    const LINES: usize = 25;
    let show = |name: &str, text: &str| {
        println!("==> {name}");
        crate::last_lines(text, LINES).for_each(|line| println!("  | {line}"));
    };
    show("the lab's kernel", &program("dmesg", &[]).unwrap_or_else(|e| e.to_string()));
    let files = |folder: &Path| names(folder).into_iter().map(|name| folder.join(name)).collect::<Vec<_>>();
    let vms = files(Path::new("/tmp")).into_iter().filter(|path| path.join("root").is_dir());
    let of_vms =
        vms.flat_map(|vm| [vec![vm.join("console.log")], files(&vm.join("root/lib/guest"))].concat());
    let all =
        [vec!["/run/lab-prepare.log".into()], files(Path::new("/var/log/openvswitch")), of_vms.collect()]
            .concat();
    for path in all.iter().filter(|path| path.extension().is_some_and(|extension| extension == "log")) {
        let text = std::fs::read(path).unwrap_or_default();
        show(&path.display().to_string(), &String::from_utf8_lossy(&text));
    }
}

/// Runs a program that must succeed; gives what it printed.
///
/// # Errors
/// It does not start or fails: with its message.
pub fn program(name: &str, arguments: &[&str]) -> Done<String> {
    finished(Command::new(name).args(arguments))
}

fn finished(command: &mut Command) -> Done<String> {
    let output = command.output().map_err(|e| HostError(format!("{command:?} cannot be run: {e}")))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let why = String::from_utf8_lossy(&output.stderr);
            Err(HostError(format!("{command:?}: {}: {}", output.status, why.trim())))
        }
    }
}

fn modprobe(modules: &[&str]) -> Done<()> {
    program("modprobe", &[&["-a"], modules].concat()).map(drop)
}

/// Writes to a file of sysfs, configfs or proc.
///
/// # Errors
/// With the path, the text and the kernel's reason.
pub fn write(path: impl AsRef<Path>, text: impl Display) -> Done<()> {
    let path = path.as_ref();
    let text = text.to_string();
    std::fs::write(path, &text).map_err(|e| HostError(format!("writing {text:?} to {}: {e}", path.display())))
}

/// Reads such a file.
///
/// # Errors
/// With the path and the kernel's reason.
pub fn read(path: impl AsRef<Path>) -> Done<String> {
    let path = path.as_ref();
    std::fs::read_to_string(path).map_err(|e| HostError(format!("reading {}: {e}", path.display())))
}

fn make_folder(path: &Path) -> Done<()> {
    std::fs::create_dir_all(path).map_err(|e| HostError(format!("making {}: {e}", path.display())))
}

fn link(target: &Path, at: &Path) -> Done<()> {
    std::os::unix::fs::symlink(target, at)
        .map_err(|e| HostError(format!("linking {} to {}: {e}", at.display(), target.display())))
}

/// Names in a folder, sorted; none if it does not exist.
fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The last part of what a link points to, as sysfs has drivers and groups.
fn link_name(path: &Path) -> Option<String> {
    Some(std::fs::read_link(path).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// A file of that size in the lab host, filled with zeros, for a device to be made of.
fn image(name: &str, mib: u64) -> Done<std::path::PathBuf> {
    let folder = Path::new("/run/lab");
    make_folder(folder)?;
    let path = folder.join(name);
    let file = std::fs::File::create(&path).and_then(|file| file.set_len(mib << 20));
    file.map(|()| path.clone()).map_err(|e| HostError(format!("making {}: {e}", path.display())))
}

/// Waits until `look` finds what it looks for.
///
/// # Errors
/// It is not there after a minute.
pub fn wait_for<T>(what: &str, look: impl Fn() -> Option<T>) -> Done<T> {
    let until = Instant::now() + APPEARING;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > until {
            return Err(HostError(format!("waited {APPEARING:?} in vain for {what}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
