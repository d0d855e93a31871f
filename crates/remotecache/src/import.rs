//! Imports of caches: manifests of their own, and records within images.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use build::cache_import::{CacheImporter, ImportContext, ImportedCache};
use build::error::BuildError;
use build::progress::VertexWarning;
use cache::{LayerBlob, Provider};
use layer::compress::estargz::keep_annotations;
use oci::{Descriptor, Digest, Index, Manifest, media_type};
use serde::Deserialize;
use source::image::{kind_of, registry_error};

use super::config::{CacheConfig, ConfigLayer, ConfigRecord, parse_time, wire_index};
use super::export::{ExportParts, reference};
use super::inline::UNCOMPRESSED;
use super::options::{check_import, is_set};
use super::place::Place;
use super::records::{Imported, ImportedRecords};

/// Images of one index whose caches are imported.
const MAX_IMAGES: usize = 256;
/// Indexes within indexes are followed this deep.
const MAX_DEPTH: usize = 4;
const CREATED_AT: &str = "buildkit/createdat";
const DESCRIPTION: &str = "buildkit/description";
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// Imports from registries (`type=registry`): caches, and images that contain one.
#[derive(Debug)]
pub struct RegistryImporter(pub ExportParts);

/// Imports from directories at the client (`type=local`).
#[derive(Debug)]
pub struct LocalImporter(pub ExportParts);

#[async_trait]
impl CacheImporter for RegistryImporter {
    fn name(&self, attrs: &BTreeMap<String, String>) -> String {
        reference(attrs)
            .map(|reference| reference.to_string())
            .unwrap_or_default()
    }

