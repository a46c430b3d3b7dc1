//! The NBD server against the clients that QEMU brings.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use launcher::nbd::{Bytes, Errno, Export, Extent, Features, Kind, Park, Reply, Request, Server};
use serde_json::{Value, json};
use tests::on_both;
use tests::qemu::{QemuVersion, images};
use tests::vm::{Output, finished};

on_both! {
    an_export_of_memory => memory,
    a_park => park,
}

/// Bytes that forget nothing, and whether they were ever written.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
}

const BLOCK: usize = 4096;

impl Export for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().expect("no test panics here").len() as u64
    }

    fn features(&self) -> Features {
        Features {
            read_only: self.read_only,
            flush: true,
            trim: true,
            write_zeroes: true,
            fast_zero: true,
            block_status: true,
            min_block: 1,
            preferred_block: BLOCK as u32,
        }
    }

    async fn handle(&self, request: Request) -> Result<Reply, Errno> {
        // Later requests overtake this one.
        tokio::task::yield_now().await;
        let mut bytes = self.bytes.lock().expect("no test panics here");
        let range = |offset: u64, length: u32| offset as usize..offset as usize + length as usize;
        Ok(match request {
            Request::Read { offset, length } => Reply::Data(Bytes::from(&bytes[range(offset, length)])),
            Request::Write { offset, data, .. } => {
                bytes[range(offset, data.len() as u32)].copy_from_slice(&data);
                Reply::Done
            }
            Request::Trim { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
                bytes[range(offset, length)].fill(0);
                Reply::Done
            }
            Request::Flush => Reply::Done,
            Request::BlockStatus { offset, length } => {
                let zero = |block: &[u8]| *block == [0; BLOCK][..block.len()];
                let blocks: Vec<&[u8]> = bytes[range(offset, length)].chunks(BLOCK).collect();
                let extent = |run: &[&[u8]]| Extent {
                    length: run.iter().map(|block| block.len() as u32).sum(),
                    hole: zero(run[0]),
                    zero: zero(run[0]),
                };
                Reply::Extents(blocks.chunk_by(|a, b| zero(a) == zero(b)).map(extent).collect())
            }
        })
    }
}

/// Runs a program while the server serves.
async fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("the program starts");
    tokio::task::spawn_blocking(move || finished(child)).await.expect("waiting does not panic")
}

/// The options of an NBD node.
fn node(server: &Server, export: &str) -> String {
    let path = server.path().display().to_string();
    json!({"driver": "nbd", "server": {"type": "unix", "path": path}, "export": export}).to_string()
}

async fn qemu_io(version: QemuVersion, server: &Server, export: &str, steps: &[&str]) -> Output {
    let mut command = Command::new(images().qemu_io(version));
    for step in steps {
        command.args(["-c", step]);
    }
    command.arg(format!("json:{}", node(server, export)));
    run(command).await
}

fn served(part: impl AsyncFnOnce(&Server)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let server = Server::bind(&folder.path().join("nbd.sock")).expect("a socket");
        part(&server).await;
    });
}

fn memory(version: QemuVersion) {
    served(async |server| {
        let memory = |read_only| Memory { bytes: Mutex::new(vec![0; 8 << 20]), read_only };
        server.add("disk", Arc::new(memory(false)));
        server.add("fixed", Arc::new(memory(true)));
        let steps = [
            "write -P 0x11 0 4M",
            "write -f -P 0x22 65536 512",
            "aio_write -P 0x33 1M 64k",
            "aio_write -P 0x44 2M 64k",
            "aio_flush",
            "write -z -u 3M 64k",
            "discard 128k 64k",
            "flush",
            "read -P 0x11 0 64k",
            "read -P 0x22 65536 512",
            "read -P 0x33 1M 64k",
            "read -P 0x44 2M 64k",
            "read -P 0 3M 64k",
            "read -P 0 128k 64k",
            "read -P 0 4M 4M",
        ];
        let done = qemu_io(version, server, "disk", &steps).await;
        assert_eq!(done.code, 0, "{done}");
        assert!(!done.stdout.contains("failed"), "{done}");
        let refused = qemu_io(version, server, "fixed", &["write 0 512"]).await;
        assert!(refused.stderr.contains("Permission denied"), "{refused}");
        let unknown = qemu_io(version, server, "other", &["read 0 512"]).await;
        assert!(unknown.stderr.contains("other"), "{unknown}");

        let mut command = Command::new(images().qemu_img(version));
        command.args(["map", "--output=json", &format!("json:{}", node(server, "disk"))]);
        let map = run(command).await;
        let map: Value = serde_json::from_str(&map.stdout).unwrap_or_else(|_| panic!("{map}"));
        let zero: Vec<bool> =
            map.as_array().expect("a list").iter().map(|extent| extent["zero"] == true).collect();
        assert_eq!(zero, [false, true, false, true, false, true], "{map}");
    });
}

fn park(version: QemuVersion) {
    served(async |server| {
        let park = Arc::new(Park::new(1 << 20, Kind::Full));
        server.add("park", park.clone());
        let failed = qemu_io(version, server, "park", &["read 0 512"]).await;
        assert!(
            failed.stderr.contains("Input/output error") || failed.stdout.contains("Input/output error"),
            "{failed}"
        );
        park.hold();
        let mut held = park.changed();
        let steps = ["aio_read 0 512", "aio_write 512 512", "aio_flush"];
        let (asked, ()) = tokio::join!(qemu_io(version, server, "park", &steps), async {
            held.wait_for(|held| held.reads == 1 && held.writes == 1).await.expect("the park is ours");
            park.give_back();
        });
        let said = format!("{}{}", asked.stdout, asked.stderr);
        assert_eq!(said.matches("Input/output error").count(), 2, "{asked}");
        assert_eq!(park.held(), 0);
    });
}
