//! The solver itself: jobs, vertices' lifetimes, answers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use oci::Digest;

use crate::arena::{Arena, EdgeId, VertexId};
use crate::edge::{Built, Edge, Effect, Level};
use crate::record::{FoundKey, Link, RecordId, StoreId};
use crate::twins::Question;
use crate::vertex::{CacheMap, Vertex};
use crate::{BuildId, EffectId, JobId, ResultId};

/// A vertex of a graph that is to be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VertexDef {
    /// Names the vertex: equal digests are the same op with the same inputs.
    pub digest: Digest,
    /// Inputs: index of an *earlier* vertex of the graph, and its output.
    pub inputs: Vec<(usize, usize)>,
    /// Whether to execute it whatever is remembered.
    pub ignore_cache: bool,
    /// Whether the client wants it exported or left out in any case.
    pub export: Option<bool>,
    /// Imported caches to ask besides the local store.
    pub stores: Vec<StoreId>,
}

/// Whose lifetime a build's vertices share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A job's.
    Job(JobId),
    /// That of a vertex whose op builds others: its jobs share them.
    Vertex(VertexId),
}

/// What happened outside.
#[derive(Clone, Debug)]
pub enum Input<E> {
    /// Somebody wants an edge's result.
    Build {
        /// Names the wish; unique.
        build: BuildId,
        /// Who wants it.
        owner: Owner,
        /// Vertices, inputs before users.
        graph: Vec<VertexDef>,
        /// Index of a vertex in `graph`, and its output.
        target: (usize, usize),
    },
    /// A build is not wanted any more; it is not reported as finished.
    CancelBuild {
        /// The build; unknown ones are ignored.
        build: BuildId,
    },
    /// Results behind an edge turn out to be gone: those among `lost` are forgotten, and the edge is wanted again.
    Renew {
        /// Names the wish; unique.
        build: BuildId,
        /// Who wants it: the owner of the build that yielded the edge.
        owner: Owner,
        /// The edge. Of a closed job: the build finishes as cancelled.
        edge: EdgeId,
        /// What is gone.
        lost: BTreeSet<ResultId>,
    },
    /// A job is over: its builds finish as cancelled, vertices that only it shared are given up.
    CloseJob {
        /// The job; unknown ones are ignored.
        job: JobId,
    },
    /// Answers `CacheMap`.
    MapReady {
        /// The effect.
        effect: EffectId,
        /// What the op said.
        map: CacheMap,
    },
    /// Answers `Query`.
    KeysFound {
        /// The effect.
        effect: EffectId,
        /// One list per query, in order.
        found: Vec<Vec<FoundKey>>,
    },
    /// Answers `Checksum`.
    Checksummed {
        /// The effect.
        effect: EffectId,
        /// The checksum; `None`: the content cannot identify the input.
        digest: Option<Digest>,
    },
    /// Answers `Load`.
    Loaded {
        /// The effect.
        effect: EffectId,
        /// The result, now owned by the solver; `None`: it is gone.
        result: Option<ResultId>,
    },
    /// Answers `Exec`.
    Executed {
        /// The effect.
        effect: EffectId,
        /// The outputs, now owned by the solver.
        outputs: Vec<Option<ResultId>>,
    },
    /// Answers any effect but `Query`: it failed.
    Failed {
        /// The effect.
        effect: EffectId,
        /// Why.
        error: E,
    },
    /// Answers `Exec` and `Checksum`: results that were loaded for it turned out to be gone. They are forgotten, made
    /// anew, and the work is tried again; when none of them was loaded, it failed.
    Lost {
        /// The effect.
        effect: EffectId,
        /// Numbers of the inputs.
        inputs: Vec<usize>,
        /// What went wrong.
        error: E,
    },
    /// Answers any effect but `Query`: it ended without an answer, because it was cancelled or for reasons of its own.
    Canceled {
        /// The effect.
        effect: EffectId,
    },
}

