//! The `oci` and `docker` exporters: an image as an archive at the client, or into a layout that the client keeps.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use build::blocking::internal;
use build::error::{BuildError, ErrorKind};
use build::export::{ExportContext, ExportSource, Exported, Exporter, ExporterInstance};
use build::session::{ClientContent, Session, SessionError};
use build::unlazy::FetchContext;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use layer::tar::{EntryKind, Header, Writer as TarWriter};
use oci::{Descriptor, Digest, Index, Manifest, Reference, media_type};
use serde::Serialize;
use tokio::sync::mpsc;

use super::image::{ImageOptions, ImageWriter, LayerExporter, NAME_KEY, WrittenImage, response};
use super::push::layer_source;

const CREATED_ANNOTATION: &str = "org.opencontainers.image.created";
const REF_NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";
const IMAGE_NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Bytes sent to the client at once.
const PIECE_BYTES: usize = 256 << 10;
/// Layers that are fetched at once before an archive is begun.
const FETCHED_AT_ONCE: usize = 4;

/// Which archive is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// An OCI image layout.
    Oci,
    /// The same, with what `docker load` reads; one platform only.
    Docker,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Oci => "oci",
            Self::Docker => "docker",
        }
    }
}

/// Makes `oci` or `docker` exporters.
#[derive(Debug)]
pub struct ArchiveExporter {
    layers: LayerExporter,
    variant: Variant,
}

impl ArchiveExporter {
    /// Makes exporters of one variant.
    pub fn new(layers: LayerExporter, variant: Variant) -> Self {
        Self { layers, variant }
    }
}

impl Exporter for ArchiveExporter {
    fn resolve(
        &self,
        id: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        let mut options = ImageOptions::read(&attrs)?;
        let tar = options.take_flag("tar")?.unwrap_or(true);
        Ok(Arc::new(ArchiveInstance {
            layers: self.layers.clone(),
            variant: self.variant,
            name: format!("exporting to {} image format", self.variant.name()),
            options,
            tar,
            id: id.to_string(),
        }))
    }
}

#[derive(Debug)]
struct ArchiveInstance {
    layers: LayerExporter,
    variant: Variant,
    name: String,
    options: ImageOptions,
    tar: bool,
    id: String,
}

#[async_trait]
impl ExporterInstance for ArchiveInstance {
    fn name(&self) -> &str {
        &self.name
    }

    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        if self.variant == Variant::Docker && !source.refs.is_empty() {
            return Err(BuildError::user(
                "docker exporter does not currently support exporting manifest lists",
            ));
        }
        let writer = ImageWriter::new(&self.layers, ctx, &self.options, source)?;
        let given = writer
            .metadata()
            .get(NAME_KEY)
            .map(|name| String::from_utf8_lossy(name).into_owned());
        let epoch = match self.options.epoch {
            Some(epoch) => epoch,
            None => super::platforms::epoch(source, None)?,
        };
        let mut image = writer.write().await?;
        let created = match epoch {
            Some(epoch) => oci::timestamp::format(epoch.seconds, 0),
            None => {
                let (seconds, _) = oci::timestamp::to_unix(SystemTime::now());
                oci::timestamp::format(seconds, 0)
            }
        };
        image
            .root
            .annotations
            .entry(CREATED_ANNOTATION.to_owned())
            .or_insert(created);
        let mut response = response(&image)?;
        let name = match given {
            Some(given) if self.options.name == "*" => given,
            _ => self.options.name.clone(),
        };
        let names = normalized(&name)?;
        if !names.is_empty() {
            response.insert(NAME_KEY.to_owned(), names.join(","));
        }
        let sending = async {
            let session = session(ctx).await?;
            if self.tar {
                self.send_archive(ctx, &*session, &image, &names, &response).await
            } else {
                self.copy_to_layout(ctx, &*session, &image).await
            }
        };
        tokio::select! {
            sent = sending => sent?,
            () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
        }
        let descriptor = Some(image.root.clone());
        Ok(Exported {
            response,
            finalize: None,
            descriptor,
            held: Some(image.held()),
        })
    }
}

async fn session(ctx: &ExportContext) -> Result<Arc<dyn Session>, BuildError> {
    let Some(id) = ctx.job.session() else {
        return Err(BuildError::new(
            ErrorKind::Unavailable,
            "exporting to the client needs its session",
        ));
    };
    Ok(ctx.sessions.get(id).await?)
}

/// Names in normal form, each with a tag.
fn normalized(names: &str) -> Result<Vec<String>, BuildError> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    names
        .split(',')
        .map(|name| match Reference::parse(name) {
            Ok(reference) => Ok(reference.with_default_tag().to_string()),
            Err(error) => Err(BuildError::user(format!("failed to parse {name}: {error}"))),
        })
        .collect()
}

