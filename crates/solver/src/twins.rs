//! Equal steps of different vertices: who runs, who waits, and who looks again because somebody remembered something.
//!
//! Two steps are the same when for every input they share a link: then what one of them computes is what the other one
//! would find. While one runs the other waits, and whatever is saved is looked for again by those who asked for it in
//! vain, so that builds that overlap see each other's results the moment they exist.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::arena::{EdgeId, VertexId};
use crate::core::{Running, Solver};
use crate::edge::{EdgeState, Effect};
use crate::record::{Link, NewRecord, RecordId};

/// What is asked of the local store, in short. Two questions with one name do no harm: something is asked in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Question(u64);

impl Question {
    pub(crate) fn record(record: &RecordId) -> Self {
        Self::of(record)
    }

    pub(crate) fn link(link: &Link) -> Self {
        Self::of(link)
    }

    fn of(what: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Self(hasher.finish())
    }
}

impl<E: Clone> Solver<E> {
    // ---- who asked -------------------------------------------------------------------------------------------------

    /// Notes that an edge asked the local store.
    pub(crate) fn listen(&mut self, id: EdgeId, questions: impl IntoIterator<Item = Question>) {
        for question in questions {
            if self.listening.entry(question).or_default().insert(id) {
                self.edges[id].questions.push(question);
            }
        }
    }

    /// Notes that an edge has its result or is gone: it asks nothing any more.
    pub(crate) fn stop_listening(&mut self, id: EdgeId, questions: Vec<Question>) {
        for question in questions {
            forget(&mut self.listening, question, id);
        }
    }

    /// Remembers a record, which others may have asked for.
    pub(crate) fn save(&mut self, id: EdgeId, record: NewRecord) {
        let questions: Vec<Question> = match record.links.as_slice() {
            [] => vec![Question::record(&record.record)],
            links => links.iter().map(Question::link).collect(),
        };
        let vertex = self.edges[id].vertex;
        self.emit(Effect::Save { vertex, record });
        for question in questions {
            let listening = self.listening.get(&question).into_iter().flatten().copied();
            for other in listening.filter(|edge| *edge != id).collect::<Vec<EdgeId>>() {
                self.edges[other].stale = true;
                self.mark(other);
            }
        }
    }

    // ---- who runs --------------------------------------------------------------------------------------------------

    /// Finds a running step that is the same and may be waited for.
    pub(crate) fn find_twin(&self, id: EdgeId, record: RecordId, links: &[Link]) -> Option<RecordId> {
        let vertex = self.edges[id].vertex;
        let first = links.iter().take_while(|link| link.input == 0);
        let by_links = first
            .filter_map(|link| self.running_links.get(&Question::link(link)))
            .flatten()
            .copied()
            .filter(|record| self.running[record].is_same(links));
        let mut twins = std::iter::once(record)
            .filter(|record| self.running.contains_key(record))
            .chain(by_links);
        twins.find(|twin| {
            let twin = self.running[twin].vertex;
            twin != vertex && !self.waits_for(twin, vertex)
        })
    }

    /// Notes that a step runs. `None`: another one has this record already.
    pub(crate) fn start_running(
        &mut self,
        vertex: VertexId,
        record: RecordId,
        links: &[Link],
    ) -> Option<RecordId> {
        if self.running.contains_key(&record) {
            return None;
        }
        for link in links.iter().filter(|link| link.input == 0) {
            let running = self.running_links.entry(Question::link(link));
            running.or_default().insert(record);
        }
        let running = Running {
            vertex,
            links: links.to_vec(),
            waiting: BTreeSet::new(),
        };
        self.running.insert(record, running);
        Some(record)
    }

    /// Lets equal steps that waited for this one go on.
    pub(crate) fn stop_running(&mut self, record: Option<RecordId>, vertex: VertexId) {
        let Some(record) = record else { return };
        let is_own = |running: &Running| running.vertex == vertex;
        if !self.running.get(&record).is_some_and(is_own) {
            return;
        }
        let Some(running) = self.running.remove(&record) else {
            return;
        };
        for link in running.links.iter().filter(|link| link.input == 0) {
            forget(&mut self.running_links, Question::link(link), record);
        }
        for waiting in running.waiting {
            self.seek_again(waiting);
        }
    }

    fn seek_again(&mut self, waiting: EdgeId) {
        if let Some(edge) = self.edges.get_mut(waiting) {
            edge.state = EdgeState::Seeking;
            edge.stale = true;
            self.mark(waiting);
        }
    }

    /// Whether the end of a running vertex depends on another one, or on one whose op builds that: they build, and what
    /// they build waits for equal steps.
    fn waits_for(&self, running: VertexId, other: VertexId) -> bool {
        let blocked = self.ancestors(other);
        let mut seen = BTreeSet::new();
        let mut open = vec![running];
        while let Some(next) = open.pop() {
            if blocked.contains(&next) {
                return true;
            }
            let Some(vertex) = self.vertices.get(next).filter(|_| seen.insert(next)) else {
                continue;
            };
            open.extend(vertex.children.iter().copied());
            for edge in vertex.edges.values() {
                if let EdgeState::AwaitingTwin { record } = self.edges[*edge].state {
                    open.push(self.running[&record].vertex);
                }
            }
        }
        false
    }

    /// Lets go on who would wait for itself, now that a vertex builds more.
    pub(crate) fn recheck_twins(&mut self) {
        let waiting: Vec<(RecordId, VertexId, EdgeId)> = self
            .running
            .iter()
            .flat_map(|(record, running)| {
                running
                    .waiting
                    .iter()
                    .map(|edge| (*record, running.vertex, *edge))
            })
            .collect();
        for (record, twin, edge) in waiting {
            if self.waits_for(twin, self.edges[edge].vertex)
                && let Some(running) = self.running.get_mut(&record)
            {
                running.waiting.remove(&edge);
                self.seek_again(edge);
            }
        }
    }
}

fn forget<T: Ord>(index: &mut BTreeMap<Question, BTreeSet<T>>, question: Question, value: T) {
    if let Some(values) = index.get_mut(&question) {
        values.remove(&value);
        if values.is_empty() {
            index.remove(&question);
        }
    }
}

impl Running {
    /// Whether both share a link for every input.
    fn is_same(&self, links: &[Link]) -> bool {
        let by_input = |a: &Link, b: &Link| a.input == b.input;
        let (ours, theirs) = (self.links.chunk_by(by_input), links.chunk_by(by_input));
        ours.clone().count() == theirs.clone().count()
            && ours
                .zip(theirs)
                .all(|(ours, theirs)| ours.iter().any(|link| theirs.contains(link)))
    }
}
