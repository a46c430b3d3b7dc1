//! Argument vectors, and what each way to fail becomes, with scripts in the client's place.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use super::*;

fn name(text: &str) -> LinkName {
    text.parse().expect("a good name")
}

/// A client whose `$*` is appended to a log, and which then does what `body` says.
struct Fake {
    folder: tempfile::TempDir,
    ovs: Ovs,
}

impl Fake {
    fn new(body: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = folder.path().join("ovs-vsctl");
        let log = folder.path().join("log");
        write_program(&program, &format!("#!/bin/sh\necho \"$*\" >>'{}'\n{body}\n", log.display()));
        let ovs = Ovs::with_program(program);
        Fake { folder, ovs }
    }

    fn log(&self) -> Vec<String> {
        let log: PathBuf = self.folder.path().join("log");
        fs::read_to_string(log).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

/// Writes a script through a child: were it open for writing here, another test's fork at that moment would keep it open
/// and the script could not be run ("text file busy").
fn write_program(path: &Path, text: &str) {
    let mut child = Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("a shell");
    child.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("the shell reads");
    assert!(child.wait().expect("the shell ends").success());
}

/// A database with the bridge `br-int`, and the port `tap0` with these external ids (JSON pairs).
fn with_port(ids: &str) -> String {
    format!(
        r#"case "$*" in
*br-exists\ br-int*) exit 0;;
*br-exists*) exit 2;;
*find*) echo '{{"data":[[["map",[{ids}]]]],"headings":["external_ids"]}}';;
*port-to-br*) echo br-other;;
esac"#
    )
}

/// The same without the port.
const WITHOUT_PORT: &str = r#"case "$*" in
*br-exists\ br-int*) exit 0;;
*br-exists*) exit 2;;
*find*) echo '{"data":[],"headings":["external_ids"]}';;
*port-to-br*) echo "ovs-vsctl: no port named tap0" >&2; exit 1;;"#;

fn port<'a>(bridge: &'a LinkName, port: &'a LinkName) -> NewPort<'a> {
    NewPort { bridge, port, tag: Some(42), vm: "web", external_ids: &[] }
}

#[test]
fn one_transaction_with_vlan_owner_and_ids() {
    let (bridge, tap) = (name("br-int"), name("tap0"));
    let ids = [("iface-id", "a,b=\"c\""), ("attached-mac", "52:54:00:00:00:01")];
    let arguments = add_arguments(&NewPort { external_ids: &ids, ..port(&bridge, &tap) });
    assert_eq!(
        arguments,
        [
            "--may-exist",
            "add-port",
            "br-int",
            "tap0",
            "--",
            "set",
            "Port",
            "tap0",
            "tag=42",
            "external_ids:\"qvirt-vm\"=\"web\"",
            "--",
            "set",
            "Interface",
            "tap0",
            "external_ids:\"iface-id\"=\"a,b=\\\"c\\\"\"",
            "external_ids:\"attached-mac\"=\"52:54:00:00:00:01\"",
        ]
    );
    let trunk = add_arguments(&NewPort { tag: None, ..port(&bridge, &tap) });
    assert_eq!(trunk[8..], ["tag=[]", "external_ids:\"qvirt-vm\"=\"web\""]);
}

#[test]
fn a_new_port_is_added_once_and_waited_for() {
    let fake = Fake::new(&format!("{WITHOUT_PORT}\nesac"));
    fake.ovs.add_port(&port(&name("br-int"), &name("tap0"))).expect("added");
    let log = fake.log();
    assert!(
        log.iter().all(|line| line.starts_with("--timeout=10 ") && !line.contains("--no-wait")),
        "{log:?}"
    );
    assert_eq!(log.iter().filter(|line| line.contains("add-port br-int tap0")).count(), 1, "{log:?}");
}

#[test]
fn tags_have_bounds_and_nothing_is_run() {
    let fake = Fake::new("exit 0");
    for tag in [0, 4095] {
        let (bridge, tap) = (name("br-int"), name("tap0"));
        let new = NewPort { tag: Some(tag), ..port(&bridge, &tap) };
        assert!(matches!(fake.ovs.add_port(&new), Err(OvsError::Tag { .. })));
    }
    assert!(fake.log().is_empty());
}

