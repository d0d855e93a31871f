//! One `Solve` from request to response: frontend or definition, results, exporters, cache exporters.

mod choose;
mod run;
mod verify;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use oci::{Descriptor, Digest};
use tokio_util::sync::CancellationToken;

use crate::bridge::{Bridge, BuildResult};
use crate::error::BuildError;
use crate::job::Job;
use crate::op::ResultRef;
use crate::progress::VertexProgress;
use crate::session::SessionGroup;

pub use crate::export::image::WrittenImage;
pub use run::{ExporterRequest, SolveRequest, SolveResponse, parse_entitlement};

/// What an exporter is given: the build's refs, evaluated.
pub type ExportSource = BuildResult<ResultRef>;

/// Under what an exporter works.
#[derive(Clone, Debug)]
pub struct ExportContext {
    /// The build.
    pub job: Arc<Job>,
    /// Its sessions.
    pub sessions: SessionGroup,
    /// The vertex that is shown meanwhile, e.g. `exporting to image`.
    pub progress: VertexProgress,
    /// Fires when the export is not wanted any more.
    pub cancel: CancellationToken,
    /// Makes the inline cache of the exported image, if one was asked for.
    pub inline_cache: Option<Arc<dyn InlineCache>>,
}

/// Makes cache records that fit into an image's config.
#[async_trait]
pub trait InlineCache: Send + Sync + fmt::Debug {
    /// Returns the value of `moby.buildkit.cache.v0` for a platform's key (empty for the only ref), given the layers
    /// that the image will have; `None`, with a warning, when nothing can be cached.
    async fn records(
        &self,
        progress: &VertexProgress,
        key: &str,
        layers: &[Descriptor],
    ) -> Result<Option<Bytes>, BuildError>;
}

/// Makes instances of one kind of exporter.
pub trait Exporter: Send + Sync + fmt::Debug {
    /// Checks the attributes and makes an instance. `id` is the exporter's index in the request.
    fn resolve(
        &self,
        id: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError>;
}

/// One exporter of one build.
#[async_trait]
pub trait ExporterInstance: Send + Sync + fmt::Debug {
    /// The name of the vertex that is shown meanwhile, e.g. `exporting to image`.
    fn name(&self) -> &str;

    /// Exports. What can run beside other exports (a push) is left to [`Exported::finalize`].
    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError>;
}

/// The rest of an export, done beside those of the other exporters and the cache exporters.
#[async_trait]
pub trait Finalize: Send {
    /// Completes the export. If it is dropped instead, the export is incomplete but leaks nothing.
    async fn finalize(self: Box<Self>, ctx: &ExportContext) -> Result<BTreeMap<String, String>, BuildError>;
}

/// What an exporter did.
#[derive(Default)]
pub struct Exported {
    /// Entries of the build's response, e.g. `containerimage.digest`.
    pub response: BTreeMap<String, String>,
    /// What remains to be done.
    pub finalize: Option<Box<dyn Finalize>>,
    /// The exported image, for the build history.
    pub descriptor: Option<Descriptor>,
    /// Holds the exported image's blobs.
    pub held: Option<WrittenImage>,
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exported")
            .field("response", &self.response)
            .field("descriptor", &self.descriptor)
            .finish_non_exhaustive()
    }
}

/// Which steps' results a cache exporter takes along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Those of the final result and what has layers already.
    #[default]
    Min,
    /// Those of all steps.
    Max,
    /// Only those that have layers already.
    RemoteOnly,
}

/// The steps behind a build's results, for cache exporters. Inputs come before those that use them.
#[derive(Clone, Debug, Default)]
pub struct CacheGraph {
    /// The steps.
    pub entries: Vec<CacheEntry>,
    /// Indices of the build's results in `entries`.
    pub roots: Vec<usize>,
}

