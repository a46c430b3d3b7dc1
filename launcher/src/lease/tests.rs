//! Leases in a folder of the test's own.

use super::*;
use crate::folders::VmFiles;
use crate::journal::Journal;
use crate::locks::OfdLock;

struct Host {
    temp: tempfile::TempDir,
    leases: Leases,
}

const DISK: LeaseKey = LeaseKey::Image { dev: 0xfe00, ino: 17 };

impl Host {
    fn new() -> Host {
        let temp = tempfile::tempdir().expect("a folder");
        let dir = temp.path().join("leases");
        fs::create_dir(&dir).expect("made");
        Host { leases: Leases::open(&dir).expect("proc"), temp }
    }

    fn vm(&self, vm: &str) -> VmName {
        let vm: VmName = vm.parse().expect("a good name");
        fs::create_dir_all(self.run_dir(&vm)).expect("made");
        vm
    }

    fn run_dir(&self, vm: &VmName) -> PathBuf {
        self.temp.path().join("run").join(vm.as_str())
    }

    fn holder(&self, vm: &str, device: &str) -> Holder {
        let vm = self.vm(vm);
        Holder::new(&vm, &self.run_dir(&vm), device, "/srv/web.qcow2")
    }

    fn take(&self, mode: Mode, vm: &str, device: &str, others: Staleness) -> Result<(), LeaseError> {
        self.leases.acquire(&DISK, mode, self.holder(vm, device), |_| others)
    }

    fn who(&self) -> Vec<String> {
        let all = self.leases.leases(|_| true).expect("read");
        all.into_iter()
            .flat_map(|(_, lease)| lease.holders)
            .map(|h| format!("{}/{}", h.holder.vm, h.holder.device))
            .collect()
    }

    fn files(&self) -> usize {
        let names = fs::read_dir(&self.leases.dir).expect("read").map(|e| e.expect("an entry").file_name());
        names.filter(|name| name != ".lock").count()
    }
}

#[test]
fn one_exclusive_holder_who_is_named() {
    let host = Host::new();
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("free");
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("the same device again");
    let message = |state| host.take(Mode::Shared, "db", "data", state).expect_err("held").to_string();
    let live = message(Staleness::Live);
    for part in
        ["/srv/web.qcow2", "device sys", "VM web", &host.holder("web", "sys").user(), "detach it there"]
    {
        assert!(live.contains(part), "{part} in {live}");
    }
    assert!(message(Staleness::NeedsRecovery).contains("`qvirt recover web`"));
    assert!(message(Staleness::Unknown).contains("ask "));
    assert!(
        host.take(Mode::Exclusive, "web", "sys2", Staleness::Live).is_err(),
        "another device of the same VM"
    );
    assert_eq!(host.who(), ["web/sys"]);

    host.take(Mode::Exclusive, "db", "data", Staleness::Stale).expect("replaced");
    assert_eq!(host.who(), ["db/data"]);
}

#[test]
fn sharers_share_and_exclude_a_writer() {
    let host = Host::new();
    for vm in ["a", "b", "c"] {
        host.take(Mode::Shared, vm, "cd", Staleness::Live).expect("shared");
    }
    assert!(host.take(Mode::Exclusive, "d", "cd", Staleness::Live).is_err());
    assert!(host.take(Mode::Exclusive, "a", "cd", Staleness::Live).is_err(), "no upgrade past the others");
    assert_eq!(host.who(), ["a/cd", "b/cd", "c/cd"], "a refusal changes nothing");
    host.leases.release(&DISK, &host.vm("b"), "cd").expect("released");
    host.leases.release(&DISK, &host.vm("b"), "cd").expect("not having it is no error");
    assert_eq!(host.who(), ["a/cd", "c/cd"]);
}

#[test]
fn a_vm_gives_back_one_or_all_and_no_file_stays() {
    let host = Host::new();
    let keys = [
        DISK,
        LeaseKey::Usb { bus: 1, port: "1.4".into() },
        LeaseKey::Usb { bus: 1, port: "1".into() },
        LeaseKey::Pci { address: "0000:04:10.1".into() },
        LeaseKey::IommuGroup { number: 4 },
        LeaseKey::Vdpa { name: "../a b".into() },
    ];
    for key in &keys {
        host.leases.acquire(key, Mode::Exclusive, host.holder("web", "d"), look).expect("free");
    }
    host.take(Mode::Exclusive, "db", "data", Staleness::Stale).expect("replaced");
    assert_eq!(host.files(), keys.len(), "one file each, all in the folder");
    let (web, run_dir) = (host.vm("web"), host.run_dir(&host.vm("web")));
    let held = host.leases.held_by(&web, &run_dir).expect("read");
    assert_eq!(held.len(), keys.len() - 1);
    assert!(held.iter().all(|(key, mode, holder)| keys[1..].contains(key)
        && *mode == Mode::Exclusive
        && holder.device == "d"));
    host.leases.release_all(&web, Path::new("/another/web")).expect("nothing to do");
    assert_eq!(host.files(), keys.len());
    host.leases.release_all(&web, &run_dir).expect("released");
    assert_eq!(host.who(), ["db/data"]);
    host.leases.release(&DISK, &host.vm("db"), "data").expect("released");
    assert_eq!(host.files(), 0);
}

