//! The one error that leaves the engine: a kind, a text, and what a client needs to point at the cause.
//!
//! Modules have their own error enums and turn them into a [`BuildError`] where the kind is known; the kind is assigned
//! once, by whoever first makes the `BuildError`, and never changed on the way out.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use llb::pb;
use oci::Digest;

use crate::op::ResultRef;

/// Longest text of an error in bytes; a longer one loses its middle. Texts quote what clients send.
const MAX_TEXT: usize = 8 << 10;
/// How many of them are of its end, which says what went wrong.
const MAX_END: usize = 2 << 10;

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorKind {
    /// The request or the build's own steps are wrong.
    User,
    /// Something named by the request does not exist.
    NotFound,
    /// The request needs a right that was not granted.
    Denied,
    /// The request contradicts something that exists already.
    Conflict,
    /// Something outside is not reachable now; a later try may succeed.
    Unavailable,
    /// The build, or all interest in the step, was cancelled.
    Canceled,
    /// The engine is at fault.
    Internal,
}

/// A place in the text that a frontend read.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRange {
    /// The file, with its text.
    pub source: pb::SourceInfo,
    /// The ranges in it.
    pub ranges: Vec<pb::Range>,
}

/// What part of an op failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The file op's action of this index.
    FileAction(usize),
    /// The content checksum of the input of this index.
    ContentOf(usize),
}

/// The op that failed, and the refs with which a client can look at the failure.
#[derive(Clone, Debug, Default)]
pub struct FailedOp {
    /// The op as the client defined it.
    pub op: Option<Arc<pb::Op>>,
    /// The op's description, e.g. `llb.customname`.
    pub description: BTreeMap<String, String>,
    /// What part of it failed.
    pub subject: Option<Subject>,
    /// The op's inputs.
    pub inputs: Vec<ResultRef>,
    /// State of the op's mounts when it failed; empty where a mount has none.
    pub mounts: Vec<Option<ResultRef>>,
}

/// Why a build failed. Cheap to clone: all builds that waited for a step get the same error.
#[derive(Clone)]
pub struct BuildError(Arc<Parts>);

#[derive(Clone)]
struct Parts {
    kind: ErrorKind,
    message: String,
    vertex: Option<Digest>,
    sources: Vec<SourceRange>,
    exit_code: Option<u32>,
    failed: Option<Arc<FailedOp>>,
    frontend: Option<(String, String)>,
    unsupported_subrequest: Option<String>,
    unsupported_capability: Option<String>,
    deny_messages: Vec<String>,
    lost_inputs: Vec<usize>,
    place: &'static Location<'static>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl BuildError {
    /// Makes an error of a text of its own.
    #[track_caller]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Parts {
            kind,
            message: bounded(message.into()),
            vertex: None,
            sources: Vec::new(),
            exit_code: None,
            failed: None,
            frontend: None,
            unsupported_subrequest: None,
            unsupported_capability: None,
            deny_messages: Vec::new(),
            lost_inputs: Vec::new(),
            place: Location::caller(),
            source: None,
        }))
    }

    /// Makes an error of another one; the text is that error's with its sources, joined by `: `.
    #[track_caller]
    pub fn from_source(kind: ErrorKind, source: impl StdError + Send + Sync + 'static) -> Self {
        let mut error = Self::new(kind, chain_text(&source));
        Arc::make_mut(&mut error.0).source = Some(Arc::new(source));
        error
    }

    /// Makes a [`ErrorKind::User`] error.
    #[track_caller]
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::User, message)
    }

    /// Makes a [`ErrorKind::Internal`] error.
    #[track_caller]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Makes the error of cancelled work.
    #[track_caller]
    pub fn canceled() -> Self {
        Self::new(ErrorKind::Canceled, "context canceled")
    }

    /// Puts `context` and `: ` before the text.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        let parts = Arc::make_mut(&mut self.0);
        parts.message = bounded(format!("{context}: {}", parts.message));
        self
    }

    /// Replaces the text.
    #[must_use]
    pub fn with_message(mut self, message: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).message = bounded(message.into());
        self
    }

    /// Returns the place in the source code where the error was made.
    pub fn place(&self) -> &'static Location<'static> {
        self.0.place
    }

    /// Names the vertex that failed, unless one is named already.
    #[must_use]
    pub fn with_vertex(mut self, vertex: Digest) -> Self {
        Arc::make_mut(&mut self.0).vertex.get_or_insert(vertex);
        self
    }

    /// Adds places in the frontend's text.
    #[must_use]
    pub fn with_sources(mut self, sources: impl IntoIterator<Item = SourceRange>) -> Self {
        Arc::make_mut(&mut self.0).sources.extend(sources);
        self
    }

    /// Records with which code a step's process ended.
    #[must_use]
    pub fn with_exit_code(mut self, code: u32) -> Self {
        Arc::make_mut(&mut self.0).exit_code = Some(code);
        self
    }

    /// Records the op that failed, unless one is recorded already.
    #[must_use]
    pub fn with_failed_op(mut self, failed: FailedOp) -> Self {
        Arc::make_mut(&mut self.0)
            .failed
            .get_or_insert_with(|| Arc::new(failed));
        self
    }

    /// Records the frontend in which the build failed and its source image (empty for a built-in one).
    #[must_use]
    pub fn with_frontend(mut self, name: impl Into<String>, source: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0)
            .frontend
            .get_or_insert_with(|| (name.into(), source.into()));
        self
    }

    /// Marks the error as "the frontend does not know this subrequest".
    #[must_use]
    pub fn with_unsupported_subrequest(mut self, name: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).unsupported_subrequest = Some(name.into());
        self
    }

    /// Marks the error as "the frontend does not have this capability".
    #[must_use]
    pub fn with_unsupported_capability(mut self, name: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).unsupported_capability = Some(name.into());
        self
    }

    /// Adds what a policy says about a source that it denies, one text for people each.
    #[must_use]
    pub fn with_deny_messages(mut self, messages: impl IntoIterator<Item = String>) -> Self {
        Arc::make_mut(&mut self.0).deny_messages.extend(messages);
        self
    }

    /// Says that this input of the op cannot be had any more, although it was found in a cache. If it was loaded, it is
    /// forgotten and made anew, and the op is tried again; else the error stands.
    #[must_use]
    pub fn with_lost_input(mut self, input: usize) -> Self {
        Arc::make_mut(&mut self.0).lost_inputs.push(input);
        self
    }

    /// Says which of the vertex's inputs a lost input is, where the op knew only that it lost what it was given.
    #[must_use]
    pub fn rename_lost_inputs(mut self, input: usize) -> Self {
        if !self.0.lost_inputs.is_empty() {
            Arc::make_mut(&mut self.0).lost_inputs = vec![input];
        }
        self
    }

    /// Returns the inputs that cannot be had any more.
    pub fn lost_inputs(&self) -> &[usize] {
        &self.0.lost_inputs
    }

    /// Returns who has to act.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns whether the work was cancelled rather than failed.
    pub fn is_canceled(&self) -> bool {
        self.0.kind == ErrorKind::Canceled
    }

    /// Returns the vertex that failed.
    pub fn vertex(&self) -> Option<&Digest> {
        self.0.vertex.as_ref()
    }

    /// Returns the places in the frontend's text, innermost first.
    pub fn sources(&self) -> &[SourceRange] {
        &self.0.sources
    }

    /// Returns the exit code of the step's process, if that is what failed.
    pub fn exit_code(&self) -> Option<u32> {
        self.0.exit_code
    }

    /// Returns the op that failed.
    pub fn failed_op(&self) -> Option<&FailedOp> {
        self.0.failed.as_deref()
    }

    /// Returns the frontend's name and source image.
    pub fn frontend(&self) -> Option<(&str, &str)> {
        self.0
            .frontend
            .as_ref()
            .map(|(name, source)| (name.as_str(), source.as_str()))
    }

    /// Returns the subrequest that the frontend does not know.
    pub fn unsupported_subrequest(&self) -> Option<&str> {
        self.0.unsupported_subrequest.as_deref()
    }

    /// Returns what a policy said about the source that it denied.
    pub fn deny_messages(&self) -> &[String] {
        &self.0.deny_messages
    }

    /// Returns the capability that the frontend does not have.
    pub fn unsupported_capability(&self) -> Option<&str> {
        self.0.unsupported_capability.as_deref()
    }
}

