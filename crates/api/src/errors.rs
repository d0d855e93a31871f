//! Errors with typed details: what a client needs to show the failing line, in the trailers of a call.
//!
//! Details travel as `google.protobuf.Any` messages whose type URL is that of containerd's typeurl registry
//! (`github.com/moby/buildkit/errdefs.Vertex+json`) and whose value is JSON, not protobuf.

mod protojson;
mod render;

use std::collections::BTreeMap;

use prost::Message as _;
use prost_types::Any;
use serde_json::{Map, Value, json};
use tonic::{Code, Status};

use crate::pb::{errdefs, rpc, stack};

pub use render::render_source;

const PREFIX: &str = "github.com/moby/buildkit/";
/// The type of a policy's decision.
const POLICY_DECISION: &str = "policysession.DecisionResponse";

/// One typed detail of an error.
#[derive(Clone, Debug, PartialEq)]
pub enum Detail {
    /// The vertex that failed.
    Vertex(errdefs::Vertex),
    /// The lines that the vertex comes from.
    Source(errdefs::Source),
    /// The operation that failed, and the refs to look at it with. `op` is only ever sent.
    Solve(Box<errdefs::Solve>),
    /// The frontend that failed.
    Frontend(errdefs::Frontend),
    /// The frontend does not know a capability.
    FrontendCap(errdefs::FrontendCap),
    /// The frontend does not know a request.
    Subrequest(errdefs::Subrequest),
    /// A feature is not in this version.
    Compatibility(errdefs::CompatibilityFeature),
    /// Provenance lacks materials.
    Provenance(errdefs::ProvenanceMaterialsIncomplete),
    /// Where in a program the error was made.
    Stack(stack::Stack),
    /// What a policy says about a source that it denies, one text for people each.
    PolicyDenied(Vec<String>),
    /// A detail of another type, passed on as it came.
    Other(Any),
}

/// An error as it travels.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// gRPC code.
    pub code: Code,
    /// Text for people.
    pub message: String,
    /// Typed details; the last is the outermost for Go clients.
    pub details: Vec<Detail>,
}

impl Failure {
    /// Makes an error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: Vec::new(),
        }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, detail: Detail) -> Self {
        self.details.push(detail);
        self
    }

    /// Encodes the error as the status of a call.
    pub fn to_status(&self) -> Status {
        let details = self.to_rpc().encode_to_vec();
        if self.details.is_empty() {
            return Status::new(self.code, &self.message);
        }
        Status::with_details(self.code, &self.message, details.into())
    }

    /// Decodes the status of a call. Details that cannot be decoded are kept as they came.
    pub fn from_status(status: &Status) -> Self {
        let decoded = rpc::Status::decode(status.details()).unwrap_or_default();
        let details = decoded.details.into_iter().map(Detail::from_any).collect();
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            details,
        }
    }

    /// Encodes the error as a message, as history records and frontends carry it.
    pub fn to_rpc(&self) -> rpc::Status {
        let details = self.details.iter().map(Detail::to_any).collect();
        rpc::Status {
            code: self.code.into(),
            message: self.message.clone(),
            details,
        }
    }

    /// Decodes an error that travels as a message.
    pub fn from_rpc(status: &rpc::Status) -> Self {
        let details = status.details.iter().cloned().map(Detail::from_any).collect();
        Self {
            code: Code::from_i32(status.code),
            message: status.message.clone(),
            details,
        }
    }

    /// Returns the source locations, innermost first.
    pub fn sources(&self) -> impl Iterator<Item = &errdefs::Source> {
        self.details.iter().filter_map(|detail| match detail {
            Detail::Source(source) => Some(source),
            _ => None,
        })
    }

    /// Returns what policies say about the sources that they denied.
    pub fn deny_messages(&self) -> impl Iterator<Item = &str> {
        let denied = self.details.iter().filter_map(|detail| match detail {
            Detail::PolicyDenied(messages) => Some(messages),
            _ => None,
        });
        denied.flatten().map(String::as_str)
    }

    /// Returns the digest of the vertex that failed.
    pub fn vertex(&self) -> Option<&str> {
        self.details.iter().find_map(|detail| match detail {
            Detail::Vertex(vertex) => Some(vertex.digest.as_str()),
            _ => None,
        })
    }
}

