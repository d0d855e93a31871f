//! `Auth`: registry accounts from Docker's configuration, and tokens for them.
//!
//! A daemon that knows how to lets this client fetch the tokens, and passwords stay here. Registries without tokens take
//! the password itself, which the daemon then asks for; so it does where `$BUILDKIT_NO_CLIENT_TOKEN` is set.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::pb::filesync as pb;
use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};
use tonic::{Request, Response, Status};

use super::authority::Authority;
use super::tokens::Tokens;
use crate::docker_config::{Account, DockerConfig, directory};
use crate::format::time::Instant as Moment;
use crate::progress::event::{Status as Progress, Vertex};
use crate::spec::go_bool;

/// How long an account is taken to be what a helper said; some helpers' secrets are good for five minutes.
const ACCOUNT_LIFETIME: Duration = Duration::from_secs(290);

/// Answers questions for registry accounts and tokens.
#[derive(Clone, Debug)]
pub struct Accounts {
    config: DockerConfig,
    tokens: Tokens,
    seeds: Option<PathBuf>,
    is_token_authority: bool,
    /// One question to helpers at a time: not all of them can do with more.
    known: Arc<Mutex<BTreeMap<String, (Instant, Account)>>>,
    /// Does not keep a display waiting once the build has ended.
    events: mpsc::WeakSender<Progress>,
    announced: Arc<Mutex<BTreeSet<String>>>,
}

impl Accounts {
    /// Makes the service of a configuration; what passwords are used for is told in `events`.
    pub fn new(config: DockerConfig, tokens: Tokens, events: &mpsc::Sender<Progress>) -> Self {
        let refused = std::env::var("BUILDKIT_NO_CLIENT_TOKEN");
        Self {
            config,
            tokens,
            seeds: directory(),
            is_token_authority: !refused.is_ok_and(|value| go_bool(&value).unwrap_or(false)),
            known: Arc::default(),
            events: events.downgrade(),
            announced: Arc::default(),
        }
    }

    async fn account(&self, host: &str) -> Result<Account, Status> {
        let mut known = self.known.lock().await;
        if let Some((since, account)) = known.get(host)
            && since.elapsed() < ACCOUNT_LIFETIME
        {
            return Ok(account.clone());
        }
        let found = self.config.account(host).await;
        let account = found.map_err(|error| Status::unknown(error.to_string()))?;
        known.insert(host.to_owned(), (Instant::now(), account.clone()));
        Ok(account)
    }

    /// Shows once what a password is used for.
    async fn announce(&self, name: String) {
        if !self.announced.lock().await.insert(name.clone()) {
            return;
        }
        let now = Some(Moment::now());
        let vertex = Vertex {
            digest: oci::Digest::sha256(crate::ids::new_id()).to_string(),
            name,
            started: now,
            completed: now,
            ..Vertex::default()
        };
        let progress = Progress {
            vertexes: vec![vertex],
            ..Progress::default()
        };
        if let Some(events) = self.events.upgrade() {
            // Without a display nobody wants to know.
            let _ = events.send(progress).await;
        }
    }

    async fn authority(&self, host: String, salt: Bytes) -> Result<Authority, Status> {
        if !self.is_token_authority {
            return Err(Status::unavailable("client side tokens disabled"));
        }
        let account = self.account(&host).await?;
        let has_secret = !account.secret.is_empty() || !account.registry_token.is_empty();
        let seeds = self.seeds.clone();
        let made =
            tokio::task::spawn_blocking(move || Authority::new(seeds.as_deref(), &host, &salt, has_secret));
        let made = made
            .await
            .map_err(|error| Status::internal(format!("token authority: {error}")))?;
        made.map_err(|error| Status::unknown(error.to_string()))
    }
}

#[tonic::async_trait]
impl pb::auth_server::Auth for Accounts {
    async fn credentials(
        &self,
        request: Request<pb::CredentialsRequest>,
    ) -> Result<Response<pb::CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let account = self.account(&host).await?;
        if !account.secret.is_empty() {
            self.announce(format!("[auth] sharing credentials for {host}"))
                .await;
        }
        Ok(Response::new(pb::CredentialsResponse {
            username: account.username,
            secret: account.secret,
        }))
    }

    async fn fetch_token(
        &self,
        request: Request<pb::FetchTokenRequest>,
    ) -> Result<Response<pb::FetchTokenResponse>, Status> {
        let request = request.into_inner();
        let account = self.account(&request.host).await?;
        let what = if account.secret.is_empty() {
            "anonymous"
        } else {
            let scopes: Vec<&str> = request
                .scopes
                .iter()
                .map(|scope| scope.strip_prefix("repository:").unwrap_or(scope))
                .collect();
            let (scopes, host) = (scopes.join(" "), &request.host);
            self.announce(format!("[auth] {scopes} token for {host}")).await;
            "oauth"
        };
        let fetched = self.tokens.fetch(&account, &request).await;
        fetched
            .map(Response::new)
            .map_err(|error| Status::unknown(format!("failed to fetch {what} token: {error}")))
    }

    async fn get_token_authority(
        &self,
        request: Request<pb::GetTokenAuthorityRequest>,
    ) -> Result<Response<pb::GetTokenAuthorityResponse>, Status> {
        let request = request.into_inner();
        let authority = self.authority(request.host, request.salt).await?;
        Ok(Response::new(pb::GetTokenAuthorityResponse {
            public_key: authority.public_key().into(),
        }))
    }

    async fn verify_token_authority(
        &self,
        request: Request<pb::VerifyTokenAuthorityRequest>,
    ) -> Result<Response<pb::VerifyTokenAuthorityResponse>, Status> {
        let request = request.into_inner();
        let authority = self.authority(request.host, request.salt).await?;
        Ok(Response::new(pb::VerifyTokenAuthorityResponse {
            signed: authority.signed(&request.payload).into(),
        }))
    }
}
