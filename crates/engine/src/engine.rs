//! The engine: what shells hold. It ties the driver, the ports and the jobs together.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use solver::VertexId;
use tokio::sync::watch;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::bridge::{AskedBook, Bridge, Forwarder, Frontend, SourceResolver};
use crate::driver::{self, Bridges, CacheImporter, Driver, LocalRecords};
use crate::error::{BuildError, ErrorKind};
use crate::job::{Entitlement, Job, JobId, JobSettings, ResolveCache};
use crate::jobs::Jobs;
use crate::op::{OpFactory, VertexBridge, VertexJobs};
use crate::progress::Subscription;
use crate::session::Sessions;
use crate::solve::{CacheExporterFactory, Exporter, ResultProcessor};
use crate::unlazy::Unlazy;

/// How long a status request waits for its build to begin.
const JOB_WAIT: Duration = Duration::from_secs(6);
/// How long a client's own frontend waits for its build to be registered.
const FORWARD_WAIT: Duration = Duration::from_secs(3);
/// How long a build's progress can be asked for after its end: a client asks beside its build, which may be short.
const JOB_LINGER: Duration = Duration::from_secs(10);

/// The parts that the engine is made of. `main` builds them all.
#[derive(Debug)]
pub struct Services {
    /// Where refs and records are kept.
    pub store: cache::Store,
    /// The clients.
    pub sessions: Arc<dyn Sessions>,
    /// Makes ops.
    pub ops: Arc<dyn OpFactory>,
    /// Resolves sources for frontends.
    pub sources: Arc<dyn SourceResolver>,
    /// Makes lazy refs real.
    pub unlazy: Arc<dyn Unlazy>,
    /// Frontends by name, e.g. `dockerfile.v0`.
    pub frontends: BTreeMap<String, Arc<dyn Frontend>>,
    /// Exporters by type, e.g. `image`.
    pub exporters: BTreeMap<String, Arc<dyn Exporter>>,
    /// Cache importers by type, e.g. `registry`.
    pub cache_importers: BTreeMap<String, Arc<dyn CacheImporter>>,
    /// Cache exporters by type, e.g. `registry`.
    pub cache_exporters: BTreeMap<String, Arc<dyn CacheExporterFactory>>,
    /// Run in order on every result before it is exported.
    pub processors: Vec<Arc<dyn ResultProcessor>>,
    /// Rights that builds may be granted.
    pub allowed_entitlements: Vec<Entitlement>,
    /// Steps that may run at once; `None`: no limit.
    pub max_parallelism: Option<NonZeroUsize>,
    /// Whether sources must be asked by builds that do not say.
    pub resolve_cache: ResolveCache,
}

/// What all handles of one engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) services: Services,
    driver: OnceLock<Driver>,
    jobs: Arc<Jobs>,
    _forgetting: AbortOnDropHandle<()>,
    forwarders: Mutex<BTreeMap<JobId, Forwarder>>,
    /// What was asked for the definitions that frontends of open builds made.
    pub(crate) asked: Arc<AskedBook>,
    /// Changes whenever a job or a forwarder is added.
    added: watch::Sender<u64>,
    next_job: AtomicU64,
    /// Work beside builds, such as imports of caches; ended with the engine.
    pub(crate) tasks: TaskTracker,
}

#[derive(Debug)]
struct VertexBridges(Weak<Shared>);

impl Bridges for VertexBridges {
    fn vertex_bridge(&self, vertex: VertexId, jobs: &Arc<VertexJobs>) -> Option<Arc<dyn VertexBridge>> {
        let shared = self.0.upgrade()?;
        Some(Arc::new(Bridge::of_vertex(shared, vertex, Arc::clone(jobs))))
    }
}

