//! The layout source: `oci-layout://` images that are in a directory at the client.
//!
//! The client offers the layout as a content store of its session; only references with a digest can be found there.
//! Otherwise such an image is like any other: lazy until a step needs its bytes.

use std::sync::Arc;

use async_trait::async_trait;
use build::blocking::internal;
use build::error::{BuildError, ErrorKind};
use build::meta::{ImageMeta, MetaContext, MetaRequest, SourceMeta};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::session::{ClientContent, SessionError, SessionGroup, SessionId};
use build::unlazy::FetchContext;
use bytes::{Bytes, BytesMut};
use cache::Provider;
use futures_util::stream::{self, StreamExt};
use oci::{Descriptor, Digest, Reference};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::image::attributes::ImageAttributes;
use super::image::fetch::{BlobBytes, BlobProvider};
use super::image::{DocumentReader, Images, ResolvedImage, cache_map, kind_of, memo_key, provenance};
use llb::pb;

/// Scheme of [`Provider`]s whose blobs are in a layout at the client.
pub const LAYOUT_PROVIDER: &str = "oci-layout";
/// Documents larger than this are refused.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;

/// Which layout of which session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Place {
    /// `None`: whichever session of the build has it.
    pub session: Option<String>,
    /// The layout's name at the client.
    pub layout: String,
}

impl Place {
    fn of(attributes: &ImageAttributes) -> Self {
        Self {
            session: attributes.session.as_ref().map(|id| id.0.clone()),
            layout: attributes.layout.clone(),
        }
    }

    /// The content store's name in the session.
    pub fn store(&self) -> String {
        format!("oci:{}", self.layout)
    }

    /// Finds the content store.
    pub async fn content(&self, sessions: &SessionGroup) -> Result<Arc<dyn ClientContent>, BuildError> {
        let store = self.store();
        let store = store.as_str();
        let found = match &self.session {
            Some(id) => {
                sessions
                    .get(&SessionId(id.clone()))
                    .await?
                    .content_store(store)
                    .await
            }
            None => {
                sessions
                    .any(|session| async move { session.content_store(store).await })
                    .await
            }
        };
        Ok(found?)
    }

    fn provider(&self) -> Result<Provider, BuildError> {
        let locator = serde_json::to_string(self).map_err(internal)?;
        Ok(Provider {
            scheme: LAYOUT_PROVIDER.to_owned(),
            locator,
        })
    }
}

/// Reads an image's documents from a layout.
struct LayoutReader {
    place: Place,
    sessions: SessionGroup,
    /// Where the session was found, so that it is looked for once.
    content: OnceCell<Arc<dyn ClientContent>>,
    /// The document that a reference turned out to be: it had to be read to learn what it is.
    root: OnceCell<(Digest, Bytes)>,
}

impl LayoutReader {
    fn new(place: Place, sessions: SessionGroup) -> Self {
        Self {
            place,
            sessions,
            content: OnceCell::new(),
            root: OnceCell::new(),
        }
    }

    async fn content(&self) -> Result<&dyn ClientContent, BuildError> {
        let finding = || self.place.content(&self.sessions);
        Ok(&**self.content.get_or_try_init(finding).await?)
    }

    async fn read(&self, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        let what = descriptor.digest;
        if descriptor.size > MAX_DOCUMENT_BYTES {
            return Err(BuildError::user(format!(
                "{what}: {} bytes are too many",
                descriptor.size
            )));
        }
        let mut chunks = self.content().await?.read(&what, 0).await?;
        let mut bytes = BytesMut::new();
        while let Some(chunk) = chunks.recv().await {
            bytes.extend_from_slice(&chunk?);
            if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_DOCUMENT_BYTES) {
                return Err(BuildError::user(format!(
                    "{what}: more than {MAX_DOCUMENT_BYTES} bytes"
                )));
            }
        }
        let bytes = bytes.freeze();
        let actual = Digest::of(what.algorithm(), &bytes);
        if actual == what {
            return Ok(bytes);
        }
        Err(BuildError::user(format!(
            "unexpected digest of {what}: got {actual}"
        )))
    }
}

#[async_trait]
impl DocumentReader for LayoutReader {
    async fn resolve(&self, reference: &Reference) -> Result<Descriptor, BuildError> {
        let Some(digest) = reference.digest() else {
            return Err(BuildError::user(format!(
                "reference {:?} must have digest",
                reference.to_string()
            )));
        };
        let blob = self.content().await?.info(digest).await.map_err(|error| {
            let kind = match &error {
                SessionError::NotFound { .. } => ErrorKind::NotFound,
                _ => ErrorKind::User,
            };
            BuildError::from_source(kind, error).context("unable to get info about digest")
        })?;
        let mut descriptor = Descriptor::new("", *digest, blob.size_bytes);
        let bytes = self.read(&descriptor).await?;
        descriptor.media_type = kind_of(&descriptor, &bytes)?;
        // A reader has one reference.
        let _ = self.root.set((*digest, bytes));
        Ok(descriptor)
    }