/// One output of one step.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// The vertex.
    pub vertex: Digest,
    /// Its output.
    pub output: usize,
    /// Digests under which the step itself is known in cache manifests: of the op digest and the output. More than one
    /// only for steps without inputs.
    pub digests: Vec<Digest>,
    /// Per input, the ways in which it is identified.
    pub inputs: Vec<Vec<CacheLink>>,
    /// The step's result, if the build loaded or made it.
    pub result: Option<ResultRef>,
    /// Results in caches that the build did not need to load, best first. See [`StoredResults`].
    pub stored: Vec<solver::StoredResult>,
    /// Ids of the step's records in the local cache, to walk links that other builds left.
    pub records: Vec<solver::RecordId>,
    /// When the result was made.
    pub created_at: SystemTime,
    /// Whether the client wants the step exported or left out in any case.
    pub export: Option<bool>,
}

/// One way in which an input is identified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLink {
    /// The input.
    pub source: CacheLinkSource,
    /// The part of it that is read.
    pub selector: Option<Digest>,
}

/// What identifies an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheLinkSource {
    /// The step that made it: its index in the graph.
    Entry(usize),
    /// Its content: the digest of the record that stands for it.
    Content(Digest),
}

/// Loads results that a build knows but did not load.
#[async_trait]
pub trait StoredResults: Send + Sync + fmt::Debug {
    /// Loads a result; `None` when its bytes are gone.
    async fn load(&self, stored: &solver::StoredResult) -> Result<Option<ResultRef>, BuildError>;
}

/// What a cache exporter is given.
#[derive(Clone, Debug)]
pub struct CacheExportSource {
    /// The build.
    pub job: Arc<Job>,
    /// The steps.
    pub graph: Arc<CacheGraph>,
    /// Loads results that were not loaded.
    pub stored: Arc<dyn StoredResults>,
    /// The build's results by key; the key is empty for the only ref. With the index in the graph.
    pub results: BTreeMap<String, (ResultRef, usize)>,
}

/// One cache exporter of one build.
#[async_trait]
pub trait CacheExporter: Send + Sync + fmt::Debug {
    /// The name of the vertex that is shown meanwhile, e.g. `exporting cache to registry`.
    fn name(&self) -> &str;

    /// Whether a failure is shown on its vertex but does not fail the build.
    fn ignores_errors(&self) -> bool {
        false
    }

    /// When the records go into the exported image instead of being exported on their own: makes them.
    fn inline(&self, source: &CacheExportSource) -> Option<Arc<dyn InlineCache>> {
        let _ = source;
        None
    }

    /// Exports the cache; returns entries of the build's response, e.g. `cache.manifest`. Every record that is left out
    /// although the mode asks for it is a warning on the vertex.
    async fn export(
        &self,
        ctx: &ExportContext,
        source: &CacheExportSource,
    ) -> Result<BTreeMap<String, String>, BuildError>;
}

/// Makes cache exporters of one kind.
#[async_trait]
pub trait CacheExporterFactory: Send + Sync + fmt::Debug {
    /// Checks the attributes and makes an exporter; `None`: this kind has nothing to do here.
    async fn resolve(
        &self,
        sessions: &SessionGroup,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<dyn CacheExporter>>, BuildError>;
}

/// Changes a result between build and export: attaches provenance, runs scanners.
#[async_trait]
pub trait ResultProcessor: Send + Sync + fmt::Debug {
    /// Returns the result that is to be exported. Its new refs may be lazy.
    async fn process(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: BuildResult,
    ) -> Result<BuildResult, BuildError>;

    /// Returns what is to be remembered of the result rather than attached to it.
    async fn remember(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: &BuildResult,
    ) -> Result<Vec<Statement>, BuildError> {
        let _ = (bridge, request, result);
        Ok(Vec::new())
    }
}

/// What is stated about a part of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statement {
    /// The part: a platform's key; empty for a result that is a single ref.
    pub key: String,
    /// The type of the predicate, a URL.
    pub predicate_type: String,
    /// The predicate as JSON.
    pub predicate: Bytes,
}
