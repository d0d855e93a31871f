//! What the engine asks of the op behind a vertex, and what the op may ask of the engine.
//!
//! An op is made once per active vertex and shared by all builds that need the vertex. Its three
//! questions are asked at most once each at a time: what identifies it ([`Op::cache_map`]), what identifies the content
//! that it reads of an input ([`Op::content_digest`]), and what it yields ([`Op::exec`]).

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;
use layer::checksum::Selector;
use llb::pb;
use oci::Digest;
use tokio_util::sync::CancellationToken;

use crate::error::BuildError;
use crate::job::Job;
use crate::progress::VertexProgress;
use crate::session::{SessionGroup, Sessions};

/// A step's result: an immutable ref, or scratch (an empty tree that needs no storage).
///
/// Cheap to clone. Holding it keeps the ref's bytes from being collected; dropping the last clone lets go of them.
#[derive(Clone, Debug, Default)]
pub struct ResultRef(Option<cache::ImmutableRef>);

impl ResultRef {
    /// The empty tree.
    pub const SCRATCH: Self = Self(None);

    /// Wraps a ref.
    pub fn new(reference: cache::ImmutableRef) -> Self {
        Self(Some(reference))
    }

    /// Returns the ref; `None` is scratch.
    pub fn get(&self) -> Option<&cache::ImmutableRef> {
        self.0.as_ref()
    }

    /// Returns whether this is scratch.
    pub fn is_scratch(&self) -> bool {
        self.0.is_none()
    }
}

impl From<cache::ImmutableRef> for ResultRef {
    fn from(reference: cache::ImmutableRef) -> Self {
        Self::new(reference)
    }
}

impl From<Option<cache::ImmutableRef>> for ResultRef {
    fn from(reference: Option<cache::ImmutableRef>) -> Self {
        Self(reference)
    }
}

/// How an op's results are identified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheMap {
    /// Digests of the op itself, without its inputs; any of them identifies it. The first is the primary one. More than
    /// one only makes sense for an op without inputs, e.g. an image's manifest digest and its chainID.
    pub digests: Vec<Digest>,
    /// Whether asking again, with the next round, yields further alternatives. The solver asks only when what it knows
    /// so far finds nothing, so costly digests belong into later rounds. Only for ops without inputs.
    pub more: bool,
    /// The digests identify this run only (a client's directory before it was transferred): they match nothing in other
    /// builds and are neither stored nor exported.
    pub ephemeral: bool,
    /// One per input, in order.
    pub deps: Vec<Dep>,
}

/// How an input counts in a [`CacheMap`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dep {
    /// Digest of the part of the input that is read; `None`: all of it.
    pub selector: Option<Digest>,
    /// Whether [`Op::content_digest`] may identify the input by content. Only if nothing of the input but what is
    /// checksummed can show in the results.
    pub content: bool,
}

/// The behaviour of a vertex.
///
/// Every method runs under a context that fires `ctx.cancel()` when no build needs the answer any more; the future is
/// then given some seconds to finish cleanly before it is dropped. Answers that arrive nevertheless are used.
#[async_trait]
pub trait Op: Send + Sync + fmt::Debug {
    /// Says how results are identified. `round` starts at 0 and grows while [`CacheMap::more`] is answered.
    async fn cache_map(&self, ctx: &OpContext, round: u32) -> Result<CacheMap, BuildError>;

    /// Checksums what the op reads of an input; `None` if the content cannot identify it after all. Only called for
    /// inputs with [`Dep::content`].
    async fn content_digest(
        &self,
        ctx: &OpContext,
        input: usize,
        reference: &ResultRef,
    ) -> Result<Option<Digest>, BuildError>;

    /// What [`Op::content_digest`] covers of an input, none being everything; `None` if the content does not identify it.
    fn content_selectors(&self, input: usize) -> Option<&[Selector]> {
        let _ = input;
        None
    }

    /// Does the work. `inputs` are in the order of the vertex's inputs. Yields one result per output; `None` where an
    /// output cannot be used by others. Only called when the inputs' bytes may be needed: making a lazy ref real is the
    /// op's own business.
    async fn exec(&self, ctx: &OpContext, inputs: &[ResultRef])
    -> Result<Vec<Option<ResultRef>>, BuildError>;

