//! The words for a device that is given on the command line.

use std::path::PathBuf;

use clap::Args;

/// A device, by file or by flag.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct DeviceChoice {
    /// A device file: one table, as in a VM file
    pub file: Option<PathBuf>,
    /// A disk: path=/srv/a.qcow2,format=qcow2,bus=virtio-scsi,cache=none,... (commas in values doubled)
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub disk: Option<String>,
    /// A NIC: user=true | tap=tap0 | bridge=br0,vhost=true,queues=2 | vhost_user=/run/x.sock, mac=...
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub nic: Option<String>,
    /// A serial console: type=virtio-console,log=/var/log/x
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub serial: Option<String>,
    /// A channel: name=org.example.0,path=/run/x.sock
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub channel: Option<String>,
    /// A USB device: host=12d1:0003 | host=1-1.4 | host=1.4 | tablet=true, controller=2,port=5
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub usb: Option<String>,
    /// An iothread: id=io1
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub iothread: Option<String>,
    /// A virtio-scsi controller: id=scsi1,iothread=io1,queues=4
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub scsi_controller: Option<String>,
    /// A vDPA device of the host: device=vdpa0 | device=/dev/vhost-vdpa-0, type=nic,queues=2
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub vdpa: Option<String>,
    /// A vhost-scsi target of the host: wwpn=naa.5001405bd4e8dead
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub vhost_scsi: Option<String>,
    /// A PCI function of the host: host=0000:04:10.1,managed=false,rom=off,group=true
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub vfio: Option<String>,
    /// A virtual function of a network card: host=0000:06:11.6 | pf=eth0, mac=...,vlan=7,rate_max=100Mbit
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub vf: Option<String>,
}
