//! Listeners: unix sockets, TCP with or without mutual TLS, and sockets that systemd hands over.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::config::{ConfigError, TlsTable};

/// TLS handshakes that may be under way at once, so that a slow client holds nobody up.
const HANDSHAKES: usize = 64;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Why nothing can be listened at.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be used.
    #[error("{message}")]
    Address {
        /// What is wrong.
        message: String,
    },
    /// The system refuses.
    #[error("failed to listen at {address}")]
    Bind {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate or key cannot be used.
    #[error("could not load {path}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<ListenError> for ConfigError {
    fn from(error: ListenError) -> Self {
        Self::invalid(engine::error::chain_text(&error))
    }
}

/// Who owns a unix socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketOwner {
    /// The user; `None`: this process'.
    pub uid: Option<u32>,
    /// The group; `None`: this process'.
    pub gid: Option<u32>,
}

/// Counts connections that are open.
#[derive(Clone, Debug)]
pub struct OpenConnections(watch::Sender<usize>);

impl Default for OpenConnections {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl OpenConnections {
    /// Waits until no connection is open.
    pub async fn none(&self) {
        let mut count = self.0.subscribe();
        // The sender is held here, so waiting does not fail.
        let _ = count.wait_for(|count| *count == 0).await;
    }

    /// Returns whether no connection is open.
    pub fn is_none(&self) -> bool {
        self.count() == 0
    }

    /// Returns how many are open.
    pub fn count(&self) -> usize {
        *self.0.borrow()
    }

    fn open(&self) -> OpenGuard {
        self.0.send_modify(|count| *count += 1);
        OpenGuard(self.clone())
    }
}

#[derive(Debug)]
struct OpenGuard(OpenConnections);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    io: Io,
    _open: OpenGuard,
}

/// What a connection is made of.
#[derive(Debug)]
enum Io {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A listener, and the name of the socket that goes with it.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket; its file is removed when it is dropped.
    Unix(UnixListener, Option<SocketFile>),
    /// A TCP port.
    Tcp(TcpListener, Option<Acceptor>),
}

/// Removes a socket's file.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl SocketFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A leftover file is replaced by the next daemon.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes TLS connections.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

/// Starts to listen at an address.
///
/// # Errors
/// [`ListenError`] for an unknown scheme or one that the system refuses.
pub fn listen(address: &str, owner: SocketOwner, tls: Option<&Acceptor>) -> Result<Listener, ListenError> {
    let (scheme, rest) = address.split_once("://").ok_or_else(|| ListenError::Address {
        message: format!("address {address} does not contain proto, you meant unix://{address} ?"),
    })?;
    let bind = |source| ListenError::Bind {
        address: address.to_owned(),
        source,
    };
    match scheme {
        "unix" => {
            if tls.is_some() {
                tracing::warn!("TLS is disabled for {address}");
            }
            let path = PathBuf::from(rest);
            let listener = listen_unix(&path, owner).map_err(bind)?;
            Ok(Listener::Unix(listener, Some(SocketFile(path))))
        }
        "tcp" => {
            if tls.is_none() {
                tracing::warn!(
                    "TLS is not enabled for {address}. enabling mutual TLS authentication is highly recommended"
                );
            }
            let listener = std::net::TcpListener::bind(rest).map_err(bind)?;
            Ok(Listener::Tcp(tcp(listener).map_err(bind)?, tls.cloned()))
        }
        "fd" => inherited(rest, tls).map_err(|error| match error {
            Inherited::Message(message) => ListenError::Address { message },
            Inherited::Io(source) => bind(source),
        }),
        _ => Err(ListenError::Address {
            message: format!("addr {address} not supported"),
        }),
    }
}

fn tcp(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Binds a unix socket where perhaps an old one is, for the owner and group only.
fn listen_unix(path: &Path, owner: SocketOwner) -> io::Result<UnixListener> {
    let modes = SocketModes {
        dir: 0o777,
        socket: 0o660,
    };
    let listener = bind_unix(path, modes, |path| match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    })?;
    chown(path, owner.uid, owner.gid)?;
    Ok(listener)
}

