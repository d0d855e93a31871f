//! Setting an engine up on a state directory: stores, sources, ops, exporters, frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cache::{StateLock, Store, StoreOptions};
use executor::{DeviceRegistry, Executor, ExecutorConfig, ExecutorError};
use export::image::ImageExporter;
use export::image::layers::LayerExporter;
use export::local::LocalExporter;
use export::oci::{ArchiveExporter, Variant};
use export::tar::TarExporter;
use oci::Platform;
use registry::HostsConfig;
use remotecache::{self, ObjectAccess, RemoteCaches};
use snapshot::Snapshotter;
use source::http::HttpFiles;
use source::image::fetch::BlobFetcher;
use source::image::{Images, providers};

use crate::attestation::{ProvenanceProcessor, SbomProcessor};
use crate::bridge::Frontend;
use crate::engine::{Engine, Services};
use crate::error::{BuildError, ErrorKind};
use crate::frontend::dockerfile::{self, DockerfileFrontend};
use crate::frontend::gateway::{self, Abilities, FrontendHost, GatewayFrontend, GatewayLimits};
use crate::job::{Entitlement, ResolveCache};
use crate::op::exec::Emulators;
use crate::session::Sessions;
use crate::solve::Exporter;
use crate::unlazy::Unlazy;
use crate::worker::{Worker, WorkerParts};

/// How snapshots are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotterChoice {
    /// Overlays where they can be mounted, else copies.
    #[default]
    Auto,
    /// Overlays, or a failure to start.
    Overlay,
    /// Copies.
    Native,
}

/// What an engine is set up with.
#[derive(Debug)]
pub struct EngineConfig {
    /// The state directory.
    pub root: PathBuf,
    /// How long to wait for another process to let the state directory go; `None`: not at all.
    pub lock_timeout: Option<Duration>,
    /// How snapshots are kept.
    pub snapshotter: SnapshotterChoice,
    /// How containers are run; its directory is set here.
    pub executor: ExecutorConfig,
    /// Where devices are described that steps may use.
    pub devices: DeviceRegistry,
    /// Runs steps of platforms whose programs do not run here by themselves.
    pub emulators: Emulators,
    /// How registries are reached.
    pub registries: HostsConfig,
    /// What web servers are told of who fetches from them.
    pub web_user_agent: String,
    /// The clients.
    pub sessions: Arc<dyn Sessions>,
    /// Platforms whose programs run here, the preferred one first.
    pub platforms: Vec<Platform>,
    /// What definitions may contain.
    pub capabilities: BTreeSet<String>,
    /// Rights that builds may be granted.
    pub allowed_entitlements: Vec<Entitlement>,
    /// Steps that may run at once; `None`: no limit.
    pub max_parallelism: Option<NonZeroUsize>,
    /// Whether sources must be asked by builds that do not say.
    pub resolve_cache: ResolveCache,
    /// Frontends that are switched off, by name.
    pub disabled_frontends: BTreeSet<String>,
    /// Serves frontends that are run from images.
    pub frontend_host: Arc<dyn FrontendHost>,
    /// Repositories from which frontends may be run; empty: all.
    pub allowed_frontends: Vec<String>,
    /// Entries that are added to what provenance says of where builds run.
    pub provenance_environment: BTreeMap<String, serde_json::Value>,
}

/// What came of setting up.
#[derive(Debug)]
pub struct Ready {
    /// The engine.
    pub engine: Engine,
    /// The snapshotter's name, as clients know it: `overlayfs` or `native`.
    pub snapshotter: &'static str,
    /// Why no containers can be run, if so.
    pub without_containers: Option<String>,
}

