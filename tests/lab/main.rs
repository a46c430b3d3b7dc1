//! Tests in the hardware lab: each is sent into the lab host and runs there as root (see `tests::lab`). Their output has the lab's and the guest's
//! words and what each step took; run them with `--show-output`, or by `make lab`.
//!
//! `host` proves that the lab has what it names, `inventory` that qvirt lists it, `storage` and `disks`, `network`, `memory` and `owner` are qvirt's own commands, `functions` PCI functions of the host in guests, `outages` disks that
//! retry while real storage fails, `sectors` and `sticks` such disks on bad and pulled disks of the host, `suspension` disks on storage that hangs,
//! `forbidden` what a disk that hangs beside one that fails forbids, `pieces` the devices that QEMU is given by plain QMP, `rights` what somebody is told who is not root, `images` what
//! makes the images, `shell` the shell for people, `troubles` what happens where there can be no lab. `vdpa`, `vdpa_host` and `vhost_scsi` are devices of the host that
//! qvirt passes through, `usb` its sticks in a guest, `system_disks` the guest that boots from them, `sweep` the failing of each step.

mod disks;
mod forbidden;
mod full;
mod functions;
mod host;
mod images;
mod inventory;
mod memory;
mod network;
mod outages;
mod owner;
mod pieces;
mod rights;
mod sectors;
mod shell;
mod sticks;
mod storage;
mod suspension;
mod sweep;
mod system_disks;
mod troubles;
mod usb;
mod vdpa;
mod vdpa_host;
mod vhost_scsi;
