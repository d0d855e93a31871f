//! The records of an imported cache, in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::cache_import::{ImportContext, ImportedCache};
use build::error::BuildError;
use build::op::ResultRef;
use build::unlazy::FetchContext;
use cache::{LayerBlob, RefOptions, Store};
use export::image::LayerExporter;
use oci::Digest;
use solver::{FoundKey, Key, Query, RecordId, StoredResult};
use source::image::fetch::BlobFetcher;
use thiserror::Error;

use super::chains::{Chains, ItemId, ItemLink};
use super::config::{CacheConfig, ConfigRecord, nanoseconds, parse_time};

/// Layers that one result may have.
const MAX_LAYERS: usize = 10_000;

/// Why a cache's configuration cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A record that is not there.
    #[error("invalid record {index} as input of record {record}")]
    NoRecord {
        /// The record that refers to it.
        record: usize,
        /// The index.
        index: i64,
    },
    /// A layer that is not there.
    #[error("invalid layer {index}")]
    NoLayer {
        /// The index.
        index: i64,
    },
    /// A layer that stands on itself.
    #[error("invalid looping layer {index}")]
    LoopingLayer {
        /// Its index.
        index: usize,
    },
    /// An input without anything that identifies it.
    #[error("invalid empty input {input} of record {record}")]
    EmptyInput {
        /// The record.
        record: usize,
        /// The input.
        input: usize,
    },
}

/// Layers of a result, by index.
#[derive(Clone, Debug)]
enum Layers {
    /// A layer with all below it.
    Top(usize),
    /// A list, bottom first.
    List(Vec<usize>),
}

#[derive(Debug)]
struct ImportedResult {
    created_at: SystemTime,
    layers: Layers,
}

#[derive(Debug)]
struct ImportedRecord {
    /// `None`: the digest cannot be read, the record matches nothing.
    digest: Option<Digest>,
    id: RecordId,
    inputs: Vec<Vec<(usize, Option<Digest>)>>,
    results: Vec<ImportedResult>,
}

#[derive(Debug)]
struct ImportedLayer {
    /// `None`: nothing is known of the blob.
    blob: Option<LayerBlob>,
    parent: Option<usize>,
}

type LinkKey = (RecordId, usize, RecordId, Option<Digest>);

/// The records of one configuration.
#[derive(Debug, Default)]
pub struct ImportedRecords {
    layers: Vec<ImportedLayer>,
    records: Vec<ImportedRecord>,
    by_id: BTreeMap<RecordId, Vec<usize>>,
    children: BTreeMap<LinkKey, BTreeSet<usize>>,
    /// The records, inputs before those that use them; without those in circles.
    order: Vec<usize>,
}

impl ImportedRecords {
    /// Takes a configuration in. `part` keeps several of one cache apart; `blobs` are the layers that the cache has.
    /// Linear in the configuration.
    ///
    /// # Errors
    /// For indices that lead nowhere, or in circles.
    pub fn new(
        part: usize,
        config: CacheConfig,
        blobs: &BTreeMap<Digest, LayerBlob>,
    ) -> Result<Self, ConfigError> {
        let mut this = Self::default();
        let count = config.layers.len();
        for layer in config.layers {
            let parent = match layer.parent {
                -1 => None,
                index => Some(checked(index, count).ok_or(ConfigError::NoLayer { index })?),
            };
            let digest = layer.blob.parse::<Digest>().ok();
            let blob = digest.and_then(|digest| blobs.get(&digest)).cloned();
            this.layers.push(ImportedLayer { blob, parent });
        }
        let complete = complete_layers(&this.layers)?;
        let count = config.records.len();
        for (index, record) in config.records.into_iter().enumerate() {
            let imported = read_record(part, index, record, count, &complete)?;
            this.by_id.entry(imported.id).or_default().push(index);
            this.records.push(imported);
        }
        this.order = this.ordered();
        this.link();
        Ok(this)
    }

    /// How many results can be loaded.
    pub fn results(&self) -> usize {
        self.records.iter().map(|record| record.results.len()).sum()
    }

    fn link(&mut self) {
        for (index, record) in self.records.iter().enumerate() {
            let Some(digest) = record.digest else { continue };
            for (input, links) in record.inputs.iter().enumerate() {
                for (source, selector) in links {
                    let key = (self.records[*source].id, input, RecordId(digest), *selector);
                    self.children.entry(key).or_default().insert(index);
                }
            }
        }
    }

