//! Lines and descriptors, as bytes come and go.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use qmp_client::wire::{Line, LineReader, LineWriter, MAX_FDS, WireError, write_line};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::peer::settle;

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a socket pair")
}

fn text(line: Line) -> String {
    String::from_utf8(line.text).expect("UTF-8")
}

/// A pipe's reading end that gives `text`.
fn says(text: &str) -> OwnedFd {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    std::io::Write::write_all(&mut writer, text.as_bytes()).expect("room in the pipe");
    reader.into()
}

fn said(fds: Vec<OwnedFd>) -> Vec<String> {
    let read = |fd| {
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).expect("readable");
        text
    };
    fds.into_iter().map(read).collect()
}

async fn next(reader: &mut LineReader, stream: &UnixStream) -> Line {
    reader.next(stream).await.expect("readable").expect("a line")
}

#[tokio::test]
async fn lines_are_cut_however_the_bytes_come() {
    let bytes = "one\n\n\r\n  \ntwo\r\nthree\nfour \u{e9}\n".as_bytes();
    for step in 1..=bytes.len() {
        let (mut ours, theirs) = pair();
        let read = tokio::spawn(async move {
            let mut reader = LineReader::new();
            let mut lines = Vec::new();
            while let Some(line) = reader.next(&theirs).await.expect("readable") {
                lines.push(text(line));
            }
            lines
        });
        for piece in bytes.chunks(step) {
            ours.write_all(piece).await.expect("room");
            settle().await;
        }
        drop(ours);
        assert_eq!(read.await.expect("no panic"), ["one", "two", "three", "four \u{e9}"], "step {step}");
    }
}

/// What QEMU's monitor takes: no ends of line, several objects in a line, objects of several lines, and sense again after nonsense.
#[tokio::test]
async fn objects_are_cut_however_the_bytes_come() {
    let bytes = r#"{"a":"}{\""}{"b":[{},
 {"c": 1}]}   [1]
nonsense { "
}
"text"
{"torn": "by an end of line
{"d":"\\"}{"e":1}"#;
    let objects = [
        r#"{"a":"}{\""}"#,
        "{\"b\":[{},\n {\"c\": 1}]}",
        "   [1]",
        "nonsense { \"",
        "}",
        "\"text\"",
        "{\"torn\": \"by an end of line",
        r#"{"d":"\\"}"#,
        r#"{"e":1}"#,
    ];
    for step in 1..=bytes.len() {
        let (mut ours, theirs) = pair();
        let read = tokio::spawn(async move {
            let mut reader = LineReader::of_objects();
            let mut lines = Vec::new();
            while let Some(line) = reader.next(&theirs).await.expect("readable") {
                lines.push(text(line));
            }
            lines
        });
        for piece in bytes.as_bytes().chunks(step) {
            ours.write_all(piece).await.expect("room");
            settle().await;
        }
        drop(ours);
        assert_eq!(read.await.expect("no panic"), objects, "step {step}");
    }
}

#[tokio::test]
async fn a_descriptor_goes_with_its_object() {
    let (ours, theirs) = pair();
    let mut reader = LineReader::of_objects();
    // The writer ends its lines, which leaves a blank one before the next object.
    for number in 0..2 {
        let fd = says(&number.to_string());
        write_line(&ours, format!("{{\"n\":{number}}}").as_bytes(), &[fd.as_fd()]).await.expect("room");
    }
    for number in 0..2 {
        let line = next(&mut reader, &theirs).await;
        assert_eq!(
            (line.text, said(line.fds)),
            (format!("{{\"n\":{number}}}").into_bytes(), vec![number.to_string()])
        );
    }
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let (mut ours, theirs) = pair();
    let mut reader = LineReader::new();
    for piece in ["a to", "rn ", "line\nanother"] {
        ours.write_all(piece.as_bytes()).await.expect("room");
        tokio::select! {
            biased;
            line = reader.next(&theirs) => assert_eq!(text(line.expect("readable").expect("a line")), "a torn line"),
            () = settle() => {}
        }
    }
    ours.write_all(b"\n").await.expect("room");
    assert_eq!(text(next(&mut reader, &theirs).await), "another");
}

