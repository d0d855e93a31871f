//! Registry credentials of a build's clients.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::OnceLock;

use async_trait::async_trait;
use build::session::{self, SessionError, SessionGroup};
use registry::{BasicCredentials, Credentials, CredentialsError, Token, TokenRequest};

/// Asks the sessions of a group.
#[derive(Debug)]
pub struct SessionCredentials {
    sessions: SessionGroup,
}

impl SessionCredentials {
    /// Asks these sessions in turn.
    pub fn new(sessions: SessionGroup) -> Self {
        Self { sessions }
    }
}

#[async_trait]
impl Credentials for SessionCredentials {
    async fn basic(&self, host: &str) -> Result<Option<BasicCredentials>, CredentialsError> {
        let found = self
            .sessions
            .any(|session| async move { session.credentials(host).await })
            .await;
        match found {
            Ok(account) if account.username.is_empty() && account.secret.is_empty() => Ok(None),
            Ok(account) => Ok(Some(BasicCredentials {
                username: account.username,
                secret: account.secret,
            })),
            Err(error) => none_or(error),
        }
    }

    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialsError> {
        let host = request.host.as_str();
        // A client that answers this can fetch tokens itself; the key it would sign with is of no use here, as a token
        // is never shared between groups of sessions.
        let authority = self
            .sessions
            .any(|session| async move { session.token_authority(host, salt()).await })
            .await;
        match authority {
            Ok(key) if !key.is_empty() => {}
            Ok(_) => return Ok(None),
            Err(SessionError::Lost { .. }) => return Ok(None),
            Err(error) => return none_or(error),
        }
        let request = session::TokenRequest {
            client_id: request.client_id.clone(),
            host: request.host.clone(),
            realm: request.realm.clone(),
            service: request.service.clone(),
            scopes: request.scopes.clone(),
        };
        let fetched = self
            .sessions
            .any(|session| {
                let request = request.clone();
                async move { session.fetch_token(request).await }
            })
            .await;
        match fetched {
            Ok(token) => Ok(Some(Token {
                token: token.token,
                expires_in_s: token.expires_in_s,
                issued_at_s: token.issued_at_s,
            })),
            Err(error) => none_or(error),
        }
    }
}

/// Nobody to ask, or nobody who answers such questions, is no credentials; anything else is a failure.
fn none_or<T>(error: SessionError) -> Result<Option<T>, CredentialsError> {
    match error {
        SessionError::NoSession { .. } => Err(CredentialsError::NoSession),
        SessionError::Unsupported { .. } | SessionError::NotFound { .. } => Ok(None),
        SessionError::Refused { .. } | SessionError::Lost { .. } => Err(CredentialsError::Refused {
            message: error.to_string(),
        }),
    }
}

/// Differs with every start of the process, so that the keys derived from it are not reusable.
fn salt() -> &'static [u8] {
    static SALT: OnceLock<Vec<u8>> = OnceLock::new();
    SALT.get_or_init(|| {
        (0..4_u8)
            .flat_map(|part| RandomState::new().hash_one(part).to_le_bytes())
            .collect()
    })
}
