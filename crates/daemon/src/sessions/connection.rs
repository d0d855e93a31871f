//! One connected client.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::file_send::{self, BytesMessage};
use api::fsutil::Packet;
use api::pb::filesync::auth_client::AuthClient;
use api::pb::filesync::file_sync_client::FileSyncClient;
use api::pb::secrets::secrets_client::SecretsClient;
use api::pb::ssh::ssh_client::SshClient;
use api::pb::upload::upload_client::UploadClient;
use api::pb::{filesync, secrets, ssh, upload};
use api::session::{SessionConn, encode_lists, methods};
use api::transport::MAX_MESSAGE_BYTES;
use async_trait::async_trait;
use bytes::Bytes;
use engine::bridge::{PolicyAnswer, PolicyQuestion};
use engine::session::{
    ByteStream, ClientContent, Credentials, FileStream, Session, SessionError, SessionId, SyncRequest, Token,
    TokenRequest,
};
use engine::solve::ExporterRequest;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Status};

use super::content::ContentStore;
use super::packets;
use super::streams::{QUEUE, pump};

/// Longest secret in bytes.
const MAX_SECRET_BYTES: usize = 500 * 1024;
/// The host in addresses of streams that clients offer.
const UPLOAD_HOST: &str = "buildkit-session";
/// The header with which an agent is named.
const AGENT_HEADER: &str = "buildkit.ssh.id";

/// A client's services.
#[derive(Debug)]
pub(super) struct Connection {
    id: SessionId,
    inner: SessionConn,
    ended: CancellationToken,
    tasks: TaskTracker,
}

impl Connection {
    pub(super) fn new(inner: SessionConn, tasks: TaskTracker) -> Self {
        let ended = inner.closed().child_token();
        Self {
            id: SessionId(inner.id.clone()),
            inner,
            ended,
            tasks,
        }
    }

    /// Waits for the end of the connection.
    pub(super) async fn watch(&self) -> &'static str {
        self.inner.watch().await
    }

    /// Ends everything that still moves bytes, and the connection.
    pub(super) fn end(&self) {
        self.ended.cancel();
        self.inner.close();
    }

    pub(super) fn channel(&self) -> tonic::transport::Channel {
        self.inner.channel.clone()
    }

    pub(super) fn supports_method(&self, method: &str) -> bool {
        self.inner.supports(method)
    }

    pub(super) fn require(&self, method: &'static str) -> Result<(), SessionError> {
        if self.inner.supports(method) {
            return Ok(());
        }
        Err(SessionError::Unsupported {
            id: self.id.clone(),
            method,
        })
    }

    /// Runs a call, which ends with the session.
    pub(super) async fn call<T>(
        &self,
        method: &'static str,
        what: &str,
        call: impl Future<Output = Result<T, Status>> + Send,
    ) -> Result<T, SessionError> {
        let explain = explainer(self.id.clone(), method, what.to_owned());
        tokio::select! {
            answer = call => answer.map_err(|status| explain(&status)),
            () = self.ended.cancelled() => Err(explain(&Status::unavailable("the connection was closed"))),
        }
    }
}

/// Turns a call's status into the engine's error.
pub(super) fn explainer(
    id: SessionId,
    method: &'static str,
    what: String,
) -> impl Fn(&Status) -> SessionError + Clone + Send + 'static {
    move |status| match status.code() {
        Code::Unimplemented => SessionError::Unsupported {
            id: id.clone(),
            method,
        },
        Code::NotFound => SessionError::NotFound {
            what: named(&what, status),
        },
        Code::Unavailable | Code::Cancelled => SessionError::Lost {
            id: id.clone(),
            reason: status.message().to_owned(),
        },
        _ => SessionError::Refused {
            message: status.message().to_owned(),
        },
    }
}

/// Names what was not found; without a name, the client's own words do.
fn named(what: &str, status: &Status) -> String {
    if what.is_empty() {
        status.message().trim_end_matches(": not found").to_owned()
    } else {
        what.to_owned()
    }
}

#[async_trait]
impl Session for Connection {
    fn id(&self) -> &SessionId {
        &self.id
    }

    fn shared_key(&self) -> &str {
        &self.inner.shared_key
    }

    fn supports(&self, method: &str) -> bool {
        self.inner.supports(method)
    }

    fn closed(&self) -> CancellationToken {
        self.ended.clone()
    }

