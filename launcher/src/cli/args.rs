//! The words of the command line; those for a device are in `args/device.rs`, those of `qvirt host` in `args/host.rs`, those about images and
//! their chains in `args/images.rs`.

mod device;
mod host;
mod images;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use devices::host::Format;
use devices::retry::AtTimeout;
use devices::units::Millis;

pub use device::DeviceChoice;
pub use host::{Host, VfChange};
pub use images::{Block, Chain, JobChange, Snapshot, SnapshotCreate};

use crate::folders::VmName;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage: the command line, or a config
  3  refused, by qvirt or by the guest
  4  pending, or timed out: the outcome is open
  5  no such VM or device

Folders: /etc/qvirt, /run/qvirt, /var/lib/qvirt for root, the XDG folders for others, below QVIRT_ROOT if that is set.
Logs: QVIRT_LOG=debug, or per module: QVIRT_LOG=warn,qmp_client=trace.";

/// QEMU virtual machines without libvirt, controlled natively over QMP.
#[derive(Debug, Parser)]
#[command(name = "qvirt", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a VM file: parse it, ask this QEMU, plan the seats. Changes nothing
    Check(Check),
    /// Launch a VM, or adopt a running one, and own it in the foreground
    ///
    /// SIGTERM and SIGINT shut the guest down, a second one kills it; SIGHUP leaves the VM running without an owner.
    Run(Run),
    /// Launch a VM, or adopt a running one, in the background; returns when the guest runs
    Start(Start),
    /// Store a VM file, so that the VM is known by its name
    Define {
        /// The VM file
        file: PathBuf,
    },
    /// Forget a stored VM file; a running VM runs on
    Undefine {
        /// The VM
        vm: VmName,
    },
    /// Show a VM's stored config, or the command line it makes
    Show(Show),
    /// List the running VMs
    List {
        /// Also those that are stored and do not run
        #[arg(long)]
        all: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a VM is doing: state, reason, uptime, devices, faults
    Status {
        /// The VM
        vm: VmName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what sits on which seat, and how many seats are free
    Devices {
        /// The VM
        vm: VmName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask the guest to shut down, and wait for it
    Shutdown(Shutdown),
    /// Restart the guest in good order: ask it to shut down, then start the VM again
    Reboot {
        /// The VM
        vm: VmName,
    },
    /// Reset the guest, as the reset button does
    Reset {
        /// The VM
        vm: VmName,
    },
    /// Stop the guest's processors
    Pause {
        /// The VM
        vm: VmName,
    },
    /// Let a paused guest go on
    Resume {
        /// The VM
        vm: VmName,
    },
    /// End a VM at once, with its owner or without
    Kill {
        /// The VM
        vm: VmName,
    },
    /// End a VM's owner and leave the VM running; `run` or `start` adopts it
    Leave {
        /// The VM
        vm: VmName,
    },
    /// Plug a device in: into the running VM, into its stored config, or both
    Attach(Attach),
    /// Take a device out: of the running VM, of its stored config, or both
    Detach(Detach),
    /// Put another medium into a CD-ROM drive, or take it out
    Media(Media),
    /// Show the disks of a VM, running or not: target label, format, size, I/O status, and the chain of images each stands on
    Blocks {
        /// The VM, or a VM file
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Snapshots of a VM's disks, of a running or a stopped VM
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Disks of a running VM
    #[command(subcommand)]
    Block(Block),
    /// Show the block jobs of a running VM and how far they are
    Jobs {
        /// The VM
        vm: VmName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop, hold up or go on with a block job of a running VM
    Job {
        /// What to do
        #[arg(value_enum)]
        what: JobChange,
        /// The VM
        vm: VmName,
        /// The job, as `jobs` shows it
        job: String,
    },
    /// The chains of images that a VM's disks stand on
    #[command(subcommand)]
    Chain(Chain),
    /// Disks that retry: show them, try or fail them now, change how they retry
    #[command(subcommand)]
    Io(Io),
    /// Read the beginning of an image: for an owner that must not wait for it
    #[command(hide = true)]
    IoProbe {
        /// The image
        image: PathBuf,
    },
    /// Make a disk of a running VM fail for a while, and tell what its policy does
    Drill(Drill),
    /// What this host has to give to VMs
    #[command(subcommand)]
    Host(Host),
    /// Connect the terminal to a serial console; `^]` leaves
    Console {
        /// The VM
        vm: VmName,
        /// The serial device; default: the first one
        device: Option<String>,
        /// Take the console over from whoever holds it
        #[arg(long)]
        force: bool,
    },
    /// Follow the events of VMs, across restarts of their owners
    Events {
        /// The VMs; default: all that run
        vms: Vec<VmName>,
        /// Print JSON lines
        #[arg(long)]
        json: bool,
    },
    /// Send a QMP command to a VM and print its reply
    Qmp {
        /// The VM
        vm: VmName,
        /// The command's name
        command: String,
        /// Its arguments, a JSON object
        arguments: Option<String>,
    },
    /// Look at images whose storage may hang, for another qvirt that must not
    #[command(hide = true)]
    ExamineImages,
    /// Undo what dead VMs, and `qvirt host` commands that were killed, left on the host
    Recover {
        /// The VM; default: all, and the commands
        vm: Option<VmName>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Serve an image over NBD, and try again what fails; an owner starts one for each disk that wants it
    #[command(hide = true)]
    IoProxy(IoProxy),
}

#[derive(Debug, Subcommand)]
pub enum Io {
    /// Show where the disks that retry stand
    Status {
        /// The VM
        vm: VmName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Try the storage of a suspended disk now
    Retry {
        /// The VM
        vm: VmName,
        /// The disk's id or target label
        disk: String,
    },
    /// Report the error of a suspended disk to the guest now, as at its timeout
    Fail {
        /// The VM
        vm: VmName,
        /// The disk's id or target label
        disk: String,
    },
    /// Change how a disk retries from now on; its config stays
    Set {
        /// The VM
        vm: VmName,
        /// The disk's id or target label
        disk: String,
        /// Time between two retries: 100ms, 2s
        #[arg(long)]
        interval: Option<Millis>,
        /// How long to retry, 0ms for ever
        #[arg(long)]
        timeout: Option<Millis>,
        /// What happens then: report, hold, pause, unplug
        #[arg(long)]
        at_timeout: Option<AtTimeout>,
    },
}

#[derive(Debug, Args)]
pub struct Media {
    /// The VM
    pub vm: VmName,
    /// The drive's id or target label
    pub drive: String,
    #[command(subcommand)]
    pub change: MediaChange,
}

#[derive(Debug, Subcommand)]
pub enum MediaChange {
    /// Put an image in; what is in the drive is taken out
    Insert {
        /// The image
        file: PathBuf,
        /// Its format: raw, qcow2; default: raw
        #[arg(long)]
        format: Option<Format>,
        /// Take the former medium out even if the guest has locked the drive
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        place: Where,
    },
    /// Take the medium out
    Eject {
        /// Do so even if the guest has locked the drive
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        place: Where,
    },
}

#[derive(Debug, Args)]
pub struct Drill {
    /// The VM
    pub vm: VmName,
    /// The disk's id or target label
    pub disk: String,
    /// How long its storage fails: 5s
    #[arg(long, value_parser = duration)]
    pub fail_for: Duration,
    /// Let reads fail; default: everything
    #[arg(long)]
    pub reads: bool,
    /// Let writes and flushes fail
    #[arg(long)]
    pub writes: bool,
    /// Let flushes fail
    #[arg(long)]
    pub flushes: bool,
}

#[derive(Debug, Args)]
pub struct Check {
    /// The VM file, or the name of a stored VM
    pub target: String,
    /// Check it as one that a running VM is to migrate into: its disks must treat I/O errors as the source's do
    #[arg(long, requires = "against")]
    pub incoming: bool,
    /// The source: what `qvirt status VM --json` printed there
    #[arg(long, value_name = "STATUS.json", requires = "incoming")]
    pub against: Option<PathBuf>,
    /// Print QEMU's command line, an option with its value a line
    #[arg(long)]
    pub argv: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "argv")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Run {
    /// A VM's name, or a VM file
    pub target: String,
    /// Attach the first serial console before the guest runs, so that no byte is missed
    #[arg(long)]
    pub console: bool,
    /// Do not let the guest run yet; `resume` does
    #[arg(long)]
    pub paused: bool,
    /// Tell the process that started this one how it went
    #[arg(long, hide = true)]
    pub detached: bool,
}

#[derive(Debug, Args)]
pub struct Start {
    /// A VM's name, or a VM file
    pub target: String,
    /// Do not let the guest run yet; `resume` does
    #[arg(long)]
    pub paused: bool,
}

#[derive(Debug, Args)]
pub struct Show {
    /// The VM
    pub vm: VmName,
    /// Print the command line: of the running QEMU, or the one a start would use
    #[arg(long)]
    pub argv: bool,
    /// Print the stored file (the default)
    #[arg(long, conflicts_with = "argv")]
    pub toml: bool,
    /// Print the stored config as JSON
    #[arg(long, conflicts_with_all = ["argv", "toml"])]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Shutdown {
    /// The VM
    pub vm: VmName,
    /// How long to wait for the guest: 500ms, 30s, 2m
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub timeout: Duration,
    /// Kill the VM when the time is over
    #[arg(long)]
    pub then_kill: bool,
}

/// Where a change applies.
#[derive(Debug, Args, Clone, Copy)]
pub struct Where {
    /// Change the running VM
    #[arg(long)]
    pub live: bool,
    /// Change the stored config; comments and order stay
    ///
    /// Default: the running VM if it runs, otherwise the stored config.
    #[arg(long)]
    pub config: bool,
}

#[derive(Debug, Args)]
pub struct Attach {
    /// The VM
    pub vm: VmName,
    #[command(flatten)]
    pub device: DeviceChoice,
    #[command(flatten)]
    pub place: Where,
    /// Print the QMP commands that would be sent, and send none
    #[arg(long, conflicts_with = "config")]
    pub dry_run: bool,
    /// Wait until an earlier device of the same id is gone, this long at most: 30s
    #[arg(long, value_parser = duration)]
    pub wait: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Detach {
    /// The VM
    pub vm: VmName,
    /// A device's id or target label, or a device file
    pub device: String,
    #[command(flatten)]
    pub place: Where,
    /// How long to wait for the guest, and to ask it again: 30s
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub wait: Duration,
    /// Take a USB disk of the host away at once, without a look whether the guest uses it: data may be lost
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What `crate::proxy` needs to know.
#[derive(Debug, Args)]
pub struct IoProxy {
    /// The NBD socket to serve on
    #[arg(long)]
    pub socket: PathBuf,
    /// The control line's socket
    #[arg(long)]
    pub control: PathBuf,
    /// The export's name
    #[arg(long)]
    pub name: String,
    /// The image: a file or a block device
    #[arg(long)]
    pub file: PathBuf,
    /// An image below it, only for reading, served as NAME-1; the next one as NAME-2, and so on
    #[arg(long, value_name = "FILE")]
    pub below: Vec<PathBuf>,
    /// Open the image only for reading
    #[arg(long)]
    pub read_only: bool,
    /// Keep out of the page cache
    #[arg(long)]
    pub direct: bool,
    /// What to do with discarded blocks
    #[arg(long, value_enum, default_value = "ignore")]
    pub discard: Discard,
    /// Serve at least so much: a file, such as a qcow2 image, grows up to there
    #[arg(long, value_name = "SIZE")]
    pub size: Option<devices::units::Size>,
    /// From a failure to the next attempt: 100ms at least
    #[arg(long, default_value = "1s", value_parser = duration)]
    pub interval: Duration,
    /// From the first failure to giving up; default: never
    #[arg(long, value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Try failed reads again
    #[arg(long)]
    pub retry_read: bool,
    /// Try failed writes and flushes again
    #[arg(long)]
    pub retry_write: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Discard {
    /// Leave them as they are
    Ignore,
    /// Give them up
    Unmap,
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: devices::units::Millis = text.parse().map_err(|e: devices::text::TextError| e.to_string())?;
    Ok(span.duration())
}