    async fn manifest(&self, _: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        match self.root.get() {
            Some((digest, bytes)) if *digest == descriptor.digest => Ok(bytes.clone()),
            _ => self.read(descriptor).await,
        }
    }

    async fn config(&self, _: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        self.read(descriptor).await
    }
}

/// One `oci-layout://` vertex.
#[derive(Debug)]
pub struct LayoutOp {
    images: Arc<Images>,
    attributes: ImageAttributes,
    resolved: OnceCell<Arc<ResolvedImage>>,
}

impl LayoutOp {
    /// Makes the op of a vertex whose identifier begins with `oci-layout://`.
    ///
    /// # Errors
    /// A user error for an identifier or attributes that cannot be understood.
    pub fn new(vertex: &VertexSpec, images: Arc<Images>) -> Result<Self, BuildError> {
        let attributes = ImageAttributes::of_vertex("oci-layout://", vertex)?;
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
            let place = Place::of(&self.attributes);
            let key = format!(
                "{}:{}",
                place.layout,
                memo_key(&self.attributes.reference, &self.attributes.platform)
            );
            let resolving = async {
                let reader = LayoutReader::new(place, ctx.sessions());
                self.images
                    .resolve(&reader, &self.attributes.reference, &self.attributes.platform)
                    .await
            };
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
impl Op for LayoutOp {
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
        let provider = Place::of(&self.attributes).provider()?;
        let (limit, record_type) = (self.attributes.layer_limit, self.attributes.record_type);
        let made = self.images.reference(image, provider, limit, record_type).await?;
        Ok(vec![Some(made.into())])
    }

    fn is_limited(&self) -> bool {
        false
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let image = self.resolved.get()?;
        Some(provenance("oci-layout://", &self.attributes, image))
    }
}

/// Finds out what a reference into a layout means, for frontends.
///
/// # Errors
/// A user error when the reference has no digest or the client does not have it.
pub async fn resolve_meta(
    images: &Images,
    ctx: &MetaContext,
    op: pb::SourceOp,
    request: &MetaRequest,
) -> Result<SourceMeta, BuildError> {
    let mut attributes = ImageAttributes::read("oci-layout://", &op, request.platform.clone())?;
    if let Some((session, layout)) = &request.layout_store {
        if !session.is_empty() {
            attributes.session = Some(SessionId(session.clone()));
        }
        if !layout.is_empty() {
            attributes.layout.clone_from(layout);
        }
    }
    let _step = ctx.progress.step(format!("resolve {}", attributes.reference), "");
    let reader = LayoutReader::new(Place::of(&attributes), ctx.sessions.clone());
    let image = tokio::select! {
        image = images.resolve(&reader, &attributes.reference, &attributes.platform) => image?,
        () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
    };
    let config = if request.no_config {
        Bytes::new()
    } else {
        image.config
    };
    let image = ImageMeta {
        digest: image.root.digest,
        config,
        attestations: None,
    };
    Ok(SourceMeta {
        op,
        image: Some(image),
        ..SourceMeta::default()
    })
}

/// Blobs in layouts at the client. Usable only while a session with the layout is connected.
#[derive(Debug)]
pub struct LayoutProvider;

#[async_trait]
impl BlobProvider for LayoutProvider {
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let place: Place = serde_json::from_str(locator).map_err(internal)?;
        // The session that made the ref may be gone: the present one can have the same layout.
        let content = match place.content(&ctx.sessions).await {
            Err(_) if place.session.is_some() => {
                Place {
                    session: None,
                    ..place
                }
                .content(&ctx.sessions)
                .await?
            }
            found => found?,
        };
        read(&*content, &descriptor.digest, offset).await
    }
}

/// Reads a blob of a layout from an offset to its end.
pub(super) async fn read(
    content: &dyn ClientContent,
    digest: &Digest,
    offset: u64,
) -> Result<BlobBytes, BuildError> {
    let chunks = content.read(digest, offset).await?;
    let stream = stream::unfold(chunks, |mut chunks| async move {
        let chunk = chunks.recv().await?;
        Some((chunk.map_err(BuildError::from), chunks))
    });
    Ok(stream.boxed())
}
