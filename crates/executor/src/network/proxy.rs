//! Networks of containers that reach nothing but a proxy.
//!
//! The container is in a namespace with nothing but a loopback device, and the proxy listens there. The proxy itself runs in
//! the daemon; what it connects to it reaches from another namespace, the egress.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::{TcpSocket, TcpStream};

use super::{Hold, NetworkError, namespace};

/// A container's network with a place for its proxy.
#[derive(Debug)]
pub struct ProxyNetwork {
    /// Accepts the container's connections, on its loopback device. Does not block.
    pub listener: TcpListener,
    /// Leads to where the proxy may connect to.
    pub egress: Egress,
    /// What a request is given as its `namespace`.
    pub namespace: Arc<OwnedFd>,
}

/// Where connections are made from. Cheap to clone; what it holds is given back with the last copy.
#[derive(Clone, Debug)]
pub struct Egress {
    /// `None`: the daemon's own namespace.
    hold: Option<Hold>,
}

impl ProxyNetwork {
    /// Makes one.
    pub(crate) async fn new(egress: Option<Hold>) -> Result<Self, NetworkError> {
        let made = tokio::task::spawn_blocking(|| {
            let bound = Mutex::new(None);
            let namespace = namespace::make(|_| {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                listener.set_nonblocking(true)?;
                *bound.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
                Ok(())
            })?;
            let listener = bound.into_inner().unwrap_or_else(PoisonError::into_inner);
            let listener = listener.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
            Ok((namespace, listener))
        });
        let made = made.await.map_err(io::Error::other).flatten();
        let (namespace, listener) = made.map_err(|source| NetworkError::System {
            action: "make a network for a proxy".to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            egress: Egress { hold: egress },
            namespace: Arc::new(namespace),
        })
    }
}

impl Egress {
    /// Connects to an address. Dropping the future gives up.
    ///
    /// # Errors
    /// As `connect(2)`.
    pub async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        self.socket(address.is_ipv4()).await?.connect(address).await
    }

    async fn socket(&self, is_v4: bool) -> io::Result<TcpSocket> {
        let Some(hold) = self.hold.clone() else {
            return if is_v4 {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            };
        };
        let family = if is_v4 {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        // A socket belongs to the namespace in which it was made.
        let made = tokio::task::spawn_blocking(move || {
            let gone = || io::Error::from(io::ErrorKind::NotConnected);
            let namespace = hold.namespace().ok_or_else(gone)?;
            namespace::within(namespace, || {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
            })
        });
        let socket = made.await.map_err(io::Error::other)??;
        Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(socket)))
    }
}
