//! The engine's errors as gRPC statuses. This is the only place that maps one to the other.

use api::errors::{Detail, Failure};
use api::pb::{errdefs, stack};
use engine::error::{FailedOp, Subject};
use engine::{BuildError, ErrorKind};
use tonic::{Code, Status};

/// Turns an engine's error into a status with typed details.
pub fn status(error: &BuildError) -> Status {
    failure(error).to_status()
}

/// As [`status`], for a request that names a build or container: whether that is there shows in the code.
pub fn lookup_status(error: &BuildError) -> Status {
    let mut failure = failure(error);
    if error.kind() == ErrorKind::NotFound {
        failure.code = Code::NotFound;
    }
    failure.to_status()
}

/// Turns an engine's error into one that travels.
pub fn failure(error: &BuildError) -> Failure {
    let code = match error.kind() {
        // What a build fails with has no code of its own: clients print codes in front of messages, and take some of them
        // for the daemon's own state.
        ErrorKind::User | ErrorKind::NotFound | ErrorKind::Denied | ErrorKind::Unavailable => Code::Unknown,
        ErrorKind::Conflict => Code::AlreadyExists,
        ErrorKind::Canceled => Code::Cancelled,
        ErrorKind::Internal => Code::Internal,
    };
    let mut failure = Failure::new(code, error.to_string()).with(Detail::Stack(stack(error)));
    if let Some(code) = error.exit_code() {
        failure = failure.with(exit_detail(code));
    }
    if let Some(name) = error.unsupported_subrequest() {
        failure = failure.with(Detail::Subrequest(errdefs::Subrequest {
            name: name.to_owned(),
        }));
    }
    if let Some(name) = error.unsupported_capability() {
        failure = failure.with(Detail::FrontendCap(errdefs::FrontendCap {
            name: name.to_owned(),
        }));
        failure.code = Code::Unimplemented;
    }
    if !error.deny_messages().is_empty() {
        failure = failure.with(Detail::PolicyDenied(error.deny_messages().to_vec()));
    }
    // The first detail is the outermost for Go clients, so the first place they show is the last one told.
    for source in error.sources().iter().rev() {
        let source = errdefs::Source {
            info: Some(source.source.clone()),
            ranges: source.ranges.clone(),
        };
        failure = failure.with(Detail::Source(source));
    }
    if let Some(failed) = error.failed_op() {
        failure = failure.with(Detail::Solve(Box::new(solve(failed))));
    }
    if let Some((name, source)) = error.frontend() {
        let frontend = errdefs::Frontend {
            name: name.to_owned(),
            source: source.to_owned(),
        };
        failure = failure.with(Detail::Frontend(frontend));
    }
    if let Some(vertex) = error.vertex() {
        failure = failure.with(Detail::Vertex(errdefs::Vertex {
            digest: vertex.to_string(),
        }));
    }
    failure
}

/// As [`failure`], with names for the refs of the op that failed: of its inputs, and of its mounts.
pub fn failure_with_refs(error: &BuildError, (inputs, mounts): (Vec<String>, Vec<String>)) -> Failure {
    let mut failure = failure(error);
    let solve = failure.details.iter_mut().find_map(|detail| match detail {
        Detail::Solve(solve) => Some(solve),
        _ => None,
    });
    if let Some(solve) = solve {
        solve.input_i_ds = inputs;
        solve.mount_i_ds = mounts;
    }
    failure
}

/// Where in which program the error was made: what `buildctl --debug` shows.
fn stack(error: &BuildError) -> stack::Stack {
    let place = error.place();
    stack::Stack {
        frames: vec![stack::Frame {
            name: env!("CARGO_PKG_NAME").to_owned(),
            file: place.file().to_owned(),
            line: i32::try_from(place.line()).unwrap_or(0),
        }],
        cmdline: std::env::args_os()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect(),
        pid: i32::try_from(std::process::id()).unwrap_or(0),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: String::new(),
    }
}

/// Type of the detail that says with which code a process ended.
const EXIT_TYPE: &str = "github.com/moby/buildkit/gatewayapi.ExitMessage+json";

#[derive(serde::Deserialize, serde::Serialize)]
struct Exit {
    #[serde(rename = "Code", default)]
    code: u32,
}

fn exit_detail(code: u32) -> Detail {
    Detail::Other(prost_types::Any {
        type_url: EXIT_TYPE.to_owned(),
        value: serde_json::to_vec(&Exit { code }).unwrap_or_default(),
    })
}

