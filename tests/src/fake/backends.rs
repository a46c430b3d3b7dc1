//! What stands behind a device: objects, block nodes, netdevs, chardevs and descriptors. Each is refused in the words of QEMU 10.0.2.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::pty::openpty;
use nix::unistd::ttyname;
use serde_json::{Value, json};

use super::Failure;
use super::machine::{Machine, Props, text};

type Done = Result<Value, Failure>;

/// A block node.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) props: Props,
    /// Role and name of each node below it.
    pub(super) children: Vec<(String, String)>,
    /// Bytes.
    pub(super) size: u64,
}

/// A character device, with whatever it holds open.
pub(super) struct Chardev {
    pub(super) filename: String,
    pub(super) kind: String,
    /// Open as long as it lives.
    _held: Vec<OwnedFd>,
}

impl Chardev {
    /// One that a monitor listens on; its descriptor is the monitor's.
    pub(super) fn of_monitor(filename: String) -> Chardev {
        Chardev { filename, kind: "monitor".to_owned(), _held: Vec::new() }
    }
}

fn done() -> Done {
    Ok(json!({}))
}

fn refuse<T>(desc: String) -> Result<T, Failure> {
    Err(Failure::generic(desc))
}

/// `id_wellformed` of QEMU.
fn wellformed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

