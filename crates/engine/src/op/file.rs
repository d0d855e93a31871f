//! The file op: copies, directories, files, links and removals without a container.

mod exec;
mod key;
mod owner;

pub(crate) use key::outermost;

use std::sync::Arc;

use async_trait::async_trait;
use cache::Store;
use layer::checksum::Selector;
use llb::pb;
use oci::Digest;

use crate::checksum;
use crate::error::{BuildError, FailedOp};
use crate::op::{CacheMap, Op, OpContext, ResultRef, VertexSpec};
use crate::unlazy::{FetchContext, Unlazy, unpack_all};

/// One file op. Made by [`FileOp::new`].
#[derive(Debug)]
pub struct FileOp {
    op: Arc<pb::Op>,
    store: Store,
    unlazy: Arc<dyn Unlazy>,
    description: String,
    cache_map: CacheMap,
    selectors: Vec<Vec<Selector>>,
}

impl FileOp {
    /// Makes the op of a vertex; what is wrong with its actions' indices is told here.
    ///
    /// # Errors
    /// A user error for an op without actions, or with indices that lead nowhere.
    pub fn new(vertex: &VertexSpec, store: Store, unlazy: Arc<dyn Unlazy>) -> Result<Self, BuildError> {
        let op = file_op(&vertex.op)?;
        if op.actions.is_empty() {
            return Err(BuildError::user("invalid file op with no actions"));
        }
        let key = key::key(op, vertex.inputs.len())?;
        exec::Plan::new(op, vertex.inputs.len())?;
        let description = if vertex.name.is_empty() {
            "fileop target"
        } else {
            &vertex.name
        }
        .to_owned();
        let op = Arc::clone(&vertex.op);
        Ok(Self {
            op,
            store,
            unlazy,
            description,
            cache_map: key.map,
            selectors: key.selectors,
        })
    }
}

fn file_op(op: &pb::Op) -> Result<&pb::FileOp, BuildError> {
    match &op.op {
        Some(pb::op::Op::File(file)) => Ok(file),
        _ => Err(BuildError::internal("not a file op")),
    }
}

#[async_trait]
impl Op for FileOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        Ok(self.cache_map.clone())
    }

    async fn content_digest(
        &self,
        ctx: &OpContext,
        input: usize,
        reference: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        let Some(selectors) = self.content_selectors(input) else {
            return Ok(None);
        };
        unpack_all(
            &*self.unlazy,
            &FetchContext::for_input(ctx, input),
            std::slice::from_ref(reference),
        )
        .await?;
        checksum::of(reference, selectors.to_vec(), ctx.cancel())
            .await
            .map(Some)
    }

    fn content_selectors(&self, input: usize) -> Option<&[Selector]> {
        let selectors = self.selectors.get(input)?;
        (!selectors.is_empty()).then_some(selectors)
    }

    async fn exec(
        &self,
        ctx: &OpContext,
        inputs: &[ResultRef],
    ) -> Result<Vec<Option<ResultRef>>, BuildError> {
        unpack_all(&*self.unlazy, &FetchContext::from(ctx), inputs).await?;
        let (op, store) = (Arc::clone(&self.op), self.store.clone());
        let (description, cancel) = (self.description.clone(), ctx.cancel().clone());
        let owned_inputs = inputs.to_vec();
        let outputs = tokio::task::spawn_blocking(move || {
            let file = file_op(&op)?;
            exec::run(file, &store, &owned_inputs, &description, &cancel)
        })
        .await
        .map_err(|error| BuildError::internal(format!("file op: {error}")))?;
        outputs.map_err(|failure: exec::Failure| {
            let Some(action) = failure.action else {
                return failure.error;
            };
            failure.error.with_failed_op(FailedOp {
                op: Some(Arc::clone(&self.op)),
                description: ctx.vertex().metadata.description.clone(),
                subject: Some(crate::error::Subject::FileAction(action)),
                inputs: inputs.to_vec(),
                mounts: failure.mounts,
            })
        })
    }
}
