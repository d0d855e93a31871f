//! Brings lazy blobs into the content store and makes snapshots of them, the later layers still on their way while the
//! earlier ones are unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::progress::StatusStep;
use build::unlazy::{FetchContext, Unlazy};
use bytes::Bytes;
use cache::{ImmutableRef, MissingBlob, Provider, RefId, Store};
use content::{Durability, WriteError, Writer};
use futures_util::future::{BoxFuture, FutureExt, Shared, try_join_all};
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use oci::{Descriptor, Digest, Reference};
use registry::RegistryError;
use tokio::sync::mpsc;

use super::{Images, registry_error};

/// Chunks on their way from the network to the thread that hashes and writes them.
const QUEUED_CHUNKS: usize = 64;

/// Blobs that are asked for at once whether they are there.
const ASKED_AT_ONCE: usize = 8;

/// A blob's bytes in order.
pub type BlobBytes = BoxStream<'static, Result<Bytes, BuildError>>;

/// A kind of place that blobs can be fetched from, by the scheme of a [`Provider`].
#[async_trait]
pub trait BlobProvider: Send + Sync + fmt::Debug {
    /// Opens a blob from `offset` to its end. Whoever reads it verifies the digest.
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError>;

    /// Whether the blob can be had there, if that is cheap to tell; else it is assumed.
    async fn has(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        let _ = (ctx, locator, descriptor);
        true
    }
}

/// Blobs in registries; the locator is a reference into the repository.
#[derive(Debug)]
pub struct RegistryProvider {
    images: Arc<Images>,
}

impl RegistryProvider {
    /// Fetches with the clients of these images.
    pub fn new(images: Arc<Images>) -> Self {
        Self { images }
    }
}

#[async_trait]
impl BlobProvider for RegistryProvider {
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let reference = Reference::parse(locator).map_err(internal)?;
        let client = self.images.client(&ctx.sessions);
        let stream = client
            .fetch_unverified(&reference, descriptor, offset)
            .await
            .map_err(registry_error)?;
        Ok(stream.map_err(registry_error).boxed())
    }
}

/// Fetches and unpacks what lazy refs lack. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BlobFetcher {
    store: Store,
    providers: Arc<BTreeMap<String, Arc<dyn BlobProvider>>>,
    /// Blobs being fetched and refs being unpacked: whoever comes later waits and finds it done.
    busy: Arc<Busy>,
}

#[derive(Debug, Default)]
struct Busy {
    blobs: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    refs: Mutex<BTreeMap<RefId, Arc<tokio::sync::Mutex<()>>>>,
}

fn slot<K: Ord + Clone>(
    slots: &Mutex<BTreeMap<K, Arc<tokio::sync::Mutex<()>>>>,
    key: &K,
) -> Arc<tokio::sync::Mutex<()>> {
    let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
    slots.retain(|_, slot| Arc::strong_count(slot) > 1);
    Arc::clone(slots.entry(key.clone()).or_default())
}

impl BlobFetcher {
    /// Makes a fetcher with providers by scheme.
    pub fn new(store: Store, providers: BTreeMap<String, Arc<dyn BlobProvider>>) -> Self {
        Self {
            store,
            providers: Arc::new(providers),
            busy: Arc::default(),
        }
    }

    /// Opens a blob at the first of its providers that has it.
    ///
    /// # Errors
    /// The first provider's; not found without any.
    pub async fn open(
        &self,
        ctx: &FetchContext,
        descriptor: &Descriptor,
        providers: &[Provider],
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let mut first = None;
        for provider in providers {
            let Some(place) = self.providers.get(&provider.scheme) else {
                continue;
            };
            match place.open(ctx, &provider.locator, descriptor, offset).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    tracing::debug!(digest = %descriptor.digest, locator = provider.locator, %error, "no blob");
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or_else(|| {
            let text = format!(
                "blob {} is not here and nothing says where it is",
                descriptor.digest
            );
            BuildError::new(ErrorKind::NotFound, text)
        }))
    }

