//! What the agent does beside running one command on a console.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::{BOOT, Guest, Inventory, PatternReport, PatternWish, SCRIPT};
use super::machine::{DEVICES, Machine, pty};
use crate::qemu::QemuVersion;

/// A channel to the agent, and a disk whose image the test has.
const CHANNEL: &[&str] = &[
    "-chardev",
    "socket,id=agent,path=agent.sock,server=on,wait=off",
    "-device",
    "virtserialport,bus=vs.0,id=port,chardev=agent,name=org.qvirt.agent",
    "-device",
    "pcie-root-port,id=rp5,chassis=5,addr=5.0",
    "-blockdev",
    "file,node-name=image,filename=image.raw",
    "-device",
    "virtio-blk-pci,id=disk1,drive=image,bus=rp5,serial=written",
];

/// A guest that is up, and its console.
fn booted(version: QemuVersion, append: &str, image: u64) -> (Machine, Guest) {
    let create = |folder: &Path| {
        let image_file = File::create(folder.join("image.raw")).expect("an image");
        image_file.set_len(image).expect("it grows");
    };
    let mut machine = Machine::start_in(version, append, &[DEVICES, CHANNEL].concat(), create);
    let console = pty(&mut machine, "uart");
    let mut guest = Guest::attach(&console).expect("the console opens");
    machine.command("cont", json!({}));
    guest.wait_ready(BOOT).expect("the guest boots");
    (machine, guest)
}

#[test]
fn guest_speaks_on_console_and_channel_to_one_peer_after_the_other() {
    let (mut machine, mut console) = booted(QemuVersion::V10_0, "", 1 << 20);
    let path = machine.folder.path().join("agent.sock");
    for peer in 1..=2 {
        let mut channel = Guest::attach(&path).expect("the channel opens");
        if peer == 1 {
            channel.wait_ready(SCRIPT).expect("the agent greets");
        }
        channel.wait_answer(SCRIPT).expect("the agent answers");
        assert_eq!(channel.check("echo over the channel").expect("a script"), "over the channel\n", "{peer}");
        // Neither line waits for the other.
        console.check("rm -f /tmp/pipe; mkfifo /tmp/pipe").expect("a script");
        let slow = channel.begin("read -r line </tmp/pipe; echo $line").expect("a script");
        console.check("echo hello >/tmp/pipe").expect("a script");
        assert_eq!(channel.finish(slow, SCRIPT).expect("it ends").stdout, "hello\n");
        assert_eq!(channel.inventory().expect("an inventory"), console.inventory().expect("the same"));
        // This one does not see its command's end, nor does the command end with it.
        let orphan = channel.begin(&format!("sleep 1; echo {peer} >>/tmp/orphans")).expect("a script");
        drop((channel, orphan));
    }
    console.check("until [ \"$(cat /tmp/orphans)\" = \"1\n2\" ]; do sleep 0.1; done").expect("both went on");

    // One that is plugged later is served as well.
    machine.command("device_del", json!({"id": "port"}));
    machine.wait_deleted("port");
    let port = json!({"driver": "virtserialport", "id": "port", "bus": "vs.0", "chardev": "agent", "name": "org.qvirt.agent"});
    machine.command("device_add", port);
    let mut channel = Guest::attach(&path).expect("the channel opens");
    channel.wait_ready(SCRIPT).expect("the agent greets on the port that came back");
    assert_eq!(channel.check("echo again").expect("a script"), "again\n");
}

