//! Tests against a scripted token server.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread::JoinHandle;

use super::*;

/// A server that gives these answers, a connection each, and returns what it was sent.
fn serve(answers: Vec<(&'static str, &'static str)>) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let realm = format!("http://{}/token?a=b", listener.local_addr().unwrap());
    let serving = std::thread::spawn(move || {
        let mut seen = Vec::new();
        for (head, body) in answers {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !is_whole(&request) {
                let mut buffer = [0; 4096];
                let count = connection.read(&mut buffer).unwrap();
                assert_ne!(count, 0, "the request is cut off");
                request.extend_from_slice(&buffer[..count]);
            }
            seen.push(String::from_utf8(request).unwrap());
            let length = body.len();
            write!(
                connection,
                "HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            )
            .unwrap();
        }
        seen
    });
    (realm, serving)
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

fn account(username: &str, secret: &str) -> Account {
    Account {
        username: username.to_owned(),
        secret: secret.to_owned(),
        registry_token: String::new(),
    }
}

async fn fetch(account: &Account, realm: &str) -> Result<String, String> {
    let request = pb::FetchTokenRequest {
        client_id: "buildkit-client".to_owned(),
        host: "h".to_owned(),
        realm: realm.to_owned(),
        service: "s".to_owned(),
        scopes: vec!["repository:a/b:pull".to_owned(), "x:y:z".to_owned()],
    };
    let fetched = Tokens::default().fetch(account, &request).await;
    fetched
        .map(|answer| answer.token)
        .map_err(|error| error.to_string())
}

pub(super) const TOKEN: (&str, &str) = ("200 OK", r#"{"access_token":"t"}"#);
const QUERY: &str = "GET /token?a=b&scope=repository%3Aa%2Fb%3Apull&scope=x%3Ay%3Az&service=s ";

#[tokio::test]
async fn a_password_is_posted_once() {
    let (realm, serving) = serve(vec![TOKEN]);
    assert_eq!(fetch(&account("u", "p&q"), &realm).await, Ok("t".to_owned()));
    let seen = serving.join().unwrap();
    assert!(seen[0].starts_with("POST /token?a=b "), "{seen:?}");
    let form = "client_id=buildkit-client&grant_type=password&password=p%26q&scope=repository%3Aa%2Fb%3Apull+x%3Ay%3Az&service=s&username=u";
    assert!(seen[0].ends_with(form), "{seen:?}");
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let (realm, serving) = serve(vec![TOKEN]);
    assert_eq!(fetch(&account("", "identity"), &realm).await, Ok("t".to_owned()));
    let seen = serving.join().unwrap();
    assert!(
        seen[0].contains("&grant_type=refresh_token&refresh_token=identity&"),
        "{seen:?}"
    );
}

#[tokio::test]
async fn servers_that_know_no_post_are_asked_by_get() {
    for status in ["404 Not Found", "401 Unauthorized", "405 Method Not Allowed"] {
        let (realm, serving) = serve(vec![(status, ""), TOKEN]);
        assert_eq!(fetch(&account("u", "p"), &realm).await, Ok("t".to_owned()));
        let seen = serving.join().unwrap();
        assert!(seen[1].starts_with(QUERY), "{seen:?}");
        assert!(
            seen[1].to_lowercase().contains("authorization: basic dtpw"),
            "{seen:?}"
        );
    }
}

#[tokio::test]
async fn strangers_are_nobody() {
    let (realm, serving) = serve(vec![TOKEN]);
    assert_eq!(fetch(&Account::default(), &realm).await, Ok("t".to_owned()));
    let seen = serving.join().unwrap();
    assert!(seen[0].starts_with(QUERY), "{seen:?}");
    assert!(!seen[0].to_lowercase().contains("authorization"), "{seen:?}");
}

#[tokio::test]
async fn a_given_token_needs_no_server() {
    let given = Account {
        registry_token: "given".to_owned(),
        ..Account::default()
    };
    assert_eq!(fetch(&given, "http://127.0.0.1:1/").await, Ok("given".to_owned()));
}

#[tokio::test]
async fn refusals_are_told() {
    let denied = r#"{"errors":[{"code":"TOO_BAD","message":"not you"}]}"#;
    for (head, body, text) in [
        ("403 Forbidden", denied, "too bad: not you"),
        (
            "500 Internal Server Error",
            "oops\n",
            "status from POST request to REALM: 500 Internal Server Error: oops",
        ),
        ("200 OK", "<html>", "unable to decode token response"),
        (
            "200 OK",
            "{}",
            "authorization server did not include a token in the response",
        ),
        // A password is not sent on to where a server refers.
        (
            "307 Temporary Redirect\r\nLocation: http://localhost:1/",
            "",
            "status from POST request to REALM: 307 Temporary Redirect",
        ),
    ] {
        let (realm, serving) = serve(vec![(head, body)]);
        let error = fetch(&account("u", "hidden"), &realm).await.unwrap_err();
        assert!(error.contains(&text.replace("REALM", &realm)), "{error}");
        assert!(!error.contains("hidden"), "{error}");
        assert_eq!(serving.join().unwrap().len(), 1);
    }
    for realm in ["", "::", "file:///etc/passwd"] {
        let error = fetch(&account("u", "hidden"), realm).await.unwrap_err();
        assert_eq!(error, format!("invalid token auth challenge realm: {realm:?}"));
    }
}