/// Takes the middle out of a text that is too long.
fn bounded(text: String) -> String {
    if text.len() <= MAX_TEXT {
        return text;
    }
    let end = text.ceil_char_boundary(text.len() - MAX_END);
    // Room for the mark.
    let begin = text.floor_char_boundary(MAX_TEXT - MAX_END - 64);
    let cut = end - begin;
    format!("{}… ({cut} bytes left out) …{}", &text[..begin], &text[end..])
}

/// Joins an error's text with those of its sources, leaving out what the outer text repeats already.
pub fn chain_text(error: &(dyn StdError + 'static)) -> String {
    let mut text = plain_text(error);
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = plain_text(inner);
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

/// The text of one error. The system's own errors read as they do elsewhere in the ecosystem: `no such file or directory`.
fn plain_text(error: &(dyn StdError + 'static)) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((reason, number)) if number.ends_with(')') => {
            let (before, words) = reason
                .rsplit_once(": ")
                .map_or(("", reason), |(before, words)| (before, words));
            let mut letters = words.chars();
            let first: String = letters
                .next()
                .map(|letter| letter.to_lowercase().collect())
                .unwrap_or_default();
            let separator = if before.is_empty() { "" } else { ": " };
            format!("{before}{separator}{first}{}", letters.as_str())
        }
        _ => text,
    }
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuildError")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("vertex", &self.0.vertex)
            .finish_non_exhaustive()
    }
}

impl StdError for BuildError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<crate::session::SessionError> for BuildError {
    fn from(error: crate::session::SessionError) -> Self {
        use crate::session::SessionError as E;
        let kind = match &error {
            E::NoSession { .. } | E::Lost { .. } => ErrorKind::Unavailable,
            E::NotFound { .. } => ErrorKind::NotFound,
            E::Unsupported { .. } | E::Refused { .. } => ErrorKind::User,
        };
        Self::from_source(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_lose_their_middle() {
        let plain = "x".repeat(MAX_TEXT);
        assert_eq!(BuildError::user(plain.clone()).to_string(), plain);
        let long = format!("process {} did not complete: exit code: 7", "ü".repeat(1_000_000));
        let errors = [
            BuildError::user(long.clone()),
            BuildError::user("x").with_message(long.clone()),
            BuildError::user("x").context(&long),
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.len() <= MAX_TEXT, "{} bytes", text.len());
            assert!(text.starts_with("process üü"), "{text}");
            assert!(text.contains("bytes left out"), "{text}");
            assert!(text.contains("exit code: 7"), "{text}");
        }
        let again = BuildError::user(long).context("outer").context("outermost");
        assert!(again.to_string().ends_with("exit code: 7"));
        assert!(again.to_string().len() <= MAX_TEXT);
    }
}
