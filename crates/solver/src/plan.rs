//! What an edge does next, given what it and its inputs know.
//!
//! The least work wins. An edge first asks all inputs for the keys that follow from definitions. What these find is
//! loaded. An input through which nothing was found is asked further: for its own inputs' contents, then, if this edge
//! identifies it by content, for its result and checksum. Once an input can find nothing more, no record can match: the
//! edge is executed and wants all inputs' results at once.

use std::collections::BTreeSet;

use oci::Digest;

use crate::BuildId;
use crate::arena::{EdgeId, VertexId};
use crate::core::{Purpose, Solver};
use crate::edge::{Built, EdgeState, Effect, Level, Slot};
use crate::record::{FoundKey, Key, Link, NewRecord, Query, RecordId, StoreId};
use crate::twins::Question;
use crate::vertex::{ContentState, ExecState, MapState};

/// How many of an edge's inputs are how far.
#[derive(Clone, Copy, Debug, Default)]
struct Inputs {
    total: usize,
    /// Gave the keys that follow from definitions.
    fast: usize,
    /// Gave those and found nothing with them.
    fast_unmatched: usize,
    /// Found nothing so far.
    unmatched: usize,
    /// Can find nothing more.
    exhausted: usize,
    /// Found nothing and never will.
    hopeless: usize,
}

impl Inputs {
    fn all_fast(self) -> bool {
        self.fast == self.total
    }

    /// No further record can match.
    fn is_over(self) -> bool {
        self.hopeless > 0 || self.exhausted == self.total
    }
}

/// Questions, with the number of the input that each is about; none: it is about what was found through all.
#[derive(Debug, Default)]
struct Asked {
    queries: Vec<Query>,
    inputs: Vec<Option<usize>>,
}

impl Asked {
    /// Adds questions; of those that were asked before, only the ones to the local store, and only if it knows more now.
    fn add(&mut self, input: usize, before: bool, stale: bool, queries: impl IntoIterator<Item = Query>) {
        for query in queries {
            if !before || (stale && query.store() == StoreId::LOCAL) {
                self.queries.push(query);
                self.inputs.push(Some(input));
            }
        }
    }

    /// Asks for the results of a record.
    fn add_found(&mut self, key: Key) {
        self.queries.push(Query::Record(key));
        self.inputs.push(None);
    }
}

/// What a query asks of the local store.
fn question(query: &Query) -> Option<Question> {
    match query {
        Query::Record(key) if key.store == StoreId::LOCAL => Some(Question::record(&key.record)),
        Query::Children(StoreId::LOCAL, link) | Query::Candidates(StoreId::LOCAL, link) => {
            Some(Question::link(link))
        }
        Query::Record(_) | Query::Children(..) | Query::Candidates(..) => None,
    }
}

impl<E: Clone> Solver<E> {
    /// Brings an edge one step further, or lets it rest.
    pub(crate) fn evaluate(&mut self, id: EdgeId) {
        let edge = &self.edges[id];
        let vertex_id = edge.vertex;
        let demand = edge.demand();
        if let EdgeState::Done { result, .. } = edge.state {
            let builds: Vec<BuildId> = edge.builds.iter().copied().collect();
            for build in builds {
                self.finish(build, Ok(Built { edge: id, result }));
            }
            return;
        }
        if demand == Level::None {
            self.want_all(id, Level::None);
            self.unwanted.push(id);
            return;
        }
        if let Some((failure, _)) = &self.vertices[vertex_id].failure {
            let failure = failure.clone();
            self.fail_edges(vertex_id, &failure);
            return;
        }
        self.make_slots(id);
        if !self.ensure_map(id, demand) {
            return;
        }
        if self.edges[id].state != EdgeState::Seeking {
            if demand < Level::Result {
                self.unwanted.push(id);
            }
            return;
        }
        self.ask_keys(id);
        if self.edges[id].queries > 0 {
            return;
        }
        if demand == Level::Result && self.load_best(id) {
            return;
        }
        self.seek(id, demand);
    }

