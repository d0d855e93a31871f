//! Ports to what a client offers during a build: files, credentials, secrets, agents, export targets.
//!
//! The engine asks through these traits and never sees how a client is connected; `daemon` implements them over the
//! client's session. One build may have several sessions (clients that wait for the same vertex): [`SessionGroup`]
//! tries them in turn.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::export::ExporterRequest;
use crate::meta::{PolicyAnswer, PolicyQuestion};

/// Names one client's session, as the client chose it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub String);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a client's service could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No session of this id is connected, or none appeared in time.
    #[error("no active session for {id}: {reason}")]
    NoSession {
        /// The session asked for.
        id: String,
        /// What is known about its absence, e.g. when and why it ended.
        reason: String,
    },
    /// The client does not offer the service.
    #[error("session {id} does not offer {method}")]
    Unsupported {
        /// The session asked.
        id: SessionId,
        /// The gRPC path of the missing method, e.g. `/moby.filesync.v1.FileSync/DiffCopy`.
        method: &'static str,
    },
    /// The client's service answered that the thing asked for does not exist.
    #[error("{what}: not found")]
    NotFound {
        /// What was asked for, e.g. `secret mysecret`.
        what: String,
    },
    /// The client's service refused or failed; the text is the client's.
    #[error("{message}")]
    Refused {
        /// The client's own message.
        message: String,
    },
    /// The connection broke during the call.
    #[error("session {id} was lost: {reason}")]
    Lost {
        /// The session that broke.
        id: SessionId,
        /// The transport's last error.
        reason: String,
    },
}

/// A file's attributes as the file transfer protocol carries them (`fsutil.types.Stat`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStat {
    /// Slash-separated path relative to the transferred root, without a leading slash.
    pub path: String,
    /// Mode bits as Go's `os.FileMode` (directory bit 31, symlink bit 27, …), not as `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes; 0 for anything but regular files.
    pub size_bytes: i64,
    /// Modification time in nanoseconds since the epoch.
    pub mod_time_ns: i64,
    /// Target of a symbolic link, or the earlier path a hard link refers to.
    pub linkname: String,
    /// Device number's major part.
    pub dev_major: i64,
    /// Device number's minor part.
    pub dev_minor: i64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Bytes>,
    /// When the inode last changed, in nanoseconds since the epoch; 0 when the client does not tell. It is no part of what
    /// a file is: it only tells that something may have happened to it.
    pub change_time_ns: i64,
}

/// One message of the file transfer protocol (`fsutil.types.Packet`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilePacket {
    /// Attributes of the next entry in path order; `None` ends the listing.
    Stat(Option<FileStat>),
    /// The receiver wants the content of the entry with this number (count of stats before it).
    Request(u32),
    /// A piece of an entry's content; an empty piece ends the entry.
    Content {
        /// The entry's number.
        id: u32,
        /// The bytes.
        bytes: Bytes,
    },
    /// Both sides are done.
    Fin,
    /// The other side failed; the text is its own.
    Failed(String),
}

/// Both directions of a file transfer. Dropping it cancels the transfer at the client.
#[derive(Debug)]
pub struct FileStream {
    /// What the client sends; the end without [`FilePacket::Fin`] is a failure.
    pub incoming: mpsc::Receiver<Result<FilePacket, SessionError>>,
    /// What is sent to the client; bounded, so sending waits for a slow client.
    pub outgoing: mpsc::Sender<FilePacket>,
}

/// Both directions of a byte stream. Dropping it cancels the call at the client.
#[derive(Debug)]
pub struct ByteStream {
    /// What the client sends.
    pub incoming: mpsc::Receiver<Result<Bytes, SessionError>>,
    /// What is sent to the client. Dropping only this side ends our half of the stream.
    pub outgoing: mpsc::Sender<Bytes>,
}

/// What to ask of a client's directory (`FileSync.DiffCopy` request headers).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncRequest {
    /// The client's name of the directory: `context`, `dockerfile`, or one of the client's own.
    pub dir_name: String,
    /// Patterns an entry must match to be sent; empty: all.
    pub include_patterns: Vec<String>,
    /// Patterns of entries left out, with `!` exceptions.
    pub exclude_patterns: Vec<String>,
    /// Paths sent together with the targets of the symbolic links they pass through.
    pub follow_paths: Vec<String>,
}