    /// Whether [`Op::cache_map`] of an op without inputs may take long, and is shown.
    fn shows_cache_map(&self) -> bool {
        true
    }

    /// Whether [`Op::exec`] counts against the limit of steps that run at once. An op that builds others must not.
    fn is_limited(&self) -> bool {
        true
    }

    /// What the op contributed to its vertex's provenance, as far as known; asked after the build.
    fn provenance(&self) -> Option<OpProvenance> {
        None
    }
}

/// What an op contributes to a build's provenance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpProvenance {
    /// The source's identifier as resolved, e.g. `docker-image://docker.io/library/alpine:latest@sha256:…`.
    pub source: Option<String>,
    /// The source's pin, e.g. an image's manifest digest, a commit, a file's checksum.
    pub pin: Option<String>,
    /// The platform for which the source was resolved.
    pub platform: Option<pb::Platform>,
    /// Attributes that a material needs, e.g. a local directory's name.
    pub attributes: BTreeMap<String, String>,
    /// Secrets that were offered to the step: id, and whether it may be absent.
    pub secrets: Vec<(String, bool)>,
    /// Agents that were offered to the step: id, and whether it may be absent.
    pub agents: Vec<(String, bool)>,
    /// What the step was seen to fetch, if it ran behind a proxy.
    pub fetched: Option<Fetched>,
    /// Whether the step had a network or otherwise saw what is not pinned.
    pub incomplete: bool,
}

/// What a step was seen to fetch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// URLs, and the checksum of what was there.
    pub materials: Vec<(String, Digest)>,
    /// Requests that are not pinned by a checksum.
    pub unpinned: Vec<UnpinnedRequest>,
}

/// A request of a step that is not pinned by a checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpinnedRequest {
    /// The method.
    pub method: String,
    /// The URL, without credentials.
    pub url: String,
    /// Why, in BuildKit's words, e.g. `unsuccessful_response`.
    pub reason: &'static str,
}

/// A vertex as the op sees it.
#[derive(Clone, Debug, Default)]
pub struct VertexSpec {
    /// The vertex's digest.
    pub digest: Option<Digest>,
    /// The op.
    pub op: Arc<pb::Op>,
    /// The op's bytes as the client sent them.
    pub raw: Bytes,
    /// What the op does, for people: the client's name for it, or one made of the op.
    pub name: String,
    /// Metadata that came with the op.
    pub metadata: pb::OpMetadata,
    /// Digest and output index of each input.
    pub inputs: Vec<(Digest, usize)>,
    /// What each input is called.
    pub input_names: Vec<String>,
    /// Whether it is a step that reaches the network by nothing but a proxy.
    pub is_proxied: bool,
}

/// The builds that share a vertex: they change while it is active.
#[derive(Debug, Default)]
pub struct VertexJobs {
    jobs: Mutex<Vec<Arc<Job>>>,
    kept: Mutex<Vec<Box<dyn Keep>>>,
}

/// Anything that is let go of by dropping it.
trait Keep: Any + Send + fmt::Debug {}
impl<T: Any + Send + fmt::Debug> Keep for T {}

impl VertexJobs {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.jobs
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Adds a job once.
    pub fn add(&self, job: Arc<Job>) {
        let mut jobs = self.lock();
        if !jobs.iter().any(|known| Arc::ptr_eq(known, &job)) {
            jobs.push(job);
        }
    }

    /// Removes a job.
    pub fn remove(&self, job: &Arc<Job>) {
        self.lock().retain(|known| !Arc::ptr_eq(known, job));
    }

    /// Returns the jobs at this moment, oldest first.
    pub fn all(&self) -> Vec<Arc<Job>> {
        self.lock().clone()
    }
}