/// Opens the state directory and starts the engine. Called on a tokio runtime; blocks for as long as opening takes.
///
/// # Errors
/// With the cause and the path: the state directory is in use, of a newer version, not writable, damaged.
pub fn setup(config: EngineConfig) -> Result<Ready, BuildError> {
    let frontends = frontends(&config)?;
    // Containers' users pass through it, but look at nothing.
    let mut dir = std::fs::DirBuilder::new();
    dir.recursive(true)
        .mode(0o711)
        .create(&config.root)
        .map_err(|error| {
            BuildError::from_source(ErrorKind::Internal, error)
                .context(format!("create {}", config.root.display()))
        })?;
    let (store, snapshotter) = open_store(&config.root, config.lock_timeout, config.snapshotter)?;
    let (executor, without_containers) = start_executor(&config)?;
    let client = registry::Client::new(config.registries.clone());
    let images = Images::new(client, store.clone());
    let mut places = providers(&images);
    let web = registry::web_client(&config.web_user_agent).map_err(internal)?;
    let files = registry::web_client_without_redirects(&config.web_user_agent).map_err(internal)?;
    let access = ObjectAccess {
        client: web,
        variable: |name| std::env::var(name).ok(),
        connections: Arc::default(),
    };
    places.extend(remotecache::providers(&images, &access.connections));
    let fetcher = BlobFetcher::new(store.clone(), places);
    let unlazy: Arc<dyn Unlazy> = Arc::new(fetcher.clone());
    let worker = Worker::new(WorkerParts {
        store: store.clone(),
        images: Arc::clone(&images),
        http: HttpFiles::new(files, store.clone()),
        unlazy: Arc::clone(&unlazy),
        devices: config.devices,
        emulators: config.emulators,
        executor,
        dir: config.root.join("worker"),
    })?;
    let worker = Arc::new(worker);
    let layers = LayerExporter::new(store.clone(), fetcher);
    let caches = RemoteCaches::new(&images, &layers, &access);
    let engine = Engine::start(Services {
        store,
        sessions: config.sessions,
        ops: Arc::clone(&worker) as _,
        sources: worker,
        frontends,
        exporters: exporters(images, layers, &unlazy),
        unlazy,
        cache_importers: caches.importers,
        cache_exporters: caches.exporters,
        processors: vec![
            Arc::new(SbomProcessor),
            Arc::new(ProvenanceProcessor::new(config.provenance_environment)),
        ],
        allowed_entitlements: config.allowed_entitlements,
        max_parallelism: config.max_parallelism,
        resolve_cache: config.resolve_cache,
    });
    Ok(Ready {
        engine,
        snapshotter,
        without_containers,
    })
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

/// Opens the store of an existing state directory and tells its snapshotter's name. Blocking.
///
/// # Errors
/// As [`setup`].
pub fn open_store(
    root: &Path,
    lock_timeout: Option<Duration>,
    snapshotter: SnapshotterChoice,
) -> Result<(Store, &'static str), BuildError> {
    // Opening sweeps, so nothing is opened that another process uses or a newer version made.
    let lock = StateLock::acquire(root, lock_timeout).map_err(|error| {
        let is_locked = matches!(error, cache::OpenError::Locked { .. });
        BuildError::from_source(
            if is_locked {
                ErrorKind::Unavailable
            } else {
                ErrorKind::Internal
            },
            error,
        )
    })?;
    let content = content::Store::open(&root.join("content")).map_err(internal)?;
    let (snapshotter, name) = open_snapshotter(snapshotter, &root.join("snapshots"))?;
    let options = StoreOptions {
        lock: Some(lock),
        ..StoreOptions::default()
    };
    let store = Store::open(root, content, snapshotter, options).map_err(internal)?;
    Ok((store, name))
}

fn open_snapshotter(
    choice: SnapshotterChoice,
    root: &Path,
) -> Result<(Arc<dyn Snapshotter>, &'static str), BuildError> {
    let native = || -> Result<(Arc<dyn Snapshotter>, &'static str), BuildError> {
        Ok((
            Arc::new(snapshot::Native::open(&root.join("native")).map_err(internal)?),
            "native",
        ))
    };
    if choice == SnapshotterChoice::Native {
        return native();
    }
    match snapshot::Overlay::open(&root.join("overlayfs"), snapshot::OverlayOptions::default()) {
        Ok(overlay) => Ok((Arc::new(overlay), "overlayfs")),
        Err(error) if choice == SnapshotterChoice::Overlay => Err(internal(error)),
        Err(error) => {
            tracing::warn!(%error, "overlays cannot be mounted here, trees are copied instead");
            native()
        }
    }
}

fn start_executor(config: &EngineConfig) -> Result<(Option<Executor>, Option<String>), BuildError> {
    let state_dir = config.root.join("executor");
    let parts = ExecutorConfig {
        state_dir,
        ..config.executor.clone()
    };
    match Executor::new(parts) {
        Ok(executor) => Ok((Some(executor), None)),
        // Everything but containers works without root.
        Err(error @ ExecutorError::Unprivileged { .. }) => Ok((None, Some(error.to_string()))),
        Err(error) => Err(internal(error)),
    }
}

fn frontends(config: &EngineConfig) -> Result<BTreeMap<String, Arc<dyn Frontend>>, BuildError> {
    let platforms = &config.platforms;
    let dockerfile = DockerfileFrontend::new(platforms.clone(), config.capabilities.clone());
    let gateway = GatewayFrontend::new(
        Arc::clone(&config.frontend_host),
        &config.allowed_frontends,
        Abilities {
            platforms: platforms.clone(),
            capabilities: config.capabilities.clone(),
        },
        GatewayLimits::default(),
    )?;
    let mut frontends: BTreeMap<String, Arc<dyn Frontend>> = BTreeMap::new();
    frontends.insert(dockerfile::NAME.to_owned(), Arc::new(dockerfile));
    frontends.insert(gateway::NAME.to_owned(), Arc::new(gateway));
    frontends.retain(|name, _| !config.disabled_frontends.contains(name));
    Ok(frontends)
}

fn exporters(
    images: Arc<Images>,
    layers: LayerExporter,
    unlazy: &Arc<dyn Unlazy>,
) -> BTreeMap<String, Arc<dyn Exporter>> {
    let named = |name: &str, exporter: Arc<dyn Exporter>| (name.to_owned(), exporter);
    BTreeMap::from([
        named("image", Arc::new(ImageExporter::new(images, layers.clone()))),
        named(
            "oci",
            Arc::new(ArchiveExporter::new(layers.clone(), Variant::Oci)),
        ),
        named("docker", Arc::new(ArchiveExporter::new(layers, Variant::Docker))),
        named("local", Arc::new(LocalExporter::new(Arc::clone(unlazy)))),
        named("tar", Arc::new(TarExporter::new(Arc::clone(unlazy)))),
    ])
}
