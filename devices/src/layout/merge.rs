//! Chains of running disks with a layer less: the disk as it will be, and the commands that bring it there.
//!
//! QEMU changes the header above at the end, and may have in its memory still which clusters it copied where: whoever kills it then leaves a chain that
//! lacks them. So the job waits at its end, the image is flushed, by opening it anew as it is, and then it may go on.
//!
//! The layer that is written goes by an active commit: QEMU keeps copying what the guest writes meanwhile, and is `ready` when it has caught up. Told
//! to complete, it lets no request of the guest through, copies and flushes the rest, and is `pending`: both images show the same disk then,
//! until it is told to go on, which moves the device onto the image below.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Placed;
use crate::host::{Access, HostNeed};
use crate::refusal::Refusal;
use crate::spec::{Backend, Call, Props};

/// The command that opens an image anew as it is, for writing, which flushes it.
pub(super) fn flush(format_node: &Props) -> Call {
    let mut options = format_node.clone();
    options.remove("read-only");
    Call::new("blockdev-reopen", json!({"options": [options]}))
}

/// The command that lets a job go on which waits at its end.
pub fn finalize(job: &str) -> Call {
    Call::new("job-finalize", json!({"id": job}))
}

/// The command that gives a job up.
pub fn cancel(job: &str) -> Call {
    Call::new("job-cancel", json!({"id": job}))
}

/// The command that makes QEMU forget a job that is over.
pub fn dismiss(job: &str) -> Call {
    Call::new("job-dismiss", json!({"id": job}))
}

/// A disk with a layer less.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lesser {
    /// The disk as it will be.
    pub placed: Placed,
    /// The job's id.
    pub job: String,
    device: String,
    /// The node on the one that goes; none where the device itself stands on that.
    above: Option<String>,
    /// The node that QEMU puts between the device and what it writes, and that sees what the guest writes.
    filter: String,
    top: String,
    base: String,
    /// The format node of the image that gets the data.
    into: Props,
    backing_file: String,
    gone: Vec<Backend>,
}

/// The name of a node.
pub(super) fn node_name(backend: &Backend) -> String {
    match backend {
        Backend::Blockdev(props) => {
            props.get("node-name").and_then(Value::as_str).unwrap_or_default().to_owned()
        }
        _ => String::new(),
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
        if self.io_proxy().is_some() {
            return refuse("while its images are behind an io-proxy", "stop the VM first");
        }
        let mut placed = self.clone();
        // Two nodes a layer, the bottom first: the file, then the format.
        let start = (layers.len() - 1 - depth) * 2;
        let gone: Vec<Backend> = placed.spec.backends.drain(start..start + 2).collect();
        let Backend::Blockdev(into) = placed.spec.backends[start - 1].clone() else { return Ok(None) };
        let base = node_name(&placed.spec.backends[start - 1]);
        let above = placed.spec.backends.get(start + 1).map(node_name);
        match placed.spec.backends.get_mut(start + 1) {
            Some(Backend::Blockdev(props)) => drop(props.insert("backing".to_owned(), base.clone().into())),
            _ => placed.write_to(&base, &below.path),
        }
        placed.needs.retain(|need| !matches!(need, HostNeed::Image { path, .. } if path == from));
        Ok(Some(Lesser {
            job: format!("{}-merge", self.id),
            device: self.top_node().unwrap_or_default().to_owned(),
            above,
            filter: self.id.merge_node(),
            top: node_name(&gone[1]),
            base,
            into,
            backing_file: below.path.clone(),
            placed,
            gone,
        }))
    }

    /// Makes an image, by its node and its path, the one that is written.
    fn write_to(&mut self, node: &str, path: &str) {
        if let Some(Backend::Blockdev(props)) = self.spec.backends.last_mut() {
            props.remove("read-only");
        }
        if let Some(frontend) = &mut self.spec.frontend {
            frontend.0.insert("drive".to_owned(), node.into());
        }
        for need in &mut self.needs {
            if let HostNeed::Image { path: image, access, .. } = need
                && image == path
            {
                *access = Access::Write;
            }
        }
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
            "auto-finalize": false,
            "auto-dismiss": false,
        });
        match self.above {
            Some(_) => arguments["backing-file"] = self.backing_file.clone().into(),
            None => arguments["filter-node-name"] = self.filter.clone().into(),
        }
        if let Some(speed) = bytes_per_second {
            arguments["speed"] = speed.into();
        }
        Call::new("block-commit", arguments)
    }

    /// Whether it is the layer that is written which goes.
    pub fn is_active(&self) -> bool {
        self.above.is_none()
    }

    /// The command that ends an active commit which has caught up.
    pub fn complete(&self) -> Call {
        Call::new("job-complete", json!({"id": self.job}))
    }

    /// The command that flushes the image which gets the data.
    pub fn flush(&self) -> Call {
        flush(&self.into)
    }

    /// The commands that delete the nodes that nothing stands on any more.
    pub fn clear(&self) -> impl Iterator<Item = Call> {
        self.gone.iter().rev().map(Backend::del)
    }

    /// Whether it is done, by `query-named-block-nodes` and the node that the device stands on: the layer above, or the device, is on the one below.
    /// `None` where the device stands on neither, as while its I/O is held.
    pub fn is_done(&self, nodes: &[Value], stands_on: &str) -> Option<bool> {
        match &self.above {
            Some(above) => {
                let above = nodes.iter().find(|node| node["node-name"].as_str() == Some(above));
                Some(
                    above.is_some_and(|node| {
                        node["backing_file"].as_str() == Some(self.backing_file.as_str())
                    }),
                )
            }
            None if stands_on == self.base => Some(true),
            None => (self.is_seen(stands_on) || stands_on == self.top).then_some(false),
        }
    }

    /// Whether the job sees what a device writes that stands on this node. A device that was elsewhere meanwhile, as while its I/O is held, may be
    /// beside it for good.
    pub fn is_seen(&self, stands_on: &str) -> bool {
        stands_on == self.filter
    }
}
