//! `FileSend`: where exporters put what they make.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::file_send::{
    Answers, BytesMessage, FileSend, FileSendServer, HEADER_EXPORTER, HEADER_MULTI_PLATFORM, Messages,
};
use api::fsutil::{Packet, ReceiveOptions, receive};
use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message as _;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};

use super::OwnedStream;
use crate::failure::{Failure, chain};
use crate::spec::{Destination, Output};

/// Packets that may wait to be sent.
const QUEUE: usize = 64;

#[derive(Clone, Debug)]
enum Target {
    Directory { path: PathBuf, delete: bool },
    File(PathBuf),
    Stdout,
}

/// Takes in what exporters send, by the index of the output.
#[derive(Clone, Debug)]
pub struct Targets {
    targets: Arc<BTreeMap<usize, Target>>,
}

impl Targets {
    /// Makes the service of a build's outputs.
    ///
    /// # Errors
    /// For a mode of another name.
    pub fn new(outputs: &[Output]) -> Result<Self, Failure> {
        let mut targets = BTreeMap::new();
        for (index, output) in outputs.iter().enumerate() {
            let target = match &output.destination {
                Destination::None => continue,
                Destination::Directory(_) if output.kind != "local" => continue,
                Destination::Directory(path) => {
                    let delete = match output.attrs.get("mode").map_or("", String::as_str) {
                        "" | "copy" => false,
                        "delete" => true,
                        mode => return Err(Failure::new(format!("invalid local exporter mode {mode:?}"))),
                    };
                    Target::Directory {
                        path: path.clone(),
                        delete,
                    }
                }
                Destination::File(path) => Target::File(path.clone()),
                Destination::Stdout => Target::Stdout,
            };
            targets.insert(index, target);
        }
        Ok(Self {
            targets: Arc::new(targets),
        })
    }

    /// Returns whether nothing comes to the client.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Makes the gRPC service.
    pub fn server(self) -> FileSendServer<Self> {
        FileSendServer::new(self)
    }
}

#[tonic::async_trait]
impl FileSend for Targets {
    async fn receive(&self, headers: MetadataMap, incoming: Streaming<Bytes>) -> Result<Answers, Status> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let index = header(HEADER_EXPORTER)
            .and_then(|index| index.parse().ok())
            .unwrap_or(0);
        let target = self.targets.get(&index).cloned();
        let target = target.ok_or_else(|| Status::unknown(format!("exporter {index} not found")))?;
        if matches!(target, Target::Directory { delete: true, .. })
            && header(HEADER_MULTI_PLATFORM) != Some("1")
        {
            let message = "local exporter mode=delete requires a BuildKit daemon with multi-platform local export support";
            return Err(Status::unknown(message));
        }
        let answers = OwnedStream::new(QUEUE, |sender| async move {
            match target {
                Target::Directory { path, delete } => receive_tree(path, delete, incoming, sender).await,
                Target::File(path) => receive_file(&path, incoming).await,
                Target::Stdout => copy(Messages::new(incoming), tokio::io::stdout()).await,
            }
        });
        Ok(Box::pin(answers))
    }
}

async fn receive_tree(
    path: PathBuf,
    delete: bool,
    incoming: Streaming<Bytes>,
    sender: mpsc::Sender<Result<Bytes, Status>>,
) -> Result<(), Status> {
    let (packets, mut queue) = mpsc::channel::<Result<Packet, Status>>(QUEUE);
    let encode = async {
        while let Some(packet) = queue.recv().await {
            let encoded = packet.map(|packet| Bytes::from(packet.encode_to_vec()));
            // A daemon that has gone is noticed by the receiver.
            let _ = sender.send(encoded).await;
        }
    };
    let work = receive(
        path,
        ReceiveOptions { delete },
        Messages::new(incoming),
        packets,
        None,
    );
    let (result, ()) = tokio::join!(work, encode);
    result.map_err(|error| Status::unknown(chain(&error)))
}

async fn receive_file(path: &Path, incoming: Streaming<Bytes>) -> Result<(), Status> {
    let file = tokio::fs::File::create(path)
        .await
        .map_err(|error| Status::unknown(format!("open {}: {error}", path.display())))?;
    copy(Messages::new(incoming), file).await
}

async fn copy(mut incoming: Messages<BytesMessage>, mut out: impl AsyncWrite + Unpin) -> Result<(), Status> {
    let failed = |error: std::io::Error| Status::unknown(format!("write: {error}"));
    while let Some(message) = incoming.next().await {
        out.write_all(&message?.data).await.map_err(failed)?;
    }
    out.shutdown().await.or_else(|error| match error.kind() {
        std::io::ErrorKind::InvalidInput => Ok(()),
        _ => Err(failed(error)),
    })
}
