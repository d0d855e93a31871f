//! What can go wrong in the blob store.

use std::io;
use std::path::PathBuf;

use oci::Digest;

/// A failure to read or change the store itself.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No blob has this digest. To callers of a cache this is a miss.
    #[error("content digest {digest}: not found")]
    NotFound {
        /// What was asked for.
        digest: Digest,
    },
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried, in the form "open", "rename to".
        action: &'static str,
        /// The file or directory it was tried on.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// Reports whether the failure says that the blob is absent.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// A failure of an ingest.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Another writer in this process holds the same reference key.
    #[error("ingest {ref_key:?} is being written")]
    Busy {
        /// The reference key.
        ref_key: String,
    },
    /// The bytes do not have the digest that was expected. The ingest is dropped.
    #[error("ingest {ref_key:?}: expected digest {expected}, got {actual}")]
    DigestMismatch {
        /// The reference key.
        ref_key: String,
        /// What the caller expected.
        expected: Box<Digest>,
        /// What was written.
        actual: Box<Digest>,
    },
    /// The number of bytes is not what was expected.
    #[error("ingest {ref_key:?}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// The reference key.
        ref_key: String,
        /// What the caller expected, in bytes.
        expected: u64,
        /// What was written, in bytes.
        actual: u64,
    },
    /// The store failed underneath.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The verdict of a check of a stored blob.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The file's bytes do not have the digest its name says.
    #[error("content digest {digest}: the stored bytes have digest {actual}")]
    Corrupt {
        /// The blob that was checked.
        digest: Digest,
        /// What its bytes have.
        actual: Box<Digest>,
    },
    /// The blob could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(crate) trait IoContext<T> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            action,
            path: path.into(),
            source: source.into(),
        })
    }
}
