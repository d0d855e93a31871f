//! Brings lazy blobs into the content store and makes snapshots of them, the later layers still on their way while the
//! earlier ones are unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::progress::StatusStep;
use build::session::{SessionGroup, SessionId};
use build::unlazy::{FetchContext, LostBlob, Unlazy};
use bytes::Bytes;
use cache::{ImmutableRef, MissingBlob, Provider, RefId, Store};
use content::{Durability, WriteError, Writer};
use futures_util::future::{BoxFuture, FutureExt, Shared, try_join_all};
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use layer::Stop;
use oci::{Descriptor, Digest, Reference};
use registry::{Client, RegistryError};
use tokio::sync::mpsc;

use super::lost::LostBlobs;
use super::{Images, registry_error};

/// Chunks on their way from the network to the thread that hashes and writes them.
const QUEUED_CHUNKS: usize = 64;

/// Blobs that are asked for at once whether they are there.
const ASKED_AT_ONCE: usize = 8;

/// Blobs that are remembered to be at their places.
const MAX_PROVEN: usize = 4096;

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

    /// Whether the blob is there in its full size, asked for even where that takes a request. Its bytes are not looked
    /// at.
    async fn proves(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        self.has(ctx, locator, descriptor).await
    }
}

/// Blobs in registries; the locator is a reference into the repository.
#[derive(Debug)]
pub struct RegistryProvider {
    images: Arc<Images>,
    proven: ProvenBlobs,
}

impl RegistryProvider {
    /// Fetches with the clients of these images.
    pub fn new(images: Arc<Images>) -> Self {
        Self {
            images,
            proven: ProvenBlobs::default(),
        }
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
            .map_err(blob_error)?;
        Ok(stream.map_err(blob_error).boxed())
    }

    async fn proves(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        let Ok(reference) = Reference::parse(locator) else {
            return false;
        };
        let client = self.images.client(&ctx.sessions);
        let asked = is_in_registry(&client, &reference, descriptor);
        self.proven.check(ctx, locator, descriptor, asked).await
    }
}

/// Asks a registry for a blob, without taking it.
pub async fn is_in_registry(client: &Client, reference: &Reference, descriptor: &Descriptor) -> bool {
    match client.stat_blob(reference, &descriptor.digest).await {
        Ok(found) => found.size == descriptor.size,
        Err(RegistryError::NotFound { .. }) if descriptor.urls.is_empty() => false,
        Err(error) if error.is_transient() => {
            tracing::warn!(%error, digest = %descriptor.digest, "a registry cannot be asked for a blob");
            false
        }
        // Some registries refuse the question but give the blob: its last byte tells as much.
        Err(_) => {
            let last = descriptor.size.saturating_sub(1);
            client.fetch_unverified(reference, descriptor, last).await.is_ok()
        }
    }
}

/// Blobs that were seen at their places, each by the sessions that could see it.
#[derive(Debug, Default)]
pub struct ProvenBlobs(Mutex<BTreeSet<(Vec<SessionId>, String, Digest)>>);

impl ProvenBlobs {
    /// Whether a blob is at a place; asks only for what was not seen there.
    pub async fn check(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        ask: impl Future<Output = bool>,
    ) -> bool {
        let seen = (ctx.sessions.ids().to_vec(), locator.to_owned(), descriptor.digest);
        if self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&seen)
        {
            return true;
        }
        let is_there = ask.await;
        if is_there {
            let mut proven = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Sessions end, and with them what is known of their places.
            if proven.len() >= MAX_PROVEN {
                proven.clear();
            }
            proven.insert(seen);
        }
        is_there
    }
}

/// Fetches and unpacks what lazy refs lack. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BlobFetcher {
    store: Store,
    providers: Arc<BTreeMap<String, Arc<dyn BlobProvider>>>,
    /// Blobs being fetched and refs being unpacked: whoever comes later waits and finds it done.
    busy: Arc<Busy>,
    lost: Arc<LostBlobs>,
}

#[derive(Debug, Default)]
struct Busy {
    blobs: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    refs: Mutex<BTreeMap<RefId, Arc<tokio::sync::Mutex<()>>>>,
    /// Refs that are being unpacked: for as long as somebody holds one of these, it goes on.
    wanted: Mutex<BTreeMap<RefId, Weak<Interest>>>,
}

