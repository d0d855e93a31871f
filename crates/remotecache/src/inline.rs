//! The inline cache: records within an image's configuration, whose layers are the image's own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::cache_export::{CacheExportSource, CacheExported, CacheExporter, CacheExporterFactory, CacheMode};
use build::error::BuildError;
use build::export::{ExportContext, InlineCache};
use build::op::ResultRef;
use build::progress::VertexProgress;
use build::session::SessionGroup;
use bytes::Bytes;
use cache::Store;
use oci::{Descriptor, Digest};

use super::chains::{Chains, ItemResult};
use super::collect::{Walk, add_graph, add_known, candidate, takes_result};
use super::config::{ConfigChain, ConfigRecord, ConfigResult, wire_index};
use super::omissions::Omissions;
use super::options;
use super::records::Imports;

/// The annotation that tells the digest of a layer's uncompressed bytes.
pub(super) const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Makes inline cache exporters (`type=inline`).
#[derive(Clone, Debug)]
pub struct InlineFactory {
    store: Store,
    imports: Arc<Imports>,
}

impl InlineFactory {
    /// Exports records of a store.
    pub fn new(store: Store, imports: Arc<Imports>) -> Self {
        Self { store, imports }
    }
}

#[async_trait]
impl CacheExporterFactory for InlineFactory {
    async fn resolve(
        &self,
        _: &SessionGroup,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<dyn CacheExporter>>, BuildError> {
        let options = options::read_export("inline", attrs, &[])?;
        Ok(Some(Arc::new(InlineExporter {
            parts: self.clone(),
            ignore_error: options.ignore_error,
            complete: options.complete,
        })))
    }
}

#[derive(Debug)]
struct InlineExporter {
    parts: InlineFactory,
    ignore_error: bool,
    complete: bool,
}

#[async_trait]
impl CacheExporter for InlineExporter {
    fn name(&self) -> &str {
        EXPORTER
    }

    fn ignores_errors(&self) -> bool {
        self.ignore_error
    }

    fn inline(&self, source: &CacheExportSource) -> Option<Arc<dyn InlineCache>> {
        Some(Arc::new(InlineRecords {
            parts: self.parts.clone(),
            source: source.clone(),
            complete: self.complete,
            omissions: Mutex::default(),
        }))
    }

    async fn export(&self, _: &ExportContext, _: &CacheExportSource) -> Result<CacheExported, BuildError> {
        // All of it is in the image.
        Ok(CacheExported::Done(BTreeMap::new()))
    }
}

#[derive(Debug)]
struct InlineRecords {
    parts: InlineFactory,
    source: CacheExportSource,
    /// What is left out makes the export fail.
    complete: bool,
    /// What was left out, by platform.
    omissions: Mutex<BTreeMap<String, Omissions>>,
}

const EXPORTER: &str = "exporting inline cache";

#[async_trait]
impl InlineCache for InlineRecords {
    async fn records(
        &self,
        progress: &VertexProgress,
        key: &str,
        layers: &[Descriptor],
    ) -> Result<Option<Bytes>, BuildError> {
        let omissions = Omissions::default();
        let records = self.made(key, layers, &omissions).await?;
        omissions.tell(EXPORTER, progress);
        if self.complete {
            omissions.check_complete()?;
        }
        let mut all = self.omissions.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(key.to_owned(), omissions);
        Ok(records)
    }

