//! What a caller gives to a conversion, what the conversion asks back, and what it ends with.

use std::collections::{BTreeMap, BTreeSet};

use llb::pb;
use oci::{Digest, Platform};

use crate::position::Range;

/// One request to the frontend.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The frontend's options as the client sent them: `filename`, `target`, `build-arg:NAME`, `context:NAME`, ….
    pub options: BTreeMap<String, String>,
    /// The client's session; local sources name it.
    pub session_id: String,
    /// Definitions given as inputs, by name; `context` and `dockerfile` replace the local directories.
    pub inputs: BTreeMap<String, pb::Definition>,
    /// Capabilities of the worker that are enabled, e.g. `file.base`, `mergeop`.
    pub llb_capabilities: BTreeSet<String>,
    /// Platforms of the default worker, the preferred one first; empty means this machine's.
    pub worker_platforms: Vec<Platform>,
}

/// Something a conversion cannot know by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Need {
    /// The configuration of an image; answered by [`Answer::Image`] or [`Answer::Redirected`].
    ImageConfig(ImageConfigNeed),
    /// Files from the result of a definition; answered by [`Answer::Files`].
    Files(FilesNeed),
    /// What is known about a source without fetching it; answered by [`Answer::Source`].
    SourceMetadata(SourceMetadataNeed),
    /// The newest modification time of the regular files in a tar archive, compressed or not, which is the one path
    /// of the need; answered by [`Answer::Time`], with nothing if the file is no archive or has no regular files.
    NewestInArchive(FilesNeed),
}

/// Asks for an image's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageConfigNeed {
    /// The image in normal form, with tag or digest.
    pub reference: String,
    /// The platform to choose from an index; `None` for the worker's own.
    pub platform: Option<Platform>,
    /// `default`, `pull` or `local`.
    pub resolve_mode: String,
    /// Name of the progress vertex, e.g. `[internal] load metadata for docker.io/library/alpine:latest`.
    pub log_name: String,
    /// Set if the image is in an OCI layout of the client instead of a registry.
    pub store: Option<LayoutStore>,
}

/// An OCI layout that a client offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutStore {
    /// The client's session.
    pub session_id: String,
    /// The store's name in the session.
    pub store_id: String,
}

/// Asks to solve a definition and to read files of its result.
#[derive(Clone, Debug, PartialEq)]
pub struct FilesNeed {
    /// The definition to solve.
    pub definition: pb::Definition,
    /// Files to read, relative to the result's root.
    pub paths: Vec<String>,
    /// Read at most this many bytes of each.
    pub limit: Option<u64>,
}

/// Asks for a source's metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceMetadataNeed {
    /// The source.
    pub source: pb::SourceOp,
    /// Name of the progress vertex.
    pub log_name: String,
    /// For git sources: the raw commit object is wanted too.
    pub return_object: bool,
}

/// The answer to a [`Need`].
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// An image was resolved.
    Image(ImageAnswer),
    /// A source policy turned the image into another kind of source, e.g. `https://example.com/rootfs.tar`.
    Redirected {
        /// The source it became, scheme included.
        updated: String,
    },
    /// The definition was solved; one entry for each path that was asked for.
    Files(Vec<Result<Vec<u8>, AnswerError>>),
    /// What is known about the source.
    Source(SourceAnswer),
    /// A time, seconds since 1970.
    Time(Option<i64>),
    /// The need could not be met.
    Failed(AnswerError),
}

/// A resolved image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageAnswer {
    /// The image, possibly changed by a source policy.
    pub reference: String,
    /// Digest of what the reference points at.
    pub digest: Option<Digest>,
    /// The image configuration, JSON.
    pub config: Vec<u8>,
}

/// A source's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceAnswer {
    /// The raw commit object of a git source.
    pub commit_object: Option<Vec<u8>>,
    /// `Last-Modified` of an HTTP source, seconds since 1970.
    pub last_modified_s: Option<i64>,
}

/// Why a need could not be met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerError {
    /// The text to show.
    pub message: String,
    /// The caller's own mark, found again in [`Failure::cause`], so that it can attach the error it had.
    pub token: u64,
}

/// What a call of [`crate::Conversion::step`] came to.
#[derive(Clone, Debug)]
pub enum Step {
    /// Answers are needed; all of them may be looked for at the same time.
    Needs(Vec<Need>),
    /// The conversion has ended.
    Done(Box<Outcome>),
}

/// How a conversion ended well.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Definitions to solve.
    Build(BuildOutcome),
    /// A subrequest's answer: there is nothing to solve.
    Metadata(MetadataOutcome),
    /// Another frontend has to be run instead (`# syntax=`).
    Forward(Forward),
}

