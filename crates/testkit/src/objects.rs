//! Object stores in the test's process: S3 (path style), Azure's block blobs and GitHub's cache service in both of its
//! protocols, on one loopback port, with faults on request.
//!
//! Paths: `/s3/<bucket>/<key>`, `/azure/<container>/<blob>`, `/github/…`; the service's signed URLs are below `/signed/`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use oci::Digest;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::registry::http::{Request, Response, read_body, read_head, write_response};
use crate::registry::{Action, Fault, Seen};

#[derive(Debug, Default)]
struct Contents {
    /// Objects by path, with how often each was written.
    objects: BTreeMap<String, (Bytes, usize)>,
    /// Parts of uploads and blocks, by what they belong to.
    parts: BTreeMap<String, BTreeMap<String, Bytes>>,
    /// GitHub's entries: key, number, and whether it is committed.
    entries: Vec<(String, usize, bool)>,
    faults: Vec<Fault>,
    seen: Vec<Seen>,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    contents: Mutex<Contents>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct Objects {
    shared: Arc<Shared>,
    serving: AbortHandle,
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Objects {
    /// Starts empty stores.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port");
        let address = listener.local_addr().expect("a bound listener");
        let shared = Arc::new(Shared {
            address,
            contents: Mutex::default(),
        });
        let state = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(Arc::clone(&state), stream));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            shared,
            serving: task.abort_handle(),
        }
    }

    /// The URL of one of the stores: `s3`, `azure` or `github`.
    pub fn url(&self, store: &str) -> String {
        format!("http://{}/{store}", self.shared.address)
    }

    /// The paths of all objects.
    pub fn paths(&self) -> Vec<String> {
        self.shared.lock().objects.keys().cloned().collect()
    }

    /// An object.
    pub fn object(&self, path: &str) -> Option<Bytes> {
        self.shared
            .lock()
            .objects
            .get(path)
            .map(|(bytes, _)| bytes.clone())
    }

    /// How often an object was written.
    pub fn writes(&self, path: &str) -> usize {
        self.shared
            .lock()
            .objects
            .get(path)
            .map_or(0, |(_, writes)| *writes)
    }

    /// Removes the objects whose path contains a text; GitHub's entries go with theirs.
    pub fn remove(&self, part: &str) {
        let mut contents = self.shared.lock();
        contents.objects.retain(|path, _| !path.contains(part));
        contents.entries.retain(|(key, ..)| !key.contains(part));
    }

    /// Changes the bytes of the objects whose path, or GitHub's key, contains a text.
    pub fn damage(&self, part: &str, change: impl Fn(&mut Vec<u8>)) {
        let mut contents = self.shared.lock();
        let numbered = contents.entries.iter().filter(|(key, ..)| key.contains(part));
        let signed: Vec<String> = numbered
            .map(|(_, number, _)| format!("/signed/{number}"))
            .collect();
        for (path, (bytes, _)) in &mut contents.objects {
            if path.contains(part) || signed.contains(path) {
                let mut changed = bytes.to_vec();
                change(&mut changed);
                *bytes = changed.into();
            }
        }
    }

    /// GitHub's keys that are committed.
    pub fn keys(&self) -> Vec<String> {
        let contents = self.shared.lock();
        let committed = contents.entries.iter().filter(|(.., committed)| *committed);
        committed.map(|(key, ..)| key.clone()).collect()
    }

    /// Reserves one of GitHub's keys as somebody who never writes it.
    pub fn block(&self, key: &str) {
        let mut contents = self.shared.lock();
        let number = contents.entries.len() + 1;
        contents.entries.push((key.to_owned(), number, false));
    }

    /// Arranges a fault; faults are tried in the order they were arranged.
    pub fn fault(&self, method: &'static str, path: &str, times: usize, action: Action) {
        self.shared.lock().faults.push(Fault {
            method,
            path: path.to_owned(),
            times,
            action,
        });
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    // A client that goes away is no failure of the server.
    let _ = serve_requests(&shared, stream).await;
}

async fn serve_requests(shared: &Shared, stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(mut request) = read_head(&mut stream).await? {
        let fault = note(&mut shared.lock(), &request);
        let length = request.header("content-length").parse().unwrap_or(0_usize);
        request.body = read_body(&mut stream, &request, length).await?;
        let mut cut = None;
        let response = match fault {
            Some(Action::Reset) => return Ok(()),
            Some(Action::Status(status, headers, body)) => headers
                .into_iter()
                .fold(Response::new(status).body(body), |response, (name, value)| {
                    response.header(name, value)
                }),
            Some(Action::Truncate(length)) => {
                cut = Some(length);
                answer(shared, &request)
            }
            Some(other) => panic!("{other:?} is no fault of an object store"),
            None => answer(shared, &request),
        };
        if write_response(&mut stream, &request, response, cut).await? {
            return Ok(());
        }
    }
    Ok(())
}

