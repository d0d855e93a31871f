//! `Content`: blobs of OCI layout directories, for `oci-layout://` sources, local caches and directory exports.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use api::pb::content as pb;
use api::transport::MAX_MESSAGE_BYTES;
use bytes::Bytes;
use futures_util::Stream;
use oci::Digest;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};

use super::OwnedStream;

/// The header that names a store.
const STORE_HEADER: &str = "buildkit-attachable-store-id";
/// Bytes of one message.
const CHUNK_BYTES: usize = 1 << 20;

/// Serves blobs of directories, by store name.
#[derive(Clone, Debug)]
pub struct Layouts {
    stores: Arc<BTreeMap<String, PathBuf>>,
}

impl Layouts {
    /// Makes the service of named directories.
    pub fn new(stores: BTreeMap<String, PathBuf>) -> Self {
        Self {
            stores: Arc::new(stores),
        }
    }

    fn store(&self, headers: &MetadataMap) -> Result<Store, Status> {
        let name = headers
            .get(STORE_HEADER)
            .and_then(|name| name.to_str().ok())
            .ok_or_else(|| {
                Status::invalid_argument(format!(
                    "request lacks metadata {STORE_HEADER:?}: invalid argument"
                ))
            })?;
        let dir = self
            .stores
            .get(name)
            .ok_or_else(|| Status::not_found(format!("unknown store {name}: not found")))?;
        Ok(Store { dir: dir.clone() })
    }
}

#[derive(Clone, Debug)]
struct Store {
    dir: PathBuf,
}

fn digest(text: &str) -> Result<Digest, Status> {
    text.parse()
        .map_err(|_| Status::invalid_argument(format!("{text}: invalid digest")))
}

fn failed(what: &str) -> impl Fn(io::Error) -> Status + '_ {
    move |error| {
        let code = if error.kind() == io::ErrorKind::NotFound {
            Code::NotFound
        } else {
            Code::Unknown
        };
        Status::new(code, format!("{what}: {error}"))
    }
}

