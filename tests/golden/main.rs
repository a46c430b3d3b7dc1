//! Golden cases: what a config becomes (`cases/`), and what a wrong one is told (`bad/`).
//!
//! `cases/NAME.toml` gives `NAME.argv`, the command line, and `NAME.qmp`, the commands by which each of its devices is plugged into the
//! same machine without it; `NAME.argv.7.2` and `NAME.qmp.7.2` exist where QEMU 7.2 gets something else than 10.0. `bad/NAME.toml`
//! gives `NAME.err`. A `NAME.device.toml` beside a case is planned as a hot-plug into it. `UPDATE=1 cargo test -p tests --test golden`
//! writes the expectations anew; read the difference before you commit it.

mod bad;
mod case;
mod good;
mod recorded;
mod schema;
