//! The client: resolving names, fetching documents.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use oci::{Descriptor, Digest, Reference, media_type};

use crate::auth::Auth;
use crate::config::{ClientOptions, HostConfig, HostsConfig};
use crate::credentials::{Anonymous, Credentials};
use crate::endpoint::{Direction, Endpoint, Endpoints};
use crate::error::RegistryError;
use crate::request::{Call, Method, Repository, display_url, read_bounded, status_error};
use crate::scope::Scopes;

/// Speaks to registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) options: Arc<ClientOptions>,
}

impl Client {
    /// Makes an anonymous client with default limits. Certificates named in `config` are read at first use.
    pub fn new(config: HostsConfig) -> Self {
        Self::with_options(config, ClientOptions::default())
    }

    /// Makes an anonymous client.
    pub fn with_options(config: HostsConfig, options: ClientOptions) -> Self {
        let options = Arc::new(options);
        Self {
            endpoints: Arc::new(Endpoints::new(config, Arc::clone(&options))),
            auth: Arc::new(Auth::new(Arc::new(Anonymous), Arc::clone(&options))),
            options,
        }
    }

    /// Returns a view that asks `credentials` and keeps its own tokens; connections stay shared. Make one per build.
    #[must_use]
    pub fn with_credentials(&self, credentials: Arc<dyn Credentials>) -> Self {
        Self {
            auth: Arc::new(Auth::new(credentials, Arc::clone(&self.options))),
            ..self.clone()
        }
    }

    /// Returns a view that reaches `domain` without verifying certificates, and by plain HTTP where HTTPS fails
    /// (`registry.insecure=true`).
    #[must_use]
    pub fn with_insecure(&self, domain: &str) -> Self {
        let host = HostConfig {
            insecure: Some(true),
            plain_http: Some(true),
            ..HostConfig::default()
        };
        Self {
            endpoints: Arc::new(self.endpoints.with_host(domain, host)),
            ..self.clone()
        }
    }

    /// Returns how many blobs may be fetched from a domain at once for now.
    pub fn allowed_fetches(&self, domain: &str) -> usize {
        self.endpoints.allowed(domain, Direction::Pull)
    }

    /// Returns how many blobs may be pushed to a domain at once for now.
    pub fn allowed_pushes(&self, domain: &str) -> usize {
        self.endpoints.allowed(domain, Direction::Push)
    }

    /// Resolves a reference to the descriptor of its manifest or index, by HEAD where the registry allows.
    ///
    /// The digest of a reference that has one is kept; otherwise the registry (or a mirror) is believed, and whoever
    /// fetches by the returned digest gets those bytes or an error. Mirrors are asked in order, the registry last.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] when no host has it, [`RegistryError::AccessDenied`] when it takes credentials.
    pub async fn resolve(&self, reference: &Reference) -> Result<Descriptor, RegistryError> {
        let (object, digest) = match (reference.tag(), reference.digest()) {
            (_, Some(digest)) => (digest.to_string(), Some(*digest)),
            (Some(tag), None) => (tag.to_owned(), None),
            (None, None) => {
                return Err(RegistryError::ObjectRequired {
                    reference: reference.to_string(),
                });
            }
        };
        let endpoints = self.endpoints.of(reference.domain())?;
        let repository = self.repository(reference, false);
        let mut first = FirstError::default();
        let mut paths = vec![format!("manifests/{object}")];
        // Some registries serve what they do not take for a manifest as a blob only.
        paths.extend(digest.map(|digest| format!("blobs/{digest}")));
        for path in paths {
            if first.is_final() {
                break;
            }
            for (at, endpoint) in endpoints.iter().enumerate() {
                let last = at + 1 == endpoints.len();
                match self
                    .resolve_at(&repository, endpoint, &path, digest, reference, last)
                    .await
                {
                    Ok(descriptor) => return Ok(descriptor),
                    Err(error) => first.note(error),
                }
            }
        }
        Err(first.error.unwrap_or_else(|| RegistryError::NotFound {
            what: reference.to_string(),
        }))
    }

