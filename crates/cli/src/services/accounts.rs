//! `Auth`: registry accounts from Docker's configuration.
//!
//! Tokens are fetched by the daemon: this client offers no token authority, so a daemon asks for the account itself.

use api::pb::filesync as pb;
use tonic::{Request, Response, Status};

use crate::docker_config::DockerConfig;

/// Answers questions for registry accounts.
#[derive(Clone, Debug)]
pub struct Accounts {
    config: DockerConfig,
}

impl Accounts {
    /// Makes the service of a configuration.
    pub fn new(config: DockerConfig) -> Self {
        Self { config }
    }
}

#[tonic::async_trait]
impl pb::auth_server::Auth for Accounts {
    async fn credentials(
        &self,
        request: Request<pb::CredentialsRequest>,
    ) -> Result<Response<pb::CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let account = self
            .config
            .account(&host)
            .await
            .map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(pb::CredentialsResponse {
            username: account.username,
            secret: account.secret,
        }))
    }

    async fn fetch_token(
        &self,
        _: Request<pb::FetchTokenRequest>,
    ) -> Result<Response<pb::FetchTokenResponse>, Status> {
        Err(Status::unimplemented("client side tokens disabled"))
    }

    async fn get_token_authority(
        &self,
        _: Request<pb::GetTokenAuthorityRequest>,
    ) -> Result<Response<pb::GetTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("client side tokens disabled"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<pb::VerifyTokenAuthorityRequest>,
    ) -> Result<Response<pb::VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("client side tokens disabled"))
    }
}
