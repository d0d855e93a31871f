//! What a frontend, or a client over the gateway, may do within a build.
//!
//! A [`Bridge`] belongs to a job, or to the vertex of an op that builds others. It builds definitions into lazy
//! [`BuildRef`]s, runs frontends, resolves sources and shows warnings. The [`Frontend`] trait is how a frontend is
//! plugged in; a client that is its own frontend gets the job's bridge through [`Forwarder`].

mod asked;
mod build_ref;
mod consent;
mod container;
mod devices;
mod files;
mod forward;
mod policy;
mod prepare;
mod proxied;
pub mod result;
mod vertex;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use llb::pb;
use oci::Digest;
use solver::{EdgeId, Owner, StoreId, VertexId};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::driver::{ImportContext, ImportedCache};
use crate::engine::Shared;
use crate::error::BuildError;
use crate::job::Job;
use crate::op::VertexJobs;
use crate::progress::{VertexProgress, VertexWarning};
use crate::session::SessionGroup;

pub use build::meta::{
    AttestationChain, GitMeta, HttpMeta, ImageMeta, MetaContext, MetaRequest, PolicyAnswer, PolicyQuestion,
    SourceMeta, SourceResolver,
};
pub use build::result::{Attestation, AttestationKind, AttestationSubject, LateStatement, StatementContent};

pub use asked::Asked;
pub(crate) use asked::AskedBook;
pub use build_ref::BuildRef;
pub use container::{
    BuildContainer, BuildProcess, ContainerFile, ContainerRequest, MountRequest, ProcessInput, ProcessOutput,
    ProcessRequest,
};
pub use files::{FileReader, MAX_READ_BYTES};
pub use forward::Forwarder;
pub use policy::{PolicyError, PolicySet};
pub use result::{
    BridgeRequest, BuildRefId, BuildResult, CacheOption, FileRange, FrontendRequest, WarnOptions,
};

/// How many frontends may run each other: images may be made to run themselves without an end.
const MAX_DEPTH: usize = 32;

type Inputs = BTreeMap<String, pb::Definition>;

/// Turns options and inputs into a result. Implementations are built in, or run an image.
#[async_trait]
pub trait Frontend: Send + Sync + fmt::Debug {
    /// Runs the frontend. Dropping the future ends it.
    async fn solve(&self, bridge: &Bridge, request: FrontendRequest) -> Result<BuildResult, BuildError>;
}

/// An image that was resolved within a build, for its provenance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The reference without its scheme.
    pub reference: String,
    /// For which platform.
    pub platform: Option<oci::Platform>,
    /// What it resolved to.
    pub digest: Digest,
    /// Whether it came from the client's own store.
    pub is_local: bool,
}

/// What a bridge was used for, for provenance.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    /// What the frontend that ran on this bridge was asked.
    pub asked: Option<Arc<Asked>>,
    /// Images resolved.
    pub images: Vec<ResolvedImage>,
    /// Definitions built. Only named: a ref holds its bridge.
    pub built: Vec<BuildRefId>,
    /// Definitions that were evaluated, and where their results are in the solver's graph.
    pub evaluated: Vec<(BuildRefId, EdgeId)>,
    /// Frontends run from this bridge.
    pub nested: Vec<Trail>,
}

/// A trail that is still being left, and those of nested bridges: lazy refs may be evaluated long after their frontend.
#[derive(Debug, Default)]
struct OpenTrail {
    own: Mutex<Trail>,
    nested: Mutex<Vec<Arc<OpenTrail>>>,
}

impl OpenTrail {
    fn snapshot(&self) -> Trail {
        let nested: Vec<Arc<Self>> = lock(&self.nested).clone();
        Trail {
            nested: nested.iter().map(|nested| nested.snapshot()).collect(),
            ..lock(&self.own).clone()
        }
    }
}

/// Whose builds a bridge's builds are.
#[derive(Clone, Debug)]
enum BridgeOwner {
    Job(Arc<Job>),
    Vertex(VertexId, Arc<VertexJobs>),
}

#[derive(Debug)]
struct Inner {
    engine: Arc<Shared>,
    owner: BridgeOwner,
    imports: Arc<Imports>,
    trail: Arc<OpenTrail>,
    /// What the client asked of the whole build.
    root: Option<Arc<Asked>>,
    /// How many frontends were run from each other to come here.
    depth: usize,
    /// What was asked for the results of this bridge, for the provenance of builds that they are inputs of.
    entries: Mutex<Vec<asked::AskedEntry>>,
}

