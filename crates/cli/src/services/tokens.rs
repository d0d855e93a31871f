//! Fetching tokens of registries, so that passwords stay with this client.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::pb::filesync as pb;
use registryauth::tls::{ClientTls, TlsError};
use registryauth::token::{self, DEFAULT_EXPIRY_S, MAX_ANSWER_BYTES};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Client, RequestBuilder, StatusCode, Url};
use serde::Deserialize;

use crate::docker_config::Account;
use crate::spec::AuthTls;

/// How long a server may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Most of a refusal's text that is shown.
const MAX_SHOWN_CHARS: usize = 1000;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The registry names something else than a web server.
    #[error("invalid token auth challenge realm: {realm:?}")]
    Realm {
        /// What it names.
        realm: String,
    },
    /// The TLS settings cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server cannot be reached.
    #[error("failed to do request: {method} {url:?}: {}", cause(.source))]
    Request {
        /// How it was asked.
        method: &'static str,
        /// Where, without secrets.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server says why it refuses.
    #[error("{message}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// What it says.
        message: String,
    },
    /// The server answers with something else.
    #[error("unexpected status from {method} request to {url}: {status}{body}")]
    Status {
        /// How it was asked.
        method: &'static str,
        /// Where, without secrets.
        url: String,
        /// The status.
        status: StatusCode,
        /// What it says, after a colon, or nothing.
        body: String,
    },
    /// The answer has no token.
    #[error(transparent)]
    Answer(#[from] token::AnswerError),
    /// The answer is too large for one.
    #[error("the token server's answer is larger than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
    /// It is not what a header can hold.
    #[error("credentials contain characters that cannot be sent")]
    Unsendable,
}

impl TokenError {
    /// Whether the server may know only the other way of asking, as seen with GCR (404) and Artifactory (401).
    fn wants_another_way(&self, account: &Account) -> bool {
        let (Self::Refused { status, .. } | Self::Status { status, .. }) = self else {
            return false;
        };
        match *status {
            StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED => true,
            StatusCode::METHOD_NOT_ALLOWED => !account.username.is_empty(),
            _ => false,
        }
    }
}

/// reqwest's own text has the URL with its query.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[derive(Deserialize)]
struct Refusal {
    errors: Vec<Reason>,
}

#[derive(Deserialize)]
struct Reason {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Asks token servers. Clones share connections.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    contexts: Arc<BTreeMap<String, AuthTls>>,
    clients: Arc<Mutex<BTreeMap<String, Client>>>,
}

impl Tokens {
    /// Reaches the token servers of these registry hosts with settings of their own.
    pub fn new(contexts: BTreeMap<String, AuthTls>) -> Self {
        Self {
            contexts: Arc::new(contexts),
            clients: Arc::default(),
        }
    }

    /// Fetches a token: with the account, or anonymously if there is none. Dropping the future ends it.
    ///
    /// # Errors
    /// When the server cannot be asked or refuses.
    pub async fn fetch(
        &self,
        account: &Account,
        request: &pb::FetchTokenRequest,
    ) -> Result<pb::FetchTokenResponse, TokenError> {
        if !account.registry_token.is_empty() {
            return Ok(response(account.registry_token.clone(), 0));
        }
        let realm = realm(&request.realm)?;
        let client = self.client(&request.host)?;
        if account.secret.is_empty() {
            return get(&client, realm, request, None).await;
        }
        match post(&client, realm.clone(), request, account).await {
            Err(error) if error.wants_another_way(account) => {
                get(&client, realm, request, Some(account)).await
            }
            answer => answer,
        }
    }

