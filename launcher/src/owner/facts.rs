//! What planning a hot-plug must know of the host: the chain of an image, devices. Looking may take its time, so the owner does not wait.

use std::sync::Arc;

use devices::DeviceConfig;
use devices::host::HostFacts;

use super::plug::Job;
use super::{Finished, Owner, Reply};
use crate::examine::{Question, examine};
use crate::host::need::Host;
use crate::host::{scsi_target, usb, vdpa, vfio};
use crate::request::{Attach, Class, Failure};

impl Owner {
    pub(super) fn gather_facts(&mut self, attach: Box<Attach>, reply: Reply) {
        let Some(host) = self.shop.as_ref().map(|shop| Arc::clone(&shop.host)) else { return };
        let store = host.store();
        let run_dir = host.run_dir.to_string_lossy().into_owned();
        let facts = HostFacts { run_dir, ..HostFacts::default() };
        let question = Question::of(&attach.device, &store);
        if question.is_none() && !stands_on_a_device(&attach.device) {
            return self.queue.push_front(Job::Attach(attach, facts, reply));
        }
        self.jobs.spawn(async move {
            let facts = match question {
                Some(question) => with_chain(facts, &question).await,
                None => with_devices(facts, attach.device.clone(), host).await,
            };
            Finished::Facts(attach, facts, reply)
        });
    }

    /// The host was looked at, or could not be.
    pub(super) fn on_facts(&mut self, attach: Box<Attach>, facts: Result<HostFacts, Failure>, reply: Reply) {
        match facts {
            Ok(facts) => self.queue.push_back(Job::Attach(attach, facts, reply)),
            Err(failure) => drop(reply.send(Err(failure))),
        }
    }
}

/// Whether planning it needs to know what the host has.
fn stands_on_a_device(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::Vdpa(_) | DeviceConfig::VhostScsi(_))
        || vfio::is_passthrough(device)
        || usb::facts::is_usb(device)
}

/// Looking at the open files of all processes takes a while, and so may netlink.
async fn with_devices(
    mut facts: HostFacts,
    device: DeviceConfig,
    host: Arc<Host>,
) -> Result<HostFacts, Failure> {
    let seen = usb::facts::learn(&mut facts, [&device]).await;
    seen.map_err(|error| Failure::of(Class::Refused, &error))?;
    let learning = tokio::task::spawn_blocking(move || {
        vdpa::learn(&mut facts, [&device]);
        scsi_target::learn(&mut facts, [&device]);
        let learned = vfio::learn(&mut facts, [&device], &host.leases);
        learned.map(|()| facts).map_err(|error| Failure::of(Class::Refused, &error))
    });
    learning.await.unwrap_or_else(|error| Err(Failure::of(Class::Generic, &error)))
}

async fn with_chain(mut facts: HostFacts, question: &Question) -> Result<HostFacts, Failure> {
    let answers = examine(std::slice::from_ref(question)).await;
    for answer in answers {
        let chain = answer.map_err(|words| Failure::new(Class::Refused, words))?;
        facts.chains.insert(question.path().to_owned(), chain);
    }
    Ok(facts)
}
