//! Accepting a container's connections.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::authority::Authority;
use crate::forward::{Answer, answer, plain};
use crate::record::Record;

/// Connections of one container that are served at once.
const MAX_CONNECTIONS: usize = 256;
/// How long a client may take to say what it wants.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// How long connections may take to end once the container is gone.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Reaches servers.
#[async_trait]
pub trait Dial: Send + Sync + fmt::Debug {
    /// Connects to a host, a name or an address without brackets. Dropping the future gives up.
    async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream>;
}

/// Decides which requests may be made.
#[async_trait]
pub trait Policy: Send + Sync + fmt::Debug {
    /// Decides on a URL, credentials hidden; returns the URL to use in its place, if another is.
    async fn check(&self, url: &str) -> Result<Option<String>, Refused>;
}

/// Why a request may not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// The proxy of one container. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Proxy(pub(crate) Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) authority: Arc<Authority>,
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) policy: Option<Arc<dyn Policy>>,
    pub(crate) record: Record,
}

impl Proxy {
    /// Makes a proxy; without a policy everything is allowed.
    pub fn new(
        authority: Arc<Authority>,
        dial: Arc<dyn Dial>,
        policy: Option<Arc<dyn Policy>>,
        record: Record,
    ) -> Self {
        Self(Arc::new(Shared {
            authority,
            dial,
            policy,
            record,
        }))
    }

    /// Serves connections until `ended`, and then those that are open for a moment. Dropping the future ends all at once.
    ///
    /// # Errors
    /// If nothing can be accepted any more.
    pub async fn serve(&self, listener: TcpListener, ended: &CancellationToken) -> io::Result<()> {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                    let (stream, _) = accepted?;
                    connections.spawn(serve_connection(Arc::clone(&self.0), stream));
                }
                Some(_) = connections.join_next() => {}
                () = ended.cancelled() => break,
            }
        }
        let finish = async { while connections.join_next().await.is_some() {} };
        // What is still open is noted as not read to its end.
        let _ = tokio::time::timeout(END_LIMIT, finish).await;
        connections.shutdown().await;
        Ok(())
    }
}

/// A client's wish for a tunnel.
struct Tunnel {
    authority: http::uri::Authority,
    upgrade: OnUpgrade,
}

async fn serve_connection(shared: Arc<Shared>, stream: TcpStream) {
    let wish = Mutex::new(None);
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        let wish = &wish;
        async move { Ok::<_, hyper::Error>(first(&shared, wish, request).await) }
    });
    let served = builder()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a step's connection ended early");
    }
    let wish = wish.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(tunnel) = wish {
        serve_tunnel(&shared, tunnel).await;
    }
}

fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT);
    builder
}

async fn first(
    shared: &Shared,
    wish: &Mutex<Option<Tunnel>>,
    mut request: Request<Incoming>,
) -> Response<Answer> {
    if request.method() == Method::CONNECT {
        let Some(authority) = request.uri().authority().cloned() else {
            return plain(StatusCode::BAD_REQUEST, "Bad Request");
        };
        let upgrade = hyper::upgrade::on(&mut request);
        *wish.lock().unwrap_or_else(PoisonError::into_inner) = Some(Tunnel { authority, upgrade });
        return empty();
    }
    let written = if request.uri().scheme().is_some() {
        request.uri().to_string()
    } else {
        let host = request.headers().get(http::header::HOST);
        let host = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
        format!("http://{host}{}", request.uri())
    };
    let url = Url::parse(&written).ok();
    match url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host()) {
        Some(url) => answer(shared, request, url, &written).await,
        None => plain(StatusCode::BAD_REQUEST, "Bad Request"),
    }
}

fn empty() -> Response<Answer> {
    use http_body_util::BodyExt as _;
    let body = http_body_util::Empty::new();
    Response::new(
        body.map_err(|never: std::convert::Infallible| match never {})
            .boxed(),
    )
}

/// Answers in a server's name.
async fn serve_tunnel(shared: &Arc<Shared>, tunnel: Tunnel) {
    let Tunnel { authority, upgrade } = tunnel;
    let host = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let making = {
        let (shared, host) = (Arc::clone(shared), host.clone());
        tokio::task::spawn_blocking(move || shared.authority.answer_for(&host))
    };
    let config = match making.await {
        Ok(Ok(config)) => config,
        Ok(Err(error)) => return tracing::debug!(%error, host, "no certificate for a server"),
        Err(_) => return,
    };
    let Ok(upgraded) = upgrade.await else { return };
    let accepting = TlsAcceptor::from(config).accept(TokioIo::new(upgraded));
    let stream = match tokio::time::timeout(HEADER_LIMIT, accepting).await {
        Ok(Ok(stream)) => stream,
        // It does not trust us, or speaks something else.
        Ok(Err(error)) => return tracing::debug!(%error, host, "a step refuses to be answered"),
        Err(_) => return,
    };
    let service = service_fn(|request: Request<Incoming>| {
        let written = format!("https://{authority}{}", path(&request));
        async move {
            Ok::<_, hyper::Error>(match Url::parse(&written) {
                Ok(url) => answer(shared, request, url, &written).await,
                Err(_) => plain(StatusCode::BAD_REQUEST, "Bad Request"),
            })
        }
    });
    let served = builder().serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!(%error, host, "a step's connection ended early");
    }
}

fn path(request: &Request<Incoming>) -> String {
    let path = request.uri().path_and_query();
    path.map_or_else(|| "/".to_owned(), ToString::to_string)
}
