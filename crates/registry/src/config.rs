//! Which hosts serve a registry's name, and how they are reached; reads `[registry."host"]` of `buildkitd.toml`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

/// Configuration of all registries, by the domain of a reference (`docker.io`, `localhost:5000`).
///
/// A domain without an entry is reached at its own name by HTTPS, or by plain HTTP if it is a loopback name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct HostsConfig {
    /// Settings by domain.
    pub hosts: BTreeMap<String, HostConfig>,
}

/// Settings of one registry; the field names on disk are BuildKit's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct HostConfig {
    /// Hosts asked first when pulling, each `host[:port][/path]`, in order.
    pub mirrors: Vec<String>,
    /// Whether to speak plain HTTP; unset: only with loopback names.
    #[serde(rename = "http")]
    pub plain_http: Option<bool>,
    /// Whether to accept any certificate; together with plain HTTP, HTTPS is tried first.
    pub insecure: Option<bool>,
    /// PEM files with further certificate authorities.
    pub ca: Vec<PathBuf>,
    /// Client certificates.
    pub keypair: Vec<KeyPair>,
    /// Directories in docker's layout: `*.crt` authorities, `*.cert` with `*.key` client certificates.
    pub tlsconfigdir: Vec<PathBuf>,
}

/// A client certificate and its key, as PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct KeyPair {
    /// File of the private key.
    pub key: PathBuf,
    /// File of the certificate chain.
    pub cert: PathBuf,
}

/// Limits and names of a client.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// `User-Agent` of every request.
    pub user_agent: String,
    /// `client_id` told to token servers.
    pub client_id: String,
    /// Concurrent blob transfers per domain in each direction; a registry that says it is too much has fewer for a while.
    pub max_transfers: usize,
    /// Largest accepted manifest or index, in bytes.
    pub max_manifest_bytes: u64,
    /// How often one request is sent at most when the server or the connection fails.
    pub max_attempts: u32,
    /// Wait before the second attempt; doubles with each.
    pub backoff: Duration,
    /// Longest wait between attempts, also for `Retry-After`: a server that asks for more fails the request.
    pub max_backoff: Duration,
    /// Longest wait for response headers, and for the next bytes of a body.
    pub idle_timeout: Duration,
    /// Longest time an upload may go without moving a byte or being answered.
    pub upload_stall_timeout: Duration,
    /// Size of a piece when a blob is uploaded in pieces.
    pub upload_chunk_bytes: u64,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            user_agent: concat!("cooper/", env!("CARGO_PKG_VERSION")).to_owned(),
            client_id: "buildkit-client".to_owned(),
            max_transfers: 4,
            max_manifest_bytes: 4 * 1048 * 1048,
            max_attempts: 5,
            backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(60),
            upload_stall_timeout: Duration::from_secs(300),
            upload_chunk_bytes: 32 << 20,
        }
    }
}
