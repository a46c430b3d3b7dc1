//! A small NBD server on a unix socket: QEMU's I/O sent to code of ours.
//!
//! ```text
//!              handshake ──▶ session ──▶ Export::handle    many requests at once,
//! QEMU ◀──────── wire ◀──────────┘ ◀───────────┘           answered in any order
//! ```
//!
//! [`Server`] listens and has the exports by name; `handshake` leads a client to one of them, `session` carries its requests there and the
//! replies back, `wire` has the bytes of both. What an export is made of is its own affair ([`Export`]): [`Park`] has no storage at all,
//! `crate::proxy` has a file.
//!
//! The fixed-newstyle protocol with structured replies and `base:allocation`, as QEMU 7.2 and later speak it: no TLS, no extended headers.
//! What one client can make the server keep in memory is bounded ([`MAX_PAYLOAD`], and twice that for all its requests). A client that breaks
//! the protocol is cut off, with the reason in the log.

mod bytes;
mod export;
mod handshake;
mod park;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, warn};

pub use bytes::Bytes;
use export::AnyExport;
pub use export::{Errno, Export, Extent, Features, Reply, Request};
pub use park::{Held, Kind, Park};
pub use wire::MAX_PAYLOAD;

/// Clients at once; more wait to be accepted. Each layer of a chain has one.
const CLIENTS: usize = 256;

/// How long a client may take for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

type Exports = BTreeMap<String, Arc<dyn AnyExport>>;

/// A socket that cannot be served on.
#[derive(Debug, Error)]
#[error("NBD socket {}: {source}; see that its folder exists, is yours, and that the path is shorter than 108 bytes", path.display())]
pub struct ServerError {
    path: PathBuf,
    source: std::io::Error,
}

/// A running server. Dropping it ends every connection and removes the socket.
pub struct Server {
    path: PathBuf,
    exports: watch::Sender<Exports>,
    listening: JoinHandle<()>,
}

impl Server {
    /// Listens on `path` (mode 0600), replacing what a dead process left there. Needs a runtime around it; serves nothing until [`Server::add`].
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(path: &Path) -> Result<Server, ServerError> {
        let failed = |source| ServerError { path: path.to_owned(), source };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
        let exports = watch::Sender::new(Exports::new());
        let listening = tokio::spawn(listen(listener, exports.subscribe()));
        Ok(Server { path: path.to_owned(), exports, listening })
    }

    /// Serves an export under a name. One that had the name before is replaced, and its connections end.
    pub fn add(&self, name: &str, export: Arc<impl Export>) {
        self.exports.send_modify(|exports| {
            exports.insert(name.to_owned(), export);
        });
    }

    /// Serves that export no longer; its connections end. `false` if there is none of that name.
    pub fn remove(&self, name: &str) -> bool {
        self.exports.send_if_modified(|exports| exports.remove(name).is_some())
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.listening.abort();
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn listen(listener: UnixListener, exports: watch::Receiver<Exports>) {
    let mut clients = JoinSet::new();
    let mut number = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if clients.len() < CLIENTS => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                number += 1;
                clients.spawn(client(number, stream, exports.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: it passes, and spinning would not help it.
                warn!(%error, "an NBD client could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One connection, from its greeting to its end.
async fn client(number: u64, mut stream: UnixStream, exports: watch::Receiver<Exports>) {
    let negotiated = tokio::time::timeout(HANDSHAKE, handshake::negotiate(&mut stream, &exports)).await;
    let result = match negotiated {
        Err(_) => Err(Cut::Slow),
        Ok(Err(cut)) => Err(cut),
        Ok(Ok(chosen)) => {
            debug!(client = number, export = chosen.name, "NBD client");
            session::run(stream, chosen, exports).await
        }
    };
    match result {
        Ok(()) => debug!(client = number, "NBD client left"),
        Err(cut @ (Cut::Gone(_) | Cut::Aborted | Cut::Removed)) => {
            debug!(client = number, "NBD client left: {cut}");
        }
        Err(cut) => warn!(client = number, "NBD client was cut off: {cut}"),
    }
}

/// Why a connection ended that did not end by the book.
#[derive(Debug, Error)]
enum Cut {
    #[error("it is gone ({0})")]
    Gone(#[from] std::io::Error),
    #[error("it gave up the handshake")]
    Aborted,
    #[error("its export is no longer served")]
    Removed,
    #[error("its handshake took longer than {} s", HANDSHAKE.as_secs())]
    Slow,
    #[error("it asked for the export {0:?}, which is not served")]
    UnknownExport(String),
    #[error("it sent what is not NBD: {0}")]
    Nonsense(String),
}