/// Caches being imported, shared by a bridge and those nested in it. Dropping it gives up what is on its way.
#[derive(Debug, Default)]
struct Imports {
    known: tokio::sync::Mutex<BTreeMap<CacheOption, StoreId>>,
    guards: Mutex<Vec<(DropGuard, CancellationToken)>>,
}

/// What may be done within a build. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bridge(Arc<Inner>);

impl Bridge {
    fn make(engine: Arc<Shared>, owner: BridgeOwner, root: Option<Arc<Asked>>) -> Self {
        Self(Arc::new(Inner {
            engine,
            owner,
            imports: Arc::default(),
            trail: Arc::default(),
            root,
            depth: 0,
            entries: Mutex::default(),
        }))
    }

    /// Makes the bridge of a job; `root` is what its client asked.
    pub(crate) fn of_job(engine: Arc<Shared>, job: Arc<Job>, root: Asked) -> Self {
        Self::make(engine, BridgeOwner::Job(job), Some(Arc::new(root)))
    }

    pub(crate) fn of_vertex(engine: Arc<Shared>, vertex: VertexId, jobs: Arc<VertexJobs>) -> Self {
        Self::make(engine, BridgeOwner::Vertex(vertex, jobs), None)
    }

    /// Makes the bridge of a frontend that is run from this one.
    fn nested(&self, frontend: &str, opts: &BTreeMap<String, String>, inputs: &Inputs) -> Self {
        let is_said = |root: &&Arc<Asked>| {
            !root.frontend.is_empty() || !root.opts.is_empty() || !root.inputs.is_empty()
        };
        let outer = lock(&self.0.trail.own).asked.clone();
        let root = self.0.root.as_ref().filter(is_said).cloned().or(outer);
        let known = self.0.engine.asked.find_all(inputs);
        let asked = Arc::new(Asked::new(frontend, opts.clone(), known, root.clone()));
        let trail = OpenTrail {
            own: Mutex::new(Trail {
                asked: Some(asked),
                ..Trail::default()
            }),
            ..OpenTrail::default()
        };
        Self(Arc::new(Inner {
            engine: Arc::clone(&self.0.engine),
            owner: self.0.owner.clone(),
            imports: Arc::clone(&self.0.imports),
            trail: Arc::new(trail),
            root,
            depth: self.0.depth + 1,
            entries: Mutex::default(),
        }))
    }

    /// Remembers what was asked for a frontend's results, as long as the bridge lives.
    fn remember(&self, result: &BuildResult) {
        let Some(asked) = lock(&self.0.trail.own).asked.clone() else {
            return;
        };
        // What a further frontend built is remembered by the bridge that it ran on.
        let own = result
            .all_refs()
            .filter(|built| Arc::ptr_eq(&built.bridge().0, &self.0));
        let book = &self.0.engine.asked;
        let entries = own.filter_map(|built| book.enter(built.definition(), Arc::clone(&asked)));
        lock(&self.0.entries).extend(entries);
    }

    pub(crate) fn engine(&self) -> &Arc<Shared> {
        &self.0.engine
    }

    fn owner(&self) -> Owner {
        match &self.0.owner {
            BridgeOwner::Job(job) => Owner::Job(solver::JobId(job.number())),
            BridgeOwner::Vertex(vertex, _) => Owner::Vertex(*vertex),
        }
    }

