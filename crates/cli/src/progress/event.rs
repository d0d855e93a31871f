//! The messages that displays read; one mirrors one `StatusResponse`.

use crate::explanation::Explanation;
use crate::format::time::Instant;
use crate::format::value::{Value, go_struct};

/// What changed since the last message.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Vertices that are new or changed.
    pub vertexes: Vec<Vertex>,
    /// Progress inside vertices.
    pub statuses: Vec<VertexStatus>,
    /// Output of vertices.
    pub logs: Vec<VertexLog>,
    /// Warnings on vertices.
    pub warnings: Vec<VertexWarning>,
    /// Why vertices run; only where that is asked for.
    pub explanations: Vec<Explanation>,
}

/// Vertices that are shown as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgressGroup {
    /// Names the group.
    pub id: String,
    /// What is shown.
    pub name: String,
    /// Whether the group stays hidden while only such members have started.
    pub weak: bool,
}

/// A vertex's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vertex {
    /// Digest.
    pub digest: String,
    /// Digests of the inputs.
    pub inputs: Vec<String>,
    /// What it does, for people.
    pub name: String,
    /// When it started.
    pub started: Option<Instant>,
    /// When it ended.
    pub completed: Option<Instant>,
    /// Whether its result came from cache.
    pub cached: bool,
    /// Why it failed; empty: it did not.
    pub error: String,
    /// The group it is shown in.
    pub group: Option<ProgressGroup>,
}

/// How far something inside a vertex is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VertexStatus {
    /// Names it within the vertex; shown.
    pub id: String,
    /// The vertex's digest.
    pub vertex: String,
    /// A name of its own.
    pub name: String,
    /// The end, usually in bytes; 0: unknown.
    pub total: i64,
    /// How much is done.
    pub current: i64,
    /// When this was so.
    pub timestamp: Instant,
    /// When it started.
    pub started: Option<Instant>,
    /// When it ended.
    pub completed: Option<Instant>,
}

/// A piece of a vertex's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VertexLog {
    /// The vertex's digest.
    pub vertex: String,
    /// 1: standard output, 2: standard error.
    pub stream: i64,
    /// The bytes.
    pub data: Vec<u8>,
    /// When it was written.
    pub timestamp: Instant,
}

/// A warning on a vertex.
#[derive(Clone, Debug, Default)]
pub struct VertexWarning {
    /// The vertex's digest.
    pub vertex: String,
    /// How grave it is.
    pub level: i64,
    /// The text in one line.
    pub short: String,
    /// More text.
    pub detail: Vec<String>,
    /// Where it is explained.
    pub url: String,
    /// The text it points into.
    pub source: Option<llb::pb::SourceInfo>,
    /// Where in that text.
    pub ranges: Vec<llb::pb::Range>,
}

impl Status {
    /// Turns the message into what Go's JSON encoder makes of a `client.SolveStatus`.
    pub fn to_value(&self) -> Value {
        let list = |values: Vec<Value>| {
            if values.is_empty() {
                Value::Null
            } else {
                Value::List(values)
            }
        };
        go_struct! {
            Vertexes "vertexes" ?empty = list(self.vertexes.iter().map(vertex_value).collect());
            Statuses "statuses" ?empty = list(self.statuses.iter().map(status_value).collect());
            Logs "logs" ?empty = list(self.logs.iter().map(log_value).collect());
            Warnings "warnings" ?empty = list(self.warnings.iter().map(warning_value).collect());
            Explanations "explanations" ?empty = list(self.explanations.iter().map(Explanation::to_value).collect());
        }
    }
}

fn vertex_value(vertex: &Vertex) -> Value {
    let group = vertex.group.as_ref();
    go_struct! {
        Digest "digest" ?empty = Value::text(&vertex.digest);
        Inputs "inputs" ?empty = Value::texts(vertex.inputs.iter().map(String::as_str));
        Name "name" ?empty = Value::text(&vertex.name);
        Started "started" ?empty = Value::option(vertex.started, Value::Time);
        Completed "completed" ?empty = Value::option(vertex.completed, Value::Time);
        Cached "cached" ?empty = Value::Bool(vertex.cached);
        Error "error" ?empty = Value::text(&vertex.error);
        ProgressGroup "progressGroup" ?empty = Value::option(group, |group| go_struct! {
            Id "id" ?empty = Value::text(&group.id);
            Name "name" ?empty = Value::text(&group.name);
            Weak "weak" ?empty = Value::Bool(group.weak);
        });
    }
}