    fn responses(&self) -> Result<Vec<BTreeMap<String, String>>, BuildError> {
        let all = self.omissions.lock().unwrap_or_else(PoisonError::into_inner);
        let responses = all.values().map(Omissions::response);
        responses.map(|entry| Ok(entry?.into_iter().collect())).collect()
    }
}

impl InlineRecords {
    /// Makes the records; notes what cannot be among them.
    async fn made(
        &self,
        key: &str,
        layers: &[Descriptor],
        omissions: &Omissions,
    ) -> Result<Option<Bytes>, BuildError> {
        let Some((_, root)) = self.source.results.get(key) else {
            omissions.nothing("the image has no inline cache: no step made it");
            return Ok(None);
        };
        let Some(image) = diff_ids(layers) else {
            let reason =
                "the image has no inline cache: it has layers whose uncompressed digest is not known";
            omissions.omit(None, reason.to_owned());
            return Ok(None);
        };
        let graph = &self.source.graph;
        let mut visited = vec![false; graph.entries.len()];
        let mut results: BTreeMap<usize, ItemResult<Vec<Digest>>> = BTreeMap::new();
        let mut walk = Walk::new(graph, [*root], CacheMode::RemoteOnly);
        while let Some((visit, entry)) = walk.step() {
            visited[visit.entry] = true;
            if !entry.inputs.is_empty() {
                let found = candidate(&self.source, entry, |result| {
                    packed_layers(result, &image).is_some()
                });
                if let Some(found) = found.await?
                    && let Some(layers) = packed_layers(&found.value, &image)
                {
                    let (created_at, value) = (found.created_at, layers);
                    if takes_result(entry) {
                        results.insert(visit.entry, ItemResult { created_at, value });
                    } else if value.iter().all(|layer| image.contains(layer)) {
                        omissions.unwanted(entry.vertex);
                    }
                }
            }
            walk.found(visit, false);
        }
        let imported = self.parts.imports.of_job(self.source.job.number());
        let (graph, records) = (Arc::clone(graph), self.parts.store.records());
        let written = blocking(move || {
            let mut chains = Chains::default();
            add_graph(&mut chains, &graph, &visited, results);
            let omitted = add_known(&mut chains, &graph, &visited, &records, &imported)?;
            Ok((inline_records(&chains, &image), omitted))
        });
        let (records, omitted) = written.await?;
        if let Some(omitted) = omitted {
            omissions.omit(None, omitted);
        }
        let Some(records) = records else {
            omissions.nothing("the image has no inline cache: no step's result consists of its layers");
            return Ok(None);
        };
        Ok(Some(serde_json::to_vec(&records).map_err(internal)?.into()))
    }
}

/// Digests of the image's uncompressed layers: results are recognized by them, however they are packed.
fn diff_ids(layers: &[Descriptor]) -> Option<Vec<Digest>> {
    let diff_id = |layer: &Descriptor| layer.annotations.get(UNCOMPRESSED)?.parse().ok();
    layers.iter().map(diff_id).collect()
}

/// The uncompressed layers of a result all of whose layers are packed; `None` also for one without any. Of a layer's blobs
/// that are not the same uncompressed, one that is in the image counts.
fn packed_layers(result: &ResultRef, image: &[Digest]) -> Option<Vec<Digest>> {
    let chain = result.get()?.layer_chain();
    let layers = chain.iter().map(|layer| {
        let blobs = layer.blobs();
        let first = layer.diff_id_of(&blobs.first()?.digest)?;
        let mut all = blobs.iter().filter_map(|blob| layer.diff_id_of(&blob.digest));
        Some(all.find(|diff_id| image.contains(diff_id)).unwrap_or(first))
    });
    layers
        .collect::<Option<Vec<_>>>()
        .filter(|layers| !layers.is_empty())
}

/// Writes the records, with those results that consist of the image's layers; `None` if there are none.
fn inline_records(chains: &Chains<Vec<Digest>>, image: &[Digest]) -> Option<Vec<ConfigRecord>> {
    let positions: BTreeMap<&Digest, usize> = image
        .iter()
        .enumerate()
        .map(|(position, digest)| (digest, position))
        .collect();
    let mut any = false;
    let mut records = Vec::new();
    for (item, mut record) in chains.records() {
        for result in chains.results(item) {
            let created_at = oci::timestamp::from_system(result.created_at);
            if image.starts_with(&result.value) {
                let layer = wire_index(result.value.len().saturating_sub(1));
                record.layers.push(ConfigResult { layer, created_at });
            } else {
                let layers = result
                    .value
                    .iter()
                    .map(|digest| positions.get(digest).copied().map(wire_index));
                let Some(layers) = layers.collect() else { continue };
                record.chains.push(ConfigChain { layers, created_at });
            }
            any = true;
            break;
        }
        records.push(record);
    }
    any.then_some(records)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    fn result(layers: &[&str], seconds: u64) -> ItemResult<Vec<Digest>> {
        ItemResult {
            created_at: UNIX_EPOCH + Duration::from_secs(seconds),
            value: layers.iter().map(|layer| digest(layer)).collect(),
        }
    }

    #[test]
    fn results_are_layers_of_the_image() {
        let mut chains = Chains::default();
        let root = chains.root(digest("base"));
        let mut add = |name: &str, results: Vec<ItemResult<Vec<Digest>>>| {
            let item = chains.add(digest(name), &[vec![(root, None)]]).unwrap();
            for result in results {
                chains.add_result(item, result);
            }
        };
        add("prefix", vec![result(&["a", "b"], 1), result(&["elsewhere"], 2)]);
        add("picked", vec![result(&["a", "c"], 3)]);
        add("absent", vec![result(&["z"], 4)]);
        let image = [digest("a"), digest("b"), digest("c")];
        let records = inline_records(&chains, &image).unwrap();
        let of = |name: &str| {
            records
                .iter()
                .find(|record| record.digest == digest(name).to_string())
                .unwrap()
        };
        let created_at = "1970-01-01T00:00:01Z".to_owned();
        assert_eq!(of("prefix").layers, [ConfigResult { layer: 1, created_at }]);
        assert_eq!(of("picked").chains[0].layers, [0, 2]);
        assert!(of("absent").layers.is_empty() && of("absent").chains.is_empty());
        assert_eq!(inline_records(&chains, &[]), None);
    }
}
