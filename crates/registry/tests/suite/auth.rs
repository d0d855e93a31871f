//! Accounts and tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use registry::{BasicCredentials, Credentials, CredentialsError, Token, TokenRequest};
use testkit::image::{ImageBuilder, LayerBuilder};
use testkit::registry::{Accounts, Action, Options, Registry};

use super::client;

/// One account for every host.
#[derive(Debug)]
pub struct Account {
    account: Option<BasicCredentials>,
    token: Option<String>,
    failure: Option<CredentialsError>,
    asked: AtomicUsize,
}

impl Account {
    pub fn new(username: &str, secret: &str) -> Self {
        let account = BasicCredentials {
            username: username.into(),
            secret: secret.into(),
        };
        Self {
            account: Some(account),
            token: None,
            failure: None,
            asked: AtomicUsize::new(0),
        }
    }
}

#[async_trait::async_trait]
impl Credentials for Account {
    async fn basic(&self, _host: &str) -> Result<Option<BasicCredentials>, CredentialsError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(self.account.clone()),
        }
    }

    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialsError> {
        assert_eq!(request.client_id, "buildkit-client");
        assert!(request.realm.ends_with("/token") && request.service == "testkit");
        Ok(self.token.clone().map(|token| Token {
            token,
            expires_in_s: 60,
            issued_at_s: 0,
        }))
    }
}

fn accounts() -> Accounts {
    Accounts {
        users: BTreeMap::from([("user".to_owned(), "secret".to_owned())]),
        public: BTreeSet::from(["public".to_owned()]),
        read_only: BTreeSet::from(["public".to_owned()]),
        ..Accounts::default()
    }
}

async fn server(accounts: Accounts) -> Registry {
    let server = Registry::start_with(Options {
        accounts: Some(accounts),
        ..Options::default()
    })
    .await;
    let image = ImageBuilder::new()
        .layer(LayerBuilder::new().file("a", "1").build())
        .build();
    server.add_image("public", "t", &image);
    server.add_image("private", "t", &image);
    server
}

#[tokio::test]
async fn public_images_need_no_account() {
    let server = server(accounts()).await;
    let client = client();
    let reference = server.reference("public:t");
    let found = client.resolve(&reference).await.unwrap();
    client.manifest(&reference, &found).await.unwrap();
    assert_eq!(server.count("GET", "/token"), 1, "the token serves both requests");
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn a_private_image_without_account_is_denied() {
    let server = server(accounts()).await;
    let error = client()
        .resolve(&server.reference("private:t"))
        .await
        .unwrap_err();
    assert!(error.is_denied());
    assert_eq!(
        error.to_string(),
        "pull access denied, repository does not exist or may require authorization: \
         server message: insufficient_scope: authorization failed"
    );
}

#[tokio::test]
async fn an_account_opens_private_images() {
    for post_only in [false, true] {
        let server = server(Accounts {
            post_only,
            ..accounts()
        })
        .await;
        let client = client().with_credentials(Arc::new(Account::new("user", "secret")));
        client.resolve(&server.reference("private:t")).await.unwrap();
    }
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let server = server(accounts()).await;
    let client = client().with_credentials(Arc::new(Account::new("", "secret")));
    client.resolve(&server.reference("private:t")).await.unwrap();
    assert_eq!(server.count("POST", "/token"), 1);
}

#[tokio::test]
async fn basic_authentication_works() {
    let server = server(Accounts {
        basic: true,
        ..accounts()
    })
    .await;
    let reference = server.reference("private:t");
    let account = Arc::new(Account::new("user", "secret"));
    let with = client().with_credentials(Arc::clone(&account) as _);
    let found = with.resolve(&reference).await.unwrap();
    with.manifest(&reference, &found).await.unwrap();
    assert_eq!(account.asked.load(Ordering::Relaxed), 1);
    let error = client().resolve(&reference).await.unwrap_err();
    assert!(
        error.is_denied() && error.to_string().contains("401 Unauthorized"),
        "{error}"
    );
}

#[tokio::test]
async fn a_wrong_password_is_told() {
    let server = server(accounts()).await;
    let client = client().with_credentials(Arc::new(Account::new("user", "wrong")));
    let error = client.resolve(&server.reference("private:t")).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("failed to authorize: failed to fetch oauth token: "),
        "{text}"
    );
    assert!(
        text.ends_with("unauthorized: incorrect username or password"),
        "{text}"
    );
    assert!(!text.contains("wrong"));
}

