//! More room on a disk of a running VM.

use devices::Layout;
use devices::units::Size;
use qmp_client::QmpError;
use serde_json::{Value, json};
use tracing::info;

use super::plug::Outcome;
use super::{Finished, Owner, Reply};
use crate::request::{BlockResize, Class, Failure, chain};
use crate::suspend::turn;
use crate::work::Workshop;

impl Owner {
    /// The layout stays as it is meanwhile: whoever changes it needs the workshop.
    pub(super) fn resize(&mut self, wish: BlockResize, reply: Reply) {
        let Some(shop) = self.shop.take() else { return };
        let layout = self.layout.clone();
        self.jobs.spawn(async move {
            let outcome = resize(&layout, &wish, &shop).await;
            Finished::Work(shop, Outcome::Resized(outcome, reply))
        });
    }
}

async fn resize(layout: &Layout, wish: &BlockResize, shop: &Workshop) -> Result<Value, Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::new(Class::Generic, format!("size of {}: {}", wish.id, chain(error)))
    };
    let placed = layout.expect_device(&wish.id);
    let id = placed.map_err(|error| Failure::of(Class::DeviceNotFound, &error))?.id.clone();
    let seen = turn::look(&shop.qmp).await.map_err(|error| failed(&error))?;
    let now = Size::bytes(seen.disks.get(&id).map_or(0, |disk| disk.size_bytes));
    let call = layout.resized(&wish.id, now, wish.size);
    let call = call.map_err(|refusal| Failure::of(Class::Refused, &refusal))?;
    match shop.qmp.call(call.execute, call.arguments).await {
        Ok(_) => {
            info!(device = %id, from = %now, to = %wish.size, "another size");
            Ok(json!({"id": id, "size": wish.size}))
        }
        Err(error @ QmpError::TimedOut { .. }) => Err(Failure { class: Class::Pending, ..failed(&error) }),
        Err(error) => Err(failed(&error)),
    }
}