    fn ordered(&self) -> Vec<usize> {
        let mut order = Vec::with_capacity(self.records.len());
        let mut seen = vec![false; self.records.len()];
        for start in 0..self.records.len() {
            let mut open = vec![(start, false)];
            while let Some((index, inputs_done)) = open.pop() {
                if inputs_done {
                    order.push(index);
                } else if !std::mem::replace(&mut seen[index], true) {
                    open.push((index, true));
                    let links = self.records[index].inputs.iter().flatten();
                    open.extend(
                        links
                            .filter(|(source, _)| !seen[*source])
                            .map(|(source, _)| (*source, false)),
                    );
                }
            }
        }
        order
    }

    /// Records that answer a query, by id.
    fn found(&self, query: &Query) -> BTreeSet<usize> {
        match query {
            Query::Record(key) => self
                .by_id
                .get(&key.record)
                .into_iter()
                .flatten()
                .copied()
                .collect(),
            Query::Children(_, link) | Query::Candidates(_, link) => {
                let child = RecordId::root(&link.op, link.output);
                let key = (link.parent, link.input, child, link.selector);
                self.children.get(&key).cloned().unwrap_or_default()
            }
        }
    }

    /// The layers of a result, bottom first; `None` if one is not known.
    fn blobs(&self, layers: &Layers) -> Option<Vec<LayerBlob>> {
        let mut blobs = Vec::new();
        match layers {
            Layers::List(list) => {
                for index in list {
                    blobs.push(self.layers.get(*index)?.blob.clone()?);
                }
            }
            Layers::Top(top) => {
                let mut next = Some(*top);
                while let Some(index) = next {
                    let layer = self.layers.get(index)?;
                    blobs.push(layer.blob.clone()?);
                    if blobs.len() > MAX_LAYERS {
                        return None;
                    }
                    next = layer.parent;
                }
                blobs.reverse();
            }
        }
        Some(blobs)
    }

    /// Adds to what an export writes the further ways in which this cache knows the same steps.
    pub fn extend<R>(&self, chains: &mut Chains<R>) {
        let mut items: Vec<Option<ItemId>> = vec![None; self.records.len()];
        let mut needed = vec![false; self.records.len()];
        for index in &self.order {
            let record = &self.records[*index];
            let Some(digest) = record.digest else { continue };
            if record.inputs.is_empty() {
                items[*index] = chains.known_root(&digest);
            } else if let Some(inputs) = known_inputs(record, &items) {
                items[*index] = chains.matching(digest, &inputs).first().copied();
                needed[*index] = items[*index].is_some();
            }
        }
        // Those behind the known ones as well: they are other ways to get there.
        for index in self
            .order
            .iter()
            .rev()
            .filter(|index| needed[**index])
            .copied()
            .collect::<Vec<_>>()
        {
            let mut open = vec![index];
            while let Some(next) = open.pop() {
                for (source, _) in self.records[next].inputs.iter().flatten() {
                    if !std::mem::replace(&mut needed[*source], true) {
                        open.push(*source);
                    }
                }
            }
        }
        for index in &self.order {
            let record = &self.records[*index];
            let Some(digest) = record.digest.filter(|_| needed[*index]) else {
                continue;
            };
            if record.inputs.is_empty() {
                items[*index] = Some(chains.root(digest));
            } else if let Some(inputs) = known_inputs(record, &items) {
                items[*index] = chains.add(digest, &inputs);
            }
        }
    }
}

#[cfg(test)]
impl ImportedRecords {
    /// Ids of the records that answer a query.
    pub(super) fn ids(&self, query: &Query) -> Vec<RecordId> {
        let found = self.found(query).into_iter();
        found.map(|index| self.records[index].id).collect()
    }

    /// The results of the records that answer a query: digests of their layers, bottom first.
    pub(super) fn layers_of(&self, query: &Query) -> Vec<Vec<Digest>> {
        let found = self.found(query).into_iter();
        let results = found.flat_map(|index| &self.records[index].results);
        let layers = results.filter_map(|result| self.blobs(&result.layers));
        let digests = |layers: Vec<LayerBlob>| layers.iter().map(|layer| layer.descriptor.digest).collect();
        layers.map(digests).collect()
    }

    /// All layers that something is known of.
    pub(super) fn known_blobs(&self) -> impl Iterator<Item = &LayerBlob> {
        self.layers.iter().filter_map(|layer| layer.blob.as_ref())
    }