/// Builds. Cheap to clone; when the last clone goes, what still runs is cancelled.
#[derive(Clone, Debug)]
pub struct Engine(pub(crate) Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Engine {
    /// Starts the engine on the current runtime.
    pub fn start(services: Services) -> Self {
        let (added, _) = watch::channel(0);
        let jobs = Arc::new(Jobs::new(JOB_LINGER));
        let forgetting = tokio::spawn(Arc::clone(&jobs).forget_in_time());
        let shared = Arc::new(Shared {
            services,
            driver: OnceLock::new(),
            jobs,
            _forgetting: AbortOnDropHandle::new(forgetting),
            forwarders: Mutex::default(),
            asked: Arc::default(),
            added,
            next_job: AtomicU64::new(1),
            tasks: TaskTracker::new(),
        });
        let services = &shared.services;
        let driver = driver::spawn(driver::DriverParts {
            ops: Arc::clone(&services.ops),
            sessions: Arc::clone(&services.sessions),
            records: LocalRecords::new(services.store.clone()),
            unlazy: Arc::clone(&services.unlazy),
            bridges: Arc::new(VertexBridges(Arc::downgrade(&shared))),
            max_parallelism: services.max_parallelism,
        });
        // Just made: nobody set it before.
        let _ = shared.driver.set(driver);
        Self(shared)
    }

    /// Returns the parts that the engine was made of.
    pub fn services(&self) -> &Services {
        &self.0.services
    }

    /// Follows a build's progress, waiting some seconds for a build that has not begun.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such build.
    pub async fn status(&self, id: &JobId) -> Result<Subscription, BuildError> {
        let found = self.0.wait_for(JOB_WAIT, || self.0.jobs.get(id));
        let job = found.await.ok_or_else(|| no_such_job(id))?;
        Ok(job.progress().subscribe())
    }

    /// Finds a running build.
    pub fn job(&self, id: &JobId) -> Option<Arc<Job>> {
        self.0.jobs.running(id)
    }

    /// Returns the progress of a build that runs or ended not long ago.
    pub fn job_progress(&self, id: &JobId) -> Option<crate::progress::JobProgress> {
        self.0.jobs.get(id).map(|job| job.progress().clone())
    }

    /// Finds the bridge of a build whose frontend is the client, waiting some seconds for its `Solve`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such build.
    pub async fn bridge(&self, id: &JobId) -> Result<Forwarder, BuildError> {
        let found = self
            .0
            .wait_for(FORWARD_WAIT, || lock(&self.0.forwarders).get(id).cloned());
        found.await.ok_or_else(|| no_such_job(id))
    }

    /// Waits until nothing runs any more. Builds have to be ended by their callers first.
    pub async fn drain(&self) {
        self.0.tasks.close();
        if let Ok(driver) = self.0.driver() {
            driver.drain().await;
        }
        self.0.tasks.wait().await;
        self.0.services.ops.close().await;
    }
}

fn no_such_job(id: &JobId) -> BuildError {
    BuildError::new(ErrorKind::NotFound, format!("no such job {id}"))
}

impl Shared {
    pub(crate) fn driver(&self) -> Result<&Driver, BuildError> {
        self.driver.get().ok_or_else(BuildError::canceled)
    }

    async fn wait_for<T>(&self, limit: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
        let mut added = self.added.subscribe();
        let search = async {
            loop {
                added.borrow_and_update();
                if let Some(found) = look() {
                    return Some(found);
                }
                added.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, search).await.ok().flatten()
    }

    /// Registers a job. The returned guard ends it.
    pub(crate) async fn open_job(
        self: &Arc<Self>,
        id: JobId,
        settings: JobSettings,
    ) -> Result<OpenJob, BuildError> {
        let number = self.next_job.fetch_add(1, Ordering::Relaxed);
        let job = Job::new(id, number, settings);
        if !self.jobs.add(&job) {
            let text = format!("job ID {} exists", job.id());
            return Err(BuildError::new(ErrorKind::Conflict, text));
        }
        let open = OpenJob {
            shared: Arc::clone(self),
            job: Arc::clone(&job),
        };
        self.added.send_modify(|count| *count += 1);
        // Someone may have removed files by hand since the last build.
        self.services.store.expire_checks();
        self.driver()?.open_job(job).await?;
        Ok(open)
    }

    /// Lets the client of a job use its bridge.
    pub(crate) fn forward(self: &Arc<Self>, id: JobId, forwarder: Forwarder) -> Forwarding {
        lock(&self.forwarders).insert(id.clone(), forwarder);
        self.added.send_modify(|count| *count += 1);
        Forwarding {
            shared: Arc::clone(self),
            id,
        }
    }
}

/// A registered job; dropping it ends it.
#[derive(Debug)]
pub(crate) struct OpenJob {
    shared: Arc<Shared>,
    pub(crate) job: Arc<Job>,
}

impl Drop for OpenJob {
    fn drop(&mut self) {
        self.job.progress().close();
        self.job.forget();
        self.shared.jobs.close(self.job.id());
        if let Ok(driver) = self.shared.driver() {
            driver.close_job(self.job.number());
        }
    }
}

/// A registered forwarder; dropping it takes the bridge from the client.
#[derive(Debug)]
pub(crate) struct Forwarding {
    shared: Arc<Shared>,
    id: JobId,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let forwarder = lock(&self.shared.forwarders).remove(&self.id);
        if let Some(forwarder) = forwarder {
            drop(forwarder.close());
        }
    }
}