#[test]
fn commands_run_at_once_stream_and_are_killed() {
    let (_machine, mut guest) = booted(QemuVersion::V7_2, "", 1 << 20);
    let mut hangs = guest.begin("echo up; sleep 100000 & sleep 100000").expect("a script");
    guest.wait_output(&mut hangs, "up\n", SCRIPT).expect("it runs");
    assert_eq!(guest.check("echo beside").expect("a script"), "beside\n");
    guest.kill(&hangs).expect("it is sent");
    assert_eq!(guest.finish(hangs, SCRIPT).expect("it was killed").status, 137);

    let error = guest
        .run_within("echo before; sleep 100000", Duration::from_secs(2))
        .expect_err("it hangs")
        .to_string();
    assert!(error.contains("sleep 100000") && error.contains(": before"), "{error}");
    // Its end is not awaited, but comes.
    guest.check("while pidof sleep; do usleep 50000; done").expect("the one that hung was killed");

    let (mut pieces, begin) = (Vec::new(), Instant::now());
    let script = "echo $WORD; read -r line </tmp/go; echo $line; exit 3";
    guest
        .check("mkfifo /tmp/go; (sleep 2; echo went >/tmp/go) >/dev/null 2>&1 &")
        .expect("a script in the background");
    let status = guest.run_streaming(
        "sh",
        &["-c", script],
        &[("WORD", "first words")],
        |piece| pieces.push((begin.elapsed(), String::from_utf8_lossy(piece).into_owned())),
        (SCRIPT, SCRIPT),
    );
    assert_eq!(status.expect("it ends"), 3);
    let said: Vec<&str> = pieces.iter().map(|(_, piece)| piece.as_str()).collect();
    assert_eq!(said, ["first words\n", "went\n"]);
    assert!(
        pieces[1].0 - pieces[0].0 > Duration::from_millis(500),
        "the first came when it was written: {pieces:?}"
    );
    let silent = (SCRIPT, Duration::from_secs(1));
    let silence = guest.run_streaming("sh", &["-c", "echo word; sleep 120"], &[], |_| {}, silent);
    assert!(silence.expect_err("it says nothing any more").reason().starts_with("waited 1s in vain for"));

    let megabyte = guest.run("head -c 1000000 /dev/zero | tr '\\0' x").expect("a script").stdout;
    assert!(megabyte.len() == 1_000_000 && megabyte.bytes().all(|byte| byte == b'x'), "{}", megabyte.len());
    let orphans = "for n in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 1; ps -o stat | grep -c ^Z";
    assert_eq!(guest.run(orphans).expect("a script").stdout, "0\n", "process 1 reaps orphans");
}

const DISK: &str = "/dev/vdb";

