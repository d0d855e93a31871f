//! A build's steps as OpenTelemetry spans, for the trace of its record.
//!
//! The blob holds one JSON object a span, one after the other, in the form of OpenTelemetry's Go library (its `SpanStub`):
//! clients that show traces of builds read that.

use std::time::SystemTime;

use api::pb::control::BuildHistoryRecord;
use engine::progress::Vertex;
use engine::trace::Trace;
use serde_json::{Value, json};

use super::system_time;

/// Kinds and codes of OpenTelemetry, as numbers.
const KIND_INTERNAL: u8 = 1;
const KIND_SERVER: u8 = 2;
pub(super) const CODE_UNSET: u8 = 0;
pub(super) const CODE_ERROR: u8 = 1;
pub(super) const CODE_OK: u8 = 2;
/// What a trace has in the place of a parent that is not there.
pub(super) const NO_TRACE: &str = "00000000000000000000000000000000";
pub(super) const NO_SPAN: &str = "0000000000000000";
/// Writes the spans of a build that has ended: one for the request, and one for each step that started.
pub fn encode(record: &BuildHistoryRecord, vertices: &[Vertex], trace: &Trace) -> Vec<u8> {
    let build = Build {
        trace,
        ended: system_time(record.completed_at.as_ref()),
    };
    let mut steps: Vec<(SystemTime, &Vertex)> = vertices
        .iter()
        .filter_map(|vertex| Some((vertex.started?, vertex)))
        .collect();
    steps.sort_by_key(|(started, vertex)| (*started, vertex.digest));
    let mut bytes = Vec::new();
    let spans = steps.iter().map(|(started, vertex)| build.step(*started, vertex));
    for span in spans.chain([build.request(record, steps.len())]) {
        bytes.extend(span.to_string().into_bytes());
        bytes.push(b'\n');
    }
    bytes
}

/// A build that has ended.
struct Build<'a> {
    trace: &'a Trace,
    ended: SystemTime,
}

impl Build<'_> {
    fn context(&self, span: &str, is_remote: bool) -> Value {
        context(self.trace.id(), span, is_remote)
    }

    fn request(&self, record: &BuildHistoryRecord, steps: usize) -> Value {
        let parent = match self.trace.parent() {
            Some(span) => self.context(span, true),
            None => context(NO_TRACE, NO_SPAN, false),
        };
        let error = record.error.as_ref().map_or("", |error| error.message.as_str());
        let times = (system_time(record.created_at.as_ref()), self.ended);
        Span {
            parent,
            kind: KIND_SERVER,
            children: steps,
            ..self.span(
                "moby.buildkit.v1.Control/Solve",
                self.trace.request(),
                times,
                ("ref", &record.r#ref),
                error,
            )
        }
        .encode()
    }

    fn step(&self, started: SystemTime, vertex: &Vertex) -> Value {
        // A step that was given up has no end of its own.
        let times = (started, vertex.completed.unwrap_or(self.ended));
        let attribute = ("vertex", vertex.digest.to_string());
        self.span(
            &vertex.name,
            &self.trace.step(vertex.digest),
            times,
            (attribute.0, &attribute.1),
            &vertex.error,
        )
        .encode()
    }

    /// A span of the daemon's own, as a part of the request's. `error` is empty where there was none.
    fn span<'a>(
        &self,
        name: &'a str,
        id: &str,
        times: (SystemTime, SystemTime),
        (key, value): (&str, &str),
        error: &'a str,
    ) -> Span<'a> {
        let code = if error.is_empty() { CODE_UNSET } else { CODE_ERROR };
        Span {
            name,
            context: self.context(id, false),
            parent: self.context(self.trace.request(), false),
            kind: KIND_INTERNAL,
            times,
            attributes: json!([attribute(key, "STRING", value.into())]),
            events: Value::Null,
            links: Value::Null,
            status: (code, error),
            dropped: [0; 3],
            children: 0,
            resource: json!([attribute("service.name", "STRING", "buildkitd".into())]),
            scope: json!({"Name": "cooper", "Version": "", "SchemaURL": "", "Attributes": null}),
        }
    }
}

/// The identity of a span, or of the parent of one.
pub(super) fn context(trace: &str, span: &str, is_remote: bool) -> Value {
    let flags = if trace == NO_TRACE { "00" } else { "01" };
    json!({"TraceID": trace, "SpanID": span, "TraceFlags": flags, "TraceState": "", "Remote": is_remote})
}

