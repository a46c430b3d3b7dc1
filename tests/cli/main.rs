//! The command line and the control socket as scripts and other programs meet them: whole error texts, exit codes, JSON, and that nothing
//! is left on the host. No guest is needed: the QEMUs are real, their processors mostly never run.
//!
//! `configs`, `images`, `programs` and `host` have wrong inputs, `words` and `printing` the command line itself, `lives` the ways
//! from one owner to the next, `on_error` disks that retry, `media` drives without a guest, `snapshot` overlays without a guest, `chains` those that are mended, `storage` what fails or hangs at the start, `socket` the
//! control socket byte by byte, `existing` a client that others wrote, and `contract` what qvirt takes QEMU to be able to.

mod chains;
mod configs;
mod contract;
mod existing;
mod host;
mod images;
mod layers;
mod lives;
mod media;
mod on_error;
mod printing;
mod programs;
mod raw;
mod scene;
mod snapshot;
mod socket;
mod storage;
mod usb;
mod words;
