//! Pushing a written image: blobs side by side, then manifests, those referred to first.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;

use build::error::BuildError;
use build::export::ExportContext;
use build::unlazy::FetchContext;
use bytes::Bytes;
use content::{Store, VerifyError};
use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt};
use oci::{Descriptor, Digest, Reference, media_type};
use registry::{BlobSource, ByteStream, BytesSource, Client, PushBlob};
use source::image::fetch::BlobFetcher;
use source::image::{Images, REGISTRY_PROVIDER, registry_error};
use tokio::sync::mpsc;

use super::image::{ExportLayer, LayerExporter, WrittenImage};

/// Bytes read from the store at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks read ahead of the network.
const QUEUED_CHUNKS: usize = 8;

/// One push.
pub struct Push<'a> {
    /// Where clients come from.
    pub images: &'a Images,
    /// Where layers come from.
    pub layers: &'a LayerExporter,
    /// The image.
    pub image: &'a WrittenImage,
    /// The name to push to.
    pub target: &'a str,
    /// Push without a tag; the name must not have one.
    pub by_digest: bool,
    /// Accept any certificate, and plain HTTP.
    pub insecure: bool,
}

/// Pushes an image. What the registry has is not sent; layers it has in another repository are mounted from there, also
/// when they are not here.
///
/// # Errors
/// A user error for a target that is no name; the registry's errors.
pub async fn push_image(ctx: &ExportContext, push: &Push<'_>) -> Result<(), BuildError> {
    let target = Reference::parse(push.target)
        .map_err(|error| BuildError::user(format!("failed to parse {}: {error}", push.target)))?;
    if push.by_digest && !target.is_name_only() {
        return Err(BuildError::user(format!(
            "can't push tagged ref {target} by digest"
        )));
    }
    let target = if push.by_digest {
        target
    } else {
        target.with_default_tag()
    };
    let mut client = push.images.client(&ctx.sessions);
    if push.insecure {
        client = client.with_insecure(target.domain());
    }
    let shown = if push.by_digest {
        target.clone()
    } else {
        target.clone().with_digest(push.image.root.digest)
    };
    let pushing = async {
        {
            let _step = ctx.progress.step("pushing layers", "");
            push_blobs(ctx, push, &client, &target).await?;
        }
        let _step = ctx.progress.step(format!("pushing manifest for {shown}"), "");
        push_manifests(push, &client, &target).await
    };
    tokio::select! {
        pushed = pushing => pushed,
        () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
    }
}

async fn push_blobs(
    ctx: &ExportContext,
    push: &Push<'_>,
    client: &Client,
    target: &Reference,
) -> Result<(), BuildError> {
    let layers = push
        .image
        .layers
        .iter()
        .filter(|layer| !media_type::is_foreign_layer(&layer.descriptor.media_type));
    let layers = layers.map(|layer| async move {
        let source = LayerSource {
            content: push.layers.store().content().clone(),
            fetcher: push.layers.fetcher().clone(),
            ctx: FetchContext::from(ctx),
            layer: layer.clone(),
        };
        let mount_from = mount_candidates(push.layers, ctx, layer, target);
        let blob = PushBlob {
            descriptor: &layer.descriptor,
            source: &source,
            mount_from: &mount_from,
            progress: None,
        };
        client
            .push_blob(target, blob)
            .await
            .map(|_| ())
            .map_err(registry_error)
    });
    let mut seen = BTreeSet::new();
    let blobs = push
        .image
        .blobs
        .iter()
        .filter(|(descriptor, _)| seen.insert(descriptor.digest));
    let blobs: Vec<_> = blobs
        .map(|(descriptor, bytes)| async move {
            let source = BytesSource(bytes.clone());
            let blob = PushBlob {
                descriptor,
                source: &source,
                mount_from: &[],
                progress: None,
            };
            client
                .push_blob(target, blob)
                .await
                .map(|_| ())
                .map_err(registry_error)
        })
        .collect();
    tokio::try_join!(try_join_all(layers), try_join_all(blobs))?;
    Ok(())
}

async fn push_manifests(push: &Push<'_>, client: &Client, target: &Reference) -> Result<(), BuildError> {
    for (descriptor, bytes) in &push.image.manifests {
        let is_root = descriptor.digest == push.image.root.digest;
        let tag = if is_root { target.tag() } else { None };
        client
            .push_manifest(target, descriptor, bytes.clone(), tag)
            .await
            .map_err(registry_error)?;
    }
    Ok(())
}