/// A registry account.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// User name; empty with a non-empty secret: the secret is an identity token.
    pub username: String,
    /// Password or token.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What the token server of a registry is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRequest {
    /// Name of this client at the token server (`buildkit-client` by default).
    pub client_id: String,
    /// Registry host.
    pub host: String,
    /// The token server's URL.
    pub realm: String,
    /// The registry's service name.
    pub service: String,
    /// Scopes such as `repository:library/busybox:pull`.
    pub scopes: Vec<String>,
}

/// A registry's bearer token.
#[derive(Clone)]
pub struct Token {
    /// The token itself.
    pub token: String,
    /// Seconds it is valid from `issued_at_s`; 0: unknown.
    pub expires_in_s: i64,
    /// Seconds since the epoch at which it was issued; 0: unknown.
    pub issued_at_s: i64,
}

/// One connected client.
///
/// Every method may be cancelled by dropping its future. Calls run concurrently.
#[async_trait]
pub trait Session: Send + Sync + fmt::Debug {
    /// The session's id.
    fn id(&self) -> &SessionId;

    /// The client's key under which its directories are kept between builds (`X-Docker-Expose-Session-Sharedkey`).
    fn shared_key(&self) -> &str;

    /// Whether the client offers a method, by gRPC path.
    fn supports(&self, method: &str) -> bool;

    /// Fires when the connection is gone.
    fn closed(&self) -> CancellationToken;

    /// Opens a transfer of one of the client's directories (`FileSync.DiffCopy`).
    async fn sync_dir(&self, request: SyncRequest) -> Result<FileStream, SessionError>;

