//! Events of a session: their raw form and the stream of them. What the known ones say is in
//! [`crate::known`].

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

/// One event in QMP's own form; as JSON it is what the peer sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When the peer says it happened.
    #[serde(default)]
    pub timestamp: Timestamp,
    /// The event's name, known or not.
    #[serde(rename = "event")]
    pub name: String,
    /// Its members, known or not; `Value::Null` where it has none.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

/// A point in time since 1970 by the host's clock. Both are -1 where the time is not known, as with QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

impl Timestamp {
    /// This moment, for an event of our own.
    pub fn now() -> Self {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or_else(
            |_| Self::default(),
            |since| Self {
                seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                microseconds: since.subsec_micros().into(),
            },
        )
    }
}

impl Default for Timestamp {
    fn default() -> Self {
        Self { seconds: -1, microseconds: -1 }
    }
}

/// The events of one session, from its negotiation on, in the order they came.
///
/// **Whoever holds this reads it or drops it.** The queue has no bound: a bound would either lose events or
/// stop the replies behind them, and QEMU limits the rate of the events that a guest can cause. Once dropped,
/// events are discarded as they come. An event that came before a command's reply is here before that command
/// returns.
#[derive(Debug)]
pub struct Events {
    pub(crate) queue: mpsc::UnboundedReceiver<Event>,
}

impl Events {
    /// The next event; `None` once the session is closed and all its events are read. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.queue.recv().await
    }

    /// The next event if it is here already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.queue.try_recv().ok()
    }
}
