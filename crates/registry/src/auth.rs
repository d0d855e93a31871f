//! Answers challenges: which header a request to a repository carries, and the tokens behind it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::InvalidHeaderValue;
use http::{HeaderMap, HeaderValue, StatusCode};
use registryauth::token::{self, DEFAULT_EXPIRY_S};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::challenge::{self, Challenge, Scheme};
use crate::config::ClientOptions;
use crate::credentials::{BasicCredentials, Credentials, CredentialsError, Token, TokenRequest};
use crate::endpoint::{Endpoint, is_loopback};
use crate::error::RegistryError;
use crate::request::{display_url, read_bounded, send_bounded, status_error};
use crate::scope::Scopes;

/// Repositories remembered at most; beyond, all are forgotten and challenged again.
const MAX_REMEMBERED: usize = 1024;

/// What the credentials of one client view have earned so far, by host and repository.
#[derive(Debug)]
pub(crate) struct Auth {
    credentials: Arc<dyn Credentials>,
    options: Arc<ClientOptions>,
    answers: Mutex<BTreeMap<(String, String), Answer>>,
}

#[derive(Clone, Debug)]
enum Answer {
    Basic(HeaderValue),
    Bearer(Arc<Bearer>),
}

#[derive(Debug)]
struct Bearer {
    realm: String,
    service: String,
    /// Scopes the server asked for beyond those of the request.
    extra: Scopes,
    tokens: Mutex<BTreeMap<String, Arc<OnceCell<Issued>>>>,
}

#[derive(Debug)]
struct Issued {
    header: HeaderValue,
    expires: Instant,
}

/// What to do after a 401.
pub(crate) enum Verdict {
    /// Send the request again: there is something new to send.
    Retry,
    /// The server says that the account may not do this, and asking again would not change it.
    Denied(String),
    /// The server does not take the token that it asked for, for some other reason.
    Refused(String),
    /// The answer stands.
    Unhandled,
}

impl Auth {
    pub fn new(credentials: Arc<dyn Credentials>, options: Arc<ClientOptions>) -> Self {
        Self {
            credentials,
            options,
            answers: Mutex::default(),
        }
    }

    /// The `Authorization` header for a request, as far as the host has asked for one. Concurrent requests of the same
    /// scopes share one token request.
    pub async fn header(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        scopes: &Scopes,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let key = (endpoint.authority.clone(), repository.to_owned());
        let answer = self.lock().get(&key).cloned();
        let bearer = match answer {
            None => return Ok(None),
            Some(Answer::Basic(header)) => return Ok(Some(header)),
            Some(Answer::Bearer(bearer)) => bearer,
        };
        let mut wanted = scopes.clone();
        wanted.merge(&bearer.extra);
        let names = wanted.to_strings();
        let slot = bearer.slot(&names.join(" "));
        let issued = slot
            .get_or_try_init(|| self.issue(endpoint, &bearer, names))
            .await?;
        Ok(Some(issued.header.clone()))
    }

    /// Learns from a 401 to a request that was sent with `scopes`; `repeated` when the same request was already
    /// answered by one.
    pub async fn challenged(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        scopes: &Scopes,
        headers: &HeaderMap,
        repeated: bool,
    ) -> Result<Verdict, RegistryError> {
        let key = (endpoint.authority.clone(), repository.to_owned());
        for challenge in challenge::parse(headers) {
            match challenge.scheme {
                Scheme::Bearer => {
                    // Before anybody is asked for a token.
                    realm_url(endpoint, challenge.param("realm"))?;
                    return Ok(self.learn_bearer(key, scopes, &challenge, repeated));
                }
                Scheme::Basic if repeated => {}
                Scheme::Basic => {
                    if let Some(account) = self.account(&endpoint.authority).await?
                        && !account.username.is_empty()
                        && !account.secret.is_empty()
                    {
                        self.remember(key, Answer::Basic(basic_header(&account)?));
                        return Ok(Verdict::Retry);
                    }
                }
            }
        }
        Ok(Verdict::Unhandled)
    }