    /// Returns the builds that this bridge builds for.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        match &self.0.owner {
            BridgeOwner::Job(job) => vec![Arc::clone(job)],
            BridgeOwner::Vertex(_, jobs) => jobs.all(),
        }
    }

    /// Returns the sessions of those builds.
    pub fn sessions(&self) -> SessionGroup {
        let ids: Vec<_> = self
            .jobs()
            .iter()
            .filter_map(|job| job.session().cloned())
            .collect();
        SessionGroup::new(Arc::clone(&self.0.engine.services.sessions), ids)
    }

    /// Returns what the bridge was used for so far.
    pub fn trail(&self) -> Trail {
        self.0.trail.snapshot()
    }

    fn note(&self, change: impl FnOnce(&mut Trail)) {
        change(&mut lock(&self.0.trail.own));
    }

    /// Builds a definition, or runs a frontend. A definition's ref is lazy unless `evaluate` is set.
    ///
    /// # Errors
    /// Those of the definition, the frontend or, when evaluating, the steps.
    pub async fn solve(&self, request: BridgeRequest) -> Result<BuildResult, BuildError> {
        let definition = request.definition.filter(|definition| !definition.def.is_empty());
        let evaluate = request.evaluate;
        let result = match (definition, request.frontend.is_empty()) {
            (Some(_), false) => {
                return Err(BuildError::user(
                    "cannot solve with both Definition and Frontend specified",
                ));
            }
            (Some(definition), true) => {
                let reference = BuildRef::new(
                    self.clone(),
                    definition,
                    request.cache_imports,
                    request.source_policies,
                );
                self.note(|trail| trail.built.push(reference.id().clone()));
                BuildResult {
                    single: Some(reference),
                    ..BuildResult::default()
                }
            }
            (None, false) => {
                let inputs = request.frontend_inputs;
                Box::pin(self.run_frontend(&request.frontend, request.frontend_opts, inputs)).await?
            }
            (None, true) => BuildResult::default(),
        };
        if evaluate {
            evaluate_all(&result).await?;
        }
        Ok(result)
    }

    async fn run_frontend(
        &self,
        name: &str,
        opts: BTreeMap<String, String>,
        inputs: Inputs,
    ) -> Result<BuildResult, BuildError> {
        let frontend = self.0.engine.services.frontends.get(name).cloned();
        let frontend = frontend.ok_or_else(|| BuildError::user(format!("invalid frontend: {name}")))?;
        if self.0.depth >= MAX_DEPTH {
            let text = format!("frontends run each other more than {MAX_DEPTH} times deep");
            return Err(BuildError::user(text));
        }
        let nested = self.nested(name, &opts, &inputs);
        lock(&self.0.trail.nested).push(Arc::clone(&nested.0.trail));
        let source = opts.get("source").cloned().unwrap_or_default();
        let outcome = frontend.solve(&nested, FrontendRequest { opts, inputs }).await;
        let result = outcome.map_err(|error| error.with_frontend(name, source))?;
        nested.remember(&result);
        Ok(result)
    }

    /// Finds out what a source resolves to, within a vertex of its own.
    ///
    /// # Errors
    /// Those of policies and of the source.
    pub async fn resolve_source_meta(
        &self,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        let policies = self.policies(&request.source_policies)?;
        let platform = request.platform.as_ref().map(pb::Platform::from);
        let op = Box::pin(self.decide(&policies, platform, op))
            .await
            .map_err(|error| error.context("could not resolve image due to policy"))?;
        let meta = self.find_meta(op, request).await?;
        self.note_image(&meta, request);
        Ok(meta)
    }

    /// Finds out what an image resolves to, for whoever is going to use its configuration.
    ///
    /// # Errors
    /// As [`Self::resolve_source_meta`], and says for which image.
    pub async fn resolve_image_config(
        &self,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        let name = op.identifier.split_once("://").map_or("", |(_, name)| name);
        let context = format!("failed to resolve source metadata for {name}");
        let meta = self.resolve_source_meta(op, request).await;
        meta.map_err(|error| error.context(context))
    }

    /// Finds out what a source resolves to, whatever policies say.
    async fn find_meta(&self, op: pb::SourceOp, request: &MetaRequest) -> Result<SourceMeta, BuildError> {
        let jobs = self.jobs();
        let Some(job) = jobs.first().cloned() else {
            return Err(BuildError::canceled());
        };
        let name = if request.log_name.is_empty() {
            format!("resolve image config for {}", op.identifier)
        } else {
            request.log_name.clone()
        };
        let platform = request.platform.clone().unwrap_or_else(oci::Platform::host);
        let id = format!("{}{platform}", op.identifier);
        let sources = Arc::clone(&self.0.engine.services.sources);
        let sessions = self.sessions();
        in_vertex(&jobs, &name, &id, |progress, cancel| async move {
            let ctx = MetaContext {
                job,
                sessions,
                progress,
                cancel,
            };
            sources.resolve_meta(&ctx, op, request).await
        })
        .await
    }

    fn note_image(&self, meta: &SourceMeta, request: &MetaRequest) {
        let Some(image) = &meta.image else { return };
        let identifier = &meta.op.identifier;
        let (reference, is_local) = match identifier.strip_prefix("docker-image://") {
            Some(reference) => (reference, false),
            None => (
                identifier.strip_prefix("oci-layout://").unwrap_or(identifier),
                true,
            ),
        };
        let resolved = ResolvedImage {
            reference: reference.to_owned(),
            platform: request.platform.clone(),
            digest: image.digest,
            is_local,
        };
        self.note(|trail| trail.images.push(resolved));
    }

    /// Shows a warning on a vertex.
    pub fn warn(&self, vertex: Digest, message: &str, options: WarnOptions) {
        let mut warning = VertexWarning::short(vertex, message);
        warning.level = if options.level == 0 { 1 } else { options.level };
        warning.detail = options.detail;
        warning.url = options.url;
        warning.source = options.source;
        warning.ranges = options.ranges;
        for job in self.jobs() {
            job.progress().warn(warning.clone());
        }
    }

    /// Runs work that is shown as a vertex of its own in the builds of this bridge. `id` makes it differ from others of
    /// the same name.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn in_vertex<T, F>(
        &self,
        name: &str,
        id: &str,
        work: impl FnOnce(VertexProgress, CancellationToken) -> F,
    ) -> Result<T, BuildError>
    where
        F: Future<Output = Result<T, BuildError>>,
    {
        in_vertex(&self.jobs(), name, id, work).await
    }

    /// Checks that the builds were granted what a step asks for.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Denied`].
    pub fn check_entitlements(&self, network_host: bool, insecure: bool) -> Result<(), BuildError> {
        prepare::check_entitlements(&self.jobs(), network_host, insecure)
    }

    fn policies(&self, extra: &[llb::sourcepolicy::Policy]) -> Result<PolicySet, BuildError> {
        let mut policies: Vec<llb::sourcepolicy::Policy> = Vec::new();
        for job in self.jobs() {
            policies.extend(job.settings().source_policies.iter().cloned());
        }
        policies.extend_from_slice(extra);
        PolicySet::new(&policies).map_err(|error| BuildError::from_source(crate::ErrorKind::User, error))
    }

    /// Starts importing a cache, once per bridge and attributes.
    async fn import(&self, option: &CacheOption) -> Result<StoreId, BuildError> {
        let imports = &self.0.imports;
        let mut known = imports.known.lock().await;
        if let Some(store) = known.get(option) {
            return Ok(*store);
        }
        let Some(importer) = self.0.engine.services.cache_importers.get(&option.kind).cloned() else {
            return Err(BuildError::user(format!(
                "unknown cache importer: {}",
                option.kind
            )));
        };
        let (arrive, slot) = watch::channel(None::<Option<Arc<dyn ImportedCache>>>);
        let store = self.0.engine.driver()?.import(slot).await?;
        known.insert(option.clone(), store);
        let jobs = self.jobs();
        let sessions = self.sessions();
        let attrs = option.attrs.clone();
        let name = format!("importing cache manifest from {}", importer.name(&attrs));
        let given_up = CancellationToken::new();
        lock(&imports.guards).push((given_up.clone().drop_guard(), given_up.clone()));
        self.0.engine.tasks.spawn(async move {
            let shown = jobs.clone();
            let import = in_vertex(&shown, &name, &name, |progress, cancel| async move {
                importer
                    .import(
                        &ImportContext {
                            jobs,
                            sessions,
                            progress,
                            cancel,
                        },
                        &attrs,
                    )
                    .await
            });
            tokio::select! {
                () = given_up.cancelled() => {}
                imported = import => {
                    // A cache that cannot be imported finds nothing; its vertex says why.
                    arrive.send_replace(Some(imported.ok()));
                    // The cache stays as long as the bridge does.
                    given_up.cancelled().await;
                }
            }
        });
        Ok(store)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Evaluates all refs of a result at once; the first failure ends it.
pub(crate) async fn evaluate_all(result: &BuildResult) -> Result<(), BuildError> {
    let refs = result
        .all_refs()
        .map(|reference| async move { reference.evaluate().await.map(drop) });
    futures_util::future::try_join_all(refs).await.map(drop)
}

/// Shows the end of a vertex also when its work is dropped.
struct Shown {
    progress: VertexProgress,
    cancel: CancellationToken,
    ended: bool,
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.cancel.cancel();
        if !self.ended {
            self.progress
                .completed(false, Some("context canceled".to_owned()));
        }
    }
}

/// Runs work that is shown as a vertex of its own in some builds.
pub(crate) async fn in_vertex<T, F>(
    jobs: &[Arc<Job>],
    name: &str,
    id: &str,
    work: impl FnOnce(VertexProgress, CancellationToken) -> F,
) -> Result<T, BuildError>
where
    F: Future<Output = Result<T, BuildError>>,
{
    let id = if id.is_empty() { name } else { id };
    let digest = Digest::sha256(id.as_bytes());
    let progress = VertexProgress::new(digest, name.to_owned(), Vec::new(), None);
    let cancel = CancellationToken::new();
    let mut shown = Shown {
        progress: progress.clone(),
        cancel: cancel.clone(),
        ended: false,
    };
    progress.started(false);
    for job in jobs {
        progress.attach(job.progress());
    }
    let outcome = work(progress.clone(), cancel).await;
    shown.ended = true;
    progress.completed(false, outcome.as_ref().err().map(ToString::to_string));
    outcome
}
