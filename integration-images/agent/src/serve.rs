//! The agent's side of the protocol: a thread for each line, one for each command.

use std::convert::Infallible;
use std::path::Path;

mod command;
mod first;
mod line;
mod ports;
#[cfg(test)]
mod tests;

pub use line::Line;

/// What `serve` was told to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// A console, by its path.
    pub console: Option<String>,
    /// The name of the virtio-serial ports that are served, whenever there are some.
    pub port: String,
}

/// The name of the agent's port where no other is asked for.
pub const PORT: &str = "org.qvirt.agent";

/// Serves until the process ends. As a system's first process it is two: one serves, one reaps orphans.
pub fn serve(options: &Options) -> Result<Infallible, String> {
    first::split()?;
    if let Some(console) = &options.console {
        let line = Line::console(Path::new(console))
            .map_err(|e| format!("cannot open the console {console}: {e}"))?;
        line.serve_in_background().map_err(|e| format!("no thread for the console {console}: {e}"))?;
    }
    ports::serve(Path::new("/"), &options.port)
}
