//! Contracts of cache exporters: the steps behind a build's results, and who takes them along.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use oci::Digest;

use crate::error::BuildError;
use crate::export::{ExportContext, InlineCache};
use crate::job::Job;
use crate::op::ResultRef;
use crate::session::SessionGroup;

/// Key of a response: what cache exports left out, as a JSON list of objects with the `record` (absent: many) and the
/// `reason`. Steps that never had a result here are one object, with their `count` and the first `records`.
pub const OMITTED_KEY: &str = "cooper.cache.omitted";

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
    /// Whether results that lack layers may be made anew: see [`CacheExported::Lacking`].
    pub renewable: bool,
}

/// How an export of a cache ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheExported {
    /// It is done; with entries of the build's response, e.g. `cache.manifest`.
    Done(BTreeMap<String, String>),
    /// Layers of results cannot be had. Nothing was named so far, nor told. Only if the source is renewable: the export is
    /// tried again when the results were made anew, or else told to leave out what it lacks.
    Lacking,
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

    /// Exports the cache. Every result that is left out although it should be there is a warning on the vertex.
    async fn export(
        &self,
        ctx: &ExportContext,
        source: &CacheExportSource,
    ) -> Result<CacheExported, BuildError>;
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
