//! The choice of the engine, what is refused, and what the device is told.

use serde_json::{Value, json};

use super::*;

/// A QEMU as qvirt sees it; `native`: one that retries by itself.
fn qemu(native: bool) -> Capabilities {
    let mut qemu = Capabilities { version: "10.0.2".to_owned(), ..Capabilities::default() };
    qemu.block_drivers = ["nbd", "raw"].map(str::to_owned).into();
    if native {
        qemu.io_error_actions.insert("retry".to_owned());
        for driver in ["virtio-blk-pci", "scsi-hd"] {
            let times = ["retry_interval", "retry_timeout"];
            let times = times.map(|name| (name.to_owned(), "int64".to_owned()));
            qemu.devices.insert(driver.to_owned(), times.into());
        }
    }
    qemu
}

fn disk(bus: &str, on_error: Value) -> DiskConfig {
    serde_json::from_value(json!({"path": "/a", "bus": bus, "on_error": on_error})).expect("a disk")
}

fn retry(disk: &DiskConfig, native: bool) -> Result<Option<Retry>, String> {
    let id = "d".parse().expect("an id");
    disk.retry(&id, false, &qemu(native)).map_err(|refusal| refusal.to_string())
}

/// Both directions retry unless `more` says otherwise.
fn both(more: Value) -> Value {
    let mut on_error = json!({"read": "retry", "write": "retry"});
    on_error.as_object_mut().expect("a table").extend(more.as_object().expect("a table").clone());
    on_error
}

/// The engine, or the refusal.
fn engine(bus: &str, native: bool, more: Value) -> String {
    match retry(&disk(bus, both(more)), native) {
        Ok(retry) => retry.expect("it retries").engine.to_string(),
        Err(refusal) => refusal,
    }
}

#[test]
fn auto_takes_the_best_engine_that_can_do_what_is_asked() {
    let timeout = |act: &str| json!({"timeout": "10s", "at_timeout": act});
    let cases = [
        (json!({}), ["native", "hold"], ["native", "hold"]),
        (json!({"timeout": "10s"}), ["native", "hold"], ["native", "proxy"]),
        (timeout("report"), ["native", "hold"], ["native", "proxy"]),
        (timeout("hold"), ["hold", "hold"], ["hold", "hold"]),
        (timeout("pause"), ["hold", "hold"], ["hold", "hold"]),
        (timeout("unplug"), ["hold", "hold"], ["hold", "hold"]),
        (json!({"timeout": "0ms"}), ["native", "hold"], ["native", "hold"]),
        (json!({"write": "stop"}), ["native", "proxy"], ["native", "proxy"]),
        (json!({"write": "enospc"}), ["native", "proxy"], ["native", "proxy"]),
        (json!({"read": "report"}), ["native", "hold"], ["native", "hold"]),
        (json!({"write": "auto"}), ["native", "hold"], ["native", "hold"]),
    ];
    for (more, blk, scsi) in cases {
        let seen = |bus| [true, false].map(|native| engine(bus, native, more.clone()));
        assert_eq!(seen("virtio-blk"), blk, "virtio-blk with {more}");
        assert_eq!(seen("virtio-scsi"), scsi, "virtio-scsi with {more}");
    }
}