impl Machine {
    pub(super) fn object_add(&mut self, props: &Props) -> Done {
        let id = text(props, "id");
        if !wellformed(id) {
            return refuse("Parameter 'id' expects an identifier".to_owned());
        }
        if self.objects.contains_key(id) {
            return refuse(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
        }
        self.objects.insert(id.to_owned(), props.clone());
        done()
    }

    pub(super) fn object_del(&mut self, id: &str) -> Done {
        match self.objects.remove(id) {
            Some(_) => done(),
            None => refuse(format!("object '{id}' not found")),
        }
    }

    fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    pub(super) fn blockdev_add(&mut self, props: &Props) -> Done {
        if text(props, "node-name").is_empty() {
            return refuse("'node-name' must be specified for the root node".to_owned());
        }
        let before = self.nodes.len();
        let added = self.open(props);
        if added.is_err() {
            self.nodes.truncate(before);
        }
        added.and_then(|_| done())
    }

    /// Opens a node and those written inside it; gives its name.
    fn open(&mut self, props: &Props) -> Result<String, Failure> {
        let mut name = text(props, "node-name").to_owned();
        if name.is_empty() {
            self.unnamed += 1;
            name = format!("#block{:03}", self.unnamed);
        } else if !wellformed(&name) {
            return refuse(format!("Invalid node-name: '{name}'"));
        } else if name.len() > 31 {
            return refuse("Node name too long".to_owned());
        } else if self.node(&name).is_some() {
            return refuse(format!("Duplicate nodes with node-name='{name}'"));
        }
        let mut size = self.opened_size(props)?;
        let mut children = Vec::new();
        for role in ["file", "backing"] {
            let child = match props.get(role) {
                Some(Value::String(child)) => child.clone(),
                Some(Value::Object(inner)) => self.open(inner)?,
                _ => continue,
            };
            let Some(node) = self.node(&child) else {
                return refuse(format!("Cannot find device='{child}' nor node-name='{child}'"));
            };
            if role == "file" {
                size = virtual_size(text(props, "driver"), node);
            }
            children.push((role.to_owned(), child));
        }
        self.nodes.push(Node { name: name.clone(), props: props.clone(), children, size });
        Ok(name)
    }

    /// The size of what a protocol driver opens; it must be there. 0 for a driver that opens nothing.
    fn opened_size(&self, props: &Props) -> Result<u64, Failure> {
        let filename = text(props, "filename");
        if !matches!(text(props, "driver"), "file" | "host_device" | "host_cdrom") {
            return Ok(props.get("size").and_then(Value::as_u64).unwrap_or(0));
        }
        if let Some(set) = filename.strip_prefix("/dev/fdset/") {
            let known = set.parse().is_ok_and(|set: u64| self.fdsets.contains_key(&set));
            return if known {
                Ok(0)
            } else {
                refuse(format!("Could not dup FD for {filename} flags 0: No such file or directory"))
            };
        }
        // Opened, not only looked at, so that a missing right shows.
        let opened = std::fs::File::open(filename).and_then(|file| file.metadata());
        opened.map(|meta| meta.len()).or_else(|error| {
            let why = error.raw_os_error().map(nix::errno::Errno::from_raw);
            refuse(format!("Could not open '{filename}': {}", why.map_or("failed", nix::errno::Errno::desc)))
        })
    }

    pub(super) fn blockdev_del(&mut self, name: &str) -> Done {
        if self.node(name).is_none() {
            return refuse(format!("Failed to find node with node-name='{name}'"));
        }
        if self.devices.iter().any(|device| text(&device.props, "drive") == name) {
            return refuse(format!("Node {name} is in use"));
        }
        let parent = self.nodes.iter().find_map(|node| {
            let (role, _) = node.children.iter().find(|(_, child)| child == name)?;
            Some((role.as_str(), node.name.clone()))
        });
        match parent {
            Some(("backing", parent)) => {
                refuse(format!("Node '{name}' is busy: node is used as backing hd of '{parent}'"))
            }
            Some(_) => refuse(format!("Block device {name} is in use")),
            None => {
                self.close(name);
                done()
            }
        }
    }

    /// Closes a node, and those that were written inside it.
    fn close(&mut self, name: &str) {
        let Some(index) = self.nodes.iter().position(|node| node.name == name) else { return };
        let node = self.nodes.remove(index);
        for (_, child) in node.children.iter().filter(|(_, child)| child.starts_with('#')) {
            self.close(child);
        }
    }

    pub(super) fn netdev_add(&mut self, monitor: &str, props: &Props) -> Done {
        let id = text(props, "id");
        if self.netdevs.contains_key(id) {
            return refuse(format!("Duplicate ID '{id}'"));
        }
        if text(props, "type") == "vhost-user" {
            let chardev = text(props, "chardev");
            match self.chardevs.get(chardev) {
                None => return refuse(format!("chardev \"{chardev}\" not found")),
                Some(found) if found.kind != "socket" => {
                    return refuse(format!("chardev \"{chardev}\" is not reconnectable"));
                }
                Some(_) => {}
            }
        }
        for member in ["fd", "fds", "vhostfd", "vhostfds"] {
            for name in text(props, member).split(':').filter(|name| !name.is_empty()) {
                let inherited = name.starts_with(|c: char| c.is_ascii_digit());
                // QEMU takes the names one by one: what came before a missing one is spent.
                if !inherited && self.fds.remove(&(monitor.to_owned(), name.to_owned())).is_none() {
                    return refuse(format!("File descriptor named '{name}' has not been found"));
                }
            }
        }
        self.netdevs.insert(id.to_owned(), props.clone());
        done()
    }

    /// A netdev goes at once, also from under its NIC, whose link then is down.
    pub(super) fn netdev_del(&mut self, id: &str) -> Done {
        match self.netdevs.remove(id) {
            Some(_) => done(),
            None => Err(Failure::absent(id)),
        }
    }

    fn chardev_in_use(&self, id: &str) -> bool {
        let used = |props: &Props| text(props, "chardev") == id;
        self.chardevs.get(id).is_some_and(|chardev| chardev.kind == "monitor")
            || self.devices.iter().any(|device| used(&device.props))
            || self.netdevs.values().any(used)
    }

    /// `chardev-add` and, with a backend of strings made by [`backend_of`], `-chardev`.
    pub(super) fn chardev_add(&mut self, id: &str, backend: &Value) -> Done {
        if self.chardevs.contains_key(id) {
            return refuse(format!("Chardev with id '{id}' already exists"));
        }
        let fail = |why: String| refuse(format!("Failed to add chardev '{id}': {why}"));
        let kind = backend["type"].as_str().unwrap_or("").to_owned();
        let data = &backend["data"];
        let mut held = Vec::new();
        let mut reply = json!({});
        let mut filename = kind.clone();
        if let Some(log) = data["logfile"].as_str()
            && let Err(error) = std::fs::OpenOptions::new().create(true).append(true).open(log)
        {
            return fail(format!("Unable to open logfile {log}: {error}"));
        }
        if kind == "pty" {
            let named = openpty(None, None).and_then(|pty| Ok((ttyname(&pty.slave)?, pty)));
            let (name, pty) = match named {
                Ok(named) => named,
                Err(error) => return fail(format!("Failed to create PTY: {error}")),
            };
            held.extend([pty.master, pty.slave]);
            reply = json!({"pty": name});
            filename = format!("pty:{}", name.display());
        } else if kind == "socket" {
            let path = data["addr"]["data"]["path"].as_str().unwrap_or("");
            let server = data["server"] != json!(false);
            let opened = if server {
                UnixListener::bind(path).map(OwnedFd::from).map_err(|error| ("bind socket", error))
            } else {
                UnixStream::connect(path).map(OwnedFd::from).map_err(|error| ("connect", error))
            };
            match opened {
                Ok(socket) => held.push(socket),
                Err((verb, error)) => {
                    let why = error.raw_os_error().map(nix::errno::Errno::from_raw);
                    let why = why.map_or("failed", nix::errno::Errno::desc);
                    return fail(format!("Failed to {verb} to '{path}': {why}"));
                }
            }
            filename = match server {
                true => format!("disconnected:unix:{path},server=on"),
                false => format!("unix:{path}"),
            };
        }
        self.chardevs.insert(id.to_owned(), Chardev { filename, kind, _held: held });
        Ok(reply)
    }

    pub(super) fn chardev_remove(&mut self, id: &str) -> Done {
        if self.chardev_in_use(id) {
            return refuse(format!("Chardev '{id}' is busy"));
        }
        match self.chardevs.remove(id) {
            Some(chardev) => {
                if let Some(path) = chardev.filename.strip_prefix("disconnected:unix:") {
                    // QEMU takes its listening socket along; it may be gone already.
                    let _ = std::fs::remove_file(Path::new(path.trim_end_matches(",server=on")));
                }
                done()
            }
            None => refuse(format!("Chardev '{id}' not found")),
        }
    }

    pub(super) fn getfd(&mut self, monitor: &str, name: &str, fd: Option<OwnedFd>) -> Done {
        let Some(fd) = fd else { return refuse("No file descriptor supplied via SCM_RIGHTS".to_owned()) };
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return refuse("Parameter 'fdname' expects a name not starting with a digit".to_owned());
        }
        self.fds.insert((monitor.to_owned(), name.to_owned()), fd);
        done()
    }

