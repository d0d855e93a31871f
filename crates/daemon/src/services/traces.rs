//! The collector of OpenTelemetry spans: those of builds that run are kept for their records, up to a bound; others are
//! accepted, so that they are not sent again and again, and go nowhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::pb::trace as pb;
use bytes::Bytes;
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::otlp;

/// Spans of one trace that are kept, and the bytes that they take.
const MAX_SPANS: usize = 4096;
const MAX_BYTES: usize = 4 << 20;
/// Most bytes of one span as it comes, and of what several have in common: decoded, they take many times that.
const MAX_PART_BYTES: usize = 64 << 10;

/// Collects spans. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    /// Traces of builds that run, by their identifiers.
    running: Arc<Mutex<BTreeMap<String, Collected>>>,
}

#[derive(Debug, Default)]
struct Collected {
    /// Builds of the trace that run.
    builds: usize,
    spans: usize,
    /// JSON, a line each.
    bytes: Vec<u8>,
}

impl Collected {
    fn is_full(&self) -> bool {
        self.spans >= MAX_SPANS || self.bytes.len() >= MAX_BYTES
    }

    /// Adds a span's line; returns whether there was room.
    fn add(&mut self, line: &[u8]) -> bool {
        let fits = !self.is_full() && self.bytes.len().saturating_add(line.len()) <= MAX_BYTES;
        if fits {
            self.spans += 1;
            self.bytes.extend_from_slice(line);
        }
        fits
    }
}

/// What becomes of a span.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is kept if it fits.
    Wanted,
    /// Its trace has too many.
    Surplus,
    /// Its trace is no running build's.
    Foreign,
}

