//! Ports of Open vSwitch bridges, through OVSDB's own client `ovs-vsctl`.
//!
//! Owns its argument vectors, run directly and never through a shell, and the translation of its failures. Does not make
//! taps ([`super::tap`]) and keeps no connection: each call is one run of at most ten seconds, with this process's
//! environment (`OVS_RUNDIR` and friends). The port's record outlives the tap, the owner and the host's next boot, so
//! every record says whose it is: `external_ids:qvirt-vm` of the port.
//!
//! [`Ovs::add_port`]'s inverse is [`Ovs::del_port`], which touches only a port of that VM.

use std::{
    ffi::OsString,
    io,
    os::unix::process::ExitStatusExt,
    process::{Command, Output, Stdio},
};

use super::link::{self, Kind, LinkName};

#[cfg(test)]
mod tests;

/// The key in a port's `external_ids` that names the VM it belongs to.
pub const OWNER: &str = "qvirt-vm";

/// Seconds that `ovs-vsctl` may take, the wait for ovs-vswitchd included.
const TIMEOUT: &str = "--timeout=10";

/// Open vSwitch as its client sees it.
#[derive(Debug, Clone)]
pub struct Ovs {
    program: OsString,
}

/// A port to be.
#[derive(Debug, Clone, Copy)]
pub struct NewPort<'a> {
    /// The Open vSwitch bridge.
    pub bridge: &'a LinkName,
    /// The tap that becomes a port of it; it must exist already.
    pub port: &'a LinkName,
    /// The VLAN, 1 to 4094, whose access port it is; `None` is a trunk of all.
    pub tag: Option<u16>,
    /// The VM it belongs to.
    pub vm: &'a str,
    /// More `external_ids` of the interface, such as `iface-id` and `attached-mac` for a network controller.
    pub external_ids: &'a [(&'a str, &'a str)],
}

/// Why Open vSwitch did not do it.
#[derive(Debug, thiserror::Error)]
pub enum OvsError {
    /// Not a VLAN.
    #[error("VLAN {tag} of port {port} is out of range: give a tag from 1 to 4094, or none for a trunk")]
    Tag {
        /// The port.
        port: LinkName,
        /// What was asked.
        tag: u16,
    },
    /// No client.
    #[error("cannot run {}: install Open vSwitch (package openvswitch-switch), or drop `openvswitch = true`", program.display())]
    NoClient {
        /// The program.
        program: OsString,
        /// The system's error.
        source: io::Error,
    },
    /// No database server.
    #[error(
        "Open vSwitch does not run on this host: start it (`systemctl start openvswitch-switch`); if it runs elsewhere, set OVS_RUNDIR. ovs-vsctl says: {text}"
    )]
    NotRunning {
        /// The client's own words.
        text: String,
    },
    /// The switch daemon did not take the change over in time.
    #[error(
        "cannot {step}: no answer within ten seconds; see that ovsdb-server and ovs-vswitchd run (`ovs-vsctl show`, `ovs-appctl version`)"
    )]
    TimedOut {
        /// What was tried.
        step: String,
    },
    /// No bridge of that name.
    #[error(
        "there is no Open vSwitch bridge {bridge}: make it (`ovs-vsctl add-br {bridge}`), or correct the name (`ovs-vsctl list-br`)"
    )]
    NoBridge {
        /// The name asked for.
        bridge: LinkName,
    },
    /// It is the other kind of bridge.
    #[error(
        "{bridge} is a Linux bridge, Open vSwitch does not know it: drop `openvswitch = true`, or name an Open vSwitch bridge"
    )]
    IsLinuxBridge {
        /// The name asked for.
        bridge: LinkName,
    },
    /// The port exists and is not this VM's.
    #[error("Open vSwitch has a port {port} already, which belongs to {}: name another tap, or remove it yourself (`ovs-vsctl del-port {port}`)", owner(by.as_deref()))]
    Taken {
        /// The port.
        port: LinkName,
        /// The VM its record names, if any.
        by: Option<String>,
    },
    /// The port is this VM's, on another bridge.
    #[error(
        "port {port} is on the Open vSwitch bridge {on}, not on {bridge}: detach that NIC first, or remove the port (`ovs-vsctl del-port {port}`)"
    )]
    OnOtherBridge {
        /// The port.
        port: LinkName,
        /// Where it is.
        on: String,
        /// Where it was wanted.
        bridge: LinkName,
    },
    /// Recorded, but the switch could not open the interface; the record is taken back.
    #[error(
        "Open vSwitch cannot use {port} as a port: see that the tap exists in the network namespace of ovs-vswitchd. It says: {text}"
    )]
    Unusable {
        /// The port.
        port: LinkName,
        /// The client's own words.
        text: String,
    },
    /// Anything else.
    #[error("cannot {step}: ovs-vsctl says: {text}")]
    Failed {
        /// What was tried.
        step: String,
        /// The client's own words.
        text: String,
    },
}

