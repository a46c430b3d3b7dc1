//! A disk as what it needs of the host and as QEMU's objects.

use serde_json::json;

use super::{Aio, Cache, Discard, DiskConfig};
use crate::address::Address;
use crate::host::{Access, Format, HostNeed, HostVdpa, IoProxy, Layer};
use crate::id::{DeviceId, Generation};
use crate::retry::{Engine, Retry};
use crate::spec::{Backend, DeviceSpec, Frontend, props};

/// What a device stands on.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    /// The layers of its image, top first; an empty CD-ROM drive has none.
    pub(crate) chain: Vec<Layer>,
    /// How it retries, if it does.
    pub(crate) retry: Option<Retry>,
    /// The host's vDPA device.
    pub(crate) vdpa: Option<HostVdpa>,
}

impl Storage {
    /// How it retries, if a proxy does it.
    fn proxy(&self) -> Option<&Retry> {
        self.retry.as_ref().filter(|retry| retry.engine == Engine::Proxy)
    }

    /// Whether its device is moved to other nodes while its image is out of order.
    fn is_held(&self) -> bool {
        self.retry.as_ref().is_some_and(|retry| retry.engine == Engine::Hold)
    }
}

impl DiskConfig {
    /// What it needs of the host: the top of its chain for itself, every layer below to read, and a proxy if one retries.
    pub(crate) fn needs(&self, id: &DeviceId, storage: &Storage, run_dir: &str) -> Vec<HostNeed> {
        let access = |depth| if depth == 0 && !self.is_read_only() { Access::Write } else { Access::Read };
        let image = |(depth, layer): (usize, &Layer)| HostNeed::Image {
            path: layer.path.clone(),
            access: access(depth),
        };
        let proxy = storage.proxy().zip(storage.chain.split_first()).map(|(retry, (top, below))| IoProxy {
            socket: id.io_socket(run_dir),
            control: id.io_control(run_dir),
            image: top.path.clone(),
            block_device: top.block_device,
            read_only: self.is_read_only(),
            grows: top.format == Format::Qcow2 && !top.block_device && !self.is_read_only(),
            direct: self.cache.is_some_and(Cache::direct),
            aio: self.aio.unwrap_or(Aio::Threads),
            discard: self.discard.unwrap_or(Discard::Ignore),
            retry: retry.clone(),
            below: below.to_vec(),
        });
        storage.chain.iter().enumerate().map(image).chain(proxy.map(HostNeed::IoProxy)).collect()
    }

    /// The disk as QEMU's objects: two nodes a layer, the bottom first, then the device. `top` is the generation of the uppermost layer.
    pub(crate) fn lower(
        &self,
        id: &DeviceId,
        address: &Address,
        controller: Option<&DeviceId>,
        storage: &Storage,
        top: Generation,
        run_dir: &str,
    ) -> DeviceSpec {
        let Storage { chain, retry, .. } = storage;
        let generation =
            |depth: usize| Generation(top.0.saturating_sub(u32::try_from(depth).unwrap_or(u32::MAX)));
        let mut backends = Vec::new();
        for (depth, layer) in chain.iter().enumerate().rev() {
            let below = (depth + 1 < chain.len()).then(|| id.format_node(generation(depth + 1)));
            backends.push(if storage.proxy().is_some() {
                self.proxy_node(id, generation(depth), depth, run_dir)
            } else {
                let is_left = depth == 0 && storage.is_held() && !self.is_read_only();
                self.file_node(id, layer, generation(depth), is_left)
            });
            backends.push(self.format_node(id, layer, generation(depth), depth, below));
        }
        let node = (!chain.is_empty()).then(|| id.format_node(top));
        let mut frontend = props(self.frontend(id, address, controller, node));
        frontend.extend(props(self.error_properties(retry.as_ref())));
        DeviceSpec { id: id.clone(), backends, frontend: Some(Frontend(frontend)), companions: Vec::new() }
    }

