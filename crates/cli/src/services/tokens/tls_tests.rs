//! Tests against a token server that speaks TLS and demands a certificate of its clients.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use super::*;
use crate::spec::auth_tls;

/// An authority with certificates of its own, all in files.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    name: &'static str,
}

impl Authority {
    /// Makes `NAME.pem` in a directory.
    fn new(dir: &Path, name: &'static str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let pem = params.self_signed(&key).unwrap().pem();
        std::fs::write(dir.join(format!("{name}.pem")), pem).unwrap();
        let issuer = Issuer::new(params, key);
        Self { issuer, name }
    }

    /// Makes `NAME-KIND.pem` and `NAME-KIND.key`.
    fn issue(&self, dir: &Path, kind: &str, usage: ExtendedKeyUsagePurpose) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| dir.join(format!("{}-{kind}.{end}", self.name));
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
    }
}

/// A server that answers every request with a token if the client's certificate is one of `ours`.
struct Server {
    address: SocketAddr,
    is_closed: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Server {
    fn start(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = Arc::new(server_config(dir));
        let is_closed = Arc::new(AtomicBool::default());
        let closed = Arc::clone(&is_closed);
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if closed.load(Ordering::SeqCst) {
                    return;
                }
                // Who fails the handshake is told so by it.
                let _ = answer(stream.unwrap(), &config);
            }
        });
        Self {
            address,
            is_closed,
            serving: Some(serving),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let served = self.serving.take().unwrap().join();
        if !std::thread::panicking() {
            served.unwrap();
        }
    }
}

fn server_config(dir: &Path) -> ServerConfig {
    let certificates = |name: &str| {
        let path = dir.join(name);
        let read = rustls::pki_types::CertificateDer::pem_file_iter(path).unwrap();
        read.map(Result::unwrap)
    };
    let mut clients = RootCertStore::empty();
    clients.add_parsable_certificates(certificates("ours.pem"));
    let provider = Arc::new(ring::default_provider());
    let demand = WebPkiClientVerifier::builder_with_provider(Arc::new(clients), Arc::clone(&provider));
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(demand.build().unwrap())
        .with_single_cert(
            certificates("ours-server.pem").collect(),
            PrivateKeyDer::from_pem_file(dir.join("ours-server.key")).unwrap(),
        )
        .unwrap()
}

fn answer(stream: TcpStream, config: &Arc<ServerConfig>) -> io::Result<()> {
    let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    let mut line = String::new();
    while stream.read_line(&mut line)? > 2 {
        line.clear();
    }
    let (head, body) = super::tests::TOKEN;
    let length = body.len();
    let stream = stream.get_mut();
    write!(
        stream,
        "HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    stream.conn.send_close_notify();
    stream.flush()
}

#[tokio::test]
async fn a_context_reaches_a_server_that_demands_a_certificate() {
    let dir = TempDir::new().unwrap();
    for name in ["ours", "theirs"] {
        let authority = Authority::new(dir.path(), name);
        authority.issue(dir.path(), "server", ExtendedKeyUsagePurpose::ServerAuth);
        authority.issue(dir.path(), "client", ExtendedKeyUsagePurpose::ClientAuth);
    }
    let server = Server::start(dir.path());
    let realm = format!("https://{}/token", server.address);
    let fetch = async |context: &str| {
        let context = context.replace("DIR", &dir.path().to_string_lossy());
        let tokens = Tokens::new(auth_tls(&[context]).unwrap());
        let request = pb::FetchTokenRequest {
            host: "h".to_owned(),
            realm: realm.clone(),
            ..pb::FetchTokenRequest::default()
        };
        let fetched = tokens.fetch(&Account::default(), &request).await;
        fetched
            .map(|answer| answer.token)
            .map_err(|error| error.to_string())
    };
    let shown = "cert=DIR/ours-client.pem,key=DIR/ours-client.key";
    for context in [
        &format!("host=h,ca=DIR/ours.pem,{shown}"),
        &format!("host=h,insecure=true,{shown}"),
        // A certificate that is named itself needs no authority.
        &format!("host=h,ca=DIR/ours-server.pem,{shown}"),
    ] {
        assert_eq!(fetch(context).await, Ok("t".to_owned()), "{context}");
    }
    for (context, reason) in [
        ("host=h,ca=DIR/ours.pem", "CertificateRequired"),
        ("host=h,insecure=true", "CertificateRequired"),
        (
            "host=h,ca=DIR/ours.pem,cert=DIR/theirs-client.pem,key=DIR/theirs-client.key",
            "received fatal alert",
        ),
        (
            "host=h,ca=DIR/ours.pem,cert=DIR/ours-server.pem,key=DIR/ours-server.key",
            "received fatal alert",
        ),
        (&format!("host=h,ca=DIR/theirs.pem,{shown}"), "UnknownIssuer"),
        (&format!("host=h,{shown}"), "UnknownIssuer"),
        // Another host's context is not this one's.
        (&format!("host=other,ca=DIR/ours.pem,{shown}"), "UnknownIssuer"),
        (
            &format!("host=h,ca=DIR/none.pem,{shown}"),
            "failed to read DIR/none.pem",
        ),
        (
            "host=h,ca=DIR/ours.pem,cert=DIR/ours-client.pem,key=DIR/theirs-client.key",
            "the TLS settings cannot be used",
        ),
    ] {
        let error = fetch(context).await.expect_err(context);
        let reason = reason.replace("DIR", &dir.path().to_string_lossy());
        assert!(error.contains(&reason), "{context}: {error}");
    }
}