/// Something that others may want to know. Poll events before effects: a vertex is announced before it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A vertex became active.
    Added {
        /// The vertex.
        vertex: VertexId,
        /// Its digest.
        digest: Digest,
    },
    /// A job shares a vertex from now on.
    Attached {
        /// The vertex.
        vertex: VertexId,
        /// The job.
        job: JobId,
    },
    /// A job does not share a vertex any more.
    Detached {
        /// The vertex.
        vertex: VertexId,
        /// The job.
        job: JobId,
    },
    /// A vertex was given up. Effects on it may still be on the way.
    Removed {
        /// The vertex.
        vertex: VertexId,
    },
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure<E> {
    /// An op failed.
    Op {
        /// The vertex's digest.
        vertex: Digest,
        /// The op's error.
        error: E,
    },
    /// An op did not yield an output that is used.
    NoOutput {
        /// The vertex's digest.
        vertex: Digest,
        /// The output.
        output: usize,
    },
    /// An op did not say how it is identified.
    NoDigest {
        /// The vertex's digest.
        vertex: Digest,
    },
    /// An op builds itself.
    Recursive,
    /// The work ended without being cancelled by the solver, or the owner is gone.
    Canceled,
}

/// How a build ended.
pub type Outcome<E> = Result<Built, Failure<E>>;

/// What an effect on the way is for.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    Map(VertexId),
    /// With the input's number of each query.
    Query(EdgeId, Vec<Option<usize>>),
    Checksum(VertexId, usize, ResultId),
    Load(EdgeId),
    /// With the inputs' results.
    Exec(VertexId, Vec<ResultId>),
}

#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub purpose: Purpose,
    pub canceled: bool,
}

#[derive(Debug, Default)]
pub(crate) struct JobState {
    pub vertices: BTreeSet<VertexId>,
    pub builds: BTreeSet<BuildId>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct BuildState {
    pub edge: EdgeId,
    pub owner: Owner,
}

/// A step that runs and that equal steps of other vertices wait for.
#[derive(Debug)]
pub(crate) struct Running {
    pub vertex: VertexId,
    /// The links that will lead to its record, in order of inputs.
    pub links: Vec<Link>,
    pub waiting: BTreeSet<EdgeId>,
}

/// Decides what to do next. `E` is what ops fail with.
#[derive(Debug)]
pub struct Solver<E> {
    pub(crate) vertices: Arena<VertexId, Vertex<E>>,
    pub(crate) edges: Arena<EdgeId, Edge>,
    /// Active vertices by digest and whether they ignore the cache.
    pub(crate) index: BTreeMap<(Digest, bool), VertexId>,
    pub(crate) jobs: BTreeMap<JobId, JobState>,
    pub(crate) builds: BTreeMap<BuildId, BuildState>,
    pub(crate) pending: BTreeMap<EffectId, Pending>,
    pub(crate) running: BTreeMap<RecordId, Running>,
    /// By a link of the first input: what runs.
    pub(crate) running_links: BTreeMap<Question, BTreeSet<RecordId>>,
    /// Edges without a result that asked the local store.
    pub(crate) listening: BTreeMap<Question, BTreeSet<EdgeId>>,
    /// Results that are owned here.
    pub(crate) held: BTreeSet<ResultId>,
    next_effect: u64,
    worklist: VecDeque<EdgeId>,
    /// Edges whose effects may have to be cancelled.
    pub(crate) unwanted: Vec<EdgeId>,
    effects: VecDeque<Effect<E>>,
    pub(crate) events: VecDeque<Event>,
}

impl<E> Default for Solver<E> {
    fn default() -> Self {
        Self {
            vertices: Arena::default(),
            edges: Arena::default(),
            index: BTreeMap::new(),
            jobs: BTreeMap::new(),
            builds: BTreeMap::new(),
            pending: BTreeMap::new(),
            running: BTreeMap::new(),
            running_links: BTreeMap::new(),
            listening: BTreeMap::new(),
            held: BTreeSet::new(),
            next_effect: 0,
            worklist: VecDeque::new(),
            unwanted: Vec::new(),
            effects: VecDeque::new(),
            events: VecDeque::new(),
        }
    }
}

impl<E: Clone> Solver<E> {
    /// Makes a solver without jobs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of what happened and decides what follows. Afterwards poll events and effects until there are none.
    pub fn handle(&mut self, input: Input<E>) {
        match input {
            Input::Build {
                build,
                owner,
                graph,
                target,
            } => self.build(build, owner, &graph, target),
            Input::Renew {
                build,
                owner,
                edge,
                lost,
            } => self.renew(build, owner, edge, &lost),
            Input::CancelBuild { build } => self.drop_build(build),
            Input::CloseJob { job } => self.close_job(job),
            Input::MapReady { effect, map } => self.map_ready(effect, map),
            Input::KeysFound { effect, found } => self.keys_found(effect, found),
            Input::Checksummed { effect, digest } => self.checksummed(effect, digest),
            Input::Loaded { effect, result } => self.loaded(effect, result),
            Input::Executed { effect, outputs } => self.executed(effect, outputs),
            Input::Failed { effect, error } => self.failed(effect, Some(error), false),
            Input::Lost {
                effect,
                inputs,
                error,
            } => self.lost(effect, &inputs, error),
            Input::Canceled { effect } => self.failed(effect, None, false),
        }
        loop {
            while let Some(edge) = self.worklist.pop_front() {
                if let Some(known) = self.edges.get_mut(edge) {
                    known.queued = false;
                    self.evaluate(edge);
                }
            }
            // Only now: what is let go of is often wanted again at once, for another reason.
            let Some(edge) = self.unwanted.pop() else { break };
            self.cancel_unwanted(edge);
        }
    }

