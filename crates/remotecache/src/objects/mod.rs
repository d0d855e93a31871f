//! Caches in object stores: Amazon S3 and what speaks its protocol, Azure Blob Storage, GitHub's cache service.
//!
//! All keep blobs by digest and, under names, the cache's configuration with what is to be known of its layers
//! ([`super::config`]). They differ in how objects are reached, which is the port [`ObjectCache`].
//!
//! Credentials stay in memory, with the build that gave them: what refs remember of a place is a name without them.

mod attributes;
mod azblob;
mod azure;
mod credentials;
mod gha;
mod github;
mod http;
mod http_date;
mod import;
mod parts;
mod s3;
mod sigv4;
mod token;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use bytes::Bytes;
use oci::Descriptor;
use registry::BlobSource;
use source::image::fetch::BlobBytes;

pub use http::{Http, Limits, ObjectError};
pub use import::{Connections, OBJECT_PROVIDER, ObjectImporter, ObjectProvider};

/// A variable of the daemon's environment.
pub type Variable = fn(&str) -> Option<String>;

/// Caches of one place. Dropping a future ends its requests.
#[async_trait]
pub trait ObjectCache: Send + Sync + fmt::Debug {
    /// Reads the configurations under the cache's names; those that are not there are left out.
    async fn manifests(&self) -> Result<Vec<Bytes>, ObjectError>;

    /// Whether a blob is there.
    async fn has(&self, blob: &Descriptor) -> Result<bool, ObjectError>;

    /// Opens a blob from `offset` to its end. Whoever reads it verifies the digest.
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobBytes, ObjectError>;

    /// Makes ready for writing.
    async fn prepare(&self) -> Result<(), ObjectError> {
        Ok(())
    }

    /// Writes a blob unless it is there. [`ObjectError::Source`] tells that its bytes cannot be read.
    async fn put(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), ObjectError>;

    /// Writes the configuration under all of the cache's names.
    async fn put_manifest(&self, manifest: Bytes) -> Result<(), ObjectError>;

    /// Blobs that are written at once.
    fn parallel(&self) -> usize {
        4
    }
}

/// A kind of object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// Amazon S3 and its like.
    S3,
    /// Azure Blob Storage.
    AzureBlob,
    /// GitHub's cache service.
    GitHub,
}

/// A cache that attributes describe.
#[derive(Clone, Debug)]
pub struct Connected {
    /// The cache.
    pub cache: Arc<dyn ObjectCache>,
    /// The name of the place where its blobs are; without credentials.
    pub locator: String,
}

impl ObjectKind {
    /// The type's name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::AzureBlob => "azblob",
            Self::GitHub => "gha",
        }
    }

    /// The name of an export's vertex.
    pub fn exporting(self) -> &'static str {
        match self {
            Self::S3 => "exporting cache to Amazon S3",
            Self::AzureBlob => "exporting cache to Azure Blob Storage",
            Self::GitHub => "exporting to GitHub Actions Cache",
        }
    }

    /// Attributes that only this kind has.
    pub fn attributes(self) -> &'static [&'static str] {
        match self {
            Self::S3 => s3::ATTRIBUTES,
            Self::AzureBlob => azblob::ATTRIBUTES,
            Self::GitHub => gha::ATTRIBUTES,
        }
    }

    /// Reads the attributes; nothing is sent yet.
    ///
    /// # Errors
    /// A user error that names what is missing or wrong, never its value if that is secret.
    pub fn connect(
        self,
        attrs: &BTreeMap<String, String>,
        variable: Variable,
        client: &reqwest::Client,
    ) -> Result<Connected, BuildError> {
        match self {
            Self::S3 => s3::connect(attrs, variable, client),
            Self::AzureBlob => azblob::connect(attrs, variable, client),
            Self::GitHub => gha::connect(attrs, variable, client),
        }
    }
}

impl From<ObjectError> for BuildError {
    fn from(error: ObjectError) -> Self {
        let kind = match &error {
            _ if error.is_not_found() => ErrorKind::NotFound,
            _ if error.is_denied() => ErrorKind::Denied,
            ObjectError::TooLarge { .. } | ObjectError::Credentials { .. } => ErrorKind::User,
            _ => ErrorKind::Unavailable,
        };
        Self::from_source(kind, error)
    }
}

/// The descriptor of a blob, as stores need it.
#[cfg(test)]
pub(super) fn blob_of(bytes: &[u8]) -> Descriptor {
    Descriptor::of_bytes("", bytes)
}
