//! Spans as OpenTelemetry's protocol carries them, turned into those of a record's trace.

use std::time::{Duration, SystemTime};

use api::pb::trace as pb;
use api::pb::trace::any_value::Value as Any;
use bytes::Bytes;
use prost::Message as _;
use serde_json::{Value, json};

use super::spans::{CODE_ERROR, CODE_OK, CODE_UNSET, NO_SPAN, NO_TRACE, Span, attribute, context};

const TRACE_ID_BYTES: usize = 16;
const SPAN_ID_BYTES: usize = 8;
/// Codes of the protocol.
const STATUS_OK: i32 = 1;
const STATUS_ERROR: i32 = 2;
/// The last kind that there is.
const KIND_CONSUMER: u8 = 5;

/// What made spans.
#[derive(Debug)]
pub(super) struct Origin {
    resource: Value,
    scope: Value,
}

impl Origin {
    pub(super) fn decode(resource: &Bytes, scoped: &pb::ScopeSpans) -> Result<Self, prost::DecodeError> {
        let resource = pb::Resource::decode(resource.clone())?;
        let scope = pb::InstrumentationScope::decode(scoped.scope.clone())?;
        Ok(Self {
            resource: attributes(resource.attributes),
            scope: json!({
                "Name": scope.name,
                "Version": scope.version,
                "SchemaURL": scoped.schema_url,
                "Attributes": attributes(scope.attributes),
            }),
        })
    }
}

/// Writes an identifier.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads an identifier: it has its length and is not zero.
fn identifier(bytes: &[u8], len: usize) -> Option<String> {
    let is_valid = bytes.len() == len && bytes.iter().any(|byte| *byte != 0);
    is_valid.then(|| hexadecimal(bytes))
}

/// Encodes a span as a line of a record's trace; `None` for one without valid identifiers.
pub(super) fn encode(span: pb::Span, origin: &Origin) -> Option<Vec<u8>> {
    let trace = identifier(&span.trace_id, TRACE_ID_BYTES)?;
    let id = identifier(&span.span_id, SPAN_ID_BYTES)?;
    let parent = match identifier(&span.parent_span_id, SPAN_ID_BYTES) {
        Some(parent) => context(&trace, &parent, false),
        None => context(NO_TRACE, NO_SPAN, false),
    };
    let mut own = context(&trace, &id, false);
    own["TraceState"] = span.trace_state.into();
    let (code, description) = match span.status {
        Some(status) if status.code == STATUS_ERROR => (CODE_ERROR, status.message),
        Some(status) if status.code == STATUS_OK => (CODE_OK, status.message),
        _ => (CODE_UNSET, String::new()),
    };
    let kind = u8::try_from(span.kind).ok().filter(|kind| *kind <= KIND_CONSUMER);
    let stub = Span {
        name: &span.name,
        context: own,
        parent,
        kind: kind.unwrap_or(0),
        times: (time(span.start_time_unix_nano), time(span.end_time_unix_nano)),
        attributes: attributes(span.attributes),
        events: list(span.events.into_iter().map(event)),
        links: list(span.links.into_iter().filter_map(link)),
        status: (code, &description),
        dropped: [
            span.dropped_attributes_count,
            span.dropped_events_count,
            span.dropped_links_count,
        ],
        children: 0,
        resource: origin.resource.clone(),
        scope: origin.scope.clone(),
    };
    let mut line = stub.encode().to_string().into_bytes();
    line.push(b'\n');
    Some(line)
}

fn time(ns: u64) -> SystemTime {
    let after = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(ns));
    after.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// An absent list is no empty one to those who read it.
fn list(items: impl Iterator<Item = Value>) -> Value {
    let items: Vec<Value> = items.collect();
    if items.is_empty() {
        Value::Null
    } else {
        Value::Array(items)
    }
}

fn event(event: pb::SpanEvent) -> Value {
    json!({
        "Name": event.name,
        "Attributes": attributes(event.attributes),
        "DroppedAttributeCount": event.dropped_attributes_count,
        "Time": oci::timestamp::from_system(time(event.time_unix_nano)),
    })
}

fn link(link: pb::SpanLink) -> Option<Value> {
    let trace = identifier(&link.trace_id, TRACE_ID_BYTES)?;
    let span = identifier(&link.span_id, SPAN_ID_BYTES)?;
    let mut context = context(&trace, &span, false);
    context["TraceState"] = link.trace_state.into();
    Some(json!({
        "SpanContext": context,
        "Attributes": attributes(link.attributes),
        "DroppedAttributeCount": link.dropped_attributes_count,
    }))
}

fn attributes(pairs: Vec<pb::KeyValue>) -> Value {
    list(pairs.into_iter().map(|pair| {
        let (kind, value) = typed(pair.value.and_then(|value| value.value));
        attribute(&pair.key, kind, value)
    }))
}

