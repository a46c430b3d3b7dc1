//! Profiles that others changed too, and accelerators, which no lab has. Real functions are used in the lab.

use std::fs;

use devices::vf::Rate;

use super::*;

#[test]
fn settings_that_somebody_else_changed_stay() {
    let before = VfProfile { vlan: 1, spoofchk: Some(true), ..VfProfile::default() };
    let wanted = VfProfile { vlan: 7, spoofchk: Some(false), rate_max: Rate::mbits(100), ..before.clone() };
    let now = VfProfile { vlan: 9, ..wanted.clone() };
    assert_eq!(restored(&before, &wanted, &now), VfProfile { vlan: 9, ..before.clone() });
    assert_eq!(restored(&before, &wanted, &wanted), before);
}

#[test]
fn an_accelerator_is_known_by_its_ids_and_by_the_kernels_word() {
    let temp = tempfile::tempdir().expect("a folder");
    let host: HostBdf = "0000:04:10.1".parse().expect("an address");
    let folder = temp.path().join("bus/pci/devices/0000:04:10.1");
    fs::create_dir_all(&folder).expect("a folder");
    let config: DeviceConfig =
        serde_json::from_value(serde_json::json!({"vfio": {"host": "0000:04:10.1"}})).expect("a config");
    let seen = |vendor: &str, device: &str| {
        for (name, text) in [("class", "0x100000"), ("vendor", vendor), ("device", device)] {
            fs::write(folder.join(name), text).expect("a file");
        }
        let all = functions(&Sysfs::below(temp.path()), [&config]).expect("a list");
        all[&host].is_accelerator()
    };
    assert!(!seen("0x8086", "0x10ca"));
    for device in ["0xa258", "0xa259", "0xa255", "0xa256", "0xa250", "0xa251"] {
        assert!(seen("0x19e5", device), "{device}");
    }
    fs::create_dir_all(folder.join("uacce/hisi_hpre-0")).expect("a folder");
    assert!(seen("0x1af4", "0x0001"));
}
