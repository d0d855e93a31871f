//! Builds start, end, are kept, are changed, and are forgotten.

use super::*;

fn record(id: &str) -> BuildHistoryRecord {
    BuildHistoryRecord {
        r#ref: id.to_owned(),
        ..Default::default()
    }
}

fn ids(history: &History, active_only: bool) -> Vec<String> {
    let (events, _) = history.listen("", active_only);
    events
        .into_iter()
        .filter_map(|event| event.record.map(|record| record.r#ref))
        .collect()
}

#[tokio::test]
async fn builds_start_and_end() {
    let history = History::new(HistoryLimits::default());
    let (_, mut events) = history.listen("", false);
    let running = history.start(record("a"), Trace::begin());
    assert_eq!(ids(&history, true), ["a"]);
    assert!(!history.delete("a").await);
    running.finish(Ok(Finished::default())).await;
    assert!(ids(&history, true).is_empty());
    assert_eq!(
        events.try_recv().unwrap().r#type(),
        BuildHistoryEventType::Started
    );
    let event = events.try_recv().unwrap();
    assert_eq!(event.r#type(), BuildHistoryEventType::Complete);
    assert!(event.record.unwrap().completed_at.is_some());
    assert!(history.delete("a").await && !history.finalize("a").await);
    drop(history.start(record("b"), Trace::begin()));
    let (events, _) = history.listen("b", false);
    assert_eq!(events[0].record.as_ref().unwrap().error.as_ref().unwrap().code, 1);
}

#[tokio::test]
async fn a_build_is_deleted_once_its_record_is_complete() {
    use futures_util::FutureExt as _;

    let history = History::new(HistoryLimits::default());
    let _running = history.start(record("a"), Trace::begin());
    let complete = history.completes("a");
    let outcome = Outcome {
        error: None,
        finished: Finished::default(),
    };
    history.end("a", outcome);
    let mut deleting = Box::pin(history.delete("a"));
    assert!(deleting.as_mut().now_or_never().is_none());
    assert_eq!(ids(&history, false), ["a"]);
    drop(complete);
    assert!(deleting.await && ids(&history, false).is_empty());
}

#[tokio::test]
async fn old_builds_are_forgotten_unless_pinned() {
    let history = History::new(HistoryLimits {
        max_entries: 2,
        ..HistoryLimits::default()
    });
    for id in ["a", "b", "c", "d"] {
        history
            .start(record(id), Trace::begin())
            .finish(Ok(Finished::default()))
            .await;
        if id == "a" {
            assert!(history.pin("a", true));
        }
    }
    assert_eq!(ids(&history, false), ["a", "c", "d"]);
    assert!(!history.pin("b", true));
}

#[tokio::test]
async fn progress_can_be_read_later() {
    let history = History::new(HistoryLimits::default());
    let running = history.start(record("a"), Trace::begin());
    let progress = JobProgress::new();
    history.attach("a", progress.clone());
    assert!(history.describe_running().contains("build a"));
    progress.close();
    running.finish(Ok(Finished::default())).await;
    let mut subscription = history.progress("a").unwrap();
    assert!(subscription.next().await.is_none());
}

fn kept_in(path: &std::path::Path) -> History {
    let content = engine::content::Store::open(&path.join("content")).unwrap();
    let snapshotter = snapshot::Native::open(&path.join("snapshots")).unwrap();
    let store = engine::cache::Store::open(path, content, Arc::new(snapshotter), Default::default()).unwrap();
    History::open(HistoryLimits::default(), store)
}

fn only(history: &History) -> BuildHistoryRecord {
    let (events, _) = history.listen("", false);
    assert_eq!(events.len(), 1);
    events[0].record.clone().unwrap()
}

fn blob(history: &History, descriptor: &Descriptor) -> Vec<u8> {
    let digest = descriptor.digest.parse().unwrap();
    let store = history.archive.as_ref().unwrap().store();
    let bytes = store
        .content()
        .reader(&digest)
        .unwrap()
        .read_all(1 << 20)
        .unwrap();
    assert_eq!(descriptor.size, i64::try_from(bytes.len()).unwrap());
    bytes
}

#[tokio::test]
async fn errors_are_kept_apart_with_their_details() {
    use prost::Message as _;

    let directory = tempfile::tempdir().unwrap();
    let history = kept_in(directory.path());
    let error = api::pb::rpc::Status {
        code: 2,
        message: "no such file".to_owned(),
        details: vec![prost_types::Any {
            type_url: "example".to_owned(),
            value: vec![1, 2, 3],
        }],
    };
    let running = history.start(record("a"), Trace::begin());
    running.finish(Err(error.clone())).await;
    history.drain().await;
    drop(history);
    let history = kept_in(directory.path());
    let record = only(&history);
    let shown = record.error.unwrap();
    assert_eq!(shown.message, "no such file");
    assert!(shown.details.is_empty());
    let kept = record.external_error.unwrap();
    assert_eq!(
        kept.media_type,
        "application/vnd.googeapis.google.rpc.status+proto"
    );
    let read = api::pb::rpc::Status::decode(blob(&history, &kept).as_slice()).unwrap();
    assert_eq!(read, error);
}

#[tokio::test]
async fn a_final_record_has_its_trace() {
    let directory = tempfile::tempdir().unwrap();
    let history = kept_in(directory.path());
    let running = history.start(record("a"), Trace::begin());
    assert!(history.finalize("a").await && !history.finalize("b").await);
    running.finish(Ok(Finished::default())).await;
    assert!(history.finalize("a").await);
    let trace = only(&history).trace.unwrap();
    assert_eq!(trace.media_type, "application/vnd.buildkit.otlp.json.v0");
    history.drain().await;
    drop(history);
    let history = kept_in(directory.path());
    assert!(history.finalize("a").await);
    assert_eq!(only(&history).trace.as_ref(), Some(&trace));
    let spans = String::from_utf8(blob(&history, &trace)).unwrap();
    assert!(spans.contains("moby.buildkit.v1.Control/Solve"), "{spans}");
    assert!(history.pin("a", true) && only(&history).pinned);
}

#[tokio::test]
async fn a_trace_has_the_spans_of_steps() {
    use api::pb::trace as pb;
    use api::pb::trace::trace_service_server::TraceService as _;

    use crate::services::traces::tests::request;

    let directory = tempfile::tempdir().unwrap();
    let history = kept_in(directory.path());
    let trace = Trace::continuing("00-07070707070707070707070707070707-b7ad6b7169203331-01");
    let running = history.start(record("a"), trace);
    let span = pb::Span {
        trace_id: vec![7; 16].into(),
        span_id: vec![9; 8].into(),
        name: "work of a step".to_owned(),
        ..Default::default()
    };
    let request = request(&[span]);
    let export = || history.traces();
    export()
        .export(tonic::Request::new(request.clone()))
        .await
        .unwrap();
    running.finish(Ok(Finished::default())).await;
    assert!(history.finalize("a").await);
    // Too late.
    export().export(tonic::Request::new(request)).await.unwrap();
    let kept = blob(&history, &only(&history).trace.unwrap());
    let spans: Vec<serde_json::Value> = serde_json::Deserializer::from_slice(&kept)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
    let names: Vec<&str> = spans.iter().map(|span| span["Name"].as_str().unwrap()).collect();
    assert_eq!(names, ["moby.buildkit.v1.Control/Solve", "work of a step"]);
}
