//! The image source: `docker-image://` resolves to a manifest at once and to a lazy ref of its layers.
//!
//! Nothing but manifests and the configuration is fetched until a step needs the layers' bytes: see
//! [`fetch::BlobFetcher`]. What a tag means is asked once per build, so that all steps see the same image.

pub mod attributes;
mod chain;
pub mod credentials;
pub mod documents;
pub mod fetch;
mod lost;
mod reader;
mod resolve;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::job::Job;
use build::meta::{ImageMeta, MetaContext, MetaRequest, SourceMeta};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::progress::VertexProgress;
use build::session::SessionGroup;
use bytes::Bytes;
use cache::{ImmutableRef, LayerBlob, Provider, RecordType, RefOptions, Store};
use llb::pb;
use oci::{Digest, Platform, Reference, chain_id};
use registry::{Client, RegistryError};
use serde::Serialize;
use tokio::sync::OnceCell;

use crate::resolution::{self, Asked};
use attributes::ImageAttributes;
use credentials::SessionCredentials;
use documents::Documents;
pub(crate) use reader::DocumentReader;
use reader::{NoReader, RegistryReader};
pub use resolve::ResolvedImage;
pub use resolve::kind_of;
use resolve::resolve_image;

/// Scheme of [`Provider`]s whose blobs are in a registry; the locator is a normalized reference.
pub const REGISTRY_PROVIDER: &str = "registry";
/// Under which name a ref keeps its image's documents.
const DOCUMENTS_KEY: &str = "image.documents";
/// Views with credentials that are kept for further steps of the same builds.
const MAX_VIEWS: usize = 32;

/// Where images come from: one per engine, shared by all image ops and exporters.
pub struct Images {
    client: Client,
    store: Store,
    documents: Documents,
    /// Clients with the credentials of a group of sessions, most recently made last.
    views: Mutex<Vec<(String, Client)>>,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").finish_non_exhaustive()
    }
}

impl Images {
    /// Makes images of a registry client without credentials and the store that keeps layers.
    pub fn new(client: Client, store: Store) -> Arc<Self> {
        Arc::new(Self {
            client,
            store,
            documents: Documents::default(),
            views: Mutex::default(),
        })
    }

    /// Returns the store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns a client that asks these sessions for credentials. Its tokens are kept for later calls with the same
    /// sessions.
    pub fn client(&self, sessions: &SessionGroup) -> Client {
        let key = sessions
            .ids()
            .iter()
            .map(|id| id.0.as_str())
            .collect::<Vec<_>>()
            .join("\0");
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = views.iter().find(|(known, _)| *known == key) {
            return client.clone();
        }
        let client = self
            .client
            .with_credentials(Arc::new(SessionCredentials::new(sessions.clone())));
        if views.len() >= MAX_VIEWS {
            views.remove(0);
        }
        views.push((key, client.clone()));
        client
    }

