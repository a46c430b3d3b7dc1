//! The nodes that a disk's requests wait in while its storage is broken: NBD exports of this process, one server for all disks.
//!
//! They answer EIO unless they are told to be silent, since every stop of the VM flushes all nodes and a silent one then hangs QEMU for good.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use devices::DeviceId;
use serde_json::{Value, json};

use crate::nbd::{Kind, Park, Server, ServerError};

/// Where a disk's requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seat {
    /// To its own top node.
    Top,
    /// To a node of the disk's size that keeps them.
    Park,
    /// To a node of 512 bytes: a virtio-blk disk refuses reads and writes itself, as out of range. Flushes are kept: a later one is answered truthfully.
    Tiny,
}

impl Seat {
    fn word(self) -> &'static str {
        match self {
            Seat::Top => "top",
            Seat::Park => "park",
            Seat::Tiny => "tiny",
        }
    }

    /// The disk that a node of a parking belongs to.
    pub fn of_node(node: &str) -> Option<DeviceId> {
        [Seat::Park, Seat::Tiny].iter().find_map(|seat| {
            let (id, number) = node.rsplit_once(&format!("-{}-", seat.word()))?;
            number.bytes().all(|b| b.is_ascii_digit()).then(|| id.parse().ok())?
        })
    }
}

/// Size of the node that a disk is too large for.
const TINY_BYTES: u64 = 512;

struct Place {
    node: String,
    park: Arc<Park>,
    /// Whether QEMU has the node.
    made: bool,
}

/// All places, and the server that QEMU finds them on.
pub struct Parking {
    server: Server,
    places: BTreeMap<(DeviceId, Seat), Place>,
    number: u32,
}

impl Parking {
    /// One that serves on a socket; former owners had `number` places.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(socket: &Path, number: u32) -> Result<Parking, ServerError> {
        Ok(Parking { server: Server::bind(socket)?, places: BTreeMap::new(), number })
    }

    /// How many places there were: a node's name is used once, also by the owners to come.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The node of a disk's place, which is prepared if there is none; with it the arguments of `blockdev-add`, if QEMU has to be told of it.
    pub fn place(&mut self, id: &DeviceId, seat: Seat, disk_bytes: u64) -> (String, Option<Value>) {
        let number = &mut self.number;
        let server = &self.server;
        let place = self.places.entry((id.clone(), seat)).or_insert_with(|| {
            *number += 1;
            let node = format!("{id}-{}-{number}", seat.word());
            let (size, kind) = match seat {
                Seat::Tiny => (TINY_BYTES, Kind::Tiny),
                Seat::Top | Seat::Park => (disk_bytes, Kind::Full),
            };
            let park = Arc::new(Park::new(size, kind));
            server.add(&node, Arc::clone(&park));
            Place { node, park, made: false }
        });
        let path = server.path().display().to_string();
        let node = place.node.clone();
        let add = (!place.made).then(|| {
            json!({
                "driver": "nbd", "node-name": node, "export": node, "server": {"type": "unix", "path": path},
            })
        });
        place.made = true;
        (node, add)
    }

    /// Whether a node is one of this parking.
    pub fn serves(&self, node: &str) -> bool {
        self.places.values().any(|place| place.node == node)
    }

    /// The place itself: for whoever silences it.
    pub fn park(&self, id: &DeviceId, seat: Seat) -> Option<Arc<Park>> {
        self.places.get(&(id.clone(), seat)).map(|place| Arc::clone(&place.park))
    }

    /// Answers EIO to everything that waits, and to what comes. Returns whether anything was silent.
    pub fn give_back(&self) -> bool {
        let mut silent = false;
        for place in self.places.values() {
            silent |= place.park.is_silent();
            place.park.give_back();
        }
        silent
    }

    /// Whether anything keeps what comes: QEMU freezes if it drains then.
    pub fn is_silent(&self) -> bool {
        self.places.values().any(|place| place.park.is_silent())
    }

    /// How many requests of a disk wait.
    pub fn held(&self, id: &DeviceId) -> usize {
        self.places.iter().filter(|((other, _), _)| other == id).map(|(_, place)| place.park.held()).sum()
    }

    /// Forgets the places of a disk; returns the nodes that QEMU has of them.
    pub fn forget(&mut self, id: &DeviceId) -> Vec<String> {
        let mut nodes = Vec::new();
        self.places.retain(|(other, _), place| {
            if other == id {
                self.server.remove(&place.node);
                nodes.extend(place.made.then(|| place.node.clone()));
            }
            other != id
        });
        nodes
    }
}