    pub(super) fn closefd(&mut self, monitor: &str, name: &str) -> Done {
        match self.fds.remove(&(monitor.to_owned(), name.to_owned())) {
            Some(_) => done(),
            None => refuse(format!("File descriptor named '{name}' not found")),
        }
    }

    pub(super) fn add_fd(&mut self, arguments: &Props, fd: Option<OwnedFd>) -> Done {
        let Some(fd) = fd else { return refuse("No file descriptor supplied via SCM_RIGHTS".to_owned()) };
        let free = || (0..).find(|set| !self.fdsets.contains_key(set)).unwrap_or(0);
        let set = match arguments.get("fdset-id").map(Value::as_u64) {
            Some(Some(set)) => set,
            Some(None) => return refuse("Parameter 'fdset-id' expects a non-negative value".to_owned()),
            None => free(),
        };
        let number = fd.as_raw_fd();
        let opaque = arguments.get("opaque").and_then(Value::as_str).map(str::to_owned);
        self.fdsets.entry(set).or_default().push((fd, opaque));
        Ok(json!({"fd": number, "fdset-id": set}))
    }

    pub(super) fn remove_fd(&mut self, arguments: &Props) -> Done {
        let set = arguments.get("fdset-id").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let fd = arguments.get("fd").and_then(Value::as_i64);
        let name = fd.map_or_else(|| format!("fdset-id:{set}"), |fd| format!("fdset-id:{set}, fd:{fd}"));
        let Some(fds) = self.fdsets.get_mut(&set) else {
            return refuse(format!("File descriptor named '{name}' not found"));
        };
        let before = fds.len();
        fds.retain(|(open, _)| fd.is_some_and(|fd| i64::from(open.as_raw_fd()) != fd));
        if fds.len() == before {
            return refuse(format!("File descriptor named '{name}' not found"));
        }
        if fds.is_empty() {
            self.fdsets.remove(&set);
        }
        done()
    }