    /// When the results were made, in the order of the records.
    pub(super) fn times(&self) -> Vec<SystemTime> {
        let results = self.records.iter().flat_map(|record| &record.results);
        results.map(|result| result.created_at).collect()
    }
}

/// The inputs of a record as far as they are known; `None` if one is not known at all.
fn known_inputs(record: &ImportedRecord, items: &[Option<ItemId>]) -> Option<Vec<Vec<ItemLink>>> {
    let inputs = record.inputs.iter().map(|links| {
        let known = links
            .iter()
            .filter_map(|(source, selector)| Some((items[*source]?, *selector)));
        let known: Vec<ItemLink> = known.collect();
        (!known.is_empty()).then_some(known)
    });
    inputs.collect()
}

fn checked(index: i64, count: usize) -> Option<usize> {
    usize::try_from(index).ok().filter(|index| *index < count)
}

/// Which layers are known with all below them.
fn complete_layers(layers: &[ImportedLayer]) -> Result<Vec<bool>, ConfigError> {
    let mut complete: Vec<Option<bool>> = vec![None; layers.len()];
    let mut on_path = vec![false; layers.len()];
    for start in 0..layers.len() {
        let mut path = Vec::new();
        let mut next = Some(start);
        let mut below = true;
        while let Some(index) = next {
            if let Some(known) = complete[index] {
                below = known;
                break;
            }
            if std::mem::replace(&mut on_path[index], true) {
                return Err(ConfigError::LoopingLayer { index });
            }
            path.push(index);
            next = layers[index].parent;
        }
        for index in path.into_iter().rev() {
            below = below && layers[index].blob.is_some();
            complete[index] = Some(below);
        }
    }
    Ok(complete.into_iter().map(|known| known.unwrap_or(false)).collect())
}

fn read_record(
    part: usize,
    index: usize,
    record: ConfigRecord,
    count: usize,
    complete: &[bool],
) -> Result<ImportedRecord, ConfigError> {
    let layer = |index: i64| checked(index, complete.len()).ok_or(ConfigError::NoLayer { index });
    let mut results = Vec::new();
    for result in record.layers {
        let top = layer(result.layer)?;
        if complete[top] {
            let created_at = parse_time(&result.created_at);
            results.push(ImportedResult {
                created_at,
                layers: Layers::Top(top),
            });
        }
    }
    for chain in record.chains {
        let list = chain
            .layers
            .into_iter()
            .map(layer)
            .collect::<Result<Vec<_>, _>>()?;
        if !list.is_empty() && list.len() <= MAX_LAYERS {
            let created_at = parse_time(&chain.created_at);
            results.push(ImportedResult {
                created_at,
                layers: Layers::List(list),
            });
        }
    }
    let mut inputs = Vec::with_capacity(record.inputs.len());
    for (input, links) in record.inputs.into_iter().enumerate() {
        if links.is_empty() {
            return Err(ConfigError::EmptyInput { record: index, input });
        }
        let mut read = Vec::with_capacity(links.len());
        for link in links {
            let no_record = ConfigError::NoRecord {
                record: index,
                index: link.link,
            };
            let source = checked(link.link, count).ok_or(no_record)?;
            match link.selector.parse::<Digest>() {
                Ok(selector) => read.push((source, Some(selector))),
                Err(_) if link.selector.is_empty() => read.push((source, None)),
                // Selectors are digests: nothing can ask for another.
                Err(_) => {}
            }
        }
        inputs.push(read);
    }
    let digest = record.digest.parse::<Digest>().ok();
    let id = match digest {
        Some(digest) if inputs.is_empty() => RecordId(digest),
        _ => RecordId(Digest::sha256(format!("cooper.imported.v1\n{part}\n{index}"))),
    };
    Ok(ImportedRecord {
        digest,
        id,
        inputs,
        results,
    })
}

/// An imported cache: the records of its configurations, and where to make refs of its results.
#[derive(Debug)]
pub struct Imported {
    parts: Vec<Arc<ImportedRecords>>,
    store: Store,
    fetcher: BlobFetcher,
}

impl Imported {
    /// Puts a cache together, whose results go into the store of `layers`.
    pub fn new(parts: Vec<Arc<ImportedRecords>>, layers: &LayerExporter) -> Self {
        Self {
            parts,
            store: layers.store().clone(),
            fetcher: layers.fetcher().clone(),
        }
    }

