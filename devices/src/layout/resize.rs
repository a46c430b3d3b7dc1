//! A running disk with more room.

use serde_json::json;

use super::Layout;
use crate::device::DeviceConfig;
use crate::refusal::Refusal;
use crate::spec::Call;
use crate::units::Size;

/// What every guest and image format can do.
const SECTOR: u64 = 512;

impl Layout {
    /// The command that gives the disk of an id or target label a size. `now` is the one that it has.
    pub fn resized(&self, name: &str, now: Size, size: Size) -> Result<Call, Refusal> {
        let placed = self.expect_device(name)?;
        let refuse = |rule: &str| {
            let (id, key, rule) = (placed.id.clone(), "size", rule.to_owned());
            Err(Refusal::Value { id, key, value: size.to_string(), rule })
        };
        let is_written = matches!(&placed.config, DeviceConfig::Disk(disk) if !disk.is_read_only());
        let is_proxied = placed.io_proxy().is_some();
        let is_block_device = placed.layers().first().is_some_and(|top| top.block_device);
        match placed.top_node() {
            _ if !is_written => refuse("only a disk that is written can get another size"),
            _ if is_block_device => {
                refuse("a block device gets its size from the host: make it larger there")
            }
            _ if is_proxied => refuse(
                "its image is behind an io-proxy, which has a size of its own: stop the VM, then use qemu-img resize",
            ),
            _ if size < now => {
                refuse(&format!("it has {now}, and what is cut off would be lost: make it larger"))
            }
            _ if !size.as_bytes().is_multiple_of(SECTOR) => refuse("write a multiple of 512B"),
            Some(node) => {
                let arguments = json!({"node-name": node, "size": size.as_bytes()});
                Ok(Call::new("block_resize", arguments))
            }
            None => refuse("there is no image in it"),
        }
    }
}
