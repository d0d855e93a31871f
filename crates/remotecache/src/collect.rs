//! From the steps of a build to the records of an export.

use std::collections::BTreeMap;

use build::blocking::internal;
use build::cache_export::{CacheEntry, CacheExportSource, CacheGraph, CacheLinkSource, CacheMode};
use build::error::BuildError;
use build::op::ResultRef;
use cache::Records;
use oci::Digest;
use solver::RecordId;

use super::chains::{Chains, ItemId, ItemLink, ItemResult};
use super::records::ImportedRecords;

/// Local records that are looked at for further ways to the same steps.
const MAX_LOCAL_RECORDS: usize = 100_000;

/// Inputs that a step may have.
const MAX_INPUTS: usize = 1 << 16;

/// The step whose result is taken along, and in which mode it was come to.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// Index of the step.
    pub entry: usize,
    /// What is asked of it.
    pub mode: CacheMode,
}

/// The steps behind some, each once, users before inputs. What is below a result that is taken along is asked for less
/// in [`CacheMode::Min`]; [`Walk::found`] tells of such results.
#[derive(Debug)]
pub struct Walk<'a> {
    graph: &'a CacheGraph,
    seen: Vec<bool>,
    open: Vec<Visit>,
}

impl<'a> Walk<'a> {
    /// Starts at some steps.
    pub fn new(graph: &'a CacheGraph, roots: impl IntoIterator<Item = usize>, mode: CacheMode) -> Self {
        let mut open: Vec<Visit> = roots.into_iter().map(|entry| Visit { entry, mode }).collect();
        open.reverse();
        Self {
            graph,
            seen: vec![false; graph.entries.len()],
            open,
        }
    }

    /// The next step. After it, [`Walk::found`] is to be called.
    pub fn step(&mut self) -> Option<(Visit, &'a CacheEntry)> {
        while let Some(visit) = self.open.pop() {
            let Some(seen) = self.seen.get_mut(visit.entry) else {
                continue;
            };
            if !std::mem::replace(seen, true) {
                return Some((visit, &self.graph.entries[visit.entry]));
            }
        }
        None
    }

    /// Goes on to the inputs of a step, whose result was taken along or not.
    pub fn found(&mut self, visit: Visit, has_result: bool) {
        let mode = match visit.mode {
            CacheMode::Min if has_result => CacheMode::RemoteOnly,
            mode => mode,
        };
        let links = self.graph.entries[visit.entry].inputs.iter().flatten().rev();
        self.open.extend(links.filter_map(|link| match link.source {
            CacheLinkSource::Entry(entry) => Some(Visit { entry, mode }),
            CacheLinkSource::Content(_) => None,
        }));
    }
}

/// Whether a step's result is exported at all: sources are found again without, and the client may not want it.
pub fn takes_result(entry: &CacheEntry) -> bool {
    !entry.inputs.is_empty() && entry.export != Some(false)
}

/// Whether a step's result is not exported although there may be one, because the client does not want it.
pub fn is_unwanted(entry: &CacheEntry) -> bool {
    !entry.inputs.is_empty() && entry.export == Some(false)
}

/// A step's results that can be had, best first, each with its time. Loading is cheap: refs may be lazy.
pub async fn candidate(
    source: &CacheExportSource,
    entry: &CacheEntry,
    mut accept: impl FnMut(&ResultRef) -> bool,
) -> Result<Option<ItemResult<ResultRef>>, BuildError> {
    if let Some(result) = &entry.result {
        let found = ItemResult {
            created_at: entry.created_at,
            value: result.clone(),
        };
        return Ok(Some(found).filter(|found| accept(&found.value)));
    }
    for stored in &entry.stored {
        match source.stored.load(stored).await {
            Ok(Some(value)) if accept(&value) => {
                let since = std::time::Duration::from_nanos(u64::try_from(stored.created_at_ns).unwrap_or(0));
                return Ok(Some(ItemResult {
                    created_at: std::time::UNIX_EPOCH + since,
                    value,
                }));
            }
            Ok(_) => {}
            Err(error) if error.is_canceled() => return Err(error),
            Err(error) => tracing::debug!(%error, result = stored.result, "a cached result cannot be loaded"),
        }
    }
    Ok(None)
}

