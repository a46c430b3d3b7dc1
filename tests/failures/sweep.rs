//! Every step failed from within, in turn, by `QVIRT_FAIL_STEP`. The steps are counted where the code takes them and named by their errors:
//! the names that were met are held against the code's own lists.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use launcher::launch::STEPS;
use launcher::work::Step;
use tests::qemu::QemuVersion;
use tests::vm::Output;

use crate::stage::Stage;

/// Kinds of step that need a network to change, and the nodes for it, or devices of the host: where this host does not give us any of our own,
/// they are failed in the lab.
const IN_THE_LAB: [&str; 10] = [
    "tap",
    "vhost-net",
    "descriptor",
    "vdpa",
    "vhost-scsi",
    "fdset",
    "function",
    "driver",
    "vf-profile",
    "usb",
];

/// A sweep ends with a success; none has so many steps.
const MANY: u32 = 60;

/// The name of the step that an output says failed on purpose.
pub fn failed_step(output: &Output, work: &str, number: u32) -> Option<String> {
    let text = format!("{}{}", output.stdout, output.stderr);
    let rest = text.split_once(&format!("failed on purpose at {work} step {number} ("))?.1;
    Some(rest.split_once(')')?.0.to_owned())
}

fn injected(work: &str, number: u32) -> String {
    format!("{work}:{number}")
}

#[test]
fn launch() {
    let tables = "[[iothread]]\nid = \"io\"\n[[scsi_controller]]\nid = \"s0\"\n[[disk]]\npath = \"a.img\"\n[[disk]]\npath = \"b.qcow2\"\n\
                  format = \"qcow2\"\nbus = \"scsi\"\n\
                  [[disk]]\npath = \"c.img\"\non_error = { read = \"retry\", write = \"retry\", engine = \"proxy\" }\n[[nic]]\nuser = true\n[[serial]]\n[[channel]]\nguest_agent = true\n";
    for version in QemuVersion::ALL {
        let stage = Stage::real(version, tables);
        stage.vm.raw("a.img", 4, "a");
        stage.vm.raw("c.img", 4, "c");
        stage.vm.qcow2("b.qcow2", Ok(4));
        let mut met = BTreeSet::new();
        let mut spawned = 0;
        for number in 1..MANY {
            let output = stage.start(&[("QVIRT_FAIL_STEP", &injected("launch", number))]);
            if output.code == 0 {
                break;
            }
            assert_eq!(output.code, 1, "step {number}: {output}");
            let step =
                failed_step(&output, "launch", number).unwrap_or_else(|| panic!("step {number}: {output}"));
            stage.vm.nothing_left();
            spawned += u32::from(["identity", "connect", "agree"].contains(&step.as_str()));
            met.insert(step);
        }
        assert_eq!(
            met,
            STEPS.iter().map(ToString::to_string).collect(),
            "steps that were failed, and those that there are"
        );
        assert_eq!(spawned, 3, "QEMU was killed and reaped at each step after its start");
        stage.end();
    }
}

/// A device to come and go, and its id.
struct Victim {
    option: [String; 2],
    id: &'static str,
}

impl Victim {
    fn new(option: &str, value: &str, id: &'static str) -> Victim {
        Victim { option: [option.to_owned(), format!("{value},id={id}")], id }
    }

    fn attach(&self, stage: &Stage) -> Output {
        stage.attach([&self.option[0], &self.option[1]])
    }
}

/// Fails each step of an attach; what the guest may have seen is asked to leave, and leaves.
fn sweep_attach(stage: &Stage, victim: &Victim, met: &mut BTreeSet<String>) {
    let before = stage.holdings();
    for number in 1..MANY {
        stage.adopt(&[("QVIRT_FAIL_STEP", &injected("attach", number))]);
        let output = victim.attach(stage);
        let what = format!("attach {}: step {number}: {output}", victim.option[1]);
        if output.code == 0 {
            assert_ne!(stage.holdings(), before, "{what}");
            let output = stage.detach(victim.id, "10s");
            assert_eq!(output.code, 0, "{}: {output}", victim.id);
            stage.is_as(&before, &what);
            return;
        }
        assert_eq!(output.code, 1, "{what}");
        met.insert(failed_step(&output, "attach", number).unwrap_or_else(|| panic!("{what}")));
        stage.is_as(&before, &what);
    }
    panic!("attach {} never succeeded", victim.option[1]);
}

/// Fails each step of a detach, which then is refused and changes nothing; and each step of the clearing up, which the next owner finishes.
fn sweep_detach(stage: &Stage, victim: &Victim, met: &mut BTreeSet<String>) {
    let before = stage.holdings();
    for (work, code) in [("detach", 3), ("clear", 4)] {
        for number in 1..MANY {
            let output = victim.attach(stage);
            assert_eq!(output.code, 0, "{}: {output}", victim.id);
            let with = stage.holdings();
            stage.adopt(&[("QVIRT_FAIL_STEP", &injected(work, number))]);
            let output = stage.detach(victim.id, "400ms");
            let what = format!("{work} {}: step {number}: {output}", victim.option[1]);
            if output.code == 0 {
                stage.is_as(&before, &what);
                stage.adopt(&[]);
                break;
            }
            assert_eq!(output.code, code, "{what}");
            met.insert(format!(
                "{work} {}",
                failed_step(&output, work, number).unwrap_or_else(|| panic!("{what}"))
            ));
            if work == "detach" {
                stage.is_as(&with, &what);
            }
            stage.adopt(&[]);
            let output = stage.detach(victim.id, "10s");
            assert!([0, 5].contains(&output.code), "it was gone already, or went now: {output}");
            stage.is_as(&before, &what);
        }
    }
}

