//! Laws of the engine's choice, for whatever is asked of whatever QEMU.

use devices::disk::{DiskBus, DiskConfig};
use devices::retry::{Engine, EngineWish, OnError, Retry};
use devices::{DeviceConfig, Layout, Moment, plan};
use proptest::prelude::*;
use proptest::sample::select;

use crate::configs::{self, same_ports};
use crate::recorded::QEMU_10_0;

/// A machine with nothing in it but three spare ports.
fn empty() -> Layout {
    same_ports(&configs::machine(&[]).1)
}

proptest! {
    #[test]
    fn auto_is_the_first_engine_that_could_be_named(
        errors in configs::on_error(), bus in select(DiskBus::ALL), native in any::<bool>(), threaded in any::<bool>(),
    ) {
        let qemu = if native { QEMU_10_0.with_retry() } else { QEMU_10_0.capabilities.clone() };
        let id = "d".parse().expect("an id");
        let with = |engine| {
            let on_error = Some(OnError { engine: Some(engine), ..errors });
            DiskConfig { bus: Some(bus), on_error, ..DiskConfig::default() }.retry(&id, threaded, &qemu)
        };
        let named = [EngineWish::Native, EngineWish::Hold, EngineWish::Proxy].map(with);
        let first = named.into_iter().find_map(Result::ok).flatten();
        prop_assert_eq!(with(EngineWish::Auto).ok().flatten(), first);
    }

    /// What was chosen is what QEMU is told and what the host is asked for: a proxy stands there just when it is the engine.
    #[test]
    fn the_choice_is_the_same_everywhere(errors in configs::on_error(), bus in select(DiskBus::ALL), native in any::<bool>()) {
        let qemu = if native { QEMU_10_0.with_retry() } else { QEMU_10_0.capabilities.clone() };
        let disk = DiskConfig {
            path: Some("/a".to_owned()), bus: Some(bus), on_error: Some(errors), ..DiskConfig::default()
        };
        let device = DeviceConfig::Disk(disk.clone());
        let host = configs::host(std::slice::from_ref(&device));
        let Ok(plan) = plan(&device, &empty(), &host, &qemu, Moment::Hot) else { return Ok(()) };
        let placed = plan.parts.last().expect("the disk is the last");
        let retry = placed.retry.clone();
        prop_assert_eq!(&retry, &disk.retry(&placed.id, false, &qemu).expect("it was planned"));
        let engine = retry.as_ref().map(|retry: &Retry| retry.engine);
        let (needs, spec) = (format!("{:?}", placed.needs), format!("{:?}", placed.spec));
        prop_assert_eq!(needs.contains("IoProxy"), engine == Some(Engine::Proxy));
        prop_assert_eq!(spec.contains("\"nbd\""), engine == Some(Engine::Proxy));
        prop_assert_eq!(spec.contains("retry_interval"), engine == Some(Engine::Native));
        prop_assert_eq!(spec.contains("\"retry\""), engine == Some(Engine::Native));
    }
}