    /// Cancels what an edge and its vertex do, as far as nobody wants it.
    pub(crate) fn cancel_unwanted(&mut self, id: EdgeId) {
        let Some(edge) = self.edges.get(id) else { return };
        let vertex_id = edge.vertex;
        if edge.demand() < Level::Result {
            match &edge.state {
                EdgeState::Loading { effect, .. } => {
                    let effect = *effect;
                    self.cancel(effect);
                }
                EdgeState::Executing { .. } => self.cancel_exec(vertex_id),
                EdgeState::AwaitingTwin { record } => {
                    let record = *record;
                    self.edges[id].state = EdgeState::Seeking;
                    if let Some(running) = self.running.get_mut(&record) {
                        running.waiting.remove(&id);
                    }
                    self.mark(id);
                }
                EdgeState::Seeking | EdgeState::Done { .. } => {}
            }
        }
        let vertex = &self.vertices[vertex_id];
        if vertex
            .edges
            .values()
            .any(|edge| self.edges[*edge].demand() > Level::None)
        {
            return;
        }
        let map = if let MapState::Asked(effect) = vertex.map {
            Some(effect)
        } else {
            None
        };
        let contents = vertex.content.iter().filter_map(|content| match content {
            ContentState::Asked(effect) => Some(*effect),
            _ => None,
        });
        let unwanted: Vec<_> = contents.chain(map).collect();
        for effect in unwanted {
            self.cancel(effect);
        }
    }

    /// Cancels a vertex's execution if no edge waits for it any more.
    fn cancel_exec(&mut self, id: VertexId) {
        let vertex = &self.vertices[id];
        let waited_for = vertex.edges.values().any(|edge| {
            let edge = &self.edges[*edge];
            matches!(edge.state, EdgeState::Executing { .. }) && edge.demand() == Level::Result
        });
        if !waited_for && let ExecState::Running(effect) = vertex.exec {
            self.cancel(effect);
        }
    }

    fn make_slots(&mut self, id: EdgeId) {
        let vertex_id = self.edges[id].vertex;
        if self.edges[id].slots.len() == self.vertices[vertex_id].inputs.len() {
            return;
        }
        let inputs = self.vertices[vertex_id].inputs.clone();
        for (number, (vertex, output)) in inputs.into_iter().enumerate() {
            let input = self.edge(vertex, output);
            self.edges[input].users.insert((id, number));
            self.edges[input].wants[Level::None as usize] += 1;
            self.edges[id].slots.push(Slot {
                edge: input,
                want: Level::None,
                keys_asked: 0,
                content_asked: false,
                matched: BTreeSet::new(),
            });
        }
    }

    /// Sees to it that the cache map is known; meanwhile inputs can look for keys.
    fn ensure_map(&mut self, id: EdgeId, demand: Level) -> bool {
        let vertex_id = self.edges[id].vertex;
        match self.vertices[vertex_id].map {
            MapState::Known => return true,
            MapState::Asked(_) => {}
            MapState::Unknown => self.ask_map(vertex_id),
        }
        let useful = match (self.vertices[vertex_id].ignore_cache, demand) {
            (false, _) => Level::Fast,
            (true, Level::Result) => Level::Result,
            (true, _) => Level::None,
        };
        self.want_all(id, useful);
        false
    }

    fn ask_map(&mut self, id: VertexId) {
        let effect = self.start(Purpose::Map(id));
        self.vertices[id].map = MapState::Asked(effect);
        let round = self.vertices[id].rounds;
        self.emit(Effect::CacheMap {
            effect,
            vertex: id,
            round,
        });
    }

    pub(crate) fn set_want(&mut self, id: EdgeId, input: usize, want: Level) {
        let slot = &mut self.edges[id].slots[input];
        let old = std::mem::replace(&mut slot.want, want);
        if old == want {
            return;
        }
        let target = slot.edge;
        let reached = self.edges[target].reached;
        let user = &mut self.edges[id];
        user.unsettled += usize::from(want > reached);
        user.unsettled -= usize::from(old > reached);
        let edge = &mut self.edges[target];
        edge.wants[old as usize] -= 1;
        edge.wants[want as usize] += 1;
        self.mark(target);
    }

    pub(crate) fn want_all(&mut self, id: EdgeId, want: Level) {
        for input in 0..self.edges[id].slots.len() {
            self.set_want(id, input, want);
        }
    }

    fn reach(&mut self, id: EdgeId, level: Level) {
        if self.edges[id].reached < level {
            self.set_reached(id, level);
        }
    }

    // ---- keys ------------------------------------------------------------------------------------------------------

