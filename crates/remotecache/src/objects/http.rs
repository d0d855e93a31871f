//! Requests to object stores: signed anew and sent again after trouble, `Retry-After` honoured by all at once, bodies
//! bounded or resumed where they broke off.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use build::error::BuildError;
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use oci::Digest;
use reqwest::header::{CONTENT_RANGE, HeaderMap, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url};
use source::image::fetch::BlobBytes;
use thiserror::Error;
use tokio::time::Instant;

use super::http_date;

/// Error bodies are read up to this size.
const MAX_ERROR_BYTES: usize = 64_000;
/// Of what a server says is shown so much.
const MAX_SAID: usize = 300;

/// Why an object could not be had or written. No text contains a query or a header, where credentials are.
#[derive(Debug, Error)]
pub enum ObjectError {
    /// The connection failed.
    #[error("failed to do request: {method} {url:?}: {}", RootCause(.source))]
    Transport {
        /// The request's method.
        method: Method,
        /// The request's URL without its query.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The server was silent for too long.
    #[error("failed to do request: {method} {url:?}: no answer within {seconds} s")]
    Timeout {
        /// The request's method.
        method: Method,
        /// The request's URL without its query.
        url: String,
        /// The limit.
        seconds: u64,
    },
    /// The server refused.
    #[error("unexpected status from {method} request to {url}: {status}{}", Said(.code, .message))]
    Status {
        /// The request's method.
        method: Method,
        /// The request's URL without its query.
        url: String,
        /// The answer.
        status: StatusCode,
        /// The server's name of the trouble; empty: it told none.
        code: String,
        /// What else it said.
        message: String,
    },
    /// The server broke its protocol.
    #[error("invalid response from {url}: {reason}")]
    InvalidResponse {
        /// The request's URL without its query.
        url: String,
        /// How.
        reason: String,
    },
    /// A document is larger than accepted.
    #[error("{url}: more than {limit_bytes} bytes")]
    TooLarge {
        /// The request's URL without its query.
        url: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// The bytes to write cannot be read.
    #[error("failed to read {digest} for writing")]
    Source {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There are no credentials that could be used.
    #[error("{reason}")]
    Credentials {
        /// What is missing.
        reason: String,
    },
}

impl ObjectError {
    /// Whether the object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status, .. } if matches!(*status, StatusCode::NOT_FOUND | StatusCode::GONE))
    }

    /// Whether credentials are missing or insufficient.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Status { status, .. }
            if matches!(*status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
    }

    /// The server's name of the trouble.
    pub fn code(&self) -> &str {
        match self {
            Self::Status { code, .. } => code,
            _ => "",
        }
    }

    fn is_transient(&self) -> bool {
        match self {
            Self::Transport { source, .. } => {
                !source.is_builder() && !source.is_redirect() && !registry::is_unknown_host(source)
            }
            Self::Timeout { .. } => true,
            _ => false,
        }
    }
}

/// Prints the innermost error of a chain: the outer ones repeat the URL.
struct RootCause<'a>(&'a reqwest::Error);

impl fmt::Display for RootCause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cause: &dyn std::error::Error = self.0;
        while let Some(next) = cause.source() {
            cause = next;
        }
        write!(f, "{cause}")
    }
}

struct Said<'a>(&'a str, &'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for said in [self.0, self.1].into_iter().filter(|said| !said.is_empty()) {
            write!(f, ": {said}")?;
        }
        Ok(())
    }
}

/// How long is tried.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How often a request is sent.
    pub attempts: u32,
    /// The first wait between two attempts; doubles from one to the next.
    pub backoff: Duration,
    /// The longest wait, also if the server asks for more.
    pub max_wait: Duration,
    /// How long a server may be silent.
    pub idle: Duration,
    /// How long a server may send everybody away before it is given up.
    pub throttled: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            attempts: 5,
            backoff: Duration::from_millis(300),
            max_wait: Duration::from_secs(60),
            idle: Duration::from_secs(60),
            throttled: Duration::from_secs(600),
        }
    }
}

/// A request, complete but for its authorization.
#[derive(Clone)]
pub(super) struct Request {
    pub method: Method,
    pub url: Url,
    /// Names in lower case.
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
}

impl Request {
    pub fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            headers: Vec::new(),
            body: Bytes::new(),
        }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// `Host` as it is sent.
    pub fn host(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        match self.url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }
}

/// Adds to a request what proves who sends it.
pub(super) trait Authorize: Send + Sync {
    /// Called for every attempt, with its time.
    fn authorize(&self, request: &mut Request, now: SystemTime);
}

/// Requests that are allowed by their URL, or by nothing.
pub(super) struct Anonymous;

impl Authorize for Anonymous {
    fn authorize(&self, _: &mut Request, _: SystemTime) {}
}