/// Adds the steps that were visited, with their results.
pub fn add_graph<R>(
    chains: &mut Chains<R>,
    graph: &CacheGraph,
    visited: &[bool],
    mut results: BTreeMap<usize, ItemResult<R>>,
) {
    let mut items: Vec<Vec<ItemId>> = Vec::with_capacity(graph.entries.len());
    for (index, entry) in graph.entries.iter().enumerate() {
        let mut made = Vec::new();
        if visited.get(index).copied().unwrap_or(false) {
            let inputs: Vec<Vec<ItemLink>> = entry
                .inputs
                .iter()
                .map(|links| input_items(chains, &items, links))
                .collect();
            for digest in &entry.digests {
                made.extend(chains.add(*digest, &inputs));
            }
        }
        if let (Some(first), Some(result)) = (made.first(), results.remove(&index)) {
            chains.add_result(*first, result);
        }
        items.push(made);
    }
}

fn input_items<R>(
    chains: &mut Chains<R>,
    items: &[Vec<ItemId>],
    links: &[build::cache_export::CacheLink],
) -> Vec<ItemLink> {
    let mut found = Vec::new();
    for link in links {
        match &link.source {
            CacheLinkSource::Entry(index) => {
                let known = items.get(*index).into_iter().flatten();
                found.extend(known.map(|item| (*item, link.selector)));
            }
            CacheLinkSource::Content(record) => found.push((chains.root(*record), link.selector)),
        }
    }
    found
}

/// Adds in which other ways earlier builds, here and in the caches that were imported, came to the same steps. Returns
/// what could not be looked at.
///
/// # Errors
/// When the local records cannot be read.
pub fn add_known<R>(
    chains: &mut Chains<R>,
    graph: &CacheGraph,
    visited: &[bool],
    records: &Records,
    imported: &[std::sync::Arc<ImportedRecords>],
) -> Result<Option<String>, BuildError> {
    for cache in imported {
        cache.extend(chains);
    }
    add_local(chains, graph, visited, Local::new(records, MAX_LOCAL_RECORDS))
}