    /// Brings a blob into the content store, unless it is there. The caller holds it by a ref or a pin.
    ///
    /// # Errors
    /// As [`BlobFetcher::open`]; other bytes than the digest's are refused.
    pub async fn fetch_blob(
        &self,
        ctx: &FetchContext,
        descriptor: &Descriptor,
        providers: &[Provider],
    ) -> Result<(), BuildError> {
        let slot = slot(&self.busy.blobs, &descriptor.digest);
        let _guard = slot.lock().await;
        let (content, digest) = (self.store.content().clone(), descriptor.digest);
        if blocking(move || content.exists(&digest).map_err(internal)).await? {
            return Ok(());
        }
        let mut step = ctx.progress.step(descriptor.digest.to_string(), "");
        tokio::select! {
            fetched = self.download_verified(ctx, descriptor, providers, &mut step) => fetched.map_err(missing_if_other),
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }

    /// Downloads a blob; once more from its beginning if what an earlier attempt left of it was damaged, and from the next
    /// place if one has something else.
    async fn download_verified(
        &self,
        ctx: &FetchContext,
        descriptor: &Descriptor,
        providers: &[Provider],
        step: &mut StatusStep,
    ) -> Result<(), BuildError> {
        let mut first = None;
        for at in 0..providers.len().max(1) {
            let rest = providers.get(at..).unwrap_or_default();
            let mut resumed = false;
            let mut wrong = self.download(ctx, descriptor, rest, step, &mut resumed).await?;
            if wrong.is_some() && resumed {
                wrong = self.download(ctx, descriptor, rest, step, &mut resumed).await?;
            }
            match wrong {
                None => return Ok(()),
                Some(error) => first.get_or_insert(error),
            };
        }
        match first {
            None => Ok(()),
            Some(error) => Err(BuildError::from_source(ErrorKind::NotFound, error)),
        }
    }

    /// Downloads a blob from where an earlier attempt ended. The error in the success is that the bytes are wrong.
    async fn download(
        &self,
        ctx: &FetchContext,
        descriptor: &Descriptor,
        providers: &[Provider],
        step: &mut StatusStep,
        resumed: &mut bool,
    ) -> Result<Option<WriteError>, BuildError> {
        let (content, expected) = (self.store.content().clone(), descriptor.clone());
        let key = format!("blob-{}", descriptor.digest);
        let writer = blocking(move || content.writer(&key, Some(&expected)).map_err(internal)).await?;
        let mut offset = writer.offset();
        *resumed = offset > 0;
        step.update(offset, descriptor.size);
        let mut stream = self.open(ctx, descriptor, providers, offset).await?;
        let (chunks, queue) = mpsc::channel(QUEUED_CHUNKS);
        let writing = tokio::task::spawn_blocking(move || write(writer, queue));
        let mut failure = None;
        while let Some(chunk) = stream.next().await {
            match chunk {
                Ok(chunk) => {
                    offset = offset.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                    if chunks.send(chunk).await.is_err() {
                        break;
                    }
                    step.update(offset, descriptor.size);
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let complete = failure.is_none();
        if complete {
            // An empty chunk is the end; a queue that just closes is a broken transfer, kept for resumption. A writer
            // that is gone says why below.
            let _ = chunks.send(Bytes::new()).await;
        }
        drop(chunks);
        let written = writing.await.map_err(internal)?;
        match failure {
            Some(error) => Err(error),
            None => written,
        }
    }

    /// Shared futures that bring blobs here, each at most once.
    fn fetches<'a>(
        &'a self,
        ctx: &'a FetchContext,
        missing: Vec<MissingBlob>,
    ) -> BTreeMap<Digest, Shared<BoxFuture<'a, Result<(), BuildError>>>> {
        let mut fetches = BTreeMap::new();
        for blob in missing {
            let digest = blob.descriptor.digest;
            fetches.entry(digest).or_insert_with(|| {
                async move { self.fetch_blob(ctx, &blob.descriptor, &blob.providers).await }
                    .boxed()
                    .shared()
            });
        }
        fetches
    }

    /// Unpacks the layers in order, each as soon as its blob is here.
    async fn unpack_layers<'a>(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        fetches: &BTreeMap<Digest, Shared<BoxFuture<'a, Result<(), BuildError>>>>,
    ) -> Result<(), BuildError> {
        let chain = {
            let reference = reference.clone();
            blocking(move || Ok(reference.layer_chain())).await?
        };
        let mut waited = BTreeSet::new();
        for layer in chain {
            if !layer.is_lazy() {
                continue;
            }
            let Some(blob) = layer.blobs().into_iter().next() else {
                continue;
            };
            for (digest, fetch) in fetches.iter().filter(|(digest, _)| **digest == blob.digest) {
                fetch.clone().await?;
                waited.insert(*digest);
            }
            let _step = ctx
                .progress
                .step(format!("extracting {}", blob.digest), "extracting");
            blocking(move || layer.unpack().map_err(unpack_error)).await?;
        }
        // A merge or diff may need blobs that are no layers of its own.
        for (_, fetch) in fetches.iter().filter(|(digest, _)| !waited.contains(digest)) {
            fetch.clone().await?;
        }
        let reference = reference.clone();
        blocking(move || reference.unpack().map_err(unpack_error)).await
    }

    /// Whether one of its places has a blob.
    async fn is_at_hand(&self, ctx: &FetchContext, blob: &MissingBlob) -> bool {
        for provider in &blob.providers {
            if let Some(place) = self.providers.get(&provider.scheme)
                && place.has(ctx, &provider.locator, &blob.descriptor).await
            {
                return true;
            }
        }
        tracing::info!(digest = %blob.descriptor.digest, "a cached layer is in none of its places any more");
        false
    }

    async fn missing(&self, reference: &ImmutableRef) -> Result<Vec<MissingBlob>, BuildError> {
        let reference = reference.clone();
        blocking(move || reference.missing_blobs().map_err(unpack_error)).await
    }
}

#[async_trait]
impl Unlazy for BlobFetcher {
    async fn fetch(&self, ctx: &FetchContext, reference: &ImmutableRef) -> Result<(), BuildError> {
        let missing = self.missing(reference).await?;
        try_join_all(self.fetches(ctx, missing).into_values()).await?;
        Ok(())
    }

