//! Makes an image of a build's result: layers, configurations, manifests, an index where there is more than one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::export::{ExportContext, ExportSource, HeldBlobs};
use build::op::ResultRef;
use build::progress::VertexProgress;
use build::unlazy::FetchContext;
use bytes::Bytes;
use cache::Pin;
use content::Durability;
use futures_util::future::try_join_all;
use layer::tree::Timestamp;
use oci::{Descriptor, Digest, ImageConfig, Manifest, Platform, media_type};
use serde::Serialize;

use super::annotations::{Annotations, PlatformAnnotations};
use super::attestations;
use super::config::{ConfigSource, default_config, patch};
use super::layers::{ExportLayer, LayerExporter, missing_ref, set_family};
use super::options::ImageOptions;
use crate::platforms::{self, ExportPlatform, IMAGE_CONFIG_KEY, PLATFORMS_KEY};

/// Metadata: the configuration of the image below; with `/ID` for one of several platforms.
const BASE_CONFIG_KEY: &str = "containerimage.base.config";
/// Annotation of a layer whose times were rewritten: the epoch in seconds, as BuildKit names it.
const REWRITTEN_ANNOTATION: &str = "buildkit/rewritten-timestamp";

/// An image ready to be sent somewhere. Its blobs are held as long as this lives.
#[derive(Clone, Debug)]
pub struct WrittenImage {
    /// Describes the manifest or index.
    pub root: Descriptor,
    /// The configuration's digest, of an image without index.
    pub config_digest: Option<Digest>,
    /// The layers of all manifests, each once.
    pub layers: Vec<ExportLayer>,
    /// Configurations and attestations.
    pub blobs: Vec<(Descriptor, Bytes)>,
    /// Manifests, those referred to before those that refer; the root is the last.
    pub manifests: Vec<(Descriptor, Bytes)>,
    pin: Arc<Mutex<Pin>>,
}

impl WrittenImage {
    /// Returns what holds the image's blobs.
    pub fn held(&self) -> HeldBlobs {
        HeldBlobs::new(Arc::clone(&self.pin))
    }
}

/// One platform's part of the result.
struct Part {
    platform: ExportPlatform,
    reference: ResultRef,
    layers: Vec<ExportLayer>,
}

/// Writes one image.
pub struct ImageWriter<'a> {
    exporter: &'a LayerExporter,
    ctx: &'a ExportContext,
    options: &'a ImageOptions,
    annotations: Annotations,
    source: ExportSource,
    image: WrittenImage,
}

impl<'a> ImageWriter<'a> {
    /// Prepares to write the image of a result.
    ///
    /// # Errors
    /// A user error for metadata or annotations that do not fit.
    pub fn new(
        exporter: &'a LayerExporter,
        ctx: &'a ExportContext,
        options: &'a ImageOptions,
        source: &ExportSource,
    ) -> Result<Self, BuildError> {
        let mut source = source.clone();
        source.metadata = options.metadata(&source.metadata);
        let mut annotations = options.annotations.clone();
        let mut given = Annotations::default();
        for (key, value) in &source.metadata {
            if key.starts_with("annotation") {
                given.read(key, &String::from_utf8_lossy(value))?;
            }
        }
        annotations.merge(given);
        if !options.uses_oci_types() && annotations.needs_oci_types() {
            return Err(BuildError::user(
                "cannot export annotations with \"oci-mediatypes=false\"",
            ));
        }
        let pin = exporter.store().pin(&[]);
        let image = WrittenImage {
            root: Descriptor::new("", Digest::sha256(""), 0),
            config_digest: None,
            layers: Vec::new(),
            blobs: Vec::new(),
            manifests: Vec::new(),
            pin: Arc::new(Mutex::new(pin)),
        };
        Ok(Self {
            exporter,
            ctx,
            options,
            annotations,
            source,
            image,
        })
    }

    /// Metadata of the result as the attributes override it.
    pub fn metadata(&self) -> &BTreeMap<String, Bytes> {
        &self.source.metadata
    }