    /// Resolves an image for a platform, from memory or the store if its digest is known there.
    pub(crate) async fn resolve(
        &self,
        reader: &dyn DocumentReader,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<ResolvedImage, BuildError> {
        if let Some(digest) = reference.digest() {
            self.recall(reference, digest).await;
        }
        resolve_image(&self.documents, reader, reference, platform).await
    }

    /// Resolves an image at its registry, or from what is remembered of it where the builds allow that.
    async fn resolve_or_recall(
        &self,
        attributes: &ImageAttributes,
        jobs: &[Arc<Job>],
        sessions: &SessionGroup,
        progress: &VertexProgress,
    ) -> Result<ResolvedImage, BuildError> {
        let (reference, platform) = (&attributes.reference, &attributes.platform);
        let reader = RegistryReader(self.client(sessions));
        let asked = Asked {
            key: memo_key(reference, platform),
            shown: reference.to_string(),
            mode: resolution::mode(jobs),
            progress,
        };
        let ask = Box::pin(self.resolve(&reader, reference, platform));
        let recall = async |stored: Vec<u8>| {
            let root = self.documents.load(&reference.name(), &stored)?;
            let pinned = reference.clone().with_digest(root);
            let image = resolve_image(&self.documents, &NoReader, &pinned, platform).await;
            let reference = reference.clone();
            image.ok().map(|image| ResolvedImage { reference, ..image })
        };
        let work = resolution::resolve(&self.store, asked, ask, ResolvedImage::encode_documents, recall);
        Box::pin(work).await
    }

    /// Brings the documents that a ref of this image keeps back to memory.
    async fn recall(&self, reference: &Reference, digest: &Digest) {
        if self.documents.get(&reference.name(), digest).is_some() {
            return;
        }
        let (store, index) = (self.store.clone(), index_of(reference, digest));
        let stored = tokio::task::spawn_blocking(move || {
            let ids = store.search_index(&index).ok()?;
            // A ref that is gone meanwhile, or one without documents, only means to ask the registry.
            ids.iter()
                .find_map(|id| store.get(id).ok()?.metadata(DOCUMENTS_KEY).ok()?)
        });
        if let Ok(Some(stored)) = stored.await {
            // Only the digest that was asked for counts.
            let _ = self.documents.load(&reference.name(), &stored);
        }
    }

    /// Makes the lazy ref of an image's layers; `None` without layers.
    pub(crate) async fn reference(
        &self,
        image: Arc<ResolvedImage>,
        provider: Provider,
        limit: Option<usize>,
        record_type: RecordType,
    ) -> Result<Option<ImmutableRef>, BuildError> {
        let store = self.store.clone();
        blocking(move || {
            let layers = layer_blobs(&image, &provider, limit);
            let description = format!("pulled from {}", image.reference);
            let options = RefOptions {
                description,
                record_type,
                retain: false,
                created_at: None,
            };
            let Some(made) = store.from_blob_chain(&layers, &options).map_err(internal)? else {
                return Ok(None);
            };
            if record_type != RecordType::Regular && made.stat().record_type == RecordType::Regular {
                made.set_record_type(record_type);
            }
            made.set_metadata(DOCUMENTS_KEY, Some(&image.encode_documents()))
                .map_err(internal)?;
            made.set_index(&index_of(&image.reference, &image.root.digest))
                .map_err(internal)?;
            Ok(Some(made))
        })
        .await
    }

    /// Finds out what an image reference means, for frontends. Concurrent questions of one build are one request.
    ///
    /// # Errors
    /// As the registry's, with the reference before the text.
    pub async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        let attributes = ImageAttributes::read("docker-image://", &op, request.platform.clone())?;
        let client = self.client(&ctx.sessions);
        let _step = ctx.progress.step(format!("resolve {}", attributes.reference), "");
        let key = memo_key(&attributes.reference, &attributes.platform);
        let jobs = [Arc::clone(&ctx.job)];
        let resolving = self.resolve_or_recall(&attributes, &jobs, &ctx.sessions, &ctx.progress);
        let image = tokio::select! {
            image = build::job::memo(&jobs, &key, resolving) => image?,
            () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
        };
        attributes.check(&image)?;
        let config = if request.no_config {
            Bytes::new()
        } else {
            image.config.clone()
        };
        let attestations = if request.attestation_chain || !request.resolve_attestations.is_empty() {
            let predicates = &request.resolve_attestations;
            let (reference, platform) = (&attributes.reference, &attributes.platform);
            tokio::select! {
                chain = chain::collect(&client, reference, &image.root, platform, predicates) => chain?,
                () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
            }
        } else {
            None
        };
        let image = ImageMeta {
            digest: image.root.digest,
            config,
            attestations,
        };
        Ok(SourceMeta {
            op,
            image: Some(image),
            ..SourceMeta::default()
        })
    }
}

/// One `docker-image://` vertex.
#[derive(Debug)]
pub struct ImageOp {
    images: Arc<Images>,
    attributes: ImageAttributes,
    resolved: OnceCell<Arc<ResolvedImage>>,
}

impl ImageOp {
    /// Makes the op of a vertex whose identifier begins with `docker-image://`.
    ///
    /// # Errors
    /// A user error for an identifier or attributes that cannot be understood.
    pub fn new(vertex: &VertexSpec, images: Arc<Images>) -> Result<Self, BuildError> {
        let attributes = ImageAttributes::of_vertex("docker-image://", vertex)?;
        Ok(Self {
            images,
            attributes,
            resolved: OnceCell::new(),
        })
    }

    async fn resolved(&self, ctx: &OpContext) -> Result<Arc<ResolvedImage>, BuildError> {
        let resolving = async {
            let _step = ctx
                .progress()
                .step(format!("resolve {}", self.attributes.reference), "");
            let key = memo_key(&self.attributes.reference, &self.attributes.platform);
            let (jobs, sessions) = (ctx.jobs(), ctx.sessions());
            let resolving = self
                .images
                .resolve_or_recall(&self.attributes, &jobs, &sessions, ctx.progress());
            let image = ctx.memo(&key, resolving).await?;
            self.attributes.check(&image)?;
            Ok(image)
        };
        tokio::select! {
            image = self.resolved.get_or_try_init(|| resolving) => image.cloned(),
            () = ctx.cancel().cancelled() => Err(BuildError::canceled()),
        }
    }
}

#[async_trait]
impl Op for ImageOp {
    async fn cache_map(&self, ctx: &OpContext, round: u32) -> Result<CacheMap, BuildError> {
        let image = Box::pin(self.resolved(ctx)).await?;
        cache_map(&self.attributes, &image, round)
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, ctx: &OpContext, _: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let image = Box::pin(self.resolved(ctx)).await?;
        let provider = Provider {
            scheme: REGISTRY_PROVIDER.to_owned(),
            locator: self.attributes.reference.to_string(),
        };
        let (limit, record_type) = (self.attributes.layer_limit, self.attributes.record_type);
        let made = self.images.reference(image, provider, limit, record_type).await?;
        Ok(vec![Some(made.into())])
    }

    fn is_limited(&self) -> bool {
        // Making a lazy ref costs nothing; a pull has its own limits.
        false
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let image = self.resolved.get()?;
        Some(provenance("docker-image://", &self.attributes, image))
    }
}

