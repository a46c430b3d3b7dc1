//! The server against a client that says exactly what a test wants it to say; real clients are tried in the `tests` crate.

use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::wire::{OptionHead, answer, option};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const STATUS: u16 = 7;

/// A server with an export `park`.
struct Scene {
    server: Server,
    park: Arc<Park>,
    _folder: TempDir,
}

fn scene(size: u64, kind: Kind) -> Scene {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::bind(&folder.path().join("nbd.sock")).expect("a socket");
    let park = Arc::new(Park::new(size, kind));
    server.add("park", park.clone());
    Scene { server, park, _folder: folder }
}

impl Scene {
    async fn held(&self, total: usize) {
        let mut held = self.park.changed();
        let reached = held.wait_for(|held| held.total() == total);
        tokio::time::timeout(PATIENCE, reached).await.expect("in time").expect("the park is ours");
    }
}

struct Client(UnixStream);

impl Client {
    /// Connects and exchanges flags.
    async fn greet(server: &Server, flags: u32) -> Client {
        let mut stream = UnixStream::connect(server.path()).await.expect("connected");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.expect("greeted");
        stream.write_all(&flags.to_be_bytes()).await.expect("sent");
        Client(stream)
    }

    /// Ready for requests, with simple replies.
    async fn ready(server: &Server) -> Client {
        let mut client = Client::greet(server, 3).await;
        let answers = client.option(option::GO, &named("park", &[0, 0])).await;
        assert_eq!(answers.last().expect("an answer").0, answer::ACK);
        client
    }

    /// Sends an option; its answers, up to the one that is the last.
    async fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let head = [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
        self.0.write_all(&[&head, data].concat()).await.expect("sent");
        let mut answers = Vec::new();
        loop {
            assert_eq!(self.0.read_u64().await.expect("a magic number"), 0x0003_e889_0455_65a9);
            assert_eq!(self.0.read_u32().await.expect("an option"), number);
            let kind = self.0.read_u32().await.expect("a kind");
            let mut data = vec![0; self.0.read_u32().await.expect("a length") as usize];
            self.0.read_exact(&mut data).await.expect("data");
            answers.push((kind, data));
            if kind == answer::ACK || kind >= answer::ERR_UNSUP {
                return answers;
            }
        }
    }

    async fn request(&mut self, command: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
        head.extend([0, 0]);
        head.extend(command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend(length.to_be_bytes());
        self.0.write_all(&[&head, data].concat()).await.expect("sent");
    }

    /// A simple reply: its error and its cookie.
    async fn reply(&mut self) -> (u32, u64) {
        let reply = async {
            assert_eq!(self.0.read_u32().await.expect("a magic number"), 0x6744_6698);
            (self.0.read_u32().await.expect("an error"), self.0.read_u64().await.expect("a cookie"))
        };
        tokio::time::timeout(PATIENCE, reply).await.expect("a reply in time")
    }

    /// The server closes the connection, having said no more.
    async fn closed(&mut self) {
        let read = tokio::time::timeout(PATIENCE, self.0.read_u8()).await.expect("closed in time");
        assert!(read.is_err(), "{read:?}");
    }
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), rest].concat()
}

#[tokio::test]
async fn the_handshake_tells_what_there_is() {
    let scene = scene(1 << 20, Kind::Full);
    let mut client = Client::greet(&scene.server, 3).await;
    let list = client.option(option::LIST, &[]).await;
    assert_eq!(list, [(answer::SERVER, named("park", &[])), (answer::ACK, vec![])]);
    assert_eq!(client.option(99, b"what").await, [(answer::ERR_UNSUP, vec![])]);
    assert_eq!(client.option(option::LIST, b"x").await, [(answer::ERR_INVALID, vec![])]);
    assert_eq!(client.option(option::GO, &named("other", &[0, 0])).await, [(answer::ERR_UNKNOWN, vec![])]);
    assert_eq!(client.option(option::GO, &named("park", &[0, 9])).await, [(answer::ERR_INVALID, vec![])]);
    let context = [&named("park", &1_u32.to_be_bytes())[..], &named("base:allocation", &[])].concat();
    let early = client.option(option::SET_META_CONTEXT, &context).await;
    assert_eq!(early, [(answer::ERR_INVALID, vec![])], "before structured replies");
    assert_eq!(client.option(option::STRUCTURED_REPLY, &[]).await, [(answer::ACK, vec![])]);
    let set = client.option(option::SET_META_CONTEXT, &context).await;
    assert_eq!(set, [(answer::ACK, vec![])], "a park tells nothing of allocation");
    let info = client.option(option::INFO, &named("park", &[0, 0])).await;
    assert_eq!(info[0].1[2..10], (1_u64 << 20).to_be_bytes());
    assert_eq!(client.option(option::ABORT, &[]).await, [(answer::ACK, vec![])]);
    client.closed().await;
}

#[tokio::test]
async fn the_oldest_way_in_still_works() {
    let scene = scene(512, Kind::Full);
    for (flags, length) in [(1, 134), (3, 10)] {
        let mut client = Client::greet(&scene.server, flags).await;
        let head = [&b"IHAVEOPT"[..], &[0, 0, 0, 1, 0, 0, 0, 4], b"park"].concat();
        client.0.write_all(&head).await.expect("sent");
        let mut answer = vec![0; length];
        client.0.read_exact(&mut answer).await.expect("answered");
        assert_eq!(answer[..8], 512_u64.to_be_bytes());
        client.request(FLUSH, 7, 0, 0, &[]).await;
        assert_eq!(client.reply().await, (5, 7));
        client.request(DISCONNECT, 8, 0, 0, &[]).await;
        client.closed().await;
    }
    let mut client = Client::greet(&scene.server, 3).await;
    let head = [&b"IHAVEOPT"[..], &[0, 0, 0, 1, 0, 0, 0, 2], b"no"].concat();
    client.0.write_all(&head).await.expect("sent");
    client.closed().await;
}

