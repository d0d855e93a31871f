//! What the op of a vertex may do with the bridge of its vertex.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use llb::pb;

use super::{Bridge, BridgeRequest, FileRange, FileReader};
use crate::error::BuildError;
use crate::op::{ResultRef, UrlPolicy, VertexBridge};

#[async_trait]
impl VertexBridge for Bridge {
    async fn read_file(&self, input: &ResultRef, path: &str) -> Result<Bytes, BuildError> {
        let reader = FileReader::of_ref(self, input).await?;
        reader.read_file(path, FileRange::default()).await
    }

    async fn build(&self, definition: pb::Definition) -> Result<ResultRef, BuildError> {
        let request = BridgeRequest {
            definition: Some(definition),
            ..BridgeRequest::default()
        };
        let result = Box::pin(self.solve(request)).await?;
        match result.single {
            Some(reference) => reference.result().await,
            None => Ok(ResultRef::SCRATCH),
        }
    }

    fn url_policy(&self) -> Result<Option<Arc<dyn UrlPolicy>>, BuildError> {
        self.requests_policy()
    }
}
