//! `FileSync`: directories that a build may read, by name.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use api::fsutil::{FilterOptions, Packet, SendSource, send};
use api::pb::filesync::file_sync_server::{FileSync, FileSyncServer};
use api::session::decode_lists;
use api::transport::MAX_MESSAGE_BYTES;
use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::OwnedStream;
use crate::failure::Failure;

/// Packets that may wait to be sent.
const QUEUE: usize = 64;

/// Sends directories.
#[derive(Clone, Debug)]
pub struct Directories {
    paths: Arc<BTreeMap<String, PathBuf>>,
}

impl Directories {
    /// Makes the service of named directories.
    ///
    /// # Errors
    /// When one is no directory.
    pub fn new(paths: BTreeMap<String, PathBuf>) -> Result<Self, Failure> {
        for path in paths.values() {
            let found = std::fs::metadata(path)
                .map_err(|error| Failure::new(format!("stat {}: {error}", path.display())))?;
            if !found.is_dir() {
                return Err(Failure::new(format!("{} not a directory", path.display())));
            }
        }
        Ok(Self {
            paths: Arc::new(paths),
        })
    }

    /// Returns whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Makes the gRPC service.
    pub fn server(self) -> FileSyncServer<Self> {
        FileSyncServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn source(&self, request: &Request<Streaming<Packet>>) -> Result<SendSource, Status> {
        let mut lists = decode_lists(request.metadata());
        let mut list = |name: &str| lists.remove(name).unwrap_or_default();
        let name = list("dir-name").into_iter().next().unwrap_or_default();
        let dir = self
            .paths
            .get(&name)
            .ok_or_else(|| Status::not_found(format!("no access allowed to dir {name:?}")))?
            .clone();
        let filter = FilterOptions {
            include_patterns: list("include-patterns"),
            exclude_patterns: list("exclude-patterns"),
            follow_paths: list("followpaths"),
        };
        Ok(SendSource { dir, filter })
    }
}

/// Hides who owns an entry here: it is nobody's concern where the build runs.
fn without_owner(mut packet: Packet) -> Packet {
    if let Some(stat) = &mut packet.stat {
        stat.uid = 0;
        stat.gid = 0;
    }
    packet
}

type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

#[tonic::async_trait]
impl FileSync for Directories {
    type DiffCopyStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let source = self.source(&request)?;
        let incoming = request.into_inner();
        let answers = OwnedStream::new(QUEUE, |sender| async move {
            send(source, incoming, sender, None)
                .await
                .map_err(|error| Status::unknown(crate::failure::chain(&error)))
        });
        Ok(Response::new(Box::pin(
            answers.map(|packet| packet.map(without_owner)),
        )))
    }

    type TarStreamStream = Packets;

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented("directories are sent by DiffCopy"))
    }
}