#[tokio::test]
async fn the_owner_of_credentials_may_fetch_tokens() {
    use base64::Engine;
    let server = server(accounts()).await;
    let token = base64::engine::general_purpose::STANDARD.encode("repository:private:pull");
    let account = Account {
        account: None,
        token: Some(token),
        ..Account::new("", "")
    };
    let client = client().with_credentials(Arc::new(account));
    client.resolve(&server.reference("private:t")).await.unwrap();
    assert_eq!(server.count("", "/token"), 0);
}

#[tokio::test]
async fn without_session_the_client_is_anonymous() {
    let server = server(accounts()).await;
    let account = Account {
        failure: Some(CredentialsError::NoSession),
        ..Account::new("user", "secret")
    };
    let client = client().with_credentials(Arc::new(account));
    client.resolve(&server.reference("public:t")).await.unwrap();
    assert!(
        client
            .resolve(&server.reference("private:t"))
            .await
            .unwrap_err()
            .is_denied()
    );
}

#[tokio::test]
async fn an_expired_token_is_replaced() {
    let server = server(accounts()).await;
    let client = client();
    let reference = server.reference("public:t");
    let found = client.resolve(&reference).await.unwrap();
    server.fault("GET", "/manifests/", 1, expired(&server));
    client.manifest(&reference, &found).await.unwrap();
    assert_eq!(server.count("GET", "/token"), 2);
}

fn expired(server: &Registry) -> Action {
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"testkit\",scope=\"repository:public:pull\",error=\"invalid_token\"",
        server.domain()
    );
    Action::Status(401, vec![("WWW-Authenticate", challenge)], "")
}

#[tokio::test]
async fn tokens_of_one_build_do_not_serve_another() {
    let server = server(accounts()).await;
    let base = client();
    let one = base.with_credentials(Arc::new(Account::new("user", "secret")));
    one.resolve(&server.reference("private:t")).await.unwrap();
    assert!(
        base.resolve(&server.reference("private:t"))
            .await
            .unwrap_err()
            .is_denied()
    );
    let other = base.with_credentials(Arc::new(registry::Anonymous));
    assert!(
        other
            .resolve(&server.reference("private:t"))
            .await
            .unwrap_err()
            .is_denied()
    );
}

#[tokio::test]
async fn a_token_that_is_not_taken_is_no_matter_of_rights() {
    let server = server(accounts()).await;
    let realm = format!("http://{}/token", server.reference("x").domain());
    let challenge = format!("Bearer realm=\"{realm}\",service=\"testkit\",error=\"invalid_token\"");
    server.fault(
        "HEAD",
        "",
        9,
        Action::Status(401, vec![("WWW-Authenticate", challenge)], ""),
    );
    let error = client().resolve(&server.reference("public:t")).await.unwrap_err();
    let text = error.to_string();
    assert!(
        error.is_denied() && text.starts_with("unexpected status from HEAD request"),
        "{text}"
    );
    assert_eq!(server.count("GET", "/token"), 1);
}

#[tokio::test]
async fn hostile_challenges_are_errors() {
    for (challenge, text) in [
        ("Bearer", "no realm specified for token auth challenge"),
        ("Bearer realm=\"\"", "no realm specified for token auth challenge"),
        (
            "Bearer realm=\"file:///etc/passwd\"",
            "invalid token auth challenge realm",
        ),
        ("Bearer realm=\"::\"", "invalid token auth challenge realm"),
    ] {
        let server = Registry::start().await;
        server.fault(
            "HEAD",
            "",
            9,
            Action::Status(401, vec![("WWW-Authenticate", challenge.into())], ""),
        );
        // Nobody is asked for a token from nowhere: the account's owner would fail the test.
        let client = client().with_credentials(Arc::new(Account::new("user", "secret")));
        let error = client.resolve(&server.reference("x:t")).await.unwrap_err();
        assert!(error.to_string().contains(text), "{challenge}: {error}");
    }
    let server = Registry::start().await;
    server.fault(
        "HEAD",
        "",
        9,
        Action::Status(401, vec![("WWW-Authenticate", "Digest realm=x".into())], ""),
    );
    let error = client().resolve(&server.reference("x:t")).await.unwrap_err();
    assert!(error.to_string().contains("401 Unauthorized"), "{error}");
}
