//! `fake-qemu`: see `tests::fake`.

fn main() {
    tests::fake::main();
}