    async fn sync_dir(&self, request: SyncRequest) -> Result<FileStream, SessionError> {
        let method = methods::FILE_SYNC_DIFF_COPY;
        self.require(method)?;
        let name = [request.dir_name];
        let lists = [
            ("include-patterns", request.include_patterns.as_slice()),
            ("exclude-patterns", request.exclude_patterns.as_slice()),
            ("followpaths", request.follow_paths.as_slice()),
            ("dir-name", name.as_slice()),
        ];
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let mut call = Request::new(ReceiverStream::new(messages).map(packets::to_wire));
        *call.metadata_mut() = encode_lists(lists);
        let mut client = FileSyncClient::new(self.inner.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let answer = self.call(method, "", client.diff_copy(call)).await?.into_inner();
        let explain = explainer(self.id.clone(), method, String::new());
        let incoming = pump(
            &self.tasks,
            answer,
            self.ended.clone(),
            packets::from_wire,
            explain,
        );
        Ok(FileStream { incoming, outgoing })
    }

    async fn send_tree(
        &self,
        exporter_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<FileStream, SessionError> {
        let method = methods::FILE_SEND_DIFF_COPY;
        self.require(method)?;
        let headers = file_send::headers(exporter_id, metadata);
        let call = file_send::call::<Packet>(self.inner.channel.clone(), headers);
        let (wire, answer) = self.call(method, "", call).await?;
        let (outgoing, mut packets) = mpsc::channel(QUEUE);
        self.tasks.spawn(async move {
            while let Some(packet) = packets.recv().await {
                if wire.send(packets::to_wire(packet)).await.is_err() {
                    return;
                }
            }
        });
        let explain = explainer(self.id.clone(), method, String::new());
        let incoming = pump(
            &self.tasks,
            answer,
            self.ended.clone(),
            packets::from_wire,
            explain,
        );
        Ok(FileStream { incoming, outgoing })
    }

    async fn send_file(
        &self,
        exporter_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ByteStream, SessionError> {
        let method = methods::FILE_SEND_DIFF_COPY;
        self.require(method)?;
        let headers = file_send::headers(exporter_id, metadata);
        let call = file_send::call::<BytesMessage>(self.inner.channel.clone(), headers);
        let (wire, answer) = self.call(method, "", call).await?;
        let (outgoing, mut pieces) = mpsc::channel::<Bytes>(QUEUE);
        self.tasks.spawn(async move {
            while let Some(data) = pieces.recv().await {
                if wire.send(BytesMessage { data }).await.is_err() {
                    return;
                }
            }
        });
        let explain = explainer(self.id.clone(), method, String::new());
        let unwrap = |message: BytesMessage| Ok(message.data);
        let incoming = pump(&self.tasks, answer, self.ended.clone(), unwrap, explain);
        Ok(ByteStream { incoming, outgoing })
    }

    async fn credentials(&self, host: &str) -> Result<Credentials, SessionError> {
        let method = methods::AUTH_CREDENTIALS;
        self.require(method)?;
        let request = filesync::CredentialsRequest {
            host: host.to_owned(),
        };
        let mut client = AuthClient::new(self.inner.channel.clone());
        let answer = self
            .call(method, "", client.credentials(request))
            .await?
            .into_inner();
        Ok(Credentials {
            username: answer.username,
            secret: answer.secret,
        })
    }

    async fn fetch_token(&self, request: TokenRequest) -> Result<Token, SessionError> {
        let method = methods::AUTH_FETCH_TOKEN;
        self.require(method)?;
        let request = filesync::FetchTokenRequest {
            client_id: request.client_id,
            host: request.host,
            realm: request.realm,
            service: request.service,
            scopes: request.scopes,
        };
        let mut client = AuthClient::new(self.inner.channel.clone());
        let answer = self
            .call(method, "", client.fetch_token(request))
            .await?
            .into_inner();
        Ok(Token {
            token: answer.token,
            expires_in_s: answer.expires_in,
            issued_at_s: answer.issued_at,
        })
    }

    async fn token_authority(&self, host: &str, salt: &[u8]) -> Result<Bytes, SessionError> {
        let method = methods::AUTH_GET_TOKEN_AUTHORITY;
        self.require(method)?;
        let request = filesync::GetTokenAuthorityRequest {
            host: host.to_owned(),
            salt: Bytes::copy_from_slice(salt),
        };
        let mut client = AuthClient::new(self.inner.channel.clone());
        let answer = client.get_token_authority(request).await;
        match answer {
            Ok(answer) => Ok(answer.into_inner().public_key),
            // Clients say so when they do not want to fetch tokens themselves.
            Err(status) if matches!(status.code(), Code::Unavailable | Code::Unimplemented) => {
                Err(SessionError::Unsupported {
                    id: self.id.clone(),
                    method,
                })
            }
            Err(status) => Err(explainer(self.id.clone(), method, String::new())(&status)),
        }
    }

    async fn secret(&self, id: &str) -> Result<Bytes, SessionError> {
        let method = methods::GET_SECRET;
        if !self.inner.supports(method) {
            return Err(SessionError::NotFound {
                what: format!("secret {id}"),
            });
        }
        let request = secrets::GetSecretRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let mut client =
            SecretsClient::new(self.inner.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = self
            .call(method, &format!("secret {id}"), client.get_secret(request))
            .await?;
        let data = answer.into_inner().data;
        if data.len() > MAX_SECRET_BYTES {
            return Err(SessionError::Refused {
                message: format!("invalid secret size {}", data.len()),
            });
        }
        Ok(data)
    }

    async fn check_agent(&self, id: &str) -> Result<(), SessionError> {
        let method = methods::SSH_CHECK_AGENT;
        self.require(method)?;
        let request = ssh::CheckAgentRequest { id: id.to_owned() };
        let mut client = SshClient::new(self.inner.channel.clone());
        self.call(method, "", client.check_agent(request)).await?;
        Ok(())
    }

    async fn forward_agent(&self, id: &str) -> Result<ByteStream, SessionError> {
        let method = methods::SSH_FORWARD_AGENT;
        self.require(method)?;
        let (outgoing, pieces) = mpsc::channel::<Bytes>(QUEUE);
        let wrapped = ReceiverStream::new(pieces).map(|data| ssh::BytesMessage { data });
        let mut call = Request::new(wrapped);
        let name = [id.to_owned()];
        *call.metadata_mut() = encode_lists([(AGENT_HEADER, name.as_slice())]);
        let mut client =
            SshClient::new(self.inner.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = self
            .call(method, "", client.forward_agent(call))
            .await?
            .into_inner();
        let explain = explainer(self.id.clone(), method, String::new());
        let unwrap = |message: ssh::BytesMessage| Ok(message.data);
        let incoming = pump(&self.tasks, answer, self.ended.clone(), unwrap, explain);
        Ok(ByteStream { incoming, outgoing })
    }

    async fn pull_upload(&self, path: &str) -> Result<ByteStream, SessionError> {
        let method = methods::UPLOAD_PULL;
        self.require(method)?;
        let (outgoing, pieces) = mpsc::channel::<Bytes>(QUEUE);
        let wrapped = ReceiverStream::new(pieces).map(|data| upload::BytesMessage { data });
        let mut call = Request::new(wrapped);
        let (path, host) = ([path.to_owned()], [UPLOAD_HOST.to_owned()]);
        *call.metadata_mut() = encode_lists([("urlpath", path.as_slice()), ("urlhost", host.as_slice())]);
        let mut client =
            UploadClient::new(self.inner.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = self.call(method, "", client.pull(call)).await?.into_inner();
        let explain = explainer(self.id.clone(), method, String::new());
        let unwrap = |message: upload::BytesMessage| Ok(message.data);
        let incoming = pump(&self.tasks, answer, self.ended.clone(), unwrap, explain);
        Ok(ByteStream { incoming, outgoing })
    }

    async fn content_store(&self, store_id: &str) -> Result<Arc<dyn ClientContent>, SessionError> {
        let method = methods::CONTENT.first().copied().unwrap_or_default();
        self.require(method)?;
        let store = ContentStore {
            id: self.id.clone(),
            store: store_id.to_owned(),
            channel: self.inner.channel.clone(),
            ended: self.ended.clone(),
            tasks: self.tasks.clone(),
        };
        Ok(Arc::new(store))
    }

    async fn check_policy(&self, question: &PolicyQuestion) -> Result<PolicyAnswer, SessionError> {
        self.ask_policy(question).await
    }

    async fn find_exporters(
        &self,
        metadata: &BTreeMap<String, Bytes>,
        refs: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError> {
        self.ask_exporters(metadata, refs).await
    }

    async fn finalize_export(&self, response: &BTreeMap<String, String>) -> Result<(), SessionError> {
        self.tell_exported(response).await
    }
}
