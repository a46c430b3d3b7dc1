//! The host on a pair of virtio rings, whoever hands them over: vhost-user or VDUSE.

use std::io::{Error, Read, Result, Write};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::reply_to;

/// `struct virtio_net_hdr_v1`; all zero but its last member, the number of buffers, which is one.
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// Takes every frame the guest sent and puts the answers into the receive ring of the same pair. A frame that finds no room is lost, as on
/// any wire. Says whether there was an answer. After an error the frame in hand is still in its ring, to be tried again with other memory.
pub fn answer(memory: &GuestMemoryMmap, sent: &mut Queue, received: &mut Queue) -> Result<bool> {
    let mut answered = false;
    while let Some(chain) = sent.pop_descriptor_chain(memory) {
        let head = chain.head_index();
        let delivered = read(memory, chain).and_then(|frame| match reply_to(&frame) {
            Some(answer) => deliver(memory, received, &answer),
            None => Ok(false),
        });
        match delivered {
            Ok(delivered) => answered |= delivered,
            Err(error) => {
                sent.go_to_previous_position();
                return Err(error);
            }
        }
        sent.add_used(memory, head, 0).map_err(Error::other)?;
    }
    Ok(answered)
}

/// The frame in a chain of the transmit ring, without the header.
fn read(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    chain.reader(memory).map_err(Error::other)?.read_to_end(&mut bytes)?;
    Ok(bytes.split_off(HEADER.len().min(bytes.len())))
}

/// Puts a frame into the next buffer of the receive ring, if there is one and the frame fits.
fn deliver(memory: &GuestMemoryMmap, received: &mut Queue, frame: &[u8]) -> Result<bool> {
    let Some(chain) = received.pop_descriptor_chain(memory) else { return Ok(false) };
    let head = chain.head_index();
    let length = match write(memory, chain, frame) {
        Ok(length) => length,
        Err(error) => {
            received.go_to_previous_position();
            return Err(error);
        }
    };
    received.add_used(memory, head, length).map_err(Error::other)?;
    Ok(length > 0)
}

/// How many bytes were written: all or none.
fn write(memory: &GuestMemoryMmap, chain: Chain<'_>, frame: &[u8]) -> Result<u32> {
    let mut writer = chain.writer(memory).map_err(Error::other)?;
    if writer.available_bytes() >= HEADER.len() + frame.len() {
        writer.write_all(&HEADER)?;
        writer.write_all(frame)?;
    }
    u32::try_from(writer.bytes_written()).map_err(Error::other)
}