#[tokio::test]
async fn the_limit_holds_with_and_without_an_end() {
    for (line, fits) in [
        ("12345\n", true),
        ("12345\r\n", true),
        ("123456\n", false),
        ("1234567", false),
        ("\r\r\r\r\r\r\r", false),
    ] {
        let (mut ours, theirs) = pair();
        ours.write_all(line.as_bytes()).await.expect("room");
        let result = LineReader::with_limit(5).next(&theirs).await;
        match result {
            Ok(Some(_)) => assert!(fits, "{line:?}"),
            Err(WireError::TooLong { limit: 5 }) => assert!(!fits, "{line:?}"),
            other => panic!("{line:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn descriptors_stay_with_their_lines() {
    let (ours, theirs) = pair();
    let (a, b, c) = (says("a"), says("b"), says("c"));
    write_line(&ours, b"none", &[]).await.expect("room");
    write_line(&ours, b"one", &[a.as_fd()]).await.expect("room");
    write_line(&ours, b"none", &[]).await.expect("room");
    write_line(&ours, b"two", &[b.as_fd(), c.as_fd()]).await.expect("room");
    write_line(&ours, b"none", &[]).await.expect("room");
    let mut reader = LineReader::new();
    let mut seen = Vec::new();
    for _ in 0..5 {
        let line = next(&mut reader, &theirs).await;
        seen.push((String::from_utf8(line.text).expect("UTF-8"), said(line.fds)));
    }
    let expected: [(&str, &[&str]); 5] =
        [("none", &[]), ("one", &["a"]), ("none", &[]), ("two", &["b", "c"]), ("none", &[])];
    for ((line, fds), (expected_line, expected_fds)) in seen.iter().zip(expected) {
        assert_eq!(
            (line.as_str(), fds.as_slice()),
            (expected_line, &expected_fds.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..])
        );
    }
}

#[tokio::test]
async fn a_descriptor_sent_with_a_space_belongs_to_the_line_that_follows() {
    // As older clients do: a blank with the descriptor, then the command.
    let (mut ours, theirs) = pair();
    let fd = says("x");
    ours.write_all(b"first\n").await.expect("room");
    let parts = [std::io::IoSlice::new(b" ")];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(&ours, &parts, &mut control, rustix::net::SendFlags::empty()).expect("room");
    ours.write_all(b"second\n").await.expect("room");
    let mut reader = LineReader::new();
    assert!(next(&mut reader, &theirs).await.fds.is_empty());
    let second = next(&mut reader, &theirs).await;
    assert_eq!(second.text.trim_ascii(), b"second");
    assert_eq!(said(second.fds), ["x"]);
}

#[tokio::test]
async fn a_long_line_and_its_descriptor_arrive_whole_and_once() {
    let (ours, theirs) = pair();
    let long = "z".repeat(3 << 20);
    let sent = long.clone();
    let send = tokio::spawn(async move {
        let fd = says("long");
        let mut writer = LineWriter::new();
        writer.push(sent.into_bytes(), vec![fd]);
        writer.push(b"short".to_vec(), vec![says("short")]);
        let total = writer.backlog();
        // Flushed in as many beginnings as it takes, each dropped when it has to wait.
        let mut dropped = 0;
        while !writer.is_empty() {
            tokio::select! {
                biased;
                flushed = writer.flush(&ours) => flushed.expect("the reader reads"),
                () = tokio::task::yield_now() => dropped += 1,
            }
        }
        assert_eq!((total, writer.backlog()), ((3 << 20) + 7, 0));
        dropped
    });
    let mut reader = LineReader::new();
    let line = next(&mut reader, &theirs).await;
    assert!(line.text == long.as_bytes());
    assert_eq!(said(line.fds), ["long"]);
    let line = next(&mut reader, &theirs).await;
    assert_eq!((line.text.as_slice(), said(line.fds)), (b"short".as_slice(), vec!["short".to_owned()]));
    assert!(send.await.expect("no panic") > 0, "the flush had to wait");
}

#[tokio::test]
async fn received_descriptors_are_close_on_exec() {
    let (ours, theirs) = pair();
    let fd = says("");
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).expect("settable");
    write_line(&ours, b"x", &[fd.as_fd()]).await.expect("room");
    let line = next(&mut LineReader::new(), &theirs).await;
    let flags = rustix::io::fcntl_getfd(&line.fds[0]).expect("open");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[tokio::test]
async fn descriptors_without_end_are_refused() {
    let (mut ours, theirs) = pair();
    let fd = says("");
    let many: Vec<_> = (0..MAX_FDS).map(|_| fd.as_fd()).collect();
    ours.write_all(b"first\n").await.expect("room");
    // Blank lines take no descriptors with them, so these add up.
    write_line(&ours, b" ", &many).await.expect("room");
    write_line(&ours, b" ", &many[..1]).await.expect("room");
    let mut reader = LineReader::new();
    assert_eq!(text(next(&mut reader, &theirs).await), "first");
    assert!(matches!(reader.next(&theirs).await, Err(WireError::TooManyFds)));
    let error = write_line(&ours, b"x", &vec![fd.as_fd(); MAX_FDS + 1]).await.expect_err("too many");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn the_writer_says_when_the_peer_is_gone() {
    let (ours, theirs) = pair();
    drop(theirs);
    let mut writer = LineWriter::new();
    writer.push(b"x".to_vec(), Vec::new());
    assert_eq!(writer.flush(&ours).await.expect_err("gone").kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(writer.backlog(), 2);
}
