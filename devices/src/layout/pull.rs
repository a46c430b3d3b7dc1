//! Chains of running disks whose uppermost layer gets the data of those below it: the disk as it will be, and the commands that bring it there. As of a
//! merge, it is flushed before its header changes.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Placed;
use super::merge::{flush, node_name};
use crate::host::HostNeed;
use crate::refusal::Refusal;
use crate::spec::{Backend, Call, Props};

/// A disk whose uppermost layer stands further down, or alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pull {
    /// The disk as it will be.
    pub placed: Placed,
    /// The job's id.
    pub job: String,
    top: String,
    base: Option<Base>,
    /// The format node of the uppermost layer.
    into: Props,
    gone: Vec<Backend>,
}

/// What the uppermost layer stands on then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Base {
    node: String,
    path: String,
}

impl Placed {
    /// How many layers there are above `base`, or at all, if the uppermost one can take the data of others.
    pub fn layers_above(&self, base: Option<&str>) -> Result<usize, Refusal> {
        let layers = self.layers();
        let depth = match base {
            None => layers.len(),
            Some(base) => match layers.iter().position(|layer| layer.path == base) {
                Some(depth) if depth > 0 => depth,
                _ => {
                    return self.not_pulled(
                        base,
                        "it is no layer below the uppermost one: `qvirt blocks` shows the chain",
                    );
                }
            },
        };
        match depth {
            0 | 1 => self.not_pulled(
                base.unwrap_or("nothing"),
                "the uppermost layer stands on it already, so there is nothing to pull",
            ),
            depth => Ok(depth),
        }
    }

    fn not_pulled<T>(&self, base: &str, rule: &str) -> Result<T, Refusal> {
        Err(Refusal::Value {
            id: self.id.clone(),
            key: "base",
            value: base.to_owned(),
            rule: rule.to_owned(),
        })
    }

    /// The disk with its uppermost layer on `base`, one of its layers, or on nothing.
    pub fn pulled_onto(&self, base: Option<&str>) -> Result<Pull, Refusal> {
        let (layers, depth) = (self.layers(), self.layers_above(base)?);
        if self.io_proxy().is_some() {
            return self.not_pulled("while its images are behind an io-proxy", "stop the VM first");
        }
        let Some(Backend::Blockdev(into)) = self.spec.backends.last().cloned() else {
            return self.not_pulled("of what has no image", "name a disk");
        };
        let mut placed = self.clone();
        // Two nodes a layer, the bottom first: the file, then the format.
        let (below, end) = ((layers.len() - depth) * 2, (layers.len() - 1) * 2);
        let gone: Vec<Backend> = placed.spec.backends.drain(below..end).collect();
        let node = below.checked_sub(1).and_then(|last| placed.spec.backends.get(last)).map(node_name);
        let base = layers.get(depth).zip(node).map(|(layer, node)| Base { node, path: layer.path.clone() });
        if let Some(Backend::Blockdev(props)) = placed.spec.backends.last_mut() {
            props.insert(
                "backing".to_owned(),
                base.as_ref().map_or(Value::Null, |base| base.node.clone().into()),
            );
        }
        let pulled = |path: &String| layers[1..depth].iter().any(|layer| layer.path == *path);
        placed.needs.retain(|need| !matches!(need, HostNeed::Image { path, .. } if pulled(path)));
        let top = self.top_node().unwrap_or_default().to_owned();
        Ok(Pull { placed, job: format!("{}-pull", self.id), top, base, into, gone })
    }
}

impl Pull {
    /// The command that begins it, not faster than that. The header is to name a real path, whatever QEMU opened.
    pub fn begin(&self, bytes_per_second: Option<u64>) -> Call {
        let mut arguments =
            json!({"job-id": self.job, "device": self.top, "auto-finalize": false, "auto-dismiss": false});
        if let Some(base) = &self.base {
            arguments["base-node"] = base.node.clone().into();
            arguments["backing-file"] = base.path.clone().into();
        }
        if let Some(speed) = bytes_per_second {
            arguments["speed"] = speed.into();
        }
        Call::new("block-stream", arguments)
    }

    /// The command that flushes the uppermost layer.
    pub fn flush(&self) -> Call {
        flush(&self.into)
    }

    /// The commands that delete the nodes that nothing stands on any more, the uppermost first.
    pub fn clear(&self) -> impl Iterator<Item = Call> {
        self.gone.iter().rev().map(Backend::del)
    }

    /// Whether it is done, by `query-named-block-nodes`: the uppermost layer names what it is to stand on.
    pub fn is_done(&self, nodes: &[Value]) -> bool {
        let top = nodes.iter().find(|node| node["node-name"].as_str() == Some(&self.top));
        let below = top.map(|node| node["backing_file"].as_str().filter(|path| !path.is_empty()));
        below == Some(self.base.as_ref().map(|base| base.path.as_str()))
    }
}
