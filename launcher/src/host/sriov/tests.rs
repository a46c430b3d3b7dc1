//! On a tree like sysfs: accelerators, which no lab has.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

/// An HPRE with one virtual function, as the kernel shows it.
fn hpre(root: &Path) {
    let pf = root.join("bus/pci/devices/0000:79:00.0");
    let vf = root.join("bus/pci/devices/0000:79:00.1");
    for (folder, device) in [(&pf, "0xa258"), (&vf, "0xa259")] {
        fs::create_dir_all(folder.join("uacce/hisi_hpre-0")).expect("a folder");
        for (name, text) in [("class", "0x100000"), ("vendor", "0x19e5"), ("device", device)] {
            fs::write(folder.join(name), text).expect("a file");
        }
    }
    fs::write(pf.join("sriov_totalvfs"), "65\n").expect("a file");
    fs::write(pf.join("sriov_numvfs"), "1\n").expect("a file");
    symlink("../0000:79:00.1", pf.join("virtfn0")).expect("a link");
    symlink("../0000:79:00.0", vf.join("physfn")).expect("a link");
    let class = root.join("class/uacce/hisi_hpre-0");
    fs::create_dir_all(&class).expect("a folder");
    symlink("../../../bus/pci/devices/0000:79:00.0", class.join("device")).expect("a link");
}

#[test]
fn an_accelerator_has_63_at_most_and_none_is_taken_from_its_user() {
    let temp = tempfile::tempdir().expect("a folder");
    hpre(temp.path());
    let sysfs = Sysfs::below(temp.path());
    let pf = sysfs.pf("hisi_hpre-0").expect("by its name");
    assert_eq!(pf, sysfs.pf("0000:79:00.0").expect("by its address"));
    assert!(
        sysfs.pf("0000:79:00.1").is_err_and(|e| e.to_string().contains("no physical function 0000:79:00.1"))
    );
    let nobody = Users::of_leases(BTreeMap::new());
    let error = sysfs.set_vfs(&pf, 64, &nobody, &mut Steps::of("host")).expect_err("too many").to_string();
    assert!(error.contains("63 virtual functions at most"), "{error}");
    let holders = BTreeMap::from([("0000:79:00.1".to_owned(), "VM web as hpre0".to_owned())]);
    let error = sysfs
        .set_vfs(&pf, 0, &Users::of_leases(holders), &mut Steps::of("host"))
        .expect_err("in use")
        .to_string();
    assert!(error.contains("0000:79:00.1 of 0000:79:00.0 is used by VM web as hpre0"), "{error}");
    let number = || fs::read_to_string(temp.path().join("bus/pci/devices/0000:79:00.0/sriov_numvfs"));
    assert_eq!(number().expect("a file").trim(), "1", "nothing was written");
    sysfs.set_vfs(&pf, 63, &nobody, &mut Steps::of("host")).expect("as many as there may be");
    assert_eq!(number().expect("a file"), "63");
}
