//! Where an image's documents are read.

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use bytes::Bytes;
use oci::{Descriptor, Reference};
use registry::Client;

use super::registry_error;

/// Reads the documents of images: from a registry, or from a layout at the client.
#[async_trait]
pub(crate) trait DocumentReader: Send + Sync {
    /// Finds the manifest or index of a reference.
    async fn resolve(&self, reference: &Reference) -> Result<Descriptor, BuildError>;

    /// Reads a manifest or index whole: bounded in size, its digest verified.
    async fn manifest(&self, reference: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError>;

    /// Reads a configuration whole: bounded in size, its digest verified.
    async fn config(&self, reference: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError>;
}

/// Reads nothing: what is not in memory is not there.
pub(crate) struct NoReader;

fn unread(reference: &Reference) -> BuildError {
    BuildError::new(ErrorKind::NotFound, format!("{reference} is not kept here"))
}

#[async_trait]
impl DocumentReader for NoReader {
    async fn resolve(&self, reference: &Reference) -> Result<Descriptor, BuildError> {
        Err(unread(reference))
    }

    async fn manifest(&self, reference: &Reference, _: &Descriptor) -> Result<Bytes, BuildError> {
        Err(unread(reference))
    }

    async fn config(&self, reference: &Reference, _: &Descriptor) -> Result<Bytes, BuildError> {
        Err(unread(reference))
    }
}

/// Reads from registries.
pub(crate) struct RegistryReader(pub Client);

#[async_trait]
impl DocumentReader for RegistryReader {
    async fn resolve(&self, reference: &Reference) -> Result<Descriptor, BuildError> {
        self.0.resolve(reference).await.map_err(registry_error)
    }

    async fn manifest(&self, reference: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        self.0
            .manifest(reference, descriptor)
            .await
            .map_err(registry_error)
    }

    async fn config(&self, reference: &Reference, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        self.0
            .fetch_bytes(reference, descriptor)
            .await
            .map_err(registry_error)
    }
}
