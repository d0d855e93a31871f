//! Where caches are: in registries, reached securely or not, in directories at the client, and in object stores.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use build::blocking::internal;
use build::error::BuildError;
use build::export::ExportContext;
use build::session::{ClientContent, SessionGroup};
use build::unlazy::FetchContext;
use bytes::{Bytes, BytesMut};
use cache::Provider;
use export::image::{ExportLayer, LayerExporter};
use export::push::{layer_source, mount_candidates};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use oci::{Descriptor, Digest, Reference};
use registry::{BlobSource, BytesSource, Client, PushBlob, RegistryError};
use source::image::fetch::{BlobBytes, BlobProvider, ProvenBlobs, blob_error, is_in_registry};
use source::image::{Images, REGISTRY_PROVIDER, registry_error};

use super::objects::{Connected, Connections, OBJECT_PROVIDER, ObjectError, ObjectProvider};

/// Scheme of providers whose blobs are in a registry without a trusted certificate; the locator is a reference.
const INSECURE_PROVIDER: &str = "registry-insecure";
/// Scheme of providers whose blobs are in a client's content store; the locator is the store's name.
const CLIENT_PROVIDER: &str = "client-content";
/// Layers that are written at once where nothing else is asked for.
const PARALLEL: usize = 4;
/// Documents larger than this are refused.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 32 << 20;

/// Blob providers by scheme that imported caches need beside those of images.
pub fn providers(
    images: &Arc<Images>,
    connections: &Arc<Connections>,
) -> BTreeMap<String, Arc<dyn BlobProvider>> {
    let objects: Arc<dyn BlobProvider> = Arc::new(ObjectProvider(Arc::clone(connections)));
    let insecure: Arc<dyn BlobProvider> = Arc::new(InsecureProvider {
        images: Arc::clone(images),
        proven: ProvenBlobs::default(),
    });
    let client: Arc<dyn BlobProvider> = Arc::new(ClientProvider::default());
    BTreeMap::from([
        (INSECURE_PROVIDER.to_owned(), insecure),
        (CLIENT_PROVIDER.to_owned(), client),
        (OBJECT_PROVIDER.to_owned(), objects),
    ])
}

#[derive(Debug)]
struct InsecureProvider {
    images: Arc<Images>,
    proven: ProvenBlobs,
}

impl InsecureProvider {
    fn at(&self, ctx: &FetchContext, locator: &str) -> Result<(Client, Reference), BuildError> {
        let reference = Reference::parse(locator).map_err(internal)?;
        let client = self
            .images
            .client(&ctx.sessions)
            .with_insecure(reference.domain());
        Ok((client, reference))
    }
}

#[async_trait]
impl BlobProvider for InsecureProvider {
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let (client, reference) = self.at(ctx, locator)?;
        let stream = client
            .fetch_unverified(&reference, descriptor, offset)
            .await
            .map_err(blob_error)?;
        Ok(stream.map_err(blob_error).boxed())
    }

    async fn proves(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        let Ok((client, reference)) = self.at(ctx, locator) else {
            return false;
        };
        let asked = is_in_registry(&client, &reference, descriptor);
        self.proven.check(ctx, locator, descriptor, asked).await
    }
}

#[derive(Debug, Default)]
struct ClientProvider {
    proven: ProvenBlobs,
}

#[async_trait]
impl BlobProvider for ClientProvider {
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let digest = &descriptor.digest;
        // Whichever session of the build has the directory.
        let chunks = ctx
            .sessions
            .any(|session| async move { session.content_store(locator).await?.read(digest, offset).await });
        let stream = stream::unfold(chunks.await?, |mut chunks| async move {
            let chunk = chunks.recv().await?;
            Some((chunk.map_err(BuildError::from), chunks))
        });
        Ok(stream.boxed())
    }

    async fn has(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        let digest = &descriptor.digest;
        let asked = async {
            let found = ctx
                .sessions
                .any(|session| async move { session.content_store(locator).await?.info(digest).await });
            found.await.is_ok_and(|found| found.size_bytes == descriptor.size)
        };
        self.proven.check(ctx, locator, descriptor, asked).await
    }
}