    /// Opens a transfer of a tree to the client's export target (`FileSend.DiffCopy` with the fsutil protocol); the
    /// engine is the sender. `exporter_id` is the index of the exporter in the request, or the caller's own id; `metadata`
    /// are further headers of the call, as they are.
    async fn send_tree(
        &self,
        exporter_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<FileStream, SessionError>;

    /// Opens a transfer of one file to the client's export target (`FileSend.DiffCopy` with raw bytes). The transfer
    /// is complete when, after dropping `outgoing`, `incoming` ends without an error. Each key of `metadata` becomes a
    /// header with the prefix `exporter-md-`.
    async fn send_file(
        &self,
        exporter_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ByteStream, SessionError>;

    /// Fetches a registry account.
    async fn credentials(&self, host: &str) -> Result<Credentials, SessionError>;

    /// Lets the client fetch a bearer token, so that its password never leaves it.
    async fn fetch_token(&self, request: TokenRequest) -> Result<Token, SessionError>;

    /// Asks the client for the public key with which it signs for a host, if it can fetch tokens itself.
    async fn token_authority(&self, host: &str, salt: &[u8]) -> Result<Bytes, SessionError>;

    /// Fetches a secret's bytes, at most 500 KiB. [`SessionError::NotFound`] when the client has none of this id.
    async fn secret(&self, id: &str) -> Result<Bytes, SessionError>;

    /// Checks that the client forwards an agent of this id.
    async fn check_agent(&self, id: &str) -> Result<(), SessionError>;

    /// Opens a connection to the client's agent.
    async fn forward_agent(&self, id: &str) -> Result<ByteStream, SessionError>;

    /// Opens a download that the client offers in place of a web server (`Upload.Pull`): a context from its standard input.
    async fn pull_upload(&self, path: &str) -> Result<ByteStream, SessionError>;

    /// The client's content stores, by id (`containerd.services.content.v1.Content` through the session): used by
    /// `oci-layout://` sources, directory exports and local caches. `store_id` goes into the call's metadata.
    async fn content_store(&self, store_id: &str) -> Result<Arc<dyn ClientContent>, SessionError>;

    /// Asks the client whether a source may be used (`PolicyVerifier.CheckPolicy`).
    async fn check_policy(&self, question: &PolicyQuestion) -> Result<PolicyAnswer, SessionError>;

    /// Asks the client what to do with a result once it is known (`Exporter.FindExporters`). `refs` are names by which
    /// the client can look at the result over its build's bridge.
    async fn find_exporters(
        &self,
        metadata: &BTreeMap<String, Bytes>,
        refs: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError>;

    /// Tells the client what came of all exports (`Exporter.FinalizeExport`); its error is one of the build.
    async fn finalize_export(&self, response: &BTreeMap<String, String>) -> Result<(), SessionError>;
}

/// Blobs at the client.
#[async_trait]
pub trait ClientContent: Send + Sync + fmt::Debug {
    /// Size in bytes of a blob and its labels.
    async fn info(&self, digest: &oci::Digest) -> Result<ClientBlob, SessionError>;
    /// Reads a blob from an offset to its end.
    async fn read(
        &self,
        digest: &oci::Digest,
        offset: u64,
    ) -> Result<mpsc::Receiver<Result<Bytes, SessionError>>, SessionError>;
    /// Writes a blob; the client verifies size and digest before it becomes visible. The writer is complete when
    /// [`ClientBlobWriter::commit`] returned.
    async fn write(
        &self,
        name: &str,
        expected: &oci::Descriptor,
    ) -> Result<Box<dyn ClientBlobWriter>, SessionError>;
    /// Changes a blob's labels (a local cache keeps its index in the client's layout through these).
    async fn set_labels(
        &self,
        digest: &oci::Digest,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), SessionError>;
}

/// What is known of a blob at the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientBlob {
    /// Length in bytes.
    pub size_bytes: u64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A blob being written to the client. Dropping it abandons the blob.
#[async_trait]
pub trait ClientBlobWriter: Send + fmt::Debug {
    /// Appends bytes.
    async fn write(&mut self, bytes: Bytes) -> Result<(), SessionError>;
    /// Completes the blob; an existing blob of that digest is success.
    async fn commit(self: Box<Self>) -> Result<(), SessionError>;
}

/// Where connected sessions are found. Implemented by `daemon`.
#[async_trait]
pub trait Sessions: Send + Sync + fmt::Debug {
    /// Finds a session, waiting a few seconds for a client that is just connecting.
    async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError>;
    /// Finds a session only if it is connected now.
    fn try_get(&self, id: &SessionId) -> Option<Arc<dyn Session>>;
}

/// The sessions of all builds that wait for one piece of work; cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionGroup {
    sessions: Arc<dyn Sessions>,
    ids: Arc<[SessionId]>,
}

impl SessionGroup {
    /// Groups sessions in the order in which they are tried.
    pub fn new(sessions: Arc<dyn Sessions>, ids: impl Into<Arc<[SessionId]>>) -> Self {
        Self {
            sessions,
            ids: ids.into(),
        }
    }

    /// The ids in order.
    pub fn ids(&self) -> &[SessionId] {
        &self.ids
    }

    /// The registry of sessions behind the group, for work that names a session itself.
    pub fn sessions(&self) -> &Arc<dyn Sessions> {
        &self.sessions
    }

    /// Finds a named session.
    ///
    /// # Errors
    /// [`SessionError::NoSession`] when it is not connected.
    pub async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError> {
        self.sessions.get(id).await
    }

    /// Tries `call` on each session in turn and returns the first success, else the last failure.
    ///
    /// # Errors
    /// The last session's error; [`SessionError::NoSession`] when the group is empty.
    pub async fn any<T, F, Fut>(&self, mut call: F) -> Result<T, SessionError>
    where
        F: FnMut(Arc<dyn Session>) -> Fut,
        Fut: Future<Output = Result<T, SessionError>>,
    {
        let mut last = SessionError::NoSession {
            id: "this build".to_owned(),
            reason: "the build has no client session".to_owned(),
        };
        for id in self.ids.iter() {
            match self.sessions.get(id).await {
                Ok(session) => match call(session).await {
                    Ok(value) => return Ok(value),
                    Err(error) => last = error,
                },
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