    /// Takes the next effect.
    pub fn poll_effect(&mut self) -> Option<Effect<E>> {
        self.effects.pop_front()
    }

    /// Takes the next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Returns how many vertices are active, for metrics and for tests of leaks.
    pub fn active_vertices(&self) -> usize {
        self.vertices.len()
    }

    /// Returns how many effects are unanswered.
    pub fn outstanding_effects(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn mark(&mut self, edge: EdgeId) {
        if let Some(known) = self.edges.get_mut(edge)
            && !known.queued
        {
            known.queued = true;
            self.worklist.push_back(edge);
        }
    }

    pub(crate) fn mark_users(&mut self, edge: EdgeId) {
        let users: Vec<EdgeId> = self.edges[edge].users.iter().map(|(user, _)| *user).collect();
        for user in users {
            if !self.edges[user].is_patient() {
                self.mark(user);
            }
        }
    }

    /// Notes how much of an edge is known, for it and for its users.
    pub(crate) fn set_reached(&mut self, id: EdgeId, level: Level) {
        let old = std::mem::replace(&mut self.edges[id].reached, level);
        let users = std::mem::take(&mut self.edges[id].users);
        for (user, number) in &users {
            let user = &mut self.edges[*user];
            let want = user.slots[*number].want;
            user.unsettled += usize::from(want > level);
            user.unsettled -= usize::from(want > old);
        }
        self.edges[id].users = users;
        self.mark_users(id);
    }

    pub(crate) fn mark_vertex(&mut self, vertex: VertexId) {
        let edges: Vec<EdgeId> = self.vertices[vertex].edges.values().copied().collect();
        for edge in edges {
            self.mark(edge);
        }
    }

    pub(crate) fn emit(&mut self, effect: Effect<E>) {
        self.effects.push_back(effect);
    }

    pub(crate) fn start(&mut self, purpose: Purpose) -> EffectId {
        let effect = EffectId(self.next_effect);
        self.next_effect += 1;
        self.pending.insert(
            effect,
            Pending {
                purpose,
                canceled: false,
            },
        );
        effect
    }

    pub(crate) fn cancel(&mut self, effect: EffectId) {
        if let Some(pending) = self.pending.get_mut(&effect)
            && !pending.canceled
        {
            pending.canceled = true;
            self.emit(Effect::Cancel { effect });
        }
    }

    pub(crate) fn answered(&mut self, effect: EffectId) -> Pending {
        self.pending
            .remove(&effect)
            .unwrap_or_else(|| panic!("{effect:?} is answered but not outstanding"))
    }

    pub(crate) fn hold(&mut self, result: ResultId) {
        assert!(self.held.insert(result), "{result:?} was handed in twice");
    }

    pub(crate) fn release(&mut self, result: ResultId) {
        assert!(self.held.remove(&result), "{result:?} was released twice");
        self.emit(Effect::Release { result });
    }

    pub(crate) fn finish(&mut self, build: BuildId, outcome: Outcome<E>) {
        if let Some(state) = self.forget_build(build) {
            self.mark(state.edge);
            self.emit(Effect::Finished { build, outcome });
        }
    }

    fn forget_build(&mut self, build: BuildId) -> Option<BuildState> {
        let state = self.builds.remove(&build)?;
        if let Some(edge) = self.edges.get_mut(state.edge) {
            edge.builds.remove(&build);
        }
        if let Owner::Job(job) = state.owner
            && let Some(job) = self.jobs.get_mut(&job)
        {
            job.builds.remove(&build);
        }
        Some(state)
    }

    fn drop_build(&mut self, build: BuildId) {
        if let Some(state) = self.forget_build(build) {
            self.mark(state.edge);
        }
    }
}
