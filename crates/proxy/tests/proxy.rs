//! The proxy against servers and clients on the loopback device.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use oci::Digest;
use proxy::{Authority, Dial, Policy, Proxy, Record, Refused};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Reaches one server under every name but `gone.test`, and no address.
#[derive(Debug)]
struct To(std::net::SocketAddr);

#[async_trait]
impl Dial for To {
    async fn connect(&self, host: &str, _: u16) -> io::Result<TcpStream> {
        if host == "gone.test" || host.parse::<std::net::IpAddr>().is_ok() {
            return Err(io::Error::other("no such host"));
        }
        TcpStream::connect(self.0).await
    }
}

/// Notes what it is asked; denies `/denied`, converts `/old` to `/new`.
#[derive(Debug, Default)]
struct Rules(Mutex<Vec<String>>);

#[async_trait]
impl Policy for Rules {
    async fn check(&self, url: &str) -> Result<Option<String>, Refused> {
        self.0.lock().unwrap().push(url.to_owned());
        if url.ends_with("/denied") {
            return Err(Refused("denied".to_owned()));
        }
        Ok(url.strip_suffix("/old").map(|base| format!("{base}/new")))
    }
}

/// Answers every request with what it was asked, in the way the path names; remembers the requests.
async fn server(requests: Arc<Mutex<Vec<String>>>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let requests = Arc::clone(&requests);
            tokio::spawn(async move {
                let request = head(&mut stream).await;
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                requests.lock().unwrap().push(request);
                let answer = match path.as_str() {
                    "/missing" => "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno".to_owned(),
                    "/moved" => {
                        "HTTP/1.1 302 Found\r\nLocation: /new\r\nContent-Length: 0\r\n\r\n".to_owned()
                    }
                    "/torn" => "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this".to_owned(),
                    "/chunked" => {
                        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                            .to_owned()
                    }
                    "/endless" => "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end".to_owned(),
                    path => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}", path.len()),
                };
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
        }
    });
    address
}

/// Reads a message up to its empty line.
async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => text.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(text).unwrap()
}

struct Lab {
    proxy: std::net::SocketAddr,
    authority: Arc<Authority>,
    record: Record,
    rules: Arc<Rules>,
    requests: Arc<Mutex<Vec<String>>>,
    ended: CancellationToken,
    serving: tokio::task::JoinHandle<io::Result<()>>,
}

