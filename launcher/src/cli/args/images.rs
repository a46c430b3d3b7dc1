//! The words of `qvirt snapshot`, `block`, `job` and `chain`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use devices::units::Size;

use crate::folders::VmName;
use crate::snapshot::SnapshotName;

#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Keep the disks as they are now, all at one instant; what the guest writes from then on goes to overlays
    ///
    /// External, of disks only. An overlay lies beside the image that the config names: web.NAME.qcow2 for web.img. The config stays: whatever is run
    /// next starts from the overlays.
    Create(SnapshotCreate),
    /// Put the disks back to what they were at a snapshot; disks that took no part stay as they are
    ///
    /// What was written since is kept beside it until the snapshot is deleted.
    Revert {
        /// The VM, or a VM file
        vm: String,
        /// The snapshot
        name: SnapshotName,
        /// End the VM if it runs, without asking its guest, and start it again
        #[arg(long)]
        running: bool,
        /// Give up what was written since the newest snapshot
        #[arg(long)]
        discard: bool,
        /// Do not ask for room for all that the guest could write
        #[arg(long)]
        sparse: bool,
    },
    /// Forget a snapshot; the disks stay as they are, and images that are of no use any more are merged
    Delete {
        /// The VM, or a VM file
        vm: String,
        /// The snapshot
        name: SnapshotName,
        /// And all that came from it
        #[arg(long)]
        children: bool,
        /// How much a running VM merges in a second at most: 20MiB
        #[arg(long)]
        speed: Option<Size>,
        /// Print JSON: a line for each change of a job, then the names of what was deleted
        #[arg(long)]
        json: bool,
    },
    /// List the snapshots of a VM, the oldest first
    List {
        /// The VM
        vm: VmName,
        /// Print names only, each below the one that it came from
        #[arg(long)]
        tree: bool,
        /// Print JSON
        #[arg(long, conflicts_with = "tree")]
        json: bool,
    },
    /// Show a snapshot
    Show {
        /// The VM
        vm: VmName,
        /// The snapshot
        name: SnapshotName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Block {
    /// Let layers that qvirt made go into the image below them, on which the disk stands then
    ///
    /// All of them, unless --top or --base name images. The guest may run: it sees nothing of it. What a snapshot kept is never destroyed unasked.
    Commit {
        /// The VM, or a VM file
        vm: String,
        /// The disk's id or target label
        disk: String,
        /// The uppermost layer that goes [default: the one that is written]
        #[arg(long, value_name = "IMAGE")]
        top: Option<PathBuf>,
        /// The image that has it all then [default: the one that the config names]
        #[arg(long, value_name = "IMAGE")]
        base: Option<PathBuf>,
        /// Delete the snapshots that it destroys
        #[arg(long)]
        delete_snapshots: bool,
        /// How much a running VM merges in a second at most: 20MiB
        #[arg(long)]
        speed: Option<Size>,
        /// Print JSON: a line for each change of a job, then the names of what was deleted
        #[arg(long)]
        json: bool,
    },
    /// Let the uppermost layer of a disk get what the layers below it have, down to an image on which it stands then
    ///
    /// The layers stay as they are: snapshots keep what they kept. The guest may run: it sees nothing of it.
    Pull {
        /// The VM, or a VM file
        vm: String,
        /// The disk's id or target label
        disk: String,
        /// The image on which it stands then [default: the one that the config names; none if that is the uppermost layer]
        #[arg(long, value_name = "IMAGE")]
        base: Option<PathBuf>,
        /// Do not ask for room for all that is pulled
        #[arg(long)]
        sparse: bool,
        /// How much a running VM pulls in a second at most: 20MiB
        #[arg(long)]
        speed: Option<Size>,
        /// Print JSON: a line for each change of a job, then the disk and what it stands on
        #[arg(long)]
        json: bool,
    },
    /// Give a disk more room; the guest sees it at once
    Resize {
        /// The VM
        vm: VmName,
        /// The disk's id or target label
        disk: String,
        /// The size that it is to have: 20GiB
        size: Size,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum JobChange {
    /// End it; its disk is as it was
    Cancel,
    /// Let it rest
    Pause,
    /// Let it go on
    Resume,
}

#[derive(Debug, Subcommand)]
pub enum Chain {
    /// Compare what is known of a VM's snapshots with its images; exit code 1 if something is wrong
    ///
    /// Paths and headers of backing files, overlays that are gone, not finished, of no use any more, or not known, say because that file was lost. Of a running VM also what QEMU has open: images that it lacks, nodes whose file is gone, nodes of no disk.
    Check {
        /// The VM, or a VM file
        vm: String,
        /// Mend what can be mended, of a VM that does not run
        #[arg(long)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub struct SnapshotCreate {
    /// The VM, or a VM file
    pub vm: String,
    /// The snapshot's name; default: the seconds since 1970
    pub name: Option<SnapshotName>,
    /// A disk that takes part, by id or target label, and the file of its overlay; default: all that are written
    #[arg(long, value_name = "DISK[=FILE]")]
    pub disk: Vec<String>,
    /// A disk that takes no part
    #[arg(long, value_name = "DISK")]
    pub exclude: Vec<String>,
    /// Freeze the guest's file systems meanwhile, by its guest agent; they are thawed whatever happens
    #[arg(long)]
    pub quiesce: bool,
    /// Do not ask for room for all that the guest could write
    #[arg(long)]
    pub sparse: bool,
    /// Words for people
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
}
