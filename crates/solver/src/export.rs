//! The steps behind results, for those who export caches.

use std::collections::{BTreeMap, BTreeSet};

use oci::Digest;

use crate::ResultId;
use crate::arena::{EdgeId, VertexId};
use crate::core::Solver;
use crate::record::{RecordId, StoreId, StoredResult};

/// Steps, inputs before users.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportGraph {
    /// The steps.
    pub entries: Vec<ExportEntry>,
    /// Per edge that was asked for, its index in `entries`; `None` when it cannot be identified.
    pub roots: Vec<Option<usize>>,
}

/// One output of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportEntry {
    /// The vertex's digest.
    pub vertex: Digest,
    /// Its output.
    pub output: usize,
    /// How the step itself is named in cache manifests; several only for a step without inputs.
    pub digests: Vec<RecordId>,
    /// Per input, the ways in which it is identified. Never empty.
    pub inputs: Vec<Vec<ExportLink>>,
    /// Local records that stand for it.
    pub records: Vec<RecordId>,
    /// Its result, if it has one now.
    pub result: Option<ResultId>,
    /// Where that result was loaded from.
    pub loaded: Option<StoredResult>,
    /// Results that are known but were not loaded.
    pub stored: Vec<StoredResult>,
    /// Whether the client wants it exported or left out in any case.
    pub export: Option<bool>,
}

/// One way in which an input is identified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportLink {
    /// What identifies it.
    pub source: ExportSource,
    /// What is read of it; `None` for content.
    pub selector: Option<Digest>,
}

/// What identifies an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportSource {
    /// The step that makes it, by index.
    Entry(usize),
    /// Its content.
    Content(RecordId),
}

impl<E: Clone> Solver<E> {
    /// Collects the steps behind edges. Edges of closed jobs and steps that cannot be identified are left out, and so is
    /// what is identified through nothing else. Linear in the graph.
    pub fn export(&self, edges: &[EdgeId]) -> ExportGraph {
        let mut graph = ExportGraph::default();
        let mut done: BTreeMap<EdgeId, Option<usize>> = BTreeMap::new();
        let mut open: Vec<(EdgeId, bool)> = edges.iter().rev().map(|edge| (*edge, false)).collect();
        while let Some((id, inputs_done)) = open.pop() {
            if done.contains_key(&id) {
                continue;
            }
            let Some(edge) = self.edges.get(id) else {
                done.insert(id, None);
                continue;
            };
            if inputs_done {
                let entry = self.export_entry(id, &done);
                let index = entry.map(|entry| {
                    graph.entries.push(entry);
                    graph.entries.len() - 1
                });
                done.insert(id, index);
            } else {
                open.push((id, true));
                open.extend(edge.slots.iter().rev().map(|slot| (slot.edge, false)));
            }
        }
        graph.roots = edges
            .iter()
            .map(|edge| done.get(edge).copied().flatten())
            .collect();
        graph
    }

    fn export_entry(&self, id: EdgeId, done: &BTreeMap<EdgeId, Option<usize>>) -> Option<ExportEntry> {
        let edge = &self.edges[id];
        let vertex = &self.vertices[edge.vertex];
        let unknown = vertex.digests.is_empty() || edge.slots.len() != vertex.inputs.len();
        if unknown || vertex.ephemeral {
            return None;
        }
        let mut inputs = Vec::with_capacity(edge.slots.len());
        for (number, slot) in edge.slots.iter().enumerate() {
            let mut links = Vec::new();
            if let Some(index) = done.get(&slot.edge).copied().flatten() {
                let selector = vertex.deps[number].selector;
                links.push(ExportLink {
                    source: ExportSource::Entry(index),
                    selector,
                });
            }
            if let Some(content) = vertex.content_of(number) {
                let source = ExportSource::Content(RecordId::content(&content));
                links.push(ExportLink {
                    source,
                    selector: None,
                });
            }
            if links.is_empty() {
                return None;
            }
            inputs.push(links);
        }
        let digests = if inputs.is_empty() {
            vertex.digests.clone()
        } else {
            vec![vertex.op_digest()]
        };
        let local = edge
            .keys
            .iter()
            .filter(|key| key.store == StoreId::LOCAL)
            .map(|key| key.record);
        let mut records: Vec<RecordId> = local.chain(edge.record).collect();
        records.sort_unstable();
        records.dedup();
        let mut stored = edge.results.clone();
        stored.sort_by(|a, b| b.created_at_ns.cmp(&a.created_at_ns).then_with(|| a.cmp(b)));
        Some(ExportEntry {
            vertex: vertex.digest,
            output: edge.output,
            digests: digests
                .iter()
                .map(|digest| RecordId::root(digest, edge.output))
                .collect(),
            inputs,
            records,
            result: edge.result(),
            loaded: edge.loaded.clone(),
            stored,
            export: vertex.export,
        })
    }
}

impl<E: Clone> Solver<E> {
    /// Lists the vertices behind an edge, inputs before users, itself last. Empty when its job is closed.
    pub fn vertices_behind(&self, edge: EdgeId) -> Vec<VertexId> {
        let Some(edge) = self.edges.get(edge) else {
            return Vec::new();
        };
        let mut order = Vec::new();
        let mut seen: BTreeSet<VertexId> = BTreeSet::new();
        let mut open = vec![(edge.vertex, false)];
        while let Some((id, inputs_done)) = open.pop() {
            if inputs_done {
                order.push(id);
            } else if seen.insert(id)
                && let Some(vertex) = self.vertices.get(id)
            {
                open.push((id, true));
                open.extend(vertex.inputs.iter().rev().map(|(input, _)| (*input, false)));
            }
        }
        order
    }
}
