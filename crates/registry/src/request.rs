//! Sends one request as often as it takes: authentication, backoff, `Retry-After`, the next host.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;

use crate::auth::{Auth, Verdict};
use crate::config::ClientOptions;
use crate::endpoint::Endpoint;
use crate::error::{RegistryError, ServerMessage};
use crate::pace::Slot;
use crate::scope::Scopes;

/// Error bodies are read up to this size.
const MAX_ERROR_BYTES: u64 = 64_000;

/// Request methods in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Head,
    Get,
    Post,
    Put,
    Patch,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Head => "HEAD",
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }

    pub fn http(self) -> reqwest::Method {
        match self {
            Self::Head => reqwest::Method::HEAD,
            Self::Get => reqwest::Method::GET,
            Self::Post => reqwest::Method::POST,
            Self::Put => reqwest::Method::PUT,
            Self::Patch => reqwest::Method::PATCH,
        }
    }
}

/// A request to a repository, relative to an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub method: Method,
    /// Below the repository, e.g. `manifests/latest`.
    pub path: String,
    pub query: Vec<(&'static str, String)>,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Call {
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            query: Vec::new(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    pub fn header(mut self, name: http::HeaderName, value: &str) -> Self {
        // A value that cannot be sent comes from a media type of the caller: without it the server decides.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub fn query(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.query.push((key, value.into()));
        self
    }

    pub fn body(mut self, body: Bytes) -> Self {
        self.body = body;
        self
    }
}

/// A repository as one operation sees it.
pub(crate) struct Repository<'a> {
    pub auth: &'a Auth,
    pub options: &'a ClientOptions,
    /// Path below the domain, e.g. `library/busybox`.
    pub path: &'a str,
    pub scopes: Scopes,
    /// For errors.
    pub push: bool,
    /// The transfer that the requests belong to, if it is one.
    pub slot: Option<&'a Slot>,
}

impl<'a> Repository<'a> {
    /// The same for the requests of a transfer.
    pub fn within(self, slot: &'a Slot) -> Self {
        Self {
            slot: Some(slot),
            ..self
        }
    }

    /// Learns from an answer whether the registry is asked for too much.
    pub fn note(&self, response: &reqwest::Response) {
        if let Some(slot) = self.slot.filter(|_| is_too_much(response)) {
            slot.throttled();
        }
    }

    /// The URL of a call.
    pub fn url(&self, endpoint: &Endpoint, call: &Call) -> Result<reqwest::Url, RegistryError> {
        let base = format!(
            "{}://{}{}/{}",
            endpoint.scheme(),
            endpoint.authority,
            endpoint.path,
            self.path
        );
        let full = if call.path.is_empty() {
            base
        } else {
            format!("{base}/{}", call.path)
        };
        let mut url = reqwest::Url::parse(&full).map_err(|error| RegistryError::InvalidResponse {
            url: full.clone(),
            reason: format!("not a URL: {error}"),
        })?;
        if endpoint.namespace.is_some() || !call.query.is_empty() {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(&call.query);
            if let Some(namespace) = &endpoint.namespace {
                query.append_pair("ns", namespace);
            }
        }
        Ok(url)
    }

    /// Sends a call until it has an answer worth interpreting: any status but those that retrying or authenticating
    /// can change. `last` says that no other host can answer instead.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        last: bool,
    ) -> Result<reqwest::Response, RegistryError> {
        let mut call = call.clone();
        let mut challenged = false;
        let mut backoff = Backoff::new(self.options);
        loop {
            let authorization = self.auth.header(endpoint, self.path, &self.scopes).await?;
            let url = self.url(endpoint, &call)?;
            let scheme = url.scheme().to_owned();
            let mut request = endpoint
                .http
                .request(call.method.http(), url)
                .headers(call.headers.clone());
            if let Some(value) = authorization {
                request = request.header(http::header::AUTHORIZATION, value);
            }
            if !call.body.is_empty() {
                request = request.body(call.body.clone());
            }
            match send_once(request, call.method.name(), self.options.idle_timeout).await {
                Err(error) => {
                    if cannot_connect(&error) && endpoint.switch_from(&scheme) {
                        continue;
                    }
                    if !(last && error.is_transient() && backoff.wait(None).await) {
                        return Err(error);
                    }
                }
                Ok(response) => match response.status() {
                    StatusCode::UNAUTHORIZED => {
                        let headers = response.headers();
                        let verdict = self
                            .auth
                            .challenged(endpoint, self.path, &self.scopes, headers, challenged)
                            .await?;
                        match verdict {
                            Verdict::Retry if backoff.again() => challenged = true,
                            Verdict::Denied(reason) => return Err(self.denied(reason)),
                            Verdict::Refused(reason) if self.push => return Err(self.denied(reason)),
                            Verdict::Retry | Verdict::Refused(_) | Verdict::Unhandled => return Ok(response),
                        }
                    }
                    StatusCode::METHOD_NOT_ALLOWED
                        if call.method == Method::Head && call.path.starts_with("manifests/") =>
                    {
                        call.method = Method::Get;
                    }
                    status if should_retry(status, last) => {
                        self.note(&response);
                        if !backoff.wait(retry_after(response.headers())).await {
                            return Ok(response);
                        }
                    }
                    _ => return Ok(response),
                },
            }
        }
    }

    /// The error that the server refuses this repository.
    pub fn denied(&self, reason: String) -> RegistryError {
        RegistryError::AccessDenied {
            action: if self.push { "push" } else { "pull" },
            reason,
        }
    }

    /// Turns a response that is no success into an error.
    pub async fn failed(&self, response: reqwest::Response, call: &Call, what: &str) -> RegistryError {
        if response.status() == StatusCode::NOT_FOUND {
            return RegistryError::NotFound {
                what: what.to_owned(),
            };
        }
        status_error(response, call.method.name(), self.options).await
    }
}

