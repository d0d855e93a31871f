//! The certificate authority in whose name the proxy answers for servers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Servers whose certificates are kept.
const MAX_KEPT: usize = 1024;

/// Why no certificates can be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A certificate could not be made.
    #[error("cannot make a certificate for the proxy")]
    Certificate(#[from] rcgen::Error),
    /// TLS could not be set up.
    #[error("cannot set up TLS for the proxy")]
    Tls(#[from] rustls::Error),
}

/// An authority of this process: its key exists nowhere else.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// By server, with the time at which a new one is made.
    kept: Mutex<BTreeMap<String, (SystemTime, Arc<ServerConfig>)>>,
    upstream: Arc<ClientConfig>,
}

impl Authority {
    /// Makes one, and reads which authorities the system trusts.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn new() -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("BuildKit exec proxy");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        valid_for(&mut params, LIFETIME);
        let pem = params.self_signed(&key)?.pem();
        let mut roots = RootCertStore::empty();
        // A broken certificate in the system's store must not make every server unreachable.
        let _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Ok(Self {
            pem,
            issuer: Issuer::new(params, key),
            kept: Mutex::default(),
            upstream: Arc::new(client_config(roots)?),
        })
    }

    /// Returns the authority's certificate in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The settings by which servers are verified.
    pub(crate) fn upstream(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.upstream)
    }

    /// The settings by which to answer for a server: a name or an address.
    pub(crate) fn answer_for(&self, host: &str) -> Result<Arc<ServerConfig>, AuthorityError> {
        let now = SystemTime::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((until, config)) = kept.get(host)
            && *until > now
        {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(self.make(host)?);
        kept.retain(|_, (until, _)| *until > now);
        if kept.len() >= MAX_KEPT {
            kept.pop_first();
        }
        kept.insert(host.to_owned(), (now + DAY - HOUR, Arc::clone(&config)));
        Ok(config)
    }

    fn make(&self, host: &str) -> Result<ServerConfig, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([host.to_owned()])?;
        params.distinguished_name = name(host);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        valid_for(&mut params, DAY);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|reason| rustls::Error::General(reason.to_owned()))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn client_config(roots: RootCertStore) -> Result<ClientConfig, AuthorityError> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    // Longer ones are not allowed; what counts are the alternative names.
    let common: String = common.chars().take(64).collect();
    name.push(DnType::CommonName, common);
    name
}

/// Clocks differ, so the certificate is valid already.
fn valid_for(params: &mut CertificateParams, time: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - HOUR).into();
    params.not_after = (now + time).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_made_once_for_each_server() {
        let authority = Authority::new().unwrap();
        assert!(authority.pem().starts_with("-----BEGIN CERTIFICATE-----"));
        let first = authority.answer_for("example.test").unwrap();
        let again = authority.answer_for("example.test").unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        for host in ["192.0.2.1", "::1"] {
            assert!(!Arc::ptr_eq(&first, &authority.answer_for(host).unwrap()));
        }
        assert!(authority.answer_for("not a näme").is_err());
        for number in 0..MAX_KEPT / 64 {
            authority.answer_for(&format!("h{number}.test")).unwrap();
        }
        assert!(authority.kept.lock().unwrap().len() <= MAX_KEPT);
    }
}
