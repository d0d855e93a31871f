//! How long vertices live: builds bring them, jobs hold them, the last job to close lets them go.

use std::collections::BTreeSet;

use crate::arena::{EdgeId, VertexId};
use crate::core::{BuildState, Event, Failure, Owner, Solver, VertexDef};
use crate::edge::{Edge, EdgeState, Effect};
use crate::record::StoreId;
use crate::vertex::{ContentState, ExecState, MapState, Vertex};
use crate::{BuildId, JobId};

impl<E: Clone> Solver<E> {
    pub(crate) fn build(
        &mut self,
        build: BuildId,
        owner: Owner,
        graph: &[VertexDef],
        target: (usize, usize),
    ) {
        let jobs: BTreeSet<JobId> = match owner {
            Owner::Job(job) => [job].into(),
            Owner::Vertex(vertex) => self
                .vertices
                .get(vertex)
                .map(|v| v.jobs.clone())
                .unwrap_or_default(),
        };
        if jobs.is_empty() {
            self.emit(Effect::Finished {
                build,
                outcome: Err(Failure::Canceled),
            });
            return;
        }
        for job in &jobs {
            self.jobs.entry(*job).or_default();
        }
        let ids = self.load(graph, &jobs);
        if let Owner::Vertex(parent) = owner
            && !self.adopt(parent, &ids)
        {
            self.emit(Effect::Finished {
                build,
                outcome: Err(Failure::Recursive),
            });
            return;
        }
        let edge = self.edge(ids[target.0], target.1);
        self.want(build, owner, edge);
    }

    /// Notes that a build wants an edge's result.
    pub(crate) fn want(&mut self, build: BuildId, owner: Owner, edge: EdgeId) {
        self.edges[edge].builds.insert(build);
        self.builds.insert(build, BuildState { edge, owner });
        if let Owner::Job(job) = owner {
            self.jobs.entry(job).or_default().builds.insert(build);
        }
        self.mark(edge);
    }

    /// Notes that a vertex's op builds others. `false`: it would build itself.
    fn adopt(&mut self, parent: VertexId, ids: &[VertexId]) -> bool {
        // What ignores the cache may have other inputs than the graph says.
        let mut family: BTreeSet<VertexId> = BTreeSet::new();
        let mut open = ids.to_vec();
        while let Some(next) = open.pop() {
            if family.insert(next) {
                open.extend(self.vertices[next].inputs.iter().map(|(input, _)| *input));
            }
        }
        if !self.ancestors(parent).is_disjoint(&family) {
            return false;
        }
        for id in &family {
            self.vertices[*id].parents.insert(parent);
        }
        self.vertices[parent].children.append(&mut family);
        self.recheck_twins();
        true
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
                let inputs = def
                    .inputs
                    .iter()
                    .map(|(index, output)| (ids[*index], *output))
                    .collect();
                let id = self
                    .vertices
                    .insert(Vertex::new(def.digest, def.ignore_cache, inputs));
                self.index.insert((def.digest, def.ignore_cache), id);
                self.events.push_back(Event::Added {
                    vertex: id,
                    digest: def.digest,
                });
                id
            });
            let vertex = &mut self.vertices[id];
            vertex.export = def.export.or(vertex.export);
            vertex.stores.extend(
                def.stores
                    .iter()
                    .copied()
                    .filter(|store| *store != StoreId::LOCAL),
            );
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

    pub(crate) fn close_job(&mut self, job: JobId) {
        let Some(state) = self.jobs.remove(&job) else {
            return;
        };
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
        let Some(vertex) = self.vertices.remove(id) else {
            return;
        };
        let key = (vertex.digest, vertex.ignore_cache);
        if self.index.get(&key) == Some(&id) {
            self.index.remove(&key);
        }
        // Only a vertex that builds has builds to look for.
        let owner = Owner::Vertex(id);
        let builds = self.builds.iter().filter(|_| !vertex.children.is_empty());
        let abandoned: Vec<BuildId> = builds
            .filter(|(_, build)| build.owner == owner)
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
        let Some(mut edge) = self.edges.remove(id) else {
            return;
        };
        self.stop_listening(id, std::mem::take(&mut edge.questions));
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
}
