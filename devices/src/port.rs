//! Serial consoles and channels: isa-serial and virtio-console on a pty, virtio-serial ports on a unix socket.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::address::Address;
use crate::chardev::{Chardev, Stream};
use crate::host::HostNeed;
use crate::id::DeviceId;
use crate::refusal::Refusal;
use crate::spec::{Backend, DeviceSpec, Frontend, props};
use crate::text::words;
use crate::topology::Seat;

words! {
    /// What kind of console the guest sees.
    SerialType, "serial type" {
        /// A 16550 UART: there from the first instruction. Not hot-pluggable.
        IsaSerial = "isa-serial",
        /// A virtio console (`hvc0`).
        VirtioConsole = "virtio-console",
    }
}

/// Table `[[serial]]`: a console on a new pseudo terminal of the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Default: `serial0`, `serial1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// Default: `isa-serial`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<SerialType>,
    /// A file to which all that the guest writes is appended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
}

/// Table `[[channel]]`: a virtio-serial port on a unix socket that QEMU listens on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelConfig {
    /// Default: `channel0`, `channel1`, ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// The name by which the guest finds it. Default: the id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it is the one for qemu-ga: its name is then `org.qemu.guest_agent.0`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// Absolute path of the socket. Default: `channel-ID.sock` in the VM's runtime folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// Longest path of a unix socket, in bytes.
pub const SOCKET_PATH_MAX: usize = 107;

impl SerialConfig {
    pub(crate) fn kind(&self) -> SerialType {
        self.kind.unwrap_or(SerialType::IsaSerial)
    }

    pub(crate) fn seat(&self) -> Seat {
        match self.kind() {
            SerialType::IsaSerial => Seat::Isa,
            SerialType::VirtioConsole => Seat::SerialPort { console: true },
        }
    }

    pub(crate) fn lower(
        &self,
        id: &DeviceId,
        address: &Address,
        controller: Option<&DeviceId>,
    ) -> DeviceSpec {
        let backend =
            Backend::Chardev(Chardev { id: id.chardev(), stream: Stream::Pty, log: self.log.clone() });
        let frontend = match address {
            Address::Isa(index) => {
                json!({"driver": "isa-serial", "id": id.as_str(), "chardev": id.chardev(), "index": index})
            }
            _ => port("virtconsole", id, address, controller, None),
        };
        DeviceSpec {
            id: id.clone(),
            backends: vec![backend],
            frontend: Some(Frontend(props(frontend))),
            companions: Vec::new(),
        }
    }
}

impl ChannelConfig {
    pub(crate) fn name<'a>(&'a self, id: &'a DeviceId) -> &'a str {
        if self.guest_agent { "org.qemu.guest_agent.0" } else { self.name.as_deref().unwrap_or(id.as_str()) }
    }

    /// The socket's path.
    pub fn socket(&self, id: &DeviceId, run_dir: &str) -> String {
        self.path.clone().unwrap_or_else(|| format!("{run_dir}/channel-{id}.sock"))
    }

    pub(crate) fn check(&self, id: &DeviceId, run_dir: &str) -> Result<(), Refusal> {
        if self.guest_agent && self.name.is_some() {
            let next = "the agent's channel has its own name; leave `name` out";
            return Err(Refusal::Misplaced { id: id.clone(), key: "name", with: "guest_agent", next });
        }
        let socket = self.socket(id, run_dir);
        if socket.len() > SOCKET_PATH_MAX {
            let rule =
                format!("a socket's path has at most {SOCKET_PATH_MAX} bytes, this one {}", socket.len());
            return Err(Refusal::Value { id: id.clone(), key: "path", value: format!("{socket:?}"), rule });
        }
        Ok(())
    }

    pub(crate) fn needs(&self, id: &DeviceId, run_dir: &str) -> Vec<HostNeed> {
        vec![HostNeed::Socket { path: self.socket(id, run_dir) }]
    }

    pub(crate) fn lower(
        &self,
        id: &DeviceId,
        address: &Address,
        controller: Option<&DeviceId>,
        run_dir: &str,
    ) -> DeviceSpec {
        let stream = Stream::UnixListen(self.socket(id, run_dir));
        let backend = Backend::Chardev(Chardev { id: id.chardev(), stream, log: None });
        let frontend = port("virtserialport", id, address, controller, Some(self.name(id)));
        DeviceSpec {
            id: id.clone(),
            backends: vec![backend],
            frontend: Some(Frontend(props(frontend))),
            companions: Vec::new(),
        }
    }
}

fn port(
    driver: &str,
    id: &DeviceId,
    address: &Address,
    controller: Option<&DeviceId>,
    name: Option<&str>,
) -> serde_json::Value {
    let Address::SerialPort { nr, .. } = address else {
        unreachable!("a port claims a virtio-serial seat and gets one")
    };
    json!({
        "driver": driver,
        "id": id.as_str(),
        "bus": controller.map(|c| format!("{c}.0")),
        "nr": nr,
        "chardev": id.chardev(),
        "name": name,
    })
}
