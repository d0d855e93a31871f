//! The ops that put results together without touching bytes: merge, diff, passthrough.

use async_trait::async_trait;
use cache::{ImmutableRef, RefOptions, Store};
use llb::pb;
use oci::Digest;
use serde::Serialize;
use std::sync::Arc;

use crate::error::{BuildError, ErrorKind};
use crate::op::{CacheMap, Dep, Op, OpContext, ResultRef, VertexSpec};
use crate::unlazy::{FetchContext, Unlazy, unpack_all};

/// Digest of a JSON document as BuildKit writes it.
fn digest(document: &impl Serialize) -> Result<Digest, BuildError> {
    let bytes =
        oci::json::to_vec(document).map_err(|error| BuildError::internal(format!("op's key: {error}")))?;
    Ok(Digest::sha256(&bytes))
}

fn cache_map(digest: Digest, inputs: usize) -> CacheMap {
    CacheMap {
        digests: vec![digest],
        deps: vec![Dep::default(); inputs],
        ..CacheMap::default()
    }
}

/// Several trees on top of each other.
#[derive(Debug)]
pub struct MergeOp {
    store: Store,
    description: String,
    cache_map: CacheMap,
}

impl MergeOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// When the vertex is not a merge.
    pub fn new(vertex: &VertexSpec, store: Store) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Merge(op)) = &vertex.op.op else {
            return Err(BuildError::internal("not a merge op"));
        };
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            r#type: &'static str,
            merge: &'a pb::MergeOp,
        }
        let key = digest(&Document {
            r#type: "buildkit.merge.v0",
            merge: op,
        })?;
        let count = op.inputs.len();
        Ok(Self {
            store,
            description: vertex.name.clone(),
            cache_map: cache_map(key, count),
        })
    }
}

#[async_trait]
impl Op for MergeOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        Ok(self.cache_map.clone())
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, _: &OpContext, inputs: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let refs: Vec<ImmutableRef> = inputs.iter().filter_map(ResultRef::get).cloned().collect();
        if refs.is_empty() {
            return Ok(vec![Some(ResultRef::SCRATCH)]);
        }
        let options = RefOptions {
            description: self.description.clone(),
            ..RefOptions::default()
        };
        let store = self.store.clone();
        let merged = blocking(move || store.merge(&refs, options)).await?;
        Ok(vec![Some(ResultRef::new(merged))])
    }

    fn is_limited(&self) -> bool {
        false
    }
}

/// What turns one tree into another.
#[derive(Debug)]
pub struct DiffOp {
    store: Store,
    unlazy: Arc<dyn Unlazy>,
    description: String,
    cache_map: CacheMap,
    has_lower: bool,
    has_upper: bool,
}

impl DiffOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// When the vertex is not a diff, or says nothing about one of its two sides.
    pub fn new(vertex: &VertexSpec, store: Store, unlazy: Arc<dyn Unlazy>) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Diff(op)) = &vertex.op.op else {
            return Err(BuildError::internal("not a diff op"));
        };
        let (Some(lower), Some(upper)) = (&op.lower, &op.upper) else {
            return Err(BuildError::user("invalid diff op with nil lower or upper input"));
        };
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            r#type: &'static str,
            diff: &'a pb::DiffOp,
        }
        let key = digest(&Document {
            r#type: "buildkit.diff.v0",
            diff: op,
        })?;
        let (has_lower, has_upper) = (lower.input != -1, upper.input != -1);
        let count = usize::from(has_lower) + usize::from(has_upper);
        if vertex.inputs.len() != count {
            return Err(BuildError::user(format!(
                "invalid diff op: {count} inputs are used, {} are given",
                vertex.inputs.len()
            )));
        }
        let description = vertex.name.clone();
        Ok(Self {
            store,
            unlazy,
            description,
            cache_map: cache_map(key, count),
            has_lower,
            has_upper,
        })
    }
}

#[async_trait]
impl Op for DiffOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        Ok(self.cache_map.clone())
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(
        &self,
        ctx: &OpContext,
        inputs: &[ResultRef],
    ) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let mut given = inputs.iter();
        let mut side = |present: bool| {
            present
                .then(|| given.next())
                .flatten()
                .and_then(ResultRef::get)
                .cloned()
        };
        let (lower, upper) = (side(self.has_lower), side(self.has_upper));
        match (&lower, &upper) {
            (None, upper) => return Ok(vec![Some(ResultRef::from(upper.clone()))]),
            (Some(lower), Some(upper)) if lower.id() == upper.id() => {
                return Ok(vec![Some(ResultRef::SCRATCH)]);
            }
            _ => {}
        }
        unpack_all(&*self.unlazy, &FetchContext::from(ctx), inputs).await?;
        let options = RefOptions {
            description: self.description.clone(),
            ..RefOptions::default()
        };
        let store = self.store.clone();
        let diff = blocking(move || store.diff(lower.as_ref(), upper.as_ref(), options)).await?;
        Ok(vec![Some(ResultRef::new(diff))])
    }

    fn is_limited(&self) -> bool {
        false
    }
}

/// Inputs handed on as outputs, so that several results are computed as one vertex.
#[derive(Debug)]
pub struct PassthroughOp {
    outputs: Vec<usize>,
    cache_map: CacheMap,
}

impl PassthroughOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// When the vertex is not a passthrough, or its outputs name inputs that do not exist.
    pub fn new(vertex: &VertexSpec) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Passthrough(op)) = &vertex.op.op else {
            return Err(BuildError::internal("not a passthrough op"));
        };
        if op.id.is_empty() {
            return Err(BuildError::user("invalid passthrough op with no id"));
        }
        if op.outputs.is_empty() {
            return Err(BuildError::user("invalid passthrough op with no outputs"));
        }
        let count = vertex.inputs.len();
        let index = |output: &i64| match usize::try_from(*output) {
            Ok(index) if index < count => Ok(index),
            _ => Err(BuildError::user(format!(
                "invalid passthrough output input index {output}"
            ))),
        };
        let outputs = op.outputs.iter().map(index).collect::<Result<Vec<_>, _>>()?;
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            r#type: &'static str,
            passthrough: &'a pb::PassthroughOp,
        }
        let key = digest(&Document {
            r#type: "buildkit.passthrough.v0",
            passthrough: op,
        })?;
        Ok(Self {
            outputs,
            cache_map: cache_map(key, count),
        })
    }
}

#[async_trait]
impl Op for PassthroughOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        Ok(self.cache_map.clone())
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, _: &OpContext, inputs: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        Ok(self
            .outputs
            .iter()
            .map(|index| inputs.get(*index).cloned())
            .collect())
    }

    fn is_limited(&self) -> bool {
        false
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, cache::StoreError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::internal(format!("store: {error}")))?
        .map_err(|error| BuildError::from_source(ErrorKind::Internal, error))
}
