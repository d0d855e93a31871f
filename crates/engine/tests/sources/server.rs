//! A small web server on the loopback: files with ETags, redirects, and Git's own HTTP backend.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// A request as received.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub target: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// An answer: status, headers, body.
#[derive(Clone, Debug, Default)]
pub struct Answer(pub u16, pub Vec<(String, String)>, pub Vec<u8>);

type Handler = dyn Fn(&Seen) -> Answer + Send + Sync;

/// A server that ends with the test's process.
pub struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (seen, handler): (_, Arc<Handler>) = (Arc::clone(&log), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                let Ok(stream) = stream else { return };
                std::thread::spawn(move || serve(stream, &seen, &*handler));
            }
        });
        Self { address, log }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn take_log(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Seen>>, handler: &Handler) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let body = body(&mut reader, &headers)?;
    let seen = Seen {
        method,
        target,
        headers,
        body,
    };
    let Answer(status, headers, body) = handler(&seen);
    let is_head = seen.method == "HEAD";
    log.lock().unwrap().push(seen);
    let mut stream = stream;
    let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n");
    // Who lies about the length says so, and whoever sends chunks makes them.
    let is_framed = |name: &str| matches!(name, "Content-Length" | "Transfer-Encoding");
    if !headers.iter().any(|(name, _)| is_framed(name)) {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    headers
        .iter()
        .for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if !is_head {
        stream.write_all(&body).ok()?;
    }
    Some(())
}

fn body(reader: &mut impl BufRead, headers: &BTreeMap<String, String>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    if headers
        .get("transfer-encoding")
        .is_some_and(|value| value == "chunked")
    {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let length = u64::from_str_radix(line.trim(), 16).ok()?;
            reader.by_ref().take(length).read_to_end(&mut body).ok()?;
            reader.read_line(&mut line).ok()?;
            if length == 0 {
                return Some(body);
            }
        }
    }
    let length = headers
        .get("content-length")
        .and_then(|value| value.parse().ok())
        .unwrap_or(0);
    reader.by_ref().take(length).read_to_end(&mut body).ok()?;
    Some(body)
}

/// Answers as `git http-backend` does for the repositories below `root`.
pub fn git_backend(root: PathBuf) -> impl Fn(&Seen) -> Answer + Send + Sync {
    move |seen| {
        let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        let mut command = Command::new("git");
        command
            .args(["-c", "safe.directory=*", "http-backend"])
            .env("GIT_PROJECT_ROOT", &root);
        command
            .env("GIT_HTTP_EXPORT_ALL", "1")
            .env("PATH_INFO", path)
            .env("QUERY_STRING", query);
        command
            .env("REQUEST_METHOD", &seen.method)
            .env("REMOTE_ADDR", "127.0.0.1");
        let header = |name: &str| seen.headers.get(name).cloned().unwrap_or_default();
        command
            .env("CONTENT_TYPE", header("content-type"))
            .env("GIT_PROTOCOL", header("git-protocol"));
        command.env("HTTP_CONTENT_ENCODING", header("content-encoding"));
        command.env("CONTENT_LENGTH", seen.body.len().to_string());
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&seen.body).unwrap();
        let output = child.wait_with_output().unwrap().stdout;
        let end = output
            .windows(4)
            .position(|bytes| bytes == b"\r\n\r\n")
            .unwrap_or(0);
        let head = String::from_utf8_lossy(&output[..end]).into_owned();
        let mut answer = Answer(
            200,
            Vec::new(),
            output.get(end + 4..).unwrap_or_default().to_vec(),
        );
        for (name, value) in head.lines().filter_map(|line| line.split_once(": ")) {
            match name {
                "Status" => answer.0 = value[..3].parse().unwrap(),
                _ => answer.1.push((name.to_owned(), value.to_owned())),
            }
        }
        answer
    }
}
