//! A client for plain web servers, for sources that are not registries.

use crate::config::{ClientOptions, HostConfig};
use crate::endpoint::http_client;
use crate::error::ConfigError;

/// Makes a client that trusts the system's authorities, follows redirects (without authorization to other hosts) and takes
/// bodies as they are. `user_agent` is what servers are told unless a request says otherwise. Cheap to clone; connections
/// are shared.
///
/// # Errors
/// When the TLS settings cannot be built.
pub fn web_client(user_agent: &str) -> Result<reqwest::Client, ConfigError> {
    let options = ClientOptions {
        user_agent: user_agent.to_owned(),
        ..ClientOptions::default()
    };
    http_client("web", &HostConfig::default(), &options)
}
