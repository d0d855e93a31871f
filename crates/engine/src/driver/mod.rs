//! Performs what the solver decides.
//!
//! One task owns the solver. It reads a bounded inbox of commands and the answers of effects that run in a `JoinSet`;
//! cheap effects (record lookups in memory, saving records) are performed on the spot. [`Driver`] is the handle through
//! which bridges give it work.

mod explaining;
mod imports;
mod records;
mod renew;
mod run;
mod why;
mod work;

use std::collections::BTreeSet;
use std::sync::Arc;

use oci::Digest;
use solver::{BuildId, EdgeId, ExportGraph, Owner, StoreId, StoredResult, VertexDef, VertexId};
use tokio::sync::{mpsc, oneshot};

use crate::error::BuildError;
use crate::job::Job;
use crate::op::{OpProvenance, ResultRef, VertexBridge, VertexJobs, VertexSpec};

pub use build::cache_import::{CacheImporter, ImportContext, ImportedCache};
pub(crate) use imports::ImportSlot;
pub(crate) use records::LocalRecords;
pub(crate) use run::{DriverParts, spawn};

/// Commands that may wait for the driver; senders wait beyond that.
const INBOX: usize = 1024;

/// What a build yields.
#[derive(Clone, Debug)]
pub struct Evaluated {
    /// The result.
    pub result: ResultRef,
    /// Where it is in the solver's graph, until the job ends.
    pub edge: EdgeId,
}

/// A graph that is ready to be built.
#[derive(Clone, Debug)]
pub struct PreparedGraph {
    /// For the solver.
    pub defs: Vec<VertexDef>,
    /// For the ops, in the same order.
    pub specs: Vec<Arc<VertexSpec>>,
    /// Index of the wanted vertex, and its output.
    pub target: (usize, usize),
}

/// A step behind a result, as provenance wants it.
#[derive(Clone, Debug)]
pub struct StepProvenance {
    /// The vertex.
    pub vertex: Arc<VertexSpec>,
    /// What its op contributed, if it came to be asked.
    pub op: Option<OpProvenance>,
}

/// The steps behind results, with the results that the build holds.
#[derive(Clone, Debug, Default)]
pub struct Exported {
    /// The steps.
    pub graph: ExportGraph,
    /// Results of the steps, and when they were made.
    pub results: Vec<Option<(ResultRef, std::time::SystemTime)>>,
}

/// What the driver is told.
pub(crate) enum Command {
    Build {
        build: BuildId,
        owner: Owner,
        graph: PreparedGraph,
        reply: oneshot::Sender<Result<Evaluated, BuildError>>,
    },
    Renew {
        build: BuildId,
        owner: Owner,
        edge: EdgeId,
        lost: Arc<BTreeSet<Digest>>,
        reply: oneshot::Sender<Result<Evaluated, BuildError>>,
    },
    Cancel {
        build: BuildId,
    },
    OpenJob {
        job: Arc<Job>,
    },
    Import {
        store: StoreId,
        slot: ImportSlot,
    },
    Export {
        edges: Vec<EdgeId>,
        reply: oneshot::Sender<Exported>,
    },
    Provenance {
        edge: EdgeId,
        reply: oneshot::Sender<Vec<StepProvenance>>,
    },
    LoadStored {
        stored: StoredResult,
        jobs: Vec<Arc<Job>>,
        reply: oneshot::Sender<Result<Option<ResultRef>, BuildError>>,
    },
    Explained {
        job: Arc<Job>,
        reply: oneshot::Sender<()>,
    },
    Drain {
        reply: oneshot::Sender<()>,
    },
}

/// The handle of the driver. Cheap to clone; the driver ends when the last one is gone and its effects ended.
#[derive(Clone, Debug)]
pub struct Driver {
    inbox: mpsc::Sender<Command>,
    closing: mpsc::UnboundedSender<u64>,
    numbers: Arc<std::sync::atomic::AtomicU64>,
}

impl Driver {
    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    async fn send(&self, command: Command) -> Result<(), BuildError> {
        self.inbox.send(command).await.map_err(|_| BuildError::canceled())
    }

    /// Builds a graph. Dropping the future gives up the wish; work that others want goes on.
    pub(crate) async fn build(&self, owner: Owner, graph: PreparedGraph) -> Result<Evaluated, BuildError> {
        self.wish(|build, reply| Command::Build {
            build,
            owner,
            graph,
            reply,
        })
        .await
    }

