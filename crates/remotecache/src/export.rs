//! Exports of caches as manifests of their own: into registries, into directories at the client, into object stores.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::cache_export::{
    CacheEntry, CacheExportSource, CacheExported, CacheExporter, CacheExporterFactory, CacheMode,
};
use build::error::{BuildError, ErrorKind};
use build::export::ExportContext;
use build::op::ResultRef;
use build::progress::VertexWarning;
use build::session::SessionGroup;
use build::unlazy::FetchContext;
use bytes::Bytes;
use cache::Records;
use export::image::layers::{has_blobs, set_family};
use export::image::{ExportLayer, LayerExporter};
use futures_util::stream::{StreamExt, TryStreamExt, iter};
use oci::{Descriptor, Digest, Index, Manifest, Reference, media_type};
use source::image::Images;

use super::chains::{Chains, ItemResult};
use super::collect::{Visit, Walk, add_graph, add_known, candidate, is_unwanted, takes_result};
use super::config::{CacheConfig, ConfigLayer, ConfigResult, LayerAnnotations, wire_index};
use super::inline::UNCOMPRESSED;
use super::objects::{Connected, ObjectKind, Variable};
use super::omissions::Omissions;
use super::options::{ExportOptions, ManifestForm, read_export};
use super::place::{MAX_DOCUMENT_BYTES, Place};
use super::records::Imports;

/// The response: the manifest's descriptor.
const MANIFEST_KEY: &str = "cache.manifest";
/// Results whose layers are worked out at once.
const PARALLEL: usize = 4;

/// What exporters of manifests share.
#[derive(Clone, Debug)]
pub struct ExportParts {
    /// Where clients come from.
    pub images: Arc<Images>,
    /// Where layers come from.
    pub layers: LayerExporter,
    /// What the builds imported.
    pub imports: Arc<Imports>,
}

/// Makes exporters into registries (`type=registry`).
#[derive(Debug)]
pub struct RegistryFactory(pub ExportParts);

/// Makes exporters into directories at the client (`type=local`).
#[derive(Debug)]
pub struct LocalFactory(pub ExportParts);

/// Makes exporters into object stores.
#[derive(Debug)]
pub struct ObjectFactory {
    /// Which kind.
    pub kind: ObjectKind,
    /// What all exporters share.
    pub parts: ExportParts,
    /// The daemon's environment.
    pub variable: Variable,
    /// Sends requests.
    pub client: reqwest::Client,
}

/// Where an exporter writes to.
#[derive(Clone, Debug)]
enum Target {
    Registry(Reference),
    Directory(String),
    Objects(ObjectKind, Connected),
}

#[async_trait]
impl CacheExporterFactory for RegistryFactory {
    async fn resolve(
        &self,
        _: &SessionGroup,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<dyn CacheExporter>>, BuildError> {
        let options = read_export("registry", attrs, &["ref", "registry.insecure"])?;
        let target = Target::Registry(reference(attrs)?);
        Ok(Some(Arc::new(ManifestExporter {
            parts: self.0.clone(),
            options,
            target,
        })))
    }
}

#[async_trait]
impl CacheExporterFactory for LocalFactory {
    async fn resolve(
        &self,
        _: &SessionGroup,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<dyn CacheExporter>>, BuildError> {
        // The client itself keeps the directory's index, which is what tag and reset are about.
        let options = read_export("local", attrs, &["dest", "tag", "reset"])?;
        let dest = attrs.get("dest").filter(|dest| !dest.is_empty());
        let dest = dest.ok_or_else(|| BuildError::user("local cache exporter requires dest"))?;
        let target = Target::Directory(dest.clone());
        Ok(Some(Arc::new(ManifestExporter {
            parts: self.0.clone(),
            options,
            target,
        })))
    }
}

#[async_trait]
impl CacheExporterFactory for ObjectFactory {
    async fn resolve(
        &self,
        _: &SessionGroup,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<dyn CacheExporter>>, BuildError> {
        let options = read_export(self.kind.name(), attrs, self.kind.attributes())?;
        let connected = self.kind.connect(attrs, self.variable, &self.client)?;
        Ok(Some(Arc::new(ManifestExporter {
            parts: self.parts.clone(),
            options,
            target: Target::Objects(self.kind, connected),
        })))
    }
}

/// Reads the name of a cache in a registry.
pub(super) fn reference(attrs: &BTreeMap<String, String>) -> Result<Reference, BuildError> {
    let text = attrs
        .get("ref")
        .filter(|text| !text.is_empty())
        .ok_or_else(|| BuildError::user("missing ref"))?;
    let parsed = Reference::parse(text)
        .map_err(|error| BuildError::user(format!("failed to parse {text}: {error}")))?;
    Ok(parsed.with_default_tag())
}

#[derive(Debug)]
struct ManifestExporter {
    parts: ExportParts,
    options: ExportOptions,
    target: Target,
}

type Layers = Arc<[ExportLayer]>;

#[async_trait]
impl CacheExporter for ManifestExporter {
    fn name(&self) -> &str {
        match &self.target {
            Target::Registry(_) => "exporting cache to registry",
            Target::Directory(_) => "exporting cache to client directory",
            Target::Objects(kind, _) => kind.exporting(),
        }
    }

