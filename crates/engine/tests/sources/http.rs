//! Files from web servers, and from the client in place of one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::ErrorKind;
use llb::{HttpOptions, State};

use super::server::{Answer, Seen, Server};
use super::world::World;

fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Answer {
    let headers = headers
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    Answer(status, headers, body.as_bytes().to_vec())
}

fn http(server: &Server, path: &str) -> State {
    State::http(&server.url(path), HttpOptions::default())
}

fn methods(log: &[Seen]) -> Vec<&str> {
    log.iter().map(|seen| seen.method.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etag_saves_the_second_download() {
    let body: &'static Mutex<&str> = Box::leak(Box::new(Mutex::new("one")));
    let server = Server::start(|seen| {
        let body = *body.lock().unwrap();
        let etag = format!("\"{body}\"");
        let known = seen
            .headers
            .get("if-none-match")
            .is_some_and(|known| known.split(", ").any(|one| one == etag));
        let date = "Fri, 13 Feb 2009 23:31:30 GMT";
        answer(
            if known { 304 } else { 200 },
            &[("ETag", &etag), ("Last-Modified", date)],
            if known { "" } else { body },
        )
    });
    let world = World::new();
    let tree = world.build(&http(&server, "/dir/a.txt?x=y")).await.unwrap();
    assert_eq!(tree["a.txt"].content, "one");
    assert_eq!((tree["a.txt"].mode, tree["a.txt"].mtime), (0o600, 1_234_567_890));
    assert_eq!(methods(&server.take_log()), ["GET"]);
    assert_eq!(world.build(&http(&server, "/dir/a.txt?x=y")).await.unwrap(), tree);
    assert_eq!(methods(&server.take_log()), ["HEAD"]);
    *body.lock().unwrap() = "two";
    assert_eq!(
        world.build(&http(&server, "/dir/a.txt?x=y")).await.unwrap()["a.txt"].content,
        "two"
    );
    assert_eq!(methods(&server.take_log()), ["HEAD", "GET"]);
    // Both are kept now, and the server may say that either holds.
    *body.lock().unwrap() = "one";
    assert_eq!(
        world.build(&http(&server, "/dir/a.txt?x=y")).await.unwrap()["a.txt"].content,
        "one"
    );
    assert_eq!(methods(&server.take_log()), ["HEAD"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_etags_is_asked_for_the_file() {
    let server = Server::start(|_| answer(200, &[], "one"));
    let world = World::new();
    for _ in 0..2 {
        assert_eq!(
            world.build(&http(&server, "/a")).await.unwrap()["a"].content,
            "one"
        );
    }
    assert_eq!(methods(&server.take_log()), ["GET", "GET"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_must_match() {
    let server = Server::start(|_| answer(200, &[("ETag", "\"e\"")], "one"));
    let world = World::new();
    let pinned = |content: &str| {
        let checksum = Some(oci::Digest::sha256(content.as_bytes()));
        State::http(
            &server.url("/a"),
            HttpOptions {
                checksum,
                ..HttpOptions::default()
            },
        )
    };
    let error = world.build(&pinned("two")).await.unwrap_err();
    assert!(
        error.to_string().contains("digest mismatch") && error.kind() == ErrorKind::User,
        "{error}"
    );
    assert_eq!(world.build(&pinned("one")).await.unwrap()["a"].content, "one");
    server.take_log();
    // What the solver has needs no server.
    assert_eq!(world.build(&pinned("one")).await.unwrap()["a"].content, "one");
    assert_eq!(methods(&server.take_log()), Vec::<&str>::new());
}

/// The `Authorization` headers that a server saw, one a request.
fn authorizations(server: &Server) -> Vec<Option<String>> {
    let log = server.take_log();
    log.iter()
        .map(|seen| seen.headers.get("authorization").cloned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_without_credentials_for_others() {
    let back: &'static Mutex<String> = Box::leak(Box::default());
    let other = Server::start(|seen| match seen.target.as_str() {
        "/back" => answer(302, &[("Location", &back.lock().unwrap())], ""),
        _ => answer(200, &[], "there"),
    });
    let near = other.url("/c");
    let far = |path: &str| other.url(path).replace("127.0.0.1", "localhost");
    let (there, and_back) = (far("/c"), far("/back"));
    let account = there.replace("//", "//u:p@");
    let server = Server::start(move |seen| match seen.target.as_str() {
        "/a" => answer(302, &[("Location", "/b")], ""),
        "/near" => answer(307, &[("Location", &near)], ""),
        "/far" => answer(302, &[("Location", &there)], ""),
        "/back" => answer(302, &[("Location", &and_back)], ""),
        "/account" => answer(302, &[("Location", &account)], ""),
        "/loop" => answer(302, &[("Location", "/loop")], ""),
        "/none" => answer(302, &[("Location", "http://[")], ""),
        "/ftp" => answer(302, &[("Location", "ftp://127.0.0.1/a")], ""),
        _ => answer(200, &[], "here"),
    });
    *back.lock().unwrap() = server.url("/d");
    let world = World::new();
    let secret = ("auth".to_owned(), "Bearer s3cret".to_owned());
    world.client.secrets.lock().unwrap().extend([secret]);
    let options = || HttpOptions {
        auth_header_secret: "auth".to_owned(),
        ..HttpOptions::default()
    };
    let (sent, basic) = (Some("Bearer s3cret"), Some("Basic dTpw"));
    for (path, content, to_server, to_other) in [
        ("a", "here", &[sent, sent][..], &[][..]),
        ("near", "there", &[sent], &[sent]),
        ("far", "there", &[sent], &[None]),
        ("back", "here", &[sent, None], &[None]),
        ("account", "there", &[sent], &[basic]),
    ] {
        let state = State::http(&server.url(&format!("/{path}")), options());
        assert_eq!(world.build(&state).await.unwrap()[path].content, content);
        let seen = [authorizations(&server), authorizations(&other)];
        let wanted =
            [to_server, to_other].map(|sent| sent.iter().map(|one| one.map(str::to_owned)).collect());
        assert_eq!(seen, wanted as [Vec<Option<String>>; 2], "{path}");
    }
    for (path, text) in [
        ("/loop", "stopped after 10 redirects"),
        ("/none", "failed to parse Location header \"http://[\""),
        ("/ftp", "unsupported protocol scheme \"ftp\""),
    ] {
        let error = world.build(&http(&server, path)).await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_come_from_the_url_or_from_secrets() {
    let server = Server::start(|_| answer(200, &[], "1"));
    let world = World::new();
    let secret = |id: &str, value: &str| {
        let secret = (id.to_owned(), value.to_owned());
        world.client.secrets.lock().unwrap().extend([secret]);
    };
    let with_account = State::http(&server.url("/a").replace("//", "//u:p@"), HttpOptions::default());
    for (value, state) in [("Basic dTpw", &with_account), ("x", &http(&server, "/a"))] {
        world.build(state).await.unwrap();
        assert_eq!(authorizations(&server), [Some(value.to_owned())]);
        // What the client says of the host goes before what the URL says.
        secret("HTTP_AUTH_HEADER_127.0.0.1", "x");
    }
    secret("HTTP_AUTH_TOKEN_127.0.0.1", "t");
    world.build(&with_account).await.unwrap();
    assert_eq!(authorizations(&server), [Some("Bearer t".to_owned())]);
    secret("HTTP_AUTH_TOKEN_127.0.0.1", "hid\nden");
    let error = world.build(&http(&server, "/a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("invalid header field value for \"Authorization\""),
        "{text}"
    );
    assert!(!text.contains("hid"), "{text}");
    assert_eq!(authorizations(&server).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_may_name_the_file() {
    let server = Server::start(|seen| match seen.target.as_str() {
        "/evil" => answer(
            200,
            &[("Content-Disposition", "attachment; filename=\"../../etc/x\"")],
            "1",
        ),
        _ => answer(200, &[("Content-Disposition", "attachment; filename=b.txt")], "1"),
    });
    let world = World::new();
    assert!(
        world
            .build(&http(&server, "/a"))
            .await
            .unwrap()
            .contains_key("b.txt")
    );
    assert!(
        world
            .build(&http(&server, "/evil"))
            .await
            .unwrap()
            .contains_key("x")
    );
    let options = HttpOptions {
        filename: "c".to_owned(),
        perm: 0o755,
        ..HttpOptions::default()
    };
    let tree = world
        .build(&State::http(&server.url("/a"), options))
        .await
        .unwrap();
    assert_eq!(tree["c"].mode, 0o755);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_has_the_owner_that_is_asked_for() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let server = Server::start(|_| answer(200, &[("ETag", "\"e\"")], "1"));
    let world = World::new();
    for owner in [(11, 12), (0, 13)] {
        let options = HttpOptions {
            uid: owner.0,
            gid: owner.1,
            ..HttpOptions::default()
        };
        let tree = world
            .build(&State::http(&server.url("/a"), options))
            .await
            .unwrap();
        assert_eq!((tree["a"].owner, tree["a"].mode), (owner, 0o600));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_told_who_asks_and_what_for() {
    // One file for each kind that is accepted.
    let server = Server::start(|seen| answer(200, &[], &seen.headers["accept"]));
    let world = World::new();
    for kind in ["text/plain", "text/html"] {
        let options = HttpOptions {
            headers: Some((kind.to_owned(), "mine/1".to_owned())),
            ..HttpOptions::default()
        };
        let tree = world
            .build(&State::http(&server.url("/a"), options))
            .await
            .unwrap();
        assert_eq!(tree["a"].content, kind);
    }
    let log = server.take_log();
    assert!(
        log.iter().all(|seen| seen.headers["user-agent"] == "mine/1"),
        "{log:?}"
    );
    assert!(world.build(&http(&server, "/a")).await.is_ok());
    let agent = &server.take_log()[0].headers["user-agent"];
    assert!(agent.starts_with("buildkit/"), "{agent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_cut_short_is_none() {
    let is_honest: &'static AtomicBool = Box::leak(Box::default());
    let server = Server::start(|_| match is_honest.load(Ordering::SeqCst) {
        true => answer(200, &[("ETag", "\"e\"")], "whole"),
        false => answer(200, &[("ETag", "\"e\""), ("Content-Length", "1000000")], "who"),
    });
    let world = World::new();
    let error = world.build(&http(&server, "/a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains(&server.url("/a")), "{error}");
    server.take_log();
    // Nothing of it is kept for the server to confirm.
    is_honest.store(true, Ordering::SeqCst);
    assert_eq!(
        world.build(&http(&server, "/a")).await.unwrap()["a"].content,
        "whole"
    );
    assert_eq!(methods(&server.take_log()), ["GET"]);
}

fn gzip(text: &str) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_inside_is_no_file() {
    let server = Server::start(|seen| {
        let chunks: &[u8] = b"3\r\nwho\r\n";
        let header = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        let whole = gzip("whole");
        match seen.target.as_str() {
            "/chunks" => Answer(200, header("Transfer-Encoding", "chunked"), chunks.to_vec()),
            "/no-chunk" => Answer(200, header("Transfer-Encoding", "chunked"), b"who\r\n".to_vec()),
            "/cut-gzip" => Answer(
                200,
                header("Content-Encoding", "gzip"),
                whole[..whole.len() - 1].to_vec(),
            ),
            "/damaged-gzip" => {
                let mut damaged = whole;
                // Of the checksum.
                let at = damaged.len() - 8;
                damaged[at] ^= 1;
                Answer(200, header("Content-Encoding", "gzip"), damaged)
            }
            "/gzip-and-more" => {
                let more = [whole.as_slice(), b"more"].concat();
                Answer(200, header("Content-Encoding", "gzip"), more)
            }
            _ => Answer(200, header("Content-Encoding", "gzip"), b"whole".to_vec()),
        }
    });
    let world = World::new();
    for path in [
        "/chunks",
        "/no-chunk",
        "/cut-gzip",
        "/damaged-gzip",
        "/gzip-and-more",
        "/no-gzip",
    ] {
        let error = world.build(&http(&server, path)).await.expect_err(path);
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{path}: {error}");
        assert!(
            error.to_string().contains(&format!("{}: ", server.url(path))),
            "{error}"
        );
    }
    let kept = world.store.disk_usage(&cache::UsageOptions::default()).unwrap();
    assert!(kept.is_empty(), "{kept:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_may_have_several_parts() {
    let server = Server::start(|_| {
        let body = [gzip("one and "), gzip("two")].concat();
        Answer(
            200,
            vec![("Content-Encoding".to_owned(), "gzip".to_owned())],
            body,
        )
    });
    let tree = World::new().build(&http(&server, "/a")).await.unwrap();
    assert_eq!(tree["a"].content, "one and two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_no_longer_than_its_server_says() {
    let server = Server::start(|_| answer(200, &[("Content-Length", "3")], "whole"));
    let world = World::new();
    let of = |content: &str| HttpOptions {
        checksum: Some(oci::Digest::sha256(content)),
        ..HttpOptions::default()
    };
    let build = async |options| world.build(&State::http(&server.url("/a"), options)).await;
    assert_eq!(build(HttpOptions::default()).await.unwrap()["a"].content, "who");
    assert_eq!(build(of("who")).await.unwrap()["a"].content, "who");
    let error = build(of("whole")).await.unwrap_err();
    assert!(error.to_string().contains("digest mismatch"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_waits_for_no_server() {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/a", listener.local_addr().unwrap());
    let (begun, mut has_begun) = tokio::sync::mpsc::channel(1);
    // A server that never comes to an end; it sees the end of its client.
    let server = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        let head = "HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\nsome";
        stream.write_all(head.as_bytes()).unwrap();
        begun.blocking_send(()).unwrap();
        while stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    });
    let world = World::new();
    let source = State::http(&url, HttpOptions::default());
    tokio::select! {
        built = world.build(&source) => panic!("nothing was built: {built:?}"),
        _ = has_begun.recv() => {}
    }
    tokio::time::timeout(std::time::Duration::from_secs(30), server)
        .await
        .expect("the connection ends")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_kind() {
    let server = Server::start(|seen| answer(seen.target[1..].parse().unwrap(), &[], ""));
    let world = World::new();
    for (path, kind) in [
        ("/404", ErrorKind::NotFound),
        ("/403", ErrorKind::Denied),
        ("/503", ErrorKind::Unavailable),
    ] {
        let error = world.build(&http(&server, path)).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(
            error
                .to_string()
                .contains(&format!("invalid response status {}", &path[1..])),
            "{error}"
        );
    }
    let gone = State::http("http://127.0.0.1:1/x", HttpOptions::default());
    assert_eq!(
        world.build(&gone).await.unwrap_err().kind(),
        ErrorKind::Unavailable
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_uploads_stand_for_a_server() {
    let world = World::new();
    world
        .client
        .uploads
        .lock()
        .unwrap()
        .insert("/abc".to_owned(), b"from standard input");
    let upload = |name: &str| State::http(&format!("http://buildkit-session/{name}"), HttpOptions::default());
    assert_eq!(
        world.build(&upload("abc")).await.unwrap()["abc"].content,
        "from standard input"
    );
    assert!(world.build(&upload("def")).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_resolved_without_a_build() {
    let server = Server::start(|_| {
        answer(
            200,
            &[
                ("ETag", "\"e\""),
                ("Last-Modified", "Fri, 13 Feb 2009 23:31:30 GMT"),
            ],
            "one",
        )
    });
    let world = World::new();
    let meta = world.ask(&http(&server, "/a.txt")).await.unwrap().http.unwrap();
    assert_eq!(
        (meta.digest, meta.filename.as_str()),
        (oci::Digest::sha256(b"one"), "a.txt")
    );
    assert!(meta.last_modified.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_can_be_made_with_more_bytes() {
    let server = Server::start(|_| answer(200, &[], "body"));
    let world = World::new();
    let opts = [("suffix".to_owned(), "-more".to_owned())];
    let meta = world
        .ask_with(&http(&server, "/a"), opts.clone().into())
        .await
        .unwrap();
    let http_meta = meta.http.unwrap();
    assert_eq!(http_meta.digest, oci::Digest::sha256("body"));
    let wanted = oci::Digest::of(oci::Algorithm::Sha384, "body-more").to_string();
    assert_eq!(http_meta.checksum, Some((wanted.clone(), "-more".into())));
    // Also where a pinned checksum makes fetching needless otherwise; what is not pinned is not checksummed.
    let pinned = |digest| {
        let options = HttpOptions {
            checksum: Some(digest),
            ..HttpOptions::default()
        };
        State::http(&server.url("/a"), options)
    };
    let meta = world
        .ask_with(&pinned(oci::Digest::sha256("body")), opts.clone().into())
        .await
        .unwrap();
    assert_eq!(meta.http.unwrap().checksum.unwrap().0, wanted);
    let wrong = pinned(oci::Digest::sha256("other"));
    assert!(world.ask_with(&wrong, opts.into()).await.is_err());
    let seen = server.take_log();
    assert!(
        seen.iter()
            .all(|seen| seen.headers["user-agent"].starts_with("buildkit/v"))
    );
}

macro_rules! signature_data {
    ($name:literal) => {
        include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../source/src/signature/testdata/",
            $name
        ))
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_signed_as_demanded() {
    let text = signature_data!("text");
    let server = Server::start(move |seen| {
        let body = if seen.target == "/forged" { "forged" } else { text };
        answer(200, &[("ETag", "\"e\"")], body)
    });
    let world = World::new();
    let signed = |path: &str, key: &str, signature: &str, checksum| {
        let options = HttpOptions {
            checksum,
            signature: Some((key.to_owned(), signature.to_owned())),
            ..HttpOptions::default()
        };
        State::http(&server.url(path), options)
    };
    let (key, signature) = (signature_data!("rsa.pub"), signature_data!("rsa.sig"));
    let build = async |state: State| {
        let built = world.build(&state).await;
        built
            .map(|tree| tree.values().map(|file| file.content.clone()).collect::<String>())
            .map_err(|error| error.to_string())
    };
    let fine = Ok(text.to_owned());
    assert_eq!(build(signed("/a", key, signature, None)).await, fine);
    let checksum = Some(oci::Digest::sha256(text));
    assert_eq!(build(signed("/a", key, signature, checksum)).await, fine);
    // What was built without a signature is not taken to be signed, pinned or not.
    let other = signature_data!("ed.pub");
    assert_eq!(build(http(&server, "/a")).await, fine);
    for checksum in [None, checksum] {
        let error = build(signed("/a", other, signature, checksum)).await.unwrap_err();
        assert!(
            error.contains("failed to verify pgp signature: signature by"),
            "{error}"
        );
    }
    let error = build(signed("/forged", key, signature, None)).await.unwrap_err();
    assert!(error.contains("invalid signature"), "{error}");
    let error = build(signed("/a", "", signature, None)).await.unwrap_err();
    assert!(
        error.contains("http signature verification requires both pubkey and signature"),
        "{error}"
    );
    let ssh = (
        signature_data!("ssh_ed25519.pub"),
        signature_data!("ssh_ed25519.sig"),
    );
    let error = build(signed("/a", ssh.0, ssh.1, None)).await.unwrap_err();
    assert!(error.contains("failed to verify pgp signature"), "{error}");
    let error = world
        .ask(&signed("/forged", key, signature, None))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("invalid signature"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_an_earlier_build_stands_in_where_it_may() {
    let (is_down, body): (&'static AtomicBool, &'static Mutex<&str>) =
        (Box::leak(Box::default()), Box::leak(Box::new(Mutex::new("one"))));
    let server = Server::start(|_| {
        let status = if is_down.load(Ordering::SeqCst) { 503 } else { 200 };
        let body = *body.lock().unwrap();
        answer(status, &[("ETag", &format!("\"{body}\""))], body)
    });
    let (world, file) = (World::new(), http(&server, "/a"));
    let error = world.build_with_cache(&file, "offline").await.unwrap_err();
    assert!(error.to_string().contains("is not known here"), "{error}");
    assert_eq!(methods(&server.take_log()), Vec::<&str>::new());
    // The last answer is the one that counts, also when it is that of an older file.
    for now in ["one", "two", "one"] {
        *body.lock().unwrap() = now;
        assert_eq!(world.build(&file).await.unwrap()["a"].content, now);
    }
    is_down.store(true, Ordering::SeqCst);
    let error = world.build(&file).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let error = world.build_with_cache(&file, "required").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    server.take_log();
    assert_eq!(
        world.build_with_cache(&file, "fallback").await.unwrap()["a"].content,
        "one"
    );
    assert!(!server.take_log().is_empty(), "a fallback asks first");
    assert_eq!(
        world.build_with_cache(&file, "offline").await.unwrap()["a"].content,
        "one"
    );
    assert_eq!(methods(&server.take_log()), Vec::<&str>::new());
    // An answer that is there is used.
    is_down.store(false, Ordering::SeqCst);
    *body.lock().unwrap() = "three";
    assert_eq!(
        world.build_with_cache(&file, "fallback").await.unwrap()["a"].content,
        "three"
    );
    let error = world.build_with_cache(&file, "sometimes").await.unwrap_err();
    assert!(
        error.to_string().contains("required, fallback or offline"),
        "{error}"
    );
}