/// Who may do what with a unix socket.
#[derive(Clone, Copy)]
pub(crate) struct SocketModes {
    /// Of its directory, if that is made; the process' mask applies.
    pub(crate) dir: u32,
    /// Of the socket, whatever the process' mask.
    pub(crate) socket: u32,
}

/// Binds a unix socket. Its directory is made; `clear` decides on what is in its place.
pub(crate) fn bind_unix(
    path: &Path,
    modes: SocketModes,
    clear: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(modes.dir)
            .create(dir)?;
    }
    clear(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(modes.socket))?;
    Ok(listener)
}

enum Inherited {
    Message(String),
    Io(io::Error),
}

/// Takes the first socket that the process was started with.
fn inherited(name: &str, tls: Option<&Acceptor>) -> Result<Listener, Inherited> {
    if !name.is_empty() {
        return Err(Inherited::Message(
            "fd:// with a name is not supported, use fd://".to_owned(),
        ));
    }
    let mut sockets = listenfd::ListenFd::from_env();
    if sockets.len() == 0 {
        let message = "no sockets found via socket activation: make sure the service was started by systemd";
        return Err(Inherited::Message(message.to_owned()));
    }
    match sockets.take_unix_listener(0) {
        Ok(Some(listener)) => {
            listener.set_nonblocking(true).map_err(Inherited::Io)?;
            return UnixListener::from_std(listener)
                .map(|listener| Listener::Unix(listener, None))
                .map_err(Inherited::Io);
        }
        Ok(None) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        Err(error) => return Err(Inherited::Io(error)),
    }
    let listener = sockets.take_tcp_listener(0).map_err(Inherited::Io)?;
    let listener =
        listener.ok_or_else(|| Inherited::Message("the socket of fd:// was taken already".to_owned()))?;
    Ok(Listener::Tcp(tcp(listener).map_err(Inherited::Io)?, tls.cloned()))
}

/// Reads the certificates of TCP listeners; without any, there is no TLS.
///
/// # Errors
/// For files that cannot be used, and for a certificate without a key.
pub fn acceptor(table: &TlsTable) -> Result<Option<Acceptor>, ListenError> {
    if table.cert.is_empty() && table.key.is_empty() {
        return Ok(None);
    }
    if table.cert.is_empty() || table.key.is_empty() {
        let message = "you must specify key and cert file if one is specified".to_owned();
        return Err(ListenError::Address { message });
    }
    let chain = certificates(&table.cert)?;
    let key = PrivateKeyDer::from_pem_file(&table.key).map_err(|error| unusable(&table.key, error))?;
    let builder =
        ServerConfig::builder_with_provider(Arc::new(tokio_rustls::rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&table.cert, error))?;
    let builder = if table.ca.is_empty() {
        builder.with_no_client_auth()
    } else {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&table.ca)? {
            roots
                .add(certificate)
                .map_err(|error| unusable(&table.ca, error))?;
        }
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.map_err(|error| unusable(&table.ca, error))?)
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| unusable(&table.cert, error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Some(Acceptor(TlsAcceptor::from(Arc::new(config)))))
}

fn unusable(path: &str, source: impl std::error::Error + Send + Sync + 'static) -> ListenError {
    ListenError::Certificate {
        path: PathBuf::from(path),
        source: Box::new(source),
    }
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, ListenError> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| unusable(path, error))?;
    let all: Result<Vec<_>, _> = read.collect();
    let all = all.map_err(|error| unusable(path, error))?;
    if all.is_empty() {
        return Err(unusable(
            path,
            io::Error::new(io::ErrorKind::InvalidData, "no certificate in it"),
        ));
    }
    Ok(all)
}