    fn ignores_errors(&self) -> bool {
        self.options.ignore_error
    }

    async fn export(
        &self,
        ctx: &ExportContext,
        source: &CacheExportSource,
    ) -> Result<CacheExported, BuildError> {
        let run = Run {
            exporter: self,
            ctx,
            source,
            fetch: FetchContext::from(ctx),
            omissions: Omissions::default(),
        };
        tokio::select! {
            exported = Box::pin(run.run()) => {
                let Some(mut response) = exported? else {
                    return Ok(CacheExported::Lacking);
                };
                response.extend(run.omissions.response()?);
                Ok(CacheExported::Done(response))
            }
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

/// One export.
struct Run<'a> {
    exporter: &'a ManifestExporter,
    ctx: &'a ExportContext,
    source: &'a CacheExportSource,
    fetch: FetchContext,
    omissions: Omissions,
}

impl Run<'_> {
    /// Exports; `None` when the source is renewable and layers cannot be had.
    async fn run(&self) -> Result<Option<BTreeMap<String, String>>, BuildError> {
        let pin = Arc::new(Mutex::new(self.exporter.parts.layers.store().pin(&[])));
        let chains = {
            let _step = self.ctx.progress.step("preparing build cache for export", "");
            self.chains(&pin).await?
        };
        let _step = self.ctx.progress.step("sending cache export", "");
        let place = self.place().await?;
        let missing = self.send_layers(&place, &chains).await?;
        self.omit_results(&chains, &missing);
        if self.source.renewable && self.omissions.has_unreadable() {
            return Ok(None);
        }
        self.omissions.tell(self.exporter.name(), &self.ctx.progress);
        if self.exporter.options.complete {
            self.omissions.check_complete()?;
        }
        let (config, layers) = write_config(&chains, |layer| !missing.contains_key(&layer.descriptor.digest));
        if config.layers.is_empty() {
            let _step = self
                .ctx
                .progress
                .step("skipping cache export for empty result", "");
            return Ok(Some(BTreeMap::new()));
        }
        if let Place::Objects(_) = &place {
            let bytes = oci::json::to_vec(&described(config, layers)).map_err(internal)?;
            self.warn_of_size(bytes.len());
            let descriptor = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, &bytes);
            let name = format!("writing cache manifest {}", descriptor.digest);
            let _step = self.ctx.progress.step(name, "");
            place.put_manifest(&descriptor, bytes.into()).await?;
            return Ok(Some(BTreeMap::new()));
        }
        let descriptor = self.send_manifest(&place, &config, layers).await?;
        let json = oci::json::to_string(&descriptor).map_err(internal)?;
        Ok(Some(BTreeMap::from([(MANIFEST_KEY.to_owned(), json)])))
    }

    async fn place(&self) -> Result<Place, BuildError> {
        match &self.exporter.target {
            Target::Registry(reference) => {
                let insecure = self.exporter.options.insecure;
                Ok(Place::registry(
                    &self.exporter.parts.images,
                    &self.ctx.sessions,
                    reference.clone(),
                    insecure,
                ))
            }
            Target::Directory(dir) => Place::client(&self.ctx.sessions, dir).await,
            Target::Objects(_, connected) => {
                connected.cache.prepare().await?;
                Ok(Place::Objects(connected.clone()))
            }
        }
    }