/// Sends requests to one service. Clones share its patience.
#[derive(Clone)]
pub struct Http {
    client: reqwest::Client,
    limits: Limits,
    /// Until when the service wants to be left alone.
    paused: Arc<Mutex<Option<Instant>>>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Http {
    /// Sends with a client, within limits.
    pub fn new(client: &reqwest::Client, limits: Limits) -> Self {
        Self {
            client: client.clone(),
            limits,
            paused: Arc::default(),
        }
    }

    /// Sends a request until it has an answer that another attempt would not change.
    pub(super) async fn send(
        &self,
        request: &Request,
        authorize: &dyn Authorize,
    ) -> Result<reqwest::Response, ObjectError> {
        let give_up = Instant::now() + self.limits.throttled;
        let mut attempt = 1;
        let mut wait = self.limits.backoff;
        loop {
            self.wait_while_paused().await;
            let sent = self.send_once(request, authorize).await;
            let asked = match &sent {
                Err(error) if error.is_transient() => None,
                Ok(response) if is_passing(response.status()) => retry_after(response.headers()),
                _ => return sent,
            };
            let throttled =
                matches!(&sent, Ok(response) if response.status() == StatusCode::TOO_MANY_REQUESTS);
            let pause = asked.unwrap_or(wait.min(self.limits.max_wait));
            let exhausted = if throttled {
                Instant::now() + pause > give_up
            } else {
                attempt >= self.limits.attempts || pause > self.limits.max_wait
            };
            if exhausted {
                return sent;
            }
            if throttled || asked.is_some() {
                self.pause(pause);
            } else {
                tokio::time::sleep(pause).await;
            }
            attempt += 1;
            wait = wait.saturating_mul(2);
        }
    }

    /// Sends a request and turns a status that is no success into an error.
    pub(super) async fn succeed(
        &self,
        request: &Request,
        authorize: &dyn Authorize,
    ) -> Result<reqwest::Response, ObjectError> {
        let response = self.send(request, authorize).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refused(request.method.clone(), response).await)
    }

    async fn send_once(
        &self,
        request: &Request,
        authorize: &dyn Authorize,
    ) -> Result<reqwest::Response, ObjectError> {
        let mut signed = request.clone();
        authorize.authorize(&mut signed, SystemTime::now());
        let url = display_url(&signed.url);
        let mut builder = self.client.request(signed.method.clone(), signed.url);
        for (name, value) in &signed.headers {
            builder = builder.header(*name, value);
        }
        let has_body = !matches!(signed.method, Method::GET | Method::HEAD | Method::DELETE);
        if has_body {
            builder = builder.body(signed.body.clone());
        }
        // A slow line is no silent server: a body of so many bytes may take so long.
        let size = u64::try_from(signed.body.len()).unwrap_or(u64::MAX);
        let limit = self.limits.idle + Duration::from_millis(size / 32);
        match tokio::time::timeout(limit, builder.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(source)) => Err(ObjectError::Transport {
                method: signed.method,
                url,
                source: source.without_url(),
            }),
            Err(_) => Err(ObjectError::Timeout {
                method: signed.method,
                url,
                seconds: limit.as_secs(),
            }),
        }
    }

    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        if paused.is_none_or(|known| known < until) {
            *paused = Some(until);
        }
    }

    async fn wait_while_paused(&self) {
        loop {
            let until = *self.paused.lock().unwrap_or_else(PoisonError::into_inner);
            match until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => return,
            }
        }
    }

    /// The error of a response that is no success, with what its body says.
    pub(super) async fn refused(&self, method: Method, response: reqwest::Response) -> ObjectError {
        let (url, status) = (display_url(response.url()), response.status());
        let named = response.headers().get("x-ms-error-code");
        let named = named.and_then(|code| code.to_str().ok()).map(ToOwned::to_owned);
        let body = self.read(response, MAX_ERROR_BYTES).await.unwrap_or_default();
        let (code, message) = said(&String::from_utf8_lossy(&body));
        ObjectError::Status {
            method,
            url,
            status,
            code: named.unwrap_or(code),
            message,
        }
    }

    /// Reads a whole body of at most `limit` bytes.
    pub(super) async fn read(
        &self,
        mut response: reqwest::Response,
        limit: usize,
    ) -> Result<Bytes, ObjectError> {
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if body.len().saturating_add(chunk.len()) > limit {
                return Err(ObjectError::TooLarge {
                    url: display_url(response.url()),
                    limit_bytes: limit,
                });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// Reads a whole object of at most `limit` bytes, again from its beginning if it breaks off.
    pub(super) async fn document<F>(&self, limit: usize, send: impl Fn() -> F) -> Result<Bytes, ObjectError>
    where
        F: Future<Output = Result<reqwest::Response, ObjectError>>,
    {
        let mut attempt = 1;
        loop {
            match self.read(send().await?, limit).await {
                Err(error) if error.is_transient() && attempt < self.limits.attempts => {
                    tokio::time::sleep(self.limits.backoff).await;
                    attempt += 1;
                }
                read => return read,
            }
        }
    }

    async fn chunk(&self, response: &mut reqwest::Response) -> Result<Option<Bytes>, ObjectError> {
        match tokio::time::timeout(self.limits.idle, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(source)) => Err(ObjectError::Transport {
                method: Method::GET,
                url: display_url(response.url()),
                source: source.without_url(),
            }),
            Err(_) => Err(ObjectError::Timeout {
                method: Method::GET,
                url: display_url(response.url()),
                seconds: self.limits.idle.as_secs(),
            }),
        }
    }

    /// Streams an object of `size` bytes from an offset; what breaks off is opened again where it did.
    pub(super) async fn stream(&self, open: Open, offset: u64, size: u64) -> Result<BlobBytes, ObjectError> {
        if offset > 0 && offset >= size {
            return Ok(stream::empty().boxed());
        }
        let response = open_at(&open, offset).await?;
        let reading = Reading {
            http: self.clone(),
            open,
            response: Some(response),
            at: offset,
            size,
            failures: 0,
        };
        let chunks = stream::unfold(Some(reading), |reading| async move {
            let mut reading = reading?;
            match reading.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reading))),
                Ok(None) => None,
                Err(error) => Some((Err(BuildError::from(error)), None)),
            }
        });
        Ok(chunks.boxed())
    }
}

