//! Builds whose steps reach the network by nothing but a proxy: what policies say of the requests.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use llb::pb;

use super::{Bridge, PolicySet};
use crate::error::{BuildError, ErrorKind};
use crate::op::UrlPolicy;

/// Decides on URLs as if they were sources of the builds.
#[derive(Debug)]
struct SourcePolicy {
    bridge: Bridge,
    policies: PolicySet,
}

impl Bridge {
    /// Whether a build wants its steps behind a proxy; then all that share its steps have them there.
    pub(super) fn is_proxied(&self) -> bool {
        self.jobs().iter().any(|job| job.settings().proxy_network)
    }

    /// What decides on the requests of steps; `None` if everything is allowed.
    pub(super) fn requests_policy(&self) -> Result<Option<Arc<dyn UrlPolicy>>, BuildError> {
        let policies = self.policies(&[])?;
        if policies.is_empty() && self.policy_sessions().is_empty() {
            return Ok(None);
        }
        Ok(Some(Arc::new(SourcePolicy {
            bridge: self.clone(),
            policies,
        })))
    }
}

#[async_trait]
impl UrlPolicy for SourcePolicy {
    async fn decide(&self, url: &str) -> Result<Option<String>, BuildError> {
        let source = pb::SourceOp {
            identifier: url.to_owned(),
            attrs: BTreeMap::new(),
        };
        let decided = Box::pin(self.bridge.decide(&self.policies, None, source)).await?;
        if !decided.attrs.is_empty() {
            let text = format!("{url} is converted with attributes, which a request cannot have");
            return Err(BuildError::new(ErrorKind::Denied, text));
        }
        Ok((decided.identifier != url).then_some(decided.identifier))
    }
}
