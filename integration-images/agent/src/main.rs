//! One program under several names, told by its own name or by its first argument.

use std::convert::Infallible;
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;

use agent::inventory::Inventory;
use agent::pattern::{process, verify};
use agent::serve;
use agent::unplug::Unplug;
use serde::Serialize;

const USAGE: &str = "\
usage: agent serve [--console PATH] [--port NAME]   serve a host's commands (port: org.qvirt.agent)
       agent inventory [--lines]                    what this machine sees, as JSON or one device a line
       agent unplug ignore|answer                   what becomes of requests to plug and unplug
       agent pattern start DEV [--mib N] [--block BYTES] [--rate N/s]
                                                    write and verify DEV in the background
       agent pattern report|stop DEV                what that did up to now, as JSON
       agent pattern verify DEV                     whether what it left is whole, as JSON
A link named inventory, unplug or pattern needs no first word.";

/// Why it ends.
enum Failure {
    /// It was called wrongly.
    Usage,
    /// It did what it was asked for, and what it has printed is no good news.
    Verdict,
    /// It could not do what it was asked for.
    Reason(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Failure {
        Failure::Reason(reason)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let name = words.first().and_then(|path| path.rsplit('/').next());
    // As `agent` it is told by its first argument, under each other name by that name.
    let words = if name == Some("agent") { &words[1..] } else { &words[..] };
    match run(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(Failure::Verdict) => ExitCode::FAILURE,
        Err(Failure::Reason(reason)) => {
            eprintln!("agent: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<(), Failure> {
    let (command, arguments) = words.split_first().ok_or(Failure::Usage)?;
    match (command.rsplit('/').next().unwrap_or_default(), arguments) {
        ("serve", _) => match serve(arguments)? {},
        ("inventory", []) => print(&Inventory::read(Path::new("/"))),
        ("inventory", ["--lines"]) => {
            Inventory::read(Path::new("/")).lines().iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        ("unplug", [word]) => Ok(Unplug::parse(word).ok_or(Failure::Usage)?.set(Path::new("/"))?),
        ("pattern", [verb, device, options @ ..]) => pattern(verb, Path::new(device), options),
        _ => Err(Failure::Usage),
    }
}

fn serve(arguments: &[&str]) -> Result<Infallible, Failure> {
    let mut options = serve::Options { console: None, port: serve::PORT.to_owned() };
    for (word, value) in pairs(arguments)? {
        match word {
            "--console" => options.console = Some(value.to_owned()),
            "--port" => options.port = value.to_owned(),
            _ => return Err(Failure::Usage),
        }
    }
    Ok(serve::serve(&options)?)
}

fn pattern(verb: &str, device: &Path, options: &[&str]) -> Result<(), Failure> {
    match (verb, options) {
        ("start", _) => Ok(process::start(device, wish(options)?)?),
        // The process that `start` starts.
        ("run", _) => Ok(process::run(device, wish(options)?)?),
        ("report", []) => print(&process::report(device)?),
        ("stop", []) => print(&process::stop(device)?),
        ("verify", []) => {
            let verdict = verify::verify(device)?;
            print(&verdict)?;
            if verdict.is_consistent() { Ok(()) } else { Err(Failure::Verdict) }
        }
        _ => Err(Failure::Usage),
    }
}

fn wish(options: &[&str]) -> Result<process::Wish, Failure> {
    let mut wish = process::Wish::default();
    for (word, value) in pairs(options)? {
        match word {
            "--mib" => wish.mib = Some(number(value)?),
            "--block" => wish.block = Some(number(value)?),
            "--rate" => wish.rate = Some(number(value.strip_suffix("/s").unwrap_or(value))?),
            _ => return Err(Failure::Usage),
        }
    }
    Ok(wish)
}

/// `--word value ...`
fn pairs<'a>(words: &[&'a str]) -> Result<Vec<(&'a str, &'a str)>, Failure> {
    let (pairs, rest) = words.as_chunks::<2>();
    if rest.is_empty() {
        Ok(pairs.iter().map(|[word, value]| (*word, *value)).collect())
    } else {
        Err(Failure::Usage)
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| Failure::Usage)
}

fn print(report: &impl Serialize) -> Result<(), Failure> {
    let json = serde_json::to_string(report).map_err(|e| format!("the report cannot be written: {e}"))?;
    println!("{json}");
    Ok(())
}