/// Counts attempts and waits between them.
pub(crate) struct Backoff {
    left: u32,
    next: Duration,
    max: Duration,
}

impl Backoff {
    pub fn new(options: &ClientOptions) -> Self {
        Self {
            left: options.max_attempts.saturating_sub(1),
            next: options.backoff,
            max: options.max_backoff,
        }
    }

    /// Takes one attempt without waiting; false if none is left.
    pub fn again(&mut self) -> bool {
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }

    /// Waits before another attempt, at least as long as the server asked; false if there is none or the server asks
    /// for too long.
    pub async fn wait(&mut self, asked: Option<Duration>) -> bool {
        let wait = self.next.min(self.max).max(asked.unwrap_or_default());
        if wait > self.max || !self.again() {
            return false;
        }
        self.next = self.next.saturating_mul(2);
        tokio::time::sleep(wait).await;
        true
    }
}

fn should_retry(status: StatusCode, last: bool) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
    ) || last && status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
}

/// Whether a server sends requests away because there are too many.
fn is_too_much(response: &reqwest::Response) -> bool {
    match response.status() {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => true,
        status => status.is_server_error() && response.headers().contains_key(http::header::RETRY_AFTER),
    }
}

/// Seconds of a `Retry-After` header; a date is not worth a parser: the backoff applies.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers
        .get(http::header::RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}

/// Whether no connection came to be, as with a server that does not speak TLS on this port.
fn cannot_connect(error: &RegistryError) -> bool {
    matches!(error, RegistryError::Transport { source, .. } if source.is_connect())
}

/// Sends a request with small bodies once.
pub(crate) async fn send_once(
    request: reqwest::RequestBuilder,
    method: &'static str,
    limit: Duration,
) -> Result<reqwest::Response, RegistryError> {
    let (client, request) = request.build_split();
    let request = request.map_err(|source| RegistryError::Transport {
        method,
        url: String::new(),
        source,
    })?;
    let url = display_url(request.url());
    match tokio::time::timeout(limit, client.execute(request)).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(source)) => Err(RegistryError::Transport {
            method,
            url,
            source: source.without_url(),
        }),
        Err(_) => Err(RegistryError::Timeout {
            method,
            url,
            seconds: limit.as_secs(),
        }),
    }
}

/// Sends a request that needs no authentication, again after trouble.
pub(crate) async fn send_bounded(
    request: reqwest::RequestBuilder,
    method: &'static str,
    options: &ClientOptions,
) -> Result<reqwest::Response, RegistryError> {
    let mut backoff = Backoff::new(options);
    loop {
        let copy = request.try_clone().expect("the body is in memory");
        match send_once(copy, method, options.idle_timeout).await {
            Err(error) if error.is_transient() && backoff.wait(None).await => {}
            Ok(response)
                if should_retry(response.status(), true)
                    && backoff.wait(retry_after(response.headers())).await => {}
            result => return result,
        }
    }
}

/// Reads a whole body of at most `limit` bytes.
pub(crate) async fn read_bounded(
    mut response: reqwest::Response,
    limit: u64,
    method: &'static str,
    options: &ClientOptions,
) -> Result<Bytes, RegistryError> {
    let url = display_url(response.url());
    let too_large = |size_bytes| RegistryError::TooLarge {
        what: url.clone(),
        size_bytes,
        limit_bytes: limit,
    };
    if let Some(size) = response.content_length().filter(|size| *size > limit) {
        return Err(too_large(size));
    }
    let mut body = BytesMut::new();
    while let Some(chunk) = next_chunk(&mut response, method, options).await? {
        let size = body.len().saturating_add(chunk.len());
        if u64::try_from(size).is_ok_and(|size| size > limit) {
            return Err(too_large(u64::try_from(size).unwrap_or(u64::MAX)));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// The next bytes of a body, within the idle limit.
pub(crate) async fn next_chunk(
    response: &mut reqwest::Response,
    method: &'static str,
    options: &ClientOptions,
) -> Result<Option<Bytes>, RegistryError> {
    match tokio::time::timeout(options.idle_timeout, response.chunk()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(source)) => {
            let url = display_url(response.url());
            Err(RegistryError::Transport {
                method,
                url,
                source: source.without_url(),
            })
        }
        Err(_) => Err(RegistryError::Timeout {
            method,
            url: display_url(response.url()),
            seconds: options.idle_timeout.as_secs(),
        }),
    }
}

/// Turns a response into the error of its status, with what the body says.
pub(crate) async fn status_error(
    response: reqwest::Response,
    method: &'static str,
    options: &ClientOptions,
) -> RegistryError {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let (url, status) = (display_url(response.url()), response.status());
    let retry_after = retry_after(response.headers());
    let messages = match read_bounded(response, MAX_ERROR_BYTES, method, options).await {
        Ok(body) => serde_json::from_slice::<Envelope>(&body).map_or_else(
            |_| Vec::new(),
            |envelope| {
                let entries = envelope.errors.into_iter().take(16);
                entries
                    .map(|entry| ServerMessage {
                        code: entry.code,
                        message: entry.message,
                    })
                    .collect()
            },
        ),
        Err(_) => Vec::new(),
    };
    RegistryError::Status {
        method,
        url,
        status,
        messages,
        retry_after,
    }
}

/// A URL for messages: without query and user information, which may carry signatures and secrets.
pub(crate) fn display_url(url: &reqwest::Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Both fail only for URLs that cannot have user information.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}