/// Repositories of the target's registry that a layer came from, but for those that turned out not to have it; the one with the
/// most path in common first.
pub fn mount_candidates(
    layers: &LayerExporter,
    ctx: &ExportContext,
    layer: &ExportLayer,
    target: &Reference,
) -> Vec<String> {
    let (fetcher, ctx) = (layers.fetcher(), FetchContext::from(ctx));
    let mut found: Vec<String> = layer
        .providers
        .iter()
        .filter(|provider| provider.scheme == REGISTRY_PROVIDER)
        .filter(|provider| !fetcher.is_lost(&ctx, provider, &layer.descriptor.digest))
        .filter_map(|provider| Reference::parse(&provider.locator).ok())
        .filter(|source| source.domain() == target.domain() && source.path() != target.path())
        .map(|source| source.path().to_owned())
        .collect();
    let shared = |path: &String| {
        path.split('/')
            .zip(target.path().split('/'))
            .take_while(|(a, b)| a == b)
            .count()
    };
    found.sort_by_key(|path| std::cmp::Reverse(shared(path)));
    found.dedup();
    found
}

/// A layer's bytes, fetched first if they are not here.
struct LayerSource {
    content: Store,
    fetcher: BlobFetcher,
    ctx: FetchContext,
    layer: ExportLayer,
}

impl BlobSource for LayerSource {
    fn open(&self, offset: u64) -> ByteStream {
        let (fetcher, ctx, layer) = (self.fetcher.clone(), self.ctx.clone(), self.layer.clone());
        let content = self.content.clone();
        let opening = async move {
            match fetcher
                .fetch_blob(&ctx, &layer.descriptor, &layer.providers)
                .await
            {
                Ok(()) => read_blob(content, layer.descriptor.digest, offset),
                Err(error) => stream::iter([Err(std::io::Error::other(error))]).boxed(),
            }
        };
        stream::once(opening).flatten().boxed()
    }
}

/// Reads a blob of the store from an offset, on a thread for that.
pub(super) fn read_blob(content: Store, digest: Digest, offset: u64) -> ByteStream {
    let (chunks, queue) = mpsc::channel(QUEUED_CHUNKS);
    // The thread ends with the blob, or as soon as nobody waits for its chunks.
    let reading = tokio::task::spawn_blocking(move || {
        if let Err(error) = send_blob(&content, &digest, offset, &chunks) {
            // Nobody waits: nobody needs to know.
            let _ = chunks.blocking_send(Err(error));
        }
    });
    let stream = stream::unfold((queue, Some(reading)), |(mut queue, mut reading)| async move {
        if let Some(chunk) = queue.recv().await {
            return Some((chunk, (queue, reading)));
        }
        let ended = reading.take()?.await;
        ended
            .err()
            .map(|error| (Err(std::io::Error::other(error)), (queue, None)))
    });
    stream.boxed()
}

fn send_blob(
    content: &Store,
    digest: &Digest,
    offset: u64,
    chunks: &mpsc::Sender<std::io::Result<Bytes>>,
) -> std::io::Result<()> {
    let blob = content.reader(digest).map_err(std::io::Error::other)?;
    if offset == 0 {
        return send_chunks(blob.into_verified_reader(), chunks).inspect_err(|error| {
            let is_corrupt = error.get_ref().is_some_and(|error| error.is::<VerifyError>());
            if is_corrupt && let Err(error) = content.delete(digest) {
                tracing::warn!(%error, %digest, "a damaged blob cannot be removed");
            }
        });
    }
    // Whoever goes on where it was interrupted has a digest to check.
    let mut reader = blob.into_reader();
    std::io::Seek::seek(&mut reader, std::io::SeekFrom::Start(offset))?;
    send_chunks(reader, chunks)
}

fn send_chunks(mut reader: impl Read, chunks: &mpsc::Sender<std::io::Result<Bytes>>) -> std::io::Result<()> {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let limit = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
        if (&mut reader).take(limit).read_to_end(&mut chunk)? == 0 {
            return Ok(());
        }
        if chunks.blocking_send(Ok(chunk.into())).is_err() {
            return Ok(());
        }
    }
}

/// The blob's descriptor and a source of its bytes, for whoever sends images elsewhere.
pub fn layer_source(
    layers: &LayerExporter,
    ctx: &ExportContext,
    layer: &ExportLayer,
) -> (Descriptor, Arc<dyn BlobSource>) {
    let source = LayerSource {
        content: layers.store().content().clone(),
        fetcher: layers.fetcher().clone(),
        ctx: FetchContext::from(ctx),
        layer: layer.clone(),
    };
    (layer.descriptor.clone(), Arc::new(source))
}
