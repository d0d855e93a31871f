//! What must hold between two inputs. Cheap parts are asserted where they could break; all of it is checked here, in
//! time linear in what is active, for tests and for dumps.

use std::collections::BTreeSet;

use crate::ResultId;
use crate::core::{Purpose, Solver};
use crate::edge::{EdgeState, Level};
use crate::vertex::{ContentState, ExecState, MapState};

impl<E: Clone> Solver<E> {
    /// Checks all invariants.
    ///
    /// # Panics
    /// When one does not hold.
    pub fn assert_invariants(&self) {
        let mut results: BTreeSet<ResultId> = BTreeSet::new();
        for (id, vertex) in self.vertices.iter() {
            assert!(!vertex.jobs.is_empty(), "{id:?} is shared by some job");
            for job in &vertex.jobs {
                assert!(self.jobs[job].vertices.contains(&id), "{job:?} knows {id:?}");
            }
            for (input, _) in &vertex.inputs {
                assert!(
                    vertex.jobs.is_subset(&self.vertices[*input].jobs),
                    "{input:?} has all jobs of {id:?}"
                );
            }
            for child in &vertex.children {
                assert!(
                    vertex.jobs.is_subset(&self.vertices[*child].jobs),
                    "{child:?} has all jobs of {id:?}"
                );
            }
            if let MapState::Asked(effect) = vertex.map {
                assert!(matches!(self.pending[&effect].purpose, Purpose::Map(v) if v == id));
            }
            for content in &vertex.content {
                if let ContentState::Asked(effect) = content {
                    assert!(matches!(self.pending[effect].purpose, Purpose::Checksum(v, ..) if v == id));
                }
            }
            match &vertex.exec {
                ExecState::Idle => {}
                ExecState::Running(effect) => {
                    assert!(matches!(self.pending[effect].purpose, Purpose::Exec(v, _) if v == id));
                }
                ExecState::Done(outputs) => {
                    for result in outputs.iter().flatten() {
                        assert!(results.insert(*result), "{result:?} has one owner");
                    }
                }
            }
        }
        self.assert_edges(&mut results);
        let listening: usize = self.listening.values().map(BTreeSet::len).sum();
        let asked: usize = self.edges.iter().map(|(_, edge)| edge.questions.len()).sum();
        assert_eq!(listening, asked, "only those who ask are told");
        for (record, running) in &self.running {
            assert!(matches!(
                self.vertices[running.vertex].exec,
                ExecState::Running(_)
            ));
            for waiting in &running.waiting {
                let state = &self.edges[*waiting].state;
                assert!(
                    *state == EdgeState::AwaitingTwin { record: *record },
                    "{waiting:?} waits"
                );
            }
        }
        assert_eq!(results, self.held, "all results have an owner");
    }

    fn assert_edges(&self, results: &mut BTreeSet<ResultId>) {
        for (id, edge) in self.edges.iter() {
            assert!(!edge.queued, "{id:?} is settled");
            let vertex = &self.vertices[edge.vertex];
            assert_eq!(vertex.edges.get(&edge.output), Some(&id));
            let mut wants = [0; 4];
            for (user, number) in &edge.users {
                let slot = &self.edges[*user].slots[*number];
                assert_eq!(slot.edge, id);
                wants[slot.want as usize] += 1;
            }
            assert_eq!(wants, edge.wants, "{id:?} counts what its users want");
            let unsettled = edge
                .slots
                .iter()
                .filter(|slot| slot.want > self.edges[slot.edge].reached);
            assert_eq!(
                unsettled.count(),
                edge.unsettled,
                "{id:?} counts what it waits for"
            );
            let waits = edge.result().is_none();
            assert!(waits || edge.questions.is_empty(), "{id:?} asks nothing any more");
            for question in &edge.questions {
                assert!(self.listening[question].contains(&id));
            }
            for build in &edge.builds {
                assert_eq!(self.builds[build].edge, id);
            }
            match edge.state {
                EdgeState::Done { result, owned } => {
                    assert!(edge.builds.is_empty(), "builds of {id:?} are finished");
                    assert!(!owned || results.insert(result), "{result:?} has one owner");
                }
                EdgeState::AwaitingTwin { record } => {
                    assert!(
                        self.running[&record].waiting.contains(&id),
                        "{id:?} waits for what runs"
                    );
                }
                EdgeState::Executing { .. } => {
                    assert!(
                        matches!(vertex.exec, ExecState::Running(_)),
                        "{id:?} waits for what runs"
                    );
                }
                EdgeState::Loading { effect, .. } => assert!(self.pending.contains_key(&effect)),
                EdgeState::Seeking => {
                    if edge.demand() > edge.reached {
                        self.assert_waits(id);
                    }
                }
            }
            if edge.demand() == Level::None {
                assert!(
                    edge.slots.iter().all(|slot| slot.want == Level::None),
                    "{id:?} wants nothing unasked"
                );
            }
        }
    }

    /// An unsatisfied edge waits for an effect, or for an input that is itself wanted further than it is.
    fn assert_waits(&self, id: crate::EdgeId) {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let effect = edge.queries > 0
            || matches!(vertex.map, MapState::Asked(_))
            || vertex
                .content
                .iter()
                .any(|content| matches!(content, ContentState::Asked(_)));
        assert!(
            effect || edge.unsettled > 0,
            "{id:?} is wanted and waits for nothing: {edge:?}"
        );
    }
}
