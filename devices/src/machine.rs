//! The machine around the devices: type, processor, memory, firmware, direct kernel boot. Prints the command line's first part.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;
use thiserror::Error;

use crate::capabilities::Capabilities;
use crate::keyval::escaped;
use crate::spec::{Backend, Numbers, props};
use crate::units::Size;

/// Guest memory: a size, or a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// How much.
    pub size: Size,
    /// Whether other processes (vhost-user, VDUSE) can map it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// Size of the huge pages it is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<Size>,
    /// Whether all of it is allocated at the start.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prealloc: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryTable {
    size: Size,
    #[serde(default)]
    shared: bool,
    hugepages: Option<Size>,
    #[serde(default)]
    prealloc: bool,
}

/// A config value that is a text, or a table when there is more to say.
struct TextOrTable<F>(F);

impl<'de, T: Deserialize<'de>, F> serde::de::Visitor<'de> for TextOrTable<F>
where
    F: FnOnce(String) -> Result<T, String>,
{
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a text or a table")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text.to_owned()).map_err(E::custom)
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(serde::de::value::MapAccessDeserializer::new(map))
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = |text: String| {
            let size = text.parse().map_err(|e: crate::text::TextError| e.to_string())?;
            Ok(MemoryTable { size, shared: false, hugepages: None, prealloc: false })
        };
        let table: MemoryTable = source.deserialize_any(TextOrTable(text))?;
        Ok(Memory {
            size: table.size,
            shared: table.shared,
            hugepages: table.hugepages,
            prealloc: table.prealloc,
        })
    }
}

/// UEFI by path: the code alone, or a table of code and variables.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Firmware {
    /// The code's image, read only.
    pub code: String,
    /// The variables' image, this VM's own and written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vars: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FirmwareTable {
    code: String,
    vars: Option<String>,
}

impl<'de> Deserialize<'de> for Firmware {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = |code: String| Ok(FirmwareTable { code, vars: None });
        let table: FirmwareTable = source.deserialize_any(TextOrTable(text))?;
        Ok(Firmware { code: table.code, vars: table.vars })
    }
}

/// Table `[kernel]`: a Linux kernel that is booted without a boot loader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The kernel's image.
    pub path: String,
    /// Its initial file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Its command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
}

/// The machine, all defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The VM's name.
    pub name: String,
    /// The VM's UUID.
    pub uuid: String,
    /// Versioned type, as QEMU saves it: `pc-q35-10.0`.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// QEMU's CPU model.
    pub cpu: String,
    /// Virtual CPUs.
    pub vcpus: u16,
    /// Memory.
    pub memory: Memory,
    /// UEFI, or SeaBIOS where there is none.
    pub firmware: Option<Firmware>,
    /// Direct boot.
    pub kernel: Option<Kernel>,
}

/// A machine that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MachineError {
    /// Type unknown to this QEMU.
    #[error(
        "machine {machine:?}: this QEMU ({version}) has no such machine type; `qemu-system-x86_64 -M help` lists its own, `q35` is the usual one"
    )]
    Unknown {
        /// The type.
        machine: String,
        /// QEMU's version, for people.
        version: String,
    },
    /// A type without PCIe.
    #[error(
        "machine {machine:?} has no PCIe root complex: qvirt plugs devices into PCIe root ports; use `q35`"
    )]
    NoPcie {
        /// The type.
        machine: String,
    },
    /// Memory out of range.
    #[error("memory {size}: {rule}")]
    Memory {
        /// The size.
        size: Size,
        /// The rule.
        rule: &'static str,
    },
    /// No virtual CPU.
    #[error("vcpus = 0: a VM has at least one virtual CPU; write 1 or more")]
    NoCpu,
}

/// The versioned name of a machine type.
pub fn versioned(machine: &str, qemu: &Capabilities) -> Result<String, MachineError> {
    let unknown = || MachineError::Unknown { machine: machine.to_owned(), version: qemu.version.clone() };
    let name = qemu.machines.get(machine).ok_or_else(unknown)?;
    if name.starts_with("pc-q35") || name.starts_with("virt") {
        return Ok(name.clone());
    }
    Err(MachineError::NoPcie { machine: machine.to_owned() })
}

impl Memory {
    fn check(&self) -> Result<(), MachineError> {
        let fail = |rule| Err(MachineError::Memory { size: self.size, rule });
        if self.size.as_bytes() < 1 << 20 || !self.size.as_bytes().is_multiple_of(1 << 20) {
            return fail("write a whole number of MiB, at least one");
        }
        match self.hugepages.map(Size::as_bytes) {
            Some(page) if !page.is_power_of_two() || page < 1 << 16 => {
                fail("`hugepages` is the size of one page; write \"2MiB\" or \"1GiB\", the sizes of x86")
            }
            Some(page) if !self.size.as_bytes().is_multiple_of(page) => {
                fail("write a multiple of the size of its huge pages")
            }
            _ => Ok(()),
        }
    }