/// A place that has caches.
#[derive(Clone, Debug)]
pub enum Place {
    /// A repository, and perhaps a tag in it.
    Registry {
        /// How to reach it.
        client: Client,
        /// The cache's name.
        reference: Reference,
        /// Whether its certificate does not matter.
        insecure: bool,
    },
    /// A content store at the client.
    Client {
        /// The store.
        content: Arc<dyn ClientContent>,
        /// Its name in the session.
        store: String,
    },
    /// An object store.
    Objects(Connected),
}

impl Place {
    /// A cache in a registry.
    pub fn registry(images: &Images, sessions: &SessionGroup, reference: Reference, insecure: bool) -> Self {
        let mut client = images.client(sessions);
        if insecure {
            client = client.with_insecure(reference.domain());
        }
        Self::Registry {
            client,
            reference,
            insecure,
        }
    }

    /// A directory at the client.
    ///
    /// # Errors
    /// When no session has it.
    pub async fn client(sessions: &SessionGroup, dir: &str) -> Result<Self, BuildError> {
        let store = format!("local:{dir}");
        let name = store.as_str();
        let content = sessions
            .any(|session| async move { session.content_store(name).await })
            .await?;
        Ok(Self::Client { content, store })
    }

    /// Where lazy refs find the blobs of this place.
    pub fn provider(&self) -> Provider {
        match self {
            Self::Registry {
                reference, insecure, ..
            } => {
                let scheme = if *insecure {
                    INSECURE_PROVIDER
                } else {
                    REGISTRY_PROVIDER
                };
                Provider {
                    scheme: scheme.to_owned(),
                    locator: reference.to_string(),
                }
            }
            Self::Client { store, .. } => Provider {
                scheme: CLIENT_PROVIDER.to_owned(),
                locator: store.clone(),
            },
            Self::Objects(connected) => Provider {
                scheme: OBJECT_PROVIDER.to_owned(),
                locator: connected.locator.clone(),
            },
        }
    }

    /// Reads a document whole: bounded in size, its digest verified.
    ///
    /// # Errors
    /// When it is not there, too large, or other bytes than its digest's.
    pub async fn read(&self, descriptor: &Descriptor, is_manifest: bool) -> Result<Bytes, BuildError> {
        match self {
            Self::Registry {
                client, reference, ..
            } if is_manifest => client
                .manifest(reference, descriptor)
                .await
                .map_err(registry_error),
            Self::Registry {
                client, reference, ..
            } => {
                // Larger than what registries call a manifest may be: it grows with the records.
                let chunks = client.fetch(reference, descriptor, 0).await;
                let chunks = chunks.map_err(registry_error)?.map_err(registry_error);
                read_verified(chunks.boxed(), &descriptor.digest).await
            }
            Self::Client { content, .. } => read_client(&**content, &descriptor.digest).await,
            Self::Objects(connected) => {
                let chunks = connected.cache.open(descriptor, 0).await?;
                read_verified(chunks, &descriptor.digest).await
            }
        }
    }