fn status_value(status: &VertexStatus) -> Value {
    go_struct! {
        ID "id" = Value::text(&status.id);
        Vertex "vertex" ?empty = Value::text(&status.vertex);
        Name "name" ?empty = Value::text(&status.name);
        Total "total" ?empty = Value::Int(status.total);
        Current "current" = Value::Int(status.current);
        Timestamp "timestamp" = Value::Time(status.timestamp);
        Started "started" ?empty = Value::option(status.started, Value::Time);
        Completed "completed" ?empty = Value::option(status.completed, Value::Time);
    }
}

fn log_value(log: &VertexLog) -> Value {
    go_struct! {
        Vertex "vertex" ?empty = Value::text(&log.vertex);
        Stream "stream" ?empty = Value::Int(log.stream);
        Data "data" = Value::Bytes(log.data.clone());
        Timestamp "timestamp" = Value::Time(log.timestamp);
    }
}

fn warning_value(warning: &VertexWarning) -> Value {
    let bytes = |text: &String| Value::Bytes(text.clone().into_bytes());
    let details: Vec<Value> = warning.detail.iter().map(bytes).collect();
    let ranges: Vec<Value> = warning.ranges.iter().map(range_value).collect();
    let list = |values: Vec<Value>| {
        if values.is_empty() {
            Value::Null
        } else {
            Value::List(values)
        }
    };
    go_struct! {
        Vertex "vertex" ?empty = Value::text(&warning.vertex);
        Level "level" ?empty = Value::Int(warning.level);
        Short "short" ?empty = bytes(&warning.short);
        Detail "detail" ?empty = list(details);
        URL "url" ?empty = Value::text(&warning.url);
        SourceInfo "sourceInfo" ?empty = Value::option(warning.source.as_ref(), |source| go_struct! {
            Filename "filename" ?empty = Value::text(&source.filename);
            Data "data" ?empty = Value::Bytes(source.data.to_vec());
            Language "language" ?empty = Value::text(&source.language);
        });
        Range "range" ?empty = list(ranges);
    }
}

fn range_value(range: &llb::pb::Range) -> Value {
    let position = |position: Option<&llb::pb::Position>| {
        Value::option(position, |position| {
            go_struct! {
                Line "line" ?empty = Value::Int(i64::from(position.line));
                Character "character" ?empty = Value::Int(i64::from(position.character));
            }
        })
    };
    go_struct! {
        Start "start" ?empty = position(range.start.as_ref());
        End "end" ?empty = position(range.end.as_ref());
    }
}

impl From<api::pb::control::StatusResponse> for Status {
    fn from(response: api::pb::control::StatusResponse) -> Self {
        let at = |at: Option<prost_types::Timestamp>| at.map(|at| Instant::from_parts(at.seconds, at.nanos));
        let text = |bytes: bytes::Bytes| String::from_utf8_lossy(&bytes).into_owned();
        let vertexes = response.vertexes.into_iter().map(|vertex| Vertex {
            digest: vertex.digest,
            inputs: vertex.inputs,
            name: vertex.name,
            started: at(vertex.started),
            completed: at(vertex.completed),
            cached: vertex.cached,
            error: vertex.error,
            group: vertex.progress_group.map(|group| ProgressGroup {
                id: group.id,
                name: group.name,
                weak: group.weak,
            }),
        });
        let statuses = response.statuses.into_iter().map(|status| VertexStatus {
            id: status.id,
            vertex: status.vertex,
            name: status.name,
            total: status.total,
            current: status.current,
            timestamp: at(status.timestamp).unwrap_or_default(),
            started: at(status.started),
            completed: at(status.completed),
        });
        let logs = response.logs.into_iter().map(|log| VertexLog {
            vertex: log.vertex,
            stream: log.stream,
            data: log.msg.to_vec(),
            timestamp: at(log.timestamp).unwrap_or_default(),
        });
        let warnings = response.warnings.into_iter().map(|warning| VertexWarning {
            vertex: warning.vertex,
            level: warning.level,
            short: text(warning.short),
            detail: warning.detail.into_iter().map(text).collect(),
            url: warning.url,
            source: warning.info,
            ranges: warning.ranges,
        });
        Self {
            vertexes: vertexes.collect(),
            statuses: statuses.collect(),
            logs: logs.collect(),
            warnings: warnings.collect(),
            explanations: Vec::new(),
        }
    }
}