impl Lab {
    async fn new() -> Self {
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let to = server(Arc::clone(&requests)).await;
        let authority = Arc::new(Authority::new().unwrap());
        let (record, rules) = (Record::default(), Arc::new(Rules::default()));
        let policy: Arc<dyn Policy> = Arc::clone(&rules) as _;
        let proxy = Proxy::new(
            Arc::clone(&authority),
            Arc::new(To(to)),
            Some(policy),
            record.clone(),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ended = CancellationToken::new();
        let until = ended.clone();
        let serving = tokio::spawn(async move { proxy.serve(listener, &until).await });
        Self {
            proxy: address,
            authority,
            record,
            rules,
            requests,
            ended,
            serving,
        }
    }

    /// Sends a request on a connection of its own; returns the whole answer.
    async fn get(&self, method: &str, url: &str) -> String {
        let mut stream = TcpStream::connect(self.proxy).await.unwrap();
        let request = format!(
            "{method} {url} HTTP/1.1\r\nHost: ignored.test\r\nProxy-Connection: x\r\nAccept-Encoding: gzip\r\n\
             Connection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A torn body ends in an error.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    async fn end(self) -> Record {
        self.ended.cancel();
        self.serving.await.unwrap().unwrap();
        self.record
    }
}

#[tokio::test]
async fn what_is_fetched_is_passed_on_and_noted() {
    let lab = Lab::new().await;
    let answer = lab.get("GET", "http://user:secret@a.test:80/x").await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n/x"),
        "{answer}"
    );
    assert!(lab.get("GET", "http://a.test:8080/chunked").await.contains("abc"));
    assert!(
        lab.get("GET", "http://a.test/endless")
            .await
            .contains("until the end")
    );
    lab.get("GET", "http://a.test/moved").await;
    lab.get("GET", "http://a.test/new").await;
    let sent = lab.requests.lock().unwrap().clone();
    let asked = lab.rules.0.lock().unwrap().clone();
    let record = lab.end().await;
    assert!(
        sent[0].starts_with("GET /x HTTP/1.1\r\n") && sent[0].to_lowercase().contains("host: a.test\r\n")
    );
    assert!(
        !sent[0].to_lowercase().contains("proxy-") && !sent[0].contains("gzip"),
        "{}",
        sent[0]
    );
    assert_eq!(asked[0], "http://xxxxx:xxxxx@a.test/x");
    let mut urls: Vec<(String, Digest)> = record
        .materials()
        .into_iter()
        .map(|found| (found.url, found.digest))
        .collect();
    urls.sort();
    let expected = [
        ("http://a.test/endless", "until the end"),
        ("http://a.test/moved", "/new"),
        ("http://a.test/new", "/new"),
        ("http://a.test:8080/chunked", "abc"),
        ("http://xxxxx:xxxxx@a.test/x", "/x"),
    ];
    let expected: Vec<_> = expected
        .map(|(url, body)| (url.to_owned(), Digest::sha256(body)))
        .into();
    assert_eq!(urls, expected);
    assert!(record.incomplete().is_empty());
    assert_eq!(record.requests().len(), 5);
}

#[tokio::test]
async fn what_is_not_pinned_says_why() {
    let lab = Lab::new().await;
    assert!(
        lab.get("GET", "http://a.test/missing")
            .await
            .starts_with("HTTP/1.1 404 Not Found")
    );
    lab.get("GET", "http://a.test/torn").await;
    lab.get("POST", "http://a.test/post").await;
    let gone = lab.get("GET", "http://gone.test/").await;
    assert!(
        gone.starts_with("HTTP/1.1 502 Bad Gateway") && gone.contains("no such host"),
        "{gone}"
    );
    let record = lab.end().await;
    let mut reasons: Vec<&str> = record
        .incomplete()
        .iter()
        .map(|incomplete| incomplete.reason)
        .collect();
    reasons.sort_unstable();
    let expected = [
        "body_read_failed",
        "method_not_materializable",
        "unsuccessful_response",
        "upstream_error",
    ];
    assert_eq!(reasons, expected);
    assert!(record.materials().is_empty());
    assert!(record.requests().iter().any(|request| request.status == 502));
}

#[tokio::test]
async fn policies_decide_before_anything_is_sent() {
    let lab = Lab::new().await;
    let denied = lab.get("GET", "http://a.test/denied").await;
    assert!(
        denied.starts_with("HTTP/1.1 403 Forbidden") && denied.ends_with("Forbidden\n"),
        "{denied}"
    );
    assert!(lab.requests.lock().unwrap().is_empty());
    assert!(lab.get("GET", "http://a.test/old").await.ends_with("/new"));
    // Only what is fetched can come from elsewhere.
    assert!(
        lab.get("POST", "http://a.test/old")
            .await
            .starts_with("HTTP/1.1 403")
    );
    assert!(lab.get("GET", "/relative").await.ends_with("/relative"));
    assert!(lab.get("GET", "ftp://a.test/").await.starts_with("HTTP/1.1 400"));
    let sent = lab.requests.lock().unwrap().len();
    let record = lab.end().await;
    let urls: Vec<String> = record.requests().into_iter().map(|request| request.url).collect();
    assert_eq!(urls, ["http://a.test/new", "http://ignored.test/relative"]);
    assert_eq!(sent, 2);
}

#[tokio::test]
async fn tunnels_are_answered_in_the_servers_name() {
    let lab = Lab::new().await;
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(lab.authority.pem().as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    for (name, authority) in [
        ("gone.test", "gone.test:443"),
        ("192.0.2.1", "192.0.2.1:8443"),
        ("::1", "[::1]:443"),
    ] {
        let mut stream = TcpStream::connect(lab.proxy).await.unwrap();
        let wish = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
        stream.write_all(wish.as_bytes()).await.unwrap();
        assert!(head(&mut stream).await.starts_with("HTTP/1.1 200"));
        let server = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = connector.connect(server, stream).await.unwrap();
        for path in ["/denied", "/x"] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let answer = head(&mut stream).await;
            let expected = if path == "/denied" {
                "HTTP/1.1 403 Forbidden"
            } else {
                "HTTP/1.1 502 Bad Gateway"
            };
            assert!(answer.starts_with(expected), "{answer}");
            if path == "/denied" {
                let mut body = [0; 10];
                stream.read_exact(&mut body).await.unwrap();
                assert_eq!(&body, b"Forbidden\n");
            }
        }
    }
    // The policy saw the port, the record leaves it out.
    assert_eq!(lab.rules.0.lock().unwrap()[1], "https://gone.test:443/x");
    let record = lab.end().await;
    assert_eq!(record.requests()[0].url, "https://gone.test/x");
}
