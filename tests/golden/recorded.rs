//! What two QEMUs said of themselves, recorded by `integration-images/record-schemas`: their capabilities without running them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use devices::capabilities::{Capabilities, Replies};
use serde_json::{Value, json};

/// One recorded QEMU.
pub struct Recorded {
    /// `7.2` or `10.0`.
    pub version: &'static str,
    /// The reply of `query-qmp-schema`.
    pub schema: Value,
    /// What qvirt makes of it all.
    pub capabilities: Capabilities,
}

/// QEMU 10.0, whose expectations have no suffix.
pub static QEMU_10_0: LazyLock<Recorded> =
    LazyLock::new(|| Recorded::read("10.0", include_str!("../recorded/qemu-10.0.json")));

/// QEMU 7.2, the oldest that is tested.
pub static QEMU_7_2: LazyLock<Recorded> =
    LazyLock::new(|| Recorded::read("7.2", include_str!("../recorded/qemu-7.2.json")));

impl Recorded {
    fn read(version: &'static str, text: &str) -> Recorded {
        let mut record: Value = serde_json::from_str(text).expect("a recording is JSON");
        let schema = record["schema"].take();
        let devices: BTreeMap<String, Value> =
            serde_json::from_value(record["devices"].take()).expect("devices are a map");
        // Recorded are the names alone; QEMU's own reply has them in objects.
        let names = record["objects"].as_array().expect("objects are a list");
        let objects: Value = names.iter().map(|name| json!({"name": name})).collect();
        let replies = Replies {
            version: &record["version"],
            schema: &schema.to_string(),
            devices: &devices,
            objects: &objects,
            machines: &record["machines"],
        };
        let capabilities = Capabilities::from_replies(&replies).expect("the schema is QEMU's");
        Recorded { version, schema, capabilities }
    }

    /// A QEMU before 7.2, as far as qvirt can tell one: no JSON for `-device` and `-netdev`.
    pub fn without_json_options(&self) -> Capabilities {
        let mut old = self.capabilities.clone();
        old.features.remove("device_add/json-cli-hotplug");
        old.netdevs.remove("stream");
        old
    }

    /// The same QEMU, retrying by itself as openEuler's does: one more action of an event, two more properties of a disk.
    pub fn with_retry(&self) -> Capabilities {
        let mut retries = self.capabilities.clone();
        retries.io_error_actions.insert("retry".to_owned());
        for driver in ["virtio-blk-pci", "scsi-hd", "scsi-cd"] {
            let properties = retries.devices.get_mut(driver).expect("it is recorded");
            let times = ["retry_interval", "retry_timeout"];
            properties.extend(times.map(|name| (name.to_owned(), "int64".to_owned())));
        }
        retries
    }
}
