//! The layers of refs as blobs: those that exist are taken as they are, the others are worked out and packed, several
//! at once.

mod form;

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::unlazy::{FetchContext, Unlazy};
use cache::{ImmutableRef, Parents, Pin, Provider, RefId, Store};
use content::{Durability, Writer};
use futures_util::stream::{StreamExt, TryStreamExt, iter};
use layer::compress::Packer;
use layer::tree::Timestamp;
use layer::{DiffOptions, Stop};
use oci::{Descriptor, Digest, media_type};
use snapshot::{SnapshotKey, diff_layer};
use source::image::fetch::BlobFetcher;

use self::form::{Form, Plain, compression_of};
use super::options::LayerOptions;

/// Layers worked on at once; compression has threads of its own.
const PARALLEL: usize = 4;

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportLayer {
    /// The blob, without annotations but for those of eStargz.
    pub descriptor: Descriptor,
    /// Digest of what the blob decompresses to.
    pub diff_id: Digest,
    /// The diffID of the layer as it came, before it was packed in another way.
    pub original_diff_id: Digest,
    /// Where the blob can be fetched if it is not in the content store.
    pub providers: Vec<Provider>,
    /// What made the layer.
    pub description: String,
    /// When it was made.
    pub created_at: SystemTime,
}

impl ExportLayer {
    /// When the layer was made, as history entries have it.
    pub fn created_text(&self) -> String {
        oci::timestamp::from_system(self.created_at)
    }
}

/// Works out the layers of refs. Cheap to clone; shared by all exporters, so that no layer is packed twice at once.
#[derive(Clone, Debug)]
pub struct LayerExporter {
    store: Store,
    fetcher: BlobFetcher,
    busy: Arc<Mutex<BTreeMap<RefId, Arc<tokio::sync::Mutex<()>>>>>,
}

impl LayerExporter {
    /// Exports from a store, fetching what is lazy.
    pub fn new(store: Store, fetcher: BlobFetcher) -> Self {
        Self {
            store,
            fetcher,
            busy: Arc::default(),
        }
    }

    /// Returns the store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns what fetches lazy blobs.
    pub fn fetcher(&self) -> &BlobFetcher {
        &self.fetcher
    }

