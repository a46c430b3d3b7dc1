//! The words of `qvirt host`.

use std::str::FromStr;

use clap::{Args, Subcommand};
use devices::bdf::HostBdf;
use devices::units::Mac;
use devices::vf::{LinkState, Rate};

use crate::cli::vdpa::Vdpa;
use crate::host::pci::Class;

#[derive(Debug, Subcommand)]
pub enum Host {
    /// List PCI devices: driver, IOMMU group, NUMA node, physical and virtual functions, network interfaces, and who holds them
    Pci {
        /// Only devices of this class
        #[arg(long)]
        class: Option<Class>,
        /// Only virtual functions
        #[arg(long)]
        vfs: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List USB devices: bus, number, ports, speed, ids, serial number, and who holds them
    Usb {
        /// Then tell of every device that comes or goes, until it is interrupted
        #[arg(long)]
        follow: bool,
        /// Print JSON; of what comes and goes an object a line
        #[arg(long)]
        json: bool,
    },
    /// vDPA devices: show them and who holds them, make and delete them
    Vdpa {
        #[command(subcommand)]
        command: Option<Vdpa>,
        /// Print JSON
        #[arg(long, global = true)]
        json: bool,
    },
    /// Take PCI functions from their drivers for VFIO, by driver_override: no other function moves
    Bind {
        /// Their addresses: 0000:04:10.1
        #[arg(required = true, value_parser = text::<HostBdf>)]
        bdf: Vec<HostBdf>,
        /// Say what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give PCI functions back to the drivers that they had
    Unbind {
        /// Their addresses: 0000:04:10.1
        #[arg(required = true, value_parser = text::<HostBdf>)]
        bdf: Vec<HostBdf>,
        /// Say what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the virtual functions of a physical one, or make so many of them
    Sriov {
        /// The physical function: its interface, its accelerator (hisi_hpre-0) or its address
        pf: String,
        /// How many; 0 for none. Refused while one that there is now is in use
        #[arg(long)]
        vfs: Option<u32>,
        /// Say what would be done, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Change the profile of a virtual function: MAC address, VLAN, rates, trust, spoof check, link state
    Vf(VfChange),
    /// List IOMMU groups: their members, whether they can be given to a VM, and if not, which member is in the way
    Iommu {
        /// Only this group
        group: Option<u32>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// The profile of a virtual function, as far as it is to change.
#[derive(Debug, Args)]
pub struct VfChange {
    /// The physical function: its interface or address
    pub pf: String,
    /// The virtual function's number, from 0
    pub index: u32,
    /// Its MAC address
    #[arg(long, value_parser = text::<Mac>)]
    pub mac: Option<Mac>,
    /// Take its MAC address away: the guest chooses one
    #[arg(long, conflicts_with = "mac")]
    pub null_mac: bool,
    /// VLAN of all its frames: 1 to 4094; 0 for none
    #[arg(long)]
    pub vlan: Option<u16>,
    /// Priority of the VLAN: 0 to 7
    #[arg(long)]
    pub qos: Option<u8>,
    /// Rate that it is held to: 100Mbit; 0Mbit for no limit
    #[arg(long, value_parser = text::<Rate>)]
    pub rate_max: Option<Rate>,
    /// Rate that it is promised
    #[arg(long, value_parser = text::<Rate>)]
    pub rate_min: Option<Rate>,
    /// Whether the card trusts it
    #[arg(long)]
    pub trust: Option<Switch>,
    /// Whether frames with a foreign source address are dropped
    #[arg(long)]
    pub spoofchk: Option<Switch>,
    /// auto, enable or disable
    #[arg(long, value_parser = text::<LinkState>)]
    pub link_state: Option<LinkState>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

impl From<Switch> for bool {
    fn from(switch: Switch) -> bool {
        switch == Switch::On
    }
}

fn text<T: FromStr<Err = devices::text::TextError>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e: devices::text::TextError| e.to_string())
}