    fn learn_bearer(
        &self,
        key: (String, String),
        scopes: &Scopes,
        challenge: &Challenge,
        repeated: bool,
    ) -> Verdict {
        let mut asked = Scopes::default();
        asked.add(challenge.param("scope"));
        let known = match self.lock().get(&key) {
            Some(Answer::Bearer(bearer)) => bearer.extra.clone(),
            _ => Scopes::default(),
        };
        let mut sent = scopes.clone();
        sent.merge(&known);
        if repeated && sent.contains(&asked) {
            let error = challenge.param("error");
            let is_scope = error == "insufficient_scope";
            let error = if error.is_empty() { "unauthorized" } else { error };
            let reason = format!("server message: {error}: authorization failed");
            return if is_scope {
                Verdict::Denied(reason)
            } else {
                Verdict::Refused(reason)
            };
        }
        let mut extra = known;
        // Only what this request would not ask for itself: one challenge's scope must not follow into another's.
        if !scopes.contains(&asked) {
            extra.merge(&asked);
        }
        let bearer = Bearer {
            realm: challenge.param("realm").to_owned(),
            service: challenge.param("service").to_owned(),
            extra,
            tokens: Mutex::default(),
        };
        self.remember(key, Answer::Bearer(Arc::new(bearer)));
        Verdict::Retry
    }

    async fn issue(
        &self,
        endpoint: &Endpoint,
        bearer: &Bearer,
        scopes: Vec<String>,
    ) -> Result<Issued, RegistryError> {
        let request = TokenRequest {
            client_id: self.options.client_id.clone(),
            host: endpoint.authority.clone(),
            realm: bearer.realm.clone(),
            service: bearer.service.clone(),
            scopes,
        };
        let token = match self.credentials.fetch_token(&request).await {
            Ok(Some(token)) => token,
            Ok(None) | Err(CredentialsError::NoSession) => self.fetch_token(endpoint, &request).await?,
            Err(source @ CredentialsError::Refused { .. }) => {
                return Err(RegistryError::Credentials { source });
            }
        };
        let header = token::secret_header(&format!("Bearer {}", token.token)).map_err(unsendable)?;
        Ok(Issued {
            header,
            expires: expiry(&token),
        })
    }

    async fn account(&self, host: &str) -> Result<Option<BasicCredentials>, RegistryError> {
        match self.credentials.basic(host).await {
            Ok(account) => Ok(account.filter(|account| !account.secret.is_empty())),
            Err(CredentialsError::NoSession) => Ok(None),
            Err(source @ CredentialsError::Refused { .. }) => Err(RegistryError::Credentials { source }),
        }
    }

    /// Asks the token server from here: anonymously, by GET with the account, or by POST where GET is not supported.
    async fn fetch_token(&self, endpoint: &Endpoint, request: &TokenRequest) -> Result<Token, RegistryError> {
        let realm = realm_url(endpoint, &request.realm)?;
        let Some(account) = self.account(&endpoint.authority).await? else {
            return self
                .get_token(endpoint, realm, request, None)
                .await
                .map_err(|source| authorize("failed to fetch anonymous token", source));
        };
        if realm.scheme() != "https" && endpoint.scheme() == "https" && !realm_is_loopback(&realm) {
            let reason = format!("token server {realm} of an HTTPS registry does not use HTTPS");
            return Err(RegistryError::Authorize { reason, source: None });
        }
        let failed = |source| authorize("failed to fetch oauth token", source);
        if account.username.is_empty() {
            return self
                .post_token(endpoint, realm, request, &account)
                .await
                .map_err(failed);
        }
        match self
            .get_token(endpoint, realm.clone(), request, Some(&account))
            .await
        {
            Err(RegistryError::Status { status, .. })
                if [
                    StatusCode::METHOD_NOT_ALLOWED,
                    StatusCode::NOT_FOUND,
                    StatusCode::UNAUTHORIZED,
                ]
                .contains(&status) =>
            {
                self.post_token(endpoint, realm, request, &account)
                    .await
                    .map_err(failed)
            }
            result => result.map_err(failed),
        }
    }

    async fn get_token(
        &self,
        endpoint: &Endpoint,
        realm: reqwest::Url,
        request: &TokenRequest,
        account: Option<&BasicCredentials>,
    ) -> Result<Token, RegistryError> {
        let mut sent = endpoint.http.get(token_request(request).query(realm));
        if let Some(account) = account {
            sent = sent.header(http::header::AUTHORIZATION, basic_header(account)?);
        }
        self.token_response(sent, "GET").await
    }