impl Traces {
    /// Collects the spans of a trace until what is returned is dropped. Builds may share a trace, and then its spans.
    pub fn collect(&self, trace: &str) -> Collecting {
        self.lock().entry(trace.to_owned()).or_default().builds += 1;
        Collecting {
            traces: self.clone(),
            id: trace.to_owned(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Collected>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fate(&self, trace: &str) -> Fate {
        match self.lock().get(trace) {
            Some(collected) if collected.is_full() => Fate::Surplus,
            Some(_) => Fate::Wanted,
            None => Fate::Foreign,
        }
    }

    /// Takes the spans of a request; returns how many had no room.
    fn take(&self, request: &pb::ExportTraceServiceRequest) -> Result<i64, Status> {
        let mut rejected = 0;
        for resource_spans in &request.resource_spans {
            let part = pb::ResourceSpans::decode(resource_spans.clone()).map_err(undecodable)?;
            for scope_spans in &part.scope_spans {
                let scoped = pb::ScopeSpans::decode(scope_spans.clone()).map_err(undecodable)?;
                rejected += self.take_scope(&part.resource, &scoped)?;
            }
        }
        Ok(rejected)
    }

    fn take_scope(&self, resource: &Bytes, scoped: &pb::ScopeSpans) -> Result<i64, Status> {
        let shared = [resource.len(), scoped.scope.len(), scoped.schema_url.len()];
        if shared.iter().any(|len| *len > MAX_PART_BYTES) {
            return Ok(count(scoped.spans.len()));
        }
        let mut origin = None;
        let mut rejected = 0;
        for bytes in &scoped.spans {
            if bytes.len() > MAX_PART_BYTES {
                rejected += 1;
                continue;
            }
            let span = pb::Span::decode(bytes.clone()).map_err(undecodable)?;
            let trace = otlp::hexadecimal(&span.trace_id);
            match self.fate(&trace) {
                Fate::Foreign => {}
                Fate::Surplus => rejected += 1,
                Fate::Wanted => {
                    let origin = match &origin {
                        Some(origin) => origin,
                        None => origin.insert(otlp::Origin::decode(resource, scoped).map_err(undecodable)?),
                    };
                    let line = otlp::encode(span, origin)
                        .ok_or_else(|| Status::invalid_argument("a span has no valid identifier"))?;
                    let mut running = self.lock();
                    if let Some(collected) = running.get_mut(&trace)
                        && !collected.add(&line)
                    {
                        rejected += 1;
                    }
                }
            }
        }
        Ok(rejected)
    }
}

fn count(spans: usize) -> i64 {
    i64::try_from(spans).unwrap_or(i64::MAX)
}

fn undecodable(error: prost::DecodeError) -> Status {
    Status::invalid_argument(format!("spans do not decode: {error}"))
}

/// A build's part in the collection of a trace: while there is one, spans of the trace are kept.
#[derive(Debug)]
pub struct Collecting {
    traces: Traces,
    id: String,
}

impl Collecting {
    /// Returns what came so far: one JSON object a line, as in the trace of a record.
    pub fn spans(&self) -> Vec<u8> {
        let running = self.traces.lock();
        running
            .get(&self.id)
            .map(|collected| collected.bytes.clone())
            .unwrap_or_default()
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        let mut running = self.traces.lock();
        if let Some(collected) = running.get_mut(&self.id) {
            collected.builds -= 1;
            if collected.builds == 0 {
                running.remove(&self.id);
            }
        }
    }
}

#[tonic::async_trait]
impl pb::trace_service_server::TraceService for Traces {
    async fn export(
        &self,
        request: Request<pb::ExportTraceServiceRequest>,
    ) -> Result<Response<pb::ExportTraceServiceResponse>, Status> {
        let rejected = self.take(request.get_ref())?;
        let partial_success = (rejected > 0).then(|| pb::ExportTracePartialSuccess {
            rejected_spans: rejected,
            error_message: "more or larger spans than the record of a build keeps".to_owned(),
        });
        Ok(Response::new(pb::ExportTraceServiceResponse { partial_success }))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const TRACE: [u8; 16] = [7; 16];

    fn span(name: &str) -> pb::Span {
        pb::Span {
            trace_id: Bytes::copy_from_slice(&TRACE),
            span_id: Bytes::from_static(b"12345678"),
            name: name.to_owned(),
            ..Default::default()
        }
    }

    /// A request to keep spans.
    pub(crate) fn request(spans: &[pb::Span]) -> pb::ExportTraceServiceRequest {
        let scoped = pb::ScopeSpans {
            spans: spans.iter().map(|span| span.encode_to_vec().into()).collect(),
            ..Default::default()
        };
        let part = pb::ResourceSpans {
            scope_spans: vec![scoped.encode_to_vec().into()],
            ..Default::default()
        };
        pb::ExportTraceServiceRequest {
            resource_spans: vec![part.encode_to_vec().into()],
        }
    }

    fn names(collecting: &Collecting) -> Vec<String> {
        let spans = collecting.spans();
        let read = serde_json::Deserializer::from_slice(&spans).into_iter::<serde_json::Value>();
        read.map(|span| span.unwrap()["Name"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn spans_of_running_builds_are_kept() {
        let traces = Traces::default();
        let id = otlp::hexadecimal(&TRACE);
        assert_eq!(traces.take(&request(&[span("early")])).unwrap(), 0);
        let (one, other) = (traces.collect(&id), traces.collect(&id));
        let foreign = pb::Span {
            trace_id: Bytes::from_static(&[8; 16]),
            ..span("foreign")
        };
        assert_eq!(traces.take(&request(&[span("a"), foreign])).unwrap(), 0);
        drop(one);
        assert_eq!(traces.take(&request(&[span("b")])).unwrap(), 0);
        assert_eq!(names(&other), ["a", "b"]);
        drop(other);
        assert!(traces.lock().is_empty());
    }

    #[test]
    fn a_trace_has_room_for_so_many_spans() {
        let traces = Traces::default();
        let collecting = traces.collect(&otlp::hexadecimal(&TRACE));
        let many = vec![span("x"); MAX_SPANS + 3];
        // The bytes are within their bound.
        assert_eq!(traces.take(&request(&many)).unwrap(), 3);
        assert_eq!(names(&collecting).len(), MAX_SPANS);
    }

    #[test]
    fn a_trace_has_room_for_so_many_bytes() {
        let traces = Traces::default();
        let collecting = traces.collect(&otlp::hexadecimal(&TRACE));
        let large = vec![span(&"x".repeat(MAX_PART_BYTES / 2)); 2 * MAX_BYTES / MAX_PART_BYTES + 1];
        assert!(traces.take(&request(&large)).unwrap() > 0);
        let kept = collecting.spans().len();
        assert!(kept <= MAX_BYTES && kept > MAX_BYTES / 2, "{kept}");
        let too_large = span(&"x".repeat(MAX_PART_BYTES));
        let fresh = Traces::default();
        let collecting = fresh.collect(&otlp::hexadecimal(&TRACE));
        assert_eq!(fresh.take(&request(&[too_large, span("small")])).unwrap(), 1);
        assert_eq!(names(&collecting), ["small"]);
    }

    #[test]
    fn nonsense_is_refused() {
        let traces = Traces::default();
        let _collecting = traces.collect(&otlp::hexadecimal(&TRACE));
        let broken = pb::ExportTraceServiceRequest {
            resource_spans: vec![Bytes::from_static(b"\xff")],
        };
        assert!(traces.take(&broken).is_err());
        let nameless = pb::Span {
            span_id: Bytes::new(),
            ..span("x")
        };
        assert!(traces.take(&request(&[nameless])).is_err());
    }
}