#[test]
fn a_pattern_tells_errors_pauses_and_what_hangs() {
    let (mut machine, mut guest) = booted(QemuVersion::V10_0, "", 8 << 20);
    let wish = PatternWish { mib: Some(1), ..PatternWish::default() };
    guest.pattern_start(DISK, wish).expect("a pattern");
    let error = guest.pattern_start(DISK, wish).expect_err("it runs already").to_string();
    assert!(error.contains("pattern stop"), "{error}");
    let report =
        guest.wait_pattern(DISK, "second generation", |report| report.generation > 1).expect("it runs");
    println!("{report:#?}");
    assert!(report.working && report.error_count == 0 && report.verified > 128, "{report:#?}");

    // One write in a second: each hangs for that long, and can be asked about.
    let throttle = |writes: u64| json!({"id": "/machine/peripheral/disk1/virtio-backend", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": writes});
    machine.command("block_set_io_throttle", throttle(1));
    let hangs = |report: &PatternReport| {
        report.outstanding.as_ref().is_some_and(|operation| report.now_us - operation.since_us > 300_000)
    };
    let report = guest.wait_pattern(DISK, "operation that hangs", hangs).expect("it is asked");
    machine.command("block_set_io_throttle", throttle(0));
    let later = guest
        .wait_pattern(DISK, "end of that", |later| later.writes > report.writes + 50)
        .expect("it goes on");
    assert!(later.longest_pause_us > 300_000 && later.error_count == 0, "{later:#?}");

    // A disk that fails, and is well again.
    let broken = json!({"driver": "blkdebug", "node-name": "broken",
        "image": {"driver": "null-co", "size": 8 << 20}, "inject-error": [{"event": "none", "errno": 5}]});
    machine.command("blockdev-add", broken);
    let drive = |node: &str| json!({"path": "/machine/peripheral/disk1", "property": "drive", "value": node});
    machine.command("qom-set", drive("broken"));
    guest.wait_pattern(DISK, "error", |report| report.error_count > 2).expect("it is asked");
    machine.command("qom-set", drive("image"));
    let report = guest.wait_pattern(DISK, "end of the outage", |report| report.working).expect("it goes on");
    assert!(report.outage_count == 1 && report.outages[0].ended_us.is_some(), "{report:#?}");
    assert_eq!((report.errors[0].errno, report.mismatch_count), (Some(5), 0));

    let last = guest.pattern_stop(DISK).expect("it stops");
    assert!(last.outstanding.is_none() && last.writes >= report.writes, "{last:#?}");
    let verdict = guest.pattern_verify(DISK).expect("a verdict");
    println!("{verdict:#?}");
    assert!(verdict.mismatch_count == 0 && verdict.verified == 256, "{verdict:#?}");
    let error = guest.pattern_report(DISK).expect_err("nothing runs").to_string();
    assert!(error.contains("no pattern runs on /dev/vdb"), "{error}");
    guest.check("printf x | dd of=/dev/vdb bs=1 seek=5000 conv=notrunc 2>/dev/null; sync").expect("a byte");
    assert_eq!(guest.pattern_verify(DISK).expect("a verdict").mismatches[0].offset, 4096);
}

#[test]
fn drivers_of_real_hardware_are_loaded_on_order() {
    let devices: Vec<&str> = "-chardev pty,id=uart -serial chardev:uart -netdev user,id=n -netdev user,id=m \
        -device e1000e,netdev=n,mac=52:54:00:00:00:01,addr=5.0 -device qemu-xhci,id=xhci,addr=6.0 -device usb-ehci,id=ehci,addr=7.0 \
        -blockdev null-co,node-name=a,size=1048576,read-zeroes=on -device nvme,serial=flash,drive=a,addr=8.0 \
        -blockdev null-co,node-name=b,size=2097152,read-zeroes=on -device usb-storage,bus=xhci.0,drive=b,serial=stick,port=2 \
        -blockdev null-co,node-name=c,size=4194304,read-zeroes=on -device usb-uas,bus=ehci.0,id=uas -device scsi-hd,bus=uas.0,drive=c \
        -device pcie-root-port,id=rp,chassis=1,addr=1.0 -device igb,bus=rp,netdev=m,mac=52:54:00:00:00:02"
        .split_whitespace()
        .collect();
    let mut machine = Machine::start(QemuVersion::V10_0, "qvirt.hardware=1", &devices);
    let console = pty(&mut machine, "uart");
    let mut guest = Guest::attach(&console).expect("the console opens");
    machine.command("cont", json!({}));
    guest.wait_ready(BOOT).expect("the guest boots");
    println!("ready after {:?}", machine.started.elapsed());
    let three = |seen: &Inventory| seen.disks().len() == 3 && seen.nics().len() == 2;
    let seen = guest.wait_inventory("three disks and two NICs", three).expect("they come");
    println!("{seen}");
    assert!(seen.find("disk", "serial=flash").is_some_and(|line| line.contains("nvme")));
    assert!(
        seen.find("nic", "52:54:00:00:00:01").is_some() && seen.find("nic", "52:54:00:00:00:02").is_some()
    );
    let stick = seen.find("usb", "serial=stick").expect("the stick");
    assert!(stick.contains(" 46f4:0001 ") && stick.contains(" at=0000:00:06.0"), "{stick}");
    for driver in ["e1000e", "igb", "nvme", "xhci_hcd", "ehci-pci"] {
        assert!(seen.find("pci", driver).is_some(), "{driver}");
    }
}
