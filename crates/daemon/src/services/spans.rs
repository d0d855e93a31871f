//! A build's steps as OpenTelemetry spans, for the trace of its record.
//!
//! The blob holds one JSON object a span, one after the other, in the form of OpenTelemetry's Go library (its `SpanStub`):
//! clients that show traces of builds read that.

use std::time::SystemTime;

use api::pb::control::BuildHistoryRecord;
use engine::progress::Vertex;
use oci::Digest;
use serde_json::{Value, json};

use super::system_time;

/// Kinds and codes of OpenTelemetry, as numbers.
const KIND_INTERNAL: u8 = 1;
const KIND_SERVER: u8 = 2;
const CODE_UNSET: u8 = 0;
const CODE_ERROR: u8 = 1;
/// What a trace has in the place of a parent that is not there.
const NO_TRACE: &str = "00000000000000000000000000000000";
const NO_SPAN: &str = "0000000000000000";
/// Bytes of hexadecimal digits in the identifiers of spans.
const SPAN_ID_LEN: usize = 16;
const TRACE_ID_LEN: usize = 32;

/// The trace that a build belongs to: the one that its client began, if it began one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceParent(Option<(String, String)>);

impl TraceParent {
    /// Reads the header `traceparent` (W3C Trace Context): version, trace, span and flags, in hexadecimal. What does not
    /// read names no trace.
    pub fn from_header(value: &str) -> Self {
        let mut parts = value.split('-').skip(1);
        let mut hexadecimal = |length: usize| {
            let part = parts.next()?;
            let is_hexadecimal = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            (part.len() == length && is_hexadecimal && part.bytes().any(|byte| byte != b'0'))
                .then(|| part.to_owned())
        };
        let trace = hexadecimal(TRACE_ID_LEN);
        Self(trace.and_then(|trace| Some((trace, hexadecimal(SPAN_ID_LEN)?))))
    }
}

/// Writes the spans of a build that has ended: one for the request, and one for each step that started.
pub fn encode(record: &BuildHistoryRecord, vertices: &[Vertex], parent: &TraceParent) -> Vec<u8> {
    let trace = Trace::new(record, parent);
    let mut steps: Vec<(SystemTime, &Vertex)> = vertices
        .iter()
        .filter_map(|vertex| Some((vertex.started?, vertex)))
        .collect();
    steps.sort_by_key(|(started, vertex)| (*started, vertex.digest));
    let mut bytes = Vec::new();
    let spans = steps.iter().map(|(started, vertex)| trace.step(*started, vertex));
    for span in spans.chain([trace.request(record, steps.len())]) {
        bytes.extend(span.to_string().into_bytes());
        bytes.push(b'\n');
    }
    bytes
}

struct Trace {
    id: String,
    parent: Option<String>,
    request: String,
    ended: SystemTime,
}

impl Trace {
    fn new(record: &BuildHistoryRecord, parent: &TraceParent) -> Self {
        // The name of a build and its time are as unlikely to come back as anything random.
        let own = Digest::sha256(format!("{} {:?}", record.r#ref, record.created_at).as_bytes());
        let (id, parent) = match &parent.0 {
            Some((trace, span)) => (trace.clone(), Some(span.clone())),
            None => (own.hex()[..TRACE_ID_LEN].to_owned(), None),
        };
        Self {
            id,
            parent,
            request: own.hex()[TRACE_ID_LEN..TRACE_ID_LEN + SPAN_ID_LEN].to_owned(),
            ended: system_time(record.completed_at.as_ref()),
        }
    }

    fn request(&self, record: &BuildHistoryRecord, steps: usize) -> Value {
        let parent = match &self.parent {
            Some(span) => context(&self.id, span, true),
            None => context(NO_TRACE, NO_SPAN, false),
        };
        let error = record.error.as_ref().map_or("", |error| error.message.as_str());
        Span {
            name: "moby.buildkit.v1.Control/Solve",
            context: context(&self.id, &self.request, false),
            parent,
            kind: KIND_SERVER,
            times: (system_time(record.created_at.as_ref()), self.ended),
            attribute: ("ref", record.r#ref.clone()),
            error,
            children: steps,
        }
        .encode()
    }

    fn step(&self, started: SystemTime, vertex: &Vertex) -> Value {
        let digest = vertex.digest.to_string();
        let id = Digest::sha256(format!("{} {digest}", self.request).as_bytes());
        Span {
            name: &vertex.name,
            context: context(&self.id, &id.hex()[..SPAN_ID_LEN], false),
            parent: context(&self.id, &self.request, false),
            kind: KIND_INTERNAL,
            // A step that was given up has no end of its own.
            times: (started, vertex.completed.unwrap_or(self.ended)),
            attribute: ("vertex", digest),
            error: &vertex.error,
            children: 0,
        }
        .encode()
    }
}

fn context(trace: &str, span: &str, is_remote: bool) -> Value {
    let flags = if trace == NO_TRACE { "00" } else { "01" };
    json!({"TraceID": trace, "SpanID": span, "TraceFlags": flags, "TraceState": "", "Remote": is_remote})
}

struct Span<'a> {
    name: &'a str,
    context: Value,
    parent: Value,
    kind: u8,
    /// When it started and ended.
    times: (SystemTime, SystemTime),
    attribute: (&'static str, String),
    /// Why it failed; empty: it did not.
    error: &'a str,
    children: usize,
}

impl Span<'_> {
    fn encode(self) -> Value {
        let code = if self.error.is_empty() {
            CODE_UNSET
        } else {
            CODE_ERROR
        };
        let scope = json!({"Name": "cooper", "Version": "", "SchemaURL": "", "Attributes": null});
        json!({
            "Name": self.name,
            "SpanContext": self.context,
            "Parent": self.parent,
            "SpanKind": self.kind,
            "StartTime": oci::timestamp::from_system(self.times.0),
            "EndTime": oci::timestamp::from_system(self.times.1),
            "Attributes": [attribute(self.attribute.0, &self.attribute.1)],
            "Events": null,
            "Links": null,
            "Status": {"Code": code, "Description": self.error},
            "DroppedAttributes": 0,
            "DroppedEvents": 0,
            "DroppedLinks": 0,
            "ChildSpanCount": self.children,
            "Resource": [attribute("service.name", "buildkitd")],
            "InstrumentationScope": scope,
            "InstrumentationLibrary": scope,
        })
    }
}

fn attribute(key: &str, value: &str) -> Value {
    json!({"Key": key, "Value": {"Type": "STRING", "Value": value}})
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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

    fn spans(parent: &TraceParent) -> Vec<Value> {
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
        let bytes = encode(&record, &vertices, parent);
        let read = serde_json::Deserializer::from_slice(&bytes).into_iter();
        read.map(Result::unwrap).collect()
    }

    #[test]
    fn steps_are_children_of_the_request() {
        let spans = spans(&TraceParent::default());
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
        let spans = spans(&TraceParent::from_header(header));
        for span in &spans {
            assert_eq!(span["SpanContext"]["TraceID"], "0af7651916cd43dd8448eb211c80319c");
        }
        assert_eq!(spans[2]["Parent"]["SpanID"], "b7ad6b7169203331");
    }

    #[test]
    fn what_names_no_trace_is_none() {
        for header in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-é0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        ] {
            assert_eq!(
                TraceParent::from_header(header),
                TraceParent::default(),
                "{header}"
            );
        }
    }
}
