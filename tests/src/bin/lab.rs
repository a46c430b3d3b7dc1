//! The hardware lab as a program: a shell in it for people, and what its host runs at boot.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tests::lab::main(&arguments)
}