/// A file of an archive.
enum Entry {
    Bytes { mode: u32, bytes: Bytes },
    Layer(usize),
    Dir,
}

impl ArchiveInstance {
    /// The archive's entries by name: the order in which they are written.
    fn entries(&self, image: &WrittenImage, names: &[String]) -> Result<BTreeMap<String, Entry>, BuildError> {
        let mut entries = BTreeMap::new();
        for (at, layer) in image.layers.iter().enumerate() {
            entries.insert(blob_path(&layer.descriptor.digest), Entry::Layer(at));
        }
        for (descriptor, bytes) in image.blobs.iter().chain(&image.manifests) {
            let entry = Entry::Bytes {
                mode: 0o444,
                bytes: bytes.clone(),
            };
            entries.insert(blob_path(&descriptor.digest), entry);
        }
        entries.insert("blobs/".to_owned(), Entry::Dir);
        for (descriptor, _) in &image.manifests {
            entries.insert(format!("blobs/{}/", descriptor.digest.algorithm()), Entry::Dir);
        }
        let layout = Bytes::from_static(br#"{"imageLayoutVersion":"1.0.0"}"#);
        entries.insert(
            "oci-layout".to_owned(),
            Entry::Bytes {
                mode: 0o444,
                bytes: layout,
            },
        );
        let index = Index::new(named(&image.root, names));
        let bytes = oci::json::to_vec(&index).map_err(internal)?.into();
        entries.insert("index.json".to_owned(), Entry::Bytes { mode: 0o644, bytes });
        if self.variant == Variant::Docker
            && let Some(bytes) = docker_manifest(image, names)?
        {
            entries.insert("manifest.json".to_owned(), Entry::Bytes { mode: 0o644, bytes });
        }
        Ok(entries)
    }

    /// Brings all layers here.
    async fn fetch_layers(&self, ctx: &ExportContext, image: &WrittenImage) -> Result<(), BuildError> {
        let ctx = FetchContext::from(ctx);
        let fetching = image.layers.iter().map(|layer| {
            let fetcher = self.layers.fetcher();
            fetcher.fetch_blob(&ctx, &layer.descriptor, &layer.providers)
        });
        let fetching: Vec<_> = fetching.collect();
        futures_util::stream::iter(fetching)
            .buffer_unordered(FETCHED_AT_ONCE)
            .try_collect()
            .await
    }

    async fn send_archive(
        &self,
        ctx: &ExportContext,
        session: &dyn Session,
        image: &WrittenImage,
        names: &[String],
        response: &BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        let entries = self.entries(image, names)?;
        // An archive cannot be begun twice: what cannot be had is to be known before.
        self.fetch_layers(ctx, image).await?;
        let mut stream = session.send_file(&self.id, response).await?;
        let _step = ctx.progress.step("sending tarball", "");
        let pending = Pending::default();
        let mut outgoing = Pieces {
            from: pending.clone(),
            to: stream.outgoing,
            failed: false,
        };
        let mut archive = TarWriter::new(pending);
        for (name, entry) in entries {
            archive
                .write_header(&header(&name, &entry, image))
                .map_err(internal)?;
            match entry {
                Entry::Bytes { bytes, .. } => archive.write_all(&bytes).map_err(internal)?,
                Entry::Layer(at) => {
                    let (descriptor, source) = layer_source(&self.layers, ctx, &image.layers[at]);
                    let mut bytes = source.open(0);
                    let mut left = descriptor.size;
                    while let Some(chunk) = bytes.next().await {
                        let chunk = chunk.map_err(internal)?;
                        left = left.saturating_sub(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                        archive.write_all(&chunk).map_err(internal)?;
                        if !outgoing.send().await {
                            break;
                        }
                    }
                    if left > 0 && !outgoing.failed {
                        return Err(BuildError::internal(format!(
                            "blob {} is too short",
                            descriptor.digest
                        )));
                    }
                }
                Entry::Dir => {}
            }
            if !outgoing.send().await {
                break;
            }
        }
        if !outgoing.failed {
            archive.finish().map_err(internal)?;
            outgoing.send().await;
        }
        drop(outgoing);
        // The client's last word: an error, or the end. That it has the file already is success.
        while let Some(answer) = stream.incoming.recv().await {
            match answer {
                Ok(_) => {}
                Err(SessionError::Refused { message }) if message.contains("already exists") => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Copies the image into the client's content store; blobs before manifests, the root last.
    async fn copy_to_layout(
        &self,
        ctx: &ExportContext,
        session: &dyn Session,
        image: &WrittenImage,
    ) -> Result<(), BuildError> {
        let content = session.content_store("export").await?;
        for layer in &image.layers {
            let (descriptor, source) = layer_source(&self.layers, ctx, layer);
            copy_blob(&*content, &descriptor, source.open(0)).await?;
        }
        for (descriptor, bytes) in image.blobs.iter().chain(&image.manifests) {
            let bytes = bytes.clone();
            let stream = futures_util::stream::iter([Ok(bytes)]).boxed();
            copy_blob(&*content, descriptor, stream).await?;
        }
        Ok(())
    }
}

async fn copy_blob(
    content: &dyn ClientContent,
    descriptor: &Descriptor,
    mut bytes: registry::ByteStream,
) -> Result<(), BuildError> {
    if content.info(&descriptor.digest).await.is_ok() {
        return Ok(());
    }
    let mut writer = content.write(&ingest_name(descriptor), descriptor).await?;
    while let Some(chunk) = bytes.next().await {
        writer.write(chunk.map_err(internal)?).await?;
    }
    Ok(writer.commit().await?)
}

/// The name under which containerd's tools write a blob.
fn ingest_name(descriptor: &Descriptor) -> String {
    let kind = &descriptor.media_type;
    let prefix = if media_type::is_manifest(kind) {
        "manifest"
    } else if media_type::is_index(kind) {
        "index"
    } else if media_type::is_config(kind) {
        "config"
    } else if media_type::is_layer(kind) {
        "layer"
    } else {
        "unknown"
    };
    format!("{prefix}-{}", descriptor.digest)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

fn header(name: &str, entry: &Entry, image: &WrittenImage) -> Header {
    let (kind, mode, size_bytes) = match entry {
        Entry::Bytes { mode, bytes } => (
            EntryKind::Regular,
            *mode,
            u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        ),
        Entry::Layer(at) => (EntryKind::Regular, 0o444, image.layers[*at].descriptor.size),
        Entry::Dir => (EntryKind::Directory, 0o755, 0),
    };
    Header {
        mode,
        size_bytes,
        ..Header::new(kind, name)
    }
}

/// The root's descriptor once per name.
fn named(root: &Descriptor, names: &[String]) -> Vec<Descriptor> {
    if names.is_empty() {
        return vec![root.clone()];
    }
    names
        .iter()
        .map(|name| {
            let reference = Reference::parse(name).ok();
            let tag = reference.as_ref().and_then(Reference::tag).unwrap_or(name);
            let descriptor = root.clone();
            descriptor
                .with_annotation(IMAGE_NAME_ANNOTATION, name.as_str())
                .with_annotation(REF_NAME_ANNOTATION, tag)
        })
        .collect()
}

/// What `docker load` reads; `None` when the root is not one image.
fn docker_manifest(image: &WrittenImage, names: &[String]) -> Result<Option<Bytes>, BuildError> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Entry {
        config: String,
        repo_tags: Option<Vec<String>>,
        layers: Option<Vec<String>>,
    }
    let root = image
        .manifests
        .iter()
        .find(|(descriptor, _)| descriptor.digest == image.root.digest);
    let Some((_, bytes)) = root.filter(|(descriptor, _)| media_type::is_manifest(&descriptor.media_type))
    else {
        return Ok(None);
    };
    // A manifest without layers says so with null, which reads as none.
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(internal)?;
    let layers: Vec<String> = manifest
        .layers
        .iter()
        .map(|layer| blob_path(&layer.digest))
        .collect();
    let tags: Vec<String> = names
        .iter()
        .filter_map(|name| Some(Reference::parse(name).ok()?.familiar()))
        .collect();
    let entry = Entry {
        config: blob_path(&manifest.config.digest),
        repo_tags: (!tags.is_empty()).then_some(tags),
        layers: (!layers.is_empty()).then_some(layers),
    };
    Ok(Some(oci::json::to_vec(&[entry]).map_err(internal)?.into()))
}

/// Archive bytes not yet sent, shared by the archive's writer and whoever sends them.
#[derive(Clone, Debug, Default)]
struct Pending(Arc<Mutex<Vec<u8>>>);

impl Pending {
    fn take(&self) -> Bytes {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

impl Write for Pending {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends the archive in pieces, as fast as the client takes them.
struct Pieces {
    from: Pending,
    to: mpsc::Sender<Bytes>,
    failed: bool,
}

impl Pieces {
    /// Sends what is pending; `false` when the client takes no more: it says why on its side of the stream.
    async fn send(&mut self) -> bool {
        let mut bytes = self.from.take();
        while !bytes.is_empty() && !self.failed {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            self.failed = self.to.send(piece).await.is_err();
        }
        !self.failed
    }
}
