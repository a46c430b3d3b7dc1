//! Chains of running disks with a layer less: the disk as it will be, and the commands that bring it there. Not of the layer that is written.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Placed;
use crate::host::HostNeed;
use crate::refusal::Refusal;
use crate::spec::{Backend, Call, Props};

/// A disk with a layer less.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lesser {
    /// The disk as it will be.
    pub placed: Placed,
    /// The job's id.
    pub job: String,
    device: String,
    above: String,
    top: String,
    base: String,
    backing_file: String,
    gone: Vec<Backend>,
}

fn text<'a>(backend: &'a Backend, key: &str) -> &'a str {
    let text = |props: &'a Props| props.get(key).and_then(Value::as_str);
    match backend {
        Backend::Blockdev(props) => text(props).unwrap_or_default(),
        _ => "",
    }
}

impl Placed {
    /// The disk without the layer `from`, whose data go into the one below it. `None` if it has no such layer, or none below it.
    pub fn without_layer(&self, from: &str) -> Result<Option<Lesser>, Refusal> {
        let layers = self.layers();
        let Some(depth) = layers.iter().position(|layer| layer.path == from) else { return Ok(None) };
        let Some(below) = layers.get(depth + 1) else { return Ok(None) };
        let refuse = |value: &str, rule: &str| {
            let (id, key) = (self.id.clone(), "snapshot");
            Err(Refusal::Value { id, key, value: value.to_owned(), rule: rule.to_owned() })
        };
        if depth == 0 {
            let rule = "it would be merged while the guest writes it: stop the VM first";
            return refuse(&format!("under {from}, which is written"), rule);
        }
        if self.needs.iter().any(|need| matches!(need, HostNeed::IoProxy(_))) {
            return refuse("while its image is behind an io-proxy", "stop the VM first");
        }
        let mut placed = self.clone();
        // Two nodes a layer, the bottom first: the file, then the format.
        let start = (layers.len() - 1 - depth) * 2;
        let gone: Vec<Backend> = placed.spec.backends.drain(start..start + 2).collect();
        let name = |backend: &Backend| text(backend, "node-name").to_owned();
        let base = name(&placed.spec.backends[start - 1]);
        let above = name(&placed.spec.backends[start + 1]);
        if let Backend::Blockdev(props) = &mut placed.spec.backends[start + 1] {
            props.insert("backing".to_owned(), base.clone().into());
        }
        placed.needs.retain(|need| !matches!(need, HostNeed::Image { path, .. } if path == from));
        Ok(Some(Lesser {
            job: format!("{}-merge", self.id),
            device: self.top_node().unwrap_or_default().to_owned(),
            above,
            top: name(&gone[1]),
            base,
            backing_file: below.path.clone(),
            placed,
            gone,
        }))
    }
}

impl Lesser {
    /// The command that begins it, not faster than that. The header above is to name a real path, whatever QEMU opened.
    pub fn begin(&self, bytes_per_second: Option<u64>) -> Call {
        let mut arguments = json!({
            "job-id": self.job,
            "device": self.device,
            "top-node": self.top,
            "base-node": self.base,
            "backing-file": self.backing_file,
            "auto-dismiss": false,
        });
        if let Some(speed) = bytes_per_second {
            arguments["speed"] = speed.into();
        }
        Call::new("block-commit", arguments)
    }

    /// The command that makes QEMU forget the job when it is over.
    pub fn dismiss(&self) -> Call {
        Call::new("job-dismiss", json!({"id": self.job}))
    }

    /// The commands that delete the nodes that nothing stands on any more.
    pub fn clear(&self) -> impl Iterator<Item = Call> {
        self.gone.iter().rev().map(Backend::del)
    }

    /// Whether it is done, by `query-named-block-nodes`: the layer above names the one below.
    pub fn is_done(&self, nodes: &[Value]) -> bool {
        let above = nodes.iter().find(|node| node["node-name"].as_str() == Some(&self.above));
        above.is_some_and(|node| node["backing_file"].as_str() == Some(self.backing_file.as_str()))
    }
}