    /// Writes the image.
    ///
    /// # Errors
    /// A user error when the result does not make an image, else what fetching and packing layers fails with.
    pub async fn write(mut self) -> Result<WrittenImage, BuildError> {
        let is_map = !self.source.refs.is_empty();
        if is_map && !self.source.metadata.contains_key(PLATFORMS_KEY) {
            return Err(BuildError::user(
                "unable to export multiple refs, missing platforms mapping",
            ));
        }
        let platforms = platforms::platforms(&self.source.metadata)?;
        let known: Vec<String> = self.annotations.platforms().map(str::to_owned).collect();
        for id in known {
            if !platforms.iter().any(|platform| platform.id == id) {
                let text = format!("invalid annotation: no platform {id} found in source");
                return Err(BuildError::user(text));
            }
        }
        let attested = platforms.iter().any(|platform| {
            let found = self.source.attestations.get(&platform.id);
            found.is_some_and(|found| {
                found
                    .iter()
                    .any(|one| self.options.force_inline_attestations || !attestations::is_inline_only(one))
            })
        });
        if !is_map && !attested && platforms.len() > 1 {
            return Err(BuildError::user(
                "cannot export multiple platforms without multi-platform enabled",
            ));
        }
        let mut parts = Vec::new();
        for platform in platforms {
            let reference = self.reference(&platform, is_map)?;
            parts.push(Part {
                platform,
                reference,
                layers: Vec::new(),
            });
        }
        self.export_layers(&mut parts).await?;
        if is_map || attested {
            self.write_index(parts).await?;
        } else if let Some(part) = parts.pop() {
            self.write_single(part).await?;
        }
        self.store_documents().await?;
        Ok(self.image)
    }

    fn reference(&self, platform: &ExportPlatform, is_map: bool) -> Result<ResultRef, BuildError> {
        let known = !is_map || self.source.refs.contains_key(&platform.id) || self.source.refs.len() == 1;
        if !known {
            return Err(missing_ref(&platform.id));
        }
        Ok(self
            .source
            .find(&platform.id)
            .cloned()
            .unwrap_or(ResultRef::SCRATCH))
    }

    async fn export_layers(&mut self, parts: &mut [Part]) -> Result<(), BuildError> {
        let fetch = FetchContext::from(self.ctx);
        let (exporter, options, pin) = (self.exporter, self.options.layers, Arc::clone(&self.image.pin));
        {
            let _step = self.ctx.progress.step("exporting layers", "");
            let work = parts.iter().map(|part| {
                let (fetch, pin) = (&fetch, &pin);
                async move {
                    match part.reference.get() {
                        Some(reference) => exporter.layers(fetch, reference, options, pin).await,
                        None => Ok(Vec::new()),
                    }
                }
            });
            let layers = try_join_all(work).await?;
            for (part, layers) in parts.iter_mut().zip(layers) {
                part.layers = layers;
            }
        }
        for part in parts {
            if self.options.rewrite_timestamp {
                self.rewrite_layers(&fetch, part).await?;
            }
            for layer in &mut part.layers {
                set_family(layer, self.options.uses_oci_types());
                if !self.options.uses_oci_types() {
                    // Docker's manifests have none.
                    layer.descriptor.annotations.clear();
                }
            }
        }
        Ok(())
    }

    async fn rewrite_layers(&self, fetch: &FetchContext, part: &mut Part) -> Result<(), BuildError> {
        let Some(epoch) = self.epoch(&part.platform)? else {
            tracing::warn!("rewrite-timestamp is specified, but no source-date-epoch was found");
            return Ok(());
        };
        let text = go_time(epoch);
        let name = format!(
            "rewriting layers with source-date-epoch {} ({text})",
            epoch.seconds
        );
        let _step = self.ctx.progress.step(name, "");
        let base = self.base_config(&part.platform)?;
        let below = base.map(|base| base.rootfs.diff_ids).unwrap_or_default();
        let shared = part
            .layers
            .iter()
            .zip(&below)
            .take_while(|(layer, id)| layer.original_diff_id == **id)
            .count();
        let (options, pin) = (self.options.layers, &self.image.pin);
        let work = part.layers.iter().skip(shared);
        let work = work.map(|layer| self.exporter.rewrite(fetch, layer, options, epoch, pin));
        let mut rewritten = try_join_all(work).await?;
        if self.options.uses_oci_types() {
            for layer in &mut rewritten {
                let annotations = &mut layer.descriptor.annotations;
                annotations.insert(REWRITTEN_ANNOTATION.to_owned(), epoch.seconds.to_string());
            }
        }
        part.layers.truncate(shared);
        part.layers.extend(rewritten);
        Ok(())
    }

    fn epoch(&self, platform: &ExportPlatform) -> Result<Option<Timestamp>, BuildError> {
        match self.options.epoch {
            Some(epoch) => Ok(epoch),
            None => platforms::epoch(&self.source, Some(&platform.id)),
        }
    }

