//! The session and its framing against a fake peer on the other end of a socket pair.

mod calls;
mod closing;
mod connecting;
mod descriptors;
mod events;
mod peer;
mod wire;
