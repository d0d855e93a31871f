//! What can go wrong in the store.

use std::io;
use std::path::PathBuf;

use oci::Digest;

use crate::types::RefId;

/// A state directory that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("{} is in use by another process{}", root.display(), owner.map(|pid| format!(" ({pid})")).unwrap_or_default())]
    Locked {
        /// The state directory.
        root: PathBuf,
        /// The other process, when known.
        owner: Option<u32>,
    },
    /// A newer program wrote it.
    #[error("{} has state version {found}; this program supports up to version {supported}", root.display())]
    NewerVersion {
        /// The state directory.
        root: PathBuf,
        /// Its version.
        found: u64,
        /// The newest version this program reads.
        supported: u64,
    },
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The database does not open or its rows do not read.
    #[error("metadata database in {}", root.display())]
    Database {
        /// The state directory.
        root: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Bringing disk and database together failed.
    #[error("recover {}", root.display())]
    Recover {
        /// The state directory.
        root: PathBuf,
        /// Why.
        #[source]
        source: Box<StoreError>,
    },
}

/// A failed operation on the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such ref, or what it needs is gone. A cache miss.
    #[error("ref {id}: not found")]
    NotFound {
        /// What was asked for.
        id: RefId,
    },
    /// The ref is held by someone else who may write to it.
    #[error("ref {id} is locked")]
    Locked {
        /// The ref.
        id: RefId,
    },
    /// The ref is not mutable, or has become immutable.
    #[error("ref {id} is not mutable")]
    NotMutable {
        /// The ref.
        id: RefId,
    },
    /// Layer blobs have to be fetched first: see [`missing_blobs`](crate::ImmutableRef::missing_blobs).
    #[error("ref {id}: {} layer blobs are not available locally", digests.len())]
    Lazy {
        /// The ref.
        id: RefId,
        /// What is missing.
        digests: Vec<Digest>,
    },
    /// An unpacked layer is not what its image said.
    #[error("ref {id}: {mismatch}")]
    WrongDiffId {
        /// The ref.
        id: RefId,
        /// What differs.
        mismatch: Box<DiffIdMismatch>,
    },
    /// The arguments contradict each other or the ref.
    #[error("ref {id}: {reason}")]
    Invalid {
        /// The ref.
        id: RefId,
        /// What is wrong.
        reason: &'static str,
    },
    /// A blob operation failed.
    #[error("content store")]
    Content(#[from] content::StoreError),
    /// A snapshot operation failed.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    /// Unpacking a layer failed.
    #[error("unpack layer {blob} of ref {id}")]
    Unpack {
        /// The ref.
        id: RefId,
        /// The compressed blob.
        blob: Digest,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nobody wants the layer any more that was being unpacked.
    #[error("ref {id}: unpacking was given up")]
    Unwanted {
        /// The ref.
        id: RefId,
    },
    /// The database failed; nothing more is written until it works again, which is tried several times a second.
    #[error("metadata database: {message}")]
    Database {
        /// Why.
        message: String,
    },
    /// A filter does not parse.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A record, result or group cannot have this id: empty, longer than 512 bytes, or with a NUL.
    #[error("invalid record id {id:?}")]
    InvalidRecordId {
        /// What was offered.
        id: String,
    },
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Reports whether the failure is a cache miss rather than a fault.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// A layer's uncompressed digest and what its image says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffIdMismatch {
    /// The compressed blob.
    pub blob: Digest,
    /// What was promised.
    pub expected: Digest,
    /// What came out.
    pub actual: Digest,
}

impl std::fmt::Display for DiffIdMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "layer {} has diffID {}, expected {}",
            self.blob, self.actual, self.expected
        )
    }
}

/// A filter expression that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filters: parse error: [{input}]: {message} at byte {offset}")]
pub struct FilterError {
    /// The expression.
    pub input: String,
    /// Where in it.
    pub offset: usize,
    /// What is wrong.
    pub message: String,
}
