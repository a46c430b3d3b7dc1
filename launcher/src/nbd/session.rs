//! A connection's requests to its export, and the replies back.
//!
//! ```text
//! receive ──▶ a task for each request ──▶ send       room: what all of them may keep in memory,
//!    ▲                                      │              taken before a request's payload is read
//!    └────────────── room ◀─────────────────┘              and given back when its reply is written
//! ```

use std::io::IoSlice;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::bytes::Bytes;
use super::export::{AnyExport, Errno};
use super::handshake::Chosen;
use super::wire::{Command, MAX_PAYLOAD, RequestHead};
use super::{Cut, Exports};

/// Requests of a connection in flight, each with a piece of memory; a large one counts as several.
const ROOM: u32 = 2 * MAX_PAYLOAD / PIECE;
const PIECE: u32 = 512 << 10;

/// What is read in one system call, but for payloads, and what small replies grow to before they are written.
const BUFFER: usize = 16 << 10;

/// Bytes of a reply up to which copying them is cheaper than another call.
const SMALL: usize = 16 << 10;

/// A reply as bytes, with the room that its request took.
struct Sent {
    head: Vec<u8>,
    data: Bytes,
    _room: OwnedSemaphorePermit,
}

/// Serves a connection until its client leaves, its export is no longer served, or it breaks the protocol.
pub(super) async fn run(
    stream: UnixStream,
    chosen: Chosen,
    mut exports: watch::Receiver<Exports>,
) -> Result<(), Cut> {
    let (reader, writer) = stream.into_split();
    let (replies, outgoing) = mpsc::unbounded_channel();
    let (name, mine) = (chosen.name.clone(), chosen.export.clone());
    let removed =
        exports.wait_for(|exports| !exports.get(&name).is_some_and(|served| Arc::ptr_eq(served, &mine)));
    tokio::select! {
        biased;
        _ = removed => Err(Cut::Removed),
        ended = async { tokio::try_join!(receive(reader, chosen, replies), send(writer, outgoing)) } => ended.map(|_| ()),
    }
}

/// Reads requests until the client takes its leave; returns when all of them are answered.
async fn receive(
    stream: OwnedReadHalf,
    chosen: Chosen,
    replies: mpsc::UnboundedSender<Sent>,
) -> Result<(), Cut> {
    let room = Arc::new(Semaphore::new(ROOM as usize));
    let mut reader = BufReader::with_capacity(BUFFER, stream);
    // Dropping it drops the requests: nobody is there to be answered.
    let mut running = JoinSet::new();
    chosen.export.connected().await;
    loop {
        let mut head = [0; RequestHead::SIZE];
        reader.read_exact(&mut head).await?;
        let head = RequestHead::parse(&head)
            .ok_or_else(|| Cut::Nonsense("a request without its magic number".into()))?;
        if head.command == Command::Disconnect {
            break;
        }
        let mut checked = head.check(chosen.export.size(), chosen.export.features());
        if head.command == Command::BlockStatus && chosen.context.is_none() {
            checked = Err(Errno::Invalid);
        }
        let memory = if checked.is_ok() { head.memory() } else { 0 };
        let room = tokio::select! {
            room = room.clone().acquire_many_owned(1 + memory / PIECE) => room.expect("nobody closes it"),
            // Nothing is read meanwhile that would tell: a client that is gone must not keep its requests waiting at the storage.
            gone = reader.get_ref().as_ref().ready(Interest::PRIORITY) => return Err(closed(gone)),
        };
        let data = payload(&mut reader, head, checked.is_ok()).await?;
        while running.try_join_next().is_some() {}
        running.spawn(answer(head, data, checked, room, Answering::of(&chosen, &replies)));
    }
    tokio::select! {
        () = async { while running.join_next().await.is_some() {} } => Ok(()),
        more = reader.read_u8() => match more {
            Ok(_) => Err(Cut::Nonsense("a request after it took its leave".into())),
            Err(gone) => Err(gone.into()),
        },
    }
}

fn closed(gone: std::io::Result<tokio::io::Ready>) -> Cut {
    Cut::Gone(gone.err().unwrap_or_else(|| std::io::ErrorKind::UnexpectedEof.into()))
}

/// What follows the head of a request; nothing is kept of what is refused anyway.
async fn payload(
    reader: &mut BufReader<OwnedReadHalf>,
    head: RequestHead,
    wanted: bool,
) -> Result<Bytes, Cut> {
    if wanted {
        let mut data = Bytes::leftover(head.payload() as usize);
        reader.read_exact(&mut data).await?;
        return Ok(data);
    }
    let length = u64::from(head.payload());
    tokio::io::copy(&mut reader.take(length), &mut tokio::io::sink()).await?;
    Ok(Bytes::default())
}

/// What it takes to answer a request.
struct Answering {
    export: Arc<dyn AnyExport>,
    structured: bool,
    context: u32,
    replies: mpsc::UnboundedSender<Sent>,
}

impl Answering {
    fn of(chosen: &Chosen, replies: &mpsc::UnboundedSender<Sent>) -> Answering {
        Answering {
            export: chosen.export.clone(),
            structured: chosen.structured,
            context: chosen.context.unwrap_or_default(),
            replies: replies.clone(),
        }
    }
}

async fn answer(
    head: RequestHead,
    data: Bytes,
    checked: Result<(), Errno>,
    room: OwnedSemaphorePermit,
    with: Answering,
) {
    let outcome = match (checked, head.request(data)) {
        (Ok(()), Some(request)) => with.export.handle(request).await,
        (Err(errno), _) => Err(errno),
        (Ok(()), None) => Err(Errno::Invalid),
    };
    let (head, data) = head.reply(with.structured, with.context, outcome);
    // The other end is gone only when the connection is.
    let _ = with.replies.send(Sent { head, data, _room: room });
}

/// Writes replies until there are no more to come. Small ones that are ready together go together; large ones are not copied.
async fn send(mut stream: OwnedWriteHalf, mut outgoing: mpsc::UnboundedReceiver<Sent>) -> Result<(), Cut> {
    let mut small = Vec::with_capacity(BUFFER);
    while let Some(Sent { head, data, _room }) = outgoing.recv().await {
        small.extend(head);
        if data.len() < SMALL {
            small.extend_from_slice(&data);
            if !outgoing.is_empty() && small.len() < BUFFER {
                continue;
            }
            stream.write_all(&small).await?;
        } else {
            write_both(&mut stream, &small, &data).await?;
            // The client has something to do now, and what it asks for next had better be at the storage before more is copied.
            tokio::task::yield_now().await;
        }
        small.clear();
    }
    Ok(())
}

async fn write_both(stream: &mut OwnedWriteHalf, first: &[u8], second: &[u8]) -> Result<(), Cut> {
    let mut left = &mut [IoSlice::new(first), IoSlice::new(second)][..];
    while !left.is_empty() {
        let written = stream.write_vectored(left).await?;
        if written == 0 {
            return Err(Cut::Gone(std::io::ErrorKind::WriteZero.into()));
        }
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}
