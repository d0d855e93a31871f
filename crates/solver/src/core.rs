//! The solver itself: jobs, vertices' lifetimes, answers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use oci::Digest;

use crate::arena::{Arena, EdgeId, VertexId};
use crate::edge::{Built, Edge, EdgeState, Effect, Level};
use crate::record::{FoundKey, RecordId, StoreId};
use crate::vertex::{CacheMap, ContentState, ExecState, MapState, Vertex};
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
    Query(EdgeId, Vec<usize>),
    Checksum(VertexId, usize),
    Load(EdgeId),
    Exec(VertexId),
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
    pub waiting: BTreeSet<EdgeId>,
}

/// Decides what to do next. `E` is what ops fail with.
#[derive(Debug)]
pub struct Solver<E> {
    pub(crate) vertices: Arena<VertexId, Vertex<E>>,
    pub(crate) edges: Arena<EdgeId, Edge>,
    /// Active vertices by digest and whether they ignore the cache.
    index: BTreeMap<(Digest, bool), VertexId>,
    pub(crate) jobs: BTreeMap<JobId, JobState>,
    pub(crate) builds: BTreeMap<BuildId, BuildState>,
    pub(crate) pending: BTreeMap<EffectId, Pending>,
    pub(crate) running: BTreeMap<RecordId, Running>,
    /// Results that are owned here.
    pub(crate) held: BTreeSet<ResultId>,
    next_effect: u64,
    worklist: VecDeque<EdgeId>,
    /// Edges whose effects may have to be cancelled.
    pub(crate) unwanted: Vec<EdgeId>,
    effects: VecDeque<Effect<E>>,
    events: VecDeque<Event>,
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
            Input::Build { build, owner, graph, target } => self.build(build, owner, &graph, target),
            Input::CancelBuild { build } => self.drop_build(build),
            Input::CloseJob { job } => self.close_job(job),
            Input::MapReady { effect, map } => self.map_ready(effect, map),
            Input::KeysFound { effect, found } => self.keys_found(effect, found),
            Input::Checksummed { effect, digest } => self.checksummed(effect, digest),
            Input::Loaded { effect, result } => self.loaded(effect, result),
            Input::Executed { effect, outputs } => self.executed(effect, outputs),
            Input::Failed { effect, error } => self.failed(effect, Some(error)),
            Input::Canceled { effect } => self.failed(effect, None),
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

