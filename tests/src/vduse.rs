//! A vDPA network device without hardware: the kernel's VDUSE hands the rings of a guest's NIC to this process, which is the host of
//! [`crate::vhost_user`] on its wire. One queue pair; any number of guests, one after the other.

mod kernel;

use std::io::{Error, Result};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use devices::units::Mac;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::vhost_user::answer;
use kernel::{Device, Message, Request, RingInfo};

/// Indices of the rings.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
/// Of the virtio status: the driver is ready.
const DRIVER_OK: u8 = 4;

/// The device and what its present driver has set up.
#[derive(Debug)]
pub struct Nic {
    device: Device,
    memory: GuestMemoryMmap,
    received: Queue,
    sent: Queue,
    /// Fires when there are frames in `sent`. That `received` has room again nobody waits for.
    kick: EventFd,
}

impl Nic {
    /// Makes the device `name`; from then on `vdpa dev add name NAME mgmtdev vduse` takes it, while [`Nic::serve`] runs.
    pub fn create(name: &str, mac: Mac) -> Result<Nic> {
        Ok(Nic {
            memory: GuestMemoryMmap::new(),
            received: Queue::new(kernel::QUEUE_SIZE).map_err(Error::other)?,
            sent: Queue::new(kernel::QUEUE_SIZE).map_err(Error::other)?,
            kick: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            device: Device::create(name, mac)?,
        })
    }

    /// Serves driver after driver until `end` is readable.
    pub fn serve(&mut self, end: impl AsFd) -> Result<()> {
        loop {
            let watched = [end.as_fd(), self.device.as_fd(), self.kick.as_fd()];
            let mut watched = watched.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            poll(&mut watched, PollTimeout::NONE)?;
            let [ending, asked, kicked] = watched.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if !ending.is_empty() {
                return Ok(());
            }
            if asked.contains(PollFlags::POLLERR) {
                return Err(Error::other(
                    "the kernel gave the device up: a request was not answered in time",
                ));
            }
            if !asked.is_empty()
                && let Some(message) = self.device.read()?
            {
                self.obey(&message)?;
            }
            if !kicked.is_empty() {
                self.kick.read()?;
                self.exchange()?;
            }
        }
    }

    /// Takes the device away.
    pub fn destroy(self) -> Result<()> {
        self.device.destroy()
    }

    /// Does what the kernel asks. An error is told to the kernel, since a guest waits for it, and then ends the server.
    fn obey(&mut self, message: &Message) -> Result<()> {
        let done = match message.request {
            Request::NextAvailable { index: RECEIVE } => Ok(self.received.next_avail()),
            Request::NextAvailable { .. } => Ok(self.sent.next_avail()),
            Request::Status(0) => {
                self.stop();
                Ok(0)
            }
            Request::Status(status) if status & DRIVER_OK != 0 => self.start().map(|()| 0),
            Request::Status(_) => Ok(0),
            Request::Memory => self.remap().map(|()| 0),
            Request::Unknown(kind) => Err(Error::other(format!("the kernel made a request of kind {kind}"))),
        };
        self.device.answer(message, done.as_ref().ok().copied())?;
        done.map(drop)
    }

    fn start(&mut self) -> Result<()> {
        self.remap()?;
        for (index, queue) in [(RECEIVE, &mut self.received), (TRANSMIT, &mut self.sent)] {
            set_up(queue, &self.device.ring(index)?, &self.memory)?;
        }
        // A reset takes it away.
        self.device.set_kick(TRANSMIT, &self.kick)
    }

    /// The driver has gone, and its memory with it. Where its rings stood may still be asked.
    fn stop(&mut self) {
        self.received.set_ready(false);
        self.sent.set_ready(false);
        self.memory = GuestMemoryMmap::new();
    }

    fn remap(&mut self) -> Result<()> {
        self.memory = self.device.memory()?;
        Ok(())
    }

    /// Answers the frames that were sent, and interrupts the driver.
    fn exchange(&mut self) -> Result<()> {
        if !self.sent.ready() {
            return Ok(());
        }
        let answered = match answer(&self.memory, &mut self.sent, &mut self.received) {
            Ok(answered) => answered,
            // A driver in this very kernel (virtio_vdpa) maps its buffers with the first of them, and nobody is told.
            Err(_) => {
                self.remap()?;
                answer(&self.memory, &mut self.sent, &mut self.received)?;
                true
            }
        };
        self.device.interrupt(TRANSMIT)?;
        if answered {
            self.device.interrupt(RECEIVE)?;
        }
        Ok(())
    }
}

/// Takes a ring where the driver has put it, and goes on where it was left. A ring that is served already stays as it is.
fn set_up(queue: &mut Queue, ring: &RingInfo, memory: &GuestMemoryMmap) -> Result<()> {
    if queue.ready() || ring.descriptors == 0 {
        return Ok(());
    }
    let size = u16::try_from(ring.size).map_err(Error::other)?;
    queue.try_set_size(size).map_err(Error::other)?;
    queue.try_set_desc_table_address(GuestAddress(ring.descriptors)).map_err(Error::other)?;
    queue.try_set_avail_ring_address(GuestAddress(ring.available)).map_err(Error::other)?;
    queue.try_set_used_ring_address(GuestAddress(ring.used)).map_err(Error::other)?;
    queue.set_next_avail(ring.next_available);
    queue.set_next_used(queue.used_idx(memory, Ordering::Acquire).map_err(Error::other)?.0);
    queue.set_ready(true);
    Ok(())
}
