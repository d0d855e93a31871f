//! TLS settings: the system's authorities and further ones, a client's certificate, or no verification.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error("failed to read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PemError,
    },
    /// Certificates or keys do not fit together.
    #[error("the TLS settings cannot be used: {0}")]
    Settings(#[from] rustls::Error),
}

/// How a server is verified, and what it is shown. Files are PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Files with certificates that are trusted beside the system's authorities.
    pub authorities: Vec<PathBuf>,
    /// Files with the client's certificate and its key.
    pub key_pair: Option<(PathBuf, PathBuf)>,
    /// Whether any certificate is accepted.
    pub is_insecure: bool,
}

impl ClientTls {
    /// Reads the files and makes the settings; no application protocol is chosen. Blocking.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn config(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = if self.is_insecure {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
        } else if self.authorities.is_empty() {
            builder.with_root_certificates(system_roots())
        } else {
            builder
                .dangerous()
                .with_custom_certificate_verifier(self.accept_named(provider)?)
        };
        Ok(match &self.key_pair {
            Some((certificate, key)) => {
                let private = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
                builder.with_client_auth_cert(certificates(certificate)?, private)?
            }
            None => builder.with_no_client_auth(),
        })
    }

    fn accept_named(&self, provider: Arc<CryptoProvider>) -> Result<Arc<AcceptNamed>, TlsError> {
        let mut named = Vec::new();
        for path in &self.authorities {
            named.extend(certificates(path)?);
        }
        let mut roots = system_roots();
        let _ = roots.add_parsable_certificates(named.iter().cloned());
        let ordinary = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Arc::new(AcceptNamed { ordinary, named }))
    }
}

fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    // A broken certificate of the system is no reason to trust nobody.
    let _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(path)
        .map_err(unreadable(path))?
        .collect::<Result<_, _>>()
        .map_err(unreadable(path))
}

fn unreadable(path: &Path) -> impl Fn(PemError) -> TlsError {
    let path = path.to_owned();
    move |source| TlsError::Read {
        path: path.clone(),
        source,
    }
}

/// Verifies as usual, and accepts a certificate that is itself named as an authority: people who sign their server's
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