    fn result(&self, name: &str) -> Option<(&ImportedRecords, &ImportedResult)> {
        let mut numbers = name.split('.').map(str::parse::<usize>);
        let mut number = || numbers.next()?.ok();
        let (part, record, result) = (number()?, number()?, number()?);
        let part = self.parts.get(part)?;
        Some((part, part.records.get(record)?.results.get(result)?))
    }
}

#[async_trait]
impl ImportedCache for Imported {
    fn answer(&self, query: &Query) -> Vec<FoundKey> {
        let store = query.store();
        let is_candidate = matches!(query, Query::Candidates(..));
        let mut found: BTreeMap<Key, Vec<StoredResult>> = BTreeMap::new();
        for (number, part) in self.parts.iter().enumerate() {
            for index in part.found(query) {
                let record = &part.records[index];
                let key = Key {
                    store,
                    record: record.id,
                };
                let results =
                    record
                        .results
                        .iter()
                        .enumerate()
                        .filter(|_| !is_candidate)
                        .map(|(result, imported)| StoredResult {
                            key,
                            result: format!("{number}.{index}.{result}"),
                            created_at_ns: nanoseconds(imported.created_at),
                        });
                found.entry(key).or_default().extend(results);
            }
        }
        found
            .into_iter()
            .map(|(key, results)| FoundKey { key, results })
            .collect()
    }

    async fn load(
        &self,
        ctx: &ImportContext,
        stored: &StoredResult,
    ) -> Result<Option<ResultRef>, BuildError> {
        let Some((part, result)) = self.result(&stored.result) else {
            return Ok(None);
        };
        let Some(layers) = part.blobs(&result.layers) else {
            return Ok(None);
        };
        let store = self.store.clone();
        let made = blocking(move || {
            store
                .from_blob_chain(&layers, &RefOptions::default())
                .map_err(internal)
        });
        let Some(made) = made.await? else {
            return Ok(None);
        };
        // What the cache promises may have expired since; a step is not cached before its bytes are proven.
        let is_there = self.fetcher.is_proven(&FetchContext::from(ctx), &made).await?;
        Ok(is_there.then(|| ResultRef::new(made)))
    }
}

/// The caches that the running builds imported, for their exports.
#[derive(Debug, Default)]
pub struct Imports(Mutex<Vec<(u64, Weak<ImportedRecords>)>>);

