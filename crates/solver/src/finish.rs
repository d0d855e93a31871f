//! How an edge comes to its result: execution, or the execution of an equal step.

use crate::ResultId;
use crate::arena::EdgeId;
use crate::core::{Failure, Purpose, Solver};
use crate::edge::{EdgeState, Effect, Level};
use crate::record::NewRecord;
use crate::vertex::ExecState;

impl<E: Clone> Solver<E> {
    /// Executes as soon as all inputs are there with their checksums, unless an equal step runs already.
    pub(crate) fn execute(&mut self, id: EdgeId) {
        self.want_all(id, Level::Result);
        let mut ready = true;
        for number in 0..self.edges[id].slots.len() {
            ready &= self.ask_content(id, number);
        }
        if !ready {
            return;
        }
        let vertex_id = self.edges[id].vertex;
        match self.vertices[vertex_id].exec {
            ExecState::Done(_) => self.take_output(id),
            ExecState::Running(_) => self.edges[id].state = EdgeState::Executing { record: None },
            ExecState::Idle => self.start_exec(id),
        }
    }

    fn start_exec(&mut self, id: EdgeId) {
        let vertex_id = self.edges[id].vertex;
        let record = self.own_record(id);
        let links = self.all_links(id).unwrap_or_default();
        let mut registered = None;
        if let Some(record) = record {
            let ignores = self.vertices[vertex_id].ignore_cache;
            if let Some(twin) = self.find_twin(id, record, &links).filter(|_| !ignores) {
                self.edges[id].state = EdgeState::AwaitingTwin { record: twin };
                if let Some(running) = self.running.get_mut(&twin) {
                    running.waiting.insert(id);
                }
                return;
            }
            registered = self.start_running(vertex_id, record, &links);
        }
        let edge = &self.edges[id];
        let inputs: Vec<ResultId> = edge
            .slots
            .iter()
            .filter_map(|slot| self.edges[slot.edge].result())
            .collect();
        assert_eq!(inputs.len(), edge.slots.len(), "{id:?} executes with all inputs");
        let effect = self.start(Purpose::Exec(vertex_id, inputs.clone()));
        self.vertices[vertex_id].exec = ExecState::Running(effect);
        self.edges[id].state = EdgeState::Executing { record: registered };
        let record = record.map(|record| NewRecord {
            record,
            links,
            result: None,
        });
        self.emit(Effect::Exec {
            effect,
            vertex: vertex_id,
            inputs,
            record,
        });
    }

    /// Takes an edge's output from its vertex's execution.
    pub(crate) fn take_output(&mut self, id: EdgeId) {
        let edge = &self.edges[id];
        let (vertex_id, output) = (edge.vertex, edge.output);
        let registered = if let EdgeState::Executing { record } = edge.state {
            record
        } else {
            None
        };
        let ExecState::Done(outputs) = &self.vertices[vertex_id].exec else {
            return;
        };
        match outputs.get(output).copied().flatten() {
            Some(result) => self.complete(id, result, false),
            None => {
                self.edges[id].state = EdgeState::Seeking;
                let failure = Failure::NoOutput {
                    vertex: self.vertices[vertex_id].digest,
                    output,
                };
                self.fail_waiting(vec![id], &failure);
            }
        }
        self.stop_running(registered, vertex_id);
    }

    /// Gives the edge its result and remembers it.
    pub(crate) fn complete(&mut self, id: EdgeId, result: ResultId, owned: bool) {
        self.want_all(id, Level::None);
        self.edges[id].state = EdgeState::Done { result, owned };
        let questions = std::mem::take(&mut self.edges[id].questions);
        self.stop_listening(id, questions);
        self.remember(id, result);
        self.set_reached(id, Level::Result);
        self.mark(id);
    }
}
