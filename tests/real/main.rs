//! qvirt on real QEMUs with a real guest: the guest's own view is the judge. What it sees before and after each step is printed; run the tests with
//! `--show-output` to read it.
//!
//! `kinds` has every kind of device, `moments` the times at which they come and go, `console`, `stored`, `faults`, `clients` and `ending` what
//! their names say, `crash` the owner's death at any moment.

mod clients;
mod console;
mod crash;
mod ending;
mod faults;
mod kinds;
mod moments;
mod scene;
mod stored;