fn exit_code(detail: &prost_types::Any) -> Option<u32> {
    let is_exit = detail.type_url == EXIT_TYPE;
    let exit: Option<Exit> = is_exit
        .then(|| serde_json::from_slice(&detail.value).ok())
        .flatten();
    exit.map(|exit| exit.code)
}

fn solve(failed: &FailedOp) -> errdefs::Solve {
    let index = |index: usize| i64::try_from(index).unwrap_or(i64::MAX);
    let subject = failed.subject.map(|subject| match subject {
        Subject::FileAction(action) => {
            errdefs::solve::Subject::File(errdefs::FileAction { index: index(action) })
        }
        Subject::ContentOf(input) => {
            errdefs::solve::Subject::Cache(errdefs::ContentCache { index: index(input) })
        }
    });
    errdefs::Solve {
        op: failed.op.as_deref().cloned(),
        description: failed.description.clone(),
        subject,
        ..Default::default()
    }
}

/// Turns what a client's frontend failed with into the engine's error; details that the engine knows are kept.
pub fn from_failure(failure: &Failure) -> BuildError {
    let kind = match failure.code {
        Code::NotFound => ErrorKind::NotFound,
        Code::PermissionDenied => ErrorKind::Denied,
        Code::AlreadyExists => ErrorKind::Conflict,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::Cancelled => ErrorKind::Canceled,
        Code::Internal => ErrorKind::Internal,
        _ => ErrorKind::User,
    };
    let mut error = BuildError::new(kind, failure.message.clone());
    for detail in failure.details.iter().rev() {
        error = match detail {
            Detail::Source(source) => {
                error.with_sources(source.info.clone().map(|info| engine::error::SourceRange {
                    source: info,
                    ranges: source.ranges.clone(),
                }))
            }
            Detail::Vertex(vertex) => match vertex.digest.parse() {
                Ok(digest) => error.with_vertex(digest),
                Err(_) => error,
            },
            Detail::Subrequest(subrequest) => error.with_unsupported_subrequest(&subrequest.name),
            Detail::FrontendCap(capability) => error.with_unsupported_capability(&capability.name),
            Detail::Frontend(frontend) => error.with_frontend(&frontend.name, &frontend.source),
            Detail::Solve(solve) => error.with_failed_op(FailedOp {
                op: solve.op.clone().map(std::sync::Arc::new),
                description: solve.description.clone(),
                ..FailedOp::default()
            }),
            Detail::PolicyDenied(messages) => error.with_deny_messages(messages.iter().cloned()),
            Detail::Other(other) => match exit_code(other) {
                Some(code) => error.with_exit_code(code),
                None => error,
            },
            _ => error,
        };
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_codes() {
        for (kind, code) in [
            (ErrorKind::User, Code::Unknown),
            (ErrorKind::Conflict, Code::AlreadyExists),
            (ErrorKind::Canceled, Code::Cancelled),
            (ErrorKind::Internal, Code::Internal),
        ] {
            let error = BuildError::new(kind, "text");
            assert_eq!(status(&error).code(), code);
            assert_eq!(from_failure(&failure(&error)).kind(), kind);
        }
        let missing = BuildError::new(ErrorKind::NotFound, "text");
        assert_eq!(status(&missing).code(), Code::Unknown);
        assert_eq!(lookup_status(&missing).code(), Code::NotFound);
    }

    #[test]
    fn details_survive_a_client() {
        let error = BuildError::user("text")
            .with_vertex(oci::Digest::sha256(b"x"))
            .with_frontend("dockerfile.v0", "")
            .with_exit_code(137)
            .with_deny_messages(["not this one".to_owned()])
            .with_sources([engine::error::SourceRange {
                source: llb::pb::SourceInfo {
                    filename: "Dockerfile".to_owned(),
                    ..Default::default()
                },
                ranges: Vec::new(),
            }]);
        let back = from_failure(&Failure::from_status(&status(&error)));
        assert_eq!(back.vertex(), error.vertex());
        assert_eq!(back.exit_code(), Some(137));
        assert_eq!(back.deny_messages(), ["not this one"]);
        assert_eq!(back.frontend(), Some(("dockerfile.v0", "")));
        assert_eq!(back.sources().len(), 1);
        let error = BuildError::user("text").with_unsupported_subrequest("frontend.lint");
        assert_eq!(status(&error).code(), Code::Unknown);
        let back = from_failure(&Failure::from_status(&status(&error)));
        assert_eq!(back.unsupported_subrequest(), Some("frontend.lint"));
    }
}