    /// Builds an edge again whose result, or one behind it, lacks blobs that are lost. What lacks none stays; the answer
    /// may be the same result as before.
    pub(crate) async fn renew(
        &self,
        owner: Owner,
        edge: EdgeId,
        lost: Arc<BTreeSet<Digest>>,
    ) -> Result<Evaluated, BuildError> {
        self.wish(|build, reply| Command::Renew {
            build,
            owner,
            edge,
            lost,
            reply,
        })
        .await
    }

    async fn wish(
        &self,
        command: impl FnOnce(BuildId, oneshot::Sender<Result<Evaluated, BuildError>>) -> Command,
    ) -> Result<Evaluated, BuildError> {
        let build = BuildId(self.number());
        let (reply, answer) = oneshot::channel();
        // Reserved before anything is asked for, so that giving up needs no waiting.
        let cancel = self
            .inbox
            .clone()
            .reserve_owned()
            .await
            .map_err(|_| BuildError::canceled())?;
        self.send(command(build, reply)).await?;
        let mut guard = CancelBuild {
            build,
            permit: Some(cancel),
        };
        let outcome = answer.await;
        guard.permit = None;
        outcome.unwrap_or_else(|_| Err(BuildError::canceled()))
    }

    /// Makes a job known. Its vertices live until [`Self::close_job`].
    pub(crate) async fn open_job(&self, job: Arc<Job>) -> Result<(), BuildError> {
        self.send(Command::OpenJob { job }).await
    }

    /// Ends a job: its builds are cancelled, its vertices given up. Never waits, as it is called by destructors; jobs to
    /// be closed are the one queue without a bound of its own, but there are no more of them than open jobs.
    pub(crate) fn close_job(&self, job: u64) {
        // A driver that is gone has no jobs.
        let _ = self.closing.send(job);
    }

    /// Registers a cache that is being imported.
    pub(crate) async fn import(&self, slot: ImportSlot) -> Result<StoreId, BuildError> {
        // Store 0 is the local one.
        let number = u32::try_from(self.number() % u64::from(u32::MAX)).unwrap_or(0);
        let store = StoreId(number.saturating_add(1));
        self.send(Command::Import { store, slot }).await?;
        Ok(store)
    }

    /// Collects the steps behind results.
    pub(crate) async fn export(&self, edges: Vec<EdgeId>) -> Result<Exported, BuildError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Export { edges, reply }).await?;
        answer.await.map_err(|_| BuildError::canceled())
    }

    /// Collects what ops contributed to the provenance of a result, inputs before users.
    pub async fn provenance(&self, edge: EdgeId) -> Result<Vec<StepProvenance>, BuildError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Provenance { edge, reply }).await?;
        answer.await.map_err(|_| BuildError::canceled())
    }

    /// Loads a result that is known but was not loaded.
    pub(crate) async fn load_stored(
        &self,
        stored: StoredResult,
        jobs: Vec<Arc<Job>>,
    ) -> Result<Option<ResultRef>, BuildError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::LoadStored { stored, jobs, reply }).await?;
        answer.await.map_err(|_| BuildError::canceled())?
    }

    /// Waits until it is known why the vertices run that a job shares and that run or ran.
    pub(crate) async fn explained(&self, job: Arc<Job>) {
        let (reply, answer) = oneshot::channel();
        if self.send(Command::Explained { job, reply }).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// Waits until no effect runs any more. Meant for the end: new work still may start.
    pub async fn drain(&self) {
        let (reply, answer) = oneshot::channel();
        if self.send(Command::Drain { reply }).await.is_ok() {
            let _ = answer.await;
        }
    }
}

/// Gives up a build when it is dropped.
struct CancelBuild {
    build: BuildId,
    permit: Option<mpsc::OwnedPermit<Command>>,
}

impl Drop for CancelBuild {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.send(Command::Cancel { build: self.build });
        }
    }
}

/// Makes the bridge of a vertex's op. The driver cannot make it itself without keeping itself alive.
pub(crate) trait Bridges: Send + Sync + std::fmt::Debug {
    /// Makes the bridge; `None` when the engine is ending.
    fn vertex_bridge(&self, vertex: VertexId, jobs: &Arc<VertexJobs>) -> Option<Arc<dyn VertexBridge>>;
}