fn note(contents: &mut Contents, request: &Request) -> Option<Action> {
    contents.seen.push(Seen {
        method: request.method.clone(),
        target: request.path.clone(),
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

fn answer(shared: &Shared, request: &Request) -> Response {
    let mut contents = shared.lock();
    let path = request.path.replace("%3A", ":").replace("%23", "#");
    match path.split('/').nth(1) {
        Some("s3") => s3(&mut contents, request, &path),
        Some("azure") if !request.header("authorization").starts_with("SharedKey acc:") => {
            xml(403, "AuthenticationFailed")
        }
        Some("azure") => azure(&mut contents, request, &path),
        // Whoever has the URL needs nothing else, and must not tell who they are.
        Some("signed") if request.header("authorization").is_empty() => azure(&mut contents, request, &path),
        Some("github") if request.header("authorization").starts_with("Bearer ") => {
            github(&mut contents, request, &path, shared.address)
        }
        _ => Response::new(403),
    }
}

fn xml(status: u16, code: &str) -> Response {
    let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
    Response::new(status).body(text)
}

fn write(contents: &mut Contents, path: &str, bytes: Bytes) {
    let entry = contents.objects.entry(path.to_owned()).or_default();
    *entry = (bytes, entry.1 + 1);
}

fn read(contents: &Contents, request: &Request, path: &str, code: &str) -> Response {
    let Some((bytes, _)) = contents.objects.get(path) else {
        return xml(404, code);
    };
    let from = request.header("range").strip_prefix("bytes=");
    let from = from.and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Response::new(206)
                .header("Content-Range", range)
                .body(bytes.slice(from..))
        }
        Some(_) => Response::new(416),
        // Long ago, so that whoever refreshes objects does.
        None => Response::new(200)
            .header("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
            .body(bytes.clone()),
    }
}

fn s3(contents: &mut Contents, request: &Request, path: &str) -> Response {
    let digest = Digest::sha256(&request.body).to_string();
    let is_signed = request
        .header("authorization")
        .starts_with("AWS4-HMAC-SHA256 Credential=id/");
    if !is_signed || digest.strip_prefix("sha256:") != Some(request.header("x-amz-content-sha256")) {
        return xml(403, "SignatureDoesNotMatch");
    }
    let query = |name: &str| request.query.get(name).cloned();
    match (request.method.as_str(), query("uploadId")) {
        ("GET" | "HEAD", _) => read(contents, request, path, "NoSuchKey"),
        ("PUT", Some(upload)) => {
            let number = query("partNumber").unwrap_or_default();
            let parts = contents.parts.entry(upload).or_default();
            parts.insert(format!("{number:0>5}"), request.body.clone());
            Response::new(200).header("ETag", format!("\"{number}\""))
        }
        ("PUT", None) if !request.header("x-amz-copy-source").is_empty() => {
            let from = request.header("x-amz-copy-source").replace("%3A", ":");
            let Some((bytes, _)) = contents.objects.get(&format!("/s3/{from}")).cloned() else {
                return xml(404, "NoSuchKey");
            };
            write(contents, path, bytes);
            Response::new(200)
        }
        ("PUT", None) => {
            write(contents, path, request.body.clone());
            Response::new(200)
        }
        ("POST", None) if request.query.contains_key("uploads") => {
            let upload = format!("up/{}", contents.seen.len());
            Response::new(200).body(format!("<R><UploadId>{upload}</UploadId></R>"))
        }
        ("POST", Some(upload)) => {
            let parts = contents.parts.remove(&upload).unwrap_or_default();
            let listed = String::from_utf8_lossy(&request.body).matches("<Part>").count();
            if listed != parts.len() {
                return xml(400, "InvalidPart");
            }
            write(
                contents,
                path,
                parts.into_values().collect::<Vec<_>>().concat().into(),
            );
            Response::new(200)
        }
        ("DELETE", Some(upload)) => {
            contents.parts.remove(&upload);
            Response::new(204)
        }
        _ => xml(405, "MethodNotAllowed"),
    }
}

fn azure(contents: &mut Contents, request: &Request, path: &str) -> Response {
    let query = |name: &str| request.query.get(name).map_or("", String::as_str);
    let exists = contents.objects.contains_key(path);
    let refused = request.header("if-none-match") == "*" && exists;
    match (request.method.as_str(), query("comp")) {
        ("GET" | "HEAD", _) if query("restype") == "container" => {
            read(contents, request, path, "ContainerNotFound")
        }
        ("GET" | "HEAD", _) => read(contents, request, path, "BlobNotFound"),
        ("PUT", "block") => {
            let parts = contents.parts.entry(path.to_owned()).or_default();
            parts.insert(query("blockid").to_owned(), request.body.clone());
            Response::new(201)
        }
        ("PUT", _) if refused => xml(409, "BlobAlreadyExists"),
        ("PUT", "blocklist") => {
            let parts = contents.parts.remove(path).unwrap_or_default();
            write(
                contents,
                path,
                parts.into_values().collect::<Vec<_>>().concat().into(),
            );
            Response::new(201)
        }
        ("PUT", _) if query("restype") == "container" || request.header("x-ms-blob-type") == "BlockBlob" => {
            write(contents, path, request.body.clone());
            Response::new(201)
        }
        _ => xml(400, "UnsupportedHttpVerb"),
    }
}

fn github(contents: &mut Contents, request: &Request, path: &str, address: SocketAddr) -> Response {
    let json: serde_json::Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let text = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
    let reply = |json: serde_json::Value| Response::new(200).body(json.to_string());
    let signed = |number: usize| format!("http://{address}/signed/{number}?sig=secret");
    let method = path.rsplit('/').next().unwrap_or_default();
    match (request.method.as_str(), method) {
        ("GET", "cache") => {
            let wanted = request.query.get("keys").cloned().unwrap_or_default();
            match find(contents, &wanted) {
                Some((key, number)) => {
                    reply(serde_json::json!({"cacheKey": key, "archiveLocation": signed(number)}))
                }
                None => Response::new(204),
            }
        }
        ("POST", "GetCacheEntryDownloadURL") => match find(contents, &text("key")) {
            Some((key, number)) => reply(
                serde_json::json!({"ok": true, "matched_key": key, "signed_download_url": signed(number)}),
            ),
            None => reply(serde_json::json!({"ok": false})),
        },
        ("POST", "caches" | "CreateCacheEntry") => {
            let key = text("key");
            if contents.entries.iter().any(|(known, ..)| *known == key) {
                let body = r#"{"typeKey":"ArtifactCacheItemAlreadyExistsException","code":"already_exists","message":"Cache already exists"}"#;
                return Response::new(409).body(body);
            }
            let number = contents.entries.len() + 1;
            contents.entries.push((key, number, false));
            reply(serde_json::json!({"cacheId": number, "ok": true, "signed_upload_url": signed(number)}))
        }
        ("POST", "FinalizeCacheEntryUpload") => {
            let key = text("key");
            let entry = contents.entries.iter_mut().find(|(known, ..)| *known == key);
            let ok = entry.map(|entry| entry.2 = true).is_some();
            reply(serde_json::json!({"ok": ok, "entry_id": "1"}))
        }
        ("GET", "caches") => {
            let keys = contents.entries.iter().filter(|(.., committed)| *committed);
            let keys: Vec<_> = keys.map(|(key, ..)| serde_json::json!({"key": key})).collect();
            reply(serde_json::json!({"total_count": keys.len(), "actions_caches": keys}))
        }
        ("PATCH" | "POST", number) => github_bytes(contents, request, number),
        _ => Response::new(404),
    }
}

/// The bytes of a reserved entry in the first protocol, and its end.
fn github_bytes(contents: &mut Contents, request: &Request, number: &str) -> Response {
    let path = format!("/signed/{number}");
    if request.method == "PATCH" {
        let range = request.header("content-range").to_owned();
        let start = range.trim_start_matches("bytes ").split('-').next();
        let parts = contents.parts.entry(path).or_default();
        parts.insert(
            format!("{:0>12}", start.unwrap_or_default()),
            request.body.clone(),
        );
        return Response::new(204);
    }
    let parts = contents.parts.remove(&path).unwrap_or_default();
    let bytes: Bytes = parts.into_values().collect::<Vec<_>>().concat().into();
    let json: serde_json::Value = serde_json::from_slice(&request.body).unwrap_or_default();
    if json["size"].as_u64() != u64::try_from(bytes.len()).ok() {
        return Response::new(400);
    }
    write(contents, &path, bytes);
    for entry in &mut contents.entries {
        entry.2 |= entry.1.to_string() == number;
    }
    Response::new(204)
}

/// The youngest committed entry whose key starts like the one that is wanted.
fn find(contents: &Contents, wanted: &str) -> Option<(String, usize)> {
    let found = contents
        .entries
        .iter()
        .rev()
        .find(|(key, _, committed)| *committed && key.starts_with(wanted))?;
    Some((found.0.clone(), found.1))
}