    /// Asks stores for what became askable since the last time, and the local one again if it knows more now.
    fn ask_keys(&mut self, id: EdgeId) {
        let edge = &self.edges[id];
        let vertex_id = edge.vertex;
        let vertex = &self.vertices[vertex_id];
        if vertex.ignore_cache {
            return;
        }
        let mut asked = Asked::default();
        let stores: Vec<StoreId> = std::iter::once(StoreId::LOCAL)
            .chain(vertex.stores.iter().copied())
            .collect();
        if vertex.inputs.is_empty() && !vertex.ephemeral {
            for (number, digest) in vertex.digests.iter().enumerate() {
                let record = RecordId::root(digest, edge.output);
                let queries = stores.iter().map(|store| {
                    Query::Record(Key {
                        store: *store,
                        record,
                    })
                });
                asked.add(0, number < edge.digests_asked, edge.stale, queries);
            }
        }
        let mut keys_asked = Vec::with_capacity(edge.slots.len());
        for number in 0..edge.slots.len() {
            self.input_queries(id, number, &stores, &mut asked);
            keys_asked.push(self.edges[edge.slots[number].edge].keys.len());
        }
        let digests = vertex.digests.len();
        for (number, keys) in keys_asked.into_iter().enumerate() {
            let content = self.vertices[vertex_id].content_of(number).is_some();
            let slot = &mut self.edges[id].slots[number];
            slot.keys_asked = keys;
            slot.content_asked |= content;
        }
        let edge = &mut self.edges[id];
        edge.digests_asked = digests;
        edge.stale = false;
        for key in std::mem::take(&mut edge.unasked) {
            asked.add_found(key);
        }
        if asked.queries.is_empty() {
            return;
        }
        edge.queries += 1;
        self.listen(id, asked.queries.iter().filter_map(question));
        let effect = self.start(Purpose::Query(id, asked.inputs));
        let queries = asked.queries;
        self.emit(Effect::Query {
            effect,
            vertex: vertex_id,
            queries,
        });
    }

    fn input_queries(&self, id: EdgeId, number: usize, stores: &[StoreId], asked: &mut Asked) {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let slot = &edge.slots[number];
        let link = |parent: RecordId, selector: Option<Digest>| Link {
            parent,
            input: number,
            op: vertex.op_digest(),
            output: edge.output,
            selector,
        };
        let children = if edge.slots.len() > 1 {
            Query::Candidates
        } else {
            Query::Children
        };
        let selector = vertex.deps[number].selector;
        let from = if edge.stale { 0 } else { slot.keys_asked };
        for (index, key) in self.edges[slot.edge].keys.iter().enumerate().skip(from) {
            let query = children(key.store, link(key.record, selector));
            asked.add(number, index < slot.keys_asked, edge.stale, [query]);
        }
        if let Some(content) = vertex.content_of(number) {
            let parent = RecordId::content(&content);
            let queries = stores.iter().map(|store| children(*store, link(parent, None)));
            asked.add(number, slot.content_asked, edge.stale, queries);
        }
    }

    /// Takes note of a record that was found through an input. Once found through all, it is a key of the edge.
    pub(crate) fn add_match(&mut self, id: EdgeId, input: usize, found: FoundKey) {
        let edge = &mut self.edges[id];
        let (needed, key) = (edge.slots.len().max(1), found.key);
        let is_news = match edge.slots.get_mut(input) {
            Some(slot) => slot.matched.insert(key),
            None => !edge.matches.contains_key(&key),
        };
        let through = edge.matches.entry(key).or_default();
        *through += usize::from(is_news);
        if *through < needed {
            return;
        }
        if needed > 1 {
            edge.unasked.insert(key);
        }
        self.add_results(id, found);
        if is_news {
            self.edges[id].keys.push(key);
            self.connect(id, key);
            self.mark_users(id);
        }
    }

    /// Takes note of the results of a record that was found through all inputs.
    pub(crate) fn add_results(&mut self, id: EdgeId, found: FoundKey) {
        let edge = &mut self.edges[id];
        for result in found.results {
            if edge.results_seen.insert(result.clone()) {
                edge.results.push(result);
            }
        }
    }

    /// Links an input's definition keys to a local record that its content led to: the next build finds it without
    /// looking at the content.
    fn connect(&mut self, id: EdgeId, key: Key) {
        let vertex_id = self.edges[id].vertex;
        if key.store != StoreId::LOCAL {
            return;
        }
        let mut links = Vec::new();
        for number in 0..self.edges[id].slots.len() {
            if self.vertices[vertex_id].content_of(number).is_some() {
                links.extend(self.definition_links(id, number));
            }
        }
        if !links.is_empty() {
            let record = NewRecord {
                record: key.record,
                links,
                result: None,
            };
            self.save(id, record);
        }
    }

    // ---- decisions -------------------------------------------------------------------------------------------------

    fn load_best(&mut self, id: EdgeId) -> bool {
        let Some(stored) = self.edges[id].take_best() else {
            return false;
        };
        self.want_all(id, Level::None);
        let effect = self.start(Purpose::Load(id));
        let edge = &mut self.edges[id];
        edge.state = EdgeState::Loading {
            effect,
            stored: stored.clone(),
        };
        let (vertex, output) = (edge.vertex, edge.output);
        self.emit(Effect::Load {
            effect,
            vertex,
            output,
            stored,
        });
        true
    }