    /// Returns a ref's layers, bottom first. Blobs that had to be made are recorded with their refs, so that the next
    /// export finds them; `pin` holds all that are here.
    pub async fn layers(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        options: LayerOptions,
        pin: &Arc<Mutex<Pin>>,
    ) -> Result<Vec<ExportLayer>, BuildError> {
        let chain = {
            let reference = reference.clone();
            blocking(move || {
                reference.finalize().map_err(internal)?;
                Ok(reference.layer_chain())
            })
            .await?
        };
        let work = chain.into_iter().map(|layer| {
            let pin = Arc::clone(pin);
            async move { self.layer(ctx, layer, options, &pin).await }
        });
        let layers = iter(work).buffered(PARALLEL).try_collect();
        tokio::select! {
            layers = layers => layers,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }

    async fn layer(
        &self,
        ctx: &FetchContext,
        reference: ImmutableRef,
        options: LayerOptions,
        pin: &Mutex<Pin>,
    ) -> Result<ExportLayer, BuildError> {
        let slot = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|_, slot| Arc::strong_count(slot) > 1);
            Arc::clone(busy.entry(reference.id().clone()).or_default())
        };
        let _guard = slot.lock().await;
        let mut blobs = {
            let reference = reference.clone();
            blocking(move || reference.usable_blobs().map_err(internal)).await?
        };
        if blobs.is_empty() {
            self.pack(ctx, &reference, options).await?;
            blobs = reference.blobs();
        }
        let blob = self.choose(ctx, &reference, blobs, options).await?;
        pin.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(blob.digest);
        described(&reference, blob, options)
    }

    /// Chooses the blob that is packed as the options want it; makes it if there is none.
    async fn choose(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        blobs: Vec<Descriptor>,
        options: LayerOptions,
    ) -> Result<Descriptor, BuildError> {
        let store = self.store.clone();
        let forms = blocking(move || {
            let forms = blobs.into_iter().map(|blob| Form::of(&store, blob));
            forms.collect::<Result<Vec<_>, _>>()
        })
        .await?;
        let wanted = forms
            .iter()
            .position(|form| !options.force || form.compression == Some(options.compression));
        let mut forms = forms.into_iter();
        if let Some(form) = wanted.and_then(|wanted| forms.nth(wanted)) {
            return Ok(form.blob);
        }
        match forms.next() {
            Some(first) => self.convert(ctx, reference, &first.blob, options).await,
            None => Err(BuildError::internal(format!(
                "no blob set for ref {}",
                reference.id()
            ))),
        }
    }

    /// Works out what a layer changes and packs it.
    async fn pack(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        options: LayerOptions,
    ) -> Result<(), BuildError> {
        let sides = {
            let (store, reference) = (self.store.clone(), reference.clone());
            blocking(move || Sides::of(&store, &reference)).await?
        };
        for side in sides.all() {
            self.fetcher.unpack(ctx, side).await?;
        }
        let (store, reference) = (self.store.clone(), reference.clone());
        let cancel = ctx.cancel.clone();
        // What is packed for nobody would go on for as long as the files are large.
        let stop = Stop::when(move || cancel.is_cancelled());
        blocking(move || {
            let key = format!("layer-{}", reference.id());
            let packing = Packing::start(&store, &key, options)?;
            let packed = packing.run(&store, options.media_type(), |out| sides.diff(&store, out, stop))?;
            let (diff_id, descriptor) = (packed.diff_id, packed.descriptor.clone());
            // It had a blob once, and was then packed in another way.
            let is_first = reference.diff_id().is_none_or(|known| known == diff_id);
            reference
                .set_blob(diff_id, descriptor, Vec::new(), is_first)
                .map_err(internal)
        })
        .await
    }

    /// Packs a layer's blob in another way, once.
    async fn convert(
        &self,
        ctx: &FetchContext,
        reference: &ImmutableRef,
        blob: &Descriptor,
        options: LayerOptions,
    ) -> Result<Descriptor, BuildError> {
        self.fetcher
            .fetch_blob(ctx, blob, &reference.providers(&blob.digest))
            .await?;
        let (store, reference, blob) = (self.store.clone(), reference.clone(), blob.clone());
        blocking(move || {
            // Only now that it is here is it known what it is.
            let source = Form::of(&store, blob)?;
            if source.compression == Some(options.compression) {
                return Ok(source.blob);
            }
            let blob = source.blob.digest;
            let plain = Plain::open(&store, &source)?;
            let key = format!("convert-{}-{:?}", reference.id(), options.compression);
            let packing = Packing::start(&store, &key, options)?;
            let packed = packing.run(&store, options.media_type(), |out| {
                let found = plain.copy(out)?;
                let expected = reference.diff_id_of(&blob);
                if expected.is_some_and(|expected| expected != found) {
                    let text = format!("layer {blob} has diffID {found}, expected {expected:?}");
                    return Err(BuildError::user(text));
                }
                Ok(())
            })?;
            let descriptor = packed.descriptor.clone();
            reference
                .set_blob(packed.diff_id, descriptor.clone(), Vec::new(), false)
                .map_err(internal)?;
            Ok(descriptor)
        })
        .await
    }

    /// Sets all times in a layer to at most `epoch`. The new blob belongs to no ref: `pin` holds it.
    pub async fn rewrite(
        &self,
        ctx: &FetchContext,
        layer: &ExportLayer,
        options: LayerOptions,
        epoch: Timestamp,
        pin: &Arc<Mutex<Pin>>,
    ) -> Result<ExportLayer, BuildError> {
        self.fetcher
            .fetch_blob(ctx, &layer.descriptor, &layer.providers)
            .await?;
        let (store, layer, pin) = (self.store.clone(), layer.clone(), Arc::clone(pin));
        blocking(move || {
            let key = format!(
                "rewrite-{}-{}-{:?}",
                layer.descriptor.digest, epoch.seconds, options
            );
            let plain = Plain::open(&store, &Form::of(&store, layer.descriptor.clone())?)?;
            let packing = Packing::start(&store, &key, options)?;
            let packed = packing.run(&store, options.media_type(), |out| {
                let plain = plain.layer()?;
                layer::rewrite::rewrite_timestamps(plain, out, epoch).map_err(internal)
            })?;
            pin.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(packed.descriptor.digest);
            Ok(ExportLayer {
                descriptor: packed.descriptor.clone(),
                diff_id: packed.diff_id,
                providers: Vec::new(),
                ..layer
            })
        })
        .await
    }
}

