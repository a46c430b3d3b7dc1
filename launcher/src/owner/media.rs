//! Another medium in a CD-ROM drive, as the owner sees it: one job that looks at the image, plans the drive anew, and changes it.

use devices::host::HostFacts;
use devices::layout::NewMedium;
use devices::{Layout, Placed};
use serde_json::{Value, json};
use tracing::info;

use super::plug::{Job, Outcome};
use super::{Finished, Owner, Reply, not_now};
use crate::examine::{Question, examine};
use crate::record::Stage;
use crate::request::{Class, Failure, Media, chain};
use crate::work::{StepError, Workshop};

/// What came of it.
#[derive(Debug)]
pub(super) struct Changed {
    /// The drive as it was to be, if it came so far; and as it is, if QEMU said so.
    tried: Option<(Placed, Option<Placed>)>,
    outcome: Result<Value, Failure>,
    reply: Reply,
}

impl Owner {
    /// Puts another medium into a drive, or takes it out.
    pub(super) fn media(&mut self, media: Media, reply: Reply) {
        let refusal = match self.layout.expect_device(&media.id) {
            Err(refusal) => Some(Failure::of(Class::DeviceNotFound, &refusal)),
            Ok(_) if self.farewell.is_ending() => {
                Some(not_now("the VM is shutting down", "change its config instead"))
            }
            Ok(drive) if self.stages.get(&drive.id) != Some(&Stage::Present) => Some(not_now(
                &format!("device {} comes or goes just now", drive.id),
                "wait until it is there",
            )),
            Ok(_) => None,
        };
        match refusal {
            Some(failure) => drop(reply.send(Err(failure))),
            None => self.queue.push_back(Job::Media(media, reply)),
        }
    }

    /// The layout stays as it is meanwhile: whoever changes it needs the workshop.
    pub(super) fn begin_media(&mut self, media: Media, reply: Reply) {
        let Some(mut shop) = self.shop.take() else { return };
        let (layout, qemu) = (self.layout.clone(), self.launch.qemu.clone());
        self.jobs.spawn(async move {
            let changed = match plan(&layout, &media, &qemu, &shop).await {
                Ok((old, new)) => change(&mut shop, &old, new, media.force, reply).await,
                Err(failure) => Changed { tried: None, outcome: Err(failure), reply },
            };
            Finished::Work(shop, Outcome::Media(Box::new(changed)))
        });
    }

    pub(super) fn on_changed(&mut self, changed: Changed) {
        if let Some((tried, is)) = changed.tried {
            self.layout.note_nodes(&tried);
            if let Some(drive) = is {
                self.layout.replace(drive);
            }
            self.look();
        }
        if let Ok(changed) = &changed.outcome {
            info!(?changed, "another medium");
            self.announce("QVIRT_MEDIUM_CHANGED", changed.clone());
        }
        let _ = changed.reply.send(changed.outcome);
    }
}

/// The drive as it is and as it will be.
async fn plan(
    layout: &Layout,
    media: &Media,
    qemu: &devices::capabilities::Capabilities,
    shop: &Workshop,
) -> Result<(Placed, Placed), Failure> {
    let mut host =
        HostFacts { run_dir: shop.host.run_dir.to_string_lossy().into_owned(), ..HostFacts::default() };
    let refused = |refusal: devices::Refusal| Failure::of(Class::Refused, &refusal);
    let old = layout.expect_device(&media.id).map_err(refused)?.clone();
    // That it is no drive is said before its image is looked at.
    layout.with_medium(&media.id, None, &host, qemu).map_err(refused)?;
    let medium = media.path.clone().map(|path| NewMedium { path, format: media.format });
    if let Some(medium) = &medium {
        let question = Question::Image(medium.path.clone(), medium.format);
        for answer in examine(std::slice::from_ref(&question)).await {
            let layers = answer.map_err(|words| Failure::new(Class::Refused, words))?;
            host.chains.insert(medium.path.clone(), layers);
        }
    }
    let new = layout.with_medium(&media.id, medium, &host, qemu).map_err(refused)?;
    Ok((old, new))
}

async fn change(shop: &mut Workshop, old: &Placed, new: Placed, force: bool, reply: Reply) -> Changed {
    let (is, outcome) = shop.change_medium(old, &new, force).await;
    let outcome = match outcome {
        Ok(()) => Ok(json!({"device": new.id.as_str(), "path": new.config.image()})),
        Err(error) => {
            let class = match &error {
                StepError::Locked => Class::Refused,
                error if super::plug::is_refusal(error) => Class::Refused,
                error if super::plug::is_open(error) => Class::Pending,
                _ => Class::Generic,
            };
            Err(Failure::new(class, format!("medium of {}: {}", new.id, chain(&error))))
        }
    };
    Changed { tried: Some((new, is)), outcome, reply }
}
