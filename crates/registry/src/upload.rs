//! One blob's upload: in one request, and in pieces where that does not get through.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE};
use http::{HeaderValue, StatusCode};

use crate::auth::Verdict;
use crate::client::Client;
use crate::endpoint::Endpoint;
use crate::error::RegistryError;
use crate::push::{ByteStream, PushBlob, unauthorized};
use crate::request::{Backoff, Call, Method, Repository, display_url, send_once, status_error};

/// Pieces are at least this large unless the blob ends.
const MIN_CHUNK_BYTES: u64 = 1 << 20;

/// What is needed to upload a blob.
pub(crate) struct Upload<'a> {
    pub client: &'a Client,
    pub repository: &'a Repository<'a>,
    pub endpoint: &'a Endpoint,
    pub blob: &'a PushBlob<'a>,
}

/// Where an upload stands at the server.
struct Position {
    url: reqwest::Url,
    offset: u64,
    /// The least piece the server wants.
    min_chunk_bytes: u64,
}

impl Upload<'_> {
    /// Starts an upload and completes it.
    pub async fn run(&self) -> Result<(), RegistryError> {
        let response = self.start().await?;
        if response.status() == StatusCode::CREATED {
            return Ok(());
        }
        self.run_at(response).await
    }

    async fn start(&self) -> Result<reqwest::Response, RegistryError> {
        let call = Call::new(Method::Post, "blobs/uploads/");
        let response = self.repository.send(self.endpoint, &call, true).await?;
        match response.status() {
            StatusCode::OK | StatusCode::CREATED | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => {
                Ok(response)
            }
            StatusCode::UNAUTHORIZED => Err(self.repository.denied(unauthorized())),
            _ => Err(status_error(response, "POST", &self.client.options).await),
        }
    }

    /// Completes the upload a response opened.
    pub async fn run_at(&self, started: reqwest::Response) -> Result<(), RegistryError> {
        let mut position = self.position(&started, 0)?;
        let mut backoff = Backoff::new(&self.client.options);
        let mut pieces = false;
        loop {
            let before = position.offset;
            let result = if pieces {
                self.in_pieces(&mut position).await
            } else {
                self.at_once(&position).await
            };
            let Err(error) = result else { return Ok(()) };
            if is_too_large(&error) && !pieces {
                pieces = true;
                position = self.position(&self.start().await?, 0)?;
                continue;
            }
            if !error.is_transient() {
                return Err(error);
            }
            if position.offset > before {
                backoff = Backoff::new(&self.client.options);
            }
            if !backoff.wait(error.retry_after()).await {
                return Err(error);
            }
            tracing::debug!(digest = %self.blob.descriptor.digest, %error, "upload interrupted");
            match self.status(&position).await {
                Some(resumed) => {
                    position = resumed;
                    pieces = true;
                }
                None => position = self.position(&self.start().await?, 0)?,
            }
        }
    }

    /// Sends everything in the closing PUT.
    async fn at_once(&self, position: &Position) -> Result<(), RegistryError> {
        let size = self.blob.descriptor.size;
        let response = self
            .send_bytes(Method::Put, self.closing_url(position), 0, size, false)
            .await?;
        self.closed(response).await
    }

    /// Sends what is missing by PATCH, then closes with an empty PUT.
    async fn in_pieces(&self, position: &mut Position) -> Result<(), RegistryError> {
        let size = self.blob.descriptor.size;
        while position.offset < size {
            let piece = self
                .client
                .options
                .upload_chunk_bytes
                .max(MIN_CHUNK_BYTES)
                .max(position.min_chunk_bytes);
            let end = size.min(position.offset.saturating_add(piece));
            let response = self
                .send_bytes(Method::Patch, position.url.clone(), position.offset, end, true)
                .await?;
            match response.status() {
                StatusCode::ACCEPTED | StatusCode::NO_CONTENT | StatusCode::OK | StatusCode::CREATED => {
                    *position = self.position(&response, end)?;
                }
                _ => return Err(status_error(response, "PATCH", &self.client.options).await),
            }
        }
        let response = self
            .send_bytes(Method::Put, self.closing_url(position), size, size, false)
            .await?;
        self.closed(response).await
    }

    async fn closed(&self, response: reqwest::Response) -> Result<(), RegistryError> {
        match response.status() {
            StatusCode::OK | StatusCode::CREATED | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => Ok(()),
            StatusCode::UNAUTHORIZED => Err(self.repository.denied(unauthorized())),
            _ => Err(status_error(response, "PUT", &self.client.options).await),
        }
    }

    fn closing_url(&self, position: &Position) -> reqwest::Url {
        let mut url = position.url.clone();
        url.query_pairs_mut()
            .append_pair("digest", &self.blob.descriptor.digest.to_string());
        url
    }

    /// Asks the server how far an interrupted upload got; `None`: it has to start over.
    async fn status(&self, position: &Position) -> Option<Position> {
        let response = self.send_empty(Method::Get, position.url.clone()).await.ok()?;
        if !matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::ACCEPTED) {
            return None;
        }
        let range = response.headers().get(RANGE)?.to_str().ok()?;
        let end: u64 = range
            .trim_start_matches("bytes=")
            .split_once('-')?
            .1
            .trim()
            .parse()
            .ok()?;
        // A server that has nothing cannot say so but by `0-0`; one byte less is always right.
        let offset = if end == 0 { 0 } else { end.checked_add(1)? };
        if offset > self.blob.descriptor.size {
            return None;
        }
        if offset == 0 {
            return None;
        }
        self.position(&response, offset).ok().or(Some(Position {
            offset,
            ..position.again()
        }))
    }

    async fn send_empty(
        &self,
        method: Method,
        url: reqwest::Url,
    ) -> Result<reqwest::Response, RegistryError> {
        let mut request = self.endpoint.http.request(method.http(), url.clone());
        if let Some(value) = self.authorization(&url).await? {
            request = request.header(AUTHORIZATION, value);
        }
        send_once(request, method.name(), self.client.options.idle_timeout).await
    }

    /// Sends a part of the blob, once more after a 401: tokens may expire between the pieces of a large blob.
    async fn send_bytes(
        &self,
        method: Method,
        url: reqwest::Url,
        start: u64,
        end: u64,
        with_range: bool,
    ) -> Result<reqwest::Response, RegistryError> {
        let mut challenged = false;
        loop {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            headers.insert(CONTENT_LENGTH, HeaderValue::from(end - start));
            if with_range {
                let range = HeaderValue::from_str(&format!("{start}-{}", end.saturating_sub(1)));
                headers.insert(CONTENT_RANGE, range.expect("digits and a dash"));
            }
            if let Some(value) = self.authorization(&url).await? {
                headers.insert(AUTHORIZATION, value);
            }
            let response = self
                .stream_bytes(method, url.clone(), headers, start, end)
                .await?;
            if response.status() != StatusCode::UNAUTHORIZED || challenged || !self.is_own(&url) {
                return Ok(response);
            }
            let (auth, scopes) = (&self.client.auth, &self.repository.scopes);
            let verdict = auth
                .challenged(
                    self.endpoint,
                    self.repository.path,
                    scopes,
                    response.headers(),
                    false,
                )
                .await?;
            match verdict {
                Verdict::Retry => challenged = true,
                Verdict::Denied(reason) | Verdict::Refused(reason) => {
                    return Err(self.repository.denied(reason));
                }
                Verdict::Unhandled => return Ok(response),
            }
        }
    }

    async fn stream_bytes(
        &self,
        method: Method,
        url: reqwest::Url,
        headers: HeaderMap,
        start: u64,
        end: u64,
    ) -> Result<reqwest::Response, RegistryError> {
        let shown = display_url(&url);
        let moved = Arc::new(Moved::default());
        let body = if start == end {
            reqwest::Body::from(Bytes::new())
        } else {
            let stream = bounded(self.blob.source.open(start), end - start);
            let (moved, progress) = (Arc::clone(&moved), self.blob.progress.clone());
            reqwest::Body::wrap_stream(stream.map(move |chunk| {
                let chunk = chunk.map_err(|error| moved.note(error))?;
                let sent = moved.add(chunk.len());
                if let Some(progress) = &progress {
                    progress(start + sent);
                }
                Ok::<_, std::io::Error>(chunk)
            }))
        };
        let request = self
            .endpoint
            .http
            .request(method.http(), url)
            .headers(headers)
            .body(body);
        let limit = self.client.options.upload_stall_timeout;
        let sending = request.send();
        tokio::pin!(sending);
        loop {
            let before = moved.bytes.load(Ordering::Relaxed);
            match tokio::time::timeout(limit, &mut sending).await {
                // An answer to a body that broke off says nothing of why.
                Ok(answer) => {
                    return match (moved.taken(), answer) {
                        (Some(source), _) => Err(RegistryError::ReadSource {
                            digest: self.blob.descriptor.digest,
                            source,
                        }),
                        (None, Ok(response)) => {
                            self.repository.note(&response);
                            Ok(response)
                        }
                        (None, Err(source)) => Err(RegistryError::Transport {
                            method: method.name(),
                            url: shown,
                            source: source.without_url(),
                        }),
                    };
                }
                Err(_) if moved.bytes.load(Ordering::Relaxed) > before => {}
                Err(_) => return Err(timeout(method, shown, limit)),
            }
        }
    }

    /// Whether a URL is the registry's own, so that credentials may go there.
    fn is_own(&self, url: &reqwest::Url) -> bool {
        let own = format!("{}://{}", self.endpoint.scheme(), self.endpoint.authority);
        reqwest::Url::parse(&own).is_ok_and(|own| own.origin() == url.origin())
    }

    async fn authorization(&self, url: &reqwest::Url) -> Result<Option<HeaderValue>, RegistryError> {
        if !self.is_own(url) {
            return Ok(None);
        }
        self.client
            .auth
            .header(self.endpoint, self.repository.path, &self.repository.scopes)
            .await
    }

    /// Reads where to go on from a response's `Location`, which may be relative.
    fn position(&self, response: &reqwest::Response, offset: u64) -> Result<Position, RegistryError> {
        let invalid = |reason: String| RegistryError::InvalidResponse {
            url: display_url(response.url()),
            reason,
        };
        let location = response
            .headers()
            .get(LOCATION)
            .and_then(|value| value.to_str().ok());
        let Some(location) = location else {
            return Err(invalid("no upload location".to_owned()));
        };
        let url = response
            .url()
            .join(location)
            .map_err(|error| invalid(format!("unable to parse location {location}: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(invalid(format!("upload location has scheme {}", url.scheme())));
        }
        let min = response
            .headers()
            .get("oci-chunk-min-length")
            .and_then(|value| value.to_str().ok());
        let min_chunk_bytes = min.and_then(|min| min.trim().parse().ok()).unwrap_or(0);
        Ok(Position {
            url,
            offset,
            min_chunk_bytes,
        })
    }
}

impl Position {
    fn again(&self) -> Self {
        Self {
            url: self.url.clone(),
            offset: self.offset,
            min_chunk_bytes: self.min_chunk_bytes,
        }
    }
}

/// How far a request body got.
#[derive(Default)]
struct Moved {
    bytes: AtomicU64,
    /// Why the bytes could not be read.
    failure: Mutex<Option<std::io::Error>>,
}

impl Moved {
    fn add(&self, count: usize) -> u64 {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.bytes
            .fetch_add(count, Ordering::Relaxed)
            .saturating_add(count)
    }

    /// Keeps why the bytes cannot be read; returns what ends the body.
    fn note(&self, error: std::io::Error) -> std::io::Error {
        let ending = std::io::Error::from(error.kind());
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        ending
    }

    fn taken(&self) -> Option<std::io::Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Cuts a stream off after `length` bytes; an earlier end is an error.
fn bounded(stream: ByteStream, length: u64) -> ByteStream {
    futures_util::stream::try_unfold((stream, length), |(mut stream, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let Some(chunk) = stream.next().await else {
            let reason = format!("blob ends {left} bytes early");
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason));
        };
        let mut chunk: Bytes = chunk?;
        chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        let left = left.saturating_sub(u64::try_from(chunk.len()).unwrap_or(left));
        Ok(Some((chunk, (stream, left))))
    })
    .boxed()
}

fn is_too_large(error: &RegistryError) -> bool {
    matches!(error, RegistryError::Status { status, .. } if *status == StatusCode::PAYLOAD_TOO_LARGE)
}

fn timeout(method: Method, url: String, limit: Duration) -> RegistryError {
    RegistryError::Timeout {
        method: method.name(),
        url,
        seconds: limit.as_secs(),
    }
}