/// The two trees between which a layer lies.
struct Sides {
    lower: Option<ImmutableRef>,
    upper: Option<ImmutableRef>,
}

impl Sides {
    fn of(store: &Store, reference: &ImmutableRef) -> Result<Self, BuildError> {
        let get = |id: Option<RefId>| id.map(|id| store.get(&id).map_err(internal)).transpose();
        match reference.stat().parents {
            Parents::Layer { parent } => Ok(Self {
                lower: get(parent)?,
                upper: Some(reference.clone()),
            }),
            Parents::Diff { lower, upper } => Ok(Self {
                lower: get(lower.map(|id| *id))?,
                upper: get(upper.map(|id| *id))?,
            }),
            // A merge consists of its inputs' layers and is none itself.
            Parents::Merge { .. } => Err(BuildError::internal(format!(
                "ref {} is a merge and has no layer of its own",
                reference.id()
            ))),
        }
    }

    fn all(&self) -> impl Iterator<Item = &ImmutableRef> {
        self.lower.iter().chain(&self.upper)
    }

    fn diff(&self, store: &Store, out: &mut Out, stop: Stop) -> Result<(), BuildError> {
        let key = |side: &Option<ImmutableRef>| -> Result<Option<SnapshotKey>, BuildError> {
            let Some(side) = side else { return Ok(None) };
            side.finalize().map_err(internal)?;
            side.snapshot().map_err(internal)
        };
        let (lower, upper) = (key(&self.lower)?, key(&self.upper)?);
        let options = DiffOptions {
            capability_only: true,
            stop,
            ..DiffOptions::default()
        };
        let snapshotter = store.snapshotter();
        let Some(upper) = upper else {
            let scratch = Scratch::new(store)?;
            return diff_layer(&**snapshotter, lower.as_ref(), &scratch.key, out, &options).map_err(internal);
        };
        diff_layer(&**snapshotter, lower.as_ref(), &upper, out, &options).map_err(internal)
    }
}

/// An empty tree for the time of a comparison.
struct Scratch<'a> {
    store: &'a Store,
    key: SnapshotKey,
}

impl<'a> Scratch<'a> {
    fn new(store: &'a Store) -> Result<Self, BuildError> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("export-scratch-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let key: SnapshotKey = name.parse().map_err(internal)?;
        store.snapshotter().prepare(&key, None).map_err(internal)?;
        Ok(Self { store, key })
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.store.snapshotter().remove(&self.key) {
            tracing::warn!(%error, "an empty snapshot stays until the next start");
        }
    }
}

type Out = Packer<BufWriter<Writer>>;

/// A blob being packed into the content store.
struct Packing {
    packer: Out,
}

/// A packed blob, held.
struct PackedBlob {
    descriptor: Descriptor,
    diff_id: Digest,
    /// Holds the blob until whoever made it recorded or held it otherwise.
    _pin: Pin,
}

impl Packing {
    fn start(store: &Store, key: &str, options: LayerOptions) -> Result<Self, BuildError> {
        let mut writer = store.content().writer(key, None).map_err(internal)?;
        // What an interrupted attempt left cannot be continued.
        writer.restart().map_err(internal)?;
        let out = BufWriter::with_capacity(1 << 20, writer);
        let packer = Packer::new(out, options.compression, options.level).map_err(internal)?;
        Ok(Self { packer })
    }

    fn run(
        mut self,
        store: &Store,
        media_type: &str,
        write: impl FnOnce(&mut Out) -> Result<(), BuildError>,
    ) -> Result<PackedBlob, BuildError> {
        write(&mut self.packer)?;
        let packed = self.packer.finish().map_err(internal)?;
        let writer = packed
            .out
            .into_inner()
            .map_err(|error| internal(error.into_error()))?;
        let size_bytes = writer.offset();
        // Held before it is visible, or a collection might find it first.
        let pin = store.pin(&[writer.digest()]);
        let digest = writer.commit_with(Durability::Deferred).map_err(internal)?;
        let mut descriptor = Descriptor::new(media_type, digest, size_bytes);
        descriptor.annotations = packed.annotations;
        Ok(PackedBlob {
            descriptor,
            diff_id: packed.diff_id,
            _pin: pin,
        })
    }
}