fn owner(vm: Option<&str>) -> String {
    vm.map_or_else(|| "no VM of qvirt".to_owned(), |vm| format!("the VM {vm}"))
}

impl Default for Ovs {
    /// The `ovs-vsctl` of the search path.
    fn default() -> Self {
        Ovs { program: "ovs-vsctl".into() }
    }
}

impl Ovs {
    /// A client at another place.
    pub fn with_program(program: impl Into<OsString>) -> Self {
        Ovs { program: program.into() }
    }

    /// Whether Open vSwitch has a bridge of that name.
    pub fn bridge_exists(&self, bridge: &LinkName) -> Result<bool, OvsError> {
        let step = || format!("look for the bridge {bridge}");
        let output = self.run(&["br-exists", bridge.as_str()], step)?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(2) => Ok(false),
            _ => Err(failure(&output, step)),
        }
    }

    /// The bridge that `port` is on, or `None` if there is no such port.
    pub fn bridge_of(&self, port: &LinkName) -> Result<Option<String>, OvsError> {
        match self.text(&["port-to-br", port.as_str()], || format!("look for the port {port}")) {
            Ok(bridge) => Ok(Some(bridge.trim_end().to_owned())),
            // The client has no exit code of its own for this.
            Err(OvsError::Failed { text, .. }) if text.contains("no port named") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the tap a port of the bridge, in one transaction with its VLAN and its owner, and waits until the switch has
    /// taken it over. A port left from an earlier life of the same VM is taken again; anybody else's is an error, and so
    /// is one on another bridge. On an error no record of this VM is left. Inverse: [`Ovs::del_port`].
    pub fn add_port(&self, new: &NewPort<'_>) -> Result<(), OvsError> {
        let NewPort { bridge, port, .. } = *new;
        if let Some(tag) = new.tag.filter(|tag| !(1..=4094).contains(tag)) {
            return Err(OvsError::Tag { port: port.clone(), tag });
        }
        if !self.bridge_exists(bridge)? {
            return Err(match link::find(bridge.as_str()) {
                Ok(Some(link)) if link.kind == Kind::Bridge => {
                    OvsError::IsLinuxBridge { bridge: bridge.clone() }
                }
                _ => OvsError::NoBridge { bridge: bridge.clone() },
            });
        }
        if let Some(by) = self.owner_of(port)? {
            if by.as_deref() != Some(new.vm) {
                return Err(OvsError::Taken { port: port.clone(), by });
            }
            if let Some(on) = self.bridge_of(port)?.filter(|on| on != bridge.as_str()) {
                return Err(OvsError::OnOtherBridge { port: port.clone(), on, bridge: bridge.clone() });
            }
        }
        self.commit(new).inspect_err(|_| {
            // The record is written before the switch is waited for: take it back without waiting again. The first
            // error is the one that counts.
            let _ = self.run(&["--no-wait", "--if-exists", "del-port", port.as_str()], String::new);
        })
    }

    /// Removes the port if its record names this VM; a port that is gone, or somebody else's, is left alone. Returns
    /// whether there was something to remove. Inverse of [`Ovs::add_port`].
    pub fn del_port(&self, port: &LinkName, vm: &str) -> Result<bool, OvsError> {
        if self.owner_of(port)?.flatten().as_deref() != Some(vm) {
            return Ok(false);
        }
        let step = || format!("remove the port {port}");
        match self.text(&["--if-exists", "del-port", port.as_str()], step) {
            // The record goes before the switch is waited for; a switch that does not run holds no port.
            Err(OvsError::TimedOut { .. }) if self.owner_of(port)?.is_none() => Ok(true),
            other => other.map(|_| true),
        }
    }

    /// Whose port it is: `None` if there is no such port, `Some(None)` if its record names no VM.
    fn owner_of(&self, port: &LinkName) -> Result<Option<Option<String>>, OvsError> {
        let step = || format!("look up the port {port}");
        let condition = format!("name={}", quoted(port.as_str()));
        let table =
            self.text(&["--format=json", "--columns=external_ids", "find", "Port", &condition], step)?;
        owner_in(&table).ok_or_else(|| OvsError::Failed { step: step(), text: table })
    }

    fn commit(&self, new: &NewPort<'_>) -> Result<(), OvsError> {
        let port = new.port;
        let step = || format!("add the port {port} to {}", new.bridge);
        let output = self.run(&add_arguments(new), step)?;
        if !output.status.success() {
            return Err(failure(&output, step));
        }
        // The client exits with 0 also when the switch could not open the interface, and only writes about it.
        let text = words(&output.stderr);
        if text.contains("Error detected while setting up") {
            return Err(OvsError::Unusable { port: port.clone(), text });
        }
        Ok(())
    }

    /// Runs the client and gives its output; a failure becomes an error.
    fn text(&self, arguments: &[&str], step: impl Fn() -> String) -> Result<String, OvsError> {
        let output = self.run(arguments, &step)?;
        if !output.status.success() {
            return Err(failure(&output, step));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn run<A: AsRef<str>>(&self, arguments: &[A], step: impl Fn() -> String) -> Result<Output, OvsError> {
        let mut command = Command::new(&self.program);
        command.arg(TIMEOUT).args(arguments.iter().map(AsRef::as_ref)).stdin(Stdio::null());
        command.output().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                OvsError::NoClient { program: self.program.clone(), source }
            }
            _ => OvsError::Failed { step: step(), text: format!("it could not be run: {source}") },
        })
    }
}

