//! qvirt on real QEMUs with a real guest: the guest's own view is the judge. What it sees before and after each step is printed; run the tests with
//! `--show-output` to read it.
//!
//! `kinds` has every kind of device, `media` what is put into drives, `moments` the times at which they come and go, `console`,
//! `stored`, `faults`, `clients` and `ending` what their names say, `crash` the owner's death at any moment, `nbd` the server of that name with QEMU's
//! clients, `proxy` the process in front of an image, `suspension` storage that fails, `proxied` the same with that process, `flapping` both for an hour, `matrix` every kind of disk, `native` on a QEMU
//! that retries by itself, `refusals` what a suspended disk forbids, `snapshots`
//! disks that are kept as they were while the guest goes on writing.

mod clients;
mod console;
mod crash;
mod ending;
mod faults;
mod flapping;
mod flushes;
mod kinds;
mod matrix;
mod media;
mod moments;
mod native;
mod nbd;
mod proxied;
mod proxy;
mod refusals;
mod snapshots;
mod stored;
mod suspension;
mod timeouts;
