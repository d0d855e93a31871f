//! A container behind a proxy of the daemon's: its environment, what it trusts, and what it was seen to fetch.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use executor::{Egress, Network, ProxyNetwork, RunRequest};
use proxy::{Authority, Dial, Policy, Proxy, Record, Refused};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{ExecParts, blocking, container_error};
use crate::error::{BuildError, ErrorKind};
use crate::op::{Fetched, UnpinnedRequest, UrlPolicy};

/// Hosts that programs reach themselves.
const NO_PROXY: &str = "127.0.0.1,localhost,::1";

/// The authority of this daemon's proxies, made when it is first needed. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Proxies(Arc<OnceLock<Arc<Authority>>>);

impl Proxies {
    async fn authority(&self) -> Result<Arc<Authority>, BuildError> {
        if let Some(authority) = self.0.get() {
            return Ok(Arc::clone(authority));
        }
        let made = blocking(|| {
            Authority::new().map_err(|error| BuildError::from_source(ErrorKind::Internal, error))
        });
        let made = Arc::new(made.await?);
        // Two may have been made; one is used.
        Ok(Arc::clone(self.0.get_or_init(|| made)))
    }
}

/// Connects from where a container's requests leave.
#[derive(Debug)]
struct Exit(Egress);

#[async_trait]
impl Dial for Exit {
    async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let found: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
        for address in found {
            match self.0.connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = io::Error::new(error.kind(), format!("dial {address}: {error}")),
            }
        }
        Err(failure)
    }
}

/// Asks the builds' policies.
#[derive(Debug)]
struct Asked(Arc<dyn UrlPolicy>);

#[async_trait]
impl Policy for Asked {
    async fn check(&self, url: &str) -> Result<Option<String>, Refused> {
        self.0
            .decide(url)
            .await
            .map_err(|error| Refused(error.to_string()))
    }
}

/// A proxy that serves a container, until it is dropped.
#[derive(Debug)]
pub(crate) struct Serving {
    /// Variables for the container's processes.
    pub(crate) env: Vec<String>,
    namespace: Arc<OwnedFd>,
    authority: Arc<Authority>,
    record: Record,
    ended: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Serving {
    /// Starts a proxy for a container that is yet to be started, and that would have `network`. Without a policy all
    /// requests are allowed.
    pub(crate) async fn start(
        parts: &ExecParts,
        policy: Option<Arc<dyn UrlPolicy>>,
        network: Network,
    ) -> Result<Self, BuildError> {
        let policy = policy.map(|policy| Arc::new(Asked(policy)) as Arc<dyn Policy>);
        let authority = parts.proxies.authority().await?;
        let made = parts.executor.proxy_network(network).await;
        let ProxyNetwork {
            listener,
            egress,
            namespace,
        } = made.map_err(container_error)?;
        let failed = |error: io::Error| {
            BuildError::from_source(ErrorKind::Internal, error).context("listen for a step's requests")
        };
        let address = listener.local_addr().map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let record = Record::default();
        let proxy = Proxy::new(
            Arc::clone(&authority),
            Arc::new(Exit(egress)),
            policy,
            record.clone(),
        );
        let ended = CancellationToken::new();
        let until = ended.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = proxy.serve(listener, &until).await {
                tracing::warn!(%error, "a step's proxy ended");
            }
        });
        Ok(Self {
            env: environment(address),
            namespace,
            authority,
            record,
            ended,
            task: AbortOnDropHandle::new(task),
        })
    }

    /// Puts a container behind the proxy.
    pub(crate) fn apply(&self, request: &mut RunRequest) {
        request.process.env.extend(self.env.iter().cloned());
        request.namespace = Some(Arc::clone(&self.namespace));
        request.trusted_authority = Some(self.authority.pem().to_owned());
    }

    /// Waits until what is on its way has come to its end; the container is gone.
    pub(crate) async fn finish(self) -> Record {
        self.ended.cancel();
        // It was not cancelled, and what went wrong is in the log.
        let _ = self.task.await;
        self.record
    }
}

fn environment(proxy: SocketAddr) -> Vec<String> {
    let mut env = Vec::new();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        env.push(format!("{name}=http://{proxy}"));
    }
    env.extend(["NO_PROXY", "no_proxy"].map(|name| format!("{name}={NO_PROXY}")));
    env
}

/// What the log says of a step's requests; empty if there were none.
pub(super) fn summary(record: &Record) -> String {
    let mut text = String::new();
    for request in record.requests() {
        if text.is_empty() {
            text.push_str("proxy network requests:\n");
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "- {} {} -> {}", request.method, request.url, request.status);
    }
    text
}

/// What provenance says of a step's requests.
pub(super) fn fetched(record: &Record) -> Fetched {
    let materials = record.materials().into_iter();
    let unpinned = record.incomplete().into_iter().map(|request| UnpinnedRequest {
        method: request.method,
        url: request.url,
        reason: request.reason,
    });
    Fetched {
        materials: materials
            .map(|material| (material.url, material.digest))
            .collect(),
        unpinned: unpinned.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_learn_of_the_proxy_in_every_usual_way() {
        let env = environment(SocketAddr::from(([127, 0, 0, 1], 4000)));
        assert_eq!(env.len(), 6);
        assert_eq!(env[0], "HTTP_PROXY=http://127.0.0.1:4000");
        assert_eq!(env[5], "no_proxy=127.0.0.1,localhost,::1");
        assert_eq!(summary(&Record::default()), "");
    }
}