#[tokio::test]
async fn nonsense_is_cut_off() {
    let scene = scene(512, Kind::Full);
    Client::greet(&scene.server, 0x80).await.closed().await;
    let mut client = Client::greet(&scene.server, 3).await;
    client.0.write_all(&[0; OptionHead::SIZE]).await.expect("sent");
    client.closed().await;
    let mut client = Client::greet(&scene.server, 3).await;
    client.0.write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").await.expect("sent");
    client.closed().await;
    let mut client = Client::ready(&scene.server).await;
    client.0.write_all(&[0; 28]).await.expect("sent");
    client.closed().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_the_connection_goes_on() {
    let scene = scene(1 << 30, Kind::Full);
    let mut client = Client::ready(&scene.server).await;
    let large = vec![0; (MAX_PAYLOAD + 1) as usize];
    for (command, offset, length, data, errno) in [
        (READ, 0, MAX_PAYLOAD + 1, &[][..], 22),
        (WRITE, 0, MAX_PAYLOAD + 1, &large[..], 22),
        (READ, 0, 0, &[], 22),
        (READ, (1 << 30) - 1, 2, &[], 22),
        (READ, u64::MAX, 2, &[], 22),
        (WRITE, 1 << 30, 1, b"x", 28),
        (STATUS, 0, 512, &[], 22),
        (77, 0, 0, &[], 22),
    ] {
        client.request(command, 1, offset, length, data).await;
        assert_eq!(client.reply().await, (errno, 1), "command {command}, offset {offset}, length {length}");
    }
    client.request(WRITE, 2, 0, 1, b"x").await;
    assert_eq!(client.reply().await, (5, 2));
}

#[tokio::test]
async fn a_park_keeps_what_comes_while_it_is_silent() {
    let scene = scene(1 << 20, Kind::Full);
    let mut client = Client::ready(&scene.server).await;
    client.request(READ, 1, 0, 512, &[]).await;
    assert_eq!(client.reply().await, (5, 1), "it answers by default");
    scene.park.hold();
    client.request(READ, 2, 0, 512, &[]).await;
    client.request(WRITE, 3, 0, 4, b"data").await;
    client.request(FLUSH, 4, 0, 0, &[]).await;
    scene.held(3).await;
    assert_eq!(*scene.park.changed().borrow(), Held { reads: 1, writes: 1, flushes: 1 });
    // Silent again at once: what it had is answered all the same.
    scene.park.give_back();
    scene.park.hold();
    let mut answered = [client.reply().await, client.reply().await, client.reply().await];
    answered.sort_unstable();
    assert_eq!(answered, [(5, 2), (5, 3), (5, 4)]);
    client.request(FLUSH, 5, 0, 0, &[]).await;
    scene.held(1).await;
    drop(client);
    scene.held(0).await;
}

#[tokio::test]
async fn a_tiny_park_keeps_flushes_alone() {
    let scene = scene(512, Kind::Tiny);
    scene.park.hold();
    let mut client = Client::ready(&scene.server).await;
    client.request(FLUSH, 1, 0, 0, &[]).await;
    client.request(READ, 2, 0, 512, &[]).await;
    assert_eq!(client.reply().await, (5, 2));
    assert_eq!(scene.park.held(), 1);
    scene.park.give_back();
    assert_eq!(client.reply().await, (5, 1));
}

#[tokio::test]
async fn requests_end_with_a_client_that_has_more_of_them_than_there_is_room() {
    let scene = scene(1 << 30, Kind::Full);
    scene.park.hold();
    let mut client = Client::ready(&scene.server).await;
    for cookie in 0..4 {
        client.request(READ, cookie, 0, MAX_PAYLOAD, &[]).await;
    }
    scene.held(1).await;
    drop(client);
    scene.held(0).await;
}

#[tokio::test]
async fn what_is_in_flight_is_answered_after_the_leave() {
    let scene = scene(1 << 20, Kind::Full);
    scene.park.hold();
    let mut client = Client::ready(&scene.server).await;
    client.request(FLUSH, 1, 0, 0, &[]).await;
    client.request(DISCONNECT, 2, 0, 0, &[]).await;
    scene.held(1).await;
    scene.park.give_back();
    assert_eq!(client.reply().await, (5, 1));
    client.closed().await;
}

#[tokio::test]
async fn connections_end_with_their_export_and_the_socket_with_the_server() {
    let scene = scene(1 << 20, Kind::Full);
    scene.park.hold();
    let mut first = Client::ready(&scene.server).await;
    first.request(FLUSH, 1, 0, 0, &[]).await;
    scene.held(1).await;
    scene.server.add("other", Arc::new(Park::new(512, Kind::Tiny)));
    assert_eq!(scene.park.held(), 1, "another export changes nothing");
    assert!(scene.server.remove("park"));
    assert!(!scene.server.remove("park"));
    first.closed().await;
    scene.held(0).await;
    scene.server.add("park", scene.park.clone());
    let mut second = Client::ready(&scene.server).await;
    let path = scene.server.path().to_owned();
    drop(scene.server);
    second.closed().await;
    assert!(!path.exists());
}
