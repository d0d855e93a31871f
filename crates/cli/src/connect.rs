//! Reaching a daemon: over a unix socket, or TCP with or without TLS.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::transport::tune_endpoint;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};

use crate::buildctl::args::ConnectionArgs;

/// Where a daemon of the system listens.
pub const DEFAULT_ADDRESS: &str = "unix:///run/buildkit/buildkitd.sock";
/// Why a daemon cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address cannot be used.
    #[error("{message}")]
    Address {
        /// What is wrong.
        message: String,
    },
    /// A certificate or key cannot be read.
    #[error("failed to read {path}: {source}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody answers.
    #[error("failed to connect to {address}: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
}

impl ConnectError {
    fn address(message: impl Into<String>) -> Self {
        Self::Address {
            message: message.into(),
        }
    }
}

/// Connects to a daemon.
///
/// # Errors
/// [`ConnectError`] when the address is bad or nobody answers within the timeout.
pub async fn connect(address: &str, args: &ConnectionArgs) -> Result<Channel, ConnectError> {
    let endpoint = |uri: String| {
        Endpoint::from_shared(uri)
            .map_err(|error| ConnectError::address(format!("invalid address {address}: {error}")))
    };
    let connecting = async {
        match address.split_once("://") {
            Some(("unix", path)) => {
                let path = PathBuf::from(path);
                let endpoint = tuned(endpoint("http://localhost".to_owned())?);
                let connector = tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { UnixStream::connect(path).await.map(TokioIo::new) }
                });
                endpoint
                    .connect_with_connector(connector)
                    .await
                    .map_err(|error| unreachable(address, &error))
            }
            Some(("tcp", host)) => {
                let tls = tls_config(host, args)?;
                let scheme = if tls.is_some() { "https" } else { "http" };
                let mut endpoint = tuned(endpoint(format!("{scheme}://{host}"))?);
                if let Some(tls) = tls {
                    endpoint = endpoint
                        .tls_config(tls)
                        .map_err(|error| unreachable(address, &error))?;
                }
                endpoint
                    .connect()
                    .await
                    .map_err(|error| unreachable(address, &error))
            }
            Some((scheme, _)) => Err(ConnectError::address(format!(
                "address {address} cannot be used: {scheme}:// is not supported, use unix:// or tcp://"
            ))),
            None => Err(ConnectError::address(format!(
                "address {address} does not contain proto, you meant unix://{address} ?"
            ))),
        }
    };
    if args.timeout == 0 {
        return connecting.await;
    }
    let timeout = Duration::from_secs(args.timeout);
    let late = |_| ConnectError::Unreachable {
        address: address.to_owned(),
        reason: "timed out".to_owned(),
    };
    let attempt = tokio::time::timeout(timeout, connecting);
    if args.wait {
        return tokio::time::timeout(timeout, retry(address, args))
            .await
            .map_err(late)?;
    }
    attempt.await.map_err(late)?
}

/// Tries until somebody answers; the caller limits the time.
async fn retry(address: &str, args: &ConnectionArgs) -> Result<Channel, ConnectError> {
    let once = ConnectionArgs {
        wait: false,
        timeout: 0,
        ..args.clone()
    };
    loop {
        match Box::pin(connect(address, &once)).await {
            Err(ConnectError::Unreachable { .. }) => tokio::time::sleep(Duration::from_millis(50)).await,
            other => return other,
        }
    }
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    tune_endpoint(endpoint).tcp_nodelay(true)
}

fn unreachable(address: &str, error: &tonic::transport::Error) -> ConnectError {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        reason = inner.to_string();
        source = inner.source();
    }
    ConnectError::Unreachable {
        address: address.to_owned(),
        reason,
    }
}

fn tls_config(host: &str, args: &ConnectionArgs) -> Result<Option<ClientTlsConfig>, ConnectError> {
    let (ca, cert, key) = match &args.tlsdir {
        Some(_) if args.tlscacert.is_some() || args.tlscert.is_some() || args.tlskey.is_some() => {
            let message = "cannot specify tlsdir and tlscacert/tlscert/tlskey at the same time";
            return Err(ConnectError::address(message));
        }
        Some(dir) => (
            Some(one_of(dir, "ca.pem", "ca.crt")?),
            Some(one_of(dir, "cert.pem", "tls.crt")?),
            Some(one_of(dir, "key.pem", "tls.key")?),
        ),
        None => (args.tlscacert.clone(), args.tlscert.clone(), args.tlskey.clone()),
    };
    if ca.is_none() && cert.is_none() && key.is_none() {
        return Ok(None);
    }
    let name = args.tlsservername.clone().filter(|name| !name.is_empty());
    let host = host
        .rsplit_once(':')
        .map_or(host, |(host, _)| host)
        .trim_matches(['[', ']']);
    let mut config = ClientTlsConfig::new().domain_name(name.unwrap_or_else(|| host.to_owned()));
    if let Some(ca) = ca {
        config = config.ca_certificate(Certificate::from_pem(read(&ca)?));
    }
    match (cert, key) {
        (Some(cert), Some(key)) => config = config.identity(Identity::from_pem(read(&cert)?, read(&key)?)),
        (None, None) => {}
        _ => return Err(ConnectError::address("tlscert and tlskey must be given together")),
    }
    Ok(Some(config))
}

fn one_of(dir: &Path, first: &str, second: &str) -> Result<PathBuf, ConnectError> {
    [first, second]
        .map(|name| dir.join(name))
        .into_iter()
        .find(|path| path.exists())
        .ok_or_else(|| {
            ConnectError::address(format!(
                "directory did not contain one of the needed files: {first} or {second}"
            ))
        })
}

fn read(path: &Path) -> Result<Vec<u8>, ConnectError> {
    std::fs::read(path).map_err(|source| ConnectError::Certificate {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bad_addresses_are_named() {
        let error = async |address| {
            connect(address, &ConnectionArgs::default())
                .await
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error("/run/x").await,
            "address /run/x does not contain proto, you meant unix:///run/x ?"
        );
        assert!(
            error("docker-container://x")
                .await
                .contains("docker-container:// is not supported")
        );
        let text = error("unix:///nonexistent/x.sock").await;
        assert!(
            text.starts_with("failed to connect to unix:///nonexistent/x.sock: No such file"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn waiting_ends() {
        let args = ConnectionArgs {
            wait: true,
            timeout: 1,
            ..ConnectionArgs::default()
        };
        let error = connect("unix:///nonexistent/x.sock", &args).await.unwrap_err();
        assert!(error.to_string().contains("timed out"));
    }

    #[test]
    fn tls_is_given_one_way() {
        let dir = tempfile::tempdir().unwrap();
        let args = ConnectionArgs {
            tlsdir: Some(dir.path().to_owned()),
            ..ConnectionArgs::default()
        };
        assert!(
            tls_config("h:1", &args)
                .unwrap_err()
                .to_string()
                .contains("ca.pem or ca.crt")
        );
        let both = ConnectionArgs {
            tlscert: Some("x".into()),
            ..args
        };
        assert!(
            tls_config("h:1", &both)
                .unwrap_err()
                .to_string()
                .contains("at the same time")
        );
        assert!(tls_config("h:1", &ConnectionArgs::default()).unwrap().is_none());
    }
}
