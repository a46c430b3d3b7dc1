//! The qvirt command line.
fn main() {}
