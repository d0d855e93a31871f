//! What the answers of effects change.

use oci::Digest;

use crate::arena::{EdgeId, VertexId};
use crate::core::{Failure, Purpose, Solver};
use crate::edge::{EdgeState, Level};
use crate::record::FoundKey;
use crate::vertex::{CacheMap, ContentState, ExecState, MapState};
use crate::{BuildId, EffectId, ResultId};

impl<E: Clone> Solver<E> {
    pub(crate) fn map_ready(&mut self, effect: EffectId, map: CacheMap) {
        let Purpose::Map(id) = self.answered(effect).purpose else {
            panic!("{effect:?} asked for no cache map")
        };
        let Some(vertex) = self.vertices.get_mut(id) else {
            return;
        };
        if !vertex.learn(map) {
            let failure = Failure::NoDigest {
                vertex: vertex.digest,
            };
            vertex.map = MapState::Unknown;
            self.fail_vertex(id, failure);
        }
        self.mark_vertex(id);
    }

    pub(crate) fn keys_found(&mut self, effect: EffectId, found: Vec<Vec<FoundKey>>) {
        let Purpose::Query(id, inputs) = self.answered(effect).purpose else {
            panic!("{effect:?} is no query")
        };
        assert_eq!(found.len(), inputs.len(), "{effect:?} has one answer per query");
        if self.edges.get(id).is_none() {
            return;
        }
        self.edges[id].queries -= 1;
        for (input, keys) in inputs.into_iter().zip(found) {
            for found in keys {
                match input {
                    Some(input) => self.add_match(id, input, found),
                    None => self.add_results(id, found),
                }
            }
        }
        self.mark(id);
    }

    pub(crate) fn checksummed(&mut self, effect: EffectId, digest: Option<Digest>) {
        let Purpose::Checksum(id, input, _) = self.answered(effect).purpose else {
            panic!("{effect:?} asked for no checksum")
        };
        if let Some(vertex) = self.vertices.get_mut(id) {
            vertex.content[input] = ContentState::Known(digest);
            self.mark_vertex(id);
        }
    }

    pub(crate) fn loaded(&mut self, effect: EffectId, result: Option<ResultId>) {
        let Purpose::Load(id) = self.answered(effect).purpose else {
            panic!("{effect:?} loads nothing")
        };
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

    pub(crate) fn executed(&mut self, effect: EffectId, outputs: Vec<Option<ResultId>>) {
        let Purpose::Exec(id, _) = self.answered(effect).purpose else {
            panic!("{effect:?} executes nothing")
        };
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

    pub(crate) fn lost(&mut self, effect: EffectId, inputs: &[usize], error: E) {
        let purpose = self.pending.get(&effect).map(|pending| pending.purpose.clone());
        let (id, given) = match purpose {
            Some(Purpose::Exec(id, results)) => (id, results.into_iter().enumerate().collect()),
            Some(Purpose::Checksum(id, input, result)) => (id, vec![(input, result)]),
            other => panic!("{effect:?} has no inputs to lose: {other:?}"),
        };
        let mut any = false;
        for (number, result) in given.into_iter().filter(|(number, _)| inputs.contains(number)) {
            any |= self.lose(id, number, result);
        }
        self.failed(effect, Some(error).filter(|_| !any), any);
    }

    /// Takes a loaded result from an input's edge. `false`: it was made in this run and cannot be made again.
    fn lose(&mut self, vertex: VertexId, number: usize, result: ResultId) -> bool {
        let Some(vertex) = self.vertices.get(vertex) else {
            return true;
        };
        let (input, output) = vertex.inputs[number];
        let id = self.edge(input, output);
        if self.edges[id].result() != Some(result) {
            // Somebody else noticed before.
            return true;
        }
        let EdgeState::Done { owned: true, .. } = self.edges[id].state else {
            return false;
        };
        self.take_loaded(id, result);
        true
    }

    pub(crate) fn failed(&mut self, effect: EffectId, error: Option<E>, retry: bool) {
        let pending = self.answered(effect);
        // A failure after the cancellation is most likely its consequence; whoever wants the work again retries it.
        let error = error.filter(|_| !pending.canceled);
        let own_end = error.is_none() && !pending.canceled && !retry;
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
                let Some(vertex) = self.vertices.get_mut(id) else {
                    return;
                };
                vertex.map = if vertex.rounds == 0 {
                    MapState::Unknown
                } else {
                    MapState::Known
                };
                id
            }
            Purpose::Checksum(id, input, _) => {
                let Some(vertex) = self.vertices.get_mut(id) else {
                    return;
                };
                vertex.content[input] = ContentState::Unknown;
                id
            }
            Purpose::Exec(id, _) => {
                if self.vertices.get(id).is_none() {
                    return;
                }
                self.stop_exec(id);
                id
            }
        };
        if let Some(error) = error {
            let failure = Failure::Op {
                vertex: self.vertices[vertex].digest,
                error,
            };
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
    fn fail_vertex(&mut self, id: VertexId, failure: Failure<E>) {
        let jobs = self.vertices[id].jobs.clone();
        self.vertices[id].failure = Some((failure.clone(), jobs));
        self.fail_edges(id, &failure);
    }

    /// Fails all builds that wait, directly or through others, for an edge of the vertex.
    pub(crate) fn fail_edges(&mut self, id: VertexId, failure: &Failure<E>) {
        let edges = self.vertices[id].edges.values().copied();
        let waiting = edges
            .filter(|edge| self.edges[*edge].result().is_none())
            .collect();
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
