//! `Secrets`: read when a step asks for them.

use std::collections::BTreeMap;

use api::pb::secrets as pb;
use tokio::io::AsyncReadExt as _;
use tonic::{Request, Response, Status};

use crate::spec::SecretOrigin;

/// Longest secret in bytes.
const MAX_SECRET_BYTES: u64 = 500 * 1024;

/// Answers questions for secrets.
#[derive(Clone, Debug)]
pub struct Secrets {
    origins: BTreeMap<String, SecretOrigin>,
}

impl Secrets {
    /// Makes the service of a build's secrets, by id.
    pub fn new(origins: BTreeMap<String, SecretOrigin>) -> Self {
        Self { origins }
    }

    async fn read(&self, id: &str) -> Result<Vec<u8>, Status> {
        match self.origins.get(id) {
            None => Err(Status::not_found(format!("secret {id}: not found"))),
            Some(SecretOrigin::Env(name)) => {
                use std::os::unix::ffi::OsStringExt;
                Ok(std::env::var_os(name)
                    .map(OsStringExt::into_vec)
                    .unwrap_or_default())
            }
            Some(SecretOrigin::File(path)) => {
                let failed = |error| Status::unknown(format!("open {}: {error}", path.display()));
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let mut bytes = Vec::new();
                file.take(MAX_SECRET_BYTES + 1)
                    .read_to_end(&mut bytes)
                    .await
                    .map_err(failed)?;
                Ok(bytes)
            }
        }
    }
}

#[tonic::async_trait]
impl pb::secrets_server::Secrets for Secrets {
    async fn get_secret(
        &self,
        request: Request<pb::GetSecretRequest>,
    ) -> Result<Response<pb::GetSecretResponse>, Status> {
        let data = self.read(&request.into_inner().id).await?;
        if u64::try_from(data.len()).unwrap_or(u64::MAX) > MAX_SECRET_BYTES {
            return Err(Status::unknown(format!("invalid secret size {}", data.len())));
        }
        Ok(Response::new(pb::GetSecretResponse { data: data.into() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_files_late_and_refuses_long_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let secrets = Secrets::new(BTreeMap::from([(
            "x".to_owned(),
            SecretOrigin::File(path.clone()),
        )]));
        let get = async |id: &str| {
            use pb::secrets_server::Secrets as _;
            let request = pb::GetSecretRequest {
                id: id.to_owned(),
                ..Default::default()
            };
            secrets
                .get_secret(Request::new(request))
                .await
                .map(|response| response.into_inner().data)
        };
        assert_eq!(get("y").await.unwrap_err().code(), tonic::Code::NotFound);
        assert_eq!(get("x").await.unwrap_err().code(), tonic::Code::Unknown);
        std::fs::write(&path, b"late").unwrap();
        assert_eq!(&get("x").await.unwrap()[..], b"late");
        std::fs::write(&path, vec![0; 500 * 1024 + 1]).unwrap();
        assert!(
            get("x")
                .await
                .unwrap_err()
                .message()
                .contains("invalid secret size")
        );
    }
}