impl Listener {
    /// Names the address, for logs.
    pub fn name(&self) -> String {
        match self {
            Self::Unix(_, Some(file)) => file.0.display().to_string(),
            Self::Unix(_, None) => "inherited socket".to_owned(),
            Self::Tcp(listener, _) => listener
                .local_addr()
                .map_or_else(|_| "tcp".to_owned(), |at| at.to_string()),
        }
    }

    /// Returns the port of a TCP listener.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Unix(..) => None,
            Self::Tcp(listener, _) => listener.local_addr().ok().map(|at| at.port()),
        }
    }

    /// Accepts connections; those that break before they are made are left out.
    pub fn connections(
        self,
        open: OpenConnections,
    ) -> Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>> {
        let counted = move |io| {
            Ok(Connection {
                io,
                _open: open.open(),
            })
        };
        match self {
            Self::Unix(listener, file) => {
                let accepted = stream::unfold((listener, file), |(listener, file)| async {
                    loop {
                        match listener.accept().await {
                            Ok((stream, _)) => return Some((Io::Unix(stream), (listener, file))),
                            Err(error) => pause(&error).await,
                        }
                    }
                });
                Box::pin(accepted.map(counted))
            }
            Self::Tcp(listener, None) => Box::pin(accepted_tcp(listener).map(Io::Tcp).map(counted)),
            Self::Tcp(listener, Some(acceptor)) => {
                let handshakes =
                    accepted_tcp(listener).map(move |stream| handshake(acceptor.clone(), stream));
                Box::pin(
                    handshakes
                        .buffer_unordered(HANDSHAKES)
                        .filter_map(std::future::ready)
                        .map(counted),
                )
            }
        }
    }
}

fn accepted_tcp(listener: TcpListener) -> impl Stream<Item = TcpStream> + Send {
    stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Merely slower without.
                    let _ = stream.set_nodelay(true);
                    return Some((stream, listener));
                }
                Err(error) => pause(&error).await,
            }
        }
    })
}

/// Waits a little after a failure to accept: when descriptors run out, giving up on the listener would be worse.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
}

async fn handshake(acceptor: Acceptor, stream: TcpStream) -> Option<Io> {
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.0.accept(stream)).await {
        Ok(Ok(stream)) => Some(Io::Tls(Box::new(stream))),
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Io::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn unix_sockets_replace_old_ones_and_go_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/x.sock");
        let address = format!("unix://{}", path.display());
        drop(listen(&address, SocketOwner::default(), None).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        let listener = listen(&address, SocketOwner::default(), None).unwrap();
        let open = OpenConnections::default();
        let mut connections = listener.connections(open.clone());
        let (client, accepted) = tokio::join!(UnixStream::connect(&path), connections.next());
        client.unwrap();
        let connection = accepted.unwrap().unwrap();
        assert_eq!(*open.0.borrow(), 1);
        drop(connection);
        open.none().await;
    }

    #[tokio::test]
    async fn bad_addresses_are_named() {
        let error = |address| {
            listen(address, SocketOwner::default(), None)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error("/x"),
            "address /x does not contain proto, you meant unix:///x ?"
        );
        assert_eq!(error("ftp://x"), "addr ftp://x not supported");
        assert!(error("fd://").contains("systemd") || error("fd://").contains("socket"));
        let port = listen("tcp://127.0.0.1:0", SocketOwner::default(), None)
            .unwrap()
            .port();
        assert!(port.is_some_and(|port| port > 0));
    }

    #[test]
    fn a_certificate_needs_its_key() {
        assert!(acceptor(&TlsTable::default()).unwrap().is_none());
        let table = TlsTable {
            cert: "x".to_owned(),
            ..TlsTable::default()
        };
        assert!(acceptor(&table).unwrap_err().to_string().contains("key and cert"));
        let table = TlsTable {
            cert: "/nonexistent".to_owned(),
            key: "/nonexistent".to_owned(),
            ca: String::new(),
        };
        assert!(acceptor(&table).unwrap_err().to_string().contains("/nonexistent"));
    }
}
