//! What the tests share: where the things under test are ([`qemu`]), a VM of a test, its events and its guest ([`vm`], [`events`], [`guest`], [`scene`]), the images it
//! stands on ([`chain`]), peers that do what
//! real ones cannot be made to do ([`fake`], [`vhost_user`], [`vduse`]), and the hardware lab ([`lab`]).

pub mod chain;
pub mod events;
pub mod fake;
pub mod guest;
pub mod lab;
pub mod qemu;
pub mod refusals;
pub mod scene;
pub mod storm;
pub mod vduse;
pub mod vhost_user;
pub mod vm;

/// The last `count` lines of a text, for an error to show.
fn last_lines(text: &str, count: usize) -> impl Iterator<Item = &str> {
    let all = text.lines().count();
    text.lines().skip(all.saturating_sub(count))
}