    async fn import(
        &self,
        ctx: &ImportContext,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ImportedCache>, BuildError> {
        check_import("registry", attrs, &["ref", "registry.insecure"])?;
        let reference = reference(attrs)?;
        let insecure = is_set(attrs, "registry.insecure")?;
        let place = Place::registry(&self.0.images, &ctx.sessions, reference.clone(), insecure);
        let importing = async {
            let mut client = self.0.images.client(&ctx.sessions);
            if insecure {
                client = client.with_insecure(reference.domain());
            }
            let root = client.resolve(&reference).await.map_err(registry_error)?;
            import(ctx, &self.0, &place, root).await
        };
        tokio::select! {
            imported = importing => imported,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

#[async_trait]
impl CacheImporter for LocalImporter {
    fn name(&self, attrs: &BTreeMap<String, String>) -> String {
        format!(
            "local:{}",
            attrs.get("src").map(String::as_str).unwrap_or_default()
        )
    }

    async fn import(
        &self,
        ctx: &ImportContext,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ImportedCache>, BuildError> {
        check_import("local", attrs, &["src", "digest", "tag"])?;
        let attr = |name: &str, missing: &str| {
            let value = attrs.get(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| BuildError::user(missing))
        };
        // The client finds a tag's digest in the index.
        let digest = attr("digest", "local cache importer requires explicit digest")?;
        let digest: Digest = digest.parse().map_err(|error| {
            BuildError::user(format!("invalid digest {digest:?} of a local cache: {error}"))
        })?;
        let src = attr("src", "local cache importer requires src")?;
        let importing = async {
            let place = Place::client(&ctx.sessions, src).await?;
            import(ctx, &self.0, &place, Descriptor::new("", digest, 0)).await
        };
        tokio::select! {
            imported = importing => imported,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

async fn import(
    ctx: &ImportContext,
    parts: &ExportParts,
    place: &Place,
    root: Descriptor,
) -> Result<Arc<dyn ImportedCache>, BuildError> {
    let mut importing = Importing {
        ctx,
        place,
        provider: place.provider(),
        found: Vec::new(),
    };
    importing.root(&root).await?;
    Ok(finish(ctx, parts, importing.found))
}

/// Puts together what an import found.
pub(super) fn finish(
    ctx: &ImportContext,
    parts: &ExportParts,
    found: Vec<ImportedRecords>,
) -> Arc<dyn ImportedCache> {
    let records: Vec<Arc<ImportedRecords>> = found.into_iter().map(Arc::new).collect();
    if records.iter().all(|records| records.results() == 0) {
        warn(ctx, "no results were found in this cache");
    }
    for job in &ctx.jobs {
        for records in &records {
            parts.imports.add(job.number(), records);
        }
    }
    Arc::new(Imported::new(records, &parts.layers))
}

pub(super) fn warn(ctx: &ImportContext, text: impl Into<String>) {
    ctx.progress
        .warn(VertexWarning::short(ctx.progress.digest(), text));
}

/// One import. What it finds broken is warned of and left out.
struct Importing<'a> {
    ctx: &'a ImportContext,
    place: &'a Place,
    provider: Provider,
    found: Vec<ImportedRecords>,
}

impl Importing<'_> {
    async fn root(&mut self, root: &Descriptor) -> Result<(), BuildError> {
        let bytes = self.place.read(root, true).await?;
        let kind = kind_of(root, &bytes)?;
        drop(
            self.ctx
                .progress
                .step(format!("inferred cache manifest type: {kind}"), ""),
        );
        let (config, layers) = if media_type::is_index(&kind) {
            let index: Index = parse(root, &bytes)?;
            let is_config = |entry: &Descriptor| entry.media_type == media_type::BUILDKIT_CACHE_CONFIG;
            let (configs, layers): (Vec<_>, Vec<_>) = index.manifests.into_iter().partition(is_config);
            match configs.into_iter().next_back() {
                Some(config) => (config, layers),
                None => return self.images(layers).await,
            }
        } else {
            let manifest: Manifest = parse(root, &bytes)?;
            if manifest.config.media_type != media_type::BUILDKIT_CACHE_CONFIG {
                return self.image(&manifest).await;
            }
            (manifest.config, manifest.layers)
        };
        let bytes = self.place.read(&config, false).await?;
        let blobs = layers
            .into_iter()
            .filter_map(|layer| Some((layer.digest, self.blob(layer)?)))
            .collect();
        match serde_json::from_slice::<CacheConfig>(&bytes) {
            Ok(config) => self.add(config, &blobs),
            Err(error) => warn(
                self.ctx,
                format!("cache configuration {} is ignored: {error}", config.digest),
            ),
        }
        Ok(())
    }

    fn add(&mut self, config: CacheConfig, blobs: &BTreeMap<Digest, LayerBlob>) {
        match ImportedRecords::new(self.found.len(), config, blobs) {
            Ok(records) => self.found.push(records),
            Err(error) => warn(self.ctx, format!("cache configuration is ignored: {error}")),
        }
    }

    /// What is known of a layer by its annotations; `None` without the digest of its uncompressed bytes.
    fn blob(&self, mut layer: Descriptor) -> Option<LayerBlob> {
        let mut annotations = std::mem::take(&mut layer.annotations);
        let diff_id = annotations.get(UNCOMPRESSED)?.parse().ok()?;
        let description = annotations.remove(DESCRIPTION);
        let created_at = annotations.get(CREATED_AT).map(|text| parse_time(text));
        keep_annotations(&mut annotations);
        layer.annotations = annotations;
        Some(LayerBlob {
            diff_id,
            providers: vec![self.provider.clone()],
            description: description.unwrap_or_else(|| format!("imported {}", layer.digest)),
            created_at,
            descriptor: layer,
        })
    }

    /// Imports the caches of all images of an index.
    async fn images(&mut self, manifests: Vec<Descriptor>) -> Result<(), BuildError> {
        let mut open: Vec<(Descriptor, usize)> =
            manifests.into_iter().rev().map(|entry| (entry, 1)).collect();
        let mut seen = BTreeSet::new();
        while let Some((entry, depth)) = open.pop() {
            if entry.annotations.contains_key(REFERENCE_TYPE) || !seen.insert(entry.digest) {
                continue;
            }
            if seen.len() > MAX_IMAGES || depth > MAX_DEPTH {
                warn(
                    self.ctx,
                    "the index has too many images: not all of their caches are imported",
                );
                return Ok(());
            }
            let bytes = match self.place.read(&entry, true).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    warn(self.ctx, format!("manifest {} is ignored: {error}", entry.digest));
                    continue;
                }
            };
            let kind = kind_of(&entry, &bytes)?;
            if media_type::is_index(&kind) {
                let index: Index = parse(&entry, &bytes)?;
                open.extend(index.manifests.into_iter().rev().map(|entry| (entry, depth + 1)));
            } else {
                self.image(&parse(&entry, &bytes)?).await?;
            }
        }
        Ok(())
    }

    /// Imports the cache of an image, if it has one.
    async fn image(&mut self, manifest: &Manifest) -> Result<(), BuildError> {
        if manifest.layers.is_empty() {
            return Ok(());
        }
        let bytes = self.place.read(&manifest.config, false).await?;
        let digest = manifest.config.digest;
        let image: ImageWithCache = match serde_json::from_slice(&bytes) {
            Ok(image) => image,
            Err(error) => {
                warn(
                    self.ctx,
                    format!("image configuration {digest} is ignored: {error}"),
                );
                return Ok(());
            }
        };
        let Some(records) = image.cache.as_deref().filter(|records| !records.is_empty()) else {
            return Ok(());
        };
        if image.rootfs.diff_ids.len() != manifest.layers.len() {
            warn(
                self.ctx,
                format!("image configuration {digest} is ignored: it has other layers than its manifest"),
            );
            return Ok(());
        }
        let decoded = STANDARD.decode(records).map_err(|error| error.to_string());
        let records = decoded.and_then(|records| {
            serde_json::from_slice::<Vec<ConfigRecord>>(&records).map_err(|error| error.to_string())
        });
        let records = match records {
            Ok(records) => records,
            Err(error) => {
                warn(self.ctx, format!("inline cache of {digest} is ignored: {error}"));
                return Ok(());
            }
        };
        let (layers, blobs) = self.image_layers(manifest, &image);
        self.add(CacheConfig { layers, records }, &blobs);
        Ok(())
    }

    fn image_layers(
        &self,
        manifest: &Manifest,
        image: &ImageWithCache,
    ) -> (Vec<ConfigLayer>, BTreeMap<Digest, LayerBlob>) {
        let mut history = image.history.iter().filter(|entry| !entry.empty_layer);
        let mut layers = Vec::new();
        let mut blobs = BTreeMap::new();
        for (index, (layer, diff_id)) in manifest.layers.iter().zip(&image.rootfs.diff_ids).enumerate() {
            let made = history.next();
            let description = made
                .map(|made| made.created_by.clone())
                .filter(|text| !text.is_empty());
            let mut descriptor = layer.clone();
            keep_annotations(&mut descriptor.annotations);
            let blob = LayerBlob {
                descriptor,
                diff_id: *diff_id,
                providers: vec![self.provider.clone()],
                description: description.unwrap_or_else(|| format!("imported {}", layer.digest)),
                created_at: made.and_then(|made| made.created.as_deref()).map(parse_time),
            };
            blobs.insert(layer.digest, blob);
            layers.push(ConfigLayer {
                blob: layer.digest.to_string(),
                parent: wire_index(index) - 1,
                annotations: None,
            });
        }
        (layers, blobs)
    }
}

/// What an import reads of an image's configuration.
#[derive(Debug, Deserialize)]
struct ImageWithCache {
    #[serde(default)]
    rootfs: RootFs,
    #[serde(default, rename = "moby.buildkit.cache.v0")]
    cache: Option<String>,
    #[serde(default, deserialize_with = "oci::json::nullable")]
    history: Vec<HistoryEntry>,
}

#[derive(Debug, Default, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "oci::json::nullable")]
    diff_ids: Vec<Digest>,
}

#[derive(Debug, Deserialize)]
struct HistoryEntry {
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    created_by: String,
    #[serde(default)]
    empty_layer: bool,
}

fn parse<'a, T: Deserialize<'a>>(descriptor: &Descriptor, bytes: &'a [u8]) -> Result<T, BuildError> {
    serde_json::from_slice(bytes)
        .map_err(|error| BuildError::user(format!("failed to parse {}: {error}", descriptor.digest)))
}

#[cfg(test)]
mod tests;