/// The bridge of a vertex, for an op that builds others: what it builds is built for the vertex's builds.
#[async_trait]
pub trait VertexBridge: Send + Sync + fmt::Debug {
    /// Reads a file of one of the op's inputs whole, fetching the input's bytes if need be.
    ///
    /// # Errors
    /// When there is no such file, or it is too large to be a definition.
    async fn read_file(&self, input: &ResultRef, path: &str) -> Result<Bytes, BuildError>;

    /// Builds a definition and returns its result. Dropping the future gives the build up.
    ///
    /// # Errors
    /// Those of the definition and its steps.
    async fn build(&self, definition: pb::Definition) -> Result<ResultRef, BuildError>;

    /// Returns what decides on the requests of a step behind a proxy; `None` if everything is allowed.
    ///
    /// # Errors
    /// For policies that make no sense.
    fn url_policy(&self) -> Result<Option<Arc<dyn UrlPolicy>>, BuildError>;
}

/// Decides on the requests of a step behind a proxy, as if they were sources of its builds.
#[async_trait]
pub trait UrlPolicy: Send + Sync + fmt::Debug {
    /// Decides on a URL without credentials; returns the URL to use in its place, if another is.
    ///
    /// # Errors
    /// When the request may not be made.
    async fn decide(&self, url: &str) -> Result<Option<String>, BuildError>;
}

/// What an op may ask while it works on a vertex. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OpContext {
    vertex: Arc<VertexSpec>,
    progress: VertexProgress,
    /// The progress of each input that is a source.
    sources: Vec<Option<VertexProgress>>,
    cancel: CancellationToken,
    jobs: Arc<VertexJobs>,
    sessions: Arc<dyn Sessions>,
    bridge: Arc<dyn VertexBridge>,
}

impl OpContext {
    /// Makes the context of one question to the op of a vertex.
    pub fn new(
        vertex: Arc<VertexSpec>,
        progress: VertexProgress,
        jobs: Arc<VertexJobs>,
        sessions: Arc<dyn Sessions>,
        bridge: Arc<dyn VertexBridge>,
    ) -> Self {
        Self {
            vertex,
            progress,
            sources: Vec::new(),
            cancel: CancellationToken::new(),
            jobs,
            sessions,
            bridge,
        }
    }

    /// Tells the progress of each input that is a source, in the order of the inputs.
    #[must_use]
    pub fn with_sources(mut self, sources: Vec<Option<VertexProgress>>) -> Self {
        self.sources = sources;
        self
    }

    /// Returns the progress of each input that is a source, in the order of the inputs.
    pub fn sources(&self) -> &[Option<VertexProgress>] {
        &self.sources
    }

    /// Returns the vertex.
    pub fn vertex(&self) -> &Arc<VertexSpec> {
        &self.vertex
    }

    /// Returns where to show what happens.
    pub fn progress(&self) -> &VertexProgress {
        &self.progress
    }

    /// Fires when nobody needs the answer any more.
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Returns the sessions of all builds that need the vertex now, in the order in which they joined. Builds may join
    /// and leave while an op works: ask anew for each use.
    pub fn sessions(&self) -> SessionGroup {
        let ids: Vec<_> = self
            .jobs
            .all()
            .iter()
            .filter_map(|job| job.session().cloned())
            .collect();
        SessionGroup::new(Arc::clone(&self.sessions), ids)
    }

    /// Returns the builds that need the vertex now.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.jobs.all()
    }

    /// Keeps something alive until the vertex is given up by its last build.
    pub fn keep(&self, thing: impl Any + Send + fmt::Debug) {
        self.jobs
            .kept
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(Box::new(thing));
    }

    /// Returns the bridge on which the op may build other definitions, for the vertex's builds.
    pub fn bridge(&self) -> &dyn VertexBridge {
        &*self.bridge
    }

    /// Computes a value once per build and key, e.g. to what a tag resolves, so that all steps of a build see the same.
    /// Concurrent callers wait for the first. A failure is not kept.
    pub async fn memo<T, F>(&self, key: &str, compute: F) -> Result<Arc<T>, BuildError>
    where
        T: Any + Send + Sync,
        F: Future<Output = Result<T, BuildError>> + Send,
    {
        crate::job::memo(&self.jobs.all(), key, compute).await
    }
}