pub(super) fn provenance(scheme: &str, attributes: &ImageAttributes, image: &ResolvedImage) -> OpProvenance {
    OpProvenance {
        source: Some(format!("{scheme}{}", attributes.reference)),
        pin: Some(image.root.digest.to_string()),
        platform: Some(pb::Platform::from(&attributes.platform)),
        ..OpProvenance::default()
    }
}

/// Identifies an image in two rounds: by what the reference resolved to, and by what its layers contain.
pub(super) fn cache_map(
    attributes: &ImageAttributes,
    image: &ResolvedImage,
    round: u32,
) -> Result<CacheMap, BuildError> {
    let content = content_key(image, attributes.layer_limit)?;
    let key = match content {
        Some(content) if round > 0 => content,
        _ => manifest_key(image.root.digest, &attributes.platform, attributes.layer_limit)?,
    };
    let digests = vec![super::key_digest(&key.to_string())];
    Ok(CacheMap {
        digests,
        more: round == 0 && content.is_some(),
        ..CacheMap::default()
    })
}

/// Digest of the root document and the platform, as BuildKit writes it.
fn manifest_key(digest: Digest, platform: &Platform, limit: Option<usize>) -> Result<Digest, BuildError> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Key<'a> {
        digest: Digest,
        #[serde(rename = "OS")]
        os: &'a str,
        arch: &'a str,
        #[serde(skip_serializing_if = "str::is_empty")]
        variant: &'a str,
        #[serde(rename = "OSVersion", skip_serializing_if = "str::is_empty")]
        os_version: &'a str,
        #[serde(rename = "OSFeatures", skip_serializing_if = "<[String]>::is_empty")]
        os_features: &'a [String],
        #[serde(skip_serializing_if = "Option::is_none")]
        limit: Option<usize>,
    }
    let key = Key {
        digest,
        os: &platform.os,
        arch: &platform.architecture,
        variant: &platform.variant,
        os_version: &platform.os_version,
        os_features: &platform.os_features,
        limit,
    };
    let bytes =
        oci::json::to_vec(&key).map_err(|error| BuildError::from_source(ErrorKind::Internal, error))?;
    Ok(Digest::sha256(bytes))
}

/// The chainID of the layers used; `None` for an image without layers.
fn content_key(image: &ResolvedImage, limit: Option<usize>) -> Result<Option<Digest>, BuildError> {
    let diff_ids = &image.diff_ids;
    let used = limit.unwrap_or(diff_ids.len());
    let used = diff_ids
        .get(..used)
        .ok_or_else(|| BuildError::user(format!("image has {} layers, limit is {used}", diff_ids.len())))?;
    Ok(chain_id(used))
}

fn layer_blobs(image: &ResolvedImage, provider: &Provider, limit: Option<usize>) -> Vec<LayerBlob> {
    let layers = image.manifest.layers.iter().zip(&image.diff_ids);
    let layers = layers.take(limit.unwrap_or(usize::MAX));
    layers
        .map(|(descriptor, diff_id)| LayerBlob {
            descriptor: descriptor.clone(),
            diff_id: *diff_id,
            providers: vec![provider.clone()],
            description: String::new(),
            created_at: None,
        })
        .collect()
}

fn index_of(reference: &Reference, digest: &Digest) -> String {
    format!("image:{}@{digest}", reference.name())
}

pub(super) fn memo_key(reference: &Reference, platform: &Platform) -> String {
    format!("image:{reference}:{}", platform.format_all())
}

/// Kinds of errors that registries give.
pub fn registry_error(error: RegistryError) -> BuildError {
    let kind = if error.is_not_found() {
        ErrorKind::NotFound
    } else if error.is_denied() {
        ErrorKind::Denied
    } else if error.is_transient() {
        ErrorKind::Unavailable
    } else {
        ErrorKind::User
    };
    BuildError::from_source(kind, error)
}

/// Blob providers by scheme that the image sources need: registries and clients' layouts.
pub fn providers(images: &Arc<Images>) -> BTreeMap<String, Arc<dyn fetch::BlobProvider>> {
    let registry: Arc<dyn fetch::BlobProvider> = Arc::new(fetch::RegistryProvider::new(Arc::clone(images)));
    let layout: Arc<dyn fetch::BlobProvider> = Arc::new(super::oci_layout::LayoutProvider);
    BTreeMap::from([
        (REGISTRY_PROVIDER.to_owned(), registry),
        (super::oci_layout::LAYOUT_PROVIDER.to_owned(), layout),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_key_is_buildkits() {
        let digest: Digest = format!("sha256:{}", "a".repeat(64)).parse().unwrap();
        let mut platform = Platform::new("linux", "arm64");
        platform.variant = "v8".into();
        let text = format!(r#"{{"Digest":"{digest}","OS":"linux","Arch":"arm64","Variant":"v8","Limit":2}}"#);
        assert_eq!(
            manifest_key(digest, &platform, Some(2)).unwrap(),
            Digest::sha256(text)
        );
    }
}