/// Names the type of a value as OpenTelemetry's Go library does. It has no type for what is nested or raw bytes.
fn typed(value: Option<Any>) -> (&'static str, Value) {
    match value {
        Some(Any::BoolValue(value)) => ("BOOL", value.into()),
        Some(Any::IntValue(value)) => ("INT64", value.into()),
        Some(Any::DoubleValue(value)) => ("FLOAT64", value.into()),
        Some(Any::StringValue(value)) => ("STRING", value.into()),
        Some(Any::ArrayValue(array)) => slice(array.values),
        None => ("STRING", "INVALID".into()),
    }
}

/// A list has the type of its first value; others are left out.
fn slice(values: Vec<pb::AnyValue>) -> (&'static str, Value) {
    let all: Vec<(&str, Value)> = values.into_iter().map(|value| typed(value.value)).collect();
    let kind = all.first().map_or("STRING", |(kind, _)| *kind);
    let name = match kind {
        "BOOL" => "BOOLSLICE",
        "INT64" => "INT64SLICE",
        "FLOAT64" => "FLOAT64SLICE",
        "STRING" => "STRINGSLICE",
        _ => return ("STRINGSLICE", Value::Array(Vec::new())),
    };
    let same = all.into_iter().filter(|(other, _)| *other == kind);
    (name, same.map(|(_, value)| value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(key: &str, value: Any) -> pb::KeyValue {
        pb::KeyValue {
            key: key.to_owned(),
            value: Some(pb::AnyValue { value: Some(value) }),
        }
    }

    fn encoded(span: pb::Span) -> Option<Value> {
        let resource = pb::Resource {
            attributes: vec![pair("service.name", Any::StringValue("step".to_owned()))],
        };
        let scope = pb::InstrumentationScope {
            name: "library".to_owned(),
            ..Default::default()
        };
        let scoped = pb::ScopeSpans {
            scope: scope.encode_to_vec().into(),
            ..Default::default()
        };
        let origin = Origin::decode(&resource.encode_to_vec().into(), &scoped).unwrap();
        encode(span, &origin).map(|line| serde_json::from_slice(&line).unwrap())
    }

    fn span() -> pb::Span {
        pb::Span {
            trace_id: Bytes::from_static(&[1; 16]),
            span_id: Bytes::from_static(&[2; 8]),
            parent_span_id: Bytes::from_static(&[3; 8]),
            name: "work".to_owned(),
            kind: 3,
            start_time_unix_nano: 1_500_000_000,
            end_time_unix_nano: u64::MAX,
            status: Some(pb::SpanStatus {
                message: "broken".to_owned(),
                code: STATUS_ERROR,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn spans_are_told_as_go_tells_them() {
        let list = pb::ArrayValue {
            values: vec![
                pb::AnyValue {
                    value: Some(Any::IntValue(1)),
                },
                pb::AnyValue {
                    value: Some(Any::BoolValue(true)),
                },
            ],
        };
        let told = encoded(pb::Span {
            attributes: vec![
                pair("n", Any::IntValue(-4)),
                pair("l", Any::ArrayValue(list)),
                pb::KeyValue::default(),
            ],
            events: vec![pb::SpanEvent {
                name: "seen".to_owned(),
                ..Default::default()
            }],
            links: vec![pb::SpanLink::default()],
            ..span()
        })
        .unwrap();
        assert_eq!(told["Name"], "work");
        assert_eq!(told["SpanKind"], 3);
        assert_eq!(told["SpanContext"]["TraceID"], "01".repeat(16));
        assert_eq!(told["SpanContext"]["SpanID"], "02".repeat(8));
        assert_eq!(told["Parent"]["SpanID"], "03".repeat(8));
        assert_eq!(told["StartTime"], "1970-01-01T00:00:01.5Z");
        assert_eq!(told["Status"], json!({"Code": 1, "Description": "broken"}));
        assert_eq!(
            told["Attributes"],
            json!([
                {"Key": "n", "Value": {"Type": "INT64", "Value": -4}},
                {"Key": "l", "Value": {"Type": "INT64SLICE", "Value": [1]}},
                {"Key": "", "Value": {"Type": "STRING", "Value": "INVALID"}},
            ])
        );
        assert_eq!(told["Events"][0]["Name"], "seen");
        assert_eq!(told["Links"], Value::Null);
        assert_eq!(told["Resource"][0]["Value"]["Value"], "step");
        assert_eq!(told["InstrumentationScope"]["Name"], "library");
    }

    #[test]
    fn spans_without_identifiers_are_none() {
        for (trace, id) in [(0_u8, 1_u8), (1, 0)] {
            let nameless = pb::Span {
                trace_id: vec![trace; 16].into(),
                span_id: vec![id; 8].into(),
                ..span()
            };
            assert_eq!(encoded(nameless), None);
        }
        let short = pb::Span {
            span_id: Bytes::from_static(&[1; 7]),
            ..span()
        };
        assert_eq!(encoded(short), None);
        let root = pb::Span {
            parent_span_id: Bytes::new(),
            ..span()
        };
        assert_eq!(encoded(root).unwrap()["Parent"]["TraceID"], NO_TRACE);
    }
}
