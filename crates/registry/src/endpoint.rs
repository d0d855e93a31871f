//! Where a domain's requests go: mirrors and the registry itself, each with its connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::{ClientOptions, HostConfig, HostsConfig};
use crate::error::{ConfigError, RegistryError};
use crate::pace::{Lane, Slot};
use crate::{resolve, tls};

/// One host that can answer for a domain.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// `host[:port]`, as credentials are asked for.
    pub authority: String,
    /// `/v2` with a mirror's path, without a trailing slash.
    pub path: String,
    /// The domain to name in `ns=` when the host stands in for another.
    pub namespace: Option<String>,
    /// Whether only pulls go here.
    pub is_mirror: bool,
    /// Connections.
    pub http: reqwest::Client,
    plain: bool,
    may_fall_back: bool,
    fell_back: AtomicBool,
}

impl Endpoint {
    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.plain || self.fell_back.load(Ordering::Relaxed) {
            "http"
        } else {
            "https"
        }
    }

    /// Goes over to the other scheme after a failure to connect with `failed`, where the configuration allows both.
    /// Returns whether that is worth trying at once: plain HTTP after HTTPS is, the way back is for a later attempt.
    ///
    /// Of several requests that fail at the same time the first switches and the others follow it.
    pub fn switch_from(&self, failed: &str) -> bool {
        if !self.may_fall_back {
            return false;
        }
        let was_plain = failed == "http";
        // Has it changed, another request did what this one would.
        let _ = self
            .fell_back
            .compare_exchange(was_plain, !was_plain, Ordering::Relaxed, Ordering::Relaxed);
        !was_plain
    }
}

/// The endpoints of all domains, and how many transfers each may have.
#[derive(Debug)]
pub(crate) struct Endpoints {
    config: HostsConfig,
    options: Arc<ClientOptions>,
    default_http: Arc<Mutex<Option<reqwest::Client>>>,
    configured: Mutex<BTreeMap<String, Arc<[Endpoint]>>>,
    lanes: Arc<Mutex<Lanes>>,
}

type Lanes = BTreeMap<(String, Direction), Arc<Lane>>;

/// Which way bytes go. Pulls and pushes have slots of their own: a push may feed from a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    Pull,
    Push,
}

impl Endpoints {
    pub fn new(config: HostsConfig, options: Arc<ClientOptions>) -> Self {
        Self {
            config,
            options,
            default_http: Arc::default(),
            configured: Mutex::default(),
            lanes: Arc::default(),
        }
    }

    /// The same endpoints with another configuration of one domain; plain connections and slots stay shared.
    pub fn with_host(&self, domain: &str, host: HostConfig) -> Self {
        let mut config = self.config.clone();
        config.hosts.insert(domain.to_owned(), host);
        Self {
            config,
            options: Arc::clone(&self.options),
            default_http: Arc::clone(&self.default_http),
            configured: Mutex::default(),
            lanes: Arc::clone(&self.lanes),
        }
    }

    /// Waits for the right to move a blob from or to a domain.
    pub async fn slot(&self, domain: &str, direction: Direction) -> Slot {
        let lane = {
            let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
            // What was learnt of a domain is kept for as long as there are transfers.
            lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
            let lane = lanes.entry((domain.to_owned(), direction));
            Arc::clone(lane.or_insert_with(|| Arc::new(Lane::new(self.options.max_transfers))))
        };
        lane.slot().await
    }

    /// Transfers from or to a domain that may be under way.
    pub fn allowed(&self, domain: &str, direction: Direction) -> usize {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.get(&(domain.to_owned(), direction));
        let lane = lane.filter(|lane| Arc::strong_count(lane) > 1);
        lane.map_or(self.options.max_transfers, |lane| lane.allowed())
    }