#[test]
fn an_engine_that_was_named_is_taken_or_refused_never_replaced() {
    for name in ["native", "hold", "proxy", "pause"] {
        assert_eq!(engine("virtio-blk", true, json!({"engine": name})), name);
        assert_eq!(engine("virtio-scsi", true, json!({"engine": name})), name);
    }
    let refused = |bus, native, more: Value, reason: &str| {
        let said = engine(bus, native, more.clone());
        assert!(said.starts_with("d: on_error.") && said.contains(reason), "{bus} {more}: {said}");
    };
    let report = |engine: &str| json!({"engine": engine, "timeout": "10s", "at_timeout": "report"});
    refused(
        "virtio-blk",
        false,
        json!({"engine": "native"}),
        "(10.0.2) does not retry by itself: write \"auto\", which takes hold",
    );
    refused("virtio-scsi", false, json!({"engine": "native", "timeout": "1s"}), "which takes proxy");
    refused(
        "virtio-blk",
        true,
        json!({"engine": "native", "timeout": "1s", "at_timeout": "hold"}),
        "it can do nothing else",
    );
    refused("virtio-scsi", false, report("hold"), "only be failed by unplugging");
    refused("virtio-blk", false, report("pause"), "the VM is paused from the first error on");
    refused("virtio-blk", false, json!({"engine": "hold", "read": "stop"}), "could not be told apart");
    refused("virtio-blk", false, json!({"engine": "pause", "write": "enospc"}), "could not be told apart");
    for engine in ["hold", "proxy", "pause"] {
        refused("virtio-blk", true, json!({"engine": engine, "interval": "99ms"}), "100ms at most");
    }
    assert_eq!(engine("virtio-blk", true, json!({"interval": "0ms"})), "native");
}

#[test]
fn where_a_stop_may_lose_interrupts_no_engine_that_stops_the_vm_is_taken_in_an_iothread() {
    let (sound, mut faulty) = (qemu(false), qemu(false));
    faulty.commands.insert("block-job-change".to_owned());
    let id = "d".parse().expect("an id");
    for bus in ["virtio-blk", "virtio-scsi"] {
        let engine = |wish: &str, threaded, qemu: &Capabilities| {
            let retry = disk(bus, both(json!({"engine": wish}))).retry(&id, threaded, qemu);
            retry.map(|retry| retry.expect("it retries").engine.to_string()).map_err(|e| e.to_string())
        };
        assert_eq!(engine("auto", true, &sound).expect("an engine"), "hold");
        assert_eq!(engine("auto", false, &faulty).expect("an engine"), "hold");
        assert_eq!(engine("auto", true, &faulty).expect("an engine"), "proxy");
        for named in ["hold", "pause"] {
            let refused = engine(named, true, &faulty).expect_err("refused");
            assert!(refused.contains("may lose the interrupt"), "{refused}");
            assert_eq!(engine(named, false, &faulty).expect("an engine"), named);
        }
    }
}

#[test]
fn defaults_are_filled_in() {
    let seen = |on_error: Value| retry(&disk("virtio-blk", on_error), false).expect("it is right");
    let mut expected = Retry {
        engine: Engine::Hold,
        read: true,
        write: false,
        interval: Millis::new(1000),
        timeout: None,
        at_timeout: AtTimeout::Report,
    };
    assert_eq!(seen(json!({"read": "retry"})), Some(expected.clone()));
    assert_eq!(seen(json!({"read": "retry", "timeout": "0ms"})), Some(expected.clone()));
    // Shorter than the interval: an attempt is made at the interval, and is the last one.
    expected.timeout = Some(Millis::new(100));
    assert_eq!(seen(json!({"read": "retry", "timeout": "100ms"})), Some(expected.clone()));
    (expected.engine, expected.at_timeout) = (Engine::Pause, AtTimeout::Pause);
    assert_eq!(seen(json!({"read": "retry", "engine": "pause", "timeout": "100ms"})), Some(expected));
    for plain in [json!({}), json!({"read": "stop", "write": "report"})] {
        assert_eq!(seen(plain), None);
    }
}

#[test]
fn times_are_as_long_as_qemu_takes_them() {
    let longest = format!("{}ms", i64::MAX);
    assert_eq!(engine("virtio-blk", true, json!({"interval": longest, "timeout": longest})), "native");
    for key in ["interval", "timeout"] {
        let said = engine("virtio-blk", true, json!({key: format!("{}ms", i64::MAX as u64 + 1)}));
        assert!(said.contains(key) && said.contains("9223372036854775807ms or less"), "{said}");
    }
}

