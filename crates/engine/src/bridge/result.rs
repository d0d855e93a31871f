//! What frontends ask for and what they yield.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use llb::pb;
use llb::sourcepolicy::Policy;

use crate::bridge::BuildRef;

/// The result of a build within a build: its refs are evaluated when they are asked for.
pub type BuildResult<R = BuildRef> = build::result::BuildResult<R>;

/// A cache to import from, as the client named it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CacheOption {
    /// `registry`, `local`, `gha`, ….
    pub kind: String,
    /// Attributes of the kind.
    pub attrs: BTreeMap<String, String>,
}

/// A build within a build: a definition, or a frontend with its options. Both empty asks for an empty result.
#[derive(Clone, Debug, Default)]
pub struct BridgeRequest {
    /// The definition to build.
    pub definition: Option<pb::Definition>,
    /// The frontend to run, e.g. `dockerfile.v0`; empty: none.
    pub frontend: String,
    /// The frontend's options.
    pub frontend_opts: BTreeMap<String, String>,
    /// Definitions that the frontend may use as inputs, by name.
    pub frontend_inputs: BTreeMap<String, pb::Definition>,
    /// Caches to import from.
    pub cache_imports: Vec<CacheOption>,
    /// Source policies beyond those of the job.
    pub source_policies: Vec<Policy>,
    /// Whether to compute the result before returning; else refs are lazy.
    pub evaluate: bool,
}

/// What a frontend is started with.
#[derive(Clone, Debug, Default)]
pub struct FrontendRequest {
    /// Options.
    pub opts: BTreeMap<String, String>,
    /// Input definitions by name.
    pub inputs: BTreeMap<String, pb::Definition>,
}

/// A place in a file that a warning is about, and the rest of what a warning can carry.
#[derive(Clone, Debug, Default)]
pub struct WarnOptions {
    /// 0 is taken as 1.
    pub level: i64,
    /// The text that is remarked on.
    pub source: Option<pb::SourceInfo>,
    /// Ranges in it.
    pub ranges: Vec<pb::Range>,
    /// More lines.
    pub detail: Vec<Bytes>,
    /// Where to read more.
    pub url: String,
}

/// How much of a file to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; 0: to the end.
    pub length: u64,
}

/// Names a [`BuildRef`] for clients outside the process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildRefId(pub String);

impl fmt::Display for BuildRefId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
