//! How results are remembered: the record of an edge, and the links that lead to it.

use std::collections::BTreeSet;

use oci::Digest;

use crate::ResultId;
use crate::arena::EdgeId;
use crate::core::Solver;
use crate::edge::Edge;
use crate::record::{Key, Link, NewRecord, RecordId, StoreId};

impl<E: Clone> Solver<E> {
    /// Stores a result under the edge's keys.
    pub(crate) fn remember(&mut self, id: EdgeId, result: ResultId) {
        let vertex_id = self.edges[id].vertex;
        if let Some(stored) = &self.edges[id].loaded
            && stored.key.store == StoreId::LOCAL
        {
            let record = stored.key.record;
            self.edges[id].record = Some(record);
            self.remember_other_ways(id, record);
            return;
        }
        let Some(record) = self.record_of(id) else { return };
        let vertex = &self.vertices[vertex_id];
        let ids: Vec<RecordId> = if vertex.inputs.is_empty() {
            vertex
                .digests
                .iter()
                .map(|digest| RecordId::root(digest, self.edges[id].output))
                .collect()
        } else {
            vec![record]
        };
        let ignores = vertex.ignore_cache;
        let links = self.all_links(id).unwrap_or_default();
        for record in ids {
            let links = links.clone();
            let result = Some(result);
            self.save(
                id,
                NewRecord {
                    record,
                    links,
                    result,
                },
            );
            let key = Key {
                store: StoreId::LOCAL,
                record,
            };
            if !ignores && !self.edges[id].keys.contains(&key) {
                self.edges[id].keys.push(key);
            }
        }
    }

    /// Links a record that was found in one way in all others that are known by now: the next build may know another first.
    fn remember_other_ways(&mut self, id: EdgeId, record: RecordId) {
        let links = self.all_links(id).unwrap_or_default();
        if links.len() <= self.edges[id].slots.len() {
            // Each input has the one way in which it was found.
            return;
        }
        let result = None;
        self.save(
            id,
            NewRecord {
                record,
                links,
                result,
            },
        );
    }

    /// The ways in which an input's definition identifies it in the local store, as links to this edge.
    pub(crate) fn definition_links(&self, id: EdgeId, number: usize) -> Vec<Link> {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let selector = vertex.deps[number].selector;
        let records = self.local_records(edge.slots[number].edge);
        records
            .into_iter()
            .map(|parent| Link {
                parent,
                input: number,
                op: vertex.op_digest(),
                output: edge.output,
                selector,
            })
            .collect()
    }

    /// All local records that stand for an edge, as far as known.
    fn local_records(&self, id: EdgeId) -> BTreeSet<RecordId> {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let mut records: BTreeSet<RecordId> = edge.record.into_iter().collect();
        records.extend(
            edge.keys
                .iter()
                .filter(|key| key.store == StoreId::LOCAL)
                .map(|key| key.record),
        );
        if edge.record.is_some() && vertex.inputs.is_empty() {
            records.extend(
                vertex
                    .digests
                    .iter()
                    .map(|digest| RecordId::root(digest, edge.output)),
            );
        }
        records
    }

    /// The links that lead to an edge; `None` if some input is not identified by anything.
    pub(crate) fn all_links(&self, id: EdgeId) -> Option<Vec<Link>> {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let mut links = Vec::new();
        for number in 0..edge.slots.len() {
            let before = links.len();
            links.extend(self.definition_links(id, number));
            if let Some(content) = vertex.content_of(number) {
                let parent = RecordId::content(&content);
                let (op, output) = (vertex.op_digest(), edge.output);
                links.push(Link {
                    parent,
                    input: number,
                    op,
                    output,
                    selector: None,
                });
            }
            if links.len() == before {
                return None;
            }
        }
        Some(links)
    }

    /// The id under which an edge is remembered: that of a known record, else one that follows from its inputs.
    pub(crate) fn own_record(&self, id: EdgeId) -> Option<RecordId> {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        if vertex.ephemeral || vertex.digests.is_empty() || edge.slots.len() != vertex.inputs.len() {
            return None;
        }
        if vertex.inputs.is_empty() {
            return Some(RecordId::root(&vertex.op_digest(), edge.output));
        }
        let known = edge
            .keys
            .iter()
            .filter(|key| key.store == StoreId::LOCAL)
            .map(|key| key.record)
            .min();
        let links = self.all_links(id)?;
        known.or_else(|| Some(self.derive_record(edge, &links)))
    }

    fn derive_record(&self, edge: &Edge, links: &[Link]) -> RecordId {
        let vertex = &self.vertices[edge.vertex];
        let mut text = format!("cooper.record.v1\n{}\n{}\n", vertex.op_digest(), edge.output);
        for parents in links.chunk_by(|a, b| a.input == b.input) {
            let number = parents[0].input;
            // Content alone, where it is known: however the input was made, the step is the same.
            let content = vertex
                .content_of(number)
                .map(|content| RecordId::content(&content));
            let parents = parents.iter();
            for link in parents.filter(|link| content.is_none_or(|content| link.parent == content)) {
                text.push_str(&link.parent.0.to_string());
                if let Some(selector) = &link.selector {
                    text.push(' ');
                    text.push_str(&selector.to_string());
                }
                text.push('\n');
            }
            text.push_str("-\n");
        }
        RecordId(Digest::sha256(text.as_bytes()))
    }

    /// Gives the edge a record, and inputs that lack one, whose links are saved; its own are left to the caller.
    fn record_of(&mut self, id: EdgeId) -> Option<RecordId> {
        let mut unknown: BTreeSet<EdgeId> = BTreeSet::new();
        let mut open = vec![id];
        while let Some(&next) = open.last() {
            let edge = &self.edges[next];
            if edge.record.is_some() || unknown.contains(&next) {
                open.pop();
                continue;
            }
            let finished = edge.result().is_some() && next != id;
            let inputs: Vec<EdgeId> = edge.slots.iter().map(|slot| slot.edge).collect();
            let missing = inputs.into_iter().filter(|input| {
                let has_record = !self.local_records(*input).is_empty();
                !has_record && !unknown.contains(input)
            });
            let missing: Vec<EdgeId> = if finished { Vec::new() } else { missing.collect() };
            if !missing.is_empty() {
                open.extend(missing);
                continue;
            }
            open.pop();
            let record = if finished { None } else { self.own_record(next) };
            match record {
                Some(record) => {
                    self.edges[next].record = Some(record);
                    if next != id {
                        let links = self.all_links(next).unwrap_or_default();
                        let result = None;
                        self.save(
                            next,
                            NewRecord {
                                record,
                                links,
                                result,
                            },
                        );
                    }
                }
                None => {
                    unknown.insert(next);
                }
            }
        }
        self.edges[id].record
    }
}
