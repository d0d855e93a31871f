//! Imports of caches in object stores, and where lazy refs find their blobs there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use build::cache_import::{CacheImporter, ImportContext, ImportedCache};
use build::error::{BuildError, ErrorKind};
use build::job::Job;
use build::session::{SessionGroup, SessionId};
use build::unlazy::FetchContext;
use cache::{LayerBlob, Provider};
use oci::{Descriptor, Digest};
use source::image::fetch::{BlobBytes, BlobProvider};

use super::super::config::{CacheConfig, ConfigLayer, parse_time};
use super::super::export::ExportParts;
use super::super::import::{finish, warn};
use super::super::options::check_import;
use super::super::records::ImportedRecords;
use super::{Connected, ObjectKind, Variable};

/// Scheme of providers whose blobs are in an object store; the locator is the place's name.
pub const OBJECT_PROVIDER: &str = "object-cache";
/// Configurations larger than this are refused.
pub(super) const MAX_MANIFEST_BYTES: usize = 64 << 20;

/// The places that running builds gave credentials for. They end with their builds.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Vec<Connection>>);

#[derive(Debug)]
struct Connection {
    job: Weak<Job>,
    session: Option<SessionId>,
    connected: Connected,
    /// Blobs that were seen to be there.
    proven: Arc<Mutex<BTreeSet<Digest>>>,
}

type Found = (Connected, Arc<Mutex<BTreeSet<Digest>>>);

impl Connections {
    fn add(&self, jobs: &[Arc<Job>], connected: &Connected) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|connection| connection.job.strong_count() > 0);
        known.extend(jobs.iter().map(|job| Connection {
            job: Arc::downgrade(job),
            session: job.session().cloned(),
            connected: connected.clone(),
            proven: Arc::default(),
        }));
    }

    /// The place of this name, as a build with one of these sessions reaches it.
    fn find(&self, sessions: &SessionGroup, locator: &str) -> Option<Found> {
        let ids = sessions.ids();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|connection| connection.job.strong_count() > 0);
        let found = known.iter().rev().find(|connection| {
            let is_asked_for = match &connection.session {
                Some(session) => ids.contains(session),
                None => ids.is_empty(),
            };
            is_asked_for && connection.connected.locator == locator
        })?;
        Some((found.connected.clone(), Arc::clone(&found.proven)))
    }
}

/// Blobs in object stores.
#[derive(Debug)]
pub struct ObjectProvider(pub Arc<Connections>);

#[async_trait]
impl BlobProvider for ObjectProvider {
    async fn open(
        &self,
        ctx: &FetchContext,
        locator: &str,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobBytes, BuildError> {
        let Some((connected, _)) = self.0.find(&ctx.sessions, locator) else {
            let text = format!(
                "blob {} is in a cache that this build does not import",
                descriptor.digest
            );
            return Err(BuildError::new(ErrorKind::NotFound, text));
        };
        Ok(connected.cache.open(descriptor, offset).await?)
    }

    async fn has(&self, ctx: &FetchContext, locator: &str, descriptor: &Descriptor) -> bool {
        let Some((connected, proven)) = self.0.find(&ctx.sessions, locator) else {
            return false;
        };
        let known = || proven.lock().unwrap_or_else(PoisonError::into_inner);
        if known().contains(&descriptor.digest) {
            return true;
        }
        match connected.cache.has(descriptor).await {
            Ok(true) => {
                known().insert(descriptor.digest);
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::warn!(%error, digest = %descriptor.digest, "a cache cannot be asked for a blob");
                false
            }
        }
    }
}

/// Imports from object stores.
#[derive(Debug)]
pub struct ObjectImporter {
    /// Which kind.
    pub kind: ObjectKind,
    /// What all importers share.
    pub parts: ExportParts,
    /// The places in use.
    pub connections: Arc<Connections>,
    /// The daemon's environment.
    pub variable: Variable,
    /// Sends requests.
    pub client: reqwest::Client,
}

#[async_trait]
impl CacheImporter for ObjectImporter {
    fn name(&self, attrs: &BTreeMap<String, String>) -> String {
        let attr = |name: &str| {
            attrs
                .get(name)
                .map(String::as_str)
                .filter(|value| !value.is_empty())
        };
        let place = match self.kind {
            ObjectKind::S3 => attr("bucket"),
            ObjectKind::AzureBlob => attr("container").or(Some("buildkit-cache")),
            ObjectKind::GitHub => attr("scope"),
        };
        let parts = [Some(self.kind.name()), place, attr("prefix"), attr("name")];
        parts.into_iter().flatten().collect::<Vec<_>>().join(":")
    }

    async fn import(
        &self,
        ctx: &ImportContext,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ImportedCache>, BuildError> {
        check_import(self.kind.name(), attrs, self.kind.attributes())?;
        let connected = self.kind.connect(attrs, self.variable, &self.client)?;
        let importing = async {
            let manifests = connected.cache.manifests().await?;
            let mut found = Vec::new();
            for manifest in manifests {
                match serde_json::from_slice::<CacheConfig>(&manifest) {
                    Ok(config) => add(ctx, &connected.locator, config, &mut found),
                    Err(error) => warn(ctx, format!("cache configuration is ignored: {error}")),
                }
            }
            self.connections.add(&ctx.jobs, &connected);
            Ok(finish(ctx, &self.parts, found))
        };
        tokio::select! {
            imported = importing => imported,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

fn add(ctx: &ImportContext, locator: &str, config: CacheConfig, found: &mut Vec<ImportedRecords>) {
    let blobs: BTreeMap<Digest, LayerBlob> = config
        .layers
        .iter()
        .filter_map(|layer| {
            let blob = blob(locator, layer)?;
            Some((blob.descriptor.digest, blob))
        })
        .collect();
    let digests: BTreeSet<&str> = config.layers.iter().map(|layer| layer.blob.as_str()).collect();
    if blobs.len() < digests.len() {
        let lacking = digests.len() - blobs.len();
        warn(
            ctx,
            format!("{lacking} layers of the cache are ignored: they are not described"),
        );
    }
    match ImportedRecords::new(found.len(), config, &blobs) {
        Ok(records) => found.push(records),
        Err(error) => warn(ctx, format!("cache configuration is ignored: {error}")),
    }
}

/// What is known of a layer; `None` without the digest of its uncompressed bytes.
fn blob(locator: &str, layer: &ConfigLayer) -> Option<LayerBlob> {
    let known = layer.annotations.as_ref()?;
    let digest: Digest = layer.blob.parse().ok()?;
    let size = u64::try_from(known.size).ok()?;
    let created_at = (!known.created_at.starts_with("0001-")).then(|| parse_time(&known.created_at));
    Some(LayerBlob {
        descriptor: Descriptor::new(known.media_type.clone(), digest, size),
        diff_id: known.diff_id.parse().ok()?,
        providers: vec![Provider {
            scheme: OBJECT_PROVIDER.to_owned(),
            locator: locator.to_owned(),
        }],
        description: format!("imported {digest}"),
        created_at,
    })
}
