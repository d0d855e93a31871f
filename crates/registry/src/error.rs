//! What can go wrong with a registry. The texts are those the ecosystem knows.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::StatusCode;
use oci::Digest;

use crate::credentials::CredentialsError;

/// Why a client could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A certificate or key file could not be read.
    #[error("failed to read {path}")]
    ReadPem {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A directory of certificates could not be listed.
    #[error("failed to read {path}")]
    ReadDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Certificates or keys are unusable.
    #[error("failed to load TLS settings for {host}")]
    Tls {
        /// The registry host.
        host: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The HTTP client could not be made.
    #[error("failed to set up HTTP for {host}")]
    Http {
        /// The registry host.
        host: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
}

/// One entry of a registry's error body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerMessage {
    /// The code, e.g. `DENIED`.
    pub code: String,
    /// The server's text.
    pub message: String,
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}",
            self.code.to_lowercase().replace('_', " "),
            self.message
        )
    }
}

struct Messages<'a>(&'a [ServerMessage]);

impl fmt::Display for Messages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => Ok(()),
            [one] => write!(f, ": {one}"),
            many => {
                f.write_str(": errors:")?;
                many.iter().try_for_each(|m| write!(f, "\n{m}"))
            }
        }
    }
}

/// Why a registry operation failed. URLs are without queries and user information.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name or blob does not exist there.
    #[error("{what}: not found")]
    NotFound {
        /// The reference or digest asked for.
        what: String,
    },
    /// The registry refused the credentials, or there are none.
    #[error("{action} access denied, repository does not exist or may require authorization: {reason}")]
    AccessDenied {
        /// `pull` or `push`.
        action: &'static str,
        /// What the server said.
        reason: String,
    },
    /// No token could be had.
    #[error("failed to authorize: {reason}")]
    Authorize {
        /// What failed, in words.
        reason: String,
        /// The failed request to the token server, if that was it.
        #[source]
        source: Option<Box<RegistryError>>,
    },
    /// The holder of the credentials failed.
    #[error("failed to authorize: {source}")]
    Credentials {
        /// Why.
        #[source]
        source: CredentialsError,
    },
    /// The server answered with a status nobody asked for.
    #[error("unexpected status from {method} request to {url}: {status}{}", Messages(.messages))]
    Status {
        /// The request's method.
        method: &'static str,
        /// The request's URL.
        url: String,
        /// The answer.
        status: StatusCode,
        /// What the body said.
        messages: Vec<ServerMessage>,
        /// How long the server asked to be left alone.
        retry_after: Option<Duration>,
    },
    /// The connection failed.
    #[error("failed to do request: {method} {url:?}: {}", RootCause(.source))]
    Transport {
        /// The request's method.
        method: &'static str,
        /// The request's URL.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The server was silent for too long.
    #[error("failed to do request: {method} {url:?}: no answer within {seconds} s")]
    Timeout {
        /// The request's method.
        method: &'static str,
        /// The request's URL.
        url: String,
        /// The limit.
        seconds: u64,
    },
    /// A manifest or other document is larger than accepted.
    #[error("rejecting {size_bytes} byte manifest for {what}: limit is {limit_bytes}")]
    TooLarge {
        /// The reference or digest.
        what: String,
        /// Announced or received size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The bytes are not those of the digest.
    #[error("unexpected digest of {what}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was fetched.
        what: String,
        /// Asked for.
        expected: Box<Digest>,
        /// Received.
        actual: Box<Digest>,
    },
    /// More or fewer bytes than announced.
    #[error("unexpected size of {what}: expected {expected_bytes}, got {actual_bytes}")]
    SizeMismatch {
        /// What was fetched.
        what: String,
        /// Announced.
        expected_bytes: u64,
        /// Received.
        actual_bytes: u64,
    },
    /// The server broke the protocol.
    #[error("invalid response from {url}: {reason}")]
    InvalidResponse {
        /// The request's URL.
        url: String,
        /// How.
        reason: String,
    },
    /// The bytes to push could not be read.
    #[error("failed to read {digest} for pushing")]
    ReadSource {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The registry's host is configured wrongly.
    #[error("invalid configuration of registry {host}")]
    Config {
        /// The host.
        host: String,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// A reference lacks the tag or digest the operation needs.
    #[error("object required in {reference}")]
    ObjectRequired {
        /// The reference.
        reference: String,
    },
}

impl RegistryError {
    /// Whether the thing asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
            || matches!(self, Self::Status { status, .. } if *status == StatusCode::NOT_FOUND)
    }

    /// Whether something is there that is not what was asked for.
    pub fn is_other_content(&self) -> bool {
        matches!(self, Self::DigestMismatch { .. } | Self::SizeMismatch { .. })
    }

    /// Whether credentials are missing or insufficient.
    pub fn is_denied(&self) -> bool {
        matches!(
            self,
            Self::AccessDenied { .. } | Self::Authorize { .. } | Self::Credentials { .. }
        ) || matches!(self, Self::Status { status, .. }
                if *status == StatusCode::UNAUTHORIZED || *status == StatusCode::FORBIDDEN)
    }

    /// How long the server asked to be left alone before another attempt.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether the same request may succeed a little later: connection trouble, 408, 429, 5xx.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport { source, .. } => {
                !source.is_builder() && !source.is_redirect() && !crate::is_unknown_host(source)
            }
            Self::Timeout { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() && *status != StatusCode::NOT_IMPLEMENTED
                    || *status == StatusCode::REQUEST_TIMEOUT
                    || *status == StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }
}

/// Prints the innermost error of a chain: reqwest's own text repeats the URL with its query.
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