    /// Notes the records all of whose results lack a layer.
    fn omit_results(&self, chains: &Chains<Layers>, missing: &BTreeMap<Digest, String>) {
        if missing.is_empty() {
            return;
        }
        for (item, record) in chains.records() {
            let lacking = |result: &&ItemResult<Layers>| {
                let mut digests = result.value.iter().map(|layer| layer.descriptor.digest);
                digests.find_map(|digest| Some((digest, missing.get(&digest)?)))
            };
            let results = chains.results(item);
            let lost: Vec<_> = results.iter().filter_map(lacking).collect();
            if let Some((layer, why)) = lost.first()
                && lost.len() == results.len()
            {
                let reason = format!("layer {layer}: {why}");
                self.omissions.unreadable(record.digest.parse().ok(), reason);
            }
        }
    }

    async fn chains(&self, pin: &Arc<Mutex<cache::Pin>>) -> Result<Chains<Layers>, BuildError> {
        let graph = &self.source.graph;
        let mut visited = vec![false; graph.entries.len()];
        let mut results = BTreeMap::new();
        let mode = self.exporter.options.mode;
        let mut walk = Walk::new(graph, graph.roots.iter().copied(), mode);
        let mut later = Vec::new();
        while let Some((visit, entry)) = walk.step() {
            visited[visit.entry] = true;
            if visit.mode == CacheMode::Max {
                // What one step yields says nothing of others: they can be worked out side by side.
                later.push(visit);
                walk.found(visit, true);
                continue;
            }
            let result = self.result(visit, entry, pin).await?;
            walk.found(visit, result.is_some());
            results.extend(result.map(|result| (visit.entry, result)));
        }
        let worked = iter(later.into_iter().map(|visit| async move {
            let entry = &self.source.graph.entries[visit.entry];
            let result = self.result(visit, entry, pin).await?;
            Ok::<_, BuildError>(result.map(|result| (visit.entry, result)))
        }));
        let worked: Vec<_> = worked.buffered(PARALLEL).try_collect().await?;
        results.extend(worked.into_iter().flatten());
        let imported = self.exporter.parts.imports.of_job(self.source.job.number());
        let (graph, records) = (Arc::clone(graph), self.exporter.parts.layers.store().records());
        let (chains, omitted) = blocking(move || {
            let mut chains = Chains::default();
            add_graph(&mut chains, &graph, &visited, results);
            let omitted = add_known(&mut chains, &graph, &visited, &records, &imported)?;
            Ok((chains, omitted))
        })
        .await?;
        if let Some(omitted) = omitted {
            self.omissions.omit(None, omitted);
        }
        Ok(chains)
    }

