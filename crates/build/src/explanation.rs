//! Why a vertex was executed: a kind of reason, and what differs from the nearest earlier run.

mod words;

use std::time::SystemTime;

use oci::Digest;

/// Why a vertex was executed instead of being taken from the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The vertex's digest.
    pub vertex: Digest,
    /// The vertex's name, without secrets.
    pub name: String,
    /// The kind of reason.
    pub reason: Reason,
    /// When that ran which it is compared with, or when what it needs went.
    pub compared_at: Option<SystemTime>,
    /// What differs from the nearest record; only with [`Reason::Changed`], and not all of many.
    pub changes: Vec<Change>,
    /// How many further differences there are.
    pub omitted: usize,
}

/// A kind of reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Something like it ran before, but not the same.
    Changed,
    /// Nothing like it is remembered.
    NeverBuilt,
    /// It ran before, but what came of it is not in the cache any more.
    Expired,
    /// It ran before and is remembered, but what came of it could not be loaded.
    Unusable,
    /// The build ignores the cache for it.
    Ignored,
    /// It is a directory of a client, which is looked at by every build.
    Client,
    /// Something that it uses is not identified by anything that lasts.
    Unidentified,
}

/// One difference from the nearest record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What kind of thing differs.
    pub kind: ChangeKind,
    /// The thing: an input's name in words, a path, an image.
    pub subject: String,
    /// Which attribute of a file differs; empty: the file as such.
    pub attribute: String,
    /// What it was; `None`: absent, or not shown.
    pub before: Option<String>,
    /// What it is; `None`: absent, or not shown.
    pub after: Option<String>,
    /// The difference.
    pub how: How,
    /// The input in which a file lies; empty: none.
    pub input: String,
}

/// How a thing differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum How {
    /// It has another value.
    #[default]
    Changed,
    /// There was none.
    Added,
    /// There is none any more.
    Removed,
}

/// What kind of thing differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangeKind {
    /// An argument of the process.
    Argument,
    /// An environment variable.
    Environment,
    /// The platform.
    Platform,
    /// Anything else that the definition says.
    #[default]
    Definition,
    /// A file that the step reads.
    File,
    /// What a source resolves to: an image's digest, a commit, a checksum.
    Source,
    /// Another step's result.
    Input,
}
