//! The fake's answers about what it has: the object tree, disks, PCI buses, the network. It changes nothing.

use serde_json::{Value, json};

use super::Failure;
use super::devices::Device;
use super::machine::{Machine, text};

fn property(name: &str, kind: &str) -> Value {
    json!({"name": name, "type": kind})
}

impl Machine {
    fn device_at(&self, path: &str) -> Option<&Device> {
        let id = path.strip_prefix("/machine/peripheral/")?;
        self.devices.iter().find(|device| device.id == id)
    }

    /// `qom-list`.
    pub(super) fn qom_list(&self, path: &str) -> Result<Value, Failure> {
        let container = |children: Vec<(String, String)>| {
            let child = |(name, kind): (String, String)| property(&name, &format!("child<{kind}>"));
            let children = children.into_iter().map(child);
            [property("type", "string")].into_iter().chain(children).collect::<Value>()
        };
        match path.trim_end_matches('/') {
            "/machine/peripheral" => {
                let named = self.devices.iter().filter(|device| !device.id.starts_with("device["));
                Ok(container(named.map(|device| (device.id.clone(), device.driver.clone())).collect()))
            }
            "/objects" => {
                let kind = |props| text(props, "qom-type").to_owned();
                Ok(container(self.objects.iter().map(|(id, props)| (id.clone(), kind(props))).collect()))
            }
            "/machine" => Ok(container(vec![("peripheral".to_owned(), "container".to_owned())])),
            path => {
                let device = self.device_at(path).ok_or_else(|| Failure::absent(path))?;
                let fixed = [
                    ("type", "string"),
                    ("parent_bus", "link<bus>"),
                    ("realized", "bool"),
                    ("hotplugged", "bool"),
                ];
                let own = self.qemu.devices.get(&device.driver).into_iter().flatten();
                let own = own.map(|known| property(&known.name, &known.kind));
                Ok(fixed.into_iter().map(|(name, kind)| property(name, kind)).chain(own).collect())
            }
        }
    }

    /// `qom-get`.
    pub(super) fn qom_get(&self, path: &str, name: &str) -> Result<Value, Failure> {
        let absent = |kind: &str| Err(Failure::generic(format!("Property '{kind}.{name}' not found")));
        if let Some(object) = path.strip_prefix("/objects/").and_then(|id| self.objects.get(id)) {
            let kind = text(object, "qom-type");
            return match name {
                "type" => Ok(json!(kind)),
                _ => object.get(name).cloned().map_or_else(|| absent(kind), Ok),
            };
        }
        let device = self.device_at(path).ok_or_else(|| Failure::absent(path))?;
        let known = self.qemu.devices.get(&device.driver).into_iter().flatten();
        Ok(match name {
            "type" => json!(device.driver),
            "parent_bus" => json!(self.bus_path(&device.bus)),
            "hotplugged" => json!(device.hotplugged),
            "realized" => json!(true),
            "addr" if device.slot.is_some() => json!(device.slot),
            "iothread" => match text(&device.props, "iothread") {
                "" => json!(""),
                id => json!(format!("/objects/{id}")),
            },
            _ => match (known.into_iter().find(|known| known.name == name), device.props.get(name)) {
                (None, _) | (_, _) if matches!(name, "driver" | "id" | "bus") => {
                    return absent(&device.driver);
                }
                (None, _) => return absent(&device.driver),
                (_, Some(value)) => value.clone(),
                (Some(known), None) => known.default.clone().unwrap_or_else(|| match known.kind.as_str() {
                    "bool" => json!(false),
                    kind if kind.contains("int") => json!(0),
                    _ => json!(""),
                }),
            },
        })
    }

    fn disks(&self) -> impl Iterator<Item = &Device> {
        self.devices
            .iter()
            .filter(|device| device.driver == "scsi-cd" || !text(&device.props, "drive").is_empty())
    }

    /// QEMU gives a SCSI disk's id, and the path of a virtio disk's inner device, which has none.
    fn qdev(device: &Device) -> String {
        if device.driver.starts_with("scsi-") { device.id.clone() } else { device.block_path() }
    }

    /// `query-block`.
    pub(super) fn blocks(&self) -> Value {
        let one = |device: &Device| {
            let cd = device.driver == "scsi-cd";
            let mut block = json!({
                "io-status": device.io_status, "device": "", "locked": false, "removable": cd, "qdev": Machine::qdev(device),
                "type": "unknown",
            });
            if cd {
                block["tray_open"] = json!(false);
            }
            if let Some(node) = self.info_of(text(&device.props, "drive")) {
                block["inserted"] = node;
            }
            block
        };
        self.disks().map(one).collect()
    }

    /// `query-blockstats`: nothing was written.
    pub(super) fn block_stats(&self) -> Value {
        let one = |device: &Device| {
            let zeros = [
                "rd_bytes",
                "wr_bytes",
                "rd_operations",
                "wr_operations",
                "flush_operations",
                "rd_total_time_ns",
                "wr_total_time_ns",
                "failed_rd_operations",
                "failed_wr_operations",
                "wr_highest_offset",
            ];
            let mut stats: serde_json::Map<String, Value> =
                zeros.iter().map(|name| ((*name).to_owned(), json!(0))).collect();
            stats.insert("rd_operations".to_owned(), json!(device.done));
            let mut block = json!({"device": "", "stats": stats, "qdev": Machine::qdev(device)});
            match text(&device.props, "drive") {
                "" => {}
                node => block["node-name"] = json!(node),
            }
            block
        };
        self.disks().map(one).collect()
    }

    /// `query-pci`.
    pub(super) fn pci(&self) -> Value {
        let bus = |name: &str| -> Value {
            let there = self.devices.iter().filter(|device| device.bus == name && device.slot.is_some());
            let one = |device: &Device| {
                let place = device.slot.unwrap_or(0);
                let mut found = json!({
                    "irq_pin": 1, "bus": 0, "qdev_id": device.id, "slot": place >> 3, "function": place & 7,
                    "class_info": {"class": 0}, "id": {"device": 0, "vendor": 6966}, "regions": [],
                });
                if device.driver == "pcie-root-port" {
                    // Empty, as before a guest has numbered it.
                    found["pci_bridge"] = json!({"bus": {"secondary": 0, "number": 0, "subordinate": 0}});
                }
                found
            };
            there.map(one).collect()
        };
        json!([{"bus": 0, "devices": bus("pcie.0")}])
    }

    /// `info network` of the human monitor.
    pub(super) fn network(&self) -> String {
        let mut lines = String::new();
        let mut taken = Vec::new();
        let netdev = |id: &str| {
            let kind = self.netdevs.get(id).map_or("", |props| text(props, "type"));
            format!("{id}: index=0,type={kind}")
        };
        for nic in self.devices.iter().filter(|device| device.driver.contains("-net-")) {
            let (mac, peer) = (text(&nic.props, "mac"), text(&nic.props, "netdev"));
            lines.push_str(&format!("{}: index=0,type=nic,model={},macaddr={mac}\r\n", nic.id, nic.driver));
            if self.netdevs.contains_key(peer) {
                lines.push_str(&format!(" \\ {}\r\n", netdev(peer)));
                taken.push(peer);
            }
        }
        for id in self.netdevs.keys().filter(|id| !taken.contains(&id.as_str())) {
            lines.push_str(&format!("{}\r\n", netdev(id)));
        }
        lines
    }
}
