//! Looking at images before a VM or a device is planned, where storage may fail or hang: by a process of its own.
//!
//! A thread that waits for hung storage can neither be ended nor left behind by its process, which would then keep its locks; another process can. It
//! is this very program, gets questions on its standard input, and answers each with a line. Who does not answer in time is killed, and goes when the
//! storage answers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use devices::DeviceConfig;
use devices::host::{Format, Layer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::image;
use crate::snapshot::{Store, top};

/// The command by which this program is started for it.
pub const COMMAND: &str = "examine-images";

/// How long all answers together may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Question {
    /// An image with its chain of backing files.
    Image(String, Option<Format>),
    /// What a disk starts from that writes the image of that path: the top of its chain. With the folder of what is known of snapshots.
    Top(String, Option<Format>, PathBuf),
    /// A file that QEMU will open.
    File(String),
}

/// The layers of an image, top first; or what is wrong, for people.
pub type Answer = Result<Vec<Layer>, String>;

impl Question {
    /// What must be known of a device's image; nothing where the config itself is wrong, which planning says.
    pub fn of(device: &DeviceConfig, store: &Store) -> Option<Question> {
        let DeviceConfig::Disk(disk) = device else { return None };
        Question::subject(device).map(|path| match disk.is_read_only() {
            true => Question::Image(path.to_owned(), disk.format),
            false => Question::Top(path.to_owned(), disk.format, store.folder().to_owned()),
        })
    }

    /// The image that it would be about.
    pub fn subject(device: &DeviceConfig) -> Option<&str> {
        device.image().filter(|path| path.starts_with('/') && !path.chars().any(char::is_control))
    }

    /// The path that it is about.
    pub fn path(&self) -> &str {
        match self {
            Question::Image(path, _) | Question::Top(path, ..) | Question::File(path) => path,
        }
    }

    /// Looks, in this process.
    pub fn answer(&self) -> Answer {
        match self {
            Question::Image(path, format) => {
                image::chain(path, *format).map_err(|error| crate::request::chain(&error))
            }
            Question::Top(path, format, folder) => {
                top::chain(&Store::new(folder), path, *format).map_err(|error| crate::request::chain(&error))
            }
            Question::File(path) => File::open(path).map(|_| Vec::new()).map_err(|error| error.to_string()),
        }
    }
}

/// Looks, in another process. There are as many answers as questions.
pub async fn examine(questions: &[Question]) -> Vec<Answer> {
    let mut answers = Vec::new();
    if questions.is_empty() {
        return answers;
    }
    let outcome = tokio::time::timeout(PATIENCE, ask(questions, &mut answers)).await;
    let silence = match outcome {
        Ok(Ok(())) => "the process that looked at it ended without an answer: try again".to_owned(),
        Ok(Err(error)) => format!("no process could look at it: {error}; try again"),
        Err(_) => format!("reading it has no answer after {PATIENCE:?}: repair its storage, then try again"),
    };
    let unanswered = questions.iter().skip(answers.len());
    let failed: Vec<Answer> =
        unanswered.map(|question| Err(format!("{}: {silence}", question.path()))).collect();
    answers.extend(failed);
    answers
}

async fn ask(questions: &[Question], answers: &mut Vec<Answer>) -> io::Result<()> {
    // By this name it is the same program, also when its package was upgraded meanwhile.
    let mut process = Command::new("/proc/self/exe")
        .arg(COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Whoever reads what we say to its end would wait for the one that hangs.
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    input.write_all(&serde_json::to_vec(questions)?).await?;
    drop(input);
    let mut lines = BufReader::new(output).lines();
    while answers.len() < questions.len()
        && let Some(line) = lines.next_line().await?
    {
        answers.push(serde_json::from_str(&line)?);
    }
    process.wait().await.map(drop)
}

/// What that process does.
pub fn answer_all() -> io::Result<()> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text)?;
    let questions: Vec<Question> = serde_json::from_slice(&text)?;
    let mut output = io::stdout().lock();
    for question in questions {
        let mut line = serde_json::to_vec(&question.answer())?;
        line.push(b'\n');
        output.write_all(&line)?;
        output.flush()?;
    }
    Ok(())
}
