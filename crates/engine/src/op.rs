//! The ops that are no sources, and who makes the op of a vertex.

pub mod build;
pub mod compose;
pub mod exec;
pub mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::BuildError;

pub use ::build::op::{
    CacheMap, Dep, Fetched, Op, OpContext, OpProvenance, ResultRef, UnpinnedRequest, UrlPolicy, VertexBridge,
    VertexJobs, VertexSpec,
};

/// Makes the op of a vertex.
#[async_trait]
pub trait OpFactory: Send + Sync + fmt::Debug {
    /// Makes the op. Must be quick and do no IO; what is wrong with the op is told here.
    fn create(&self, vertex: &Arc<VertexSpec>) -> Result<Arc<dyn Op>, BuildError>;

    /// Removes what was prepared for steps that will not come. Called when none runs any more.
    async fn close(&self) {}

    /// Returns what containers are made with that belong to no step.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) when none can be run.
    fn exec_parts(&self) -> Result<exec::ExecParts, BuildError> {
        Err(BuildError::new(
            crate::ErrorKind::Denied,
            "no containers can be run here",
        ))
    }

    /// Returns where the devices are described that steps may use.
    fn devices(&self) -> executor::DeviceRegistry {
        executor::DeviceRegistry::default()
    }

    /// Empties cache mounts by id, before steps that ignore the cache use them; the value says whether the mount lies on
    /// a ref.
    async fn prune_cache_mounts(&self, ids: &BTreeMap<String, bool>) -> Result<(), BuildError> {
        let _ = ids;
        Ok(())
    }
}
