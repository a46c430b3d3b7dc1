//! The owner of a QEMU virtual machine, and the command line that talks to it.
//!
//! ```text
//!  config ---> blueprint ---> launch ---> owner <--- control <--- cli, and any QMP client
//!  (TOML)      (seats)        (QEMU)      | work (attach, detach, undo)
//!                             adopt ------+ record, journal, lease, locks (what outlives an owner)
//! ```
//!
//! One process per VM, `qvirt run`, launches QEMU and owns it. `config` reads a VM file, `blueprint` plans it against this QEMU (`probe`) and its
//! images (`examine`), `launch` starts it step by step with undo, and `owner` is the one task that everything changeable belongs to. `control`
//! serves clients in QMP; `policy` says which raw commands pass, and `refuse` what does not while the storage of a disk fails. `work` makes and
//! unmakes devices; `host` is what they need of this machine. `adopt` takes over a VM whose owner died, and clears up behind a dead one, from
//! `record` and `journal`. `incoming` compares a config with a VM that is to migrate into it. `suspend` has the engines for disks whose storage
//! fails, `snapshot` which image is the top of a disk's chain, `nbd` a small NBD server for I/O that must wait meanwhile, `proxy` the process built on it that stands in front of an image. `cli` is
//! one client among others.
//!
//! No device option is spelled here: that is the `devices` crate's. No QMP is framed here: that is `qmp-client`'s.

pub mod accel;
pub mod adopt;
pub mod blueprint;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod edit;
pub mod examine;
pub mod folders;
pub mod host;
pub mod image;
pub mod incoming;
pub mod injection;
pub mod journal;
pub mod launch;
pub mod lease;
pub mod locks;
pub mod nbd;
pub mod notify;
pub mod owner;
pub mod policy;
pub mod probe;
pub mod process;
pub mod proxy;
pub mod quirks;
pub mod record;
pub mod refuse;
pub mod request;
pub mod snapshot;
pub mod status;
pub mod storage;
pub mod suspend;
pub mod users;
pub mod work;
