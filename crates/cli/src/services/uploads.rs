//! `Upload`: streams that a frontend fetches by address, such as a context from standard input.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use api::pb::upload as pb;
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::OwnedStream;

/// The header that names a stream.
const PATH_HEADER: &str = "urlpath";
/// Bytes of one message.
const CHUNK_BYTES: usize = 32 << 10;

type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// Offers streams, each of which is read once.
#[derive(Clone, Default)]
pub struct Uploads {
    streams: Arc<Mutex<BTreeMap<String, Reader>>>,
}

impl std::fmt::Debug for Uploads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploads").finish_non_exhaustive()
    }
}

impl Uploads {
    /// Offers a stream; returns the address at which a frontend finds it.
    pub fn add(&self, reader: impl AsyncRead + Send + Unpin + 'static) -> String {
        let id = crate::ids::new_id();
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(format!("/{id}"), Box::new(reader));
        format!("http://buildkit-session/{id}")
    }
}

#[tonic::async_trait]
impl pb::upload_server::Upload for Uploads {
    type PullStream = Pin<Box<dyn Stream<Item = Result<pb::BytesMessage, Status>> + Send>>;

    async fn pull(
        &self,
        request: Request<Streaming<pb::BytesMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let path = request
            .metadata()
            .get(PATH_HEADER)
            .and_then(|path| path.to_str().ok())
            .unwrap_or_default();
        let reader = self
            .streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(path);
        let mut reader = reader.ok_or_else(|| Status::not_found(format!("upload {path:?} not found")))?;
        let answers = OwnedStream::new(8, |sender| async move {
            loop {
                let mut data = Vec::with_capacity(CHUNK_BYTES);
                let count = reader
                    .read_buf(&mut data)
                    .await
                    .map_err(|error| Status::unknown(format!("upload: {error}")))?;
                if count == 0
                    || sender
                        .send(Ok(pb::BytesMessage { data: data.into() }))
                        .await
                        .is_err()
                {
                    return Ok(());
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
