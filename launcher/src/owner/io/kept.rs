//! What the next owner is to know of disks that retry: a file in the VM's runtime folder, written anew at each change. Not in the state folder: that one
//! may be on the very storage that fails, and outlives the boot, which a VM does not.

use std::collections::BTreeMap;

use devices::DeviceId;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::warn;

use super::disk::{Disk, Drill};
use super::{Finished, Io, IoNews, Owner, Phase};
use crate::folders::write_volatile;
use crate::owner::Reply;
use crate::record::Stage;
use crate::suspend::hang::Detector;
use crate::suspend::parking::Parking;
use crate::suspend::{DiskIo, Uptime};

/// What is kept for the next owner.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    /// Numbers of nodes that were used.
    places: u32,
    drills: u32,
    disks: BTreeMap<DeviceId, KeptDisk>,
    /// Nodes of drills that are over. They are parents of the disks' own nodes, which therefore cannot go before them.
    #[serde(default)]
    leavings: Vec<String>,
    /// Whether a turn may have left the VM standing still.
    #[serde(default)]
    interrupted: bool,
    /// Whether somebody wants the VM to be paused.
    #[serde(default)]
    wants_pause: bool,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct KeptDisk {
    io: DiskIo,
    top: String,
    size_bytes: u64,
    /// Node of a drill that QEMU has, if it has one, and how long it is to last.
    drill: Option<(Option<String>, Uptime)>,
    /// Whether its storage hung.
    #[serde(default)]
    hangs: bool,
}

impl Io {
    /// What a former owner left.
    fn kept(&self) -> Kept {
        let text = std::fs::read(&self.file).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(in crate::owner) fn keep(&self) {
        let disks = self.disks.iter().map(|(id, disk)| {
            let drill = disk.drill.as_ref().map(|drill| (drill.node.clone(), drill.until));
            let (io, top) = (disk.io.clone(), disk.top.clone());
            let kept = KeptDisk { io, top, size_bytes: disk.size_bytes, drill, hangs: disk.hang.hangs() };
            (id.clone(), kept)
        });
        let places = self.parking.as_ref().map_or(self.places, Parking::number);
        let kept = Kept {
            places,
            drills: self.drills,
            disks: disks.collect(),
            leavings: self.leavings.clone(),
            interrupted: self.interrupted || self.phase == Phase::Turning,
            wants_pause: self.wants_pause,
        };
        if kept == Kept::default() {
            // Nothing is to be known. That there is no file is as well.
            let _ = std::fs::remove_file(&self.file);
            return;
        }
        let text = serde_json::to_vec(&kept).unwrap_or_default();
        if let Err(error) = write_volatile(&self.file, &text) {
            warn!(%error, "the state of suspended disks is not kept: another owner would begin their clocks anew");
        }
    }

    /// Somebody wants the VM to be paused, or to go on.
    pub(in crate::owner) fn want_pause(&mut self, wanted: bool, reply: Reply) {
        self.wants_pause = wanted;
        if !self.disks.is_empty() {
            self.keep();
        }
        if self.phase == Phase::Turning {
            // What the turn does to the VM was decided before.
            self.standstills.push(reply);
        } else {
            // Whoever asked may have gone.
            let _ = reply.send(Ok(json!({})));
        }
    }
}

impl Owner {
    /// Removes what a former owner did not come to remove. What a disk still stands on goes with the turn that takes it elsewhere.
    fn remove_leavings(&mut self) {
        if self.io.leavings.is_empty() || self.io.hung().is_some() {
            return;
        }
        let (qmp, leavings) = (self.qmp.clone(), self.io.leavings.clone());
        self.jobs.spawn(async move {
            let mut removed = Vec::new();
            for node in leavings {
                if qmp.call("blockdev-del", json!({"node-name": node})).await.is_ok() {
                    removed.push(node);
                }
            }
            Finished::Io(IoNews::Removed(removed))
        });
    }

    /// Disks as a former owner knew them, or as they are configured.
    pub(in crate::owner) fn begin_io(&mut self) {
        let kept = self.io.kept();
        (self.io.places, self.io.drills) = (kept.places, kept.drills);
        (self.io.interrupted, self.io.wants_pause) = (kept.interrupted, kept.wants_pause);
        // A disk that is leaving may do so for long, and fails like any other meanwhile.
        self.follow(&[Stage::Present, Stage::Leaving]);
        for (id, kept) in kept.disks {
            let same = |disk: &&mut Disk| disk.io.retry.engine == kept.io.retry.engine;
            if let Some(disk) = self.io.disks.get_mut(&id).filter(same) {
                (disk.io, disk.top, disk.size_bytes) = (kept.io, kept.top, kept.size_bytes);
                disk.drill = kept.drill.map(|(node, until)| Drill { node, add: None, until });
                if kept.hangs {
                    disk.hang = Detector::of_hung(Uptime::now());
                }
            }
        }
        self.io.leavings = kept.leavings;
        self.remove_leavings();
        // Whoever adopted the VM made them, and what they gave back stops it.
        let has_proxies = self.io.proxies().next().is_some();
        self.io.gave_back = has_proxies;
        if !self.io.disks.is_empty() {
            self.look_at_io();
        }
    }
}
