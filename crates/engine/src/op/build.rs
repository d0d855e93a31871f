//! The op that builds a definition which one of its inputs contains.

use async_trait::async_trait;
use llb::pb;
use oci::Digest;
use prost::Message as _;
use serde::Serialize;

use crate::error::{BuildError, ErrorKind};
use crate::op::{CacheMap, Dep, Op, OpContext, ResultRef, VertexSpec};

/// The number that stands for "the definition itself", the only builder there is.
const LLB_BUILDER: i64 = -1;

/// Builds a definition. Its result is that definition's.
#[derive(Debug)]
pub struct BuildOp {
    cache_map: CacheMap,
    input: usize,
    filename: String,
}

impl BuildOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// When the vertex is no build, names another builder, or no input with a definition.
    pub fn new(vertex: &VertexSpec) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Build(op)) = &vertex.op.op else {
            return Err(BuildError::internal("not a build op"));
        };
        if op.builder != LLB_BUILDER {
            return Err(BuildError::user("only LLB builder is currently allowed"));
        }
        let name = pb::LLB_DEFINITION_INPUT;
        let input = op.inputs.get(name);
        let input = input
            .ok_or_else(|| BuildError::user(format!("no llb definition input {name} found")))?
            .input;
        let index = usize::try_from(input)
            .ok()
            .filter(|index| *index < vertex.inputs.len());
        let input = index.ok_or_else(|| BuildError::user(format!("invalid index {input}")))?;
        #[derive(Serialize)]
        struct Document<'a> {
            #[serde(rename = "Type")]
            kind: &'static str,
            #[serde(rename = "Exec")]
            build: &'a pb::BuildOp,
        }
        let document = oci::json::to_vec(&Document {
            kind: "buildkit.build.v0",
            build: op,
        });
        let document = document.map_err(|error| BuildError::internal(format!("op's key: {error}")))?;
        let cache_map = CacheMap {
            digests: vec![Digest::sha256(&document)],
            deps: vec![Dep::default(); vertex.inputs.len()],
            ..CacheMap::default()
        };
        let filename = op
            .attrs
            .get(llb::attr::LLB_DEFINITION_FILENAME)
            .map_or(name, String::as_str)
            .to_owned();
        Ok(Self {
            cache_map,
            input,
            filename,
        })
    }
}

#[async_trait]
impl Op for BuildOp {
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
        let input = inputs
            .get(self.input)
            .ok_or_else(|| BuildError::internal("an input is missing"))?;
        let bytes = ctx.bridge().read_file(input, &self.filename).await?;
        let definition = pb::Definition::decode(bytes);
        let definition = definition.map_err(|error| {
            BuildError::from_source(ErrorKind::User, error)
                .context(format!("failed to parse {}", self.filename))
        })?;
        tokio::select! {
            biased;
            () = ctx.cancel().cancelled() => Err(BuildError::canceled()),
            result = ctx.bridge().build(definition) => Ok(vec![Some(result?)]),
        }
    }

    /// It waits for the steps that it builds, which need their turns.
    fn is_limited(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn vertex(op: pb::BuildOp) -> VertexSpec {
        let op = pb::Op {
            op: Some(pb::op::Op::Build(op)),
            ..pb::Op::default()
        };
        VertexSpec {
            op: Arc::new(op),
            inputs: vec![(Digest::sha256(b"input"), 0)],
            ..VertexSpec::default()
        }
    }

    fn build(builder: i64, input: i64) -> pb::BuildOp {
        let inputs = [(pb::LLB_DEFINITION_INPUT.to_owned(), pb::BuildInput { input })].into();
        pb::BuildOp {
            builder,
            inputs,
            ..pb::BuildOp::default()
        }
    }

    #[test]
    fn the_definition_is_in_an_input_that_exists() {
        assert!(BuildOp::new(&vertex(build(LLB_BUILDER, 0))).is_ok());
        assert!(BuildOp::new(&vertex(build(LLB_BUILDER, 1))).is_err());
        assert!(BuildOp::new(&vertex(build(LLB_BUILDER, -1))).is_err());
        assert!(BuildOp::new(&vertex(build(0, 0))).is_err());
    }
}
