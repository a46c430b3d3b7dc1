//! The qvirt command line; everything is in the library.

fn main() -> std::process::ExitCode {
    launcher::cli::main()
}
