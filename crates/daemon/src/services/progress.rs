//! A build's progress on the wire.

use std::time::{SystemTime, UNIX_EPOCH};

use api::pb::control;
use engine::progress::{StatusBatch, Vertex, VertexLog, VertexStatus, VertexWarning};

/// Turns a time into protobuf's; times before the epoch are the epoch.
pub(crate) fn timestamp(at: SystemTime) -> prost_types::Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// Turns protobuf's time into the system's; what is none is the epoch.
pub(super) fn system_time(at: Option<&prost_types::Timestamp>) -> SystemTime {
    at.and_then(|at| SystemTime::try_from(*at).ok())
        .unwrap_or(UNIX_EPOCH)
}

/// Turns what changed into a message.
pub(super) fn response(batch: StatusBatch) -> control::StatusResponse {
    control::StatusResponse {
        vertexes: batch.vertices.into_iter().map(vertex).collect(),
        statuses: batch.statuses.into_iter().map(vertex_status).collect(),
        logs: batch.logs.into_iter().map(log).collect(),
        warnings: batch.warnings.into_iter().map(warning).collect(),
    }
}

fn vertex(vertex: Vertex) -> control::Vertex {
    control::Vertex {
        digest: vertex.digest.to_string(),
        inputs: vertex.inputs.iter().map(ToString::to_string).collect(),
        name: vertex.name,
        cached: vertex.cached,
        started: vertex.started.map(timestamp),
        completed: vertex.completed.map(timestamp),
        error: vertex.error,
        progress_group: vertex.progress_group,
    }
}

fn vertex_status(status: VertexStatus) -> control::VertexStatus {
    control::VertexStatus {
        id: status.id,
        vertex: status.vertex.to_string(),
        name: status.name,
        current: status.current,
        total: status.total,
        timestamp: Some(timestamp(status.timestamp)),
        started: status.started.map(timestamp),
        completed: status.completed.map(timestamp),
    }
}

fn log(log: VertexLog) -> control::VertexLog {
    control::VertexLog {
        vertex: log.vertex.to_string(),
        timestamp: Some(timestamp(log.timestamp)),
        stream: log.stream.number(),
        msg: log.data,
    }
}

fn warning(warning: VertexWarning) -> control::VertexWarning {
    control::VertexWarning {
        vertex: warning.vertex.to_string(),
        level: warning.level,
        short: warning.short,
        detail: warning.detail,
        url: warning.url,
        info: warning.source,
        ranges: warning.ranges,
    }
}
