//! Contracts of cache importers: the records of a cache that is elsewhere are read like the local ones.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use solver::{FoundKey, Query, StoredResult};
use tokio_util::sync::CancellationToken;

use crate::error::BuildError;
use crate::job::Job;
use crate::op::ResultRef;
use crate::progress::VertexProgress;
use crate::session::SessionGroup;

/// Under what a cache is imported or read.
#[derive(Clone, Debug)]
pub struct ImportContext {
    /// The builds that use it.
    pub jobs: Vec<Arc<Job>>,
    /// Their sessions.
    pub sessions: SessionGroup,
    /// The vertex that is shown meanwhile.
    pub progress: VertexProgress,
    /// Fires when it is not wanted any more.
    pub cancel: CancellationToken,
}

/// Imports caches of one kind.
#[async_trait]
pub trait CacheImporter: Send + Sync + fmt::Debug {
    /// Names what the attributes point to, for the vertex `importing cache manifest from …`.
    fn name(&self, attrs: &BTreeMap<String, String>) -> String;

    /// Fetches the cache's records. Blobs stay where they are until they are needed.
    async fn import(
        &self,
        ctx: &ImportContext,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ImportedCache>, BuildError>;
}

/// The records of an imported cache.
#[async_trait]
pub trait ImportedCache: Send + Sync + fmt::Debug {
    /// Answers a query from memory. The query's store is to be repeated in the answer's keys.
    fn answer(&self, query: &Query) -> Vec<FoundKey>;

    /// Makes a ref of a result, as lazy as can be; `None` when it is gone.
    async fn load(&self, ctx: &ImportContext, stored: &StoredResult)
    -> Result<Option<ResultRef>, BuildError>;
}