impl Detail {
    /// Encodes a detail.
    pub fn to_any(&self) -> Any {
        fn json<T: serde::Serialize>(name: &str, value: &T) -> Any {
            any(name, oci::json::to_vec(value).unwrap_or_default())
        }
        match self {
            Self::Vertex(vertex) => json("errdefs.Vertex", vertex),
            Self::Source(source) => json("errdefs.Source", &with_ends(source)),
            Self::Solve(solve) => json("errdefs.Solve", &solve_json(solve)),
            Self::Frontend(frontend) => json("errdefs.Frontend", frontend),
            Self::FrontendCap(cap) => json("errdefs.FrontendCap", cap),
            Self::Subrequest(subrequest) => json("errdefs.Subrequest", subrequest),
            Self::Compatibility(feature) => json("errdefs.CompatibilityFeature", feature),
            Self::Provenance(incomplete) => json("errdefs.ProvenanceMaterialsIncomplete", incomplete),
            Self::Stack(stack) => json("stack.Stack", stack),
            Self::PolicyDenied(messages) => {
                let messages: Vec<Value> = messages.iter().map(|text| json!({"message": text})).collect();
                json(POLICY_DECISION, &json!({"denyMessages": messages}))
            }
            Self::Other(any) => any.clone(),
        }
    }

    /// Decodes a detail; what is not known or not well-formed is [`Detail::Other`].
    pub fn from_any(any: Any) -> Self {
        fn read<T: serde::de::DeserializeOwned>(any: &Any, wrap: impl FnOnce(T) -> Detail) -> Option<Detail> {
            serde_json::from_slice(&any.value).ok().map(wrap)
        }
        let name = any
            .type_url
            .strip_prefix(PREFIX)
            .and_then(|name| name.strip_suffix("+json"));
        let known = match name {
            Some("errdefs.Vertex") => read(&any, Self::Vertex),
            Some("errdefs.Source") => read(&any, Self::Source),
            Some("errdefs.Solve") => read(&any, |value: Value| {
                Self::Solve(Box::new(solve_from_json(&value)))
            }),
            Some("errdefs.Frontend") => read(&any, Self::Frontend),
            Some("errdefs.FrontendCap") => read(&any, Self::FrontendCap),
            Some("errdefs.Subrequest") => read(&any, Self::Subrequest),
            Some("errdefs.CompatibilityFeature") => read(&any, Self::Compatibility),
            Some("errdefs.ProvenanceMaterialsIncomplete") => read(&any, Self::Provenance),
            Some("stack.Stack") => read(&any, Self::Stack),
            Some(POLICY_DECISION) => read(&any, |value: Value| Self::PolicyDenied(deny_messages(&value))),
            _ => None,
        };
        known.unwrap_or(Self::Other(any))
    }
}

fn deny_messages(decision: &Value) -> Vec<String> {
    let messages = decision["denyMessages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    messages
        .iter()
        .filter_map(|deny| deny["message"].as_str())
        .map(str::to_owned)
        .collect()
}

/// Fills in missing positions: Go clients follow them without a look.
fn with_ends(source: &errdefs::Source) -> errdefs::Source {
    let mut source = source.clone();
    for range in &mut source.ranges {
        let start = *range.start.get_or_insert_default();
        range.end.get_or_insert(start);
    }
    source
}

fn any(name: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: format!("{PREFIX}{name}+json"),
        value,
    }
}

/// `Solve` alone uses protobuf's JSON mapping.
fn solve_json(solve: &errdefs::Solve) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value, empty: bool| {
        if !empty {
            out.insert(key.to_owned(), value);
        }
    };
    put("inputIDs", json!(solve.input_i_ds), solve.input_i_ds.is_empty());
    put("mountIDs", json!(solve.mount_i_ds), solve.mount_i_ds.is_empty());
    put(
        "op",
        solve.op.as_ref().map(protojson::op).unwrap_or_default(),
        solve.op.is_none(),
    );
    match &solve.subject {
        Some(errdefs::solve::Subject::File(file)) => {
            put("file", json!({"index": file.index.to_string()}), false)
        }
        Some(errdefs::solve::Subject::Cache(cache)) => {
            put("cache", json!({"index": cache.index.to_string()}), false)
        }
        None => {}
    }
    put(
        "description",
        json!(solve.description),
        solve.description.is_empty(),
    );
    Value::Object(out)
}

fn solve_from_json(value: &Value) -> errdefs::Solve {
    let strings = |key: &str| -> Vec<String> {
        let list = value[key].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect()
    };
    let index = |key: &str| -> Option<i64> {
        let subject = value.get(key)?;
        match &subject["index"] {
            Value::String(text) => text.parse().ok(),
            Value::Number(number) => number.as_i64(),
            _ => Some(0),
        }
    };
    let file = index("file").map(|index| errdefs::solve::Subject::File(errdefs::FileAction { index }));
    let cache =
        || index("cache").map(|index| errdefs::solve::Subject::Cache(errdefs::ContentCache { index }));
    let entries = value["description"].as_object().into_iter().flatten();
    let description: BTreeMap<String, String> = entries
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect();
    errdefs::Solve {
        input_i_ds: strings("inputIDs"),
        mount_i_ds: strings("mountIDs"),
        op: None,
        subject: file.or_else(cache),
        description,
    }
}

#[cfg(test)]
mod tests;