    fn client(&self, host: &str) -> Result<Client, TokenError> {
        let key = if self.contexts.contains_key(host) {
            host
        } else {
            ""
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(key) {
            return Ok(client.clone());
        }
        // Accounts are for the server that the registry names and for no other.
        let redirects = reqwest::redirect::Policy::custom(|attempt| {
            let is_far = attempt.previous().first().is_none_or(|first| {
                first.host() != attempt.url().host() || first.scheme() != attempt.url().scheme()
            });
            if is_far || attempt.previous().len() > 10 {
                attempt.stop()
            } else {
                attempt.follow()
            }
        });
        let tls = client_tls(self.contexts.get(key)).config()?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(redirects)
            .referer(false)
            .timeout(LIMIT)
            .user_agent("buildkit-client")
            .build()
            .map_err(|source| TokenError::Request {
                method: "GET",
                url: String::new(),
                source,
            })?;
        clients.insert(key.to_owned(), client.clone());
        Ok(client)
    }
}

/// The settings of a context; without one, the system's.
fn client_tls(context: Option<&AuthTls>) -> ClientTls {
    let Some(context) = context else {
        return ClientTls::default();
    };
    let first = context.key_pairs.first();
    ClientTls {
        authorities: context.roots.iter().map(PathBuf::from).collect(),
        key_pair: first.map(|(certificate, key)| (certificate.into(), key.into())),
        is_insecure: context.insecure,
    }
}

fn realm(realm: &str) -> Result<Url, TokenError> {
    Url::parse(realm)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| TokenError::Realm {
            realm: realm.to_owned(),
        })
}

async fn get(
    client: &Client,
    realm: Url,
    request: &pb::FetchTokenRequest,
    account: Option<&Account>,
) -> Result<pb::FetchTokenResponse, TokenError> {
    let realm = token_request(request).query(realm);
    let mut sent = client.get(realm.clone());
    if let Some(account) = account {
        let value = token_account(account)
            .basic()
            .map_err(|_| TokenError::Unsendable)?;
        sent = sent.header(AUTHORIZATION, value);
    }
    ask(sent, "GET", &realm).await
}

async fn post(
    client: &Client,
    realm: Url,
    request: &pb::FetchTokenRequest,
    account: &Account,
) -> Result<pb::FetchTokenResponse, TokenError> {
    let sent = client
        .post(realm.clone())
        .header(CONTENT_TYPE, token::FORM_TYPE)
        .body(token_request(request).form(token_account(account)));
    ask(sent, "POST", &realm).await
}

fn token_request(request: &pb::FetchTokenRequest) -> token::Request<'_> {
    token::Request {
        client_id: &request.client_id,
        service: &request.service,
        scopes: &request.scopes,
    }
}

fn token_account(account: &Account) -> token::Account<'_> {
    token::Account {
        username: &account.username,
        secret: &account.secret,
    }
}

async fn ask(
    request: RequestBuilder,
    method: &'static str,
    url: &Url,
) -> Result<pb::FetchTokenResponse, TokenError> {
    let shown = shown(url);
    let failed = |source: reqwest::Error| TokenError::Request {
        method,
        url: shown.clone(),
        source: source.without_url(),
    };
    let mut answer = request.send().await.map_err(failed)?;
    let status = answer.status();
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(TokenError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    if !status.is_success() {
        return Err(refused(status, method, shown, &body));
    }
    let issued = token::read_answer(&body)?;
    Ok(response(issued.token, issued.expires_in_s))
}

fn refused(status: StatusCode, method: &'static str, url: String, body: &[u8]) -> TokenError {
    if let Ok(refusal) = serde_json::from_slice::<Refusal>(body) {
        let reasons: Vec<String> = refusal
            .errors
            .iter()
            .map(|reason| {
                let code = reason.code.to_lowercase().replace('_', " ");
                format!("{code}: {}", reason.message)
            })
            .collect();
        if !reasons.is_empty() {
            let message = shortened(&reasons.join("\n"));
            return TokenError::Refused { status, message };
        }
    }
    let text = shortened(String::from_utf8_lossy(body).trim());
    let body = if text.is_empty() {
        text
    } else {
        format!(": {text}")
    };
    TokenError::Status {
        method,
        url,
        status,
        body,
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // A URL that cannot have an account has none.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.into()
}

fn response(token: String, expires_in_s: i64) -> pb::FetchTokenResponse {
    pb::FetchTokenResponse {
        token,
        expires_in: if expires_in_s > 0 {
            expires_in_s
        } else {
            DEFAULT_EXPIRY_S
        },
        issued_at: 0,
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