    async fn unpack(&self, ctx: &FetchContext, reference: &ImmutableRef) -> Result<(), BuildError> {
        let slot = slot(&self.busy.refs, reference.id());
        let _guard = tokio::select! {
            guard = slot.lock() => guard,
            () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
        };
        if !reference.is_lazy() {
            return Ok(());
        }
        let mut missing = self.missing(reference).await?;
        loop {
            let fetches = self.fetches(ctx, missing.clone());
            let all = try_join_all(fetches.values().cloned());
            let unpacked = self.unpack_layers(ctx, reference, &fetches);
            let Err(error) = tokio::try_join!(all, unpacked) else {
                return Ok(());
            };
            if error.kind() != ErrorKind::NotFound {
                return Err(error);
            }
            // A blob that proved to be damaged on disk was dropped; it is fetched as if it had never been here.
            let before = std::mem::replace(&mut missing, self.missing(reference).await?);
            if missing.iter().all(|blob| before.contains(blob)) {
                return Err(error);
            }
        }
    }

    async fn is_reachable(&self, ctx: &FetchContext, reference: &ImmutableRef) -> Result<bool, BuildError> {
        if !reference.is_lazy() {
            return Ok(true);
        }
        let missing = self.missing(reference).await?;
        let asked = stream::iter(missing)
            .map(|blob| async move { self.is_at_hand(ctx, &blob).await })
            .buffer_unordered(ASKED_AT_ONCE)
            .all(|is_there| async move { is_there });
        tokio::select! {
            all = asked => Ok(all),
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

/// Who has other bytes than those of a blob does not have the blob. What somebody else said of it may be true.
fn missing_if_other(error: BuildError) -> BuildError {
    let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<RegistryError>());
    if cause.is_some_and(RegistryError::is_other_content) {
        BuildError::new(ErrorKind::NotFound, error.to_string())
    } else {
        error
    }
}

fn unpack_error(error: cache::StoreError) -> BuildError {
    let kind = match &error {
        // What the image promises and what it contains differ: no fault of this machine.
        cache::StoreError::WrongDiffId { .. } | cache::StoreError::Unpack { .. } => ErrorKind::User,
        cache::StoreError::Lazy { .. } | cache::StoreError::NotFound { .. } => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    BuildError::from_source(kind, error)
}

/// Writes chunks until an empty one, then commits. Without the empty one the bytes stay for a resumption. The error in
/// the success is that the bytes are wrong.
fn write(mut writer: Writer, mut queue: mpsc::Receiver<Bytes>) -> Result<Option<WriteError>, BuildError> {
    while let Some(chunk) = queue.blocking_recv() {
        if chunk.is_empty() {
            return match writer.commit_with(Durability::Deferred) {
                Ok(_) => Ok(None),
                Err(WriteError::Store(error)) => Err(internal(error)),
                Err(wrong) => Ok(Some(wrong)),
            };
        }
        std::io::Write::write_all(&mut writer, &chunk).map_err(internal)?;
    }
    Ok(None)
}