fn described(
    reference: &ImmutableRef,
    blob: Descriptor,
    options: LayerOptions,
) -> Result<ExportLayer, BuildError> {
    let stat = reference.stat();
    let diff_ids = reference.diff_id_of(&blob.digest).zip(stat.diff_id);
    let Some((diff_id, original_diff_id)) = diff_ids else {
        return Err(BuildError::internal(format!(
            "no diffID set for ref {}",
            reference.id()
        )));
    };
    let mut descriptor = Descriptor::new(blob.media_type, blob.digest, blob.size);
    descriptor.annotations = blob.annotations;
    if options.prefer_nondistributable && !blob.urls.is_empty() {
        descriptor.media_type = nondistributable(&descriptor.media_type).to_owned();
        descriptor.urls = blob.urls;
    } else {
        // Without places of its own there is no reason for a layer not to be distributed.
        descriptor.media_type = distributable(&descriptor.media_type).to_owned();
    }
    let description = if stat.description.is_empty() {
        "created by buildkit".to_owned()
    } else {
        stat.description
    };
    let providers = stat
        .providers
        .get(&descriptor.digest)
        .cloned()
        .unwrap_or_default();
    Ok(ExportLayer {
        descriptor,
        diff_id,
        original_diff_id,
        providers,
        description,
        created_at: stat.created_at,
    })
}

fn distributable(kind: &str) -> &str {
    match kind {
        media_type::OCI_FOREIGN_LAYER => media_type::OCI_LAYER,
        media_type::OCI_FOREIGN_LAYER_GZIP => media_type::OCI_LAYER_GZIP,
        media_type::OCI_FOREIGN_LAYER_ZSTD => media_type::OCI_LAYER_ZSTD,
        media_type::DOCKER_FOREIGN_LAYER => media_type::DOCKER_LAYER,
        media_type::DOCKER_FOREIGN_LAYER_GZIP => media_type::DOCKER_LAYER_GZIP,
        other => other,
    }
}

fn nondistributable(kind: &str) -> &str {
    match kind {
        media_type::OCI_LAYER => media_type::OCI_FOREIGN_LAYER,
        media_type::OCI_LAYER_GZIP => media_type::OCI_FOREIGN_LAYER_GZIP,
        media_type::OCI_LAYER_ZSTD => media_type::OCI_FOREIGN_LAYER_ZSTD,
        media_type::DOCKER_LAYER => media_type::DOCKER_FOREIGN_LAYER,
        media_type::DOCKER_LAYER_GZIP => media_type::DOCKER_FOREIGN_LAYER_GZIP,
        other => other,
    }
}

/// Whether all layers of a ref are packed already, as the options want it, by what is said of their blobs.
pub fn has_blobs(reference: &ImmutableRef, options: LayerOptions) -> bool {
    let chain = reference.layer_chain();
    chain.iter().all(|layer| {
        let blobs = layer.blobs();
        let fits = |blob: &Descriptor| !options.force || compression_of(blob) == Some(options.compression);
        blobs.iter().any(fits)
    })
}

/// Sets a layer's media type to OCI's or Docker's name of it.
pub fn set_family(layer: &mut ExportLayer, oci_types: bool) {
    let kind = &layer.descriptor.media_type;
    let converted = if oci_types {
        media_type::to_oci(kind)
    } else {
        media_type::to_docker(kind)
    };
    // Docker has a name for zstd layers, but their manifests are OCI's: those are converted as well.
    let converted = match converted {
        media_type::OCI_LAYER_ZSTD if !oci_types => media_type::DOCKER_LAYER_ZSTD,
        other => other,
    };
    layer.descriptor.media_type = converted.to_owned();
}

/// The error that an image needs something of a platform that is not there.
pub fn missing_ref(id: &str) -> BuildError {
    BuildError::new(ErrorKind::User, format!("failed to find ref for ID {id}"))
}