    /// Whether an input can lead to no further records.
    fn is_exhausted(&self, id: EdgeId, number: usize) -> bool {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        if vertex.deps[number].content {
            vertex.is_content_known(number)
        } else {
            self.edges[edge.slots[number].edge].reached >= Level::Slow
        }
    }

    fn look_at_inputs(&self, id: EdgeId) -> Inputs {
        let edge = &self.edges[id];
        let mut inputs = Inputs {
            total: edge.slots.len(),
            ..Inputs::default()
        };
        for (number, slot) in edge.slots.iter().enumerate() {
            let fast = self.edges[slot.edge].reached >= Level::Fast;
            let exhausted = self.is_exhausted(id, number);
            let unmatched = slot.matched.is_empty();
            inputs.fast += usize::from(fast);
            inputs.fast_unmatched += usize::from(fast && unmatched);
            inputs.unmatched += usize::from(unmatched);
            inputs.exhausted += usize::from(exhausted);
            inputs.hopeless += usize::from(exhausted && unmatched);
        }
        inputs
    }

    /// Whether records found through some inputs may still be found through the others.
    fn has_open_matches(&self, id: EdgeId) -> bool {
        let edge = &self.edges[id];
        edge.matches.iter().any(|(key, through)| {
            *through < edge.slots.len()
                && (edge.slots.iter().enumerate())
                    .all(|(number, slot)| slot.matched.contains(key) || !self.is_exhausted(id, number))
        })
    }

    /// Decides for an edge that has nothing (left) to load, or is wanted for its keys only.
    fn seek(&mut self, id: EdgeId, demand: Level) {
        let vertex = &self.vertices[self.edges[id].vertex];
        if vertex.inputs.is_empty() {
            self.seek_root(id, demand);
            return;
        }
        let inputs = self.look_at_inputs(id);
        let over = vertex.ignore_cache || inputs.is_over();
        let found = !self.edges[id].results.is_empty();
        let reached = if over || (found && inputs.all_fast() && !self.has_open_matches(id)) {
            Level::Slow
        } else if inputs.all_fast() || inputs.fast_unmatched > 0 {
            Level::Fast
        } else {
            Level::None
        };
        self.reach(id, reached);
        if demand <= self.edges[id].reached {
            self.want_all(id, Level::None);
        } else if over {
            self.execute(id);
        } else {
            self.want_more(id, demand, inputs);
        }
    }

    fn seek_root(&mut self, id: EdgeId, demand: Level) {
        let vertex_id = self.edges[id].vertex;
        let vertex = &self.vertices[vertex_id];
        if vertex.more && self.edges[id].results.is_empty() && self.edges[id].reached < Level::Slow {
            self.ask_map(vertex_id);
            return;
        }
        self.reach(id, Level::Slow);
        if demand == Level::Result {
            self.execute(id);
        }
    }

    /// Wants more of those inputs that may lead to a record.
    fn want_more(&mut self, id: EdgeId, demand: Level, inputs: Inputs) {
        for number in 0..self.edges[id].slots.len() {
            let slot = &self.edges[id].slots[number];
            let reached = self.edges[slot.edge].reached;
            let candidate = if inputs.unmatched > 0 {
                slot.matched.is_empty()
            } else {
                inputs.all_fast()
            };
            let is_enough = demand == Level::Fast || !candidate || self.is_exhausted(id, number);
            let want = match reached {
                _ if is_enough => Level::Fast,
                Level::None => Level::Fast,
                Level::Fast => Level::Slow,
                Level::Slow | Level::Result => Level::Result,
            };
            self.set_want(id, number, want);
            if want == Level::Result {
                self.ask_content(id, number);
            }
        }
    }

    /// Asks for the checksum of an input that has its result. `true`: nothing is left to ask.
    pub(crate) fn ask_content(&mut self, id: EdgeId, number: usize) -> bool {
        let edge = &self.edges[id];
        let (vertex_id, input) = (edge.vertex, edge.slots[number].edge);
        let Some(result) = self.edges[input].result() else {
            return false;
        };
        let vertex = &self.vertices[vertex_id];
        if !vertex.deps[number].content {
            return true;
        }
        match vertex.content[number] {
            ContentState::Known(_) => true,
            ContentState::Asked(_) => false,
            ContentState::Unknown => {
                let effect = self.start(Purpose::Checksum(vertex_id, number, result));
                self.vertices[vertex_id].content[number] = ContentState::Asked(effect);
                self.emit(Effect::Checksum {
                    effect,
                    vertex: vertex_id,
                    input: number,
                    result,
                });
                false
            }
        }
    }
}
