//! Laws of the NBD server: whatever comes in, in whatever pieces, it answers what can be answered, and goes on serving others.

use std::sync::Arc;
use std::time::Duration;

use launcher::nbd::{Kind, Park, Server};
use proptest::prelude::*;
use proptest::sample::Index;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(10);

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let head = [0x2560_9513_u32.to_be_bytes(), u32::from(command).to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// All that a client says in a life by the book, to a park that answers EIO. A request waits for no reply, so replies may change places; all
/// are alike but for the cookie, which is the same here.
fn conversation() -> Vec<u8> {
    let export = b"\0\0\0\x04park\0\0";
    let context = b"\0\0\0\x04park\0\0\0\x01\0\0\0\x0fbase:allocation";
    [
        3_u32.to_be_bytes().to_vec(),
        option(8, &[]),
        option(3, &[]),
        option(10, context),
        option(6, export),
        option(7, export),
        request(0, 1, 0, 512),
        [request(1, 1, 512, 8), b"8 bytes.".to_vec()].concat(),
        request(3, 1, 0, 0),
        request(4, 1, 0, 4096),
        request(7, 1, 0, 4096),
        request(2, 1, 0, 0),
    ]
    .concat()
}

/// What a server says to these bytes, sent in these pieces, until it closes the connection. With `leave` the client closes its side first: a
/// life by the book has no need to, and what was not answered by then is not.
async fn said(server: &Server, bytes: &[u8], cuts: &[Index], leave: bool) -> Vec<u8> {
    let (mut reader, mut writer) = UnixStream::connect(server.path()).await.expect("connected").into_split();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let write = async {
        for piece in cuts.windows(2) {
            // The server may have had enough, and says no more then.
            if writer.write_all(&bytes[piece[0]..piece[1]]).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        if leave {
            let _ = writer.shutdown().await;
        }
        writer
    };
    let read = async {
        let mut heard = Vec::new();
        // What was heard until the connection broke is what was said.
        let _ = reader.read_to_end(&mut heard).await;
        heard
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(read, write).0 }).await.expect("it closes in time")
}

/// Runs a part with a server that has the export `park`.
fn with_server<T>(part: impl AsyncFnOnce(&Server) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let server = Server::bind(&folder.path().join("nbd.sock")).expect("a socket");
        server.add("park", Arc::new(Park::new(1 << 20, Kind::Full)));
        part(&server).await
    })
}

proptest! {
    #[test]
    fn pieces_make_no_difference(cuts in prop::collection::vec(any::<Index>(), 0..40)) {
        let (whole, torn) = with_server(async |server| {
            (said(server, &conversation(), &[], false).await, said(server, &conversation(), &cuts, false).await)
        });
        prop_assert_eq!(whole.len(), torn.len());
        prop_assert_eq!(whole, torn);
    }

    #[test]
    fn nonsense_harms_nobody_else(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..8),
        end in any::<Index>(),
        more in prop::collection::vec(any::<u8>(), 0..200),
        cuts in prop::collection::vec(any::<Index>(), 0..8),
    ) {
        let good = conversation();
        let mut bad = good.clone();
        for (place, byte) in changes {
            bad[place.index(good.len())] = byte;
        }
        bad.truncate(end.index(good.len() + 1));
        bad.extend(more);
        let (before, after) = with_server(async |server| {
            let before = said(server, &good, &[], false).await;
            said(server, &bad, &cuts, true).await;
            (before, said(server, &good, &[], false).await)
        });
        prop_assert_eq!(before, after);
    }
}
