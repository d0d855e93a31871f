//! Blobs at a client.

use std::collections::BTreeMap;

use api::pb::content as pb;
use api::pb::content::content_client::ContentClient;
use api::transport::MAX_MESSAGE_BYTES;
use async_trait::async_trait;
use bytes::Bytes;
use engine::session::{ClientBlob, ClientBlobWriter, ClientContent, SessionError, SessionId};
use oci::{Descriptor, Digest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use super::connection::explainer;
use super::streams::pump;

/// The header that names a store.
const STORE_HEADER: &str = "buildkit-attachable-store-id";
/// Largest piece that is written at once.
const PIECE_BYTES: usize = 1 << 20;

const INFO: &str = "/containerd.services.content.v1.Content/Info";
const READ: &str = "/containerd.services.content.v1.Content/Read";
const WRITE: &str = "/containerd.services.content.v1.Content/Write";
const UPDATE: &str = "/containerd.services.content.v1.Content/Update";

/// One of a client's stores.
#[derive(Clone, Debug)]
pub(super) struct ContentStore {
    pub(super) id: SessionId,
    pub(super) store: String,
    pub(super) channel: Channel,
    pub(super) ended: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl ContentStore {
    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, SessionError> {
        // The type takes bytes that other implementations of HTTP/2 refuse, and with them the whole connection.
        let printable = self.store.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        let name = MetadataValue::try_from(self.store.as_str()).ok();
        let name = name.filter(|_| printable).ok_or_else(|| SessionError::Refused {
            message: format!(
                "header key {STORE_HEADER:?} contains value with non-printable ASCII characters"
            ),
        })?;
        let mut request = Request::new(message);
        request.metadata_mut().insert(STORE_HEADER, name);
        Ok(request)
    }

    async fn call<T>(
        &self,
        method: &'static str,
        what: String,
        call: impl Future<Output = Result<T, Status>> + Send,
    ) -> Result<T, SessionError> {
        let explain = explainer(self.id.clone(), method, what);
        tokio::select! {
            answer = call => answer.map_err(|status| explain(&status)),
            () = self.ended.cancelled() => Err(explain(&Status::unavailable("the connection was closed"))),
        }
    }
}

fn blob(info: Option<pb::Info>) -> Result<ClientBlob, SessionError> {
    let info = info.unwrap_or_default();
    let size_bytes = u64::try_from(info.size).map_err(|_| SessionError::Refused {
        message: format!("blob of {} bytes", info.size),
    })?;
    Ok(ClientBlob {
        size_bytes,
        labels: info.labels,
    })
}

#[async_trait]
impl ClientContent for ContentStore {
    async fn info(&self, digest: &Digest) -> Result<ClientBlob, SessionError> {
        let request = self.request(pb::InfoRequest {
            digest: digest.to_string(),
        })?;
        let mut client = self.client();
        let answer = self
            .call(INFO, format!("content {digest}"), client.info(request))
            .await?;
        blob(answer.into_inner().info)
    }

    async fn read(
        &self,
        digest: &Digest,
        offset: u64,
    ) -> Result<mpsc::Receiver<Result<Bytes, SessionError>>, SessionError> {
        let offset = i64::try_from(offset).map_err(|_| SessionError::Refused {
            message: format!("offset {offset} is too large"),
        })?;
        let request = self.request(pb::ReadContentRequest {
            digest: digest.to_string(),
            offset,
            size: 0,
        })?;
        let what = format!("content {digest}");
        let mut client = self.client();
        let answer = self
            .call(READ, what.clone(), client.read(request))
            .await?
            .into_inner();
        let explain = explainer(self.id.clone(), READ, what);
        let mut expected = offset;
        let unwrap = move |piece: pb::ReadContentResponse| {
            // Pieces must follow one another, or the blob would be put together wrongly.
            if piece.offset != expected {
                let message = format!("piece at {} instead of {expected}", piece.offset);
                return Err(SessionError::Refused { message });
            }
            expected = expected.saturating_add(i64::try_from(piece.data.len()).unwrap_or(i64::MAX));
            Ok(piece.data)
        };
        Ok(pump(&self.tasks, answer, self.ended.clone(), unwrap, explain))
    }

    async fn write(
        &self,
        name: &str,
        expected: &Descriptor,
    ) -> Result<Box<dyn ClientBlobWriter>, SessionError> {
        let (requests, messages) = mpsc::channel(4);
        let request = self.request(ReceiverStream::new(messages))?;
        let mut client = self.client();
        // Some clients answer the call only after its first message.
        let total = i64::try_from(expected.size).unwrap_or(i64::MAX);
        let digest = expected.digest;
        let mut writer = Writer {
            store: self.clone(),
            requests,
            answers: None,
            name: name.to_owned(),
            digest,
            total,
            offset: 0,
            exists: false,
        };
        writer.put(pb::WriteAction::Stat, Bytes::new()).await?;
        let opened = self.call(WRITE, String::new(), client.write(request)).await;
        match opened {
            Ok(answers) => {
                writer.answers = Some(answers.into_inner());
                writer.answer().await?;
            }
            Err(error) if is_existing(&error) => writer.exists = true,
            Err(error) => return Err(error),
        }
        Ok(Box::new(writer))
    }

    async fn set_labels(
        &self,
        digest: &Digest,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), SessionError> {
        let info = pb::Info {
            digest: digest.to_string(),
            labels: labels.clone(),
            ..Default::default()
        };
        let paths = labels.keys().map(|label| format!("labels.{label}")).collect();
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = self.request(pb::UpdateRequest {
            info: Some(info),
            update_mask,
        })?;
        let mut client = self.client();
        self.call(UPDATE, format!("content {digest}"), client.update(request))
            .await?;
        Ok(())
    }
}

fn is_existing(error: &SessionError) -> bool {
    matches!(error, SessionError::Refused { message } if message.contains("already exists"))
}

/// A blob on its way to a client.
#[derive(Debug)]
struct Writer {
    store: ContentStore,
    requests: mpsc::Sender<pb::WriteContentRequest>,
    answers: Option<Streaming<pb::WriteContentResponse>>,
    name: String,
    digest: Digest,
    total: i64,
    offset: i64,
    /// The client has the blob already; nothing is sent.
    exists: bool,
}

impl Writer {
    async fn put(&mut self, action: pb::WriteAction, data: Bytes) -> Result<(), SessionError> {
        let request = pb::WriteContentRequest {
            action: action.into(),
            r#ref: self.name.clone(),
            total: self.total,
            expected: self.digest.to_string(),
            offset: self.offset,
            data,
            labels: BTreeMap::new(),
        };
        let lost = |_| SessionError::Lost {
            id: self.store.id.clone(),
            reason: "the write was ended".to_owned(),
        };
        self.requests.send(request).await.map_err(lost)
    }

    /// Waits for the answer to the last request.
    async fn answer(&mut self) -> Result<Option<pb::WriteContentResponse>, SessionError> {
        let Some(answers) = &mut self.answers else {
            return Ok(None);
        };
        let explain = explainer(self.store.id.clone(), WRITE, String::new());
        tokio::select! {
            answer = answers.message() => match answer {
                Ok(answer) => Ok(answer),
                Err(status) if status.code() == Code::AlreadyExists => {
                    self.exists = true;
                    Ok(None)
                }
                Err(status) => Err(explain(&status)),
            },
            () = self.store.ended.cancelled() => Err(explain(&Status::unavailable("the connection was closed"))),
        }
    }
}

#[async_trait]
impl ClientBlobWriter for Writer {
    async fn write(&mut self, mut bytes: Bytes) -> Result<(), SessionError> {
        while !bytes.is_empty() && !self.exists {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            let len = i64::try_from(piece.len()).unwrap_or(i64::MAX);
            self.put(pb::WriteAction::Write, piece).await?;
            let answer = self.answer().await?;
            self.offset = self.offset.saturating_add(len);
            if let Some(answer) = answer
                && answer.offset != self.offset
            {
                let message = format!("client is at {} instead of {}", answer.offset, self.offset);
                return Err(SessionError::Refused { message });
            }
        }
        Ok(())
    }

    async fn commit(mut self: Box<Self>) -> Result<(), SessionError> {
        if self.exists {
            return Ok(());
        }
        self.put(pb::WriteAction::Commit, Bytes::new()).await?;
        let answer = self.answer().await?;
        match answer {
            Some(_) => Ok(()),
            None if self.exists => Ok(()),
            None => Err(SessionError::Lost {
                id: self.store.id.clone(),
                reason: "the client ended the write without an answer".to_owned(),
            }),
        }
    }
}