/// A span; lists of JSON are `null` where they would be empty.
pub(super) struct Span<'a> {
    pub(super) name: &'a str,
    pub(super) context: Value,
    pub(super) parent: Value,
    pub(super) kind: u8,
    /// When it started and ended.
    pub(super) times: (SystemTime, SystemTime),
    pub(super) attributes: Value,
    pub(super) events: Value,
    pub(super) links: Value,
    /// How it ended, and why.
    pub(super) status: (u8, &'a str),
    /// How many attributes, events and links are missing.
    pub(super) dropped: [u32; 3],
    pub(super) children: usize,
    /// What made it: a program, and a part of it.
    pub(super) resource: Value,
    pub(super) scope: Value,
}

impl Span<'_> {
    pub(super) fn encode(self) -> Value {
        let [attributes, events, links] = self.dropped;
        json!({
            "Name": self.name,
            "SpanContext": self.context,
            "Parent": self.parent,
            "SpanKind": self.kind,
            "StartTime": oci::timestamp::from_system(self.times.0),
            "EndTime": oci::timestamp::from_system(self.times.1),
            "Attributes": self.attributes,
            "Events": self.events,
            "Links": self.links,
            "Status": {"Code": self.status.0, "Description": self.status.1},
            "DroppedAttributes": attributes,
            "DroppedEvents": events,
            "DroppedLinks": links,
            "ChildSpanCount": self.children,
            "Resource": self.resource,
            "InstrumentationScope": self.scope,
            "InstrumentationLibrary": self.scope,
        })
    }
}

/// A key and its value, of a type as OpenTelemetry's Go library names it.
pub(super) fn attribute(key: &str, kind: &str, value: Value) -> Value {
    json!({"Key": key, "Value": {"Type": kind, "Value": value}})
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use oci::Digest;

    use super::*;
    use crate::services::timestamp;

    fn vertex(name: &str, started: Option<SystemTime>, error: &str) -> Vertex {
        Vertex {
            digest: Digest::sha256(name.as_bytes()),
            inputs: Vec::new(),
            name: name.to_owned(),
            cached: false,
            started,
            completed: None,
            error: error.to_owned(),
            progress_group: None,
        }
    }

    fn spans(trace: &Trace) -> Vec<Value> {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let record = BuildHistoryRecord {
            r#ref: "abc".to_owned(),
            created_at: Some(timestamp(at(1))),
            completed_at: Some(timestamp(at(9))),
            ..Default::default()
        };
        let vertices = [
            vertex("second", Some(at(3)), "exit code: 1"),
            vertex("never", None, ""),
            vertex("first", Some(at(2)), ""),
        ];
        let bytes = encode(&record, &vertices, trace);
        let read = serde_json::Deserializer::from_slice(&bytes).into_iter();
        read.map(Result::unwrap).collect()
    }

    #[test]
    fn steps_are_children_of_the_request() {
        let spans = spans(&Trace::begin());
        let names: Vec<&str> = spans.iter().map(|span| span["Name"].as_str().unwrap()).collect();
        assert_eq!(names, ["first", "second", "moby.buildkit.v1.Control/Solve"]);
        let request = &spans[2];
        for step in &spans[..2] {
            assert_eq!(step["Parent"]["SpanID"], request["SpanContext"]["SpanID"]);
            assert_eq!(step["SpanContext"]["TraceID"], request["SpanContext"]["TraceID"]);
            assert_eq!(step["EndTime"], "1970-01-01T00:00:09Z");
        }
        assert_ne!(
            spans[0]["SpanContext"]["SpanID"],
            spans[1]["SpanContext"]["SpanID"]
        );
        assert_eq!(
            spans[1]["Status"],
            json!({"Code": 1, "Description": "exit code: 1"})
        );
        assert_eq!(
            spans[0]["Attributes"][0]["Value"]["Value"],
            Digest::sha256(b"first").to_string()
        );
        assert_eq!(request["Parent"]["TraceID"], NO_TRACE);
        assert_eq!(request["ChildSpanCount"], 2);
    }

    #[test]
    fn a_client_that_traces_is_followed() {
        let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let spans = spans(&Trace::continuing(header));
        for span in &spans {
            assert_eq!(span["SpanContext"]["TraceID"], "0af7651916cd43dd8448eb211c80319c");
        }
        assert_eq!(spans[2]["Parent"]["SpanID"], "b7ad6b7169203331");
    }
}
