//! TLS settings of a registry: the system's authorities, configured ones, client certificates, or no verification.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::{HostConfig, KeyPair};
use crate::error::ConfigError;

/// Builds the TLS settings for a host.
pub(crate) fn client_config(host: &str, config: &HostConfig) -> Result<ClientConfig, ConfigError> {
    let tls_error = |source| ConfigError::Tls {
        host: host.to_owned(),
        source,
    };
    let (authorities, pairs) = pem_files(config)?;
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(tls_error)?;
    let builder = if config.insecure == Some(true) {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
    } else {
        let mut roots = RootCertStore::empty();
        // A broken certificate in the system's store must not make every registry unreachable.
        let _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let mut named = Vec::new();
        for path in &authorities {
            named.extend(read_certificates(path)?);
        }
        let _ = roots.add_parsable_certificates(named.iter().cloned());
        if named.is_empty() {
            builder.with_root_certificates(roots)
        } else {
            let ordinary = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| tls_error(rustls::Error::General(error.to_string())))?;
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AcceptNamed { ordinary, named }))
        }
    };
    let mut tls = match pairs.first() {
        // TLS servers pick by issuer, registries know one certificate per client: the first pair is presented.
        Some(pair) => {
            let key = PrivateKeyDer::from_pem_file(&pair.key).map_err(|source| ConfigError::ReadPem {
                path: pair.key.clone(),
                source,
            })?;
            builder
                .with_client_auth_cert(read_certificates(&pair.cert)?, key)
                .map_err(tls_error)?
        }
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let read = |source| ConfigError::ReadPem {
        path: path.to_owned(),
        source,
    };
    CertificateDer::pem_file_iter(path)
        .map_err(read)?
        .collect::<Result<_, _>>()
        .map_err(read)
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

/// Verifies as usual, and accepts a certificate that is itself named as an authority: people who sign their registry's
/// certificate with its own key name it so, and it is no server's certificate by the letter of the standards. Its names
/// must match; its dates are not looked at.
#[derive(Debug)]
struct AcceptNamed {
    ordinary: Arc<WebPkiServerVerifier>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for AcceptNamed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ordinary =
            self.ordinary
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let Err(refusal) = ordinary else { return ordinary };
        if !self
            .named
            .iter()
            .any(|named| named.as_ref() == end_entity.as_ref())
        {
            return Err(refusal);
        }
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.ordinary.supported_verify_schemes()
    }
}

/// Accepts every certificate but still checks that the peer holds its key.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