/// Victims that leave without a guest, so on a real QEMU too.
fn guestless(stage: &Stage) -> Vec<Victim> {
    let raw = stage.vm.raw("v.img", 4, "v");
    let bottom = stage.vm.qcow2("bottom.qcow2", Ok(4));
    let top = stage.vm.qcow2("top.qcow2", Err((&bottom, "qcow2")));
    let proxied = stage.vm.raw("w.img", 4, "w");
    let retry = "on_error.read=retry,on_error.write=retry,on_error.engine=proxy";
    vec![
        Victim::new("--disk", &format!("path={proxied},bus=scsi,{retry}"), "v0"),
        Victim::new("--disk", &format!("path={raw},bus=scsi"), "v1"),
        Victim::new("--disk", &format!("path={top},format=qcow2,bus=scsi"), "v2"),
        Victim::new("--disk", "device=cdrom", "v3"),
        Victim::new("--serial", "type=virtio-console", "v4"),
        Victim::new("--channel", "name=org.example.0", "v5"),
        Victim { option: ["--iothread".to_owned(), "id=v6".to_owned()], id: "v6" },
    ]
}

const CONTROLLERS: &str = "[[scsi_controller]]\nid = \"s0\"\n[[virtio_serial]]\nid = \"vs0\"\n";

fn real(version: QemuVersion) {
    let stage = Stage::real(version, CONTROLLERS);
    let victims = guestless(&stage);
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    let (mut attached, mut detached) = (BTreeSet::new(), BTreeSet::new());
    for victim in &victims {
        sweep_attach(&stage, victim, &mut attached);
        sweep_detach(&stage, victim, &mut detached);
    }
    let expected = [
        "record", "lease", "socket", "io-proxy", "object", "blockdev", "chardev", "frontend", "verify",
        "settle",
    ];
    assert_eq!(attached, expected.iter().map(ToString::to_string).collect());
    all_of_detach(&detached);
    stage.end();
}

fn all_of_detach(met: &BTreeSet<String>) {
    let expected = ["clear backend", "clear host", "clear record", "detach device_del", "detach record"];
    assert_eq!(*met, expected.iter().map(ToString::to_string).collect());
}

#[test]
fn plug_on_qemu_10_0() {
    real(QemuVersion::V10_0);
}

/// All kinds of device, with a guest that lets go of them, controllers made on demand among them.
#[test]
fn plug_on_the_fake() {
    let stage = Stage::running("");
    let raw = stage.vm.raw("pci.img", 4, "pci");
    let mut victims = guestless(&stage);
    victims.push(Victim::new("--disk", &format!("path={raw}"), "v7"));
    victims.push(Victim::new("--nic", "user=true", "v8"));
    // Whoever listens there need not speak: the fake does not either.
    let socket = stage.vm.path("vu.sock");
    let _backend = std::os::unix::net::UnixListener::bind(&socket).expect("a listener");
    victims.push(Victim::new("--nic", &format!("vhost_user={}", socket.display()), "v9"));
    victims.push(Victim { option: ["--scsi-controller".to_owned(), "id=v10".to_owned()], id: "v10" });
    let (mut attached, mut detached) = (BTreeSet::new(), BTreeSet::new());
    for victim in &victims {
        sweep_attach(&stage, victim, &mut attached);
        sweep_detach(&stage, victim, &mut detached);
    }
    all_of_detach(&detached);
    stage.end();
    let network = Network::of_this_host();
    if network.taps {
        taps(network, &mut attached);
    }
    let missing: BTreeSet<&str> =
        Step::KINDS.iter().copied().filter(|kind| !attached.contains(*kind)).collect();
    let in_the_lab = IN_THE_LAB.into_iter().filter(|kind| match *kind {
        "vhost-net" => !network.vhost,
        "tap" | "descriptor" => !network.taps,
        _ => true,
    });
    let expected: BTreeSet<&str> = in_the_lab.collect();
    assert_eq!(missing, expected, "each kind of step is failed here, or in the lab");
}

/// What a network of our own has.
#[derive(Clone, Copy, Debug)]
struct Network {
    taps: bool,
    vhost: bool,
}

impl Network {
    fn of_this_host() -> Network {
        let opens = |node: &str| {
            let mut command = Command::new("unshare");
            command.args(["-Urn", "sh", "-c", &format!(": <> {node}")]).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let taps = opens("/dev/net/tun");
        Network { taps, vhost: taps && opens("/dev/vhost-net") }
    }
}

/// Taps are made in a network of the owner's own, which must have no link more afterwards.
fn taps(network: Network, met: &mut BTreeSet<String>) {
    let stage = Stage::fake("").with_own_network();
    let output = stage.start(&[]);
    assert_eq!(output.code, 0, "{output}");
    let value = format!("tap=qtap0,queues=2,vhost={}", network.vhost);
    sweep_attach(&stage, &Victim::new("--nic", &value, "v"), met);
    stage.end();
}

mod soak {
    use super::*;

    #[test]
    fn plug_on_qemu_7_2() {
        real(QemuVersion::V7_2);
    }
}