impl Imports {
    /// Remembers a cache for as long as somebody holds it.
    pub fn add(&self, job: u64, records: &Arc<ImportedRecords>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(_, records)| records.strong_count() > 0);
        known.push((job, Arc::downgrade(records)));
    }

    /// The caches of a build.
    pub fn of_job(&self, job: u64) -> Vec<Arc<ImportedRecords>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .filter(|(of, _)| *of == job)
            .filter_map(|(_, records)| records.upgrade())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use solver::{Link, StoreId};

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    fn blobs(names: &[&str]) -> BTreeMap<Digest, LayerBlob> {
        let blob = |name: &&str| {
            let blob = LayerBlob {
                descriptor: oci::Descriptor::new(oci::media_type::OCI_LAYER_GZIP, digest(name), 1),
                diff_id: digest(&format!("plain {name}")),
                providers: Vec::new(),
                description: String::new(),
                created_at: None,
            };
            (digest(name), blob)
        };
        names.iter().map(blob).collect()
    }

    fn read(json: &str, names: &[&str]) -> Result<ImportedRecords, ConfigError> {
        ImportedRecords::new(0, serde_json::from_str(json).unwrap(), &blobs(names))
    }

    #[test]
    fn a_chain_is_found_step_by_step() {
        let (base, run) = (
            RecordId::root(&digest("base"), 0),
            RecordId::root(&digest("run"), 1),
        );
        let text = format!(
            r#"{{"layers":[{{"blob":"{l0}","parent":-1}},{{"blob":"{l1}"}}],"records":[
                {{"digest":"{base}"}},
                {{"digest":"{run}","layers":[{{"layer":1,"createdAt":"1970-01-01T00:00:01Z"}}],"inputs":[[{{"link":0}}]]}}]}}"#,
            l0 = digest("l0"),
            l1 = digest("l1"),
        );
        let records = read(&text, &["l0", "l1"]).unwrap();
        let key = Key {
            store: StoreId(3),
            record: base,
        };
        assert_eq!(records.found(&Query::Record(key)).len(), 1);
        let link = Link {
            parent: base,
            input: 0,
            op: digest("run"),
            output: 1,
            selector: None,
        };
        let found = records.found(&Query::Children(StoreId(3), link));
        let result = &records.records[*found.first().unwrap()].results[0];
        let layers = records.blobs(&result.layers).unwrap();
        assert_eq!(layers.len(), 2);
        assert_eq!(layers[0].descriptor.digest, digest("l0"));
        let other = Link { output: 0, ..link };
        assert!(records.found(&Query::Children(StoreId(3), other)).is_empty());
        // Without its lower layer the result is not there.
        assert_eq!(read(&text, &["l1"]).unwrap().results(), 0);
    }

    #[test]
    fn hostile_configurations_are_refused_or_empty() {
        let refused = |json: &str| read(json, &["l0"]).unwrap_err();
        assert_eq!(
            refused(r#"{"layers":[{"parent":7}]}"#),
            ConfigError::NoLayer { index: 7 }
        );
        assert_eq!(
            refused(r#"{"layers":[{"parent":-2}]}"#),
            ConfigError::NoLayer { index: -2 }
        );
        assert_eq!(
            refused(r#"{"layers":[{"parent":1},{"parent":0}]}"#),
            ConfigError::LoopingLayer { index: 0 }
        );
        assert_eq!(
            refused(r#"{"layers":[{}]}"#),
            ConfigError::LoopingLayer { index: 0 }
        );
        assert_eq!(
            refused(r#"{"records":[{"inputs":[[{"link":1}]]}]}"#),
            ConfigError::NoRecord { record: 0, index: 1 }
        );
        assert_eq!(
            refused(r#"{"records":[{"inputs":[[]]}]}"#),
            ConfigError::EmptyInput { record: 0, input: 0 }
        );
        assert_eq!(
            refused(r#"{"records":[{"layers":[{"layer":0}]}]}"#),
            ConfigError::NoLayer { index: 0 }
        );
        assert_eq!(
            refused(r#"{"records":[{"chains":[{"layers":[-1]}]}]}"#),
            ConfigError::NoLayer { index: -1 }
        );
        // Circles of records, digests that are none, selectors that are none.
        let odd = r#"{"records":[{"digest":"random:x","inputs":[[{"link":1}]]},{"digest":"y","inputs":[[{"link":0}]]},
            {"inputs":[[{"link":2,"selector":"no digest"}]]}]}"#;
        let records = read(odd, &[]).unwrap();
        assert_eq!(records.results(), 0);
        records.extend(&mut Chains::<()>::default());
    }

    #[test]
    fn a_deep_configuration_takes_no_stack() {
        let mut config = CacheConfig::default();
        for index in 0..100_000 {
            let inputs = if index == 0 {
                Vec::new()
            } else {
                vec![vec![super::super::config::ConfigInput {
                    selector: String::new(),
                    link: index - 1,
                }]]
            };
            let digest = digest(&index.to_string()).to_string();
            config.records.push(ConfigRecord {
                digest,
                inputs,
                ..ConfigRecord::default()
            });
        }
        config.records.reverse();
        for record in &mut config.records {
            for link in record.inputs.iter_mut().flatten() {
                link.link = 99_999 - link.link;
            }
        }
        let records = ImportedRecords::new(0, config, &BTreeMap::new()).unwrap();
        let mut chains: Chains<()> = Chains::default();
        chains.root(digest("0"));
        records.extend(&mut chains);
        assert_eq!(chains.records().len(), 1);
    }

    #[test]
    fn other_ways_to_a_step_are_exported_again() {
        let json = format!(
            r#"{{"records":[{{"digest":"{a}"}},{{"digest":"{b}"}},{{"digest":"{run}","inputs":[[{{"link":0}},{{"link":1}}]]}}]}}"#,
            a = digest("a"),
            b = digest("b"),
            run = digest("run"),
        );
        let mut chains: Chains<()> = Chains::default();
        let root = chains.root(digest("a"));
        chains.add(digest("run"), &[vec![(root, None)]]).unwrap();
        read(&json, &[]).unwrap().extend(&mut chains);
        let records = chains.records();
        assert_eq!(records.len(), 3);
        assert!(
            records
                .iter()
                .any(|(_, record)| record.inputs.iter().any(|links| links.len() == 2))
        );
    }
}
