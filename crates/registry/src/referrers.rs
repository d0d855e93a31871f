//! What refers to a manifest: the referrers API, and the tag that stands in for it at older registries.

use http::StatusCode;
use http::header::ACCEPT;
use oci::{Descriptor, Digest, Index, Reference, media_type};

use crate::client::Client;
use crate::error::RegistryError;
use crate::request::{Call, Method, display_url, read_bounded};

impl Client {
    /// Lists the manifests that name `digest` as their subject, optionally of one artifact type. An unknown digest has
    /// none.
    ///
    /// # Errors
    /// As [`Client::resolve`].
    pub async fn referrers(
        &self,
        reference: &Reference,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, RegistryError> {
        let endpoints = self.endpoints.of(reference.domain())?;
        let repository = self.repository(reference, false);
        let mut api =
            Call::new(Method::Get, format!("referrers/{digest}")).header(ACCEPT, media_type::OCI_INDEX);
        if let Some(artifact_type) = artifact_type {
            api = api.query("artifactType", artifact_type);
        }
        let tag = format!("{}-{}", digest.algorithm(), digest.hex());
        let by_tag = Call::new(Method::Get, format!("manifests/{tag}")).header(ACCEPT, media_type::OCI_INDEX);
        // Mirrors often lack the API: the registry itself answers.
        let Some(endpoint) = endpoints.last() else {
            return Ok(Vec::new());
        };
        for call in [api, by_tag] {
            let response = repository.send(endpoint, &call, true).await?;
            if response.status() == StatusCode::NOT_FOUND {
                continue;
            }
            if !response.status().is_success() {
                return Err(repository.failed(response, &call, &reference.to_string()).await);
            }
            let url = display_url(response.url());
            let body = read_bounded(response, self.options.max_manifest_bytes, "GET", &self.options).await?;
            let index: Index =
                serde_json::from_slice(&body).map_err(|error| RegistryError::InvalidResponse {
                    url,
                    reason: format!("referrers are no index: {error}"),
                })?;
            let wanted =
                |found: &Descriptor| artifact_type.is_none_or(|wanted| found.artifact_type == wanted);
            return Ok(index.manifests.into_iter().filter(wanted).collect());
        }
        Ok(Vec::new())
    }
}