    /// The hosts for a domain in the order in which to try them; the registry itself is last.
    pub fn of(&self, domain: &str) -> Result<Arc<[Endpoint]>, RegistryError> {
        let config = |source| RegistryError::Config {
            host: domain.to_owned(),
            source,
        };
        let Some(host_config) = self.config.hosts.get(domain) else {
            // Not kept: the number of domains a daemon meets in its life is unbounded.
            let http = self.default_http().map_err(config)?;
            return Ok(Arc::from([self.origin(domain, &HostConfig::default(), http)]));
        };
        if let Some(known) = self
            .configured
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(domain)
        {
            return Ok(Arc::clone(known));
        }
        let mut endpoints = Vec::new();
        for mirror in &host_config.mirrors {
            endpoints.push(self.mirror(domain, mirror).map_err(config)?);
        }
        let http = http_client(domain, host_config, &self.options).map_err(config)?;
        endpoints.push(self.origin(domain, host_config, http));
        let endpoints: Arc<[Endpoint]> = endpoints.into();
        let mut configured = self.configured.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(
            configured.entry(domain.to_owned()).or_insert(endpoints),
        ))
    }

    fn default_http(&self) -> Result<reqwest::Client, ConfigError> {
        let mut shared = self.default_http.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(http) = &*shared {
            return Ok(http.clone());
        }
        let http = http_client("default", &HostConfig::default(), &self.options)?;
        *shared = Some(http.clone());
        Ok(http)
    }

    fn origin(&self, domain: &str, config: &HostConfig, http: reqwest::Client) -> Endpoint {
        let authority = if domain == "docker.io" {
            "registry-1.docker.io"
        } else {
            domain
        };
        endpoint(authority.to_owned(), "/v2".to_owned(), config, http)
    }

    fn mirror(&self, domain: &str, mirror: &str) -> Result<Endpoint, ConfigError> {
        let (authority, path) = split_mirror(mirror);
        let default = HostConfig::default();
        let config = self.config.hosts.get(authority).unwrap_or(&default);
        let http = http_client(authority, config, &self.options)?;
        let mut endpoint = endpoint(authority.to_owned(), path, config, http);
        endpoint.is_mirror = true;
        if authority != domain && (domain, authority) != ("docker.io", "registry-1.docker.io") {
            endpoint.namespace = Some(domain.to_owned());
        }
        Ok(endpoint)
    }
}

fn endpoint(authority: String, path: String, config: &HostConfig, http: reqwest::Client) -> Endpoint {
    let wants_plain = config.plain_http.unwrap_or_else(|| is_loopback(&authority));
    let insecure = config.insecure == Some(true);
    Endpoint {
        authority,
        path,
        namespace: None,
        is_mirror: false,
        http,
        plain: wants_plain && !insecure,
        may_fall_back: wants_plain && insecure,
        fell_back: AtomicBool::new(false),
    }
}

/// Splits `host[:port][/path]`, with or without a scheme, into the authority and the API root on it.
fn split_mirror(mirror: &str) -> (&str, String) {
    let rest = mirror.split_once("://").map_or(mirror, |(_, rest)| rest);
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_matches('/');
    let root = if path.is_empty() {
        "/v2".to_owned()
    } else {
        format!("/v2/{path}")
    };
    (authority, root)
}

/// Whether a `host[:port]` names this machine by a loopback name or address.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !authority.ends_with("::1") => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

pub(crate) fn http_client(
    host: &str,
    config: &HostConfig,
    options: &ClientOptions,
) -> Result<reqwest::Client, ConfigError> {
    http_client_with(host, config, options, reqwest::redirect::Policy::limited(10))
}

pub(crate) fn http_client_with(
    host: &str,
    config: &HostConfig,
    options: &ClientOptions,
    redirects: reqwest::redirect::Policy,
) -> Result<reqwest::Client, ConfigError> {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(host, config)?)
        .user_agent(&options.user_agent)
        .dns_resolver(Arc::new(resolve::SystemResolver))
        .referer(false)
        .redirect(redirects)
        // Attempts are counted in one place only, with Retry-After.
        .retry(reqwest::retry::never())
        .connect_timeout(Duration::from_secs(30))
        .pool_idle_timeout(Duration::from_secs(120))
        .pool_max_idle_per_host(8)
        .tcp_keepalive(Duration::from_secs(60))
        .http2_initial_stream_window_size(4 << 20)
        .http2_initial_connection_window_size(16 << 20)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .build()
        .map_err(|source| ConfigError::Http {
            host: host.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_loopback_names() {
        for name in [
            "localhost",
            "localhost:5000",
            "127.0.0.1",
            "127.8.0.1:80",
            "::1",
            "[::1]",
            "[::1]:5000",
        ] {
            assert!(is_loopback(name), "{name}");
        }
        for name in [
            "docker.io",
            "localhost.example",
            "10.0.0.1:5000",
            "[::2]:1",
            "1.127.0.0.1",
        ] {
            assert!(!is_loopback(name), "{name}");
        }
    }

    #[test]
    fn splits_mirrors() {
        assert_eq!(split_mirror("mirror.gcr.io"), ("mirror.gcr.io", "/v2".to_owned()));
        assert_eq!(
            split_mirror("m:5000/proxy/hub/"),
            ("m:5000", "/v2/proxy/hub".to_owned())
        );
        assert_eq!(split_mirror("https://m/x"), ("m", "/v2/x".to_owned()));
    }
}