#[test]
fn the_device_is_told_what_its_engine_needs() {
    let told = |more: Value| {
        let disk = disk("virtio-blk", both(more));
        let retry = retry(&disk, true).expect("it is right");
        Value::Object(crate::spec::props(disk.error_properties(retry.as_ref())))
    };
    let native = json!({"rerror": "retry", "werror": "retry", "retry_interval": 1000, "retry_timeout": 0});
    assert_eq!(told(json!({})), native);
    let native = json!({"rerror": "retry", "werror": "stop", "retry_interval": 50, "retry_timeout": 10_000});
    assert_eq!(told(json!({"write": "stop", "interval": "50ms", "timeout": "10s"})), native);
    assert_eq!(told(json!({"engine": "hold"})), json!({"rerror": "stop", "werror": "stop"}));
    assert_eq!(
        told(json!({"engine": "hold", "read": "report"})),
        json!({"rerror": "report", "werror": "stop"})
    );
    assert_eq!(told(json!({"engine": "pause"})), json!({"rerror": "stop", "werror": "stop"}));
    assert_eq!(told(json!({"engine": "proxy"})), json!({"rerror": "enospc", "werror": "enospc"}));
    assert_eq!(
        told(json!({"engine": "proxy", "write": "stop"})),
        json!({"rerror": "enospc", "werror": "stop"})
    );
}

#[test]
fn policies_have_qemus_defaults_filled_in() {
    let policies = |errors: Value| {
        let errors: OnError = serde_json::from_value(errors).expect("a table");
        errors.policies()
    };
    let expected = Policies { read: ErrorPolicy::Report, write: ErrorPolicy::Enospc };
    assert_eq!(policies(json!({})), expected);
    assert_eq!(policies(json!({"read": "auto", "write": "auto"})), expected);
    assert_eq!(policies(json!({"read": "report", "write": "enospc"})), expected);
    assert_eq!(policies(json!({"write": "retry"})), Policies { write: ErrorPolicy::Retry, ..expected });
}

#[test]
fn it_is_told_in_one_line() {
    let line = |bus, native, more: Value| {
        retry(&disk(bus, both(more)), native).expect("it is right").expect("it retries").to_string()
    };
    let cases = [
        (line("virtio-blk", true, json!({})), "engine native retries reads and writes every 1s, for ever"),
        (
            line("virtio-blk", false, json!({"timeout": "10s"})),
            "engine hold retries reads and writes every 1s, for 10s, then the guest gets the error; its flushes wait for the repair",
        ),
        (
            line("virtio-scsi", false, json!({"read": "report", "timeout": "1m"})),
            "engine proxy retries writes every 1s, for 1m, then the guest gets the error",
        ),
        (
            line("virtio-scsi", false, json!({"engine": "pause", "write": "report", "timeout": "5s"})),
            "engine pause retries reads every 1s, the VM paused, for 5s, then the VM stays paused",
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(line, expected);
    }
}

#[test]
fn what_an_engine_stands_on_is_there_or_named() {
    let proxied = disk("virtio-blk", both(json!({"engine": "proxy"})));
    let id = "sixteen-letters-".parse().expect("an id");
    let check = |length: usize| {
        let run_dir = format!("/{}", "r".repeat(length - 1));
        proxied.check(&id, false, &run_dir, &qemu(false)).map_err(|refusal| refusal.to_string())
    };
    // A slash, the id, `-io-control.sock`: 33 bytes, of 107.
    assert!(check(107 - 33 + 1).is_err_and(|said| said.contains("has 108 bytes")));
    assert!(check(107 - 33).is_ok_and(|retry| retry.is_some()));
    let mut without = qemu(false);
    without.block_drivers.remove("nbd");
    for engine in ["hold", "proxy"] {
        let disk = disk("virtio-blk", both(json!({"engine": engine})));
        let refusal = disk.retry(&id, false, &without).expect_err("it has no NBD");
        assert!(refusal.to_string().contains("has no block driver `nbd`"), "{refusal}");
    }
}
