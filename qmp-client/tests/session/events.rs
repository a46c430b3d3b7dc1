//! Events: their order against replies, what passes through, their typed views.

use qmp_client::{
    Event, IoAction, IoOperation, JobStatus, KnownEvent, PanicAction, ShutdownCause, Timestamp,
};
use serde_json::{Value, json};

use crate::peer::{session, settle, start};

fn event(name: &str, data: Value) -> Event {
    Event { timestamp: Timestamp::now(), name: name.into(), data }
}

#[tokio::test]
async fn an_event_before_the_reply_is_there_when_the_call_returns() {
    let (qmp, mut events, mut peer) = session().await;
    let call = start(async move { qmp.call("device_del", json!({"id": "d"})).await }).await;
    let got = peer.get().await;
    peer.say(r#"{"event":"DEVICE_DELETED","data":{"device":"d","path":"/p"},"timestamp":{"seconds":1,"microseconds":2}}"#)
        .await;
    peer.answer(&got, json!({})).await;
    call.await.expect("no panic").expect("returned");
    match events.try_next().expect("queued").view() {
        KnownEvent::DeviceDeleted(gone) => assert_eq!(gone.device.as_deref(), Some("d")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn unknown_events_pass_in_order_and_without_a_caller() {
    let (_qmp, mut events, mut peer) = session().await;
    let lines = [
        r#"{"timestamp":{"seconds":-1,"microseconds":-1},"event":"NETDEV_VHOST_USER_CONNECTED","data":{"netdev-id":"n","z":1,"a":[null]}}"#,
        r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"QVIRT_NOVEL"}"#,
    ];
    for line in lines {
        peer.say(line).await;
    }
    for line in lines {
        let event = events.next().await.expect("an event");
        assert_eq!(event.view(), KnownEvent::Other);
        assert_eq!(serde_json::to_string(&event).expect("JSON"), line);
        assert_eq!(serde_json::from_str::<Event>(line).expect("an event"), event);
    }
}

#[tokio::test]
async fn without_a_timestamp_the_time_is_unknown() {
    let (_qmp, mut events, mut peer) = session().await;
    peer.say(r#"{"event":"STOP"}"#).await;
    let event = events.next().await.expect("an event");
    assert_eq!(event.timestamp, Timestamp { seconds: -1, microseconds: -1 });
    assert_eq!(event.view(), KnownEvent::Stop);
}

#[tokio::test]
async fn dropped_events_do_not_end_the_session() {
    let (qmp, events, mut peer) = session().await;
    drop(events);
    peer.say(r#"{"event":"STOP"}"#).await;
    settle().await;
    let call = start(async move { qmp.call("x", Value::Null).await }).await;
    let got = peer.get().await;
    peer.answer(&got, json!(1)).await;
    assert_eq!(call.await.expect("no panic").expect("returned"), 1);
}

#[test]
fn a_disk_error_of_any_qemu_is_understood() {
    let old =
        json!({"device": "", "operation": "write", "action": "stop", "reason": "No space left on device"});
    match event("BLOCK_IO_ERROR", old).view() {
        KnownEvent::BlockIoError(error) => {
            assert_eq!((error.operation, error.action), (IoOperation::Write, IoAction::Stop));
            assert_eq!((error.node_name, error.qom_path, error.nospace), (None, None, false));
        }
        other => panic!("{other:?}"),
    }
    let new = json!({"qom-path": "/machine/peripheral/d", "device": "", "node-name": "d-0-file", "reason": "I/O error",
        "operation": "discard", "action": "retry", "nospace": true, "novel": {}});
    match event("BLOCK_IO_ERROR", new).view() {
        KnownEvent::BlockIoError(error) => {
            assert_eq!(error.operation, IoOperation::Other("discard".into()));
            assert_eq!(error.action.as_str(), "retry");
            assert_eq!(error.node_name.as_deref(), Some("d-0-file"));
            assert_eq!(error.qom_path.as_deref(), Some("/machine/peripheral/d"));
            assert!(error.nospace);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_known_event_has_its_view() {
    use KnownEvent as K;
    assert_eq!(event("RESUME", Value::Null).view(), K::Resume);
    assert_eq!(event("POWERDOWN", Value::Null).view(), K::Powerdown);
    assert!(matches!(event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"})).view(),
        K::Shutdown(s) if s.guest && s.reason == ShutdownCause::GuestShutdown));
    assert!(
        matches!(event("SHUTDOWN", Value::Null).view(), K::Shutdown(s) if s.reason == ShutdownCause::None)
    );
    assert!(matches!(event("RESET", json!({"guest": false, "reason": "novel"})).view(),
        K::Reset(s) if s.reason.to_string() == "novel"));
    assert!(matches!(event("DEVICE_DELETED", json!({"path": "/p/virtio-backend"})).view(),
        K::DeviceDeleted(gone) if gone.device.is_none() && gone.path == "/p/virtio-backend"));
    assert!(matches!(event("DEVICE_UNPLUG_GUEST_ERROR", json!({"device": "d", "path": "/p"})).view(),
        K::DeviceUnplugGuestError(gone) if gone.device.as_deref() == Some("d")));
    assert!(matches!(event("JOB_STATUS_CHANGE", json!({"id": "j", "status": "concluded"})).view(),
        K::JobStatusChange(job) if job.status == JobStatus::Concluded));
    let job =
        json!({"type": "commit", "device": "j", "len": 1, "offset": 1, "speed": 0, "error": "I/O error"});
    let is_job = |job: qmp_client::BlockJob| job.device == "j" && job.kind.as_deref() == Some("commit");
    assert!(
        matches!(event("BLOCK_JOB_COMPLETED", job.clone()).view(), K::BlockJobCompleted(job) if is_job(job.clone()))
    );
    assert!(
        matches!(event("BLOCK_JOB_CANCELLED", job.clone()).view(), K::BlockJobCancelled(job) if is_job(job.clone()))
    );
    assert!(matches!(event("BLOCK_JOB_READY", job).view(), K::BlockJobReady(job) if is_job(job.clone())));
    assert!(matches!(event("BLOCK_JOB_PENDING", json!({"type": "commit", "id": "j"})).view(),
        K::BlockJobPending(job) if is_job(job.clone())));
    assert!(
        matches!(event("BLOCK_JOB_ERROR", json!({"device": "j", "operation": "read", "action": "stop"})).view(),
        K::BlockJobError(job) if job.device == "j")
    );
    assert_eq!(
        event("GUEST_PANICKED", json!({"action": "pause"})).view(),
        K::GuestPanicked(PanicAction::Pause)
    );
    assert!(
        matches!(event("MEMORY_FAILURE", json!({"recipient": "guest", "action": "inject", "flags": {}})).view(),
        K::MemoryFailure(failure) if failure.recipient == "guest" && failure.action == "inject")
    );
    // One that lacks what its type needs is not lost: name and data are there.
    assert_eq!(event("JOB_STATUS_CHANGE", json!({"id": 3})).view(), K::Other);
}
