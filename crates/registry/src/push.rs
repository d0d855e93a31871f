//! Pushing: what exists is left alone, what another repository of the registry has is mounted, the rest is uploaded.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use http::StatusCode;
use http::header::{ACCEPT, CONTENT_TYPE};
use oci::{Descriptor, Reference};

use crate::client::{Client, header_digest, mismatch};
use crate::endpoint::{Direction, Endpoint};
use crate::error::RegistryError;
use crate::pace::Slot;
use crate::request::{Call, Method, Repository, status_error};
use crate::scope::Scopes;
use crate::upload::Upload;

/// Bytes in order, or why they cannot be read.
pub type ByteStream = BoxStream<'static, std::io::Result<Bytes>>;

/// The bytes of a blob to push; read again from some offset when an upload breaks off.
pub trait BlobSource: Send + Sync {
    /// Opens the blob from `offset` to its end.
    fn open(&self, offset: u64) -> ByteStream;
}

/// A blob in memory.
#[derive(Clone, Debug)]
pub struct BytesSource(pub Bytes);

impl BlobSource for BytesSource {
    fn open(&self, offset: u64) -> ByteStream {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        stream::iter([Ok(self.0.slice(offset..))]).boxed()
    }
}

/// One blob to push.
pub struct PushBlob<'a> {
    /// Digest and size; the media type only tells the server's logs.
    pub descriptor: &'a Descriptor,
    /// The bytes, not opened when the registry has them.
    pub source: &'a dyn BlobSource,
    /// Repositories of the same registry (paths, without the domain) that may have the blob, best first.
    pub mount_from: &'a [String],
    /// Told how many bytes are uploaded so far; may go back when an upload starts over.
    pub progress: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

/// How a blob came to be in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PushOutcome {
    /// It was there.
    Existed,
    /// It was mounted from this repository.
    Mounted(String),
    /// It was uploaded.
    Uploaded,
}

impl Client {
    /// Puts a blob into the reference's repository. Waits for a transfer slot of the domain.
    ///
    /// # Errors
    /// [`RegistryError::AccessDenied`] when the credentials do not allow it; [`RegistryError::ReadSource`] when the
    /// bytes cannot be read. Interrupted uploads are resumed or repeated before an error is given.
    pub async fn push_blob(
        &self,
        reference: &Reference,
        blob: PushBlob<'_>,
    ) -> Result<PushOutcome, RegistryError> {
        let slot = self.endpoints.slot(reference.domain(), Direction::Push).await;
        let outcome = self.push_within(&slot, reference, &blob).await?;
        slot.succeeded();
        Ok(outcome)
    }

    async fn push_within(
        &self,
        slot: &Slot,
        reference: &Reference,
        blob: &PushBlob<'_>,
    ) -> Result<PushOutcome, RegistryError> {
        let endpoints = self.endpoints.of(reference.domain())?;
        let endpoint = origin(&endpoints, reference)?;
        let repository = self.repository(reference, true).within(slot);
        let digest = blob.descriptor.digest;
        let head = Call::new(Method::Head, format!("blobs/{digest}")).header(ACCEPT, "*/*");
        if self.exists(&repository, endpoint, &head).await?.is_some() {
            return Ok(PushOutcome::Existed);
        }
        for from in blob.mount_from.iter().filter(|from| *from != reference.path()) {
            if let Some(outcome) = self.mount(slot, reference, endpoint, blob, from).await? {
                return Ok(outcome);
            }
        }
        Upload {
            client: self,
            repository: &repository,
            endpoint,
            blob,
        }
        .run()
        .await?;
        Ok(PushOutcome::Uploaded)
    }