    /// A step's result as layers; `None` if the mode does not ask for it, or it has none.
    async fn result(
        &self,
        visit: Visit,
        entry: &CacheEntry,
        pin: &Arc<Mutex<cache::Pin>>,
    ) -> Result<Option<ItemResult<Layers>>, BuildError> {
        if !takes_result(entry) {
            // What has layers already is taken along on the way to nothing that was asked for.
            if is_unwanted(entry) && visit.mode != CacheMode::RemoteOnly {
                self.omissions.unwanted(entry.vertex);
            }
            return Ok(None);
        }
        let options = self.exporter.options.layers;
        let mut offered = false;
        let accept = |result: &ResultRef| {
            offered = true;
            match result.get() {
                // An empty tree has no layers that could be exported.
                None => false,
                Some(reference) => visit.mode != CacheMode::RemoteOnly || has_blobs(reference, options),
            }
        };
        let Some(found) = candidate(self.source, entry, accept).await? else {
            if !offered && visit.mode != CacheMode::RemoteOnly {
                self.without_result(entry)?;
            }
            return Ok(None);
        };
        let Some(reference) = found.value.get() else {
            return Ok(None);
        };
        match self
            .exporter
            .parts
            .layers
            .layers(&self.fetch, reference, options, pin)
            .await
        {
            Ok(layers) if layers.is_empty() => Ok(None),
            Ok(layers) => Ok(Some(ItemResult {
                created_at: found.created_at,
                value: layers.into(),
            })),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unavailable) => {
                self.omissions.unreadable(Some(entry.vertex), error.to_string());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Notes a step of which there is no result, though the mode asks for it.
    fn without_result(&self, entry: &CacheEntry) -> Result<(), BuildError> {
        let reason = if !entry.stored.is_empty() {
            "what was cached of it is not there any more"
        } else if had_result(&self.exporter.parts.layers.store().records(), entry)? {
            "its result was removed from the cache here"
        } else {
            self.omissions.without(entry.vertex);
            return Ok(());
        };
        self.omissions.omit(Some(entry.vertex), reason.to_owned());
        Ok(())
    }

    /// Sends all layers; returns those that cannot be read, and why.
    async fn send_layers(
        &self,
        place: &Place,
        chains: &Chains<Layers>,
    ) -> Result<BTreeMap<Digest, String>, BuildError> {
        let (_, layers) = write_config(chains, |_| true);
        let unique: BTreeMap<Digest, ExportLayer> = layers
            .into_iter()
            .map(|layer| (layer.descriptor.digest, layer))
            .collect();
        let sending = unique.into_values().map(|layer| async move {
            let digest = layer.descriptor.digest;
            let _step = self.ctx.progress.step(format!("writing layer {digest}"), "");
            let missing = place
                .put_layer(self.ctx, &self.exporter.parts.layers, &layer)
                .await?;
            Ok::<_, BuildError>(missing.map(|why| (digest, why)))
        });
        let missing: Vec<_> = iter(sending)
            .buffer_unordered(place.parallel())
            .try_collect()
            .await?;
        Ok(missing.into_iter().flatten().collect())
    }

    /// Warns of a configuration that is larger than what we read ourselves; others may.
    fn warn_of_size(&self, size_bytes: usize) {
        if let Some(text) = too_large(size_bytes) {
            tracing::warn!(exporter = self.exporter.name(), "{text}");
            let progress = &self.ctx.progress;
            progress.warn(VertexWarning::short(progress.digest(), text));
        }
    }

    async fn send_manifest(
        &self,
        place: &Place,
        config: &CacheConfig,
        layers: Vec<ExportLayer>,
    ) -> Result<Descriptor, BuildError> {
        let bytes = Bytes::from(oci::json::to_vec(config).map_err(internal)?);
        self.warn_of_size(bytes.len());
        let config = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, &bytes);
        {
            let _step = self
                .ctx
                .progress
                .step(format!("writing config {}", config.digest), "");
            place.put_bytes(&config, bytes).await?;
        }
        let form = self.exporter.options.form;
        let layers = layers.into_iter().map(|layer| annotated(layer, form));
        let (descriptor, bytes) = manifest(config, layers.collect(), form)?;
        let kind = if form == ManifestForm::Image { "image " } else { "" };
        let _step = self
            .ctx
            .progress
            .step(format!("writing cache {kind}manifest {}", descriptor.digest), "");
        place.put_manifest(&descriptor, bytes).await?;
        Ok(descriptor)
    }
}

/// Says that a configuration is too large to be imported, if it is.
fn too_large(size_bytes: usize) -> Option<String> {
    let is_readable = u64::try_from(size_bytes).is_ok_and(|size| size <= MAX_DOCUMENT_BYTES);
    (!is_readable).then(|| {
        format!(
            "the cache's configuration takes {size_bytes} bytes, and imports read {MAX_DOCUMENT_BYTES} at most: \
             export fewer steps at once, or with mode=min"
        )
    })
}

/// Whether a step without a result had one here: only those of results are described, and a description stays as long as
/// its record.
fn had_result(records: &Records, entry: &CacheEntry) -> Result<bool, BuildError> {
    for id in &entry.records {
        if records.description(&id.to_string()).map_err(internal)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A configuration that stands alone: with what importers need to know of the layers.
fn described(mut config: CacheConfig, layers: Vec<ExportLayer>) -> CacheConfig {
    for (written, layer) in config.layers.iter_mut().zip(layers) {
        written.annotations = Some(LayerAnnotations {
            created_at: layer.created_text(),
            media_type: layer.descriptor.media_type,
            diff_id: layer.diff_id.to_string(),
            size: i64::try_from(layer.descriptor.size).unwrap_or(i64::MAX),
        });
    }
    config
}

/// A layer's descriptor with what importers need to know of it.
fn annotated(mut layer: ExportLayer, form: ManifestForm) -> Descriptor {
    set_family(&mut layer, form != ManifestForm::DockerList);
    let created_at = layer.created_text();
    let described = layer
        .descriptor
        .with_annotation(UNCOMPRESSED, layer.diff_id.to_string());
    described
        .with_annotation("buildkit/createdat", created_at)
        .with_annotation("buildkit/description", layer.description)
}

fn manifest(
    config: Descriptor,
    mut layers: Vec<Descriptor>,
    form: ManifestForm,
) -> Result<(Descriptor, Bytes), BuildError> {
    let kind = form.media_type();
    let json = if form == ManifestForm::Image {
        oci::json::to_vec(&Manifest::new(config, layers))
    } else {
        layers.push(config);
        let mut index = Index::new(layers);
        kind.clone_into(&mut index.media_type);
        oci::json::to_vec(&index)
    };
    let bytes = Bytes::from(json.map_err(internal)?);
    Ok((Descriptor::of_bytes(kind, &bytes), bytes))
}

/// Writes a configuration with each record's best result all of whose layers are wanted. Returns the layers in the
/// configuration's order.
pub fn write_config(
    chains: &Chains<Arc<[ExportLayer]>>,
    wanted: impl Fn(&ExportLayer) -> bool,
) -> (CacheConfig, Vec<ExportLayer>) {
    let mut writer = LayerWriter::default();
    let mut records = Vec::new();
    let mut tops = Vec::new();
    for (item, record) in chains.records() {
        let best = chains
            .results(item)
            .into_iter()
            .find(|result| result.value.iter().all(&wanted));
        tops.push(best.and_then(|result| Some((writer.add(&result.value)?, result.created_at))));
        records.push(record);
    }
    let (positions, layers, written) = writer.sorted();
    for (record, top) in records.iter_mut().zip(tops) {
        let Some((top, created_at)) = top else { continue };
        let layer = wire_index(positions.get(top).copied().unwrap_or(0));
        record.layers.push(ConfigResult {
            layer,
            created_at: oci::timestamp::from_system(created_at),
        });
    }
    (
        CacheConfig {
            layers: written,
            records,
        },
        layers,
    )
}

/// The layers of a configuration: one for each blob on each other.
#[derive(Default)]
struct LayerWriter {
    known: BTreeMap<(Option<usize>, Digest), usize>,
    layers: Vec<(ExportLayer, Option<usize>)>,
}

impl LayerWriter {
    /// Adds a result's layers; returns the topmost.
    fn add(&mut self, layers: &[ExportLayer]) -> Option<usize> {
        let mut parent = None;
        for layer in layers {
            let key = (parent, layer.descriptor.digest);
            let index = *self.known.entry(key).or_insert(self.layers.len());
            if index == self.layers.len() {
                self.layers.push((layer.clone(), parent));
            }
            parent = Some(index);
        }
        parent
    }

    /// The layers in the format's order, and where each went.
    fn sorted(self) -> (Vec<usize>, Vec<ExportLayer>, Vec<ConfigLayer>) {
        let mut order: Vec<usize> = (0..self.layers.len()).collect();
        order.sort_by_key(|index| {
            let (layer, parent) = &self.layers[*index];
            (layer.descriptor.digest, *parent)
        });
        let mut positions = vec![0; order.len()];
        for (position, index) in order.iter().enumerate() {
            positions[*index] = position;
        }
        let write = |index: &usize| {
            let (layer, parent) = &self.layers[*index];
            let parent = parent.map_or(-1, |parent| wire_index(positions[parent]));
            ConfigLayer {
                blob: layer.descriptor.digest.to_string(),
                parent,
                annotations: None,
            }
        };
        let written = order.iter().map(write).collect();
        let layers = order.iter().map(|index| self.layers[*index].0.clone()).collect();
        (positions, layers, written)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use cache::LayerBlob;

    use super::super::records::ImportedRecords;
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    fn step(name: &str, output: usize) -> Digest {
        solver::RecordId::root(&digest(name), output).0
    }

    fn layers(names: &[&str]) -> Layers {
        let layer = |name: &&str| ExportLayer {
            descriptor: Descriptor::new(media_type::DOCKER_LAYER_GZIP, digest(name), 1),
            diff_id: digest(&format!("plain {name}")),
            original_diff_id: digest(&format!("plain {name}")),
            providers: Vec::new(),
            description: "made".to_owned(),
            created_at: UNIX_EPOCH,
        };
        names.iter().map(layer).collect()
    }

    /// As BuildKit's own test: two sources, one step that reads a part of the second.
    fn chain() -> Chains<Layers> {
        let mut chains = Chains::default();
        for _ in 0..2 {
            let (foo, bar) = (chains.root(step("foo", 0)), chains.root(step("bar", 1)));
            let inputs = [vec![(foo, None)], vec![(bar, Some(digest("sel0")))]];
            let baz = chains.add(step("baz", 0), &inputs).unwrap();
            chains.add_result(
                baz,
                ItemResult {
                    created_at: UNIX_EPOCH,
                    value: layers(&["d0", "d1"]),
                },
            );
        }
        chains
    }

    #[test]
    fn a_small_chain_is_written_as_buildkit_does() {
        let (config, layers) = write_config(&chain(), |_| true);
        let names = [step("baz", 0), step("foo", 0), step("bar", 1)];
        let (d0, d1) = (digest("d0"), digest("d1"));
        assert!(names[0] < names[1] && names[1] < names[2] && d0 < d1);
        let expected = format!(
            concat!(
                r#"{{"layers":[{{"blob":"{d0}","parent":-1}},{{"blob":"{d1}"}}],"records":["#,
                r#"{{"layers":[{{"layer":1,"createdAt":"1970-01-01T00:00:00Z"}}],"digest":"{baz}","#,
                r#""inputs":[[{{"link":1}}],[{{"selector":"{sel}","link":2}}]]}},"#,
                r#"{{"digest":"{foo}"}},{{"digest":"{bar}"}}]}}"#
            ),
            d0 = d0,
            d1 = d1,
            baz = names[0],
            foo = names[1],
            bar = names[2],
            sel = digest("sel0"),
        );
        assert_eq!(oci::json::to_string(&config).unwrap(), expected);
        let described = annotated(layers[0].clone(), ManifestForm::Image);
        assert_eq!(described.media_type, media_type::OCI_LAYER_GZIP);
        assert_eq!(
            described.annotations[UNCOMPRESSED],
            digest("plain d0").to_string()
        );
    }

    #[test]
    fn what_is_written_can_be_read() {
        let (config, layers) = write_config(&chain(), |_| true);
        let blobs = layers.iter().map(|layer| {
            let blob = LayerBlob {
                descriptor: layer.descriptor.clone(),
                diff_id: layer.diff_id,
                providers: Vec::new(),
                description: String::new(),
                created_at: None,
            };
            (layer.descriptor.digest, blob)
        });
        let read = ImportedRecords::new(0, config.clone(), &blobs.collect()).unwrap();
        assert_eq!(read.results(), 1);
        // From any of its sources the whole graph is known again.
        let mut again: Chains<Layers> = Chains::default();
        let (foo, bar) = (again.root(step("foo", 0)), again.root(step("bar", 1)));
        again
            .add(
                step("baz", 0),
                &[vec![(foo, None)], vec![(bar, Some(digest("sel0")))]],
            )
            .unwrap();
        read.extend(&mut again);
        let (rewritten, _) = write_config(&again, |_| true);
        assert_eq!(rewritten.records.len(), 3);
        for (before, after) in config.records.iter().zip(&rewritten.records) {
            assert_eq!((&before.digest, &before.inputs), (&after.digest, &after.inputs));
        }
    }

    #[test]
    fn results_without_their_layers_are_left_out() {
        let (config, layers) = write_config(&chain(), |layer| layer.descriptor.digest != digest("d0"));
        assert!(config.layers.is_empty() && layers.is_empty());
        assert_eq!(config.records.len(), 3);
    }

    #[test]
    fn the_forms_of_a_manifest() {
        let config = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, b"{}");
        let form = |form| {
            let layer = annotated(layers(&["d0"])[0].clone(), form);
            let (descriptor, bytes) = manifest(config.clone(), vec![layer], form).unwrap();
            (
                descriptor.media_type,
                serde_json::from_slice::<serde_json::Value>(&bytes).unwrap(),
            )
        };
        let (kind, json) = form(ManifestForm::Image);
        assert_eq!(kind, media_type::OCI_MANIFEST);
        assert_eq!(json["config"]["mediaType"], media_type::BUILDKIT_CACHE_CONFIG);
        let (kind, json) = form(ManifestForm::DockerList);
        assert_eq!(kind, media_type::DOCKER_MANIFEST_LIST);
        assert_eq!(json["manifests"][0]["mediaType"], media_type::DOCKER_LAYER_GZIP);
        assert_eq!(
            json["manifests"][1]["mediaType"],
            media_type::BUILDKIT_CACHE_CONFIG
        );
        assert_eq!(form(ManifestForm::Index).0, media_type::OCI_INDEX);
    }

    /// How long this thread has run, in nanoseconds; the load of the machine does not count.
    fn ran_ns() -> u64 {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    /// Writes a cache of so many records and reads it again; returns the nanoseconds of both and the bytes written.
    ///
    /// The records are chains of a hundred steps on one base, every second step with a second input.
    fn round_trip(records: usize) -> (u64, usize) {
        let started = ran_ns();
        let mut chains: Chains<Layers> = Chains::default();
        let base = chains.root(step("base", 0));
        let mut last = base;
        for number in 1..records {
            let on = if number % 100 == 0 { base } else { last };
            let mut inputs = vec![vec![(on, None)]];
            if number % 2 == 0 {
                inputs.push(vec![(base, Some(digest("part")))]);
            }
            last = chains.add(step(&number.to_string(), 0), &inputs).unwrap();
            let own = format!("layer {number}");
            chains.add_result(
                last,
                ItemResult {
                    created_at: UNIX_EPOCH,
                    value: layers(&["base", &own]),
                },
            );
        }
        let (config, written) = write_config(&chains, |_| true);
        assert_eq!(config.records.len(), records);
        let bytes = oci::json::to_vec(&config).unwrap();
        let blobs = written.into_iter().map(|layer| {
            let blob = LayerBlob {
                descriptor: layer.descriptor.clone(),
                diff_id: layer.diff_id,
                providers: Vec::new(),
                description: String::new(),
                created_at: None,
            };
            (layer.descriptor.digest, blob)
        });
        let read: CacheConfig = serde_json::from_slice(&bytes).unwrap();
        let read = ImportedRecords::new(0, read, &blobs.collect()).unwrap();
        assert_eq!(read.results(), records - 1);
        (ran_ns() - started, bytes.len())
    }

    #[test]
    fn a_configuration_that_cannot_be_imported_is_told_of() {
        let most = usize::try_from(MAX_DOCUMENT_BYTES).unwrap();
        assert_eq!(too_large(most), None);
        assert!(too_large(most + 1).unwrap().contains("mode=min"));
    }

    /// Ten times the records take ten times the time and the bytes; twenty are allowed for what is beside it.
    #[test]
    fn work_is_linear_in_the_records() {
        let sizes: &[usize] = if cfg!(debug_assertions) {
            &[500, 5_000]
        } else {
            &[1_000, 10_000, 100_000]
        };
        let runs: Vec<(u64, usize)> = sizes.iter().map(|records| round_trip(*records)).collect();
        for pair in runs.windows(2) {
            assert!(pair[1].0 < 20 * pair[0].0, "{runs:?}");
            assert!(pair[1].1 < 11 * pair[0].1, "{runs:?}");
        }
    }
}