#[test]
fn locks_and_journal_tell_who_lives() {
    let host = Host::new();
    let holder = host.holder("web", "sys");
    let dir = holder.run_dir.clone();
    assert_eq!(look(&holder), Staleness::Stale);
    for name in ["life", "owner"] {
        let lock = OfdLock::try_acquire(&dir.join(name)).expect("usable").expect("free");
        assert_eq!(look(&holder), Staleness::Live, "{name}");
        drop(lock);
        // A child that another test forks may have the descriptor for a moment.
        let end = Instant::now() + Duration::from_secs(5);
        while look(&holder) == Staleness::Live && Instant::now() < end {
            std::thread::yield_now();
        }
    }
    let (mut journal, _) = Journal::<String>::open(&dir.join("journal"), &holder.vm).expect("opens");
    assert_eq!(look(&holder), Staleness::Stale, "an empty journal");
    journal.append(&"a step".to_owned()).expect("added");
    assert_eq!(look(&holder), Staleness::NeedsRecovery);
    fs::write(dir.join("journal"), "damaged\n").expect("written");
    assert_eq!(look(&holder), Staleness::NeedsRecovery);
    fs::remove_dir_all(&dir).expect("ours");
    assert_eq!(look(&holder), Staleness::Stale, "the folder is gone");
}

#[test]
fn the_names_looked_for_are_those_of_the_vms_files() {
    let host = Host::new();
    let root = host.temp.path().as_os_str().to_owned();
    let folders =
        crate::folders::Folders::from_env(false, |name| (name == "QVIRT_ROOT").then(|| root.clone()));
    let files: VmFiles = folders.expect("a root").vm(&host.vm("web")).expect("short");
    let _lock = {
        files.make().expect("made");
        OfdLock::try_acquire(&files.owner()).expect("usable").expect("free")
    };
    assert_eq!(look(&Holder::new(&host.vm("web"), files.dir(), "d", "p")), Staleness::Live);
}

#[test]
fn another_boots_lease_counts_for_nothing() {
    let host = Host::new();
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("free");
    let path = host.leases.own_file(&DISK);
    let text = fs::read_to_string(&path).expect("read");
    let boot = BootId::current().expect("proc").to_string();
    fs::write(&path, text.replace(&boot, "another")).expect("written");
    assert!(host.who().is_empty());
    host.take(Mode::Exclusive, "db", "data", Staleness::Live).expect("free again");
    assert_eq!(host.who(), ["db/data"]);
}

#[test]
fn another_users_file_is_obeyed_and_left_alone() {
    let host = Host::new();
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("free");
    let theirs = host.leases.dir.join(format!("{}4294967294.json", DISK.file_prefix()));
    fs::rename(host.leases.own_file(&DISK), &theirs).expect("renamed");
    assert!(host.take(Mode::Exclusive, "db", "data", Staleness::Unknown).is_err());
    host.leases.release_all(&host.vm("web"), &host.run_dir(&host.vm("web"))).expect("not ours");
    assert!(theirs.exists());
    host.take(Mode::Exclusive, "db", "data", Staleness::Stale).expect("passed over");
    assert!(theirs.exists() && host.files() == 2);
}

#[test]
fn a_damaged_or_newer_file_is_named_with_the_way_out() {
    let host = Host::new();
    let path = host.leases.own_file(&DISK);
    let error = |text: &str| {
        fs::write(&path, text).expect("written");
        host.take(Mode::Exclusive, "db", "data", Staleness::Live).expect_err("unreadable").to_string()
    };
    let corrupt = error("{\"format\":1,\"boot\":");
    assert!(corrupt.contains(path.to_str().expect("utf-8")) && corrupt.contains("rm "), "{corrupt}");
    let boot = BootId::current().expect("proc");
    assert!(error(&format!("{{\"format\":2,\"boot\":\"{boot}\"}}")).contains("format 2"));
    let relative = Holder { run_dir: "run/web".into(), ..host.holder("web", "sys") };
    assert!(host.leases.acquire(&DISK, Mode::Shared, relative, look).is_err());
}

#[test]
fn two_at_once_cannot_both_have_it() {
    let host = Host::new();
    for _ in 0..20 {
        let got = std::thread::scope(|scope| {
            let one = |vm: &'static str| {
                let host = &host;
                scope.spawn(move || host.take(Mode::Exclusive, vm, "d", Staleness::Live).is_ok())
            };
            let all = ["a", "b", "c", "d"].map(one);
            all.into_iter().map(|thread| thread.join().expect("no panic")).filter(|got| *got).count()
        });
        assert_eq!(got, 1);
        for vm in ["a", "b", "c", "d"] {
            host.leases.release(&DISK, &host.vm(vm), "d").expect("released");
        }
    }
}

#[test]
fn an_image_is_its_inode_whatever_its_path() {
    let host = Host::new();
    let (one, two) = (host.temp.path().join("one"), host.temp.path().join("two"));
    fs::write(&one, "").expect("written");
    fs::hard_link(&one, &two).expect("linked");
    assert_eq!(LeaseKey::image(&one).expect("there"), LeaseKey::image(&two).expect("there"));
    assert!(LeaseKey::image(&host.temp.path().join("none")).is_err());
}

/// Found by killing owners at random: a SIGKILL in the middle of a write left the new file beside the old one for good.
#[test]
fn what_a_killed_writer_left_is_swept_away() {
    let host = Host::new();
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("free");
    fs::write(host.leases.dir.join(".new-torn"), b"{").expect("written");
    host.take(Mode::Exclusive, "web", "sys", Staleness::Live).expect("its own");
    assert_eq!((host.who(), host.files()), (vec!["web/sys".to_owned()], 1));
}
