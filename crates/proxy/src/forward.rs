//! Passing one request on to a server, and its answer back.

use std::convert::Infallible;
use std::error::Error as _;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, HOST, HeaderName, LOCATION, RANGE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use crate::body::{Note, Watched};
use crate::record::{self, Incomplete, redacted};
use crate::serve::Shared;

/// How long a server may take to be reached.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Headers that are about a connection, not about what it carries.
const CONNECTION_HEADERS: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A body of either origin.
pub(crate) type Answer = BoxBody<Bytes, hyper::Error>;

/// Makes an answer of our own.
pub(crate) fn plain(status: StatusCode, text: &str) -> Response<Answer> {
    let body = Full::new(Bytes::from(format!("{text}\n")));
    let body = body.map_err(|never: Infallible| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// Answers a request for a URL, which the client wrote as `written`.
pub(crate) async fn answer(
    shared: &Shared,
    request: Request<Incoming>,
    url: Url,
    written: &str,
) -> Response<Answer> {
    let method = request.method().clone();
    let url = match decide(shared, &method, url, written).await {
        Ok(url) => url,
        Err(reason) => {
            tracing::debug!(reason, "a request of a step is refused");
            return plain(StatusCode::FORBIDDEN, "Forbidden");
        }
    };
    let shown = redacted(&url).to_string();
    let is_partial = request.headers().contains_key(RANGE);
    let note = |status: StatusCode, redirect| {
        let request = record::Request {
            method: method.to_string(),
            url: shown.clone(),
            status: status.as_u16(),
        };
        shared.record.add_request(request, redirect);
    };
    match exchange(shared, request, &url).await {
        Ok((response, connection)) => {
            let (mut parts, body) = response.into_parts();
            note(parts.status, redirect(&parts.headers, &url));
            strip(&mut parts.headers);
            let is_partial = is_partial || parts.status == StatusCode::PARTIAL_CONTENT;
            let reason = if method != Method::GET {
                Some("method_not_materializable")
            } else {
                is_partial.then_some("partial_response")
            };
            let note = Note {
                record: shared.record.clone(),
                method: method.to_string(),
                url: shown,
                status: parts.status.as_u16(),
                reason,
            };
            Response::from_parts(parts, Watched::new(body, connection, note).boxed())
        }
        Err(error) => {
            note(StatusCode::BAD_GATEWAY, None);
            shared.record.add_incomplete(Incomplete {
                method: method.to_string(),
                url: shown,
                reason: "upstream_error",
            });
            plain(StatusCode::BAD_GATEWAY, &error)
        }
    }
}

/// Asks the policy; returns the URL to use.
async fn decide(shared: &Shared, method: &Method, url: Url, written: &str) -> Result<Url, String> {
    let Some(policy) = &shared.policy else {
        return Ok(url);
    };
    // As BuildKit shows it: a port is named if the client named it.
    let redacted = redacted(&url);
    let shown = if redacted == url {
        written
    } else {
        redacted.as_str()
    };
    let Some(other) = policy.check(shown).await.map_err(|refused| refused.0)? else {
        return Ok(url);
    };
    if *method != Method::GET {
        return Err(format!("{shown} is converted, which is only possible for GET"));
    }
    match Url::parse(&other) {
        Ok(other) if matches!(other.scheme(), "http" | "https") => Ok(other),
        _ => Err(format!("{shown} is converted to an unsupported URL")),
    }
}

/// Where an answer sends the client.
fn redirect(headers: &HeaderMap, url: &Url) -> Option<String> {
    let location = headers.get(LOCATION)?.to_str().ok()?;
    let target = url.join(location).ok()?;
    Some(redacted(&target).to_string())
}

fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(http::header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in CONNECTION_HEADERS {
        headers.remove(name);
    }
}

async fn exchange(
    shared: &Shared,
    mut request: Request<Incoming>,
    url: &Url,
) -> Result<(Response<Incoming>, Driven), String> {
    let host = url.host_str().ok_or("a URL without a host")?;
    let port = url.port_or_known_default().ok_or("a URL without a port")?;
    let address = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let path = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let headers = request.headers_mut();
    strip(headers);
    // What is passed on is what is checksummed.
    headers.remove(ACCEPT_ENCODING);
    headers.insert(
        HOST,
        HeaderValue::from_str(&address).map_err(|error| error.to_string())?,
    );
    *request.version_mut() = http::Version::HTTP_11;
    *request.uri_mut() = path.parse::<Uri>().map_err(|error| error.to_string())?;
    let connecting = tokio::time::timeout(CONNECT_LIMIT, connect(shared, url.scheme(), host, port));
    let (mut sender, connection) = match connecting.await {
        Ok(connected) => connected.map_err(|error| error.to_string())?,
        Err(_) => return Err(format!("{address} does not answer")),
    };
    let response = sender.send_request(request).await;
    let response = response.map_err(|error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })?;
    Ok((response, connection))
}

/// Keeps a connection going, as long as its answer is read; ended when dropped.
#[derive(Debug)]
pub(crate) struct Driven {
    _task: AbortOnDropHandle<()>,
}

async fn connect(
    shared: &Shared,
    scheme: &str,
    host: &str,
    port: u16,
) -> io::Result<(SendRequest<Incoming>, Driven)> {
    // An IPv6 address is written in brackets.
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let stream = shared.dial.connect(name, port).await?;
    stream.set_nodelay(true)?;
    if scheme == "http" {
        return handshake(TokioIo::new(stream)).await;
    }
    let server = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(shared.authority.upstream());
    handshake(TokioIo::new(connector.connect(server, stream).await?)).await
}

async fn handshake<S>(stream: S) -> io::Result<(SendRequest<Incoming>, Driven)>
where
    S: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(stream).await.map_err(io::Error::other)?;
    let driving = tokio::spawn(async move {
        // Its failure is the request's or the body's.
        let _ = connection.await;
    });
    let driven = Driven {
        _task: AbortOnDropHandle::new(driving),
    };
    Ok((sender, driven))
}
