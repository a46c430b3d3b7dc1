//! A pattern as a process in the background, and how it is asked: over a socket in the kernel's own name space, which leaves no file.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::num::NonZero;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::run::{Pattern, open};
use super::{Report, Shape};

/// How long an operation under way may take when the pattern is to stop.
const STOPPING: Duration = Duration::from_secs(2);
/// How long a question or an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// The area where none is asked for, on a device that is large enough.
const AREA_MIB: u64 = 16;
/// The block where none is asked for.
const BLOCK: u32 = 4096;
/// What the process says when the pattern runs.
const STARTED: &str = "started";

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// MiB from the beginning of the device.
    pub mib: Option<u64>,
    /// Bytes of one write.
    pub block: Option<u32>,
    /// The most writes in a second.
    pub rate: Option<NonZero<u32>>,
}

impl Wish {
    /// It as options of the command line.
    pub fn words(self) -> Vec<String> {
        let mib = self.mib.map(|mib| ["--mib".to_owned(), mib.to_string()]);
        let block = self.block.map(|block| ["--block".to_owned(), block.to_string()]);
        let rate = self.rate.map(|rate| ["--rate".to_owned(), format!("{rate}/s")]);
        [mib, block, rate].into_iter().flatten().flatten().collect()
    }
}

/// Starts a process of this program that [`run`]s the pattern; returns when it does.
pub fn start(device: &Path, wish: Wish) -> Result<(), String> {
    let failed = |e: &dyn std::fmt::Display| format!("cannot start a pattern on {}: {e}", device.display());
    let program = std::env::current_exe().map_err(|e| failed(&e))?;
    let mut command = Command::new(program);
    // A group of its own: it outlives the command that starts it.
    command.arg0("agent").args(["pattern", "run"]).arg(device).args(wish.words());
    command.process_group(0).stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| failed(&e))?;
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut said).map_err(|e| failed(&e))?;
    }
    match said.trim_end() {
        STARTED => Ok(()),
        "" => Err(failed(&"its process ended without a word")),
        reason => Err(reason.to_owned()),
    }
}

/// Writes the pattern until it is told to stop: the process itself. What hinders it is said on standard output, for [`start`].
pub fn run(device: &Path, wish: Wish) -> Result<(), String> {
    let (listener, pattern) = prepare(device, wish).inspect_err(|reason| println!("{reason}"))?;
    println!("{STARTED}");
    loop {
        let (stream, _) = listener.accept().map_err(|e| format!("cannot be asked any more: {e}"))?;
        // Whoever asks and goes away harms nobody.
        match question(&stream).as_deref() {
            Ok("report") => drop(reply(&stream, &pattern.report())),
            Ok("stop") => {
                let _ = reply(&stream, &pattern.stop(STOPPING));
                return Ok(());
            }
            _ => {}
        }
    }
}

fn prepare(device: &Path, wish: Wish) -> Result<(UnixListener, Pattern), String> {
    let name = device.display();
    let listener = UnixListener::bind_addr(&address(device)?).map_err(|e| match e.kind() {
        ErrorKind::AddrInUse => format!("a pattern runs on {name} already: `pattern stop {name}` ends it"),
        _ => format!("cannot listen for questions about {name}: {e}"),
    })?;
    let failed = |e: io::Error| format!("cannot write to {name}: {e}");
    let size = open(device, true).and_then(|mut file| file.seek(SeekFrom::End(0))).map_err(failed)?;
    let shape = shape(size, wish).map_err(|reason| format!("{name}: {reason}"))?;
    let pattern = Pattern::start(device, shape, wish.rate).map_err(failed)?;
    Ok((listener, pattern))
}

/// What of a device of that size is written.
pub(super) fn shape(size: u64, wish: Wish) -> Result<Shape, String> {
    let block = wish.block.unwrap_or(BLOCK);
    let area = match wish.mib.map(|mib| mib << 20) {
        Some(area) if area > size => {
            return Err(format!("it has {size} bytes, fewer than the {area} asked for"));
        }
        area => area.unwrap_or(size.min(AREA_MIB << 20)),
    };
    let shape = Shape { area: area - area % u64::from(block.max(1)), block };
    if shape.is_possible() {
        return Ok(shape);
    }
    Err(format!(
        "blocks of {block} bytes in {area} bytes do not work: ask for a multiple of 512 up to 1 MiB, and an area of two blocks or more"
    ))
}

fn address(device: &Path) -> Result<SocketAddr, String> {
    let failed = |e| format!("{} cannot be the name of a socket: {e}", device.display());
    // Not the canonical path: the device may be gone when it is asked about.
    let path = std::path::absolute(device).map_err(failed)?;
    SocketAddr::from_abstract_name(format!("qvirt-pattern:{}", path.display())).map_err(failed)
}

fn question(stream: &UnixStream) -> io::Result<String> {
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let mut question = String::new();
    BufReader::new(stream).read_line(&mut question)?;
    Ok(question.trim_end().to_owned())
}

fn reply(mut stream: &UnixStream, report: &Report) -> io::Result<()> {
    stream.write_all(serde_json::to_string(report)?.as_bytes())
}

/// What the pattern on that device did up to now; an operation that hangs does not delay the answer.
pub fn report(device: &Path) -> Result<Report, String> {
    ask(device, "report")
}

/// Ends the pattern on that device and gives its last report. An operation that hangs is waited for two seconds.
pub fn stop(device: &Path) -> Result<Report, String> {
    ask(device, "stop")
}

fn ask(device: &Path, question: &str) -> Result<Report, String> {
    let name = device.display();
    let mut stream = UnixStream::connect_addr(&address(device)?).map_err(|e| match e.kind() {
        ErrorKind::ConnectionRefused => {
            format!("no pattern runs on {name}: `pattern start {name}` starts one")
        }
        _ => format!("the pattern on {name} cannot be asked: {e}"),
    })?;
    let mut answer = || -> io::Result<Report> {
        stream.set_read_timeout(Some(ANSWER))?;
        writeln!(stream, "{question}")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    };
    answer().map_err(|e| format!("the pattern on {name} gave no answer: {e}"))
}