    /// Writes a layer unless it is there. A text in the success says why its bytes cannot be read.
    ///
    /// # Errors
    /// When the place does not take it.
    pub async fn put_layer(
        &self,
        ctx: &ExportContext,
        layers: &LayerExporter,
        layer: &ExportLayer,
    ) -> Result<Option<String>, BuildError> {
        let (descriptor, source) = layer_source(layers, ctx, layer);
        match self {
            Self::Registry {
                client, reference, ..
            } => {
                let mount_from = mount_candidates(layers, ctx, layer, reference);
                let blob = PushBlob {
                    descriptor: &descriptor,
                    source: &*source,
                    mount_from: &mount_from,
                    progress: None,
                };
                match client.push_blob(reference, blob).await {
                    Ok(_) => Ok(None),
                    Err(RegistryError::ReadSource { source, .. }) => Ok(Some(source.to_string())),
                    Err(error) => Err(registry_error(error)),
                }
            }
            Self::Client { content, .. } => write_client(&**content, &descriptor, &*source).await,
            Self::Objects(connected) => match connected.cache.put(&descriptor, &*source).await {
                Ok(()) => Ok(None),
                Err(ObjectError::Source { source, .. }) => Ok(Some(source.to_string())),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Writes a small blob.
    ///
    /// # Errors
    /// When the place does not take it.
    pub async fn put_bytes(&self, descriptor: &Descriptor, bytes: Bytes) -> Result<(), BuildError> {
        let source = BytesSource(bytes);
        match self {
            Self::Registry {
                client, reference, ..
            } => {
                let blob = PushBlob {
                    descriptor,
                    source: &source,
                    mount_from: &[],
                    progress: None,
                };
                client
                    .push_blob(reference, blob)
                    .await
                    .map(drop)
                    .map_err(registry_error)
            }
            Self::Client { content, .. } => write_client(&**content, descriptor, &source).await.map(drop),
            Self::Objects(connected) => Ok(connected.cache.put(descriptor, &source).await?),
        }
    }

    /// Writes the cache's manifest, under its name if it has one.
    ///
    /// # Errors
    /// When the place does not take it.
    pub async fn put_manifest(&self, descriptor: &Descriptor, bytes: Bytes) -> Result<(), BuildError> {
        match self {
            Self::Registry {
                client, reference, ..
            } => {
                let pushed = client.push_manifest(reference, descriptor, bytes, reference.tag());
                pushed.await.map_err(registry_error)
            }
            Self::Client { .. } => self.put_bytes(descriptor, bytes).await,
            Self::Objects(connected) => Ok(connected.cache.put_manifest(bytes).await?),
        }
    }

    /// Layers that are written at once.
    pub fn parallel(&self) -> usize {
        match self {
            Self::Objects(connected) => connected.cache.parallel(),
            _ => PARALLEL,
        }
    }
}

async fn read_client(content: &dyn ClientContent, digest: &Digest) -> Result<Bytes, BuildError> {
    let chunks = content.read(digest, 0).await?;
    let chunks = stream::unfold(chunks, |mut chunks| async move {
        let chunk = chunks.recv().await?;
        Some((chunk.map_err(BuildError::from), chunks))
    });
    read_verified(chunks.boxed(), digest).await
}

async fn read_verified(mut chunks: BlobBytes, digest: &Digest) -> Result<Bytes, BuildError> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk?);
        if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_DOCUMENT_BYTES) {
            return Err(BuildError::user(format!(
                "{digest}: more than {MAX_DOCUMENT_BYTES} bytes"
            )));
        }
    }
    let bytes = bytes.freeze();
    let actual = Digest::of(digest.algorithm(), &bytes);
    if actual == *digest {
        Ok(bytes)
    } else {
        Err(BuildError::user(format!(
            "unexpected digest of {digest}: got {actual}"
        )))
    }
}

/// Writes a blob to a client. The text in the success says why its bytes cannot be read.
async fn write_client(
    content: &dyn ClientContent,
    descriptor: &Descriptor,
    source: &dyn BlobSource,
) -> Result<Option<String>, BuildError> {
    if content.info(&descriptor.digest).await.is_ok() {
        return Ok(None);
    }
    let mut bytes = source.open(0);
    // The first chunk before the client hears of it: what cannot be read at all is no trouble of its.
    let mut chunk = bytes.next().await;
    let mut writer = None;
    loop {
        match chunk {
            Some(Err(error)) => return Ok(Some(error.to_string())),
            Some(Ok(piece)) => {
                let mut open = match writer.take() {
                    Some(open) => open,
                    None => content.write(&descriptor.digest.to_string(), descriptor).await?,
                };
                open.write(piece).await?;
                writer = Some(open);
            }
            None => break,
        }
        chunk = bytes.next().await;
    }
    let writer = match writer {
        Some(writer) => writer,
        None => content.write(&descriptor.digest.to_string(), descriptor).await?,
    };
    writer.commit().await?;
    Ok(None)
}
