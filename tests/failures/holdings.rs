//! All that a VM has: in QEMU, on the host, and in qvirt's books. Two of them are compared, before and after something that failed.

use std::collections::BTreeMap;

use launcher::record::{Entry, Memory};
use serde_json::{Value, json};
use tests::vm::Vm;

/// Names of all things, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings(pub BTreeMap<&'static str, Vec<String>>);

impl Holdings {
    /// What qvirt's books and the host's folders say: devices, seats, journal, leases, files.
    pub fn of_books(vm: &Vm) -> Holdings {
        let mut all = BTreeMap::new();
        let status = vm.status();
        let list = |key: &str| status[key].as_array().cloned().unwrap_or_default();
        // The pty of a console and the capacity of a disk are known a moment after the device.
        let at_once = |mut device: Value| {
            device["pty"].take();
            device["size_bytes"].take();
            device.to_string()
        };
        all.insert("devices", list("devices").into_iter().map(at_once).collect());
        all.insert("foreign", list("foreign").iter().map(ToString::to_string).collect());
        all.insert("seats", list("seats").iter().map(ToString::to_string).collect());
        let run = vm.root().join("run/guest");
        all.insert("files", names(&run));
        let leases = vm.root().join("leases");
        let content = |name: &String| std::fs::read_to_string(leases.join(name)).unwrap_or_default();
        // The time at which a lease was taken is no part of what is held.
        let leases = names(&leases).iter().flat_map(|name| holders(&content(name))).collect();
        all.insert("leases", leases);
        all.insert("proxies", vm.proxies().into_iter().map(|(_, arguments)| arguments).collect());
        let entries =
            launcher::journal::read_only::<Entry>(&run.join("journal")).expect("the journal is readable");
        let memory = Memory::of(entries.map(|(_, entries)| entries).unwrap_or_default());
        all.insert(
            "journal",
            memory.devices.iter().map(|(device, stage)| format!("{} {stage:?}", device.id)).collect(),
        );
        Holdings(all)
    }

    /// The same, and what a real QEMU says of itself.
    pub fn of_real(vm: &Vm) -> Holdings {
        let Holdings(mut all) = Holdings::of_books(vm);
        let mut ask = |what: &'static str, command: &str, arguments: Value, key: &str| {
            let reply = vm.qmp(command, &arguments);
            let mut names: Vec<String> =
                reply.as_array().into_iter().flatten().map(|one| one[key].to_string()).collect();
            names.sort();
            all.insert(what, names);
        };
        ask("nodes", "query-named-block-nodes", json!({"flat": true}), "node-name");
        ask("chardevs", "query-chardev", json!({}), "label");
        ask("fdsets", "query-fdsets", json!({}), "fdset-id");
        ask("objects", "qom-list", json!({"path": "/objects"}), "name");
        ask("peripherals", "qom-list", json!({"path": "/machine/peripheral"}), "name");
        let network = vm.qmp("human-monitor-command", &json!({"command-line": "info network"}));
        all.insert("netdevs", network.as_str().unwrap_or_default().lines().map(str::to_owned).collect());
        // Names of `getfd` cannot be listed, and an image that is still open has no node any more: both are open files.
        all.insert("open", open_files(vm));
        Holdings(all)
    }
}

fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn holders(lease: &str) -> Vec<String> {
    let lease: Value = serde_json::from_str(lease).unwrap_or_default();
    let holders = lease["holders"].as_array().cloned().unwrap_or_default();
    holders
        .iter()
        .map(|holder| format!("{} {} {}", holder["mode"], holder["device"], holder["path"]))
        .collect()
}

/// The files, sockets and terminals that QEMU has open; sockets by their count, as their numbers tell nothing.
fn open_files(vm: &Vm) -> Vec<String> {
    let all = std::fs::read_dir(format!("/proc/{}/fd", vm.qemu_pid())).expect("QEMU runs").flatten();
    let targets =
        all.filter_map(|fd| std::fs::read_link(fd.path()).ok()).map(|target| target.display().to_string());
    let mut files: Vec<String> =
        targets.map(|target| target.split(":[").next().unwrap_or_default().to_owned()).collect();
    files.sort();
    files
}