impl Store {
    fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir
            .join("blobs")
            .join(digest.algorithm().to_string())
            .join(digest.hex())
    }

    async fn info(&self, digest: &Digest) -> Result<pb::Info, Status> {
        let name = digest.to_string();
        let found = tokio::fs::metadata(self.blob(digest))
            .await
            .map_err(|error| failed(&format!("content {name}"))(error))?;
        let size = i64::try_from(found.len()).unwrap_or(i64::MAX);
        Ok(pb::Info {
            digest: name,
            size,
            ..Default::default()
        })
    }

    async fn remove(&self, digest: &Digest) -> Result<(), Status> {
        let name = format!("content {digest}");
        tokio::fs::remove_file(self.blob(digest))
            .await
            .map_err(|error| failed(&name)(error))
    }

    async fn list(&self) -> io::Result<Vec<Digest>> {
        let mut digests = Vec::new();
        let mut algorithms = match tokio::fs::read_dir(self.dir.join("blobs")).await {
            Ok(algorithms) => algorithms,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(digests),
            Err(error) => return Err(error),
        };
        while let Some(algorithm) = algorithms.next_entry().await? {
            let mut blobs = tokio::fs::read_dir(algorithm.path()).await?;
            while let Some(blob) = blobs.next_entry().await? {
                let name = format!(
                    "{}:{}",
                    algorithm.file_name().to_string_lossy(),
                    blob.file_name().to_string_lossy()
                );
                digests.extend(name.parse::<Digest>().ok());
            }
        }
        Ok(digests)
    }

    /// Sends a part of a blob in pieces.
    async fn read(
        self,
        request: pb::ReadContentRequest,
        sender: mpsc::Sender<Result<pb::ReadContentResponse, Status>>,
    ) -> Result<(), Status> {
        let blob = self.blob(&digest(&request.digest)?);
        let what = format!("content {}", request.digest);
        let failed = failed(&what);
        let mut file = File::open(blob).await.map_err(&failed)?;
        let len = file.metadata().await.map_err(&failed)?.len();
        let start = u64::try_from(request.offset).map_err(|_| Status::out_of_range("negative offset"))?;
        if start > len {
            return Err(Status::out_of_range("read past object length"));
        }
        let wanted = u64::try_from(request.size)
            .ok()
            .filter(|size| *size > 0)
            .unwrap_or(len - start);
        file.seek(io::SeekFrom::Start(start)).await.map_err(&failed)?;
        let mut rest = file.take(wanted.min(len - start));
        let mut offset = request.offset;
        loop {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            let limit = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
            let count = (&mut rest)
                .take(limit)
                .read_to_end(&mut data)
                .await
                .map_err(&failed)?;
            if count == 0 {
                return Ok(());
            }
            let piece = pb::ReadContentResponse {
                offset,
                data: data.into(),
            };
            offset = offset.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
            if sender.send(Ok(piece)).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn write(
        self,
        mut incoming: Streaming<pb::WriteContentRequest>,
        sender: mpsc::Sender<Result<pb::WriteContentResponse, Status>>,
    ) -> Result<(), Status> {
        let mut ingest: Option<Ingest> = None;
        while let Some(request) = incoming.message().await? {
            if let Ok(expected) = digest(&request.expected)
                && self.info(&expected).await.is_ok()
            {
                return Err(Status::already_exists(format!(
                    "content {expected}: already exists"
                )));
            }
            let current = match &mut ingest {
                Some(current) => current,
                None => ingest.insert(Ingest::start(&self).await?),
            };
            current.append(request.offset, &request.data).await?;
            let mut answer = pb::WriteContentResponse {
                action: request.action,
                offset: i64::try_from(current.len).unwrap_or(i64::MAX),
                total: request.total,
                ..Default::default()
            };
            if request.action() == pb::WriteAction::Commit {
                let done = ingest.take().ok_or_else(|| Status::internal("no ingest"))?;
                answer.digest = done
                    .commit(&self, request.total, &request.expected)
                    .await?
                    .to_string();
            }
            if sender.send(Ok(answer)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A blob being written; its file goes when it is not committed.
#[derive(Debug)]
struct Ingest {
    path: tempfile_guard::Guard,
    file: File,
    digester: oci::Digester,
    len: u64,
}

mod tempfile_guard {
    //! A path that is removed when nobody made it permanent.

    use std::path::{Path, PathBuf};

    #[derive(Debug)]
    pub(super) struct Guard(pub(super) PathBuf);

    impl Guard {
        pub(super) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            // After a rename there is nothing left to remove.
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

impl Ingest {
    async fn start(store: &Store) -> Result<Self, Status> {
        let dir = store.dir.join("ingest");
        tokio::fs::create_dir_all(&dir).await.map_err(failed("ingest"))?;
        let path = dir.join(crate::ids::new_id());
        let file = File::create(&path).await.map_err(failed("ingest"))?;
        let digester = oci::Digester::new(oci::Algorithm::Sha256);
        Ok(Self {
            path: tempfile_guard::Guard(path),
            file,
            digester,
            len: 0,
        })
    }

    async fn append(&mut self, offset: i64, data: &Bytes) -> Result<(), Status> {
        if data.is_empty() {
            return Ok(());
        }
        if u64::try_from(offset) != Ok(self.len) {
            return Err(Status::out_of_range(format!(
                "write @{offset}: offset is not {}",
                self.len
            )));
        }
        self.file.write_all(data).await.map_err(failed("ingest"))?;
        self.digester.update(data);
        self.len += u64::try_from(data.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    async fn commit(self, store: &Store, total: i64, expected: &str) -> Result<Digest, Status> {
        let Self {
            path,
            file,
            digester,
            len,
        } = self;
        let actual = digester.finish();
        if total > 0 && u64::try_from(total) != Ok(len) {
            return Err(Status::failed_precondition(format!(
                "unexpected commit size {len}, expected {total}"
            )));
        }
        if !expected.is_empty() && expected != actual.to_string() {
            return Err(Status::failed_precondition(format!(
                "unexpected commit digest {actual}, expected {expected}"
            )));
        }
        file.sync_data().await.map_err(failed("ingest"))?;
        let blob = store.blob(&actual);
        if let Some(parent) = blob.parent() {
            tokio::fs::create_dir_all(parent).await.map_err(failed("blobs"))?;
        }
        tokio::fs::rename(path.path(), &blob)
            .await
            .map_err(failed("commit"))?;
        Ok(actual)
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::content_server::Content for Layouts {
    async fn info(&self, request: Request<pb::InfoRequest>) -> Result<Response<pb::InfoResponse>, Status> {
        let store = self.store(request.metadata())?;
        let info = store.info(&digest(&request.into_inner().digest)?).await?;
        Ok(Response::new(pb::InfoResponse { info: Some(info) }))
    }

    async fn update(&self, _: Request<pb::UpdateRequest>) -> Result<Response<pb::UpdateResponse>, Status> {
        Err(Status::failed_precondition(
            "update not supported on immutable content store: failed precondition",
        ))
    }

    type ListStream = Answers<pb::ListContentResponse>;

    async fn list(
        &self,
        request: Request<pb::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let store = self.store(request.metadata())?;
        let mut info = Vec::new();
        for digest in store.list().await.map_err(failed("blobs"))? {
            info.push(store.info(&digest).await?);
        }
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(
            pb::ListContentResponse { info },
        )))))
    }

    async fn delete(&self, request: Request<pb::DeleteContentRequest>) -> Result<Response<()>, Status> {
        let store = self.store(request.metadata())?;
        store.remove(&digest(&request.into_inner().digest)?).await?;
        Ok(Response::new(()))
    }

    type ReadStream = Answers<pb::ReadContentResponse>;

    async fn read(
        &self,
        request: Request<pb::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let store = self.store(request.metadata())?;
        let request = request.into_inner();
        let answers = OwnedStream::new(4, |sender| store.read(request, sender));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        Err(Status::not_found("ingests are not resumed: not found"))
    }

    async fn list_statuses(
        &self,
        _: Request<pb::ListStatusesRequest>,
    ) -> Result<Response<pb::ListStatusesResponse>, Status> {
        Ok(Response::new(pb::ListStatusesResponse::default()))
    }

    type WriteStream = Answers<pb::WriteContentResponse>;

    async fn write(
        &self,
        request: Request<Streaming<pb::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let store = self.store(request.metadata())?;
        let incoming = request.into_inner();
        let answers = OwnedStream::new(4, |sender| store.write(incoming, sender));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn abort(&self, _: Request<pb::AbortRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

/// Makes the gRPC service with the limits that daemons expect.
pub fn server(layouts: Layouts) -> pb::content_server::ContentServer<Layouts> {
    pb::content_server::ContentServer::new(layouts)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}