    // ---- plumbing --------------------------------------------------------------------------------------------------

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
            self.mark(user);
        }
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
        self.pending.insert(effect, Pending { purpose, canceled: false });
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

    fn answered(&mut self, effect: EffectId) -> Pending {
        self.pending.remove(&effect).unwrap_or_else(|| panic!("{effect:?} is answered but not outstanding"))
    }

    fn hold(&mut self, result: ResultId) {
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

    // ---- lifetimes -------------------------------------------------------------------------------------------------

    fn build(&mut self, build: BuildId, owner: Owner, graph: &[VertexDef], target: (usize, usize)) {
        let jobs: BTreeSet<JobId> = match owner {
            Owner::Job(job) => [job].into(),
            Owner::Vertex(vertex) => self.vertices.get(vertex).map(|v| v.jobs.clone()).unwrap_or_default(),
        };
        if jobs.is_empty() {
            self.emit(Effect::Finished { build, outcome: Err(Failure::Canceled) });
            return;
        }
        for job in &jobs {
            self.jobs.entry(*job).or_default();
        }
        let ids = self.load(graph, &jobs);
        if let Owner::Vertex(parent) = owner {
            let ancestors = self.ancestors(parent);
            if ids.iter().any(|id| ancestors.contains(id)) {
                self.emit(Effect::Finished { build, outcome: Err(Failure::Recursive) });
                return;
            }
            for id in &ids {
                self.vertices[*id].parents.insert(parent);
            }
            self.vertices[parent].children.extend(ids.iter().copied());
        }
        let edge = self.edge(ids[target.0], target.1);
        self.edges[edge].builds.insert(build);
        self.builds.insert(build, BuildState { edge, owner });
        if let Owner::Job(job) = owner {
            self.jobs.entry(job).or_default().builds.insert(build);
        }
        self.mark(edge);
    }

    /// The vertex and all whose ops (indirectly) build it.
    pub(crate) fn ancestors(&self, vertex: VertexId) -> BTreeSet<VertexId> {
        let mut seen = BTreeSet::new();
        let mut open = vec![vertex];
        while let Some(next) = open.pop() {
            if seen.insert(next)
                && let Some(vertex) = self.vertices.get(next)
            {
                open.extend(vertex.parents.iter().copied());
            }
        }
        seen
    }

    /// Finds or makes the vertices of a graph.
    fn load(&mut self, graph: &[VertexDef], jobs: &BTreeSet<JobId>) -> Vec<VertexId> {
        let mut ids: Vec<VertexId> = Vec::with_capacity(graph.len());
        for def in graph {
            let strict = self.index.get(&(def.digest, true)).copied();
            let known = strict.or_else(|| {
                let lax = self.index.get(&(def.digest, false)).copied();
                lax.filter(|_| !def.ignore_cache)
            });
            let id = known.unwrap_or_else(|| {
                let inputs = def.inputs.iter().map(|(index, output)| (ids[*index], *output)).collect();
                let id = self.vertices.insert(Vertex::new(def.digest, def.ignore_cache, inputs));
                self.index.insert((def.digest, def.ignore_cache), id);
                self.events.push_back(Event::Added { vertex: id, digest: def.digest });
                id
            });
            let vertex = &mut self.vertices[id];
            vertex.export = def.export.or(vertex.export);
            vertex.stores.extend(def.stores.iter().copied().filter(|store| *store != StoreId::LOCAL));
            if let Some((_, saw)) = &vertex.failure
                && !jobs.is_subset(saw)
            {
                vertex.failure = None;
            }
            self.attach(id, jobs);
            ids.push(id);
        }
        ids
    }

    /// Lets jobs share a vertex, its inputs and what it builds.
    fn attach(&mut self, vertex: VertexId, jobs: &BTreeSet<JobId>) {
        let mut open = vec![vertex];
        while let Some(id) = open.pop() {
            let vertex = &mut self.vertices[id];
            let new: Vec<JobId> = jobs.difference(&vertex.jobs).copied().collect();
            if new.is_empty() {
                continue;
            }
            vertex.jobs.extend(new.iter().copied());
            open.extend(vertex.inputs.iter().map(|(input, _)| *input));
            open.extend(vertex.children.iter().copied());
            for job in new {
                self.jobs.entry(job).or_default().vertices.insert(id);
                self.events.push_back(Event::Attached { vertex: id, job });
            }
        }
    }

    fn close_job(&mut self, job: JobId) {
        let Some(state) = self.jobs.remove(&job) else { return };
        for build in state.builds {
            self.finish(build, Err(Failure::Canceled));
        }
        let mut unused = Vec::new();
        for id in state.vertices {
            let vertex = &mut self.vertices[id];
            vertex.jobs.remove(&job);
            self.events.push_back(Event::Detached { vertex: id, job });
            if vertex.jobs.is_empty() {
                unused.push(id);
            }
        }
        for id in unused {
            self.remove_vertex(id);
        }
    }

    fn remove_vertex(&mut self, id: VertexId) {
        let Some(vertex) = self.vertices.remove(id) else { return };
        let key = (vertex.digest, vertex.ignore_cache);
        if self.index.get(&key) == Some(&id) {
            self.index.remove(&key);
        }
        let abandoned: Vec<BuildId> = self
            .builds
            .iter()
            .filter(|(_, build)| build.owner == Owner::Vertex(id))
            .map(|(build, _)| *build)
            .collect();
        for build in abandoned {
            self.finish(build, Err(Failure::Canceled));
        }
        for child in &vertex.children {
            if let Some(child) = self.vertices.get_mut(*child) {
                child.parents.remove(&id);
            }
        }
        for parent in &vertex.parents {
            if let Some(parent) = self.vertices.get_mut(*parent) {
                parent.children.remove(&id);
            }
        }
        if let MapState::Asked(effect) = vertex.map {
            self.cancel(effect);
        }
        for content in &vertex.content {
            if let ContentState::Asked(effect) = content {
                self.cancel(*effect);
            }
        }
        for edge in vertex.edges.values() {
            self.remove_edge(*edge);
        }
        match vertex.exec {
            ExecState::Idle => {}
            ExecState::Running(effect) => self.cancel(effect),
            ExecState::Done(outputs) => {
                for result in outputs.into_iter().flatten() {
                    self.release(result);
                }
            }
        }
        self.events.push_back(Event::Removed { vertex: id });
    }

    fn remove_edge(&mut self, id: EdgeId) {
        let Some(edge) = self.edges.remove(id) else { return };
        for (number, slot) in edge.slots.iter().enumerate() {
            if let Some(input) = self.edges.get_mut(slot.edge) {
                input.users.remove(&(id, number));
                input.wants[slot.want as usize] -= 1;
                self.mark(slot.edge);
            }
        }
        match edge.state {
            EdgeState::Seeking => {}
            EdgeState::Loading { effect, .. } => self.cancel(effect),
            EdgeState::Executing { record } => self.stop_running(record, edge.vertex),
            EdgeState::AwaitingTwin { record } => {
                if let Some(running) = self.running.get_mut(&record) {
                    running.waiting.remove(&id);
                }
            }
            EdgeState::Done { result, owned } => {
                if owned {
                    self.release(result);
                }
            }
        }
    }

    /// Finds or makes the edge of a vertex's output.
    pub(crate) fn edge(&mut self, vertex: VertexId, output: usize) -> EdgeId {
        if let Some(edge) = self.vertices[vertex].edges.get(&output) {
            return *edge;
        }
        let edge = self.edges.insert(Edge::new(vertex, output));
        self.vertices[vertex].edges.insert(output, edge);
        edge
    }

    /// Lets equal steps that waited for this one go on.
    pub(crate) fn stop_running(&mut self, record: Option<RecordId>, vertex: VertexId) {
        let Some(record) = record else { return };
        if self.running.get(&record).is_none_or(|running| running.vertex != vertex) {
            return;
        }
        let Some(running) = self.running.remove(&record) else { return };
        for waiting in running.waiting {
            if let Some(edge) = self.edges.get_mut(waiting) {
                edge.state = EdgeState::Seeking;
                edge.ask_again();
                self.mark(waiting);
            }
        }
    }

    // ---- answers ---------------------------------------------------------------------------------------------------

    fn map_ready(&mut self, effect: EffectId, map: CacheMap) {
        let Purpose::Map(id) = self.answered(effect).purpose else { panic!("{effect:?} asked for no cache map") };
        let Some(vertex) = self.vertices.get_mut(id) else { return };
        if !vertex.learn(map) {
            let failure = Failure::NoDigest { vertex: vertex.digest };
            vertex.map = MapState::Unknown;
            self.fail_vertex(id, failure);
        }
        self.mark_vertex(id);
    }

    fn keys_found(&mut self, effect: EffectId, found: Vec<Vec<FoundKey>>) {
        let Purpose::Query(id, inputs) = self.answered(effect).purpose else { panic!("{effect:?} is no query") };
        assert_eq!(found.len(), inputs.len(), "{effect:?} has one answer per query");
        if self.edges.get(id).is_none() {
            return;
        }
        self.edges[id].queries -= 1;
        for (input, keys) in inputs.into_iter().zip(found) {
            for key in keys {
                self.add_match(id, input, key);
            }
        }
        self.mark(id);
    }

    fn checksummed(&mut self, effect: EffectId, digest: Option<Digest>) {
        let Purpose::Checksum(id, input) = self.answered(effect).purpose else {
            panic!("{effect:?} asked for no checksum")
        };
        if let Some(vertex) = self.vertices.get_mut(id) {
            vertex.content[input] = ContentState::Known(digest);
            self.mark_vertex(id);
        }
    }

    fn loaded(&mut self, effect: EffectId, result: Option<ResultId>) {
        let Purpose::Load(id) = self.answered(effect).purpose else { panic!("{effect:?} loads nothing") };
        if let Some(result) = result {
            self.hold(result);
        }
        let Some(edge) = self.edges.get_mut(id) else {
            if let Some(result) = result {
                self.release(result);
            }
            return;
        };
        let EdgeState::Loading { stored, .. } = std::mem::replace(&mut edge.state, EdgeState::Seeking) else {
            panic!("{id:?} does not load")
        };
        match result {
            None => self.mark(id),
            Some(result) => {
                self.edges[id].loaded = Some(stored);
                self.complete(id, result, true);
            }
        }
    }

    fn executed(&mut self, effect: EffectId, outputs: Vec<Option<ResultId>>) {
        let Purpose::Exec(id) = self.answered(effect).purpose else { panic!("{effect:?} executes nothing") };
        for result in outputs.iter().flatten() {
            self.hold(*result);
        }
        let Some(vertex) = self.vertices.get_mut(id) else {
            for result in outputs.into_iter().flatten() {
                self.release(result);
            }
            return;
        };
        vertex.exec = ExecState::Done(outputs);
        let edges: Vec<EdgeId> = vertex.edges.values().copied().collect();
        for edge in edges {
            if matches!(self.edges[edge].state, EdgeState::Executing { .. }) {
                self.take_output(edge);
            }
        }
    }

    fn failed(&mut self, effect: EffectId, error: Option<E>) {
        let pending = self.answered(effect);
        // A failure after the cancellation is most likely its consequence; whoever wants the work again retries it.
        let error = error.filter(|_| !pending.canceled);
        let own_end = error.is_none() && !pending.canceled;
        let vertex = match pending.purpose {
            Purpose::Query(..) => panic!("{effect:?} is a query and cannot fail"),
            Purpose::Load(id) => {
                if let Some(edge) = self.edges.get_mut(id) {
                    let state = std::mem::replace(&mut edge.state, EdgeState::Seeking);
                    if let EdgeState::Loading { stored, .. } = state
                        && pending.canceled
                    {
                        edge.results.push(stored);
                    }
                    self.mark(id);
                }
                return;
            }
            Purpose::Map(id) => {
                let Some(vertex) = self.vertices.get_mut(id) else { return };
                vertex.map = if vertex.rounds == 0 { MapState::Unknown } else { MapState::Known };
                id
            }
            Purpose::Checksum(id, input) => {
                let Some(vertex) = self.vertices.get_mut(id) else { return };
                vertex.content[input] = ContentState::Unknown;
                id
            }
            Purpose::Exec(id) => {
                if self.vertices.get(id).is_none() {
                    return;
                }
                self.stop_exec(id);
                id
            }
        };
        if let Some(error) = error {
            let failure = Failure::Op { vertex: self.vertices[vertex].digest, error };
            self.fail_vertex(vertex, failure);
        } else if own_end {
            self.fail_edges(vertex, &Failure::Canceled);
        }
        self.mark_vertex(vertex);
    }

    /// Forgets a vertex's execution and lets its edges seek again.
    fn stop_exec(&mut self, id: VertexId) {
        self.vertices[id].exec = ExecState::Idle;
        let edges: Vec<EdgeId> = self.vertices[id].edges.values().copied().collect();
        for edge in edges {
            if let EdgeState::Executing { record } = self.edges[edge].state {
                self.edges[edge].state = EdgeState::Seeking;
                self.stop_running(record, id);
            }
        }
    }

    /// Remembers why a vertex failed and fails what waits for it.
    pub(crate) fn fail_vertex(&mut self, id: VertexId, failure: Failure<E>) {
        let jobs = self.vertices[id].jobs.clone();
        self.vertices[id].failure = Some((failure.clone(), jobs));
        self.fail_edges(id, &failure);
    }

    /// Fails all builds that wait, directly or through others, for an edge of the vertex.
    pub(crate) fn fail_edges(&mut self, id: VertexId, failure: &Failure<E>) {
        let edges = self.vertices[id].edges.values().copied();
        let waiting = edges.filter(|edge| self.edges[*edge].result().is_none()).collect();
        self.fail_waiting(waiting, failure);
    }

    /// Fails all builds that wait, directly or through others, for these edges.
    pub(crate) fn fail_waiting(&mut self, mut open: Vec<EdgeId>, failure: &Failure<E>) {
        while let Some(id) = open.pop() {
            let edge = &self.edges[id];
            let builds: Vec<BuildId> = edge.builds.iter().copied().collect();
            let users: Vec<(EdgeId, usize)> = edge.users.iter().copied().collect();
            for build in builds {
                self.finish(build, Err(failure.clone()));
            }
            for (user, input) in users {
                if self.edges[user].slots[input].want > Level::None {
                    self.set_want(user, input, Level::None);
                    open.push(user);
                }
            }
            self.mark(id);
        }
    }
}
