//! The trace that a build belongs to, in the terms of W3C Trace Context: identifiers are hexadecimal digits, 32 of a trace
//! and 16 of a span.

use std::time::SystemTime;

use oci::Digest;

const TRACE_ID_LEN: usize = 32;
const SPAN_ID_LEN: usize = 16;

/// A build's trace, with the identifiers of its spans: they are known before the spans are, so that others can be told of
/// them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    id: String,
    parent: Option<String>,
    request: String,
}

impl Trace {
    /// Continues the trace of a header `traceparent` (version, trace, span and flags). What does not read names no trace, and
    /// one is begun.
    pub fn continuing(header: &str) -> Self {
        let own = Self::begin();
        match read(header) {
            Some((id, parent)) => Self {
                id,
                parent: Some(parent),
                ..own
            },
            None => own,
        }
    }

    /// Begins a trace that nobody can guess.
    pub fn begin() -> Self {
        let mut bytes = [0_u8; 32];
        // A failure leaves zeros; the time is then all that tells traces apart.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        let random = Digest::sha256(format!("{bytes:?} {:?}", SystemTime::now()).as_bytes());
        Self {
            id: random.hex()[..TRACE_ID_LEN].to_owned(),
            parent: None,
            request: random.hex()[TRACE_ID_LEN..TRACE_ID_LEN + SPAN_ID_LEN].to_owned(),
        }
    }

    /// Returns the trace's identifier.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the client's span that the build is part of, if there is one.
    pub fn parent(&self) -> Option<&str> {
        self.parent.as_deref()
    }

    /// Returns the span of the build as a whole.
    pub fn request(&self) -> &str {
        &self.request
    }

    /// Returns the span of a step.
    pub fn step(&self, vertex: Digest) -> String {
        let id = Digest::sha256(format!("{} {vertex}", self.request).as_bytes());
        id.hex()[..SPAN_ID_LEN].to_owned()
    }

    /// Returns the header `traceparent` of what a step does.
    pub fn step_parent(&self, vertex: Digest) -> String {
        self.header(&self.step(vertex))
    }

    /// Returns the header `traceparent` of what is done for the build as a whole.
    pub fn request_parent(&self) -> String {
        self.header(&self.request)
    }

    fn header(&self, span: &str) -> String {
        format!("00-{}-{span}-01", self.id)
    }
}

/// Reads trace and span of a header.
fn read(header: &str) -> Option<(String, String)> {
    let mut parts = header.split('-').skip(1);
    let mut hexadecimal = |length: usize| {
        let part = parts.next()?;
        let is_hexadecimal = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        (part.len() == length && is_hexadecimal && part.bytes().any(|byte| byte != b'0'))
            .then(|| part.to_owned())
    };
    Some((hexadecimal(TRACE_ID_LEN)?, hexadecimal(SPAN_ID_LEN)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_traces_is_followed() {
        let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = Trace::continuing(header);
        assert_eq!(trace.id(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(trace.parent(), Some("b7ad6b7169203331"));
        let vertex = Digest::sha256(b"vertex");
        let expected = format!("00-{}-{}-01", trace.id(), trace.step(vertex));
        assert_eq!(trace.step_parent(vertex), expected);
        assert_eq!(read(&expected).unwrap().1, trace.step(vertex));
        assert_ne!(trace.step(vertex), trace.step(Digest::sha256(b"other")));
    }

    #[test]
    fn what_names_no_trace_begins_one() {
        for header in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-é0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        ] {
            let (one, other) = (Trace::continuing(header), Trace::continuing(header));
            assert_eq!(one.parent(), None, "{header}");
            assert!(read(&one.request_parent()).is_some());
            assert!(one.id() != other.id() && one.request() != other.request());
        }
    }
}