/// The one transaction of [`Ovs::add_port`], without the program and its timeout.
fn add_arguments(new: &NewPort<'_>) -> Vec<String> {
    let port = new.port.as_str();
    let mut arguments: Vec<String> =
        ["--may-exist", "add-port", new.bridge.as_str(), port].map(str::to_owned).into();
    // A port left from an earlier life may have a VLAN that the config no longer has.
    let vlan = new.tag.map_or_else(|| "tag=[]".to_owned(), |tag| format!("tag={tag}"));
    arguments.extend(["--", "set", "Port", port].map(str::to_owned));
    arguments.extend([vlan, external_id(OWNER, new.vm)]);
    if !new.external_ids.is_empty() {
        arguments.extend(["--", "set", "Interface", port].map(str::to_owned));
        arguments.extend(new.external_ids.iter().map(|(key, value)| external_id(key, value)));
    }
    arguments
}

fn external_id(key: &str, value: &str) -> String {
    format!("external_ids:{}={}", quoted(key), quoted(value))
}

/// A string as OVSDB's client reads it whatever it holds: quoted as in JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The answer to `find Port name=... --columns=external_ids --format=json`; the outer `None` is an answer not understood.
#[expect(clippy::option_option, reason = "each level is an answer of its own, named where it is used")]
fn owner_in(table: &str) -> Option<Option<Option<String>>> {
    let table: serde_json::Value = serde_json::from_str(table).ok()?;
    let Some(row) = table.get("data")?.as_array()?.first() else { return Some(None) };
    let pairs = row.get(0)?.get(1)?.as_array()?;
    let owner = pairs.iter().find(|pair| pair.get(0).and_then(|key| key.as_str()) == Some(OWNER));
    Some(Some(owner.and_then(|pair| Some(pair.get(1)?.as_str()?.to_owned()))))
}

/// What a failed run means.
fn failure(output: &Output, step: impl Fn() -> String) -> OvsError {
    let text = words(&output.stderr);
    if output.status.signal() == Some(libc::SIGALRM) {
        OvsError::TimedOut { step: step() }
    } else if text.contains("database connection failed") {
        OvsError::NotRunning { text }
    } else {
        OvsError::Failed { step: step(), text }
    }
}

/// A program's complaint on one line.
fn words(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr).lines().map(str::trim).collect::<Vec<_>>().join("; ")
}
