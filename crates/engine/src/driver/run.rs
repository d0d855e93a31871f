//! The task that owns the solver.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use oci::Digest;
use solver::{
    BuildId, Effect, EffectId, Event, Failure, Input, JobId, NewRecord, Outcome, Query, ResultId, Solver,
    StoreId, StoredResult, VertexId,
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::driver::explaining::{Audience, Explaining};
use crate::driver::renew;
use crate::driver::why;
use crate::driver::work::{self, Answer, LoadFrom};
use crate::driver::{
    Bridges, Command, Driver, Evaluated, Exported, INBOX, LocalRecords, PreparedGraph, StepProvenance,
};
use crate::driver::{ImportContext, ImportSlot};
use crate::error::BuildError;
use crate::job::Job;
use crate::op::{Op, OpContext, OpFactory, ResultRef, VertexJobs, VertexSpec};
use crate::progress::VertexProgress;
use crate::session::{SessionGroup, Sessions};
use crate::unlazy::{FetchContext, Unlazy};

/// An active vertex as the driver knows it.
struct Active {
    spec: Arc<VertexSpec>,
    progress: VertexProgress,
    jobs: Arc<VertexJobs>,
    op: Option<Result<Arc<dyn Op>, BuildError>>,
}

/// A result that the solver owns.
struct Held {
    reference: ResultRef,
    created_at: SystemTime,
}

/// What the driver works with.
pub(crate) struct DriverParts {
    pub unlazy: Arc<dyn Unlazy>,
    pub ops: Arc<dyn OpFactory>,
    pub sessions: Arc<dyn Sessions>,
    pub records: LocalRecords,
    pub bridges: Arc<dyn Bridges>,
    /// Steps that may run at once; `None`: no limit.
    pub max_parallelism: Option<NonZeroUsize>,
}

struct DriverTask {
    parts: DriverParts,
    limit: Option<Arc<Semaphore>>,
    solver: Solver<BuildError>,
    vertices: BTreeMap<VertexId, Active>,
    /// The vertices without inputs, with their progress.
    sources: BTreeMap<Digest, (VertexId, VertexProgress)>,
    /// Specs of the graph that is being loaded.
    incoming: BTreeMap<Digest, Arc<VertexSpec>>,
    jobs: BTreeMap<JobId, Arc<Job>>,
    results: BTreeMap<ResultId, Held>,
    next_result: u64,
    builds: BTreeMap<BuildId, oneshot::Sender<Result<Evaluated, BuildError>>>,
    imports: BTreeMap<StoreId, ImportSlot>,
    running: JoinSet<(EffectId, Answer)>,
    /// Which effect a task is, for those that panic.
    tasks: HashMap<Id, EffectId>,
    cancels: BTreeMap<EffectId, CancellationToken>,
    drains: Vec<oneshot::Sender<()>>,
    explaining: Explaining,
}

/// Starts the driver on the current runtime.
pub(crate) fn spawn(parts: DriverParts) -> Driver {
    let (inbox, commands) = mpsc::channel(INBOX);
    let (closing, closed) = mpsc::unbounded_channel();
    let limit = parts
        .max_parallelism
        .map(|limit| Arc::new(Semaphore::new(limit.get())));
    let explaining = Explaining::new(parts.records.records());
    let task = DriverTask {
        parts,
        limit,
        solver: Solver::new(),
        vertices: BTreeMap::new(),
        sources: BTreeMap::new(),
        incoming: BTreeMap::new(),
        jobs: BTreeMap::new(),
        results: BTreeMap::new(),
        next_result: 0,
        builds: BTreeMap::new(),
        imports: BTreeMap::new(),
        running: JoinSet::new(),
        tasks: HashMap::new(),
        cancels: BTreeMap::new(),
        drains: Vec::new(),
        explaining,
    };
    tokio::spawn(task.run(commands, closed));
    Driver {
        inbox,
        closing,
        numbers: Arc::new(AtomicU64::new(0)),
    }
}

impl DriverTask {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut closed: mpsc::UnboundedReceiver<u64>) {
        let mut open = true;
        while open || !self.is_idle() {
            tokio::select! {
                biased;
                Some(job) = closed.recv() => self.close_job(job),
                Some(ended) = self.running.join_next_with_id() => self.ended(ended),
                Some(explained) = self.explaining.tasks.join_next() => {
                    // The task itself does not panic: what it waits for may.
                    if let Ok((vertex, explained)) = explained {
                        self.explaining.ended(vertex, explained);
                    }
                }
                command = commands.recv(), if open => match command {
                    Some(command) => self.command(command),
                    None => {
                        open = false;
                        for job in std::mem::take(&mut self.jobs).into_keys() {
                            self.tell(Input::CloseJob { job });
                        }
                    }
                },
            }
            if self.is_idle() {
                for drain in self.drains.drain(..) {
                    // Whoever waited may have left.
                    let _ = drain.send(());
                }
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.explaining.tasks.is_empty()
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Build {
                build,
                owner,
                graph,
                reply,
            } => {
                self.builds.insert(build, reply);
                let PreparedGraph { defs, specs, target } = graph;
                self.incoming = defs.iter().map(|def| def.digest).zip(specs).collect();
                self.tell(Input::Build {
                    build,
                    owner,
                    graph: defs,
                    target,
                });
                self.incoming.clear();
            }
            Command::Renew {
                build,
                owner,
                edge,
                lost,
                reply,
            } => {
                let lost = self.forget_lacking(edge, &lost);
                self.builds.insert(build, reply);
                self.tell(Input::Renew {
                    build,
                    owner,
                    edge,
                    lost,
                });
            }
            Command::Cancel { build } => {
                self.builds.remove(&build);
                self.tell(Input::CancelBuild { build });
            }
            Command::OpenJob { job } => {
                self.jobs.insert(JobId(job.number()), job);
            }
            Command::Import { store, slot } => {
                self.imports.insert(store, slot);
            }
            Command::Export { edges, reply } => {
                let graph = self.solver.export(&edges);
                let held = graph.entries.iter().map(|entry| {
                    let held = self.results.get(&entry.result?)?;
                    Some((held.reference.clone(), held.created_at))
                });
                let results = held.collect();
                let _ = reply.send(Exported { graph, results });
            }
            Command::Provenance { edge, reply } => {
                let _ = reply.send(self.provenance(edge));
            }
            Command::LoadStored { stored, jobs, reply } => self.load_stored(stored, jobs, reply),
            Command::Explained { job, reply } => self.explaining.wait(job, reply),
            Command::Drain { reply } => self.drains.push(reply),
        }
    }

    /// Forgets the records of those results behind an edge that lack lost blobs; returns the results.
    fn forget_lacking(&self, edge: solver::EdgeId, lost: &BTreeSet<Digest>) -> BTreeSet<ResultId> {
        // What one place lost may have come from another.
        let gone = lost.iter().filter(|blob| !self.parts.records.has_blob(blob));
        let gone: BTreeSet<Digest> = gone.copied().collect();
        let mut found = self.solver.results_behind(edge);
        found.retain(|result| {
            let held = self.results.get(result).and_then(|held| held.reference.get());
            held.is_some_and(|reference| renew::lacks(reference, &gone))
        });
        let held = found.iter().filter_map(|result| self.results.get(result));
        for reference in held.filter_map(|held| held.reference.get()) {
            self.parts.records.forget_ref(reference);
        }
        found
    }

    fn close_job(&mut self, job: u64) {
        self.tell(Input::CloseJob { job: JobId(job) });
        self.jobs.remove(&JobId(job));
        // An import is given up by its job; its slot is of no use then.
        self.imports.retain(|_, slot| slot.has_changed().is_ok());
    }

    fn provenance(&self, edge: solver::EdgeId) -> Vec<StepProvenance> {
        let vertices = self.solver.vertices_behind(edge);
        let steps = vertices.iter().filter_map(|vertex| {
            let active = self.vertices.get(vertex)?;
            let op = active
                .op
                .as_ref()
                .and_then(|op| op.as_ref().ok())
                .and_then(|op| op.provenance());
            Some(StepProvenance {
                vertex: Arc::clone(&active.spec),
                op,
            })
        });
        steps.collect()
    }

    /// Tells the solver something and does what follows from it.
    fn tell(&mut self, input: Input<BuildError>) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            self.solver.handle(input);
            while let Some(event) = self.solver.poll_event() {
                self.event(event);
            }
            while let Some(effect) = self.solver.poll_effect() {
                self.effect(effect, &mut inputs);
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Added { vertex, digest } => {
                let spec = self.incoming.get(&digest).cloned().unwrap_or_default();
                let inputs: Vec<Digest> = spec.inputs.iter().map(|(digest, _)| *digest).collect();
                let is_source = inputs.is_empty();
                let group = spec.metadata.progress_group.clone();
                let progress = VertexProgress::new(digest, spec.name.clone(), inputs, group);
                if is_source {
                    self.sources.insert(digest, (vertex, progress.clone()));
                }
                self.vertices.insert(
                    vertex,
                    Active {
                        spec,
                        progress,
                        jobs: Arc::default(),
                        op: None,
                    },
                );
            }
            Event::Attached { vertex, job } => {
                if let (Some(active), Some(job)) = (self.vertices.get(&vertex), self.jobs.get(&job)) {
                    active.jobs.add(Arc::clone(job));
                    active.progress.attach(job.progress());
                }
            }
            Event::Detached { vertex, job } => {
                if let (Some(active), Some(job)) = (self.vertices.get(&vertex), self.jobs.get(&job)) {
                    active.jobs.remove(job);
                    active.progress.detach(job.progress());
                }
            }
            Event::Removed { vertex } => {
                let removed = self.vertices.remove(&vertex);
                self.explaining.removed(vertex);
                // Another vertex may have the digest by now.
                if let Some(removed) = removed.map(|active| active.progress)
                    && let Some((source, _)) = self.sources.get(&removed.digest())
                    && *source == vertex
                {
                    self.sources.remove(&removed.digest());
                }
            }
        }
    }

    fn effect(&mut self, effect: Effect<BuildError>, inputs: &mut Vec<Input<BuildError>>) {
        match effect {
            Effect::CacheMap {
                effect,
                vertex,
                round,
            } => match self.op(vertex) {
                Some((op, ctx)) => self.start(effect, ctx.cancel().clone(), work::cache_map(op, ctx, round)),
                None => inputs.push(self.no_op(effect, vertex)),
            },
            Effect::Query {
                effect,
                vertex: _,
                queries,
            } => self.query(effect, queries, inputs),
            Effect::Checksum {
                effect,
                vertex,
                input,
                result,
            } => match (self.op(vertex), self.results.get(&result)) {
                (Some((op, ctx)), Some(held)) => {
                    let reference = held.reference.clone();
                    self.start(
                        effect,
                        ctx.cancel().clone(),
                        work::checksum(op, ctx, input, reference),
                    );
                }
                _ => inputs.push(self.no_op(effect, vertex)),
            },
            Effect::Load {
                effect,
                vertex,
                output: _,
                stored,
            } => match self.context(vertex) {
                Some(ctx) => {
                    let from = self.load_from(&stored, ctx.jobs(), ctx.progress(), ctx.cancel().clone());
                    match from {
                        Some(from) => self.start(effect, ctx.cancel().clone(), work::load(ctx, from, stored)),
                        None => inputs.push(Input::Loaded { effect, result: None }),
                    }
                }
                None => inputs.push(Input::Canceled { effect }),
            },
            Effect::Exec {
                effect,
                vertex,
                inputs: results,
                record,
            } => {
                inputs.extend(self.exec(effect, vertex, &results, record));
            }
            Effect::Save { vertex, record } => self.save(vertex, &record),
            Effect::Forget { stored } => self.parts.records.forget(&stored),
            Effect::Cancel { effect } => {
                if let Some(cancel) = self.cancels.get(&effect) {
                    cancel.cancel();
                }
            }
            Effect::Release { result } => {
                self.results.remove(&result);
            }
            Effect::Finished { build, outcome } => self.finished(build, outcome),
        }
    }

    /// Starts an execution; what is returned is told at once.
    fn exec(
        &mut self,
        effect: EffectId,
        vertex: VertexId,
        results: &[ResultId],
        record: Option<NewRecord>,
    ) -> Option<Input<BuildError>> {
        let Some((op, ctx)) = self.op(vertex) else {
            return Some(self.no_op(effect, vertex));
        };
        let held = results.iter().filter_map(|result| self.results.get(result));
        let references: Vec<ResultRef> = held.map(|held| held.reference.clone()).collect();
        let work = why::Work {
            records: self.parts.records.records(),
            spec: Arc::clone(ctx.vertex()),
            record,
            op: Arc::clone(&op),
            inputs: references.clone(),
            sources: self.source_ops(ctx.vertex()),
            started_at: SystemTime::now(),
        };
        let jobs = self.vertices.get(&vertex).map(|active| Arc::clone(&active.jobs));
        let audience = Audience {
            progress: ctx.progress().clone(),
            jobs: jobs.unwrap_or_default(),
        };
        self.explaining.start(vertex, work, audience);
        let limit = self.limit.clone();
        self.start(
            effect,
            ctx.cancel().clone(),
            work::exec(op, ctx, references, limit),
        );
        None
    }

    /// The ops of a vertex's inputs that are sources.
    fn source_ops(&self, spec: &VertexSpec) -> Vec<Option<Arc<dyn Op>>> {
        let op = |(digest, _): &(Digest, usize)| {
            let (vertex, _) = self.sources.get(digest)?;
            let made = self.vertices.get(vertex)?.op.as_ref()?;
            made.as_ref().ok().cloned()
        };
        spec.inputs.iter().map(op).collect()
    }

    fn save(&mut self, vertex: VertexId, record: &NewRecord) {
        let held = record.result.and_then(|result| self.results.get(&result));
        let result = held.map(|held| (&held.reference, held.created_at));
        let spec = self.vertices.get(&vertex).map(|active| &active.spec);
        let description = held.zip(spec).and_then(|(held, spec)| {
            let (id, at) = (record.record.to_string(), held.created_at);
            // What was not executed but loaded from elsewhere is described by what is known of it.
            let described = self.explaining.description(vertex, id, at);
            described.unwrap_or_else(|_| why::describe(spec, record, at))
        });
        if let Err(error) = self.parts.records.save(record, result, description) {
            tracing::error!(%error, record = %record.record, "a cache record cannot be saved");
            if let Some(active) = self.vertices.get(&vertex) {
                let text = format!("result is not cached: {error}");
                active.progress.warn(crate::progress::VertexWarning::short(
                    active.progress.digest(),
                    text,
                ));
            }
        }
    }

    fn finished(&mut self, build: BuildId, outcome: Outcome<BuildError>) {
        let Some(reply) = self.builds.remove(&build) else {
            return;
        };
        let outcome = match outcome {
            Ok(built) => match self.results.get(&built.result) {
                Some(held) => Ok(Evaluated {
                    result: held.reference.clone(),
                    edge: built.edge,
                }),
                None => Err(BuildError::internal(format!("{:?} has no result", built.edge))),
            },
            Err(failure) => Err(build_error(failure)),
        };
        // Whoever asked may have left.
        let _ = reply.send(outcome);
    }

    // ---- ops -------------------------------------------------------------------------------------------------------

    fn context(&self, vertex: VertexId) -> Option<OpContext> {
        let active = self.vertices.get(&vertex)?;
        let sources = active
            .spec
            .inputs
            .iter()
            .map(|(digest, _)| self.sources.get(digest).map(|(_, progress)| progress.clone()));
        let ctx = OpContext::new(
            Arc::clone(&active.spec),
            active.progress.clone(),
            Arc::clone(&active.jobs),
            Arc::clone(&self.parts.sessions),
            self.parts.bridges.vertex_bridge(vertex, &active.jobs)?,
        );
        Some(ctx.with_sources(sources.collect()))
    }

    fn op(&mut self, vertex: VertexId) -> Option<(Arc<dyn Op>, OpContext)> {
        let active = self.vertices.get_mut(&vertex)?;
        let op = active
            .op
            .get_or_insert_with(|| self.parts.ops.create(&active.spec))
            .as_ref()
            .ok()?;
        let op = Arc::clone(op);
        Some((op, self.context(vertex)?))
    }

    /// Why there is no op: it could not be made, or its vertex is gone.
    fn no_op(&self, effect: EffectId, vertex: VertexId) -> Input<BuildError> {
        let op = self.vertices.get(&vertex).and_then(|active| active.op.as_ref());
        match op {
            Some(Err(error)) => Input::Failed {
                effect,
                error: error.clone(),
            },
            _ => Input::Canceled { effect },
        }
    }

    // ---- stores ----------------------------------------------------------------------------------------------------

    fn query(&mut self, effect: EffectId, queries: Vec<Query>, inputs: &mut Vec<Input<BuildError>>) {
        let mut stores: Vec<StoreId> = queries.iter().map(Query::store).collect();
        stores.sort_unstable();
        stores.dedup();
        let slots: Vec<(StoreId, ImportSlot)> = stores
            .iter()
            .filter_map(|store| Some((*store, self.imports.get(store)?.clone())))
            .collect();
        let local = self.parts.records.clone();
        if slots.is_empty() {
            let found = queries.iter().map(|query| match query.store() {
                StoreId::LOCAL => local.answer(query),
                _ => Vec::new(),
            });
            inputs.push(Input::KeysFound {
                effect,
                found: found.collect(),
            });
        } else {
            self.start(
                effect,
                CancellationToken::new(),
                work::query(local, slots, queries),
            );
        }
    }

    fn load_from(
        &self,
        stored: &StoredResult,
        jobs: Vec<Arc<Job>>,
        progress: &VertexProgress,
        cancel: CancellationToken,
    ) -> Option<LoadFrom> {
        let ids: Vec<_> = jobs.iter().filter_map(|job| job.session().cloned()).collect();
        let sessions = SessionGroup::new(Arc::clone(&self.parts.sessions), ids);
        if stored.key.store == StoreId::LOCAL {
            let ctx = FetchContext::new(progress.clone(), sessions, cancel);
            let unlazy = Arc::clone(&self.parts.unlazy);
            return Some(LoadFrom::Local(self.parts.records.clone(), unlazy, ctx));
        }
        let slot = self.imports.get(&stored.key.store)?.clone();
        Some(LoadFrom::Imported(
            slot,
            ImportContext {
                jobs,
                sessions,
                progress: progress.clone(),
                cancel,
            },
        ))
    }

    fn load_stored(
        &self,
        stored: StoredResult,
        jobs: Vec<Arc<Job>>,
        reply: oneshot::Sender<Result<Option<ResultRef>, BuildError>>,
    ) {
        let progress = VertexProgress::new(stored.key.record.0, String::new(), Vec::new(), None);
        let from = self.load_from(&stored, jobs, &progress, CancellationToken::new());
        let Some(from) = from else {
            let _ = reply.send(Ok(None));
            return;
        };
        let load = async move {
            let mut reply = reply;
            tokio::select! {
                () = reply.closed() => {}
                loaded = work::load_stored(from, stored) => {
                    let _ = reply.send(Ok(loaded));
                }
            }
        };
        tokio::spawn(load);
    }

    // ---- running effects -------------------------------------------------------------------------------------------

    fn start(
        &mut self,
        effect: EffectId,
        cancel: CancellationToken,
        work: impl Future<Output = Answer> + Send + 'static,
    ) {
        self.cancels.insert(effect, cancel.clone());
        let work = Box::pin(work);
        let task = self
            .running
            .spawn(async move { (effect, work::cancellable(cancel, work).await) });
        self.tasks.insert(task.id(), effect);
    }

    fn ended(&mut self, ended: Result<(Id, (EffectId, Answer)), JoinError>) {
        let (task, effect, answer) = match ended {
            Ok((task, (effect, answer))) => (task, effect, answer),
            Err(error) => {
                let Some(effect) = self.tasks.get(&error.id()).copied() else {
                    return;
                };
                tracing::error!(%error, "an effect ended without an answer");
                let text = format!("internal error: {error}");
                (error.id(), effect, Answer::Failed(BuildError::internal(text)))
            }
        };
        self.tasks.remove(&task);
        self.cancels.remove(&effect);
        let input = match answer {
            Answer::Map(map) => Input::MapReady { effect, map },
            Answer::Keys(found) => Input::KeysFound { effect, found },
            Answer::Checksum(digest) => Input::Checksummed { effect, digest },
            Answer::Loaded(loaded) => {
                let result = loaded.map(|(reference, created_at)| self.hold(reference, created_at));
                Input::Loaded { effect, result }
            }
            Answer::Executed(outputs) => {
                let now = SystemTime::now();
                let held = outputs
                    .into_iter()
                    .map(|output| output.map(|reference| self.hold(reference, now)));
                let outputs = held.collect();
                Input::Executed { effect, outputs }
            }
            Answer::Failed(error) => Input::Failed { effect, error },
            Answer::Lost(error) => {
                tracing::warn!(%error, inputs = ?error.lost_inputs(), "cached inputs are gone");
                Input::Lost {
                    effect,
                    inputs: error.lost_inputs().to_vec(),
                    error,
                }
            }
            Answer::Canceled => Input::Canceled { effect },
        };
        self.tell(input);
    }

    fn hold(&mut self, reference: ResultRef, created_at: SystemTime) -> ResultId {
        let id = ResultId(self.next_result);
        self.next_result += 1;
        self.results.insert(
            id,
            Held {
                reference,
                created_at,
            },
        );
        id
    }
}

fn build_error(failure: Failure<BuildError>) -> BuildError {
    match failure {
        Failure::Op { vertex, error } => error.with_vertex(vertex),
        Failure::NoOutput { vertex, output } => {
            BuildError::internal(format!("invalid response from exec: no output {output}"))
                .with_vertex(vertex)
        }
        Failure::NoDigest { vertex } => {
            BuildError::internal("the op has no cache digest").with_vertex(vertex)
        }
        Failure::Recursive => BuildError::user("a build op must not build itself"),
        Failure::Canceled => BuildError::canceled(),
    }
}