    async fn resolve_at(
        &self,
        repository: &Repository<'_>,
        endpoint: &Endpoint,
        path: &str,
        digest: Option<Digest>,
        reference: &Reference,
        last: bool,
    ) -> Result<Descriptor, RegistryError> {
        let head = Call::new(Method::Head, path).header(ACCEPT, &accept_manifests());
        let response = repository.send(endpoint, &head, last).await?;
        if response.status() == StatusCode::FORBIDDEN {
            // An answer to HEAD has no body: ask again for the reason.
            let get = Call {
                method: Method::Get,
                ..head
            };
            let response = repository.send(endpoint, &get, false).await?;
            return Err(status_error(response, "HEAD", &self.options).await);
        }
        if !response.status().is_success() {
            return Err(repository.failed(response, &head, &reference.to_string()).await);
        }
        let media_type = content_type(&response);
        let size = content_length(&response);
        let named = match header_digest(&response)? {
            Some(named) => digest.or(Some(named)),
            None => digest,
        };
        if let (Some(digest), Some(size)) = (named, size) {
            return self.described(media_type, digest, size, reference);
        }
        let get = Call {
            method: Method::Get,
            ..head
        };
        let response = repository.send(endpoint, &get, true).await?;
        if !response.status().is_success() {
            return Err(repository.failed(response, &get, &reference.to_string()).await);
        }
        let media_type = content_type(&response);
        let body = read_bounded(response, self.options.max_manifest_bytes, "GET", &self.options).await?;
        let digest = match digest {
            Some(expected) => verify(&body, expected, &reference.to_string())?,
            None => Digest::sha256(&body),
        };
        self.described(
            media_type,
            digest,
            u64::try_from(body.len()).unwrap_or(u64::MAX),
            reference,
        )
    }

    fn described(
        &self,
        media_type: String,
        digest: Digest,
        size: u64,
        reference: &Reference,
    ) -> Result<Descriptor, RegistryError> {
        let limit = self.options.max_manifest_bytes;
        if size > limit {
            return Err(RegistryError::TooLarge {
                what: reference.to_string(),
                size_bytes: size,
                limit_bytes: limit,
            });
        }
        Ok(Descriptor::new(media_type, digest, size))
    }

    /// Fetches a manifest or index by digest; bounded and verified. Blobs of other types are fetched as blobs.
    ///
    /// # Errors
    /// [`RegistryError::TooLarge`] beyond the limit, [`RegistryError::DigestMismatch`] for other bytes.
    pub async fn manifest(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
    ) -> Result<Bytes, RegistryError> {
        let what = format!("{}@{}", reference.name(), descriptor.digest);
        let limit = self.options.max_manifest_bytes;
        if descriptor.size > limit {
            return Err(RegistryError::TooLarge {
                what,
                size_bytes: descriptor.size,
                limit_bytes: limit,
            });
        }
        let endpoints = self.endpoints.of(reference.domain())?;
        let repository = self.repository(reference, false);
        let accept = if descriptor.media_type.is_empty() {
            accept_manifests()
        } else {
            format!("{}, */*", descriptor.media_type)
        };
        let mut first = FirstError::default();
        for kind in ["manifests", "blobs"] {
            for (at, endpoint) in endpoints.iter().enumerate() {
                let last = at + 1 == endpoints.len();
                let path = format!("{kind}/{}", descriptor.digest);
                let call = Call::new(Method::Get, path).header(ACCEPT, &accept);
                match self
                    .document_at(&repository, endpoint, &call, descriptor.digest, &what, last)
                    .await
                {
                    Ok(body) => return Ok(body),
                    Err(error) => first.note(error),
                }
            }
            if first.is_final() {
                break;
            }
        }
        Err(first.error.unwrap_or(RegistryError::NotFound { what }))
    }

    async fn document_at(
        &self,
        repository: &Repository<'_>,
        endpoint: &Endpoint,
        call: &Call,
        digest: Digest,
        what: &str,
        last: bool,
    ) -> Result<Bytes, RegistryError> {
        let response = repository.send(endpoint, call, last).await?;
        if !response.status().is_success() {
            return Err(repository.failed(response, call, what).await);
        }
        let body = read_bounded(response, self.options.max_manifest_bytes, "GET", &self.options).await?;
        verify(&body, digest, what)?;
        Ok(body)
    }