/// Somebody waits for a ref to be unpacked.
#[derive(Debug)]
struct Interest;

impl Busy {
    /// Notes that one more waits for a ref, together with those who do already.
    fn interest(&self, id: &RefId) -> Arc<Interest> {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.retain(|_, interest| interest.strong_count() > 0);
        if let Some(interest) = wanted.get(id).and_then(Weak::upgrade) {
            return interest;
        }
        let interest = Arc::new(Interest);
        wanted.insert(id.clone(), Arc::downgrade(&interest));
        interest
    }
}

fn slot<K: Ord + Clone>(
    slots: &Mutex<BTreeMap<K, Arc<tokio::sync::Mutex<()>>>>,
    key: &K,
) -> Arc<tokio::sync::Mutex<()>> {
    let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
    slots.retain(|_, slot| Arc::strong_count(slot) > 1);
    Arc::clone(slots.entry(key.clone()).or_default())
}

/// A blob at one of its places.
struct Source<'a> {
    place: &'a dyn BlobProvider,
    locator: &'a str,
    descriptor: &'a Descriptor,
}

/// How much is asked of places before their blobs count as there.
#[derive(Clone, Copy)]
enum Asking {
    /// What costs little: others are trusted.
    Cheap,
    /// Whatever it takes, short of the bytes.
    Thorough,
}

impl BlobFetcher {
    /// Makes a fetcher with providers by scheme.
    pub fn new(store: Store, providers: BTreeMap<String, Arc<dyn BlobProvider>>) -> Self {
        Self {
            store,
            providers: Arc::new(providers),
            busy: Arc::default(),
            lost: Arc::default(),
        }
    }