    fn base_config(&self, platform: &ExportPlatform) -> Result<Option<ImageConfig>, BuildError> {
        match platforms::metadata(&self.source, BASE_CONFIG_KEY, Some(&platform.id)) {
            Some(bytes) if !bytes.is_empty() => serde_json::from_slice(bytes).map(Some).map_err(|error| {
                BuildError::from_source(ErrorKind::User, error)
                    .context("failed to unmarshal base image config")
            }),
            _ => Ok(None),
        }
    }

    async fn write_single(&mut self, part: Part) -> Result<(), BuildError> {
        let annotations = self.annotations.of(None);
        if !annotations.index.is_empty() || !annotations.index_descriptor.is_empty() {
            return Err(BuildError::user(
                "index annotations not supported for single platform export",
            ));
        }
        let platform = part.platform.platform.clone();
        let (mut descriptor, config) = self.write_manifest(part, annotations).await?;
        descriptor.platform = Some(platform);
        self.image.config_digest = Some(config);
        self.image.root = descriptor;
        Ok(())
    }

    async fn write_index(&mut self, parts: Vec<Part>) -> Result<(), BuildError> {
        if !self.options.uses_oci_types() && !self.source.attestations.is_empty() {
            return Err(BuildError::user(
                "cannot export attestations with \"oci-mediatypes=false\"",
            ));
        }
        let mut manifests = Vec::new();
        let mut attested = Vec::new();
        for part in parts {
            let platform = part.platform.clone();
            let annotations = self.annotations.of(Some(&platform.platform));
            let layers = part.layers.clone();
            let (mut descriptor, _) = self.write_manifest(part, annotations).await?;
            descriptor.platform = Some(platform.platform.clone());
            let found = self
                .source
                .attestations
                .get(&platform.id)
                .cloned()
                .unwrap_or_default();
            if self.source.attestations.contains_key(&platform.id) {
                let fetch = FetchContext::from(self.ctx);
                let of = attestations::Target {
                    descriptor: &descriptor,
                    platform: &platform.platform,
                    name: &self.options.name,
                    layers: &layers,
                };
                let statements = attestations::statements(self.exporter, &fetch, found, &of).await?;
                attested.push(self.write_attestations(&descriptor, statements)?);
            }
            manifests.push(descriptor);
        }
        manifests.extend(attested);
        let annotations = self.annotations.of(None);
        let kind = if self.options.uses_oci_types() {
            media_type::OCI_INDEX
        } else {
            media_type::DOCKER_MANIFEST_LIST
        };
        let mut index = oci::Index::new(manifests);
        index.media_type = kind.to_owned();
        index.annotations = annotations.index;
        let bytes: Bytes = oci::json::to_vec_indent(&index, "  ").map_err(internal)?.into();
        let mut descriptor = Descriptor::of_bytes(kind, &bytes);
        let _step = self
            .ctx
            .progress
            .step(format!("exporting manifest list {}", descriptor.digest), "");
        descriptor.annotations = annotations.index_descriptor;
        self.image.manifests.push((descriptor.clone(), bytes));
        self.image.root = descriptor;
        Ok(())
    }

    async fn write_manifest(
        &mut self,
        part: Part,
        annotations: PlatformAnnotations,
    ) -> Result<(Descriptor, Digest), BuildError> {
        let config = self.config(&part).await?;
        let (manifest_type, config_type) = self.types();
        let config: Bytes = config.into();
        let config_descriptor = Descriptor::of_bytes(config_type, &config);
        let layers = part.layers.iter().map(|layer| layer.descriptor.clone()).collect();
        let mut manifest = Manifest::new(config_descriptor.clone(), layers);
        manifest.media_type = manifest_type.to_owned();
        manifest.annotations = annotations.manifest;
        let bytes = manifest_bytes(&manifest)?;
        let mut descriptor = Descriptor::of_bytes(manifest_type, &bytes);
        show(
            &self.ctx.progress,
            format!("exporting manifest {}", descriptor.digest),
        );
        show(
            &self.ctx.progress,
            format!("exporting config {}", config_descriptor.digest),
        );
        for layer in part.layers {
            if !self
                .image
                .layers
                .iter()
                .any(|known| known.descriptor.digest == layer.descriptor.digest)
            {
                self.image.layers.push(layer);
            }
        }
        let config_digest = config_descriptor.digest;
        self.image.blobs.push((config_descriptor, config));
        self.image.manifests.push((descriptor.clone(), bytes));
        descriptor.annotations = annotations.manifest_descriptor;
        Ok((descriptor, config_digest))
    }