/// The answer to a subrequest.
#[derive(Clone, Debug, Default)]
pub struct MetadataOutcome {
    /// `result.json`, `result.txt`, `version`, ….
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// What to tell the user.
    pub warnings: Vec<Warning>,
}

/// What is to be built.
#[derive(Clone, Debug, Default)]
pub struct BuildOutcome {
    /// One result per platform, in the order asked for. One without [`BuildOutcome::multi_platform`] is the single ref.
    pub results: Vec<PlatformOutcome>,
    /// Results are a map from platform to ref; the metadata keys then carry the platform.
    pub multi_platform: bool,
    /// `containerimage.config[/PLATFORM]`, `containerimage.base.config…`, `source.date.epoch…`, `refs.platforms`.
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// What to tell the user.
    pub warnings: Vec<Warning>,
    /// Caches to import for each of the definitions.
    pub cache_imports: Vec<CacheImport>,
}

/// What is to be built for one platform.
#[derive(Clone, Debug)]
pub struct PlatformOutcome {
    /// The platform's key in metadata and refs, e.g. `linux/amd64`.
    pub id: String,
    /// The platform.
    pub platform: Platform,
    /// The definition; without ops if the result is empty.
    pub definition: pb::Definition,
    /// The image configuration, JSON.
    pub config: Vec<u8>,
    /// The base image's configuration, JSON.
    pub base_config: Option<Vec<u8>>,
    /// Attestations to solve along with it.
    pub attestations: Vec<AttestationOutcome>,
}

/// An attestation made by a step of its own, e.g. an SBOM scan.
#[derive(Clone, Debug)]
pub struct AttestationOutcome {
    /// The definition whose result holds the attestation's files.
    pub definition: pb::Definition,
    /// In-toto predicate type.
    pub predicate_type: String,
    /// Metadata of the attestation.
    pub metadata: BTreeMap<String, Vec<u8>>,
}

/// A cache to import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheImport {
    /// `registry`, `local`, ….
    pub kind: String,
    /// The importer's attributes.
    pub attributes: BTreeMap<String, String>,
}

/// How far the search for a named context has come.
#[derive(Debug)]
pub enum ContextStep {
    /// It has to be answered first, all needs at once.
    Needs(Vec<Need>),
    /// It is over; `None`: there is no such context.
    Done(Option<Box<ContextOutcome>>),
}

/// A named context.
#[derive(Clone, Debug)]
pub struct ContextOutcome {
    /// Its tree.
    pub definition: pb::Definition,
    /// The configuration, if it is an image's.
    pub config: Option<oci::ImageConfig>,
}

/// A request to run another frontend, as `gateway.v0` does.
#[derive(Clone, Debug)]
pub struct Forward {
    /// The frontend's image, as written.
    pub image: String,
    /// All options for it, `source` and `cmdline` included.
    pub options: BTreeMap<String, String>,
    /// The inputs to pass on.
    pub inputs: BTreeMap<String, pb::Definition>,
    /// Where the directive stands, for an error of that frontend which names no source itself.
    pub source: Option<SourceRange>,
    /// Text to put before an error of that frontend which names no source itself.
    pub error_prefix: Option<String>,
}

/// A place in the Dockerfile together with the Dockerfile.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRange {
    /// The file.
    pub source: pb::SourceInfo,
    /// Places in it.
    pub ranges: Vec<Range>,
}

/// Something the user should know that does not stop the build.
#[derive(Clone, Debug, PartialEq)]
pub struct Warning {
    /// The vertex the warning belongs to: the one that loads the Dockerfile.
    pub vertex: Digest,
    /// Name of the lint rule.
    pub rule: String,
    /// One line, e.g. `StageNameCasing: Stage name 'Base' should be lowercase (line 3)`.
    pub short: String,
    /// More lines.
    pub detail: Vec<String>,
    /// Where to read more; may be empty.
    pub url: String,
    /// 1 for a warning.
    pub level: i64,
    /// Where.
    pub source: SourceRange,
}

/// Why a conversion failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The text, as BuildKit's frontend words it.
    pub message: String,
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// Places in the Dockerfile, innermost first.
    pub sources: Vec<SourceRange>,
    /// The token of the [`AnswerError`] that caused it.
    pub cause: Option<u64>,
    /// Warnings up to there.
    pub warnings: Vec<Warning>,
}

/// What kind of failure a conversion ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The Dockerfile or an option is wrong, or a need was not met.
    User,
    /// The subrequest of this name is not known.
    UnsupportedSubrequest(String),
    /// The frontend capability of this name is not known.
    UnsupportedCapability(String),
}
