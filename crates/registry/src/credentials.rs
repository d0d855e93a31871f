//! The port through which accounts and tokens are asked for.

use std::fmt;

use async_trait::async_trait;

/// A registry account.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct BasicCredentials {
    /// User name; empty with a non-empty secret: the secret is an identity (refresh) token.
    pub username: String,
    /// Password or token.
    pub secret: String,
}

impl fmt::Debug for BasicCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BasicCredentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What a registry's token server is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRequest {
    /// Name of this client at the token server.
    pub client_id: String,
    /// Registry host with port, e.g. `registry-1.docker.io`.
    pub host: String,
    /// The token server's URL.
    pub realm: String,
    /// The registry's service name.
    pub service: String,
    /// Scopes such as `repository:library/busybox:pull`, sorted.
    pub scopes: Vec<String>,
}

/// A bearer token.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Token {
    /// The token itself.
    pub token: String,
    /// Seconds it is valid from its issue; 0 or less: 60.
    pub expires_in_s: i64,
    /// Seconds since the epoch at which it was issued; 0: now.
    pub issued_at_s: i64,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("expires_in_s", &self.expires_in_s)
            .finish_non_exhaustive()
    }
}

/// Why credentials could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialsError {
    /// Nobody is there to ask; the client goes on anonymously.
    #[error("no active sessions")]
    NoSession,
    /// The holder of the credentials refused or failed; the text is its own and goes to the user.
    #[error("{message}")]
    Refused {
        /// The holder's message.
        message: String,
    },
}

/// Gives credentials for registry hosts. Implemented over a client's session by `daemon`, by files elsewhere.
///
/// Both calls may be cancelled by dropping their future.
#[async_trait]
pub trait Credentials: Send + Sync + fmt::Debug {
    /// Returns the account for a host, `None` if there is none.
    ///
    /// # Errors
    /// [`CredentialsError::NoSession`] counts as no account.
    async fn basic(&self, host: &str) -> Result<Option<BasicCredentials>, CredentialsError>;

    /// Fetches a token where the credentials live, so that a password never leaves its owner; `None` if the owner
    /// cannot (it is then fetched from here with [`Credentials::basic`]).
    ///
    /// # Errors
    /// [`CredentialsError::NoSession`] counts as `None`.
    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialsError>;
}

/// No credentials at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

#[async_trait]
impl Credentials for Anonymous {
    async fn basic(&self, _host: &str) -> Result<Option<BasicCredentials>, CredentialsError> {
        Ok(None)
    }

    async fn fetch_token(&self, _request: &TokenRequest) -> Result<Option<Token>, CredentialsError> {
        Ok(None)
    }
}
