//! `qvirt host`: what the lab host has, as qvirt tells it.

use serde_json::Value;
use tests::lab::host::pci::{FREE_PF, SHARED, USED_PF};
use tests::lab::host::usb::STICKS;
use tests::lab::{inside, step};
use tests::qemu::QemuVersion;
use tests::scene::QUIET;
use tests::vm::Vm;

fn shown(vm: &Vm, words: &[&str]) -> Value {
    print!("$ qvirt host {}\n{}", words.join(" "), vm.ok(&[&["host"], words].concat()));
    let text = vm.ok(&[&["host"], words, &["--json"]].concat());
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn devices_functions_and_groups_are_listed() {
    inside(|| {
        let vm = Vm::new(QemuVersion::V10_0, QUIET, 1, "");
        let (free, used) = (FREE_PF.function().expect("a PF"), USED_PF.function().expect("another"));
        step("devices", || {
            let devices = shown(&vm, &["pci", "--class", "net"]);
            let of = |bdf: &str| {
                let found = devices.as_array().into_iter().flatten().find(|device| device["bdf"] == bdf);
                found.unwrap_or_else(|| panic!("no {bdf} in {devices:#}")).clone()
            };
            let pf = of(&free.to_string());
            let vfs: Vec<String> = free.vfs().iter().map(ToString::to_string).collect();
            assert_eq!(
                (&pf["vfs"], &pf["vfs_max"], &pf["driver"]),
                (&serde_json::json!(vfs), &7.into(), &"igb".into())
            );
            assert_eq!((&pf["vendor"], &pf["device"]), (&"8086".into(), &"10c9".into()));
            assert_eq!(pf["netdevs"][0].as_str(), free.netdev().as_deref());
            for vf in free.vfs() {
                let seen = of(&vf.to_string());
                assert_eq!((&seen["pf"], &seen["driver"]), (&free.to_string().into(), &Value::Null));
                assert_eq!(seen["iommu_group"].to_string(), vf.group().expect("a group"));
            }
            let only = shown(&vm, &["pci", "--vfs"]);
            assert_eq!(only.as_array().map(Vec::len), Some(free.vfs().len() + used.vfs().len()));
        });
        step("groups", || {
            let groups = shown(&vm, &["iommu"]);
            let of = |number: &str| {
                let found = groups
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(|group| group["number"].as_u64() == number.parse().ok());
                found.unwrap_or_else(|| panic!("no group {number} in {groups:#}")).clone()
            };
            let lone = of(&free.vfs()[0].group().expect("a group"));
            assert_eq!(
                (&lone["assignable"], lone["members"].as_array().map(Vec::len)),
                (&true.into(), Some(1))
            );
            let held = of(&used.vfs()[0].group().expect("a group"));
            assert_eq!(
                (&held["assignable"], &held["in_the_way"][0]["driver"]),
                (&false.into(), &"igbvf".into())
            );
            let shared = SHARED.functions();
            let both = of(&shared[0].group().expect("a group"));
            let in_the_way: Vec<&str> = both["in_the_way"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|way| way["bdf"].as_str())
                .collect();
            assert_eq!(in_the_way, shared.iter().map(ToString::to_string).collect::<Vec<_>>());
        });
        let output = vm.qvirt(&["host", "iommu", "4711"]);
        assert!(output.code == 5 && output.stderr.contains("there is no IOMMU group 4711"), "{output}");
        let output = vm.qvirt(&["host", "pci", "--class", "toaster"]);
        assert!(output.code == 2 && output.stderr.contains("accelerator"), "{output}");
    });
}

/// Ends a program that runs for ever, also when the test fails.
struct Follower(std::process::Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn usb_devices_are_listed_and_followed() {
    inside(|| {
        let vm = Vm::new(QemuVersion::V10_0, QUIET, 1, "");
        let devices = shown(&vm, &["usb"]);
        let of = |serial: &str| {
            let found = devices.as_array().into_iter().flatten().find(|device| device["serial"] == serial);
            found.unwrap_or_else(|| panic!("no {serial} in {devices:#}")).clone()
        };
        for stick in STICKS {
            let (seen, place) = (of(stick.serial), stick.place().expect("it is plugged in"));
            let expected = serde_json::json!([place.bus, place.address, place.port, "480"]);
            assert_eq!(
                serde_json::json!([seen["bus"], seen["device"], seen["port"], seen["speed"]]),
                expected
            );
            assert_eq!(seen["vendor"], format!("{:04x}", stick.vendor));
        }
        let [_, blue, ..] = STICKS;
        let file = vm.path("followed");
        let out = std::fs::File::create(&file).expect("made");
        let mut command = vm.command(&["host", "usb", "--follow", "--json"]);
        let _follower = Follower(command.stdout(out).spawn().expect("qvirt starts"));
        let followed = || std::fs::read_to_string(&file).unwrap_or_default();
        // The list comes first, once it listens.
        vm.wait_for("the list", || followed().contains("\n]\n"));
        for event in ["unplugged", "plugged"] {
            let done = if event == "plugged" { blue.plug() } else { blue.unplug() };
            done.expect("the stick obeys");
            let line = |text: &str| {
                let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
                lines.any(|line| line["event"] == event && line["device"]["serial"] == blue.serial)
            };
            vm.wait_for(&format!("word that it was {event}"), || line(&followed()));
        }
        print!("{}", followed());
    });
}