    /// `query-fdsets`.
    pub(super) fn fdsets(&self) -> Value {
        let fd = |(fd, opaque): &(OwnedFd, Option<String>)| match opaque {
            Some(opaque) => json!({"fd": fd.as_raw_fd(), "opaque": opaque}),
            None => json!({"fd": fd.as_raw_fd()}),
        };
        let set = |(id, fds): (&u64, &Vec<_>)| json!({"fds": fds.iter().map(fd).collect::<Vec<_>>(), "fdset-id": id});
        self.fdsets.iter().map(set).collect()
    }

    /// `query-chardev`.
    pub(super) fn chardevs(&self) -> Value {
        let one = |(id, chardev): (&String, &Chardev)| {
            // A socket's frontend is open only while somebody is connected.
            let open = self.chardev_in_use(id) && !chardev.filename.starts_with("disconnected");
            json!({"frontend-open": open, "filename": chardev.filename, "label": id})
        };
        self.chardevs.iter().map(one).collect()
    }

    /// One element of `query-named-block-nodes`, and `inserted` of `query-block`.
    pub(super) fn node_info(&self, node: &Node) -> Value {
        let flag = |object: &Value, key: &str| object[key] == json!(true) || object[key] == json!("on");
        let cache = node.props.get("cache").cloned().unwrap_or_default();
        let mut file = node;
        while let Some((_, child)) = file.children.iter().find(|(role, _)| role == "file")
            && let Some(below) = self.node(child)
        {
            file = below;
        }
        let driver = text(&node.props, "driver");
        let filename = match text(&file.props, "filename") {
            "" => format!("json:{}", json!(file.props)),
            path => path.to_owned(),
        };
        let mut depth = 0;
        let mut top = node;
        while let Some((_, child)) = top.children.iter().find(|(role, _)| role == "backing")
            && let Some(below) = self.node(child)
        {
            (depth, top) = (depth + 1, below);
        }
        json!({
            "iops_rd": 0, "detect_zeroes": "off", "active": true,
            "image": {"virtual-size": node.size, "filename": filename, "format": driver, "actual-size": 0, "dirty-flag": false},
            "iops_wr": 0, "ro": flag(&json!(node.props), "read-only"), "node-name": node.name, "backing_file_depth": depth,
            "drv": driver, "iops": 0, "bps_wr": 0, "write_threshold": 0, "encrypted": false, "bps": 0, "bps_rd": 0,
            "cache": {"no-flush": flag(&cache, "no-flush"), "direct": flag(&cache, "direct"), "writeback": true},
            "file": filename,
        })
    }

    /// `query-named-block-nodes`, newest first as QEMU has it.
    pub(super) fn node_infos(&self) -> Value {
        self.nodes.iter().rev().map(|node| self.node_info(node)).collect()
    }

    /// The node of that name, as [`Machine::node_info`] has it.
    pub(super) fn info_of(&self, name: &str) -> Option<Value> {
        self.node(name).map(|node| self.node_info(node))
    }
}

/// The size that a format driver shows for what is below it.
fn virtual_size(driver: &str, below: &Node) -> u64 {
    let qcow2 = || {
        let mut size = [0; 8];
        // Bytes 24 to 31 of the header.
        std::fs::File::open(text(&below.props, "filename")).ok()?.read_exact_at(&mut size, 24).ok()?;
        Some(u64::from_be_bytes(size))
    };
    if driver == "qcow2" { qcow2().unwrap_or(0) } else { below.size }
}

/// A `-chardev` as the backend of `chardev-add`.
pub(super) fn backend_of(option: &Props) -> Value {
    let mut data = json!({});
    let kind = text(option, "backend");
    if kind == "socket" {
        data["addr"] = json!({"type": "unix", "data": {"path": text(option, "path")}});
        data["server"] = json!(text(option, "server") == "on");
    }
    if let Some(log) = option.get("logfile") {
        data["logfile"] = log.clone();
    }
    json!({"type": kind, "data": data})
}