/// Sends the request for an object from an offset to its end; the response is a success.
pub(super) type Open =
    Arc<dyn Fn(u64) -> BoxFuture<'static, Result<reqwest::Response, ObjectError>> + Send + Sync>;

struct Reading {
    http: Http,
    open: Open,
    response: Option<reqwest::Response>,
    at: u64,
    size: u64,
    failures: u32,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, ObjectError> {
        loop {
            let mut response = match self.response.take() {
                Some(response) => response,
                None => open_at(&self.open, self.at).await?,
            };
            match self.http.chunk(&mut response).await {
                Ok(Some(chunk)) => {
                    self.at = self
                        .at
                        .saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                    self.failures = 0;
                    self.response = Some(response);
                    return Ok(Some(chunk));
                }
                Ok(None) if self.at >= self.size => return Ok(None),
                // Too short, but that is for whoever knows the digest to say.
                Ok(None) if self.failures + 1 >= self.http.limits.attempts => return Ok(None),
                Ok(None) => {}
                Err(error) if self.failures + 1 >= self.http.limits.attempts => return Err(error),
                Err(_) => {}
            }
            tokio::time::sleep(self.http.limits.backoff.saturating_mul(1 << self.failures.min(8))).await;
            self.failures += 1;
        }
    }
}

/// Opens an object and makes sure that the response starts where it should.
async fn open_at(open: &Open, at: u64) -> Result<reqwest::Response, ObjectError> {
    let response = open(at).await?;
    if at == 0 {
        return Ok(response);
    }
    let range = response.headers().get(CONTENT_RANGE);
    let range = range.and_then(|range| range.to_str().ok()).unwrap_or_default();
    if response.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {at}-")) {
        return Ok(response);
    }
    Err(ObjectError::InvalidResponse {
        url: display_url(response.url()),
        reason: format!("asked for the bytes from {at} on, got {range:?}"),
    })
}

fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
    ) || status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
}

/// `Retry-After` in either of its forms.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = http_date::parse(text)?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// The name and the text of an error as S3 and Azure (XML) or GitHub (JSON) write it.
fn said(body: &str) -> (String, String) {
    let body = body.trim_start_matches('\u{feff}').trim();
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(body) {
        let text = |names: &[&str]| {
            let found = names.iter().find_map(|name| json.get(name)?.as_str());
            short(found.unwrap_or_default())
        };
        return (text(&["typeKey", "code"]), text(&["message", "msg"]));
    }
    (
        short(&element(body, "Code").unwrap_or_default()),
        short(&element(body, "Message").unwrap_or_default()),
    )
}

/// The text of the first XML element of a name.
pub(super) fn element(body: &str, name: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let text = text
        .replace("&quot;", "\"")
        .replace("&#34;", "\"")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&");
    Some(text)
}

fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(MAX_SAID).collect()
}

/// A URL for messages: without its query and user information, where signatures and secrets are.
pub(super) fn display_url(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Both fail only for URLs that cannot have user information.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

/// Percent-encodes all but the characters that never need it, and slashes if asked to leave them.
pub(super) fn encode(text: &str, keep_slashes: bool) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b'/' if keep_slashes => out.push('/'),
            other => {
                // Writing to a string does not fail.
                let _ = write!(out, "%{other:02X}");
            }
        }
    }
    out
}
