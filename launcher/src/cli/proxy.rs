//! `io-proxy`: the images of one disk, served by a process of its own.

use super::args::{Discard, IoProxy};
use super::{Exit, Problem};
use crate::proxy::{LEAST_INTERVAL, Options, Plan, Policy};

/// `qvirt io-proxy`
pub async fn run(args: IoProxy) -> Result<Exit, Problem> {
    if args.interval < LEAST_INTERVAL {
        let message = format!("--interval is less than {} ms: give it more", LEAST_INTERVAL.as_millis());
        return Err(Problem::new(Exit::Usage, message));
    }
    let plan = Plan {
        socket: args.socket,
        control: args.control,
        name: args.name,
        image: Options {
            path: args.file,
            read_only: args.read_only,
            direct: args.direct,
            unmap: args.discard == Discard::Unmap,
            write_through: args.retry_write && !args.direct,
            size: args.size.map_or(0, |size| size.as_bytes()),
        },
        below: args.below,
        policy: Policy {
            interval: args.interval,
            timeout: args.timeout.filter(|timeout| !timeout.is_zero()),
            reads: args.retry_read,
            writes: args.retry_write,
        },
    };
    crate::proxy::run(plan).await?;
    Ok(Exit::Done)
}
