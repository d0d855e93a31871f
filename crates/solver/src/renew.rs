//! Results that turn out to be gone after they were given out: they are forgotten, and made anew for who still wants them.

use std::collections::BTreeSet;

use crate::arena::{EdgeId, VertexId};
use crate::core::{Failure, Owner, Solver};
use crate::edge::{EdgeState, Effect, Level};
use crate::vertex::ExecState;
use crate::{BuildId, ResultId};

impl<E: Clone> Solver<E> {
    /// Lists the results of an edge and of all behind it. Empty when its job is closed.
    pub fn results_behind(&self, edge: EdgeId) -> BTreeSet<ResultId> {
        let mut found = BTreeSet::new();
        for vertex in self.vertices_behind(edge) {
            let edges = self.vertices[vertex].edges.values();
            found.extend(edges.filter_map(|edge| self.edges[*edge].result()));
        }
        found
    }

    /// Forgets results behind an edge and builds the edge again, as far as it needs them.
    pub(crate) fn renew(&mut self, build: BuildId, owner: Owner, edge: EdgeId, lost: &BTreeSet<ResultId>) {
        let jobs = self.edges.get(edge).map(|edge| &self.vertices[edge.vertex].jobs);
        let is_open = match owner {
            Owner::Job(job) => jobs.is_some_and(|jobs| jobs.contains(&job)),
            Owner::Vertex(vertex) => jobs.is_some() && self.vertices.get(vertex).is_some(),
        };
        if !is_open {
            let outcome = Err(Failure::Canceled);
            self.emit(Effect::Finished { build, outcome });
            return;
        }
        for vertex in self.vertices_behind(edge) {
            let edges: Vec<EdgeId> = self.vertices[vertex].edges.values().copied().collect();
            for id in edges {
                if self.edges[id]
                    .result()
                    .is_some_and(|result| lost.contains(&result))
                {
                    self.take_result(id);
                }
            }
        }
        self.want(build, owner, edge);
    }

    /// Takes its result from an edge: it seeks again, and finds others or is executed.
    fn take_result(&mut self, id: EdgeId) {
        match self.edges[id].state {
            EdgeState::Done { owned: true, result } => self.take_loaded(id, result),
            EdgeState::Done { owned: false, .. } => self.take_executed(self.edges[id].vertex),
            _ => {}
        }
    }

    /// Takes from an edge a result that the vertex does not own.
    pub(crate) fn take_loaded(&mut self, id: EdgeId, result: ResultId) {
        self.edges[id].state = EdgeState::Seeking;
        if let Some(stored) = self.edges[id].loaded.take() {
            self.emit(Effect::Forget { stored });
        }
        self.release(result);
        self.set_reached(id, Level::Slow);
        self.mark(id);
    }

    /// Forgets that a vertex was executed: what it yielded may be as lazy as what it was made of.
    fn take_executed(&mut self, id: VertexId) {
        let ExecState::Done(outputs) = std::mem::replace(&mut self.vertices[id].exec, ExecState::Idle) else {
            panic!("{id:?} owns results and was not executed")
        };
        let edges: Vec<EdgeId> = self.vertices[id].edges.values().copied().collect();
        for edge in edges {
            if let EdgeState::Done { owned: false, .. } = self.edges[edge].state {
                self.edges[edge].state = EdgeState::Seeking;
                self.set_reached(edge, Level::Slow);
                self.mark(edge);
            }
        }
        for result in outputs.into_iter().flatten() {
            self.release(result);
        }
    }
}
