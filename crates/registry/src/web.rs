//! Clients for plain web servers, for sources and caches that are not registries.

use crate::config::{ClientOptions, HostConfig};
use crate::endpoint::http_client_with;
use crate::error::ConfigError;

/// Makes a client that trusts the system's authorities, follows redirects (without authorization to other hosts) and takes
/// bodies as they are. `user_agent` is what servers are told unless a request says otherwise. Cheap to clone; connections
/// are shared.
///
/// # Errors
/// When the TLS settings cannot be built.
pub fn web_client(user_agent: &str) -> Result<reqwest::Client, ConfigError> {
    client(user_agent, reqwest::redirect::Policy::limited(10))
}

/// Makes a client like [`web_client`] that leaves redirects to its caller.
///
/// # Errors
/// When the TLS settings cannot be built.
pub fn web_client_without_redirects(user_agent: &str) -> Result<reqwest::Client, ConfigError> {
    client(user_agent, reqwest::redirect::Policy::none())
}

fn client(user_agent: &str, redirects: reqwest::redirect::Policy) -> Result<reqwest::Client, ConfigError> {
    let options = ClientOptions {
        user_agent: user_agent.to_owned(),
        ..ClientOptions::default()
    };
    http_client_with("web", &HostConfig::default(), &options, redirects)
}