    fn types(&self) -> (&'static str, &'static str) {
        if self.options.uses_oci_types() {
            (media_type::OCI_MANIFEST, media_type::OCI_CONFIG)
        } else {
            (media_type::DOCKER_MANIFEST, media_type::DOCKER_CONFIG)
        }
    }

    async fn config(&self, part: &Part) -> Result<Vec<u8>, BuildError> {
        let id = &part.platform.id;
        let given =
            platforms::metadata(&self.source, IMAGE_CONFIG_KEY, Some(id)).filter(|given| !given.is_empty());
        let given = match given {
            Some(given) => given.to_vec(),
            None => default_config(&Platform::host().normalized())?,
        };
        let base = self.base_config(&part.platform)?;
        let inline_cache = match &self.ctx.inline_cache {
            Some(inline) => {
                let key = if self.source.refs.is_empty() {
                    ""
                } else {
                    id.as_str()
                };
                let layers: Vec<_> = part.layers.iter().map(described).collect();
                inline.records(&self.ctx.progress, key, &layers).await?
            }
            None => None,
        };
        let source = ConfigSource {
            given: &given,
            base: base.as_ref(),
            epoch: self.epoch(&part.platform)?,
            inline_cache: inline_cache.as_deref(),
        };
        patch(&source, &part.layers)
    }

    fn write_attestations(
        &mut self,
        target: &Descriptor,
        statements: Vec<attestations::Statement>,
    ) -> Result<Descriptor, BuildError> {
        let (manifest_type, config_type) = self.types();
        let artifact = self.options.uses_oci_artifact();
        let written = attestations::write(target, statements, manifest_type, config_type, artifact)?;
        let (descriptor, bytes) = written.manifest;
        show(
            &self.ctx.progress,
            format!("exporting attestation manifest {}", descriptor.digest),
        );
        self.image.blobs.extend(written.blobs);
        self.image
            .manifests
            .push((Descriptor::of_bytes(manifest_type, &bytes), bytes));
        Ok(descriptor)
    }

    /// Puts the documents into the content store, for the build history and for later exports.
    async fn store_documents(&self) -> Result<(), BuildError> {
        let documents: Vec<Bytes> = self
            .image
            .manifests
            .iter()
            .chain(&self.image.blobs)
            .map(|(_, bytes)| bytes.clone())
            .collect();
        let (content, pin) = (
            self.exporter.store().content().clone(),
            Arc::clone(&self.image.pin),
        );
        blocking(move || {
            for bytes in documents {
                pin.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .add(Digest::sha256(&bytes));
                content.put(&bytes, Durability::Deferred).map_err(internal)?;
            }
            Ok(())
        })
        .await
    }
}

/// A layer's descriptor as cache records know it: with its uncompressed digest and its time.
fn described(layer: &ExportLayer) -> Descriptor {
    let described = layer.descriptor.clone();
    described
        .with_annotation("containerd.io/uncompressed", layer.diff_id.to_string())
        .with_annotation("buildkit/createdat", layer.created_text())
}

/// Writes a manifest as Go does: a manifest without layers has none, rather than an empty list.
pub(super) fn manifest_bytes(manifest: &Manifest) -> Result<Bytes, BuildError> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Layerless<'a> {
        schema_version: u32,
        media_type: &'a str,
        #[serde(skip_serializing_if = "str::is_empty")]
        artifact_type: &'a str,
        config: &'a Descriptor,
        layers: (),
        #[serde(skip_serializing_if = "Option::is_none")]
        subject: Option<&'a Descriptor>,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        annotations: &'a BTreeMap<String, String>,
    }
    let bytes = if manifest.layers.is_empty() {
        let layerless = Layerless {
            schema_version: manifest.schema_version,
            media_type: &manifest.media_type,
            artifact_type: &manifest.artifact_type,
            config: &manifest.config,
            layers: (),
            subject: manifest.subject.as_ref(),
            annotations: &manifest.annotations,
        };
        oci::json::to_vec_indent(&layerless, "  ")
    } else {
        oci::json::to_vec_indent(manifest, "  ")
    };
    Ok(bytes.map_err(internal)?.into())
}

/// Shows something that is done at once.
fn show(progress: &VertexProgress, name: String) {
    drop(progress.step(name, ""));
}

/// A time as Go prints it in UTC.
fn go_time(time: Timestamp) -> String {
    let text = oci::timestamp::format(time.seconds, 0);
    text.replacen('T', " ", 1).replace('Z', " +0000 UTC")
}