/// Adds in which other ways earlier builds here came to the same steps.
fn add_local<R>(
    chains: &mut Chains<R>,
    graph: &CacheGraph,
    visited: &[bool],
    mut local: Local<'_>,
) -> Result<Option<String>, BuildError> {
    let entries = graph
        .entries
        .iter()
        .zip(visited)
        .filter(|(entry, visited)| **visited && !entry.inputs.is_empty());
    for id in entries.flat_map(|(entry, _)| &entry.records) {
        if !local.add(chains, *id)? {
            let text = format!(
                "more than {} records lead to the build's steps: further ways to them are not exported",
                local.limit
            );
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// Local records that were added; `None` while their inputs are.
struct Local<'a> {
    records: &'a Records,
    items: BTreeMap<RecordId, Option<Vec<ItemId>>>,
    /// How many are looked at.
    limit: usize,
}

/// A local record being added: per step, its inputs.
type Steps = BTreeMap<Digest, Vec<Vec<(RecordId, Option<Digest>)>>>;

impl<'a> Local<'a> {
    fn new(records: &'a Records, limit: usize) -> Self {
        Self {
            records,
            items: BTreeMap::new(),
            limit,
        }
    }

    /// Adds a record and those behind it; `false` when they are too many.
    fn add<R>(&mut self, chains: &mut Chains<R>, id: RecordId) -> Result<bool, BuildError> {
        // A step has inputs: without links to it the record tells nothing.
        if self.steps(id)?.is_empty() {
            return Ok(true);
        }
        let mut open = vec![(id, None::<Steps>)];
        while let Some((id, steps)) = open.pop() {
            match steps {
                Some(steps) => {
                    let items = self.step_items(chains, id, steps);
                    self.items.insert(id, Some(items));
                }
                None if self.items.contains_key(&id) => {}
                None => {
                    if self.items.len() >= self.limit {
                        return Ok(false);
                    }
                    self.items.insert(id, None);
                    let steps = self.steps(id)?;
                    let parents: Vec<RecordId> = steps
                        .values()
                        .flatten()
                        .flatten()
                        .map(|(parent, _)| *parent)
                        .collect();
                    open.push((id, Some(steps)));
                    open.extend(parents.into_iter().map(|parent| (parent, None)));
                }
            }
        }
        Ok(true)
    }

    fn steps(&self, id: RecordId) -> Result<Steps, BuildError> {
        let mut steps = Steps::new();
        for (parent, link) in self.records.backlinks(&id.to_string()).map_err(internal)? {
            let (Ok(parent), Ok(input)) = (parent.parse::<Digest>(), usize::try_from(link.input)) else {
                continue;
            };
            let Ok(output) = usize::try_from(link.output) else {
                continue;
            };
            // Inputs are as many as an op may have; a larger number is no op's.
            if input >= MAX_INPUTS {
                continue;
            }
            let inputs = steps.entry(RecordId::root(&link.digest, output).0).or_default();
            if inputs.len() <= input {
                inputs.resize_with(input + 1, Vec::new);
            }
            inputs[input].push((RecordId(parent), link.selector));
        }
        Ok(steps)
    }

    fn step_items<R>(&self, chains: &mut Chains<R>, id: RecordId, steps: Steps) -> Vec<ItemId> {
        if steps.is_empty() {
            return vec![chains.root(id.0)];
        }
        let mut made = Vec::new();
        for (digest, inputs) in steps {
            let inputs: Vec<Vec<ItemLink>> = inputs.iter().map(|links| self.links(links)).collect();
            made.extend(chains.add(digest, &inputs));
        }
        made
    }

    fn links(&self, links: &[(RecordId, Option<Digest>)]) -> Vec<ItemLink> {
        let mut found = Vec::new();
        for (parent, selector) in links {
            let items = self
                .items
                .get(parent)
                .and_then(Option::as_ref)
                .into_iter()
                .flatten();
            found.extend(items.map(|item| (*item, *selector)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use cache::{Batch, Store, StoreOptions};
    use snapshot::Native;

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    fn id(name: &str) -> RecordId {
        RecordId::root(&digest(name), 0)
    }

    /// A chain of so many steps, as builds left it: the record of each leads to that of the next.
    fn chain(dir: &std::path::Path, steps: usize) -> Records {
        let content = content::Store::open(&dir.join("content")).unwrap();
        let snapshots = Native::open(&dir.join("snapshots")).unwrap();
        let store = Store::open(
            dir,
            content,
            std::sync::Arc::new(snapshots),
            StoreOptions::default(),
        );
        let records = store.unwrap().records();
        let mut batch = Batch::new();
        for step in 0..steps {
            let link = cache::Link {
                input: 0,
                output: 0,
                digest: digest(&format!("op {step}")),
                selector: None,
            };
            let (from, to) = (id(&step.to_string()), id(&(step + 1).to_string()));
            batch.link(from.to_string(), link, to.to_string());
        }
        records.apply(batch).unwrap();
        records
    }

    #[test]
    fn records_that_are_too_many_are_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let records = chain(dir.path(), 9);
        let entry = CacheEntry {
            vertex: digest("vertex"),
            output: 0,
            digests: vec![digest("op 8")],
            inputs: vec![Vec::new()],
            result: None,
            stored: Vec::new(),
            records: vec![id("9")],
            created_at: std::time::UNIX_EPOCH,
            export: None,
        };
        let graph = CacheGraph {
            entries: vec![entry],
            roots: vec![0],
        };
        // Ten records, the first of which no step leads to.
        for (limit, written) in [(10, 10), (9, 0)] {
            let mut chains = Chains::<()>::default();
            let local = Local::new(&records, limit);
            let told = add_local(&mut chains, &graph, &[true], local).unwrap();
            assert_eq!(chains.records().len(), written, "{limit}");
            match told {
                None => assert_eq!(written, 10),
                Some(told) => assert!(told.starts_with("more than 9 records lead to"), "{told}"),
            }
        }
    }
}
