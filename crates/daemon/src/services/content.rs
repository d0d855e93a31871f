//! The daemon's blobs, for clients to read: what builds exported and what their history refers to.
//!
//! Read-only: blobs come and go with builds and collection alone.

use api::pb::content::content_server::{Content, ContentServer};
use api::pb::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse,
    StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteContentRequest, WriteContentResponse,
};
use api::transport::MAX_MESSAGE_BYTES;
use bytes::Bytes;
use engine::Engine;
use engine::content::{BlobStat, StoreError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Answers;

/// Bytes of a blob in one message.
const PIECE_BYTES: usize = 1 << 20;
/// Blobs in one message of a listing.
const LIST_PIECE: usize = 100;
/// Messages on their way.
const QUEUE: usize = 4;

/// The content service over an engine's blobs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ContentService {
    store: engine::content::Store,
}

impl ContentService {
    /// Serves the blobs of an engine.
    pub fn new(engine: &Engine) -> Self {
        Self {
            store: engine.services().store.content().clone(),
        }
    }

    /// Returns the gRPC service.
    pub fn server(self) -> ContentServer<Self> {
        ContentServer::new(self).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

fn digest(text: &str) -> Result<oci::Digest, Status> {
    text.parse()
        .map_err(|error| Status::invalid_argument(format!("invalid digest {text:?}: {error}")))
}

fn info(stat: &BlobStat) -> Info {
    Info {
        digest: stat.digest.to_string(),
        size: i64::try_from(stat.size_bytes).unwrap_or(i64::MAX),
        created_at: Some(stat.created.into()),
        updated_at: Some(stat.created.into()),
        ..Info::default()
    }
}

fn read_only() -> Status {
    Status::failed_precondition("the daemon's content can be read only")
}

fn failed(error: &StoreError) -> Status {
    match error {
        StoreError::NotFound { .. } => Status::not_found(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(error.to_string()))?
}

/// What stops a walk: a failing store or a client that left.
enum Stop {
    Failed(StoreError),
    Left,
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

/// Sends all blobs in pieces. Blocking; ends when the client is gone.
fn list(store: &engine::content::Store, to: &mpsc::Sender<Result<ListContentResponse, Status>>) {
    let mut piece = Vec::new();
    let walked = store.walk(|stat| {
        piece.push(info(&stat));
        if piece.len() < LIST_PIECE {
            return Ok(());
        }
        let info = std::mem::take(&mut piece);
        to.blocking_send(Ok(ListContentResponse { info }))
            .map_err(|_| Stop::Left)
    });
    // A client that left needs no answer.
    let _ = match walked {
        Ok(()) if piece.is_empty() => Ok(()),
        Ok(()) => to.blocking_send(Ok(ListContentResponse { info: piece })),
        Err(Stop::Failed(error)) => to.blocking_send(Err(failed(&error))),
        Err(Stop::Left) => Ok(()),
    };
}

/// Sends a part of a blob in pieces. Blocking; ends when the client is gone.
fn read(
    store: &engine::content::Store,
    digest: &oci::Digest,
    offset: u64,
    mut left: u64,
    to: &mpsc::Sender<Result<ReadContentResponse, Status>>,
) -> Result<(), Status> {
    let blob = store.reader(digest).map_err(|error| failed(&error))?;
    let mut position = offset;
    let mut buffer = vec![0; PIECE_BYTES];
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let count = blob
            .read_at(&mut buffer[..wanted], position)
            .map_err(|error| Status::internal(format!("blob {digest}: {error}")))?;
        if count == 0 {
            break;
        }
        let data = Bytes::copy_from_slice(&buffer[..count]);
        let piece = ReadContentResponse {
            offset: i64::try_from(position).unwrap_or(i64::MAX),
            data,
        };
        if to.blocking_send(Ok(piece)).is_err() {
            break;
        }
        let count = u64::try_from(count).unwrap_or(left);
        position += count;
        left -= count;
    }
    Ok(())
}

#[tonic::async_trait]
impl Content for ContentService {
    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let digest = digest(&request.into_inner().digest)?;
        let store = self.store.clone();
        let found = blocking(move || store.info(&digest).map_err(|error| failed(&error))).await?;
        let stat = found.ok_or_else(|| Status::not_found(format!("content {digest}: not found")))?;
        Ok(Response::new(InfoResponse {
            info: Some(info(&stat)),
        }))
    }

    type ListStream = Answers<ListContentResponse>;

    async fn list(&self, request: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        if !request.into_inner().filters.is_empty() {
            return Err(Status::unimplemented(
                "filters of content: not available in this daemon",
            ));
        }
        let (to, pieces) = mpsc::channel(QUEUE);
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || list(&store, &to));
        Ok(Response::new(Box::pin(ReceiverStream::new(pieces))))
    }

    type ReadStream = Answers<ReadContentResponse>;

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let digest = digest(&request.digest)?;
        let store = self.store.clone();
        let found = blocking(move || store.info(&digest).map_err(|error| failed(&error))).await?;
        let stat = found.ok_or_else(|| Status::not_found(format!("content {digest}: not found")))?;
        let offset = u64::try_from(request.offset)
            .ok()
            .filter(|offset| *offset <= stat.size_bytes);
        let offset = offset.ok_or_else(|| Status::out_of_range(format!("read past the end of {digest}")))?;
        let rest = stat.size_bytes - offset;
        let size = u64::try_from(request.size)
            .ok()
            .filter(|size| *size > 0)
            .map_or(rest, |size| size.min(rest));
        let (to, pieces) = mpsc::channel(QUEUE);
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(status) = read(&store, &digest, offset, size, &to) {
                let _ = to.blocking_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(pieces))))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        Err(read_only())
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        Err(read_only())
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::not_found(format!(
            "ingest {}: not found",
            request.into_inner().r#ref
        )))
    }

    async fn list_statuses(
        &self,
        _: Request<ListStatusesRequest>,
    ) -> Result<Response<ListStatusesResponse>, Status> {
        Ok(Response::new(ListStatusesResponse::default()))
    }

    type WriteStream = Answers<WriteContentResponse>;

    async fn write(
        &self,
        _: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        Err(read_only())
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        Err(read_only())
    }
}
