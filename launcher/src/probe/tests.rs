//! Probing stand-ins for QEMU: shell scripts that are given QEMU's arguments. Real QEMUs are asked in the
//! crate `tests`.

use super::*;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// Speaks enough QMP, and knows two drivers.
const FAKE: &str = r#"#!/bin/bash
echo "$*" >> "$(dirname "$0")/runs"
[[ "$*" =~ fd=([0-9]+) ]]; fd=${BASH_REMATCH[1]}
echo '{"QMP":{"version":{"qemu":{"major":9,"minor":8,"micro":7},"package":"fake"},"capabilities":[]}}' >&$fd
while read -r -u $fd line; do
    [[ $line =~ \"id\":([^,}]+) ]]; id=${BASH_REMATCH[1]}
    answer='"return":{}'
    case $line in
    *query-version*) answer='"return":{"qemu":{"major":9,"minor":8,"micro":7},"package":"fake"}' ;;
    *query-qmp-schema*) answer='"return":[{"name":"cont","meta-type":"command","arg-type":"0","ret-type":"0"}]' ;;
    *qom-list-types*) answer='"return":[{"name":"iothread","parent":"object"}]' ;;
    *query-machines*) answer='"return":[]' ;;
    *virtio-blk-pci*|*scsi-hd*) answer='"return":[{"name":"drive","type":"str"}]' ;;
    *device-list-properties*) answer='"error":{"class":"DeviceNotFound","desc":"not found"}' ;;
    *quit*) exit 0 ;;
    esac
    echo "{$answer,\"id\":$id}" >&$fd
done
"#;

struct Fake {
    temp: tempfile::TempDir,
}

impl Fake {
    fn new(script: &str) -> Fake {
        let fake = Fake { temp: tempfile::tempdir().expect("a folder") };
        let source = fake.temp.path().join("source");
        fs::write(&source, script).expect("written");
        fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).expect("ours");
        // A file that this process had open for writing could be "busy" when it is executed, because a test
        // beside this one forked with the descriptor; another process writes it instead.
        let copied = Command::new("cp").arg("-p").arg(&source).arg(fake.binary()).status().expect("cp");
        assert!(copied.success());
        fake
    }

    fn binary(&self) -> PathBuf {
        self.temp.path().join("qemu-fake")
    }

    fn cache(&self) -> PathBuf {
        self.temp.path().join("cache")
    }

    fn cached(&self) -> Vec<PathBuf> {
        fs::read_dir(self.cache()).expect("a folder").map(|entry| entry.expect("an entry").path()).collect()
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.temp.path().join("runs")).unwrap_or_default().lines().count()
    }

    async fn probe(&self) -> Result<Capabilities, ProbeError> {
        probe(&self.binary(), &self.cache()).await
    }
}

#[tokio::test]
async fn a_binary_is_asked_once_until_it_changes() {
    let fake = Fake::new(FAKE);
    let first = fake.probe().await.expect("it answers");
    assert!(first.commands.contains("cont") && first.objects.contains("iothread"));
    assert_eq!(
        first.devices.keys().collect::<Vec<_>>(),
        ["scsi-hd", "virtio-blk-pci"],
        "absent drivers are no error"
    );
    assert_eq!(fake.probe().await.expect("cached"), first);
    assert_eq!((fake.runs(), fake.cached().len()), (1, 1));

    let link = fake.temp.path().join("link");
    std::os::unix::fs::symlink(fake.binary(), &link).expect("linked");
    probe(&link, &fake.cache()).await.expect("cached under its real path");
    assert_eq!(fake.runs(), 1);

    let touched =
        Command::new("touch").args(["-d", "2020-01-01"]).arg(fake.binary()).status().expect("touch");
    assert!(touched.success());
    assert_eq!(fake.probe().await.expect("it answers"), first);
    assert_eq!((fake.runs(), fake.cached().len()), (2, 1), "asked anew, in the same file");
}

#[tokio::test]
async fn a_bad_cache_costs_one_more_run_and_no_more() {
    let fake = Fake::new(FAKE);
    let first = fake.probe().await.expect("it answers");
    let text = fs::read_to_string(&fake.cached()[0]).expect("read");
    for (runs, bad) in [(2, "{\"format\":1"), (3, ""), (4, &text.replacen("\"format\":1", "\"format\":2", 1))]
    {
        fs::write(&fake.cached()[0], bad).expect("written");
        assert_eq!(fake.probe().await.expect("it answers"), first);
        assert_eq!(fake.probe().await.expect("cached"), first);
        assert_eq!(fake.runs(), runs, "{bad}");
    }
    fs::remove_dir_all(fake.cache()).expect("ours");
    fs::write(fake.cache(), "no folder").expect("written");
    for runs in [5, 6] {
        assert_eq!(fake.probe().await.expect("it answers"), first);
        assert_eq!(fake.runs(), runs, "a cache that cannot be written is no error");
    }
}

#[tokio::test]
async fn what_is_no_qemu_is_quoted() {
    let fake = Fake::new("#!/bin/sh\necho 'qemu: bad option -M' >&2\nexit 3\n");
    let error = fake.probe().await.expect_err("no QMP").to_string();
    for part in ["qemu-fake", "exited with status 3", "qemu: bad option -M"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(!fake.cache().exists(), "a failure is not cached");
    let missing =
        probe(Path::new("/nonexistent/qemu"), &fake.cache()).await.expect_err("missing").to_string();
    assert!(missing.contains("apt-get install"), "{missing}");
}

#[tokio::test]
async fn one_that_dies_while_it_is_asked_says_so() {
    let fake =
        Fake::new(&FAKE.replace(
            "*query-machines*)",
            "*query-machines*) echo 'qemu: dying' >&2; kill -ABRT $$ ;;\n*none*)",
        ));
    let error = fake.probe().await.expect_err("it died").to_string();
    for part in ["query-machines", "SIGABRT", "qemu: dying"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[tokio::test]
async fn one_that_is_silent_is_killed() {
    let fake = Fake::new("#!/bin/sh\necho $$ > \"$(dirname \"$0\")/pid\"\nexec sleep 60\n");
    let error = ask(&fake.binary(), Duration::from_secs(1)).await.expect_err("silent");
    assert!(matches!(error, ProbeError::Slow { .. }), "{error}");
    let pid = fs::read_to_string(fake.temp.path().join("pid")).expect("it ran");
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "killed and reaped");
}
