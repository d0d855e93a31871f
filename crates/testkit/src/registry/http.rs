//! Just enough HTTP/1.1: one request after the other on a connection.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{Action, Contents, Seen, Shared, api};

/// A request with its body.
pub(crate) struct Request {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub headers: BTreeMap<String, String>,
    pub body: Bytes,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// An answer.
pub(crate) struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Response {
    pub fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Bytes::new(),
        }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub fn error(status: u16, code: &str, message: &str) -> Self {
        let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
        Self::new(status)
            .header("Content-Type", "application/json")
            .body(body.to_string())
    }
}

/// Serves a connection until it ends.
pub(super) async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    // A client that goes away is no failure of the registry.
    let _ = serve_requests(&shared, stream).await;
}

async fn serve_requests(shared: &Shared, stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some(mut request) = read_head(&mut stream).await? {
        let fault = note(&mut shared.lock(), &request);
        let length = request.header("content-length").parse().unwrap_or(0_usize);
        if let Some(Action::ResetUpload(keep)) = fault {
            let mut body = vec![0; length.min(keep)];
            stream.read_exact(&mut body).await?;
            request.body = body.into();
            let upload = request.path.rsplit('/').next().and_then(|id| id.parse().ok());
            if let Some(upload) = upload.and_then(|id: u64| shared.lock().uploads.get_mut(&id).map(|_| id)) {
                shared
                    .lock()
                    .uploads
                    .entry(upload)
                    .or_default()
                    .extend_from_slice(&request.body);
            }
            return Ok(());
        }
        request.body = read_body(&mut stream, &request, length).await?;
        let mut cut = None;
        let response = match fault {
            None => api::answer(shared, &request),
            Some(Action::Reset | Action::ResetUpload(_)) => return Ok(()),
            Some(Action::Hang) => return std::future::pending().await,
            Some(Action::Status(status, headers, body)) => {
                let response = Response::new(status).body(body);
                headers
                    .into_iter()
                    .fold(response, |response, (name, value)| response.header(name, value))
            }
            Some(Action::Truncate(length)) => {
                cut = Some(length);
                api::answer(shared, &request)
            }
            Some(Action::Corrupt) => {
                let mut response = api::answer(shared, &request);
                let mut body = response.body.to_vec();
                if let Some(first) = body.first_mut() {
                    *first ^= 1;
                }
                response.body = body.into();
                response
            }
            Some(Action::Delay(time)) => {
                tokio::time::sleep(time).await;
                api::answer(shared, &request)
            }
            Some(Action::WrongDigestHeader(digest)) => {
                let mut response = api::answer(shared, &request);
                response
                    .headers
                    .retain(|(name, _)| name != "Docker-Content-Digest");
                response.header("Docker-Content-Digest", digest.to_string())
            }
        };
        let close = write_response(&mut stream, &request, response, cut).await?;
        if close {
            return Ok(());
        }
    }
    Ok(())
}

pub(crate) async fn read_head(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut parts = line.split_ascii_whitespace();
    let (method, target) = (
        parts.next().unwrap_or("").to_owned(),
        parts.next().unwrap_or("").to_owned(),
    );
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Ok(Some(Request {
        method,
        path: path.to_owned(),
        query: parse_query(query),
        headers,
        body: Bytes::new(),
    }))
}

pub(crate) async fn read_body(
    stream: &mut BufReader<TcpStream>,
    request: &Request,
    length: usize,
) -> std::io::Result<Bytes> {
    let mut body = Vec::new();
    if request.header("transfer-encoding") == "chunked" {
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let size = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        body.resize(length, 0);
        stream.read_exact(&mut body).await?;
    }
    Ok(body.into())
}

/// Splits an encoded query or form.
pub(super) fn parse_query(query: &str) -> BTreeMap<String, String> {
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value);
        // A repeated key, such as `scope`, adds to the first.
        out.entry(decode(key))
            .and_modify(|all| *all = format!("{all} {value}"))
            .or_insert(value);
    }
    out
}

fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digits = [bytes.next().unwrap_or(b'0'), bytes.next().unwrap_or(b'0')];
                let digits = std::str::from_utf8(&digits).unwrap_or("00").to_owned();
                out.push(u8::from_str_radix(&digits, 16).unwrap_or(b'?'));
            }
            other => out.push(other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn note(contents: &mut Contents, request: &Request) -> Option<Action> {
    let query: Vec<String> = request
        .query
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let mark = if query.is_empty() { "" } else { "?" };
    contents.seen.push(Seen {
        method: request.method.clone(),
        target: format!("{}{mark}{}", request.path, query.join("&")),
        headers: request.headers.clone(),
    });
    let fault = contents.faults.iter_mut().find(|fault| {
        fault.times > 0
            && (fault.method.is_empty() || fault.method == request.method)
            && request.path.contains(&fault.path)
    })?;
    fault.times -= 1;
    Some(fault.action.clone())
}

/// Writes an answer; true when the connection must end after it.
pub(crate) async fn write_response(
    stream: &mut BufReader<TcpStream>,
    request: &Request,
    response: Response,
    cut: Option<usize>,
) -> std::io::Result<bool> {
    let mut head = format!(
        "HTTP/1.1 {} x\r\nContent-Length: {}\r\n",
        response.status,
        response.body.len()
    );
    if matches!(response.status, 204 | 304) {
        head = format!("HTTP/1.1 {} x\r\n", response.status);
    }
    for (name, value) in &response.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    if request.method != "HEAD" {
        let end = cut.unwrap_or(usize::MAX).min(response.body.len());
        stream.write_all(&response.body[..end]).await?;
    }
    stream.flush().await?;
    Ok(cut.is_some())
}