    /// Brings a blob into the content store, unless it is there. The caller holds it by a ref or a pin.
    ///
    /// # Errors
    /// The first provider's; not found without any. Other bytes than the digest's are refused.
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
            fetched = self.download_verified(ctx, descriptor, providers, &mut step) => fetched,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }

    /// Downloads a blob from the first of its places that has it whole.
    async fn download_verified(
        &self,
        ctx: &FetchContext,
        descriptor: &Descriptor,
        providers: &[Provider],
        step: &mut StatusStep,
    ) -> Result<(), BuildError> {
        let mut first = None;
        for provider in providers {
            let Some(place) = self.providers.get(&provider.scheme) else {
                continue;
            };
            let source = Source {
                place: &**place,
                locator: &provider.locator,
                descriptor,
            };
            match self.download_from(ctx, &source, step).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(digest = %descriptor.digest, locator = provider.locator, %error, "no blob");
                    self.lost.note(ctx, provider, &descriptor.digest, &error);
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

    /// Downloads a blob; once more from its beginning if what an earlier attempt left of it was damaged.
    async fn download_from(
        &self,
        ctx: &FetchContext,
        source: &Source<'_>,
        step: &mut StatusStep,
    ) -> Result<(), BuildError> {
        let mut resumed = false;
        let mut wrong = self.download(ctx, source, step, &mut resumed).await?;
        if wrong.is_some() && resumed {
            wrong = self.download(ctx, source, step, &mut resumed).await?;
        }
        match wrong {
            None => Ok(()),
            Some(error) => {
                let error = BuildError::from_source(ErrorKind::NotFound, error);
                Err(error.context(format!("{} has other bytes", source.locator)))
            }
        }
    }

    /// Downloads a blob from where an earlier attempt ended. The error in the success is that the bytes are wrong.
    async fn download(
        &self,
        ctx: &FetchContext,
        source: &Source<'_>,
        step: &mut StatusStep,
        resumed: &mut bool,
    ) -> Result<Option<WriteError>, BuildError> {
        let descriptor = source.descriptor;
        let (content, expected) = (self.store.content().clone(), descriptor.clone());
        let key = format!("blob-{}", descriptor.digest);
        let writer = blocking(move || content.writer(&key, Some(&expected)).map_err(internal)).await?;
        let mut offset = writer.offset();
        *resumed = offset > 0;
        step.update(offset, descriptor.size);
        let mut stream = source.place.open(ctx, source.locator, descriptor, offset).await?;
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
            self.unpack(ctx, layer).await?;
        }
        // A merge or diff may need blobs that are no layers of its own.
        for (_, fetch) in fetches.iter().filter(|(digest, _)| !waited.contains(digest)) {
            fetch.clone().await?;
        }
        self.unpack(ctx, reference.clone()).await
    }

    /// Unpacks a ref whose blobs are here. It goes on for as long as anybody waits for that ref, whoever began.
    async fn unpack(&self, ctx: &FetchContext, reference: ImmutableRef) -> Result<(), BuildError> {
        let interest = self.busy.interest(reference.id());
        let wanted = Arc::downgrade(&interest);
        let work = blocking(move || {
            let stop = Stop::when(move || wanted.strong_count() == 0);
            reference.unpack_until(&stop).map_err(unpack_error)
        });
        let unpacked = tokio::select! {
            unpacked = work => unpacked,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        };
        drop(interest);
        unpacked
    }

    /// Whether all that a ref lacks is at its places in full size, asked for there. Its bytes are not looked at.
    ///
    /// # Errors
    /// When the store cannot be read, or nobody wants to know any more.
    pub async fn is_proven(&self, ctx: &FetchContext, reference: &ImmutableRef) -> Result<bool, BuildError> {
        self.are_at_hand(ctx, reference, Asking::Thorough).await
    }

    async fn are_at_hand(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        asking: Asking,
    ) -> Result<bool, BuildError> {
        if !reference.is_lazy() {
            return Ok(true);
        }
        let missing = self.missing(reference).await?;
        let asked = stream::iter(missing)
            .map(|blob| async move { self.is_at_hand(ctx, &blob, asking).await })
            .buffer_unordered(ASKED_AT_ONCE)
            .all(|is_there| async move { is_there });
        tokio::select! {
            all = asked => Ok(all),
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }

    /// Whether one of its places has a blob.
    async fn is_at_hand(&self, ctx: &FetchContext, blob: &MissingBlob, asking: Asking) -> bool {
        for provider in &blob.providers {
            let Some(place) = self.providers.get(&provider.scheme) else {
                continue;
            };
            if self.lost.contains(ctx, provider, &blob.descriptor.digest) {
                continue;
            }
            let is_there = match asking {
                Asking::Cheap => place.has(ctx, &provider.locator, &blob.descriptor).await,
                Asking::Thorough => place.proves(ctx, &provider.locator, &blob.descriptor).await,
            };
            if is_there {
                return true;
            }
        }
        tracing::info!(digest = %blob.descriptor.digest, "a cached layer is in none of its places any more");
        false
    }

    /// Whether a place turned out not to have a blob when one of the sessions wanted it.
    pub fn is_lost(&self, ctx: &FetchContext, place: &Provider, digest: &Digest) -> bool {
        self.lost.contains(ctx, place, digest)
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
        self.are_at_hand(ctx, reference, Asking::Cheap).await
    }

    fn lost(&self, sessions: &SessionGroup) -> Vec<LostBlob> {
        self.lost.of(sessions)
    }
}

fn unpack_error(error: cache::StoreError) -> BuildError {
    if matches!(error, cache::StoreError::Unwanted { .. }) {
        return BuildError::canceled();
    }
    let kind = match &error {
        // What the image promises and what it contains differ: no fault of this machine.
        cache::StoreError::WrongDiffId { .. } | cache::StoreError::Unpack { .. } => ErrorKind::User,
        cache::StoreError::Lazy { .. } | cache::StoreError::NotFound { .. } => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    BuildError::from_source(kind, error)
}

/// What a registry's failure to give a blob means: who has other bytes than its own does not have it. What somebody else said of
/// the blob may be true.
pub fn blob_error(error: RegistryError) -> BuildError {
    if error.is_other_content() {
        BuildError::from_source(ErrorKind::NotFound, error)
    } else {
        registry_error(error)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interest_is_shared_and_ends_with_the_last() {
        let busy = Busy::default();
        let (id, other): (RefId, RefId) = ("one".parse().unwrap(), "two".parse().unwrap());
        let first = busy.interest(&id);
        let working = Arc::downgrade(&first);
        let second = busy.interest(&id);
        drop(busy.interest(&other));
        drop(first);
        assert!(working.upgrade().is_some());
        drop(second);
        // Whoever comes now does not keep alive what was given up already.
        let late = busy.interest(&id);
        assert!(working.upgrade().is_none());
        drop(late);
    }
}