    /// The object behind it; ordinary private memory needs none.
    fn backend(&self) -> Option<Backend> {
        let memfd = self.shared || self.hugepages.is_some();
        if !memfd && !self.prealloc {
            return None;
        }
        Some(Backend::Object(props(json!({
            "qom-type": if memfd { "memory-backend-memfd" } else { "memory-backend-ram" },
            "id": Self::ID,
            "size": self.size.as_bytes(),
            // memfd's own default is shared.
            "share": self.shared,
            "hugetlb": self.hugepages.map(|_| true),
            "hugetlbsize": self.hugepages.map(Size::as_bytes),
            "prealloc": self.prealloc.then_some(true),
        }))))
    }

    // A dot, so that no device's id can be the same.
    const ID: &'static str = "ram.0";
}

impl Firmware {
    fn images(&self) -> Vec<(&'static str, &str, bool)> {
        let vars = self.vars.as_deref().map(|vars| ("pflash.1", vars, false));
        [("pflash.0", self.code.as_str(), true)].into_iter().chain(vars).collect()
    }

    fn backends(&self) -> Vec<Backend> {
        let nodes = |(name, path, read_only): (&str, &str, bool)| {
            let file = props(json!({
                "driver": "file", "node-name": format!("{name}-file"), "filename": path, "auto-read-only": true,
            }));
            let format = props(json!({
                "driver": "raw", "node-name": format!("{name}-format"), "read-only": read_only, "file": format!("{name}-file"),
            }));
            [Backend::Blockdev(file), Backend::Blockdev(format)]
        };
        self.images().into_iter().flat_map(nodes).collect()
    }
}

impl Machine {
    /// What can be said against it.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.vcpus == 0 {
            return Err(MachineError::NoCpu);
        }
        self.memory.check()
    }

    /// Whether another process can map the guest's memory.
    pub fn shares_memory(&self) -> bool {
        self.memory.shared
    }

    /// Words that every command line begins with: nothing that was not asked for, stopped until told to go, little allowed.
    pub fn prelude() -> Vec<String> {
        const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
        let words = ["-nodefaults", "-no-user-config", "-S", "-display", "none", "-sandbox", SANDBOX];
        words.map(str::to_owned).to_vec()
    }

    /// Words for a QMP monitor on a listening socket that QEMU inherits as descriptor `fd`. A dot, so that no device's id can be the same.
    pub fn monitor(name: &str, fd: &str) -> Vec<String> {
        let chardev = format!("socket,id={name}.0,fd={fd},server=on,wait=off");
        let monitor = format!("chardev={name}.0,mode=control");
        vec!["-chardev".to_owned(), chardev, "-mon".to_owned(), monitor]
    }

    /// Images that it opens: path, and whether it writes.
    pub fn images(&self) -> Vec<(String, bool)> {
        let images = self.firmware.iter().flat_map(Firmware::images);
        images.map(|(_, path, read_only)| (path.to_owned(), !read_only)).collect()
    }

    /// The command line's words for it.
    pub fn argv(&self, qemu: &Capabilities) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        let backend = self.memory.backend();
        let mut machine = escaped(&self.machine);
        if backend.is_some() {
            machine.push_str(&format!(",memory-backend={}", Memory::ID));
        }
        let pflash = self.firmware.as_ref().map(Firmware::images).unwrap_or_default();
        for (index, (name, ..)) in pflash.iter().enumerate() {
            machine.push_str(&format!(",pflash{index}={name}-format"));
        }
        option("-name", format!("guest={},debug-threads=on", escaped(&self.name)));
        option("-uuid", self.uuid.clone());
        option("-machine", machine);
        option("-accel", self.accel.clone());
        option("-cpu", self.cpu.clone());
        option("-smp", self.vcpus.to_string());
        option("-m", format!("size={}M", self.memory.size.as_bytes() >> 20));
        let firmware = self.firmware.as_ref().map(Firmware::backends).unwrap_or_default();
        for backend in backend.iter().chain(&firmware) {
            let [name, value] = backend.flag(qemu, &Numbers::new());
            option(&name, value);
        }
        if let Some(kernel) = &self.kernel {
            option("-kernel", kernel.path.clone());
            kernel.initrd.iter().for_each(|initrd| option("-initrd", initrd.clone()));
            kernel.append.iter().for_each(|append| option("-append", append.clone()));
        }
        words
    }
}
