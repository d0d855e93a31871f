//! Host names by the system's resolver, with errors that name the host.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use thiserror::Error;

/// Why a host has no address; the texts are those that the ecosystem's clients know.
#[derive(Debug, Error)]
pub(crate) enum LookupError {
    /// The name does not exist, or has no address.
    #[error("dial tcp: lookup {host}: no such host")]
    NoSuchHost {
        /// The name.
        host: String,
    },
    /// The question could not be answered.
    #[error("dial tcp: lookup {host}: {reason}")]
    Failed {
        /// The name.
        host: String,
        /// What the system said.
        reason: String,
    },
}

/// What the C libraries say of a name that does not exist or has no address; the code behind it is not handed on.
const NO_SUCH_HOST: [&str; 4] = [
    "Name or service not known",
    "No address associated with hostname",
    "Name does not resolve",
    "Name has no usable address",
];

impl LookupError {
    fn new(host: String, error: &std::io::Error) -> Self {
        let text = error.to_string();
        if NO_SUCH_HOST.iter().any(|known| text.contains(known)) {
            return Self::NoSuchHost { host };
        }
        let reason = text
            .rsplit_once("information: ")
            .map_or(text.as_str(), |(_, rest)| rest);
        Self::Failed {
            reason: reason.to_owned(),
            host,
        }
    }
}

/// Whether a request failed because its host does not exist, which no second attempt changes.
pub fn is_unknown_host(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if matches!(error.downcast_ref(), Some(LookupError::NoSuchHost { .. })) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Asks the system.
#[derive(Debug)]
pub(crate) struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The port is the request's.
            match tokio::net::lookup_host((name.as_str(), 0)).await {
                Ok(found) => Ok(Box::new(found.collect::<Vec<_>>().into_iter()) as Addrs),
                Err(error) => Err(LookupError::new(name.as_str().to_owned(), &error).into()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn a_host_that_does_not_exist_is_named() {
        let failed = |text: &str| LookupError::new("h".to_owned(), &Error::other(text));
        let gone = failed("failed to lookup address information: Name or service not known");
        assert_eq!(gone.to_string(), "dial tcp: lookup h: no such host");
        assert!(is_unknown_host(&gone));
        let later = failed("failed to lookup address information: Temporary failure in name resolution");
        assert_eq!(
            later.to_string(),
            "dial tcp: lookup h: Temporary failure in name resolution"
        );
        assert!(!is_unknown_host(&later));
    }
}
