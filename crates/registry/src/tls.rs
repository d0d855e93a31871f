//! TLS settings of a registry: those of its configuration and of its directories of certificates.

use std::path::PathBuf;

use registryauth::tls::{ClientTls, TlsError};
use rustls::ClientConfig;

use crate::config::{HostConfig, KeyPair};
use crate::error::ConfigError;

/// Builds the TLS settings for a host.
pub(crate) fn client_config(host: &str, config: &HostConfig) -> Result<ClientConfig, ConfigError> {
    let (authorities, pairs) = pem_files(config)?;
    let tls = ClientTls {
        authorities,
        // TLS servers pick by issuer, registries know one certificate per client: the first pair is presented.
        key_pair: pairs.into_iter().next().map(|pair| (pair.cert, pair.key)),
        is_insecure: config.insecure == Some(true),
    };
    let mut tls = tls.config().map_err(|error| match error {
        TlsError::Read { path, source } => ConfigError::ReadPem { path, source },
        TlsError::Settings(source) => ConfigError::Tls {
            host: host.to_owned(),
            source,
        },
    })?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// The configured files and those of the directories, in name order.
fn pem_files(config: &HostConfig) -> Result<(Vec<PathBuf>, Vec<KeyPair>), ConfigError> {
    let mut authorities = config.ca.clone();
    let mut pairs = config.keypair.clone();
    for dir in &config.tlsconfigdir {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied
                ) =>
            {
                continue;
            }
            Err(source) => {
                return Err(ConfigError::ReadDir {
                    path: dir.clone(),
                    source,
                });
            }
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            match path.extension().and_then(|ext| ext.to_str()) {
                Some("crt") => authorities.push(path),
                Some("cert") => pairs.push(KeyPair {
                    key: path.with_extension("key"),
                    cert: path,
                }),
                _ => {}
            }
        }
    }
    Ok((authorities, pairs))
}