    /// The nodes of a new top layer, above the node `below`.
    pub(crate) fn overlay(
        &self,
        id: &DeviceId,
        layer: &Layer,
        generation: Generation,
        below: String,
        retry: Option<&Retry>,
    ) -> [Backend; 2] {
        let is_left = retry.is_some_and(|retry| retry.engine == Engine::Hold);
        [
            self.file_node(id, layer, generation, is_left),
            self.format_node(id, layer, generation, 0, Some(below)),
        ]
    }

    /// Without a mode QEMU's defaults stand, which are those of `writeback`: its monitor reads a byte at a time, so what need not be said
    /// is not said.
    fn cache_options(&self) -> Option<serde_json::Value> {
        self.cache.map(|cache| json!({"direct": cache.direct(), "no-flush": cache.no_flush()}))
    }

    fn file_node(&self, id: &DeviceId, layer: &Layer, generation: Generation, is_left: bool) -> Backend {
        Backend::Blockdev(props(json!({
            "driver": if layer.block_device { "host_device" } else { "file" },
            "node-name": id.file_node(generation),
            "filename": layer.path,
            "aio": self.aio.map(Aio::word),
            "cache": self.cache_options(),
            // So that a commit can reopen a backing file for writing; the node above says who may write now. But QEMU then opens it anew, by its
            // path, also when its device leaves it or comes back, which fails where that path is gone: it could not be left, and the VM stood still.
            "auto-read-only": (!is_left).then_some(true),
            "discard": self.discard.map(Discard::word),
        })))
    }

    /// In place of [`DiskConfig::file_node`]: the proxy opens the image, and QEMU speaks NBD to it.
    fn proxy_node(&self, id: &DeviceId, generation: Generation, depth: usize, run_dir: &str) -> Backend {
        Backend::Blockdev(props(json!({
            "driver": "nbd",
            "node-name": id.file_node(generation),
            "server": {"type": "unix", "path": id.io_socket(run_dir)},
            "export": id.io_export(depth),
            // A proxy that died is started anew within this time.
            "reconnect-delay": 30,
            "cache": self.cache_options(),
            "auto-read-only": true,
            "discard": self.discard.map(Discard::word),
        })))
    }

    fn format_node(
        &self,
        id: &DeviceId,
        layer: &Layer,
        generation: Generation,
        depth: usize,
        below: Option<String>,
    ) -> Backend {
        let mut node = props(json!({
            "driver": layer.format.word(),
            "node-name": id.format_node(generation),
            "read-only": (depth > 0 || self.is_read_only()).then_some(true),
            "cache": self.cache_options(),
            "discard": self.discard.map(Discard::word),
            "file": id.file_node(generation),
        }));
        if layer.format == Format::Qcow2 {
            // Null at the bottom: without it QEMU would open what the header names, in a format it guesses.
            node.insert("backing".to_owned(), below.map_or(serde_json::Value::Null, Into::into));
        }
        Backend::Blockdev(node)
    }

    fn frontend(
        &self,
        id: &DeviceId,
        address: &Address,
        controller: Option<&DeviceId>,
        node: Option<String>,
    ) -> serde_json::Value {
        let (bus, addr, lun) = match address {
            Address::Pci(seat) => (seat.bus().to_owned(), Some(seat.addr()), None),
            Address::Scsi(a) => {
                (controller.map(|c| format!("{c}.0")).unwrap_or_default(), None, Some((a.target, a.unit)))
            }
            Address::SerialPort { .. } | Address::Isa(_) | Address::Usb { .. } => (String::new(), None, None),
        };
        let device_id = lun.map(|_| self.device_id.clone().unwrap_or_else(|| id.to_string()));
        let write_cache = self.cache.filter(|_| !self.is_cdrom()).map(Cache::write_cache);
        json!({
            "driver": self.driver(),
            "id": id.as_str(),
            "bus": bus,
            "addr": addr,
            "channel": lun.map(|_| 0),
            "scsi-id": lun.map(|(target, _)| target),
            "lun": lun.map(|(_, unit)| unit),
            "drive": node,
            "device_id": device_id,
            "serial": self.serial,
            "write-cache": write_cache,
            "num-queues": self.queues,
            "iothread": self.iothread.as_ref().map(DeviceId::as_str),
            "bootindex": self.bootindex,
        })
    }
}