    /// Puts a manifest or index into the reference's repository under its digest, or under `tag`.
    ///
    /// # Errors
    /// As [`Client::push_blob`]; a registry that answers with another digest is an error.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        bytes: Bytes,
        tag: Option<&str>,
    ) -> Result<(), RegistryError> {
        let endpoints = self.endpoints.of(reference.domain())?;
        let endpoint = origin(&endpoints, reference)?;
        let repository = self.repository(reference, true);
        let object = tag.map_or_else(|| descriptor.digest.to_string(), str::to_owned);
        let path = format!("manifests/{object}");
        let head =
            Call::new(Method::Head, path.clone()).header(ACCEPT, &format!("{}, */*", descriptor.media_type));
        if let Some(response) = self.exists(&repository, endpoint, &head).await?
            && (tag.is_none() || header_digest(&response)? == Some(descriptor.digest))
        {
            return Ok(());
        }
        let put = Call::new(Method::Put, path)
            .header(CONTENT_TYPE, &descriptor.media_type)
            .body(bytes);
        let response = repository.send(endpoint, &put, true).await?;
        match response.status() {
            StatusCode::OK | StatusCode::CREATED | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => {}
            StatusCode::UNAUTHORIZED => return Err(repository.denied(unauthorized())),
            _ => return Err(status_error(response, "PUT", &self.options).await),
        }
        match header_digest(&response)? {
            Some(actual) if actual != descriptor.digest => Err(mismatch(
                &format!("{}:{object}", reference.name()),
                descriptor.digest,
                actual,
            )),
            _ => Ok(()),
        }
    }

    /// Asks whether something is there; a refusal counts as no: some tokens may write and not read.
    async fn exists(
        &self,
        repository: &Repository<'_>,
        endpoint: &Endpoint,
        head: &Call,
    ) -> Result<Option<reqwest::Response>, RegistryError> {
        match repository.send(endpoint, head, true).await {
            Ok(response) if response.status() == StatusCode::OK => Ok(Some(response)),
            Ok(response) if response.status() == StatusCode::NOT_FOUND => Ok(None),
            Ok(response) if response.status() == StatusCode::UNAUTHORIZED => {
                Err(repository.denied(unauthorized()))
            }
            Ok(response) if response.status() == StatusCode::FORBIDDEN => {
                // An answer to HEAD has no body: ask again for the reason.
                let get = Call {
                    method: Method::Get,
                    ..head.clone()
                };
                let response = repository.send(endpoint, &get, false).await?;
                Err(status_error(response, "HEAD", &self.options).await)
            }
            Ok(response) => Err(status_error(response, "HEAD", &self.options).await),
            Err(RegistryError::AccessDenied { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Mounts a blob of another repository. `None` when the registry would not; what it offers instead, an upload, is
    /// given back.
    async fn mount(
        &self,
        slot: &Slot,
        reference: &Reference,
        endpoint: &Endpoint,
        blob: &PushBlob<'_>,
        from: &str,
    ) -> Result<Option<PushOutcome>, RegistryError> {
        let mut repository = self.repository(reference, true).within(slot);
        repository.scopes.merge(&Scopes::repository(from, false));
        let call = Call::new(Method::Post, "blobs/uploads/")
            .query("mount", blob.descriptor.digest.to_string())
            .query("from", from);
        let response = match repository.send(endpoint, &call, true).await {
            Ok(response) => response,
            // The other repository may be private: the push itself can still be allowed.
            Err(RegistryError::AccessDenied { .. } | RegistryError::Authorize { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        match response.status() {
            StatusCode::CREATED => Ok(Some(PushOutcome::Mounted(from.to_owned()))),
            StatusCode::ACCEPTED => {
                // No mount but a fresh upload: use it, so that no session is left open at the server.
                let upload = Upload {
                    client: self,
                    repository: &repository,
                    endpoint,
                    blob,
                };
                upload.run_at(response).await?;
                Ok(Some(PushOutcome::Uploaded))
            }
            status if status.is_client_error() => Ok(None),
            _ => Err(status_error(response, "POST", &self.options).await),
        }
    }
}

pub(crate) fn unauthorized() -> String {
    "server message: unauthorized: authorization failed".to_owned()
}

fn origin<'a>(endpoints: &'a [Endpoint], reference: &Reference) -> Result<&'a Endpoint, RegistryError> {
    endpoints
        .iter()
        .rev()
        .find(|endpoint| !endpoint.is_mirror)
        .ok_or_else(|| RegistryError::NotFound {
            what: reference.domain().to_owned(),
        })
}