    /// Finds the size of a blob of the reference's repository.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] when no host has it, [`RegistryError::InvalidResponse`] when none tells the size.
    pub async fn stat_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<Descriptor, RegistryError> {
        let endpoints = self.endpoints.of(reference.domain())?;
        let repository = self.repository(reference, false);
        let what = format!("{}@{digest}", reference.name());
        let head = Call::new(Method::Head, format!("blobs/{digest}")).header(ACCEPT, "*/*");
        let mut first = FirstError::default();
        for (at, endpoint) in endpoints.iter().enumerate() {
            let last = at + 1 == endpoints.len();
            match repository.send(endpoint, &head, last).await {
                Ok(response) if response.status().is_success() => match content_length(&response) {
                    Some(size) => return Ok(Descriptor::new("", *digest, size)),
                    None => first.note(RegistryError::InvalidResponse {
                        url: display_url(response.url()),
                        reason: "no size".to_owned(),
                    }),
                },
                Ok(response) => first.note(repository.failed(response, &head, &what).await),
                Err(error) => first.note(error),
            }
        }
        Err(first.error.unwrap_or(RegistryError::NotFound { what }))
    }

    pub(crate) fn repository<'a>(&'a self, reference: &'a Reference, push: bool) -> Repository<'a> {
        Repository {
            auth: &self.auth,
            options: &self.options,
            path: reference.path(),
            scopes: Scopes::repository(reference.path(), push),
            push,
            slot: None,
        }
    }
}

/// Keeps the most telling of several hosts' errors: the one that came furthest, of equal ones the first.
#[derive(Default)]
pub(crate) struct FirstError {
    pub error: Option<RegistryError>,
    rank: u8,
}

impl FirstError {
    pub fn note(&mut self, error: RegistryError) {
        let rank = match &error {
            RegistryError::NotFound { .. } => 2,
            RegistryError::Status { .. } => 3,
            RegistryError::TooLarge { .. }
            | RegistryError::DigestMismatch { .. }
            | RegistryError::SizeMismatch { .. }
            | RegistryError::InvalidResponse { .. } => 4,
            _ => 1,
        };
        if rank > self.rank {
            self.rank = rank;
            self.error = Some(error);
        }
    }

    /// Whether some host said more than that it does not have it.
    pub fn is_final(&self) -> bool {
        self.rank > 2 || self.rank == 1
    }
}

pub(crate) fn verify(body: &Bytes, expected: Digest, what: &str) -> Result<Digest, RegistryError> {
    let actual = Digest::of(expected.algorithm(), body);
    if actual == expected {
        return Ok(actual);
    }
    Err(mismatch(what, expected, actual))
}

pub(crate) fn mismatch(what: &str, expected: Digest, actual: Digest) -> RegistryError {
    RegistryError::DigestMismatch {
        what: what.to_owned(),
        expected: Box::new(expected),
        actual: Box::new(actual),
    }
}

fn accept_manifests() -> String {
    [
        media_type::DOCKER_MANIFEST,
        media_type::DOCKER_MANIFEST_LIST,
        media_type::OCI_MANIFEST,
        media_type::OCI_INDEX,
        "*/*",
    ]
    .join(", ")
}

/// The media type a response announces, without parameters.
fn content_type(response: &reqwest::Response) -> String {
    let value = response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    value.split(';').next().unwrap_or("").trim().to_owned()
}

/// The size a response announces: of HEAD the header counts, there is no body.
fn content_length(response: &reqwest::Response) -> Option<u64> {
    response
        .headers()
        .get(CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The digest a response announces.
pub(crate) fn header_digest(response: &reqwest::Response) -> Result<Option<Digest>, RegistryError> {
    let Some(value) = response.headers().get("docker-content-digest") else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(value.as_bytes());
    match text.parse() {
        Ok(digest) => Ok(Some(digest)),
        Err(error) => Err(RegistryError::InvalidResponse {
            url: display_url(response.url()),
            reason: format!("{text:?} in header not a valid digest: {error}"),
        }),
    }
}