#[test]
fn a_foreign_port_is_refused_and_left() {
    for (ids, whose) in [("", "no VM of qvirt"), (r#"["qvirt-vm","db"]"#, "the VM db")] {
        let fake = Fake::new(&with_port(ids));
        let error = fake.ovs.add_port(&port(&name("br-int"), &name("tap0"))).expect_err("taken").to_string();
        assert!(error.contains(whose), "{error}");
        assert!(!fake.ovs.del_port(&name("tap0"), "web").expect("left alone"));
        assert!(!fake.log().iter().any(|line| line.contains("-port br") || line.contains("del-port")));
    }
}

#[test]
fn an_own_port_elsewhere_is_refused_and_an_own_port_is_removed() {
    let fake = Fake::new(&with_port(r#"["a","b"],["qvirt-vm","web"]"#));
    let error = fake.ovs.add_port(&port(&name("br-int"), &name("tap0"))).expect_err("elsewhere").to_string();
    assert!(error.contains("port tap0 is on the Open vSwitch bridge br-other, not on br-int"), "{error}");
    assert!(fake.ovs.del_port(&name("tap0"), "web").expect("removed"));
    assert_eq!(fake.log().last().map(String::as_str), Some("--timeout=10 --if-exists del-port tap0"));
}

#[test]
fn a_port_the_switch_cannot_open_is_taken_back() {
    let fake = Fake::new(&format!(
        "{WITHOUT_PORT}\n*add-port*) echo \"ovs-vsctl: Error detected while setting up 'tap0': could not open\" >&2;;\nesac"
    ));
    let error = fake.ovs.add_port(&port(&name("br-int"), &name("tap0"))).expect_err("unusable");
    assert!(matches!(error, OvsError::Unusable { .. }), "{error}");
    assert_eq!(
        fake.log().last().map(String::as_str),
        Some("--timeout=10 --no-wait --if-exists del-port tap0")
    );
}

#[test]
fn a_silent_switch_is_a_timeout_that_leaves_nothing() {
    let fake = Fake::new(&format!("{WITHOUT_PORT}\n*add-port*) kill -ALRM $$; sleep 5;;\nesac"));
    let error = fake.ovs.add_port(&port(&name("br-int"), &name("tap0"))).expect_err("silent");
    assert!(matches!(error, OvsError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("add the port tap0 to br-int"), "{error}");
    assert!(fake.log().last().is_some_and(|line| line.contains("del-port tap0")));
}

#[test]
fn a_missing_bridge_is_named() {
    let fake = Fake::new(&format!("{WITHOUT_PORT}\nesac"));
    let error =
        fake.ovs.add_port(&port(&name("qvirt-none"), &name("tap0"))).expect_err("no bridge").to_string();
    assert!(error.contains("there is no Open vSwitch bridge qvirt-none"), "{error}");
    assert_eq!(fake.ovs.bridge_of(&name("tap0")).expect("asked"), None);
}

#[test]
fn no_client_and_no_server_are_told_apart() {
    let missing =
        Ovs::with_program("/nonexistent/ovs-vsctl").bridge_exists(&name("br-int")).expect_err("missing");
    assert!(missing.to_string().contains("install Open vSwitch"), "{missing}");
    let down = "echo 'ovs-vsctl: unix:/run/db.sock: database connection failed (No such file or directory)' >&2; exit 1";
    let error = Fake::new(down).ovs.bridge_exists(&name("br-int")).expect_err("down");
    assert!(matches!(error, OvsError::NotRunning { .. }), "{error}");
    let odd =
        Fake::new("echo 'ovs-vsctl: odd' >&2; exit 1").ovs.bridge_exists(&name("br-int")).expect_err("odd");
    assert!(
        odd.to_string().contains("cannot look for the bridge br-int: ovs-vsctl says: ovs-vsctl: odd"),
        "{odd}"
    );
}
