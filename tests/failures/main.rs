//! Failure at every step: of a launch, an attach, a detach and the clearing up behind one. Whatever fails, QEMU, the host and qvirt's own
//! books are then as they were before.
//!
//! `sweep` fails each step from within, as the code counts them, so that a new step without a failure fails here; `commands` has QEMU fail,
//! stall or die at each command, `guests` has guests that refuse, ignore and surprise, `endings` QEMUs that do not go, `media` fails the change of a
//! medium, `snapshot` one that is taken, `notify` has programs that fail or hang, `native` disks that a fake QEMU retries by itself. `stage` is the VM, `holdings` what is
//! compared.

mod commands;
mod endings;
mod guests;
mod holdings;
mod media;
mod native;
mod notify;
mod snapshot;
mod stage;
mod sweep;
