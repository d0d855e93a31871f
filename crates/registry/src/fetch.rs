//! Blobs as streams that survive broken connections and end in an error unless the bytes are the right ones.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::{BoxStream, StreamExt, try_unfold};
use http::StatusCode;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_RANGE, RANGE};
use oci::{Descriptor, Digester, Reference};

use crate::client::{Client, FirstError, mismatch, verify};
use crate::endpoint::Direction;
use crate::error::RegistryError;
use crate::pace::Slot;
use crate::request::{Backoff, Call, Method, display_url, next_chunk, send_once};

/// A blob's bytes in order. Dropping it closes the request.
///
/// It ends without an error only after exactly the announced bytes; started at offset 0, they also have the digest.
pub struct BlobStream(BoxStream<'static, Result<Bytes, RegistryError>>);

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobStream").finish_non_exhaustive()
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, RegistryError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

struct Fetching {
    client: Client,
    reference: Reference,
    descriptor: Descriptor,
    offset: u64,
    /// `None` when the stream started in the middle, or the caller verifies.
    digester: Option<Digester>,
    opened: Option<Opened>,
    backoff: Backoff,
    done: bool,
    slot: Slot,
}

/// A response and how much of it precedes the wanted offset.
struct Opened {
    response: reqwest::Response,
    skip: u64,
}

impl Opened {
    /// Cuts off what is still to be skipped.
    fn take_skipped(&mut self, mut chunk: Bytes) -> Bytes {
        let cut = chunk.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
        self.skip -= u64::try_from(cut).unwrap_or(self.skip);
        chunk.split_off(cut)
    }
}

impl Client {
    /// Opens a blob of the reference's repository from `offset` to its end. Waits for a transfer slot of the domain,
    /// held until the stream is dropped. Interrupted transfers go on where they broke off.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] when no host has it. Errors in the stream are final.
    pub async fn fetch(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        let digester = (offset == 0).then(|| descriptor.digest.verifier());
        self.fetch_with(reference, descriptor, offset, digester).await
    }

    /// As [`Client::fetch`], but checks only the size: for callers that compute the digest anyway.
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub async fn fetch_unverified(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        self.fetch_with(reference, descriptor, offset, None).await
    }

    async fn fetch_with(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
        offset: u64,
        digester: Option<Digester>,
    ) -> Result<BlobStream, RegistryError> {
        let slot = self.endpoints.slot(reference.domain(), Direction::Pull).await;
        let mut fetching = Fetching {
            client: self.clone(),
            reference: reference.clone(),
            descriptor: descriptor.clone(),
            offset,
            digester,
            opened: None,
            backoff: Backoff::new(&self.options),
            done: false,
            slot,
        };
        if offset < descriptor.size {
            fetching.opened = Some(fetching.open().await?);
        }
        let stream = try_unfold(fetching, |mut fetching| async move {
            Ok(fetching.next().await?.map(|chunk| (chunk, fetching)))
        });
        Ok(BlobStream(stream.boxed()))
    }

    /// Fetches a small blob whole, such as an image configuration; verified.
    ///
    /// # Errors
    /// [`RegistryError::TooLarge`] when it is larger than a manifest may be.
    pub async fn fetch_bytes(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
    ) -> Result<Bytes, RegistryError> {
        let limit = self.options.max_manifest_bytes;
        if descriptor.size > limit {
            return Err(RegistryError::TooLarge {
                what: descriptor.digest.to_string(),
                size_bytes: descriptor.size,
                limit_bytes: limit,
            });
        }
        let mut stream = self.fetch(reference, descriptor, 0).await?;
        let mut body = bytes::BytesMut::new();
        while let Some(chunk) = stream.next().await {
            body.extend_from_slice(&chunk?);
        }
        let body = body.freeze();
        verify(&body, descriptor.digest, &descriptor.digest.to_string())?;
        Ok(body)
    }
}

impl Fetching {
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        if self.done {
            return Ok(None);
        }
        loop {
            if self.offset >= self.descriptor.size && self.opened.is_none() {
                return self.finish();
            }
            let mut opened = match self.opened.take() {
                Some(opened) => opened,
                None => self.open().await?,
            };
            match next_chunk(&mut opened.response, "GET", &self.client.options).await {
                Ok(Some(chunk)) => {
                    let chunk = opened.take_skipped(chunk);
                    self.opened = Some(opened);
                    if chunk.is_empty() {
                        continue;
                    }
                    self.accept(&chunk)?;
                    return Ok(Some(chunk));
                }
                Ok(None) if self.offset >= self.descriptor.size => return self.finish(),
                Ok(None) => {
                    // A server that announces the right length and closes early, or a proxy that cut it off.
                    if !self.backoff.wait(None).await {
                        return Err(self.wrong_size());
                    }
                }
                Err(error) => {
                    if !error.is_transient() || !self.backoff.wait(None).await {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn accept(&mut self, chunk: &Bytes) -> Result<(), RegistryError> {
        self.offset = self
            .offset
            .saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
        if self.offset > self.descriptor.size {
            return Err(self.wrong_size());
        }
        if let Some(digester) = &mut self.digester {
            digester.update(chunk);
        }
        // Progress was made: the next interruption is a new one.
        self.backoff = Backoff::new(&self.client.options);
        Ok(())
    }

    fn wrong_size(&self) -> RegistryError {
        RegistryError::SizeMismatch {
            what: self.descriptor.digest.to_string(),
            expected_bytes: self.descriptor.size,
            actual_bytes: self.offset,
        }
    }

    /// The blob ends before the offset; a server may say where.
    fn too_short(&self, response: &reqwest::Response) -> RegistryError {
        let range = response.headers().get(CONTENT_RANGE);
        let size = range
            .and_then(|value| value.to_str().ok()?.strip_prefix("bytes */")?.parse().ok())
            .filter(|size| *size <= self.offset);
        RegistryError::SizeMismatch {
            what: self.descriptor.digest.to_string(),
            expected_bytes: self.descriptor.size,
            actual_bytes: size.unwrap_or(self.offset),
        }
    }

    fn finish(&mut self) -> Result<Option<Bytes>, RegistryError> {
        self.done = true;
        if let Some(digester) = self.digester.take() {
            let (expected, actual) = (self.descriptor.digest, digester.finish());
            if actual != expected {
                return Err(mismatch(&expected.to_string(), expected, actual));
            }
        }
        self.slot.succeeded();
        Ok(None)
    }

    /// Opens the blob at the current offset at the first host that has it.
    async fn open(&self) -> Result<Opened, RegistryError> {
        let endpoints = self.client.endpoints.of(self.reference.domain())?;
        let repository = self.client.repository(&self.reference, false).within(&self.slot);
        let digest = self.descriptor.digest;
        let kind = if oci::media_type::is_manifest(&self.descriptor.media_type)
            || oci::media_type::is_index(&self.descriptor.media_type)
        {
            "manifests"
        } else {
            "blobs"
        };
        let mut call = Call::new(Method::Get, format!("{kind}/{digest}"))
            .header(ACCEPT_ENCODING, "identity")
            .header(ACCEPT, &accept(&self.descriptor.media_type));
        if self.offset > 0 {
            call = call.header(RANGE, &format!("bytes={}-", self.offset));
        }
        let mut first = FirstError::default();
        for (at, endpoint) in endpoints.iter().enumerate() {
            let last = at + 1 == endpoints.len();
            let result = match repository.send(endpoint, &call, last).await {
                Ok(response) if response.status().is_success() => {
                    self.skip(&response).map(|skip| Opened { response, skip })
                }
                // Only what lies within the descriptor's size is asked for.
                Ok(response) if response.status() == StatusCode::RANGE_NOT_SATISFIABLE => {
                    Err(self.too_short(&response))
                }
                Ok(response) => Err(repository.failed(response, &call, &self.what()).await),
                Err(error) => Err(error),
            };
            match result {
                Ok(opened) => return Ok(opened),
                Err(error) => first.note(error),
            }
        }
        if let Some(origin) = endpoints.last()
            && let Some(opened) = self.open_foreign(&origin.http).await
        {
            return Ok(opened);
        }
        Err(first
            .error
            .unwrap_or_else(|| RegistryError::NotFound { what: self.what() }))
    }

    /// Opens the blob at one of the places its descriptor names, without credentials: layers that are not
    /// distributed with their image.
    async fn open_foreign(&self, http: &reqwest::Client) -> Option<Opened> {
        for url in self
            .descriptor
            .urls
            .iter()
            .filter_map(|url| reqwest::Url::parse(url).ok())
        {
            if !matches!(url.scheme(), "http" | "https") {
                continue;
            }
            let mut request = http.get(url).header(ACCEPT_ENCODING, "identity");
            if self.offset > 0 {
                request = request.header(RANGE, format!("bytes={}-", self.offset));
            }
            if let Ok(response) = send_once(request, "GET", self.client.options.idle_timeout).await
                && response.status().is_success()
                && let Ok(skip) = self.skip(&response)
            {
                return Some(Opened { response, skip });
            }
        }
        None
    }

    /// How many bytes to skip so that the response starts at the offset: servers without ranges send all.
    fn skip(&self, response: &reqwest::Response) -> Result<u64, RegistryError> {
        if self.offset == 0 {
            return Ok(0);
        }
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(self.offset);
        }
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok());
        match range {
            Some(range) if !range.starts_with(&format!("bytes {}-", self.offset)) => {
                Err(RegistryError::InvalidResponse {
                    url: display_url(response.url()),
                    reason: format!("unhandled content range in response: {range}"),
                })
            }
            _ => Ok(0),
        }
    }

    fn what(&self) -> String {
        format!("{}@{}", self.reference.name(), self.descriptor.digest)
    }
}

fn accept(media_type: &str) -> String {
    if media_type.is_empty() {
        "*/*".to_owned()
    } else {
        format!("{media_type}, */*")
    }
}
