//! `vhost-user-net SOCKET`: the other end of a guest's NIC. A real vhost-user backend that listens on a unix socket, serves any number of
//! QEMUs, two queue pairs each, and behaves as one host on the wire: 10.77.0.1, which answers ARP and ICMP echo. SIGTERM and SIGINT end it,
//! and its socket goes with it.
//!
//! What the host answers is in `tests::vhost_user`; this file only speaks the protocol.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{SigSet, Signal};
use tests::vhost_user::{answer, relay};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{Error, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Daemon = VhostUserDaemon<Arc<Mutex<Nic>>>;

/// Receive and transmit queue of each pair.
const QUEUES: usize = 4;
const QUEUE_SIZE: usize = 1024;
/// Bits of the virtio specification: the modern layout, the control queue (QEMU's own) and several queue pairs.
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
const VIRTIO_NET_F_MQ: u64 = 1 << 22;

struct Nic {
    memory: Memory,
}

impl Nic {
    /// Answers every frame the guest sent, in the receive queue of the same pair.
    fn serve(&self, sent: &VringRwLock, received: &VringRwLock) -> std::io::Result<()> {
        let memory = self.memory.memory();
        let answered = answer(&memory, sent.get_mut().get_queue_mut(), received.get_mut().get_queue_mut())?;
        sent.signal_used_queue()?;
        if answered {
            received.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Nic {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1
            | VIRTIO_NET_F_CTRL_VQ
            | VIRTIO_NET_F_MQ
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> std::io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        queues: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        let queue = usize::from(queue);
        // A kick of a receive queue only says that there is room again.
        match (queue % 2, queues.get(queue), queue.checked_sub(1).and_then(|rx| queues.get(rx))) {
            (1, Some(sent), Some(received)) => self.serve(sent, received),
            _ => Ok(()),
        }
    }
}

/// Serves each QEMU that connects, on threads of its own. Ends with an error only.
fn serve(socket: &Path) -> Result<(), String> {
    let listener = UnixListener::bind(socket).map_err(|error| error.to_string())?;
    loop {
        let (qemu, _) = listener.accept().map_err(|error| error.to_string())?;
        let (mut daemon, backend) = backend(socket)?;
        std::thread::spawn(move || {
            if let Err(error) = relay(&qemu, &backend) {
                eprintln!("vhost-user-net: a connection ended: {error}");
            }
            match daemon.wait() {
                Ok(()) | Err(Error::HandleRequest(vhost::vhost_user::Error::Disconnected)) => {}
                Err(error) => eprintln!("vhost-user-net: a connection ended: {error}"),
            }
        });
    }
}

/// A backend for one QEMU, and our end of its connection. The crate connects by path only, so there is a socket for a moment.
fn backend(socket: &Path) -> Result<(Daemon, UnixStream), String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let nic = Arc::new(Mutex::new(Nic { memory: memory.clone() }));
    let mut daemon = VhostUserDaemon::new("vhost-user-net".to_owned(), nic, memory).map_err(|e| said(&e))?;
    let path = format!("{}.backend", socket.display());
    let listener = UnixListener::bind(&path).map_err(|e| said(&e))?;
    let started = daemon.start_client(&path).map_err(|e| said(&e));
    let removed = std::fs::remove_file(&path).map_err(|e| said(&e));
    started.and(removed)?;
    let (stream, _) = listener.accept().map_err(|e| said(&e))?;
    Ok((daemon, stream))
}

fn main() {
    let Some(socket) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: vhost-user-net SOCKET");
        std::process::exit(2);
    };
    let ending = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    ending.thread_block().expect("a thread may block its own signals");
    let path = socket.clone();
    std::thread::spawn(move || {
        if let Err(error) = serve(&path) {
            eprintln!("vhost-user-net: {}: {error}", path.display());
            std::process::exit(1);
        }
    });
    ending.wait().expect("the signals are blocked and valid");
    // It may be gone already, with its folder.
    let _ = std::fs::remove_file(&socket);
}