    async fn post_token(
        &self,
        endpoint: &Endpoint,
        realm: reqwest::Url,
        request: &TokenRequest,
        account: &BasicCredentials,
    ) -> Result<Token, RegistryError> {
        let sent = endpoint
            .http
            .post(realm)
            .header(http::header::CONTENT_TYPE, token::FORM_TYPE)
            .body(token_request(request).form(token_account(account)));
        self.token_response(sent, "POST").await
    }

    /// Sends a token request, again after trouble, and reads the token.
    async fn token_response(
        &self,
        request: reqwest::RequestBuilder,
        method: &'static str,
    ) -> Result<Token, RegistryError> {
        let response = send_bounded(request, method, &self.options).await?;
        let url = display_url(response.url());
        if !response.status().is_success() {
            return Err(status_error(response, method, &self.options).await);
        }
        let body = read_bounded(response, token::MAX_ANSWER_BYTES as u64, method, &self.options).await?;
        let issued = token::read_answer(&body).map_err(|error| RegistryError::InvalidResponse {
            url,
            reason: error.to_string(),
        })?;
        Ok(Token {
            token: issued.token,
            expires_in_s: issued.expires_in_s,
            issued_at_s: 0,
        })
    }

    fn remember(&self, key: (String, String), answer: Answer) {
        let mut answers = self.lock();
        if answers.len() >= MAX_REMEMBERED {
            answers.clear();
        }
        answers.insert(key, answer);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, String), Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bearer {
    /// The place of a token that is valid or being fetched.
    fn slot(&self, scopes: &str) -> Arc<OnceCell<Issued>> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        tokens.retain(|_, slot| slot.get().is_none_or(|issued| issued.expires > now));
        Arc::clone(tokens.entry(scopes.to_owned()).or_default())
    }
}

fn authorize(what: &str, source: RegistryError) -> RegistryError {
    RegistryError::Authorize {
        reason: format!("{what}: {source}"),
        source: Some(Box::new(source)),
    }
}

fn realm_url(endpoint: &Endpoint, realm: &str) -> Result<reqwest::Url, RegistryError> {
    let invalid = |reason: String| RegistryError::InvalidResponse {
        url: endpoint.authority.clone(),
        reason,
    };
    if realm.is_empty() {
        return Err(invalid("no realm specified for token auth challenge".to_owned()));
    }
    let url = reqwest::Url::parse(realm)
        .map_err(|error| invalid(format!("invalid token auth challenge realm: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(invalid(format!(
            "invalid token auth challenge realm: scheme {}",
            url.scheme()
        )));
    }
    Ok(url)
}

fn realm_is_loopback(realm: &reqwest::Url) -> bool {
    realm.host_str().is_some_and(is_loopback)
}

fn token_request(request: &TokenRequest) -> token::Request<'_> {
    token::Request {
        client_id: &request.client_id,
        service: &request.service,
        scopes: &request.scopes,
    }
}

fn token_account(account: &BasicCredentials) -> token::Account<'_> {
    token::Account {
        username: &account.username,
        secret: &account.secret,
    }
}

fn basic_header(account: &BasicCredentials) -> Result<HeaderValue, RegistryError> {
    token_account(account).basic().map_err(unsendable)
}

fn unsendable(_: InvalidHeaderValue) -> RegistryError {
    RegistryError::Authorize {
        reason: "credentials contain characters that cannot be sent".to_owned(),
        source: None,
    }
}

/// When to ask for the next token: after nine tenths of its validity.
fn expiry(token: &Token) -> Instant {
    let valid_s = if token.expires_in_s > 0 {
        token.expires_in_s
    } else {
        DEFAULT_EXPIRY_S
    };
    let valid = Duration::from_secs(valid_s.unsigned_abs().min(24 * 3600)).mul_f64(0.9);
    let age = u64::try_from(token.issued_at_s)
        .ok()
        .filter(|issued| *issued > 0)
        .and_then(|issued| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH + Duration::from_secs(issued))
                .ok()
        })
        .unwrap_or_default();
    Instant::now() + valid.saturating_sub(age)
}
