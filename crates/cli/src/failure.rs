//! Errors as they are shown: a text as BuildKit's clients print it, and the lines of the Dockerfile it is about.

use std::fmt;

use api::errors::{self, render_source};
use tonic::{Code, Status};

/// Why a command failed, ready to be shown.
#[derive(Clone, Debug, Default)]
pub struct Failure {
    message: String,
    excerpts: Vec<String>,
    deny_messages: Vec<String>,
    canceled: bool,
}

impl Failure {
    /// Makes a failure of a text.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            ..Self::default()
        }
    }

    /// Makes the failure of a call, with `context` and `: ` in front.
    pub fn of_call(context: &str, status: &Status) -> Self {
        let message = match status.code() {
            Code::Ok | Code::Unknown => status.message().to_owned(),
            code => format!("{code:?}: {}", status.message()).replacen("Cancelled", "Canceled", 1),
        };
        let details = errors::Failure::from_status(status);
        Self {
            message: format!("{context}: {message}"),
            excerpts: details.sources().filter_map(render_source).collect(),
            deny_messages: details
                .deny_messages()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .collect(),
            canceled: status.code() == Code::Cancelled,
        }
    }

    /// Puts `context` and `: ` in front of the text.
    #[must_use]
    pub fn context(mut self, context: &str) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// Returns whether the work was cancelled.
    pub fn is_canceled(&self) -> bool {
        self.canceled
    }

    /// Returns what policies say about the sources that they denied.
    pub fn deny_messages(&self) -> &[String] {
        &self.deny_messages
    }

    /// Returns the places in the frontend's text, ready to be printed.
    pub fn excerpts(&self) -> &[String] {
        &self.excerpts
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

macro_rules! from_errors {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::new(error.to_string())
            }
        })*
    };
}

from_errors!(
    crate::connect::ConnectError,
    crate::docker_config::DockerConfigError,
    crate::format::template::TemplateError,
    crate::progress::ProgressError,
    crate::services::agents::AgentError,
    crate::spec::SpecError,
    std::io::Error,
);

/// Joins an error's text with those of its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_buildctl() {
        let text = |status: Status| Failure::of_call("failed to solve", &status).to_string();
        assert_eq!(text(Status::unknown("x")), "failed to solve: x");
        assert_eq!(text(Status::not_found("x")), "failed to solve: NotFound: x");
        assert_eq!(
            text(Status::cancelled("context canceled")),
            "failed to solve: Canceled: context canceled"
        );
    }

    #[test]
    fn sources_come_from_details() {
        let position = |line| Some(llb::pb::Position { line, character: 0 });
        let info = llb::pb::SourceInfo {
            filename: "Dockerfile".to_owned(),
            data: bytes::Bytes::from_static(b"FROM x"),
            ..Default::default()
        };
        let ranges = vec![llb::pb::Range {
            start: position(1),
            end: position(1),
        }];
        let source = api::pb::errdefs::Source {
            info: Some(info),
            ranges,
        };
        let status = errors::Failure::new(Code::Unknown, "x")
            .with(errors::Detail::Source(source))
            .to_status();
        let failure = Failure::of_call("failed to solve", &status);
        assert!(failure.excerpts()[0].starts_with("Dockerfile:1\n"), "{failure:?}");
        assert!(Failure::of_call("x", &Status::unknown("y")).excerpts().is_empty());
        let denied = errors::Detail::PolicyDenied(vec!["no".to_owned(), String::new()]);
        let denied = errors::Failure::new(Code::PermissionDenied, "z")
            .with(denied)
            .to_status();
        assert_eq!(Failure::of_call("x", &denied).deny_messages(), ["no"]);
    }
}
